"""What a step consists of before any coefficient of a stack: work at full rates and messages at the links' own rates.

In: StepGraph, Cluster, Efficiency. Out: `StepWork`, from which `planner.timing` makes seconds. Only here are ops, messages and ranks
looked at; timing sees sums per part of the model. Every number may be an array [n], of layouts that share a pipeline or of runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from planner.arrays import pick
from planner.coefficients import Coefficients
from planner.collectives import Group, collective_s, make_group
from planner.efficiency import Efficiency, Work, add_work, format_code
from planner.graph import Part, StepGraph, over_stages, part_runs
from planner.hardware import Cluster
from planner.op_cost import OpCost, Transfer
from planner.optimizers import get_optimizer
from planner.stack import StackSpec
from planner.states import trained_params

__all__ = [
    "AXES", "AxisGroups", "GroupTransfer", "PartWork", "StepWork", "Wire", "data_parallel_transfers", "fsdp_transfers", "group_transfer",
    "assemble_work", "make_axis_groups", "optimizer_bytes", "part_kernels", "part_work", "repeated_ops", "step_work", "wire", "with_sharding",
]  # fmt: skip

Array = Any
AXES = {"tp": "tensor_parallel", "cp": "context_parallel", "ep": "expert_parallel"}
PHASES = ("forward", "backward", "recompute")


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
    sharded = pick(np.asarray(layout.zero_stage) > 0, graph.fsdp_degree, 1)
    expert_sharded = pick(np.asarray(layout.zero_stage) > 0, graph.expert_fsdp_degree, 1)
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
class GroupTransfer:
    """Collectives over a group, with their full buffers' bytes per device."""

    collective: str
    num_bytes: Array
    group: Group
    axis: str
    """Field of `AxisGroups`."""
    num_calls: Array = 1

    def seconds(self, cluster: Cluster) -> Array:
        """In full at the links' own rates, without overlap."""
        return self.num_calls * collective_s(self.collective, self.num_bytes / self.num_calls, self.group, cluster)


def group_transfer(transfer: Transfer, groups: AxisGroups) -> GroupTransfer:
    """A transfer of an op over the ranks of its axis."""
    return GroupTransfer(transfer.collective, transfer.num_bytes, getattr(groups, transfer.axis), transfer.axis, transfer.num_calls)


@dataclass(frozen=True)
class Wire:
    """Messages of one kind: seconds at the links' own rates by the tier that limits them, and how often ranks wait for each other."""

    scale_up_s: Array = 0.0
    scale_out_s: Array = 0.0
    waits: Array = 0.0
    """Calls times doublings of the ranks."""

    def __add__(self, other: Wire) -> Wire:
        return Wire(self.scale_up_s + other.scale_up_s, self.scale_out_s + other.scale_out_s, self.waits + other.waits)

    def seconds(self, c: Coefficients) -> Array:
        """Under a stack, without overlap."""
        return self.scale_up_s / c.scale_up + self.scale_out_s / c.scale_out + self.waits * c.sync


def wire(transfers: Sequence[GroupTransfer], cluster: Cluster) -> Wire:
    """The sum of some messages."""
    total = Wire()
    for transfer in transfers:
        if not np.ndim(transfer.num_bytes) and not transfer.num_bytes:
            continue
        seconds = transfer.seconds(cluster)
        is_outside = transfer.group.num_domains > 1
        waits = transfer.num_calls * np.log2(np.maximum(transfer.group.size, 2)) * (np.asarray(seconds) > 0)
        total = total + Wire(np.where(is_outside, 0.0, seconds), np.where(is_outside, seconds, 0.0), waits)
    return total


@dataclass(frozen=True)
class PartWork:
    """One run of a part: its kernels by pass, its messages by axis and pass."""

    forward: Work
    backward_input: Work
    backward_weight: Work
    recompute: Work
    """Forward work of the backward pass."""
    wires: dict[tuple[str, str], Wire]
    """(axis, forward | backward | recompute) -> messages of tp, cp and ep."""
    ring_s: dict[str, Work]
    """forward, backward -> the kernels behind which ring attention may hide its messages."""
    fsdp_gather: Wire
    """Of weights, in each direction."""
    fsdp_scatter: Wire
    """Of gradients."""
    data_parallel_reduce: Wire
    """Once per step."""
    data_parallel_gather: Wire
    is_block: Array
    """Blocks have host code of their own; 0 where every op was measured with its host time."""
    has_tensor_parallel: Array
    has_experts: Array


@dataclass(frozen=True)
class StepWork:
    """One step. `runs`: how often each part runs on each stage per microbatch, [parts, pp] or [n, parts, pp]."""

    parts: tuple[PartWork, ...]
    runs: np.ndarray
    schedule: str
    pp: int
    num_virtual_stages: int
    num_microbatches: Array
    stage_transfer: Wire
    """One activation's way to the next stage."""
    optimizer_s: Array
    """At full memory bandwidth."""
    step_overhead_s: Array
    """Measured; beside the stack's coefficient."""
    num_nodes: Array
    matmul_format: Array
    """See `efficiency.format_code`."""


def part_work(graph: StepGraph, part: Part, groups: AxisGroups, cluster: Cluster, efficiency: Efficiency) -> PartWork:
    """Work and messages of one run of a part."""
    return with_sharding(part_kernels(graph, part, groups, cluster, efficiency), graph, part, groups, cluster, efficiency)


def with_sharding(kernels: PartWork, graph: StepGraph, part: Part, groups: AxisGroups, cluster: Cluster, efficiency: Efficiency) -> PartWork:
    """The same with the messages of data parallelism."""
    gathers, scatters = fsdp_transfers(graph, part, groups, efficiency)
    reduces, spreads = data_parallel_transfers(graph, part, groups, efficiency)
    return replace(
        kernels,
        fsdp_gather=wire(gathers, cluster),
        fsdp_scatter=wire(scatters, cluster),
        data_parallel_reduce=wire(reduces, cluster),
        data_parallel_gather=wire(spreads, cluster),
    )


def part_kernels(graph: StepGraph, part: Part, groups: AxisGroups, cluster: Cluster, efficiency: Efficiency) -> PartWork:
    """What one run of a part does whatever the pipeline and however the data is shared: its kernels, and its messages of tp, cp and ep."""
    passes: dict[str, Work] = {"forward": {}, "backward_input": {}, "backward_weight": {}, "recompute": {}}
    wires: dict[tuple[str, str], Wire] = {}
    ring: dict[str, Work] = {"forward": {}, "backward": {}}
    is_flash, curves = graph.numerics.attention_kernel == "flash", efficiency.curves
    for cost, is_repeated in zip(part.costs, repeated_ops(graph, part, efficiency.stack), strict=True):
        if cost.op.kind != "collective":
            forward = efficiency.forward_work(cost, graph.seq_len, is_flash)
            backward = efficiency.backward_input_work(cost, graph.seq_len, is_flash)
            if curves is not None:
                casts, sums = efficiency.weight_handling_s(cost.params - cost.frozen_params, graph.num_microbatches)
                passes["forward"] = add_work(passes["forward"], {"memory": casts})
                passes["backward_input"] = add_work(passes["backward_input"], {"memory": sums})
            weight = efficiency.backward_weight_work(cost, graph.seq_len, is_flash)
            for name, work in (("forward", forward), ("backward_input", backward), ("backward_weight", weight)):
                passes[name] = add_work(passes[name], work)
            if is_repeated:
                passes["recompute"] = add_work(passes["recompute"], forward)
            if cost.op.kind == "attention":
                ring = {"forward": add_work(ring["forward"], forward), "backward": add_work(ring["backward"], backward)}
        for axis in AXES:
            for phase in ("forward", "backward"):
                moved = [group_transfer(t, groups) for t in cost.transfers if t.axis == axis and t.phase == phase]
                if moved:
                    found = wire(moved, cluster)
                    wires[axis, phase] = wires.get((axis, phase), Wire()) + found
                    if is_repeated and phase == "forward":
                        wires[axis, "recompute"] = wires.get((axis, "recompute"), Wire()) + found
    is_coded = float(part.is_block and curves is None)
    return PartWork(
        passes["forward"], passes["backward_input"], passes["backward_weight"], passes["recompute"], wires, ring,
        Wire(), Wire(), Wire(), Wire(),
        is_coded, is_coded * (np.asarray(graph.layout.tp) > 1), is_coded * any(cost.op.is_expert for cost in part.costs),
    )  # fmt: skip


def step_work(graph: StepGraph, cluster: Cluster, efficiency: Efficiency) -> StepWork:
    """Everything that one step does."""
    groups = make_axis_groups(graph, cluster)
    return assemble_work(graph, [part_work(graph, part, groups, cluster, efficiency) for part in graph.parts], groups, cluster, efficiency)


def assemble_work(graph: StepGraph, parts: Sequence[PartWork], groups: AxisGroups, cluster: Cluster, efficiency: Efficiency) -> StepWork:
    """A step of parts that are known."""
    layout = graph.layout
    optimizer_s, overhead_s = efficiency.optimizer_s(graph.workload.optimizer, np.max(optimizer_bytes(graph), axis=-1))
    return StepWork(
        parts=tuple(parts),
        runs=part_runs(graph),
        schedule=layout.schedule,
        pp=layout.pp,
        num_virtual_stages=layout.num_virtual_stages,
        num_microbatches=graph.num_microbatches,
        stage_transfer=_stage_transfer(graph, groups, cluster),
        optimizer_s=optimizer_s,
        step_overhead_s=overhead_s,
        num_nodes=np.maximum(layout.num_devices / cluster.node_size, 1),
        matmul_format=format_code(graph.precision.name),
    )


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


def _is_recomputed(cost: OpCost, dropped: list[Any]) -> bool:
    """Whether selective recompute runs this op's forward pass again: it makes a kind of tensor that was dropped."""
    made = {"attention": "scores"}.get(cost.op.kind)
    if cost.op.kind == "memory":
        made = "norm" if "norm" in cost.op.name else "activation" if "activation" in cost.op.name else None
    return made in dropped and not (made == "scores" and "scores" not in cost.saved)


def _sent_as(graph: StepGraph, efficiency: Efficiency) -> Array:
    """The ZeRO stage by its messages: those of 2 and 3 are those of 1 where pipelines gather and scatter once per step."""
    zero = np.asarray(graph.layout.zero_stage)
    return np.minimum(zero, 1) if efficiency.stack.pipeline_waits and graph.layout.pp > 1 else zero


def fsdp_transfers(graph: StepGraph, part: Part, groups: AxisGroups, efficiency: Efficiency) -> tuple[list[GroupTransfer], list[GroupTransfer]]:
    """(gathers of weights, in each direction; reduce-scatters of gradients) of one run of a part.

    ZeRO-3 gathers in both directions and scatters gradients per microbatch; ZeRO-2 only scatters.
    """
    zero, sent = _sent_as(graph, efficiency), graph.precision.compute_bytes
    sent = graph.precision.saved_matmul_bytes if graph.precision.is_quantized else sent
    gathers, scatters = [], []
    for is_expert, axis in ((False, "fsdp"), (True, "expert_fsdp")):
        group = getattr(groups, axis)
        trained = sum(trained_params(part, is_expert, graph.layout.pp > 1))
        held = trained + part.param_total("frozen_params", is_expert=is_expert)
        gathers.append(GroupTransfer("all_gather", pick(zero == 3, held * sent, 0.0), group, axis))
        scatters.append(GroupTransfer("reduce_scatter", pick(zero >= 2, trained * _reduce_bytes(graph, efficiency), 0.0), group, axis))
    return gathers, scatters


def _reduce_bytes(graph: StepGraph, efficiency: Efficiency) -> float:
    return efficiency.stack.reduce_bytes if graph.precision.needs_master_weights else 4.0


def _stage_transfer(graph: StepGraph, groups: AxisGroups, cluster: Cluster) -> Wire:
    """One activation between neighbouring stages; without sequence parallelism each tp rank still sends only its slice."""
    message = graph.shard.tokens / graph.layout.tp * graph.model.hidden_size * graph.numerics.compute_bytes
    return wire([GroupTransfer("p2p", message, groups.pp, "pp")], cluster)


def data_parallel_transfers(
    graph: StepGraph, part: Part, groups: AxisGroups, efficiency: Efficiency
) -> tuple[list[GroupTransfer], list[GroupTransfer]]:
    """Once per step and run of a part: (sums of gradients, gathers of new weights).

    Gradients that were not scattered per microbatch (ZeRO-1), sums over replicas, and the gather of ZeRO-1 and 2.
    """
    zero, sent, precision = _sent_as(graph, efficiency), _reduce_bytes(graph, efficiency), graph.precision
    kept = precision.saved_matmul_bytes if precision.is_quantized and efficiency.stack.keeps_quantized_weights else precision.compute_bytes
    reduces, gathers = [], []
    for is_expert, axis, across in ((False, "fsdp", "dp_replicate"), (True, "expert_fsdp", "expert_replicate")):
        group, replicas = getattr(groups, axis), getattr(groups, across)
        trained = sum(trained_params(part, is_expert, graph.layout.pp > 1))
        reduces.append(GroupTransfer("reduce_scatter", pick(zero == 1, trained * sent, 0.0), group, axis))
        reduces.append(GroupTransfer("all_reduce", trained * sent / pick(zero >= 1, group.size, 1), replicas, across))
        new_weights = pick((zero == 1) | (zero == 2), trained * kept, 0.0)
        gathers.append(GroupTransfer("all_gather", new_weights, group, axis))
    return reduces, gathers


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
            held = held + num_bytes / pick(zero >= 1, degree, 1)
        moved.append(held)
    return over_stages(moved, part_runs(graph))
