"""BLOOM: ALiBi, a norm after the embedding, LayerNorm, GELU, biases, tied embeddings. Source: arXiv:2211.05100."""

from __future__ import annotations

from planner.architectures import ARCHITECTURES, ModelOps
from planner.architectures._blocks import decoder
from planner.architectures._config import Config
from planner.model_spec import ModelSpec

UNLIMITED_POSITIONS = 2048
"""ALiBi has no table; BLOOM was trained on so many."""


@ARCHITECTURES.register("bloom")
class Bloom:
    """HF words: n_layer, n_head, hidden_size."""

    @staticmethod
    def read(config: Config) -> ModelSpec:
        """ModelSpec of a BLOOM configuration."""
        config.also_called(hidden_size="n_embed", n_head="num_attention_heads", n_layer="num_hidden_layers")
        hidden, heads = config.size("hidden_size"), config.size("n_head")
        return config.spec(
            family="bloom",
            hidden_size=hidden,
            num_layers=config.layers("n_layer"),
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=config.heads("hidden_size", "n_head", hidden, heads),
            intermediate_size=4 * hidden,
            vocab_size=config.size("vocab_size"),
            max_position_embeddings=config.size("seq_length", UNLIMITED_POSITIONS),
            tie_word_embeddings=config.flag("tie_word_embeddings", True),
            position="alibi",
            norm="layernorm",
            norm_bias=True,
            activation="gelu",
            is_gated=False,
            qkv_bias=True,
            attention_out_bias=True,
            mlp_bias=True,
            has_embedding_norm=True,
            attention_dropout=config.fraction("attention_dropout"),
            hidden_dropout=config.fraction("hidden_dropout"),
        )

    @staticmethod
    def ops(spec: ModelSpec) -> ModelOps:
        """Ops from embedding to loss."""
        return decoder(spec)
