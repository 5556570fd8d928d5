"""StepGraph + Cluster + Efficiency -> seconds per step: compute, exposed communication, bubble, optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.collectives import Group, collective_s, make_group
from planner.efficiency import Efficiency
from planner.graph import Part, StepGraph, over_stages, part_runs
from planner.hardware import Cluster
from planner.memory import trained_params
from planner.ops import OpCost, Transfer
from planner.optimizers import get_optimizer
from planner.schedules import SCHEDULES

__all__ = ["AxisGroups", "TimeBreakdown", "estimate_time"]

Array = Any


@dataclass(frozen=True)
class TimeBreakdown:
    """Seconds of one step on the slowest stage; the fields of `PARTS` add up to `step_s`. Shape [...]."""

    matmul: Array
    grouped_matmul: Array
    attention: Array
    memory_bound: Array
    recompute: Array
    """Forward work done again in the backward pass, its communication included."""
    tensor_parallel: Array
    """Exposed, as are all communication parts."""
    context_parallel: Array
    expert_parallel: Array
    fsdp: Array
    pipeline_transfer_and_bubble: Array
    data_parallel: Array
    optimizer: Array
    stage_forward_s: Array
    """Per microbatch and stage, [..., pp], communication included."""
    stage_backward_s: Array
    slowest_stage: Array

    KINDS = ("matmul", "grouped_matmul", "attention", "memory", "recompute", "tensor_parallel", "context_parallel", "expert_parallel", "fsdp")
    """Parts that a stage spends on its microbatches, by the kind of op or axis."""
    PARTS = (
        "matmul", "grouped_matmul", "attention", "memory_bound", "recompute", "tensor_parallel", "context_parallel",
        "expert_parallel", "fsdp", "pipeline_transfer_and_bubble", "data_parallel", "optimizer",
    )  # fmt: skip

    @property
    def step_s(self) -> Array:
        """Seconds per optimizer step."""
        return sum(getattr(self, name) for name in self.PARTS)


@dataclass(frozen=True)
class AxisGroups:
    """The ranks that talk to each other, per axis of the layout. Ranks: tp fastest, then cp, dp_shard, dp_replicate, pp."""

    tp: Group
    cp: Group
    ep: Group
    fsdp: Group
    expert_fsdp: Group
    dp_replicate: Group
    expert_replicate: Group
    pp: Group


def make_axis_groups(graph: StepGraph, cluster: Cluster) -> AxisGroups:
    """Groups of a graph's layout(s) on a cluster."""
    layout = graph.layout
    inner = layout.tp * layout.cp
    stage = layout.dp * inner
    sharded = np.where(np.asarray(layout.zero_stage) > 0, graph.fsdp_degree, 1)
    expert_sharded = np.where(np.asarray(layout.zero_stage) > 0, graph.expert_fsdp_degree, 1)
    expert_stride = np.where(np.asarray(layout.ep) > 1, layout.ep, layout.tp)
    return AxisGroups(
        tp=make_group(layout.tp, 1, cluster),
        cp=make_group(layout.cp, layout.tp, cluster),
        ep=make_group(layout.ep, 1, cluster),
        fsdp=make_group(sharded, layout.tp, cluster),
        expert_fsdp=make_group(expert_sharded, expert_stride, cluster),
        dp_replicate=make_group(layout.dp * layout.cp / sharded, layout.tp * sharded, cluster),
        expert_replicate=make_group(np.maximum(stage / (expert_stride * expert_sharded), 1), expert_stride * expert_sharded, cluster),
        pp=make_group(np.minimum(layout.pp, 2), stage, cluster),
    )


@dataclass(frozen=True)
class _PartTimes:
    """Seconds of one run of a part, by kind and direction; numbers or arrays [n]."""

    forward: dict[str, Array]
    backward_input: dict[str, Array]
    backward_weight: dict[str, Array]
    recompute: Array


def _transfer_s(transfers: tuple[Transfer, ...], axis: str, phase: str, groups: AxisGroups, cluster: Cluster) -> Array:
    return sum(
        (collective_s(t.collective, t.num_bytes, getattr(groups, axis), cluster) for t in transfers if t.axis == axis and t.phase == phase), 0.0
    )


def _exposed(
    graph: StepGraph, cost: OpCost, phase: str, kernel_s: Array, groups: AxisGroups, cluster: Cluster, efficiency: Efficiency
) -> dict[str, Array]:
    """Communication of one op that nothing hides; ring attention hides behind its own kernel."""
    overlap = efficiency.stack.overlap
    ring = _transfer_s(cost.transfers, "cp", phase, groups, cluster)
    return {
        "tensor_parallel": _transfer_s(cost.transfers, "tp", phase, groups, cluster) * (1 - overlap.tensor_parallel.value),
        "expert_parallel": _transfer_s(cost.transfers, "ep", phase, groups, cluster) * (1 - overlap.expert_parallel.value),
        "context_parallel": np.maximum(ring - kernel_s * overlap.context_parallel.value, ring * (1 - overlap.context_parallel.value)),
    }


def _part_times(graph: StepGraph, part: Part, groups: AxisGroups, cluster: Cluster, efficiency: Efficiency) -> _PartTimes:
    forward: dict[str, Array] = {}
    backward: dict[str, Array] = {}
    weight: dict[str, Array] = {}
    again: Array = 0.0
    is_flash = graph.numerics.attention_kernel == "flash"
    recompute = graph.workload.recompute
    dropped = efficiency.stack.selective_recompute if recompute == "selective" else []

    def add(table: dict[str, Array], kind: str, seconds: Array) -> None:
        table[kind] = table.get(kind, 0.0) + seconds

    repeated = _num_repeated(part, efficiency.stack.recompute_stops_early)
    for position, cost in enumerate(part.costs):
        kind = cost.op.kind
        if kind != "collective":
            own_forward = efficiency.forward_s(cost, graph.seq_len, is_flash)
            own_backward = efficiency.backward_input_s(cost, graph.seq_len, is_flash)
            add(forward, kind, own_forward)
            add(backward, kind, own_backward)
            add(weight, kind, efficiency.backward_weight_s(cost, graph.seq_len, is_flash))
        else:
            own_forward = own_backward = 0.0
        going = _exposed(graph, cost, "forward", own_forward, groups, cluster, efficiency)
        coming = _exposed(graph, cost, "backward", own_backward, groups, cluster, efficiency)
        for axis in going:
            add(forward, axis, going[axis])
            add(backward, axis, coming[axis])
        if part.is_block and ((recompute == "full" and position < repeated) or _is_recomputed(cost, dropped)):
            again = again + own_forward + sum(going.values())
    return _PartTimes(forward, backward, weight, again)


def _num_repeated(part: Part, stops_early: bool) -> int:
    """How many ops of a block full recompute runs again: all, or those before the last one that keeps its input."""
    last = max((i for i, cost in enumerate(part.costs) if cost.saved), default=len(part.costs))
    return last if stops_early else len(part.costs)


def _is_recomputed(cost: OpCost, dropped: list[Any]) -> bool:
    """Whether selective recompute runs this op's forward pass again: it makes a kind of tensor that was dropped."""
    made = {"attention": "scores"}.get(cost.op.kind)
    if cost.op.kind == "memory":
        made = "norm" if "norm" in cost.op.name else "activation" if "activation" in cost.op.name else None
    return made in dropped and not (made == "scores" and "scores" not in cost.saved)


def _fsdp_s(graph: StepGraph, part: Part, groups: AxisGroups, cluster: Cluster, reduce_bytes: float) -> tuple[Array, Array]:
    """(gather of weights, reduce-scatter of gradients) of one part, in full, without overlap."""
    gather: Array = 0.0
    scatter: Array = 0.0
    for is_expert, group in ((False, groups.fsdp), (True, groups.expert_fsdp)):
        matrix, other = trained_params(part, is_expert, graph.layout.pp > 1)
        held = matrix + other + part.param_total("frozen_params", is_expert=is_expert)
        wire = graph.precision.saved_matmul_bytes if graph.precision.is_quantized else graph.precision.compute_bytes
        gather = gather + collective_s("all_gather", held * wire, group, cluster)
        scatter = scatter + collective_s("reduce_scatter", (matrix + other) * reduce_bytes, group, cluster)
    return gather, scatter


def estimate_time(graph: StepGraph, cluster: Cluster, efficiency: Efficiency) -> TimeBreakdown:
    """Seconds of one step.

    Formula: each op at its roofline; per stage and microbatch forward, backward and weight-gradient seconds, exposed
    communication included; the schedule's makespan over microbatches; then what data parallelism cannot hide, and the
    optimizer. Left out: host time (matters below some 10 ms per microbatch), stragglers, data loading.
    """
    groups = make_axis_groups(graph, cluster)
    layout, schedule, m = graph.layout, SCHEDULES[graph.layout.schedule], graph.num_microbatches
    runs = part_runs(graph)
    kinds: dict[str, list[Array]] = {}
    forward_parts, backward_parts, weight_parts = [], [], []
    for part in graph.parts:
        times = _part_times(graph, part, groups, cluster, efficiency)
        gather, scatter = _exposed_fsdp(graph, part, times, groups, cluster, efficiency)
        forward_parts.append(sum(times.forward.values()) + gather)
        backward_parts.append(sum(times.backward_input.values()) + times.recompute + scatter)
        weight_parts.append(sum(times.backward_weight.values(), 0.0))
        for kind in TimeBreakdown.KINDS:
            own = sum(table.get(kind, 0.0) for table in (times.forward, times.backward_input, times.backward_weight))
            kinds.setdefault(kind, []).append(own + {"recompute": times.recompute, "fsdp": gather + scatter}.get(kind, 0.0))

    forward, backward, weight = (over_stages(parts, runs) for parts in (forward_parts, backward_parts, weight_parts))
    # DualPipe's devices share two slices of the model between them; elsewhere a device works on its own.
    worked_runs = schedule.resident(runs) / schedule.parameter_copies
    busy = schedule.resident(forward + backward + weight) / schedule.parameter_copies
    slowest = np.argmax(busy, axis=-1)
    transfer_s = _pipeline_transfer_s(graph, groups, cluster) * (1 - efficiency.stack.overlap.pipeline.value)
    # A difference of two equal sums: what rounding leaves of it may be negative.
    bubble = np.maximum(schedule.bubble_s(forward, backward, weight, transfer_s, layout.pp, layout.num_virtual_stages, m), 0.0)
    on_slowest = {kind: sum(seconds * worked_runs[i][slowest] for i, seconds in enumerate(parts)) * m for kind, parts in kinds.items()}
    on_slowest["memory_bound"] = on_slowest.pop("memory")
    return TimeBreakdown(
        **on_slowest,
        pipeline_transfer_and_bubble=bubble,
        data_parallel=_exposed_data_parallel(graph, groups, cluster, efficiency, backward + weight, forward),
        optimizer=_optimizer_s(graph, efficiency),
        stage_forward_s=forward,
        stage_backward_s=backward + weight,
        slowest_stage=slowest,
    )


def _exposed_fsdp(
    graph: StepGraph, part: Part, times: _PartTimes, groups: AxisGroups, cluster: Cluster, efficiency: Efficiency
) -> tuple[Array, Array]:
    """FSDP's communication per run of a part that its compute does not hide: (forward, backward).

    ZeRO-3 gathers in both directions and scatters gradients per microbatch; ZeRO-2 only scatters.
    """
    zero, overlap = np.asarray(graph.layout.zero_stage), efficiency.stack.overlap.fsdp.value
    gather, scatter = _fsdp_s(graph, part, groups, cluster, _reduce_bytes(graph, efficiency))
    compute_forward = sum(times.forward.values()) * overlap
    compute_backward = (sum(times.backward_input.values()) + sum(times.backward_weight.values()) + times.recompute) * overlap
    gathers = np.where(zero == 3, gather, 0.0)
    returns = gathers + np.where(zero >= 2, scatter, 0.0)
    return np.maximum(gathers - compute_forward, gathers * (1 - overlap)), np.maximum(returns - compute_backward, returns * (1 - overlap))


def _reduce_bytes(graph: StepGraph, efficiency: Efficiency) -> float:
    return efficiency.stack.reduce_bytes if graph.precision.needs_master_weights else 4.0


def _pipeline_transfer_s(graph: StepGraph, groups: AxisGroups, cluster: Cluster) -> Array:
    """One activation between neighbouring stages; without sequence parallelism each tp rank still sends only its slice."""
    message = graph.shard.tokens / graph.layout.tp * graph.model.hidden_size * graph.numerics.compute_bytes
    return collective_s("p2p", message, groups.pp, cluster)


def _exposed_data_parallel(
    graph: StepGraph, groups: AxisGroups, cluster: Cluster, efficiency: Efficiency, backward_s: Array, forward_s: Array
) -> Array:
    """Once per step: gradients of what was not scattered already, replicas' sums, and ZeRO-1/2's gather of new weights.

    Gradients hide behind the backward pass of the last microbatch, gathers behind the forward pass of the first.
    """
    zero, wire = np.asarray(graph.layout.zero_stage), _reduce_bytes(graph, efficiency)
    reduces, gathers = [], []
    for part in graph.parts:
        reduce_s: Array = 0.0
        gather_s: Array = 0.0
        for is_expert, group, replicas in ((False, groups.fsdp, groups.dp_replicate), (True, groups.expert_fsdp, groups.expert_replicate)):
            trained = sum(trained_params(part, is_expert, graph.layout.pp > 1))
            shards = group.size
            scatter = np.where(zero == 1, collective_s("reduce_scatter", trained * wire, group, cluster), 0.0)
            across = collective_s("all_reduce", trained * wire / np.where(zero >= 1, shards, 1), replicas, cluster)
            gather = np.where((zero == 1) | (zero == 2), collective_s("all_gather", trained * graph.precision.compute_bytes, group, cluster), 0.0)
            reduce_s = reduce_s + scatter + across
            gather_s = gather_s + gather
        reduces.append(reduce_s)
        gathers.append(gather_s)
    reduce_s, gather_s = (over_stages(parts, part_runs(graph)) for parts in (reduces, gathers))
    overlap = efficiency.stack.overlap.data_parallel.value
    exposed = np.maximum(reduce_s - overlap * backward_s, reduce_s * (1 - overlap)) + np.maximum(
        gather_s - overlap * forward_s, gather_s * (1 - overlap)
    )
    return np.max(exposed, axis=-1)


def _optimizer_s(graph: StepGraph, efficiency: Efficiency) -> Array:
    """Reads gradients twice (norm, update), reads and writes masters and states, writes compute weights."""
    optimizer, zero = get_optimizer(graph.workload.optimizer), np.asarray(graph.layout.zero_stage)
    moved = []
    for part in graph.parts:
        held: Array = 0.0
        for is_expert, degree in ((False, graph.fsdp_degree), (True, graph.expert_fsdp_degree)):
            matrix, other = trained_params(part, is_expert, graph.layout.pp > 1)
            states = matrix * (8.0 if optimizer.is_factored else optimizer.matrix_state_bytes) + other * optimizer.other_state_bytes
            num_bytes = (matrix + other) * (2 * 4.0 + 2 * 4.0 + graph.precision.compute_bytes) + 2 * states
            held = held + num_bytes / np.where(zero >= 1, degree, 1)
        moved.append(held)
    return efficiency.memory_s(np.max(over_stages(moved, part_runs(graph)), axis=-1), 0)
