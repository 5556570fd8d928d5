"""OPT: learned positions (the table has two rows more than positions), LayerNorm, ReLU, biases, tied embeddings.

Source: arXiv:2205.01068. Not read: OPT-350m, whose embeddings are narrower than its blocks and whose norms come last.
"""

from __future__ import annotations

from planner.architectures import ARCHITECTURES, ModelOps
from planner.architectures._blocks import decoder
from planner.architectures._common import ACTIVATIONS
from planner.architectures._config import Config
from planner.model_spec import ModelSpec

NUM_UNUSED_POSITIONS = 2
"""Rows before the one of position 0, a relic of padding (fairseq's learned positions)."""


@ARCHITECTURES.register("opt")
class Opt:
    """HF words: ffn_dim, word_embed_proj_dim, do_layer_norm_before."""

    @staticmethod
    def read(config: Config) -> ModelSpec:
        """ModelSpec of an OPT configuration."""
        hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
        config.rule(
            config.size("word_embed_proj_dim", hidden) == hidden,
            "word_embed_proj_dim",
            f"must equal hidden_size = {hidden}",
            "use another size of OPT",
        )
        config.rule(config.flag("do_layer_norm_before", True), "do_layer_norm_before", "must be true", "use another size of OPT")
        config.rule(
            config.flag("layer_norm_elementwise_affine", True), "layer_norm_elementwise_affine", "must be true: norms have weights", "leave it out"
        )
        bias = config.flag("enable_bias", True)
        return config.spec(
            family="opt",
            hidden_size=hidden,
            num_layers=config.layers("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=config.heads("hidden_size", "num_attention_heads", hidden, heads),
            intermediate_size=config.size("ffn_dim"),
            vocab_size=config.size("vocab_size"),
            max_position_embeddings=config.size("max_position_embeddings", 2048),
            num_unused_positions=NUM_UNUSED_POSITIONS,
            tie_word_embeddings=config.flag("tie_word_embeddings", True),
            position="learned",
            norm="layernorm",
            norm_bias=True,
            has_final_norm=not config.flag("_remove_final_layer_norm", False),
            activation=config.text("activation_function", "relu", ACTIVATIONS),
            is_gated=False,
            qkv_bias=bias,
            attention_out_bias=bias,
            mlp_bias=bias,
            attention_dropout=config.fraction("attention_dropout"),
            hidden_dropout=config.fraction("dropout", 0.1),
        )

    @staticmethod
    def ops(spec: ModelSpec) -> ModelOps:
        """Ops from embedding to loss."""
        return decoder(spec)
