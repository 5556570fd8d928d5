"""GPT-NeoX and Pythia: parallel residual, LayerNorm and linear layers with biases, GELU, rotary positions, untied head.

Sources: arXiv:2204.06745, 2304.01373. Rotary positions on a part of each head (`rotary_pct`) change no count.
"""

from __future__ import annotations

from planner.architectures import ARCHITECTURES, ModelOps
from planner.architectures._blocks import decoder
from planner.architectures._common import decoder_fields
from planner.architectures._config import Config
from planner.model_spec import ModelSpec


@ARCHITECTURES.register("gpt_neox")
class GptNeox:
    """Pythia writes the same model_type."""

    @staticmethod
    def read(config: Config) -> ModelSpec:
        """ModelSpec of a GPT-NeoX configuration."""
        bias = config.flag("attention_bias", True)
        return config.spec(
            family="gpt_neox",
            **decoder_fields(config, act="gelu"),
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
            norm="layernorm",
            norm_bias=True,
            is_gated=False,
            qkv_bias=bias,
            attention_out_bias=bias,
            mlp_bias=True,
            is_parallel_block=config.flag("use_parallel_residual", True),
            hidden_dropout=config.fraction("hidden_dropout"),
        )

    @staticmethod
    def ops(spec: ModelSpec) -> ModelOps:
        """Ops from embedding to loss."""
        return decoder(spec)
