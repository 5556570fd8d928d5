"""Llama 1-3 and the models built like it: RMSNorm, SwiGLU, rotary positions, grouped-query attention, no biases.

Sources: arXiv:2302.13971, 2307.09288, 2407.21783; Mistral arXiv:2310.06825; HF transformers' configuration of each model_type.
"""

from __future__ import annotations

from planner.architectures import ARCHITECTURES, ModelOps
from planner.architectures._blocks import decoder
from planner.architectures._common import decoder_fields, window_fields
from planner.architectures._config import Config
from planner.model_spec import ModelSpec


@ARCHITECTURES.register("llama", "mistral")
class Llama:
    """Also Mistral, whose sliding window is applied to every layer; null means none."""

    @staticmethod
    def read(config: Config) -> ModelSpec:
        """ModelSpec of a Llama or Mistral configuration."""
        bias = config.flag("attention_bias", False)
        if config.model_type == "mistral":
            fields = decoder_fields(config, max_positions=131072, kv_heads=8)
            windows = window_fields(config, fields["num_layers"], default=4096)
        else:
            fields, windows = decoder_fields(config), {}
        return config.spec(
            family="llama",
            **fields,
            **windows,
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
            qkv_bias=bias,
            attention_out_bias=bias,
            mlp_bias=config.flag("mlp_bias", False),
        )

    @staticmethod
    def ops(spec: ModelSpec) -> ModelOps:
        """Ops from embedding to loss."""
        return decoder(spec)
