"""StepWork + coefficients of a stack -> seconds per step: compute, host, exposed communication, bubble, optimizer.

The same functions price one layout, a million layouts, and the runs that a stack is fitted to: every number may be an array [n].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from planner.arrays import largest
from planner.coefficients import Coefficients
from planner.efficiency import Efficiency, Work, work_rates
from planner.graph import StepGraph, over_stages
from planner.hardware import Cluster
from planner.nearby import NearbyRuns
from planner.schedules import SCHEDULES, Stages
from planner.step_work import AXES, PartWork, StepWork, step_work

__all__ = [
    "NAMES_OF_KINDS", "PartTimes", "TimeBreakdown", "data_parallel_s", "estimate_time", "exposed", "exposed_data_parallel", "exposed_fsdp",
    "part_passes", "part_times", "time_step", "whole_step_s", "work_seconds", "worked_runs",
]  # fmt: skip

Array = Any
ROUNDING_FRACTION = 1e-12
"""Of the busy time: what a sum of seconds may be off by."""


NAMES_OF_KINDS = {"memory": "memory_bound", "gaps": "kernel_gaps"}
"""Kinds of work that a breakdown calls by another name."""


@dataclass(frozen=True)
class TimeBreakdown:
    """Seconds of one step on the slowest stage; the fields of `PARTS` add up to `step_s`. Shape [...]."""

    matmul: Array
    grouped_matmul: Array
    attention: Array
    memory_bound: Array
    """Elementwise kernels, and matmuls and attention whose bytes take longer than their FLOPs."""
    kernel_gaps: Array
    """Starting and draining kernels; where ops were measured one by one, their host time."""
    recompute: Array
    """Forward work done again in the backward pass, its communication included."""
    host: Array
    """What the host needs longer to launch a pass than the device to run it."""
    tensor_parallel: Array
    """Exposed, as are all communication parts."""
    context_parallel: Array
    expert_parallel: Array
    fsdp: Array
    """Exposed, and the slowdown of compute by what is hidden."""
    pipeline_transfer_and_bubble: Array
    data_parallel: Array
    optimizer: Array
    stragglers: Array
    step_overhead: Array
    correction: Array
    """What measured runs near to the plan say beyond the formulas; may be negative."""
    spread: Array | None
    """Standard deviation of log(measured / predicted); None where no runs of the stack are known, and for many layouts at once."""
    stage_forward_s: Array
    """Per microbatch and stage, [..., pp], communication included."""
    stage_backward_input_s: Array
    """Recompute included."""
    stage_backward_weight_s: Array
    transfer_s: Array
    """Exposed part of one activation's way to the next stage."""
    slowest_stage: Array

    KINDS = (
        "matmul", "grouped_matmul", "attention", "memory", "gaps", "recompute", "host", "tensor_parallel", "context_parallel", "expert_parallel",
        "fsdp",
    )  # fmt: skip
    """Parts that a stage spends on its microbatches, by the kind of work or axis."""
    PARTS = (
        "matmul", "grouped_matmul", "attention", "memory_bound", "kernel_gaps", "recompute", "host", "tensor_parallel", "context_parallel",
        "expert_parallel", "fsdp", "pipeline_transfer_and_bubble", "data_parallel", "optimizer", "stragglers", "step_overhead", "correction",
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
class PartTimes:
    """Seconds of one run of a part, by kind and direction; numbers or arrays [n]."""

    forward: dict[str, Array]
    backward_input: dict[str, Array]
    backward_weight: dict[str, Array]
    recompute: Array
    forward_host_s: Array
    """What the host needs for the pass, hidden or not."""
    backward_host_s: Array

    @property
    def forward_s(self) -> Array:
        """The forward pass without FSDP."""
        return sum(self.forward.values())

    @property
    def backward_s(self) -> Array:
        """The backward pass without FSDP, recompute included."""
        return sum(self.backward_input.values()) + sum(self.backward_weight.values()) + self.recompute


def exposed(traffic_s: Array, compute_s: Array, overlap: Array, contention: Array) -> Array:
    """Seconds that traffic beside compute costs: what cannot hide, and the slowdown of compute by what does.

    Formula: max(traffic - overlap * compute, (1 - overlap) * traffic) + contention * hidden: the steady state of two streams on
    which each block's traffic runs beside another block's compute. Left out: the first gather and the last scatter of a pass.

    Example:
        >>> float(exposed(3.0, 2.0, 1.0, 0.1))
        1.2
    """
    open_s = np.maximum(traffic_s - overlap * compute_s, (1 - overlap) * traffic_s)
    return open_s + contention * (traffic_s - open_s)


def work_seconds(work: Work, rates: dict[str, Array], kernel_gap: Array) -> dict[str, Array]:
    """Seconds of some work by kind."""
    seconds = {kind: work[kind] / rate for kind, rate in rates.items() if kind in work}
    if "kernels" in work or "overhead" in work:
        seconds["gaps"] = work.get("kernels", 0.0) * kernel_gap + work.get("overhead", 0.0)
    return seconds


def part_times(work: PartWork, c: Coefficients, matmul_format: Array) -> PartTimes:
    """Seconds of one run of a part under a stack, without data parallelism."""
    rates = work_rates(c, matmul_format)
    forward, backward, weight, again = (
        work_seconds(w, rates, c.kernel_gap) for w in (work.forward, work.backward_input, work.backward_weight, work.recompute)
    )
    repeated = sum(again.values(), 0.0)
    for axis, name in AXES.items():
        overlap = getattr(c, f"{name}_overlap")
        for table, phase in ((forward, "forward"), (backward, "backward")):
            if (axis, phase) in work.wires:
                table[name] = _exposed_wire(work, axis, phase, rates, c, overlap)
        if (axis, "recompute") in work.wires:
            repeated = repeated + _exposed_wire(work, axis, "recompute", rates, c, overlap)
    code = work.is_block * c.block_host + work.has_tensor_parallel * c.tensor_parallel_host + work.has_experts * c.expert_host
    is_repeated = np.asarray(work.recompute.get("kernels", 0.0)) > 0
    forward_host_s = work.forward.get("kernels", 0.0) * c.launch + code
    launches = sum(w.get("kernels", 0.0) for w in (work.backward_input, work.backward_weight, work.recompute))
    backward_host_s = launches * c.launch + code * (1.0 + is_repeated)
    forward["host"] = np.maximum(forward_host_s - sum(forward.values()), 0.0)
    backward["host"] = np.maximum(backward_host_s - sum(backward.values()) - sum(weight.values()) - repeated, 0.0)
    return PartTimes(forward, backward, weight, repeated, forward_host_s, backward_host_s)


def _exposed_wire(work: PartWork, axis: str, phase: str, rates: dict[str, Array], c: Coefficients, overlap: Array) -> Array:
    """Communication inside a layer that nothing hides; context parallelism hides behind its own kernel."""
    seconds = work.wires[axis, phase].seconds(c)
    if axis != "cp":
        return seconds * (1 - overlap)
    kernel = work.ring_s["backward" if phase == "backward" else "forward"]
    return exposed(seconds, sum(work_seconds(kernel, rates, 0.0).values(), 0.0), overlap, 0.0)


def exposed_fsdp(work: PartWork, times: PartTimes, c: Coefficients) -> tuple[Array, Array]:
    """What FSDP's communication costs per run of a part: (forward, backward)."""
    gather, returns = work.fsdp_gather.seconds(c), (work.fsdp_gather + work.fsdp_scatter).seconds(c)
    return exposed(gather, times.forward_s, c.fsdp_overlap, c.contention), exposed(returns, times.backward_s, c.fsdp_overlap, c.contention)


def worked_runs(runs: np.ndarray, schedule_name: str) -> np.ndarray:
    """How often a device runs each part per microbatch, of the runs per stage: both [..., parts, pp].

    DualPipe's devices share two slices of the model between them; elsewhere a device works on its own.
    """
    schedule = SCHEDULES[schedule_name]
    return schedule.resident(runs) / schedule.parameter_copies


def _over_stages(per_part: list[Array], runs: np.ndarray) -> np.ndarray:
    """Sum over parts of a quantity per run, numbers or [n], times its runs, [parts, pp] or [n, parts, pp]: [..., pp]."""
    if runs.ndim == 2:
        return over_stages(per_part, runs)
    return np.asarray(sum(np.asarray(value, float)[..., None] * runs[..., i, :] for i, value in enumerate(per_part)))


def _each(stage_value: Array) -> Array:
    """A number per run beside numbers per run and stage."""
    return np.asarray(stage_value)[..., None]


def estimate_time(
    graph: StepGraph, cluster: Cluster, efficiency: Efficiency, nearby: NearbyRuns | None = None, software_year: float | None = None
) -> TimeBreakdown:
    """Seconds of one step.

    Args:
        nearby: measured runs of the stack; None: the formulas alone.
        software_year: of the stack's release; None: the newest measured.
    """
    time = time_step(step_work(graph, cluster, efficiency), efficiency.coefficients)
    if nearby is None:
        return time
    log_ratio = nearby.log_ratio_at(graph, cluster, software_year)
    spread = nearby.spread_at(graph, cluster, software_year) if np.ndim(log_ratio) == 0 else None
    return replace(time, correction=time.step_s * np.expm1(log_ratio), spread=spread)


@dataclass(frozen=True)
class PartPasses:
    """Seconds of one run of a part with all its exposed communication, and in full those of its messages once per step; numbers or arrays."""

    forward_s: Array
    backward_input_s: Array
    """Recompute included."""
    backward_weight_s: Array
    reduce_s: Array
    """Sums of gradients, over data-parallel ranks."""
    gather_s: Array
    """Gathers of new weights."""


def part_passes(work: PartWork, times: PartTimes, fsdp: tuple[Array, Array], c: Coefficients) -> PartPasses:
    """What a pipeline needs to know of a part; `fsdp`: see `exposed_fsdp`."""
    gather, scatter = fsdp
    return PartPasses(
        times.forward_s + gather, sum(times.backward_input.values()) + times.recompute + scatter, sum(times.backward_weight.values(), 0.0),
        work.data_parallel_reduce.seconds(c), work.data_parallel_gather.seconds(c),
    )  # fmt: skip


def whole_step_s(work: StepWork, passes: Sequence[PartPasses], c: Coefficients) -> Array:
    """`time_step(work, c).step_s`, [...], without the parts of it: for many layouts. Stages that are alike are looked at once."""
    schedule, stages = SCHEDULES[work.schedule], Stages.each(work.pp)
    runs = work.runs
    if schedule.looks_at_ends:
        stages = Stages.alike(runs)
        runs = runs[:, stages.firsts]
    forward, backward, weight, reduce_s, gather_s = _of_stages(passes, runs)
    transfer_s = work.stage_transfer.seconds(c) * (1 - c.pipeline_overlap)
    path_s = schedule.longest_path_s(forward, backward, weight, transfer_s, stages, work.num_virtual_stages, work.num_microbatches)
    worked_s = path_s + largest(_exposed_once(reduce_s, gather_s, c, backward + weight, forward))
    return worked_s + sum(_besides(work, c, worked_s))


def _of_stages(passes: Sequence[PartPasses], runs: np.ndarray) -> tuple[np.ndarray, ...]:
    """Each field of `PartPasses` summed over the parts of a stage, [..., pp]."""
    return tuple(_over_stages([getattr(own, field.name) for own in passes], runs) for field in fields(PartPasses))


def _besides(work: StepWork, c: Coefficients, worked_s: Array) -> tuple[Array, Array, Array]:
    """(optimizer, stragglers, what else a step costs), in seconds, beside the passes and their communication."""
    return work.optimizer_s / c.memory * c.optimizer, worked_s * c.straggling * np.log2(work.num_nodes), work.step_overhead_s + c.step_overhead


def time_step(work: StepWork, c: Coefficients) -> TimeBreakdown:
    """Seconds of one step under a stack.

    Formula: each pass of each part takes what its device or its host takes, whichever is longer, and its exposed communication; the
    schedule's makespan over microbatches; then what data parallelism cannot hide, the optimizer, stragglers
    (`straggling` * log2 of the nodes) and what a step costs besides.
    """
    schedule, m, runs = SCHEDULES[work.schedule], work.num_microbatches, work.runs
    times = [part_times(part, c, work.matmul_format) for part in work.parts]
    fsdp = [exposed_fsdp(part, own, c) for part, own in zip(work.parts, times, strict=True)]
    passes = [part_passes(part, own, both, c) for part, own, both in zip(work.parts, times, fsdp, strict=True)]
    forward, backward, weight, reduce_s, gather_s = _of_stages(passes, runs)

    worked = worked_runs(runs, work.schedule)
    busy = schedule.resident(forward + backward + weight) / schedule.parameter_copies
    slowest = np.argmax(busy, axis=-1)
    transfer_s = work.stage_transfer.seconds(c) * (1 - c.pipeline_overlap)
    waits = schedule.bubble_s(forward, backward, weight, transfer_s, work.pp, work.num_virtual_stages, m)
    # Without a pipeline this is the difference of two equal sums, of which rounding leaves something.
    bubble = np.where(waits > ROUNDING_FRACTION * m * np.max(busy, axis=-1), waits, 0.0)
    counts = [_at_stage(worked[..., i, :], slowest) for i in range(len(times))]
    on_slowest = {}
    for kind in TimeBreakdown.KINDS:
        spent = [_kind_s(own, both, kind) * count for own, both, count in zip(times, fsdp, counts, strict=True)]
        on_slowest[kind] = sum(spent) * m
    on_slowest |= {name: on_slowest.pop(kind) for kind, name in NAMES_OF_KINDS.items()}
    data_parallel = np.max(_exposed_once(reduce_s, gather_s, c, backward + weight, forward), axis=-1)
    optimizer_s, straggling_s, overhead_s = _besides(work, c, sum(on_slowest.values()) + bubble + data_parallel)
    return TimeBreakdown(
        **on_slowest,
        pipeline_transfer_and_bubble=bubble,
        data_parallel=data_parallel,
        optimizer=optimizer_s,
        stragglers=straggling_s,
        step_overhead=overhead_s,
        correction=0.0,
        spread=None,
        stage_forward_s=forward,
        stage_backward_input_s=backward,
        stage_backward_weight_s=weight,
        transfer_s=transfer_s,
        slowest_stage=slowest,
    )


def _at_stage(per_stage: np.ndarray, stage: np.ndarray) -> Array:
    """The value at one stage: of [pp] at stages [...], or of [n, pp] at stages [n]."""
    return per_stage[stage] if per_stage.ndim == 1 else np.take_along_axis(per_stage, stage[..., None], axis=-1)[..., 0]


def _kind_s(times: PartTimes, fsdp: tuple[Array, Array], kind: str) -> Array:
    """Seconds of one run of a part spent on one kind of work."""
    if kind in ("recompute", "fsdp"):
        return times.recompute if kind == "recompute" else fsdp[0] + fsdp[1]
    return sum(table.get(kind, 0.0) for table in (times.forward, times.backward_input, times.backward_weight))


def data_parallel_s(work: StepWork, c: Coefficients) -> tuple[Array, Array]:
    """(sums of gradients, gathers of new weights) per stage in full, [..., pp]."""
    reduce_s, gather_s = ([getattr(part, name).seconds(c) for part in work.parts] for name in ("data_parallel_reduce", "data_parallel_gather"))
    return _over_stages(reduce_s, work.runs), _over_stages(gather_s, work.runs)


def exposed_data_parallel(work: StepWork, c: Coefficients, backward_s: Array, forward_s: Array) -> Array:
    """What `data_parallel_s` costs, [..., pp].

    Gradients hide behind the backward pass of the last microbatch, gathers behind the forward pass of the first.
    """
    return _exposed_once(*data_parallel_s(work, c), c, backward_s, forward_s)


def _exposed_once(reduce_s: Array, gather_s: Array, c: Coefficients, backward_s: Array, forward_s: Array) -> Array:
    overlap, contention = _each(c.data_parallel_overlap), _each(c.contention)
    return exposed(reduce_s, backward_s, overlap, contention) + exposed(gather_s, forward_s, overlap, contention)
