"""PaLM: parallel block, SwiGLU, multi-query attention, rotary positions, no biases, shared input and output embedding.

Source: arXiv:2204.02311, section 2 and table 1. HF has no such class; `model_type: palm` and Llama's words are this project's own.
"""

from __future__ import annotations

from planner.architectures import ARCHITECTURES, ModelOps
from planner.architectures._blocks import decoder
from planner.architectures._common import decoder_fields
from planner.architectures._config import Config
from planner.model_spec import ModelSpec


@ARCHITECTURES.register("palm")
class Palm:
    """One norm per block, weights only."""

    @staticmethod
    def read(config: Config) -> ModelSpec:
        """ModelSpec of a PaLM configuration."""
        fields = {**decoder_fields(config), "num_key_value_heads": config.size("num_key_value_heads", 1)}
        return config.spec(
            family="palm",
            **fields,
            tie_word_embeddings=config.flag("tie_word_embeddings", True),
            norm="layernorm",
            is_parallel_block=True,
            num_block_norms=1,
        )

    @staticmethod
    def ops(spec: ModelSpec) -> ModelOps:
        """Ops from embedding to loss."""
        return decoder(spec)
