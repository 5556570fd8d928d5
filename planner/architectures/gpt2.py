"""GPT-2, GPT-3 and Megatron's GPT: learned positions, LayerNorm, GELU, biases, tied embeddings, dropout.

Sources: Radford et al. 2019; arXiv:2005.14165 table 2.1; arXiv:1909.08053. GPT-3's alternating sparse layers are counted
as dense ones, as everybody does.
"""

from __future__ import annotations

from planner.architectures import ARCHITECTURES, ModelOps
from planner.architectures._blocks import decoder
from planner.architectures._config import Config
from planner.model_spec import ModelSpec


@ARCHITECTURES.register("gpt2")
class Gpt2:
    """HF words: n_embd, n_layer, n_head, n_positions, n_inner."""

    @staticmethod
    def read(config: Config) -> ModelSpec:
        """ModelSpec of a GPT-2 configuration."""
        config.also_called(n_embd="hidden_size", n_head="num_attention_heads", n_layer="num_hidden_layers", n_positions="max_position_embeddings")
        hidden, heads = config.size("n_embd"), config.size("n_head")
        return config.spec(
            family="gpt2",
            hidden_size=hidden,
            num_layers=config.layers("n_layer"),
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=config.heads("n_embd", "n_head", hidden, heads),
            intermediate_size=config.size("n_inner", 4 * hidden),
            vocab_size=config.size("vocab_size"),
            max_position_embeddings=config.size("n_positions", 1024),
            tie_word_embeddings=config.flag("tie_word_embeddings", True),
            position="learned",
            norm="layernorm",
            norm_bias=True,
            activation="gelu",
            is_gated=False,
            qkv_bias=True,
            attention_out_bias=True,
            mlp_bias=True,
            attention_dropout=config.fraction("attn_pdrop", 0.1),
            hidden_dropout=config.fraction("resid_pdrop", 0.1),
        )

    @staticmethod
    def ops(spec: ModelSpec) -> ModelOps:
        """Ops from embedding to loss."""
        return decoder(spec)
