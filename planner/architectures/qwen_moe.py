"""Qwen 2 and 3 with mixtures of experts; Qwen 2 adds a shared expert behind a sigmoid gate.

Sources: arXiv:2407.10671, 2505.09388.
"""

from __future__ import annotations

from planner.architectures import ARCHITECTURES, ModelOps
from planner.architectures._blocks import decoder
from planner.architectures._common import decoder_fields, qwen_windows
from planner.architectures._config import Config
from planner.model_spec import ModelSpec


@ARCHITECTURES.register("qwen2_moe", "qwen3_moe")
class QwenMoe:
    """HF words: num_experts, num_experts_per_tok, moe_intermediate_size, shared_expert_intermediate_size, decoder_sparse_step."""

    @staticmethod
    def read(config: Config) -> ModelSpec:
        """ModelSpec of a Qwen mixture."""
        config.also_called(num_experts="num_local_experts")
        is_third = config.model_type == "qwen3_moe"
        config.also_called(num_experts="num_local_experts")
        fields = decoder_fields(config, max_positions=32768, kv_heads=4 if is_third else 16)
        bias = config.flag("attention_bias", False)
        return config.spec(
            family=config.model_type,
            **fields,
            **qwen_windows(config, fields["num_layers"]),
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
            is_gated=config.flag("is_gated", True),
            hidden_dropout=config.fraction("hidden_dropout"),
            qkv_bias=bias if is_third else config.flag("qkv_bias", True),
            attention_out_bias=bias if is_third else False,
            qk_norm="head" if is_third else "none",
            moe=config.moe(
                "num_experts",
                num_experts_per_token=config.size("num_experts_per_tok"),
                intermediate_size=config.size("moe_intermediate_size"),
                shared_intermediate_size=0 if is_third else config.size("shared_expert_intermediate_size"),
                has_shared_gate=not is_third,
                num_dense_layers=config.leading_layers("mlp_only_layers"),
                layer_period=config.size("decoder_sparse_step", 1),
            ),
        )

    @staticmethod
    def ops(spec: ModelSpec) -> ModelOps:
        """Ops from embedding to loss."""
        return decoder(spec)
