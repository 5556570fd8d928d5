"""Workload: what is trained on, how much of it, and with which recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from planner.spec import Count, PositiveInt, Spec

__all__ = ["DEFAULT_LORA_RANK", "Workload"]

DEFAULT_LORA_RANK = 16
"""Where `job: lora` names none."""


class Workload(Spec):
    """One training job; a step is one optimizer step over `global_batch_size` sequences.

    Keys left out are guessed by `estimate` and listed among the plan's assumptions.
    """

    job: Literal["pretrain", "finetune", "lora"] = "pretrain"
    seq_len: PositiveInt | None = None
    """Tokens per sequence; for encoder-decoder models on either side."""
    global_batch_size: PositiveInt | None = None
    """Sequences per step."""
    tokens: Count | None = None
    """Training tokens in all."""
    precision: Literal["fp32", "tf32", "fp16", "bf16", "fp8", "mxfp8", "nvfp4"] = "bf16"
    optimizer: Literal["adamw", "sgd", "sgd_momentum", "adafactor", "adamw_8bit", "muon"] = "adamw"
    recompute: Literal["none", "selective", "full"] = "none"
    attention_kernel: Literal["auto", "flash", "unfused"] = "auto"
    """`auto`: what the software stack uses."""
    loss_kernel: Literal["auto", "fused", "compiled", "vocab_parallel", "unfused", "chunked"] = "auto"
    """`unfused` keeps fp32 logits and probabilities; `vocab_parallel` and `compiled` the probabilities; `fused` the logits in the compute
    format; `chunked` an eighth of them."""
    activation_input: Literal["compute", "fp8"] = "compute"
    """What activation functions keep their input in (activation_func_fp8_input_store of Megatron-Core)."""
    lora_rank: PositiveInt | None = None
    """Rank of the adapters on linear layers of the blocks; only with job: lora."""
    lora_targets: Literal["all", "attention", "query_value"] = "all"
    """Which of those layers have adapters: all, attention's projections, or those of queries and values."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapters; what matters here is whether there is any."""
    frozen_format: Literal["compute", "nf4", "nf4_double", "int8"] = "compute"
    """What frozen matrices are stored in, with job: lora: the compute format, or one of QLoRA's (arXiv:2305.14314)."""

    @model_validator(mode="after")
    def _lora_rank_only_with_lora(self) -> Workload:
        if self.lora_rank is not None and self.job != "lora":
            raise ValueError(f"lora_rank belongs to job: lora, not to job: {self.job}; leave lora_rank out or set job: lora")
        if self.job != "lora" and (self.lora_targets, self.lora_dropout, self.frozen_format) != ("all", 0.0, "compute"):
            raise ValueError("lora_targets, lora_dropout and frozen_format belong to job: lora; leave them out or set job: lora")
        return self
