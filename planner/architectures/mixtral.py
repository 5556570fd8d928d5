"""Mixtral: Llama's block with a mixture of experts in every layer. Source: arXiv:2401.04088."""

from __future__ import annotations

from planner.architectures import ARCHITECTURES, ModelOps
from planner.architectures._blocks import decoder
from planner.architectures._common import decoder_fields, window_fields
from planner.architectures._config import Config
from planner.model_spec import ModelSpec


@ARCHITECTURES.register("mixtral")
class Mixtral:
    """HF words: num_local_experts, num_experts_per_tok; `intermediate_size` is one expert's."""

    @staticmethod
    def read(config: Config) -> ModelSpec:
        """ModelSpec of a Mixtral configuration."""
        config.also_called(num_local_experts="num_experts")
        fields = decoder_fields(config, max_positions=131072, kv_heads=8)
        return config.spec(
            family="mixtral",
            **fields,
            **window_fields(config, fields["num_layers"]),
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
            is_gated=config.flag("is_gated", True),
            hidden_dropout=config.fraction("hidden_dropout"),
            moe=config.moe(
                "num_local_experts",
                num_experts_per_token=config.size("num_experts_per_tok", 2),
                intermediate_size=config.size("intermediate_size"),
            ),
        )

    @staticmethod
    def ops(spec: ModelSpec) -> ModelOps:
        """Ops from embedding to loss."""
        return decoder(spec)
