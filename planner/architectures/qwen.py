"""Qwen 2, 2.5 and 3, dense: Llama's block with biases on Q, K and V (2) or norms on each head of Q and K (3).

Sources: arXiv:2407.10671, 2412.15115, 2505.09388.
"""

from __future__ import annotations

from planner.architectures import ARCHITECTURES, ModelOps
from planner.architectures._blocks import decoder
from planner.architectures._common import decoder_fields
from planner.architectures._config import Config
from planner.model_spec import ModelSpec


@ARCHITECTURES.register("qwen2", "qwen3")
class Qwen:
    """`use_sliding_window` is false in all published models; a window is read only when it is true."""

    @staticmethod
    def read(config: Config) -> ModelSpec:
        """ModelSpec of a Qwen 2 or 3 configuration."""
        is_third = config.values["model_type"] == "qwen3"
        bias = config.flag("attention_bias", False)
        return config.spec(
            family=str(config.values["model_type"]),
            **decoder_fields(config),
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
            qkv_bias=bias if is_third else True,
            attention_out_bias=bias if is_third else False,
            qk_norm="head" if is_third else "none",
            sliding_window=config.size("sliding_window", 0, 0) if config.flag("use_sliding_window", False) else 0,
        )

    @staticmethod
    def ops(spec: ModelSpec) -> ModelOps:
        """Ops from embedding to loss."""
        return decoder(spec)
