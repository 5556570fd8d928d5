"""Llama 1-3 and the models built like it: RMSNorm, SwiGLU, rotary positions, grouped-query attention, no biases.

Sources: arXiv:2302.13971, 2307.09288, 2407.21783; Mistral arXiv:2310.06825; HF transformers config of each model_type.
"""

from __future__ import annotations

from planner.architectures import ARCHITECTURES, ModelOps
from planner.architectures._blocks import decoder
from planner.architectures._config import Config
from planner.model_spec import ModelSpec

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "relu": "relu"}


@ARCHITECTURES.register("llama", "mistral")
class Llama:
    """Also Mistral, whose sliding window is applied to every layer."""

    @staticmethod
    def read(config: Config) -> ModelSpec:
        """ModelSpec of a Llama or Mistral configuration."""
        hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
        bias = config.flag("attention_bias", False)
        return config.spec(
            family="llama",
            hidden_size=hidden,
            num_layers=config.size("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=config.size("num_key_value_heads", heads),
            head_dim=config.size("head_dim", 0, 0) or config.heads("hidden_size", "num_attention_heads", hidden, heads),
            intermediate_size=config.size("intermediate_size"),
            vocab_size=config.size("vocab_size"),
            max_position_embeddings=config.size("max_position_embeddings", 2048),
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
            activation=config.text("hidden_act", "silu", ACTIVATIONS),
            qkv_bias=bias,
            attention_out_bias=bias,
            mlp_bias=config.flag("mlp_bias", False),
            sliding_window=config.size("sliding_window", 0, 0),
            attention_dropout=config.fraction("attention_dropout"),
        )

    @staticmethod
    def ops(spec: ModelSpec) -> ModelOps:
        """Ops from embedding to loss."""
        return decoder(spec)
