"""MPT: ALiBi (or learned positions), LayerNorm without bias, GELU, no biases, tied embeddings. Source: mosaicml/llm-foundry @4953182."""

from __future__ import annotations

from planner.architectures import ARCHITECTURES, ModelOps
from planner.architectures._blocks import decoder
from planner.architectures._config import Config
from planner.model_spec import ModelSpec


@ARCHITECTURES.register("mpt")
class Mpt:
    """HF words: d_model, n_heads, n_layers, expansion_ratio, max_seq_len."""

    @staticmethod
    def read(config: Config) -> ModelSpec:
        """ModelSpec of an MPT configuration."""
        hidden, heads = config.size("d_model"), config.size("n_heads")
        bias = not config.flag("no_bias", True)
        return config.spec(
            family="mpt",
            hidden_size=hidden,
            num_layers=config.size("n_layers"),
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=config.heads("d_model", "n_heads", hidden, heads),
            intermediate_size=config.size("expansion_ratio", 4) * hidden,
            vocab_size=config.size("vocab_size"),
            max_position_embeddings=config.size("max_seq_len", 2048),
            tie_word_embeddings=config.flag("tie_word_embeddings", True),
            position="learned" if config.flag("learned_pos_emb", False) else "alibi",
            norm="layernorm",
            norm_bias=bias,
            activation="gelu",
            is_gated=False,
            qkv_bias=bias,
            attention_out_bias=bias,
            mlp_bias=bias,
        )

    @staticmethod
    def ops(spec: ModelSpec) -> ModelOps:
        """Ops from embedding to loss."""
        return decoder(spec)
