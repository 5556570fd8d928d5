"""MPT: ALiBi or learned positions, LayerNorm, GELU, biases or none, tied embeddings. Source: mosaicml/llm-foundry @4953182.

The released MPT-7B and 30B take ALiBi and no biases; the configurations that llm-foundry trains and times
(scripts/train/yamls/pretrain) take learned positions, a table of `max_seq_len` rows, and biases.
"""

from __future__ import annotations

from planner.architectures import ARCHITECTURES, ModelOps
from planner.architectures._blocks import decoder
from planner.architectures._config import Config
from planner.model_spec import ModelSpec


@ARCHITECTURES.register("mpt")
class Mpt:
    """HF words: d_model, n_heads, n_layers, expansion_ratio, max_seq_len, no_bias, learned_pos_emb, attn_config."""

    @staticmethod
    def read(config: Config) -> ModelSpec:
        """ModelSpec of an MPT configuration."""
        config.also_called(d_model="hidden_size", n_heads="num_attention_heads", n_layers="num_hidden_layers")
        hidden, heads = config.size("d_model"), config.size("n_heads")
        attention = config.section("attn_config")
        kind = attention.text("attn_type", "multihead_attention", {name: name for name in KV_HEADS})
        bias = not config.flag("no_bias", True)
        return config.spec(
            family="mpt",
            hidden_size=hidden,
            num_layers=config.layers("n_layers"),
            num_attention_heads=heads,
            num_key_value_heads=KV_HEADS[kind] or (heads if kind == "multihead_attention" else attention.size("kv_n_heads")),
            head_dim=config.heads("d_model", "n_heads", hidden, heads),
            intermediate_size=config.size("expansion_ratio", 4) * hidden,
            vocab_size=config.size("vocab_size"),
            max_position_embeddings=config.size("max_seq_len", 2048),
            tie_word_embeddings=config.flag("tie_word_embeddings", True),
            position=_position(config, attention),
            norm="layernorm",
            norm_bias=bias,
            activation="gelu",
            is_gated=config.section("ffn_config").text("ffn_type", "mptmlp", {"mptmlp": "", "mptglu": "gate"}) == "gate",
            qkv_bias=bias,
            attention_out_bias=bias,
            mlp_bias=bias,
            qk_norm="full" if attention.flag("qk_ln", False) else "none",
            attention_dropout=attention.fraction("attn_pdrop"),
            hidden_dropout=config.fraction("resid_pdrop"),
        )

    @staticmethod
    def ops(spec: ModelSpec) -> ModelOps:
        """Ops from embedding to loss."""
        return decoder(spec)


KV_HEADS = {"multihead_attention": 0, "grouped_query_attention": 0, "multiquery_attention": 1}
"""Key-value heads of each `attn_type`; 0: as the configuration says."""


def _position(config: Config, attention: Config) -> str:
    """How positions enter.

    ALiBi and rotary positions switch the learned ones off, which released configurations ask for beside ALiBi. Where
    `attn_config` says nothing, asking for learned positions is meant.
    """
    has_table = config.flag("learned_pos_emb", False)
    if attention.flag("rope", False):
        return "rope"
    if attention.flag("alibi", not has_table):
        return "alibi"
    return "learned" if config.flag("learned_pos_emb", True) else "none"
