"""Gemma 1, 2 and 3 (text): tied embeddings, GeGLU, RMSNorm, wide heads; 2 and 3 norm each branch again and slide a window.

Sources: arXiv:2403.08295, 2408.00118, 2503.19786. Gemma 2 alternates local and global layers, Gemma 3 has one global in six.
"""

from __future__ import annotations

from typing import Any

from planner.architectures import ARCHITECTURES, ModelOps
from planner.architectures._blocks import decoder
from planner.architectures._common import decoder_fields
from planner.architectures._config import Config
from planner.model_spec import ModelSpec

GLOBAL_PERIOD = {"gemma": 0, "gemma2": 2, "gemma3_text": 6}


@ARCHITECTURES.register("gemma", "gemma2", "gemma3_text")
class Gemma:
    """Gemma 3 with vision nests its text model under `text_config`: give that part."""

    @staticmethod
    def read(config: Config) -> ModelSpec:
        """ModelSpec of a Gemma configuration."""
        generation = str(config.values["model_type"])
        newer: dict[str, Any] = {}
        if generation != "gemma":
            newer = {
                "num_block_norms": 4,
                "sliding_window": config.size("sliding_window", 4096),
                "global_layer_period": config.size("sliding_window_pattern", GLOBAL_PERIOD[generation]),
                "qk_norm": "head" if generation == "gemma3_text" else "none",
            }
        bias = config.flag("attention_bias", False)
        return config.spec(
            family=generation,
            **decoder_fields(config, act_key="hidden_activation", act="gelu"),
            **newer,
            tie_word_embeddings=config.flag("tie_word_embeddings", True),
            qkv_bias=bias,
            attention_out_bias=bias,
        )

    @staticmethod
    def ops(spec: ModelSpec) -> ModelOps:
        """Ops from embedding to loss."""
        return decoder(spec)
