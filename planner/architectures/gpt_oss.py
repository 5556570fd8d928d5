"""GPT-OSS: mixture of experts with biases, attention sinks, every other layer with a sliding window. Source: arXiv:2508.10925."""

from __future__ import annotations

from planner.architectures import ARCHITECTURES, ModelOps
from planner.architectures._blocks import decoder
from planner.architectures._common import decoder_fields
from planner.architectures._config import Config
from planner.model_spec import ModelSpec, Moe


@ARCHITECTURES.register("gpt_oss")
class GptOss:
    """One learned sink per head; router and experts carry biases."""

    @staticmethod
    def read(config: Config) -> ModelSpec:
        """ModelSpec of a GPT-OSS configuration."""
        bias = config.flag("attention_bias", True)
        return config.spec(
            family="gpt_oss",
            **decoder_fields(config),
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
            qkv_bias=bias,
            attention_out_bias=bias,
            has_attention_sinks=True,
            sliding_window=config.size("sliding_window", 128),
            global_layer_period=2,
            moe=Moe(
                num_experts=config.size("num_local_experts"),
                num_experts_per_token=config.size("num_experts_per_tok", 4),
                intermediate_size=config.size("intermediate_size"),
                router_bias=True,
                expert_bias=True,
            ),
        )

    @staticmethod
    def ops(spec: ModelSpec) -> ModelOps:
        """Ops from embedding to loss."""
        return decoder(spec)
