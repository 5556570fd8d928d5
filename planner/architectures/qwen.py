"""Qwen 2, 2.5 and 3, dense: Llama's block with biases on Q, K and V (2) or norms on each head of Q and K (3).

Sources: arXiv:2407.10671, 2412.15115, 2505.09388.
"""

from __future__ import annotations

from planner.architectures import ARCHITECTURES, ModelOps
from planner.architectures._blocks import decoder
from planner.architectures._common import decoder_fields, qwen_windows
from planner.architectures._config import Config
from planner.model_spec import ModelSpec


@ARCHITECTURES.register("qwen2", "qwen3")
class Qwen:
    """`use_sliding_window` is false in all published models; a window is read only when it is true."""

    @staticmethod
    def read(config: Config) -> ModelSpec:
        """ModelSpec of a Qwen 2 or 3 configuration."""
        is_third = config.model_type == "qwen3"
        bias = config.flag("attention_bias", False)
        fields = decoder_fields(config, max_positions=32768, kv_heads=32, head_dim=128 if is_third else None)
        return config.spec(
            family=config.model_type,
            **fields,
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
            qkv_bias=bias if is_third else True,
            attention_out_bias=bias if is_third else False,
            qk_norm="head" if is_third else "none",
            **qwen_windows(config, fields["num_layers"]),
        )

    @staticmethod
    def ops(spec: ModelSpec) -> ModelOps:
        """Ops from embedding to loss."""
        return decoder(spec)
