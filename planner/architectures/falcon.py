"""Falcon: parallel block, multi-query or grouped-query attention, rotary positions, LayerNorm, GELU, no biases, tied embeddings.

Source: arXiv:2311.16867. 7B reads one norm; 40B and 180B (`new_decoder_architecture`) norm each branch on its own.
"""

from __future__ import annotations

from planner.architectures import ARCHITECTURES, ModelOps
from planner.architectures._blocks import decoder
from planner.architectures._config import Config
from planner.model_spec import ModelSpec


@ARCHITECTURES.register("falcon")
class Falcon:
    """HF words: num_kv_heads, multi_query, new_decoder_architecture, parallel_attn, alibi, bias."""

    @staticmethod
    def read(config: Config) -> ModelSpec:
        """ModelSpec of a Falcon configuration."""
        config.also_called(hidden_size="n_embed", num_attention_heads="n_head", num_hidden_layers="n_layer", num_kv_heads="n_head_kv")
        hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
        is_new, bias = config.flag("new_decoder_architecture", False), config.flag("bias", False)
        kv_heads = config.size("num_kv_heads", heads) if is_new else 1 if config.flag("multi_query", True) else heads
        num_norms = config.size("num_ln_in_parallel_attn", 2)
        config.rule(num_norms <= 2, "num_ln_in_parallel_attn", "must be 1 or 2", "write 2: one norm per branch")
        has_two_norms = is_new and num_norms == 2
        is_parallel = has_two_norms or config.flag("parallel_attn", True)
        return config.spec(
            kv_heads_key="num_kv_heads",
            family="falcon",
            hidden_size=hidden,
            num_layers=config.layers("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=config.heads("hidden_size", "num_attention_heads", hidden, heads),
            intermediate_size=config.size("ffn_hidden_size", 4 * hidden),
            vocab_size=config.size("vocab_size"),
            max_position_embeddings=config.size("max_position_embeddings", 2048),
            tie_word_embeddings=config.flag("tie_word_embeddings", True),
            position="alibi" if config.flag("alibi", False) else "rope",
            norm="layernorm",
            norm_bias=True,
            activation="gelu",
            is_gated=False,
            qkv_bias=bias,
            attention_out_bias=bias,
            mlp_bias=bias,
            is_parallel_block=is_parallel,
            num_block_norms=2 if has_two_norms or not is_parallel else 1,
            attention_dropout=config.fraction("attention_dropout"),
            hidden_dropout=config.fraction("hidden_dropout"),
        )

    @staticmethod
    def ops(spec: ModelSpec) -> ModelOps:
        """Ops from embedding to loss."""
        return decoder(spec)
