"""Gemma 1, 2 and 3 (text): tied embeddings, GeGLU, RMSNorm, wide heads; 2 and 3 norm each branch again and slide a window.

Sources: arXiv:2403.08295, 2408.00118, 2503.19786. Gemma 2 alternates local and global layers, Gemma 3 has one global in six.
"""

from __future__ import annotations

from typing import Any

from planner.architectures import ARCHITECTURES, ModelOps
from planner.architectures._blocks import decoder
from planner.architectures._common import decoder_fields, window_fields
from planner.architectures._config import Config
from planner.model_spec import ModelSpec

GLOBAL_PERIOD = {"gemma": 0, "gemma2": 2, "gemma3_text": 6}
DEFAULTS = {
    "gemma": {"max_positions": 8192, "kv_heads": 16},
    "gemma2": {"max_positions": 8192, "kv_heads": 4},
    "gemma3_text": {"max_positions": 131072, "kv_heads": 4},
}
TEXT_DEFAULTS = {"vocab_size": 262208, "num_attention_heads": 8}
"""Of transformers' Gemma3TextConfig: the published `text_config`s leave out what equals them."""


def _text_part(config: Config) -> Config:
    """The text model inside a configuration with vision."""
    text = config.mapping("text_config")
    config.rule(bool(text), "text_config", "is required: it holds the text model", "give a config.json of Gemma 3")
    config.raise_problems()
    return Config({**TEXT_DEFAULTS, **text, "model_type": "gemma3_text"}, config.name, config.where)


@ARCHITECTURES.register("gemma", "gemma2", "gemma3", "gemma3_text")
class Gemma:
    """Of Gemma 3 with vision the text model alone is counted; the vision encoder (0.4B) is not."""

    @staticmethod
    def read(config: Config) -> ModelSpec:
        """ModelSpec of a Gemma configuration."""
        notes: tuple[str, ...] = ()
        if config.model_type == "gemma3":
            config, notes = _text_part(config), ("text model only: the vision encoder is left out",)
        generation = config.model_type
        fields = decoder_fields(config, act_key="hidden_activation", act="gelu", head_dim=256, **DEFAULTS[generation])
        newer: dict[str, Any] = {}
        if generation != "gemma":
            config.also_called(sliding_window_pattern="_sliding_window_pattern")
            period = config.size("sliding_window_pattern", GLOBAL_PERIOD[generation])
            newer = {
                "num_block_norms": 4,
                **window_fields(config, fields["num_layers"], default=4096, period=period),
                "qk_norm": "head" if generation == "gemma3_text" else "none",
            }
        bias = config.flag("attention_bias", False)
        return config.spec(
            family=generation,
            assumptions=notes,
            **fields,
            **newer,
            tie_word_embeddings=config.flag("tie_word_embeddings", True),
            qkv_bias=bias,
            attention_out_bias=bias,
        )

    @staticmethod
    def ops(spec: ModelSpec) -> ModelOps:
        """Ops from embedding to loss."""
        return decoder(spec)
