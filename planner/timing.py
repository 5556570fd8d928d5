"""StepGraph + Cluster + Efficiency -> seconds per step: compute, exposed communication, bubble, optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.collectives import Group, collective_s, make_group
from planner.efficiency import Efficiency
from planner.graph import Part, StepGraph, over_stages, part_runs
from planner.hardware import Cluster
from planner.op_cost import OpCost, Transfer
from planner.optimizers import get_optimizer
from planner.schedules import SCHEDULES
from planner.stack import StackSpec
from planner.states import trained_params

__all__ = [
    "AxisGroups", "GroupTransfer", "PartTimes", "TimeBreakdown", "data_parallel_s", "data_parallel_transfers",
    "estimate_time", "exposed_data_parallel", "exposed_fsdp", "fsdp_transfers", "make_axis_groups", "optimizer_bytes",
    "part_times", "repeated_ops", "worked_runs",
]  # fmt: skip

Array = Any
ROUNDING_FRACTION = 1e-12
"""Of the busy time: what a sum of seconds may be off by."""


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
    stage_backward_input_s: Array
    """Recompute included."""
    stage_backward_weight_s: Array
    transfer_s: Array
    """Exposed part of one activation's way to the next stage."""
    slowest_stage: Array

    KINDS = ("matmul", "grouped_matmul", "attention", "memory", "recompute", "tensor_parallel", "context_parallel", "expert_parallel", "fsdp")
    """Parts that a stage spends on its microbatches, by the kind of op or axis."""
    PARTS = (
        "matmul", "grouped_matmul", "attention", "memory_bound", "recompute", "tensor_parallel", "context_parallel",
        "expert_parallel", "fsdp", "pipeline_transfer_and_bubble", "data_parallel", "optimizer",
    )  # fmt: skip

    @property
    def stage_backward_s(self) -> Array:
        """Whole backward pass per microbatch and stage, [..., pp]."""
        return self.stage_backward_input_s + self.stage_backward_weight_s

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
class PartTimes:
    """Seconds of one run of a part, by kind and direction; numbers or arrays [n]."""

    forward: dict[str, Array]
    backward_input: dict[str, Array]
    backward_weight: dict[str, Array]
    recompute: Array


def _transfer_s(transfers: tuple[Transfer, ...], axis: str, phase: str, groups: AxisGroups, cluster: Cluster) -> Array:
    return sum((group_transfer(t, groups).seconds(cluster) for t in transfers if t.axis == axis and t.phase == phase), 0.0)


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


def part_times(graph: StepGraph, part: Part, groups: AxisGroups, cluster: Cluster, efficiency: Efficiency) -> PartTimes:
    """Seconds of one run of a part, without data parallelism."""
    forward: dict[str, Array] = {}
    backward: dict[str, Array] = {}
    weight: dict[str, Array] = {}
    again: Array = 0.0
    is_flash = graph.numerics.attention_kernel == "flash"

    def add(table: dict[str, Array], kind: str, seconds: Array) -> None:
        table[kind] = table.get(kind, 0.0) + seconds

    for cost, is_repeated in zip(part.costs, repeated_ops(graph, part, efficiency.stack), strict=True):
        kind = cost.op.kind
        if kind != "collective":
            own_forward = efficiency.forward_s(cost, graph.seq_len, is_flash)
            own_backward = efficiency.backward_input_s(cost, graph.seq_len, is_flash)
            add(forward, kind, own_forward)
            add(backward, kind, own_backward)
            add(weight, kind, efficiency.backward_weight_s(cost, graph.seq_len, is_flash))
            if efficiency.curves is not None:
                casts, sums = efficiency.weight_handling_s(cost.params - cost.frozen_params, graph.num_microbatches)
                add(forward, "memory", casts)
                add(backward, "memory", sums)
        else:
            own_forward = own_backward = 0.0
        going = _exposed(graph, cost, "forward", own_forward, groups, cluster, efficiency)
        coming = _exposed(graph, cost, "backward", own_backward, groups, cluster, efficiency)
        for axis in going:
            add(forward, axis, going[axis])
            add(backward, axis, coming[axis])
        if is_repeated:
            again = again + own_forward + sum(going.values())
    return PartTimes(forward, backward, weight, again)


def repeated_ops(graph: StepGraph, part: Part, stack: StackSpec) -> list[bool]:
    """Which ops of a part run their forward pass again in the backward pass.

    Full recompute: all of a block's, or those before the last one that keeps its input. Selective: those that make what
    was dropped.
    """
    recompute = graph.workload.recompute
    if recompute == "none" or not part.is_block:
        return [False] * len(part.costs)
    if recompute == "selective":
        return [_is_recomputed(cost, stack.selective_recompute) for cost in part.costs]
    last = max((i for i, cost in enumerate(part.costs) if cost.saved), default=len(part.costs))
    return [i < last or not stack.recompute_stops_early for i in range(len(part.costs))]


def worked_runs(graph: StepGraph) -> Array:
    """How often a device runs each part per microbatch, [parts, pp].

    DualPipe's devices share two slices of the model between them; elsewhere a device works on its own.
    """
    schedule = SCHEDULES[graph.layout.schedule]
    return schedule.resident(part_runs(graph)) / schedule.parameter_copies


def _is_recomputed(cost: OpCost, dropped: list[Any]) -> bool:
    """Whether selective recompute runs this op's forward pass again: it makes a kind of tensor that was dropped."""
    made = {"attention": "scores"}.get(cost.op.kind)
    if cost.op.kind == "memory":
        made = "norm" if "norm" in cost.op.name else "activation" if "activation" in cost.op.name else None
    return made in dropped and not (made == "scores" and "scores" not in cost.saved)


@dataclass(frozen=True)
class GroupTransfer:
    """Collectives over a group, with their full buffers' bytes per device."""

    collective: str
    num_bytes: Array
    group: Group
    axis: str
    """Field of `AxisGroups`."""
    num_calls: Array = 1

    def seconds(self, cluster: Cluster) -> Array:
        """In full, without overlap."""
        return self.num_calls * collective_s(self.collective, self.num_bytes / self.num_calls, self.group, cluster)


def group_transfer(transfer: Transfer, groups: AxisGroups) -> GroupTransfer:
    """A transfer of an op over the ranks of its axis."""
    return GroupTransfer(transfer.collective, transfer.num_bytes, getattr(groups, transfer.axis), transfer.axis, transfer.num_calls)


def _sent_as(graph: StepGraph, efficiency: Efficiency) -> Array:
    """The ZeRO stage by its messages: those of 2 and 3 are those of 1 where pipelines gather and scatter once per step."""
    zero = np.asarray(graph.layout.zero_stage)
    return np.minimum(zero, 1) if efficiency.stack.pipeline_waits and graph.layout.pp > 1 else zero


def fsdp_transfers(graph: StepGraph, part: Part, groups: AxisGroups, efficiency: Efficiency) -> tuple[list[GroupTransfer], list[GroupTransfer]]:
    """(gathers of weights, in each direction; reduce-scatters of gradients) of one run of a part.

    ZeRO-3 gathers in both directions and scatters gradients per microbatch; ZeRO-2 only scatters.
    """
    zero, wire = _sent_as(graph, efficiency), graph.precision.compute_bytes
    wire = graph.precision.saved_matmul_bytes if graph.precision.is_quantized else wire
    gathers, scatters = [], []
    for is_expert, axis in ((False, "fsdp"), (True, "expert_fsdp")):
        group = getattr(groups, axis)
        trained = sum(trained_params(part, is_expert, graph.layout.pp > 1))
        held = trained + part.param_total("frozen_params", is_expert=is_expert)
        gathers.append(GroupTransfer("all_gather", np.where(zero == 3, held * wire, 0.0), group, axis))
        scatters.append(GroupTransfer("reduce_scatter", np.where(zero >= 2, trained * _reduce_bytes(graph, efficiency), 0.0), group, axis))
    return gathers, scatters


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
        times = part_times(graph, part, groups, cluster, efficiency)
        gather, scatter = exposed_fsdp(graph, part, times, groups, cluster, efficiency)
        forward_parts.append(sum(times.forward.values()) + gather)
        backward_parts.append(sum(times.backward_input.values()) + times.recompute + scatter)
        weight_parts.append(sum(times.backward_weight.values(), 0.0))
        for kind in TimeBreakdown.KINDS:
            own = sum(table.get(kind, 0.0) for table in (times.forward, times.backward_input, times.backward_weight))
            kinds.setdefault(kind, []).append(own + {"recompute": times.recompute, "fsdp": gather + scatter}.get(kind, 0.0))

    forward, backward, weight = (over_stages(parts, runs) for parts in (forward_parts, backward_parts, weight_parts))
    worked = worked_runs(graph)
    busy = schedule.resident(forward + backward + weight) / schedule.parameter_copies
    slowest = np.argmax(busy, axis=-1)
    transfer_s = _pipeline_transfer_s(graph, groups, cluster) * (1 - efficiency.stack.overlap.pipeline.value)
    waits = schedule.bubble_s(forward, backward, weight, transfer_s, layout.pp, layout.num_virtual_stages, m)
    # Without a pipeline this is the difference of two equal sums, of which rounding leaves something.
    bubble = np.where(waits > ROUNDING_FRACTION * m * np.max(busy, axis=-1), waits, 0.0)
    on_slowest = {kind: sum(seconds * worked[i][slowest] for i, seconds in enumerate(parts)) * m for kind, parts in kinds.items()}
    on_slowest["memory_bound"] = on_slowest.pop("memory")
    return TimeBreakdown(
        **on_slowest,
        pipeline_transfer_and_bubble=bubble,
        data_parallel=np.max(exposed_data_parallel(graph, groups, cluster, efficiency, backward + weight, forward), axis=-1),
        optimizer=efficiency.optimizer_s(graph.workload.optimizer, np.max(optimizer_bytes(graph), axis=-1)),
        stage_forward_s=forward,
        stage_backward_input_s=backward,
        stage_backward_weight_s=weight,
        transfer_s=transfer_s,
        slowest_stage=slowest,
    )


def exposed_fsdp(graph: StepGraph, part: Part, times: PartTimes, groups: AxisGroups, cluster: Cluster, efficiency: Efficiency) -> tuple[Array, Array]:
    """FSDP's communication per run of a part that its compute does not hide: (forward, backward)."""
    overlap = efficiency.stack.overlap.fsdp.value
    gather, scatter = (sum(t.seconds(cluster) for t in transfers) for transfers in fsdp_transfers(graph, part, groups, efficiency))
    compute_forward = sum(times.forward.values()) * overlap
    compute_backward = (sum(times.backward_input.values()) + sum(times.backward_weight.values()) + times.recompute) * overlap
    returns = gather + scatter
    return np.maximum(gather - compute_forward, gather * (1 - overlap)), np.maximum(returns - compute_backward, returns * (1 - overlap))


def _reduce_bytes(graph: StepGraph, efficiency: Efficiency) -> float:
    return efficiency.stack.reduce_bytes if graph.precision.needs_master_weights else 4.0


def _pipeline_transfer_s(graph: StepGraph, groups: AxisGroups, cluster: Cluster) -> Array:
    """One activation between neighbouring stages; without sequence parallelism each tp rank still sends only its slice."""
    message = graph.shard.tokens / graph.layout.tp * graph.model.hidden_size * graph.numerics.compute_bytes
    return collective_s("p2p", message, groups.pp, cluster)


def data_parallel_transfers(
    graph: StepGraph, part: Part, groups: AxisGroups, efficiency: Efficiency
) -> tuple[list[GroupTransfer], list[GroupTransfer]]:
    """Once per step and run of a part: (sums of gradients, gathers of new weights).

    Gradients that were not scattered per microbatch (ZeRO-1), sums over replicas, and the gather of ZeRO-1 and 2.
    """
    zero, wire = _sent_as(graph, efficiency), _reduce_bytes(graph, efficiency)
    reduces, gathers = [], []
    for is_expert, axis, across in ((False, "fsdp", "dp_replicate"), (True, "expert_fsdp", "expert_replicate")):
        group, replicas = getattr(groups, axis), getattr(groups, across)
        trained = sum(trained_params(part, is_expert, graph.layout.pp > 1))
        reduces.append(GroupTransfer("reduce_scatter", np.where(zero == 1, trained * wire, 0.0), group, axis))
        reduces.append(GroupTransfer("all_reduce", trained * wire / np.where(zero >= 1, group.size, 1), replicas, across))
        new_weights = np.where((zero == 1) | (zero == 2), trained * graph.precision.compute_bytes, 0.0)
        gathers.append(GroupTransfer("all_gather", new_weights, group, axis))
    return reduces, gathers


def data_parallel_s(graph: StepGraph, groups: AxisGroups, cluster: Cluster, efficiency: Efficiency) -> tuple[Array, Array]:
    """(sums of gradients, gathers of new weights) per stage in full, [..., pp]."""
    parts = [data_parallel_transfers(graph, part, groups, efficiency) for part in graph.parts]
    reduce_s, gather_s = (over_stages([sum(t.seconds(cluster) for t in both[i]) for both in parts], part_runs(graph)) for i in (0, 1))
    return reduce_s, gather_s


def exposed_data_parallel(
    graph: StepGraph, groups: AxisGroups, cluster: Cluster, efficiency: Efficiency, backward_s: Array, forward_s: Array
) -> Array:
    """What of `data_parallel_s` nothing hides, [..., pp].

    Gradients hide behind the backward pass of the last microbatch, gathers behind the forward pass of the first.
    """
    reduce_s, gather_s = data_parallel_s(graph, groups, cluster, efficiency)
    overlap = efficiency.stack.overlap.data_parallel.value
    return np.maximum(reduce_s - overlap * backward_s, reduce_s * (1 - overlap)) + np.maximum(
        gather_s - overlap * forward_s, gather_s * (1 - overlap)
    )


def optimizer_bytes(graph: StepGraph) -> Array:
    """Bytes the optimizer moves per stage, [..., pp].

    Reads gradients twice (norm, update), reads and writes masters and states, writes compute weights.
    """
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
    return over_stages(moved, part_runs(graph))
