"""Filling in what the request leaves open, each guess written down.

In: a Request. Out: a `Job`: model, cluster, stack and workload with nothing left open, and the list of assumptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planner.architectures import load_model
from planner.efficiency import Efficiency
from planner.errors import InputError, Problem
from planner.graph import StepGraph, build_step_graph, count_params, make_numerics
from planner.hardware import Cluster, load_catalog
from planner.layout import Layout, LayoutArrays
from planner.layout_rules import Facts
from planner.model_spec import ModelSpec
from planner.nearby import NearbyRuns, load_nearby
from planner.op_cost import Numerics
from planner.plan import Request
from planner.precision import Precision, get_precision
from planner.stack import StackSpec, load_stack
from planner.units import format_count
from planner.workload import Workload

__all__ = ["Job", "resolve"]

TOKENS_PER_PARAM = 20
"""Compute-optimal by Chinchilla (arXiv:2203.15556, table 3)."""
ADAPTED = {"all": "every linear layer", "attention": "attention's linear layers", "query_value": "queries and values"}
DEFAULT_SEQ_LEN = 8192
DEFAULT_BATCH_TOKENS = 4 * 2**20
DEFAULT_FINETUNE_TOKENS = 10e6
DEFAULT_FINETUNE_BATCH = 64
DEFAULT_STACKS = {"gpu": "megatron-core", "tpu": "maxtext", "npu": "megatron-core", "cpu": "reftrain"}


@dataclass(frozen=True)
class Job:
    """A request with nothing left open but the layout."""

    model: ModelSpec
    cluster: Cluster
    stack: StackSpec
    workload: Workload
    precision: Precision
    numerics: Numerics
    seq_len: int
    global_batch_size: int
    tokens: float
    software_year: float | None = None
    """Of the stack's release; None: the newest that was measured."""
    assumptions: list[str] = field(default_factory=list)

    @property
    def efficiency(self) -> Efficiency:
        """How fast this stack runs on this accelerator."""
        return Efficiency(self.stack, self.cluster.accelerator, self.precision)

    @property
    def nearby(self) -> NearbyRuns | None:
        """Measured runs of this stack."""
        return load_nearby(self.stack.name)

    def graph(self, layout: Layout | LayoutArrays) -> StepGraph:
        """One step of the job under a layout, or under many."""
        return build_step_graph(
            self.model, self.workload, layout, self.numerics, self.precision, seq_len=self.seq_len, global_batch_size=self.global_batch_size
        )

    @property
    def facts(self) -> Facts:
        """What a layout must agree with."""
        return Facts(self.model, self.cluster.num_devices, self.seq_len, self.global_batch_size)


def resolve(request: Request) -> Job:
    """Looks up every name and fills in every open key.

    Raises:
        InputError: unknown names, a precision the accelerator lacks, sequences longer than the model allows; all at once.
    """
    problems: list[Problem] = []
    parts: dict[str, Any] = {}
    for name, look_up in (
        ("model", lambda: load_model(request.model)),
        ("cluster", lambda: load_catalog(Path(request.catalog) if request.catalog else None).resolve(request.cluster)),
    ):
        try:
            parts[name] = look_up()
        except InputError as error:
            problems.extend(error.problems)
    stack_name = request.stack
    if stack_name is None and "cluster" in parts:
        device = parts["cluster"].accelerator
        stack_name = device.stack or DEFAULT_STACKS[device.kind]
    try:
        parts["stack"] = load_stack(stack_name or "megatron-core")
    except InputError as error:
        problems.extend(error.problems)
    if problems:
        raise InputError(*problems)
    return _fill(request, parts["model"], parts["cluster"], parts["stack"])


def _fill(request: Request, model: ModelSpec, cluster: Cluster, stack: StackSpec) -> Job:
    assumptions = [*cluster.assumptions, *model.assumptions]
    if request.stack is None:
        assumptions.append(f"stack {stack.name}: none was named")
    workload = request.workload
    precision = get_precision(workload.precision).on("nvfp4" in cluster.accelerator.dense_flops_per_s)
    seq_len = workload.seq_len
    if seq_len is None:
        seq_len = min(model.max_position_embeddings, DEFAULT_SEQ_LEN)
        assumptions.append(f"seq_len {seq_len}: none was given (the model's limit, at most {DEFAULT_SEQ_LEN})")
    elif seq_len > model.max_position_embeddings and model.position == "learned":
        limit = model.max_position_embeddings
        raise InputError.single(
            "workload.seq_len", seq_len, f"must not exceed the {limit} learned positions of {model.name}", f"use seq_len {limit} or less"
        )
    elif seq_len > model.max_position_embeddings:
        assumptions.append(f"seq_len {seq_len} exceeds the {model.max_position_embeddings} positions that {model.name} was made for")
    tokens, batch = _tokens(workload, model, assumptions), _batch(workload, request, seq_len, assumptions)
    job = Job(
        model,
        cluster,
        stack,
        workload,
        precision,
        make_numerics(workload, stack, precision),
        seq_len,
        batch,
        tokens,
        request.software_year,
        assumptions,
    )
    job.efficiency.peak_flops_per_s(precision.matmul_rate)
    job.efficiency.peak_flops_per_s(precision.attention_rate)
    if workload.job == "lora":
        assumptions.append(f"LoRA of rank {job.numerics.lora_rank} on {ADAPTED[workload.lora_targets]} of the blocks")
    return job


def _tokens(workload: Workload, model: ModelSpec, assumptions: list[str]) -> float:
    if workload.tokens is not None:
        return workload.tokens
    if workload.job != "pretrain":
        assumptions.append(f"tokens {format_count(DEFAULT_FINETUNE_TOKENS)}: none were given")
        return DEFAULT_FINETUNE_TOKENS
    tokens = TOKENS_PER_PARAM * count_params(model)["active"]
    assumptions.append(f"tokens {format_count(tokens)}: none were given ({TOKENS_PER_PARAM} per active parameter, arXiv:2203.15556)")
    return tokens


def _batch(workload: Workload, request: Request, seq_len: int, assumptions: list[str]) -> int:
    if workload.global_batch_size is not None:
        return workload.global_batch_size
    usual = int(max(2 ** round(math.log2(DEFAULT_BATCH_TOKENS / seq_len)), 1))
    batch = usual if workload.job == "pretrain" else DEFAULT_FINETUNE_BATCH
    layout = request.layout
    per_round = (layout.dp_replicate or 1) * (layout.dp_shard or 1) * (layout.micro_batch_size or 1)
    batch = -(-batch // per_round) * per_round
    assumptions.append(f"global_batch_size {batch} sequences ({format_count(batch * seq_len)} tokens a step): none was given")
    return batch
