"""T5: encoder and decoder, relative positions, RMSNorm, no biases; v1.0 with ReLU and tied embeddings, v1.1 and Flan gated and untied.

Sources: arXiv:1910.10683, 2002.05202. Both sides are taken to be `seq_len` long. The tables of relative positions live in the
first layer of each stack.
"""

from __future__ import annotations

from planner.architectures import ARCHITECTURES, ModelOps
from planner.architectures._blocks import Ops, attention, block_norm, decoder, dropout, enter, feed_forward, leave, residual
from planner.architectures._config import Config
from planner.model_spec import ModelSpec

FEED_FORWARD = {"relu": ("relu", False), "gated-gelu": ("gelu", True), "gated-silu": ("silu", True)}
UNLIMITED_POSITIONS = 512
"""Relative positions have no limit; T5 was trained on so many."""


def _branch(spec: ModelSpec, name: str, inner: Ops) -> Ops:
    """x + f(norm(x))."""
    return (
        block_norm(spec, f"{name}_norm"),
        *enter(spec, name),
        *inner,
        *leave(spec, name),
        *dropout(spec, f"{name}_dropout"),
        *residual(spec, f"{name}_add"),
    )


def _block(spec: ModelSpec, layer: int) -> Ops:
    """An encoder block, or after them a decoder block with attention to the encoder's output."""
    in_encoder, is_first = layer < spec.num_encoder_layers, layer in (0, spec.num_encoder_layers)
    table = spec.num_position_buckets * spec.num_attention_heads if is_first else 0
    ops = _branch(spec, "attention", attention(spec, is_causal=not in_encoder, num_bias_params=table))
    if not in_encoder:
        ops += _branch(spec, "cross", attention(spec, prefix="cross", is_causal=False))
    ops += _branch(spec, "mlp", feed_forward(spec))
    return (*ops, block_norm(spec, "encoder_norm")) if layer == spec.num_encoder_layers - 1 else ops


def _name(spec: ModelSpec, layer: int) -> str:
    """What to call the kind of block that layer `layer` is the first of."""
    side, position, size = "encoder", layer, spec.num_encoder_layers
    if layer >= size:
        side, position, size = "decoder", layer - size, spec.num_layers - size
    is_last_encoder = side == "encoder" and position == size - 1
    return f"{side} block" + (" (first)" if position == 0 else " (last)" if is_last_encoder else "")


@ARCHITECTURES.register("t5")
class T5:
    """HF words: d_model, d_kv, d_ff, num_layers, num_decoder_layers, num_heads, feed_forward_proj."""

    @staticmethod
    def read(config: Config) -> ModelSpec:
        """ModelSpec of a T5 configuration."""
        config.also_called(d_model="hidden_size", num_heads="num_attention_heads", num_layers="num_hidden_layers", d_kv="head_dim")
        heads, encoder = config.size("num_heads"), config.layers("num_layers")
        activation, is_gated = FEED_FORWARD[config.text("feed_forward_proj", "relu", {key: key for key in FEED_FORWARD})]
        return config.spec(
            family="t5",
            assumptions=("encoder and decoder see seq_len tokens each",),
            hidden_size=config.size("d_model"),
            num_layers=encoder + config.layers("num_decoder_layers", encoder),
            num_encoder_layers=encoder,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=config.size("d_kv"),
            intermediate_size=config.size("d_ff"),
            vocab_size=config.size("vocab_size"),
            max_position_embeddings=config.size("n_positions", UNLIMITED_POSITIONS),
            tie_word_embeddings=config.flag("tie_word_embeddings", True),
            position="relative",
            num_position_buckets=config.size("relative_attention_num_buckets", 32),
            activation=activation,
            is_gated=is_gated,
            hidden_dropout=config.fraction("dropout_rate", 0.1),
            attention_dropout=config.fraction("dropout_rate", 0.1),
        )

    @staticmethod
    def ops(spec: ModelSpec) -> ModelOps:
        """Ops from embedding to loss."""
        main = decoder(spec, _block)
        blocks = tuple((_name(spec, main.layers.index(kind)), ops) for kind, (_, ops) in enumerate(main.blocks))
        return ModelOps(main.embedding, blocks, main.layers, main.head)
