"""StepGraph: the model's ops, sharded by a layout, with how often each part runs on each pipeline stage.

In: model, workload, layout(s), numerics. Out: `Part`s (embedding, each kind of block, head), whose costs times their
count per stage give every parameter, FLOP, byte and second downstream. A layout may be one `Layout` or `LayoutArrays`;
costs then have shape [n], and with a stage axis [n, pp].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from planner.architectures import ModelOps, model_ops
from planner.layout import Layout, LayoutArrays, chunk_sizes
from planner.model_spec import ModelSpec
from planner.op_cost import Numerics, Op, OpCost, Shard
from planner.precision import Precision
from planner.schedules import SCHEDULES
from planner.stack import StackSpec
from planner.workload import DEFAULT_LORA_RANK, Workload

__all__ = [
    "Part",
    "StepGraph",
    "at_stages",
    "build_step_graph",
    "count_params",
    "first_of_each_kind",
    "in_pipeline",
    "make_numerics",
    "model_flops_per_token",
    "over_stages",
    "part_runs",
    "stage_counts",
    "sum_model_flops",
    "sum_params",
    "whole_model",
]

Array = Any


@dataclass(frozen=True)
class Part:
    """Ops that run together `counts[stage]` times on each stage, per microbatch."""

    name: str
    costs: tuple[OpCost, ...]
    counts: np.ndarray
    """[pp]"""
    is_block: bool
    later: tuple[np.ndarray, ...] = ()
    """For each kind of block, how many come after the last run of this one on each stage, [pp]; of blocks alone."""

    def total(self, quantity: str) -> Array:
        """Sum of one field of `OpCost` over the ops."""
        return sum(getattr(cost, quantity) for cost in self.costs)

    def param_total(self, quantity: str, *, is_expert: bool) -> Array:
        """Sum of one parameter field over the expert ops, or over the others."""
        return sum((getattr(cost, quantity) for cost in self.costs if cost.op.is_expert == is_expert), 0.0)


@dataclass(frozen=True)
class StepGraph:
    """One training step before anybody asked how long it takes or what it holds."""

    model: ModelSpec
    workload: Workload
    layout: Layout | LayoutArrays
    numerics: Numerics
    precision: Precision
    shard: Shard
    parts: tuple[Part, ...]
    seq_len: int
    global_batch_size: int

    @property
    def num_microbatches(self) -> Array:
        """Microbatches per pipeline and step."""
        return self.global_batch_size / (self.layout.dp * self.layout.micro_batch_size)

    @property
    def stream_bytes(self) -> Array:
        """The residual stream between two blocks, of one microbatch on one device: what a block keeps whole, and what pipelines send."""
        return self.shard.local_tokens * self.model.hidden_size * self.numerics.compute_bytes

    @property
    def fsdp_degree(self) -> Array:
        """Ranks over which ZeRO shards everything but experts: dp_shard and cp together."""
        return self.layout.dp_shard * self.layout.cp

    @property
    def expert_fsdp_degree(self) -> Array:
        """Ranks over which ZeRO shards the experts of one rank: what ep leaves of the stage."""
        spread = self.layout.dp_shard * self.layout.cp * np.where(np.asarray(self.layout.ep) > 1, self.layout.tp, 1)
        return np.maximum(spread / self.layout.ep, 1)


def part_runs(graph: StepGraph) -> np.ndarray:
    """How often each part runs on each stage per microbatch, [parts, pp]."""
    return np.stack([part.counts for part in graph.parts])


def first_of_each_kind(graph: StepGraph) -> np.ndarray:
    """Indices of the stages whose parts no stage before them has the same numbers of."""
    _, first = np.unique(part_runs(graph), axis=1, return_index=True)
    return np.sort(first)


def at_stages(graph: StepGraph, stages: np.ndarray) -> StepGraph:
    """The same with some of its stages."""
    parts = (replace(part, counts=part.counts[stages], later=tuple(count[stages] for count in part.later)) for part in graph.parts)
    return replace(graph, parts=tuple(parts))


@lru_cache(maxsize=4096)
def _distinct_stages(runs: bytes, num_parts: int) -> tuple[np.ndarray, np.ndarray]:
    """(runs of each distinct kind of stage [parts, kinds], kind of each stage [pp])."""
    kinds, stages = np.unique(np.frombuffer(runs).reshape(num_parts, -1), axis=1, return_inverse=True)
    return kinds, stages.ravel()


def over_stages(per_part: Sequence[Array], runs: np.ndarray) -> np.ndarray:
    """Sum over parts of a quantity per run, a number or [n] for each part, times its runs: [..., pp].

    Parts are added one by one: a matrix product would round differently for one layout and for many.
    """
    kinds, stages = _distinct_stages(runs.tobytes(), len(runs))
    totals = sum(np.multiply.outer(np.asarray(value, float), counts) for value, counts in zip(per_part, kinds, strict=True))
    return np.asarray(np.take(totals, stages, axis=-1))


def make_numerics(workload: Workload, stack: StackSpec, precision: Precision) -> Numerics:
    """Formats and kernels: the workload's wishes, else what the stack does."""
    return Numerics(
        compute_bytes=precision.compute_bytes,
        saved_matmul_bytes=precision.saved_matmul_bytes,
        attention_kernel=stack.attention_kernel if workload.attention_kernel == "auto" else workload.attention_kernel,
        loss_kernel=stack.loss_kernel if workload.loss_kernel == "auto" else workload.loss_kernel,
        fused_activation=stack.fused_activation,
        fused_norm=stack.fused_norm,
        activation_input_bytes=1.0 if workload.activation_input == "fp8" else 0.0,
        saves_gathered_input=stack.saves_gathered_input,
        copies_gathered=stack.copies_gathered,
        loops_experts=stack.loops_experts,
        writes_masks=stack.attention_masks,
        gathers_keys=stack.context_parallel == "gather",
        repeats_keys=stack.repeats_keys,
        keeps_fused_projection=stack.keeps_fused_projection,
        lora_rank=(workload.lora_rank or DEFAULT_LORA_RANK) if workload.job == "lora" else 0,
        lora_targets=workload.lora_targets,
        keeps_frozen_inputs=workload.frozen_format != "compute",
        lora_has_dropout=workload.lora_dropout > 0,
    )


@lru_cache(maxsize=4096)
def stage_counts(layers: tuple[int, ...], num_kinds: int, pp: int, num_chunks: int) -> np.ndarray:
    """How many blocks of each kind every stage holds: [num_kinds, pp]. Chunk c of the model belongs to stage c modulo pp."""
    counts = np.zeros((num_kinds, pp))
    first = 0
    for chunk, size in enumerate(chunk_sizes(len(layers), num_chunks)):
        for kind in layers[first : first + size]:
            counts[kind, chunk % pp] += 1
        first += size
    return counts


@lru_cache(maxsize=4096)
def _later_counts(layers: tuple[int, ...], num_kinds: int, pp: int, num_chunks: int) -> np.ndarray:
    """How many blocks of each kind come after the last block of a kind on a stage: [num_kinds (last), num_kinds, pp]."""
    counts = np.zeros((num_kinds, num_kinds, pp))
    first = 0
    for chunk, size in enumerate(chunk_sizes(len(layers), num_chunks)):
        for kind in layers[first : first + size]:
            counts[:, kind, chunk % pp] += 1
            counts[kind, :, chunk % pp] = 0
        first += size
    return counts


def _costs(ops: tuple[Op, ...], shard: Shard, numerics: Numerics) -> tuple[OpCost, ...]:
    return tuple(op.cost(shard, numerics) for op in ops)


def build_step_graph(
    model: ModelSpec,
    workload: Workload,
    layout: Layout | LayoutArrays,
    numerics: Numerics,
    precision: Precision,
    *,
    seq_len: int,
    global_batch_size: int,
) -> StepGraph:
    """The ops of one step, sharded.

    Args:
        layout: one layout, or many that share pp, num_virtual_stages and schedule.
        seq_len, global_batch_size: resolved, because the workload may have left them open.
    """
    shard = Shard(layout.micro_batch_size, seq_len, layout.tp, layout.cp, layout.ep, layout.sequence_parallel)
    listed = model_ops(model)
    costs = [_costs(ops, shard, numerics) for ops in (listed.embedding, *(ops for _, ops in listed.blocks), listed.head)]
    parts = _staged(listed, costs, layout)
    return StepGraph(model, workload, layout, numerics, precision, shard, parts, seq_len, global_batch_size)


def in_pipeline(graph: StepGraph, layout: LayoutArrays) -> StepGraph:
    """The same shards and batches in another pipeline, with their data parallelism: no op is looked at again."""
    return replace(graph, layout=layout, parts=_staged(model_ops(graph.model), [part.costs for part in graph.parts], layout))


def _staged(listed: ModelOps, costs: Sequence[tuple[OpCost, ...]], layout: Layout | LayoutArrays) -> tuple[Part, ...]:
    """Embedding, each kind of block, head, with how often each runs on each stage."""
    pp = layout.pp
    num_chunks = pp * layout.num_virtual_stages // SCHEDULES[layout.schedule].parameter_copies
    counts = stage_counts(listed.layers, len(listed.blocks), pp, num_chunks)
    first, last = np.zeros(pp), np.zeros(pp)
    first[0] = last[-1] = 1
    later = _later_counts(listed.layers, len(listed.blocks), pp, num_chunks)
    blocks = (Part(name, costs[kind + 1], counts[kind], True, tuple(later[kind])) for kind, (name, _) in enumerate(listed.blocks))
    return (Part("embedding", costs[0], first, False), *blocks, Part("head", costs[-1], last, False))


def whole_model(listed: ModelOps, seq_len: int, numerics: Numerics) -> list[tuple[str, float, OpCost]]:
    """(part, count, cost) of every op on a single device with one sequence."""
    shard = Shard(1, seq_len)
    counted = [("embedding", 1.0, op.cost(shard, numerics)) for op in listed.embedding]
    counted += [("head", 1.0, op.cost(shard, numerics)) for op in listed.head]
    for kind, (name, ops) in enumerate(listed.blocks):
        count = float(listed.layers.count(kind))
        counted += [(name, count, op.cost(shard, numerics)) for op in ops]
    return counted


def sum_params(counted: list[tuple[str, float, OpCost]]) -> dict[str, float]:
    """Parameters of the ops of `whole_model`, or of some of them: total, active per token, of the embeddings."""
    return {
        "total": float(sum(n * c.params for _, n, c in counted)),
        "active": float(sum(n * c.active_params for _, n, c in counted) - sum(n * c.tied_params for _, n, c in counted)),
        "embedding": float(sum(n * c.embedding_params for _, n, c in counted)),
    }


def count_params(model: ModelSpec, seq_len: int = 1) -> dict[str, float]:
    """Parameters of the model: total, active per token, and of the embeddings (and untied head)."""
    return sum_params(whole_model(model_ops(model), seq_len, Numerics()))


def model_flops_per_token(model: ModelSpec, seq_len: int, numerics: Numerics) -> dict[str, float]:
    """Model FLOPs per token, forward plus backward, in both attention conventions.

    Formula: 3 * forward, with weight gradients only where weights are trained (LoRA: 2 * forward plus the adapters' own).
    """
    return sum_model_flops(whole_model(model_ops(model), seq_len, numerics), seq_len)


def sum_model_flops(counted: list[tuple[str, float, OpCost]], seq_len: int) -> dict[str, float]:
    """`model_flops_per_token` of the ops of `whole_model`, or of some of them."""
    weight = sum(n * c.backward_weight_flops for _, n, c in counted)
    totals = {}
    for convention, key in (("full", "model_forward_flops"), ("causal", "causal_forward_flops")):
        forward = sum(n * getattr(c, key) for _, n, c in counted)
        attention = sum(n * getattr(c, key) for _, n, c in counted if c.op.kind == "attention")
        totals[convention] = float((2 * forward + attention + weight) / seq_len)
    return totals
