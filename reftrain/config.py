"""What a run is: the plan file, read as it is, and the keys under `training:` that only the trainer needs.

In: a plan file (see `planner.plan`). Out: a `RunConfig` with nothing left open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from planner.architectures import load_model, read_model_config
from planner.errors import InputError, Problem
from planner.layout import Layout
from planner.layout_rules import Facts, check_layout
from planner.model_spec import ModelSpec
from planner.plan import Request, load_plan, spec_to_plain
from planner.spec import NonNegativeInt, PositiveInt, Spec, build
from planner.workload import DEFAULT_LORA_RANK, Workload

__all__ = ["AdapterOptions", "Kernels", "ModelDetails", "RunConfig", "Training", "load_run_config", "make_run_config"]

COMPUTE_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
DEFAULT_STEPS = 100


@dataclass(frozen=True)
class ModelDetails:
    """What changes a model's numbers and not its cost, in the words of HF's config.json."""

    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    norm_eps: float = 1e-5
    is_tanh_gelu: bool = False
    initializer_range: float = 0.02
    router_scores: Literal["softmax", "sigmoid"] = "softmax"
    router_normalizes: bool = True
    router_scale: float = 1.0

    @classmethod
    def read(cls, config: dict[str, Any]) -> ModelDetails:
        """From the raw keys; what is left out has transformers' default."""
        kind = config.get("model_type")
        rope = config.get("rope_parameters") or {}
        scaling = config.get("rope_scaling") or rope
        eps = next((config[key] for key in ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps") if config.get(key) is not None), None)
        act = config.get("hidden_act", config.get("activation_function", "gelu_new" if kind == "gpt2" else ""))
        is_deepseek = str(kind).startswith("deepseek")
        return cls(
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
            rope_scaling=scaling if scaling.get("rope_type", scaling.get("type", "default")) != "default" else {},
            norm_eps=float(eps if eps is not None else {"gpt2": 1e-5, "bert": 1e-12}.get(str(kind), 1e-6)),
            is_tanh_gelu=act in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
            initializer_range=float(config.get("initializer_range", 0.02)),
            router_scores="sigmoid" if config.get("scoring_func", "sigmoid" if kind == "deepseek_v3" else "softmax") == "sigmoid" else "softmax",
            router_normalizes=bool(config.get("norm_topk_prob", kind not in ("deepseek_v2", "qwen2_moe"))),
            router_scale=float(config.get("routed_scaling_factor", 2.5 if kind == "deepseek_v3" else 1.0)) if is_deepseek else 1.0,
        )

    def inverse_frequencies(self, head_dim: int) -> Tensor:
        """Angle per position of each pair of features, [D/2], fp64.

        Formula: theta^(-2i/D); Llama 3 stretches the slow ones (arXiv:2407.21783; transformers' `llama3` rope type), `linear` all.
        """
        plain = 1.0 / self.rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        kind = self.rope_scaling.get("rope_type", self.rope_scaling.get("type", "default"))
        if kind == "default":
            return plain
        if kind == "linear":
            return plain / float(self.rope_scaling["factor"])
        if kind != "llama3":
            raise InputError.single("model.rope_scaling", kind, "reftrain knows the rope types default, linear and llama3", "use one of them")
        factor, low, high = (float(self.rope_scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        turns = float(self.rope_scaling["original_max_position_embeddings"]) * plain / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return plain * (blend + (1 - blend) / factor)


@dataclass(frozen=True)
class Kernels:
    """Which kernel computes attention and loss."""

    attention: Literal["flash", "unfused"] = "flash"
    loss: Literal["chunked", "fused", "unfused"] = "chunked"
    recompute: Literal["none", "selective", "full"] = "none"


@dataclass(frozen=True)
class AdapterOptions:
    """What LoRA's adapters are like."""

    rank: int
    scale: float
    """alpha / rank."""
    dropout: float
    targets: Literal["all", "attention", "query_value"]


class Training(Spec):
    """The keys under `training:`; every one has a default."""

    data: str = "corpus"
    """`corpus` (shipped with the project), `synthetic`, a folder that `reftrain data prepare` wrote, or a jsonl file of examples."""
    init_from: str | None = None
    """Where the weights come from: a run's folder, one of its checkpoints, or a folder with HF-layout safetensors."""
    tokenizer: str | None = None
    """For examples; None: the one beside the weights."""
    valid_data: str | None = None
    """Held-out examples; None: `valid_fraction` of the others."""
    valid_fraction: float = Field(default=0.05, gt=0, lt=1)
    packing: bool = True
    """Examples share sequences, none of which sees another; else one a sequence, and the rest of it is empty."""
    lora_alpha: float | None = Field(default=None, gt=0)
    """Adapters count alpha / rank; None: twice the rank."""
    patience_evals: PositiveInt | None = None
    """So many evaluations without a better one end the run; the best checkpoint stays."""
    num_steps: PositiveInt | None = None
    """Steps of this run; None: workload.tokens over tokens per step."""
    learning_rate: float = Field(default=1e-3, gt=0, le=10)
    min_lr_fraction: float = Field(default=0.1, ge=0, le=1)
    warmup_steps: NonNegativeInt | None = None
    """None: a fiftieth of the run, at least 10 steps where it has as many."""
    lr_schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """WSD: the last part of the run, in which the rate falls."""
    weight_decay: float = Field(default=0.1, ge=0, le=1)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0, lt=1)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    clip_norm: float | None = Field(default=1.0, gt=0)
    balance_rate: float = Field(default=1e-3, ge=0, le=1)
    """Mixtures: how fast routers move towards idle experts."""
    mask_fraction: float = Field(default=0.15, gt=0, lt=1)
    """Encoders: share of tokens to predict."""
    seed: NonNegativeInt = 0
    compile: bool = False
    checkpoint_every_steps: PositiveInt = 200
    keep_checkpoints: PositiveInt = 3
    async_checkpoints: bool = True
    eval_every_steps: NonNegativeInt = 0
    """0: at the end only."""
    eval_tokens: PositiveInt = 100_000
    spike_sigmas: float = Field(default=6.0, gt=0)
    """A step whose loss or gradient norm lies so many standard deviations above the recent mean is skipped."""
    max_skipped_steps: PositiveInt = 5
    """So many bad steps in a row roll back to the last checkpoint."""
    max_rollbacks: NonNegativeInt = 2
    profile_steps: NonNegativeInt = 0
    """So many steps after warm-up become a trace, RUN_DIR/traces; they are not timed. `--profile` means 3."""

    @model_validator(mode="after")
    def _schedule_is_whole(self) -> Training:
        if self.num_steps is not None and self.warmup_steps is not None and self.warmup_steps > self.num_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} exceeds num_steps {self.num_steps}; lower it")
        return self


@dataclass(frozen=True)
class RunConfig:
    """A run with nothing left open."""

    request: Request
    model: ModelSpec
    model_config: dict[str, Any]
    details: ModelDetails
    workload: Workload
    layout: Layout
    training: Training
    seq_len: int
    global_batch_size: int
    num_steps: int

    @property
    def plan(self) -> dict[str, Any]:
        """The request as it was, with all that was filled in or changed on the command line."""
        # None has a meaning under training: no clipping.
        training = self.training.model_dump(by_alias=True)
        return {**spec_to_plain(self.request), "layout": spec_to_plain(self.layout), "training": training}

    @property
    def compute_dtype(self) -> torch.dtype:
        """Format of activations and matmuls."""
        return COMPUTE_DTYPES[self.workload.precision]

    @property
    def num_microbatches(self) -> int:
        """Microbatches per data-parallel rank and step."""
        return self.global_batch_size // (self.layout.dp * self.layout.micro_batch_size)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.global_batch_size * self.seq_len

    @property
    def warmup_steps(self) -> int:
        """Steps in which the rate rises."""
        if self.training.warmup_steps is not None:
            return self.training.warmup_steps
        return min(max(self.num_steps // 50, 10), self.num_steps // 2)

    @property
    def has_examples(self) -> bool:
        """Whether it trains on the responses of examples, not on running text."""
        return self.training.data.endswith((".jsonl", ".jsonl.gz"))

    @property
    def keeps_best(self) -> bool:
        """Whether the checkpoint with the lowest held-out loss is kept beside the newest ones."""
        return self.has_examples or self.training.patience_evals is not None

    @property
    def adapters(self) -> AdapterOptions:
        """Of `job: lora`."""
        rank, alpha = self.workload.lora_rank or DEFAULT_LORA_RANK, self.training.lora_alpha
        return AdapterOptions(rank, 2.0 if alpha is None else alpha / rank, self.workload.lora_dropout, self.workload.lora_targets)

    @property
    def kernels(self) -> Kernels:
        """`auto` means flash attention and chunked loss, as the stack file `reftrain` says."""
        attention, loss = self.workload.attention_kernel, self.workload.loss_kernel
        assert loss != "vocab_parallel"  # refused with the other wishes that the trainer has no kernel for
        assert loss != "compiled"
        return Kernels("flash" if attention == "auto" else attention, "chunked" if loss == "auto" else loss, self.workload.recompute)


def load_run_config(path: str | Path, changes: dict[str, Any] | None = None) -> RunConfig:
    """The run that a plan file describes; `changes` replace keys under `training:`.

    Raises:
        InputError: unreadable file, wrong keys, an incomplete or impossible layout.
    """
    return make_run_config(load_plan(path), changes, str(path))


def make_run_config(request: Request, changes: dict[str, Any] | None = None, where: str = "") -> RunConfig:
    """See `load_run_config`."""
    training = build(Training, {**(request.training or {}), **(changes or {})}, "training", where)
    config, _, _ = read_model_config(request.model)
    model, workload = load_model(request.model), request.workload
    given = request.layout.model_dump(exclude_none=True)
    if request.cluster.num_devices > 1 and not {"dp_replicate", "dp_shard", "tp", "cp", "pp"} & set(given):
        raise InputError.single(
            "layout", None, f"is open, and {request.cluster.num_devices} devices can be used in many ways",
            "let the planner choose: python -m planner estimate PLAN.yaml --out PLAN.yaml", where,
        )  # fmt: skip
    layout = request.layout.complete()
    missing = [key for key in ("seq_len", "global_batch_size") if getattr(workload, key) is None]
    if missing:
        fix = "let the planner fill it in: python -m planner estimate PLAN.yaml --out PLAN.yaml"
        raise InputError(*(Problem(f"workload.{key}", None, "is required to run", fix, where) for key in missing))
    seq_len, batch = int(workload.seq_len or 0), int(workload.global_batch_size or 0)
    check_layout(layout, Facts(model, request.cluster.num_devices, seq_len, batch))
    _check_workload(workload, model, seq_len, where)
    steps = training.num_steps or (max(round(workload.tokens / (seq_len * batch)), 1) if workload.tokens else DEFAULT_STEPS)
    return RunConfig(request, model, config, ModelDetails.read(config), workload, layout, training, seq_len, batch, steps)


def _check_workload(workload: Workload, model: ModelSpec, seq_len: int, where: str) -> None:
    problems = []
    if workload.precision not in COMPUTE_DTYPES:
        problems.append(Problem("workload.precision", workload.precision, f"reftrain runs {', '.join(COMPUTE_DTYPES)}", "use bf16", where))
    if workload.optimizer == "adamw_8bit":
        problems.append(Problem("workload.optimizer", workload.optimizer, "reftrain has no 8-bit states", "use adamw", where))
    if workload.loss_kernel in ("compiled", "vocab_parallel"):
        fix = "use chunked, fused or unfused"
        problems.append(Problem("workload.loss_kernel", workload.loss_kernel, "reftrain has no Megatron-Core kernels", fix, where))
    if workload.frozen_format == "int8":
        problems.append(Problem("workload.frozen_format", "int8", "reftrain freezes weights in nf4, nf4_double or compute", "use nf4", where))
    if model.position == "learned" and seq_len > model.max_position_embeddings:
        limit = model.max_position_embeddings
        problems.append(Problem("workload.seq_len", seq_len, f"must not exceed the {limit} learned positions", f"use {limit} or less", where))
    if problems:
        raise InputError(*problems)
