"""GPT-OSS: mixture of experts with biases, attention sinks, every other layer with a sliding window. Source: arXiv:2508.10925."""

from __future__ import annotations

from planner.architectures import ARCHITECTURES, ModelOps
from planner.architectures._blocks import decoder
from planner.architectures._common import decoder_fields, window_fields
from planner.architectures._config import Config
from planner.model_spec import ModelSpec


@ARCHITECTURES.register("gpt_oss")
class GptOss:
    """One learned sink per head; router and experts carry biases."""

    @staticmethod
    def read(config: Config) -> ModelSpec:
        """ModelSpec of a GPT-OSS configuration."""
        config.also_called(num_local_experts="num_experts")
        bias = config.flag("attention_bias", True)
        fields = decoder_fields(config, max_positions=131072, kv_heads=8, head_dim=64)
        return config.spec(
            family="gpt_oss",
            **fields,
            **window_fields(config, fields["num_layers"], default=128, period=2),
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
            qkv_bias=bias,
            attention_out_bias=bias,
            has_attention_sinks=True,
            moe=config.moe(
                "num_local_experts",
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
