"""Seconds of a step: by kind of work, by part of the model, by op, by pass, by collective."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.collectives import pace
from planner.explanations._base import Explanation, Input, Trace, explained, look_up, summed
from planner.explanations.kernels import explain_kernel
from planner.explanations.model import describe_op
from planner.graph import Part, part_runs
from planner.op_cost import OpCost
from planner.timing import (
    GroupTransfer,
    PartTimes,
    TimeBreakdown,
    data_parallel_s,
    data_parallel_transfers,
    exposed_data_parallel,
    exposed_fsdp,
    fsdp_transfers,
    group_transfer,
    optimizer_bytes,
    part_times,
    repeated_ops,
    worked_runs,
)

__all__ = ["explain_time"]

_AXES = {"tensor_parallel": "tp", "expert_parallel": "ep", "context_parallel": "cp"}
_PASSES = ("forward", "backward_input", "backward_weight")
_SOURCES = {
    "matmul": "each matmul at the slower of compute and memory (roofline), with its shape's efficiency",
    "grouped_matmul": "experts' matmuls at the slower of compute and memory (roofline)",
    "attention": "attention kernels at their published share of peak",
    "memory_bound": "kernels that only move bytes, at the achieved memory bandwidth",
    "recompute": "arXiv:2205.05198 section 5: forward work done again in the backward pass, its communication included",
    "tensor_parallel": "arXiv:1909.08053, 2205.05198: collectives of each layer, less what overlaps",
    "context_parallel": "arXiv:2310.01889: ring attention, less what hides behind the kernel",
    "expert_parallel": "arXiv:2006.16668: all-to-all to the experts and back, less what overlaps",
    "fsdp": "arXiv:2304.11277: gathers and reduce-scatters per microbatch, less what hides behind compute",
}


def explain_time(trace: Trace, key: str) -> Explanation:
    """Any number under `time` that is not in the table of short formulas."""
    _, section, *rest = key.split(".")
    if section == "step_s":
        terms = trace.at("time.breakdown_s")
        source = "parts of planner/timing.py, on the slowest stage"
        return summed(key, trace.at(key), terms, {name: f"time.breakdown_s.{name}" for name in TimeBreakdown.PARTS}, source)
    if section.startswith("stage_"):
        return _stage(trace, key, section, int(rest[0]))
    what, path = rest[0], ".".join(rest[1:])
    special = {"pipeline_transfer_and_bubble": _bubble, "data_parallel": _data_parallel, "optimizer": _optimizer}
    if what in special:
        return special[what](trace, key, path)
    return _worked(trace, key, what, path)


@dataclass(frozen=True)
class _Work:
    """Seconds per run of a part on the slowest stage, and how often it runs in a step."""

    part: Part
    times: PartTimes
    fsdp: tuple[float, float]
    num_runs: float


def _work(trace: Trace, index: int) -> _Work:
    part, efficiency, cluster = trace.graph.parts[index], trace.job.efficiency, trace.job.cluster
    times = part_times(trace.graph, part, trace.groups, cluster, efficiency)
    gather, scatter = exposed_fsdp(trace.graph, part, times, trace.groups, cluster, efficiency)
    runs = float(worked_runs(trace.graph)[index][int(trace.time.slowest_stage)])
    return _Work(part, times, (float(gather), float(scatter)), runs)


def _of_kind(times: PartTimes, what: str) -> float:
    kind = "memory" if what == "memory_bound" else what
    return float(sum(table.get(kind, 0.0) for table in (times.forward, times.backward_input, times.backward_weight)))


def _op_times(trace: Trace, part: Part, cost: OpCost) -> PartTimes:
    return part_times(trace.graph, replace(part, costs=(cost,)), trace.groups, trace.job.cluster, trace.job.efficiency)


def _op_seconds(trace: Trace, part: Part, what: str) -> dict[str, float]:
    """Op -> seconds of one run."""
    if what == "recompute":
        repeated = repeated_ops(trace.graph, part, trace.job.stack)
        again = zip(part.costs, repeated, strict=True)
        return {c.op.name: float(sum(_op_times(trace, part, c).forward.values())) if is_repeated else 0.0 for c, is_repeated in again}
    return {cost.op.name: _of_kind(_op_times(trace, part, cost), what) for cost in part.costs}


def _worked(trace: Trace, key: str, what: str, path: str) -> Explanation:
    """What the slowest stage spends on its microbatches, by kind of work or axis of communication."""
    num_microbatches = float(trace.graph.num_microbatches)
    if not path:
        works = [_work(trace, i) for i in range(len(trace.graph.parts))]
        whole = {"recompute": lambda w: float(w.times.recompute), "fsdp": lambda w: sum(w.fsdp)}
        seconds: Callable[[_Work], float] = whole.get(what, lambda w: _of_kind(w.times, what))
        terms = {w.part.name: w.num_runs * num_microbatches * seconds(w) for w in works}
        return summed(key, trace.at(key), terms, {name: f"{key}.{name}" for name in terms}, _SOURCES[what])
    if what == "fsdp":
        return _fsdp(trace, key, path)
    index, part, cost, left = trace.locate(key, path)
    work = _work(trace, index)
    scale = work.num_runs * num_microbatches
    per_op = _op_seconds(trace, part, what)
    if cost is None:
        terms = {name: scale * seconds for name, seconds in per_op.items()}
        return summed(key, sum(terms.values()), terms, {name: f"{key}.{name}" for name in terms}, _SOURCES[what])
    if left:
        return _pass(trace, key, what, part, cost, left)
    counts = _counts(trace, work)
    if what == "recompute":
        inputs = [*counts, Input("forward_s", per_op[cost.op.name], f"{describe_op(cost)}, run again")]
        return explained(key, scale * per_op[cost.op.name], "num_runs * num_microbatches * forward_s", inputs, source=_SOURCES[what])
    return _op(trace, key, what, part, cost, counts)


def _counts(trace: Trace, work: _Work) -> list[Input]:
    runs = Input("num_runs", work.num_runs, f"{work.part.name} on the slowest stage, {int(trace.time.slowest_stage)}")
    return [runs, trace.input("num_microbatches", "time.num_microbatches")]


def _op(trace: Trace, key: str, what: str, part: Part, cost: OpCost, counts: Sequence[Input]) -> Explanation:
    """One op or its communication: passes times count."""
    times = _op_times(trace, part, cost)
    kind = "memory" if what == "memory_bound" else what
    tables = dict(zip(_PASSES, (times.forward, times.backward_input, times.backward_weight), strict=True))
    seconds = {name: float(table.get(kind, 0.0)) for name, table in tables.items() if kind in table}
    if what in _AXES:
        seconds = {"forward": seconds.get("forward", 0.0), "backward": seconds.get("backward_input", 0.0)}
    scale = float(counts[0].value or 0) * float(counts[1].value or 0)
    inputs = [*counts, *(Input(f"{name}_s", s, f"explain {key}.{name}") for name, s in seconds.items())]
    formula = f"num_runs * num_microbatches * ({' + '.join(f'{name}_s' for name in seconds) or '0'})"
    terms = {name: scale * s for name, s in seconds.items()}
    children = [f"{key}.{name}" for name, s in seconds.items() if s]
    return explained(key, sum(terms.values()), formula, inputs, terms=terms, children=children, source=f"{describe_op(cost)}; {_SOURCES[what]}")


def _pass(trace: Trace, key: str, what: str, part: Part, cost: OpCost, left: str) -> Explanation:
    """One run of an op: `.forward`; for communication also `.forward.all_gather`."""
    if what not in _AXES:
        name, _ = look_up(key, left, _PASSES)
        if what == "memory_bound" and cost.op.kind != "memory":
            times = _op_times(trace, part, cost)
            seconds = (times.forward if name == "forward" else times.backward_input).get("memory", 0.0)
            origin = "casts of the weight, casts and sums of its gradient: curves of the stack"
            return explained(key, float(seconds), "measured_s", [Input("measured_s", float(seconds), origin)], source=origin)
        return explain_kernel(trace, key, cost, name)
    phase, collective = look_up(key, left, ("forward", "backward"))
    transfers = [t for t in cost.transfers if t.axis == _AXES[what] and t.phase == phase]
    moved = [group_transfer(t, trace.groups) for t in transfers]
    if collective:
        return _collective(trace, key, collective, moved)
    times = _op_times(trace, part, cost)
    value = (times.forward if phase == "forward" else times.backward_input).get(what, 0.0)
    overlap = getattr(trace.job.stack.overlap, what)
    fraction = Input("overlap_fraction", overlap.value, f"{overlap.evidence}: {overlap.source}")
    full = {t.collective: float(t.seconds(trace.job.cluster)) for t in moved}
    inputs = [Input(f"{name}_s", s, f"explain {key}.{name}") for name, s in full.items()]
    whole = " + ".join(i.name for i in inputs) or "0"
    children = [f"{key}.{name}" for name, s in full.items() if s]
    if what != "context_parallel":
        return explained(key, value, f"({whole}) * (1 - overlap_fraction)", [*inputs, fraction], children=children, source=_SOURCES[what])
    kernel = (times.forward if phase == "forward" else times.backward_input).get(cost.op.kind, 0.0)
    kernel_key = key.replace("context_parallel", "attention").replace(".backward", ".backward_input")
    inputs += [fraction, Input("kernel_s", float(kernel), f"explain {kernel_key}")]
    formula = f"max(({whole}) - kernel_s * overlap_fraction, ({whole}) * (1 - overlap_fraction))"
    return explained(key, value, formula, inputs, children=children, source=_SOURCES[what])


def _collective(trace: Trace, key: str, name: str, transfers: Sequence[GroupTransfer]) -> Explanation:
    """One collective: bytes over bandwidth, and latency."""
    named = {t.collective: t for t in transfers} | {f"{t.axis}_{t.collective}": t for t in transfers}
    found = named[look_up(key, name, list(named))[0]]
    cluster, group = trace.job.cluster, found.group
    cost = pace(found.collective, found.num_bytes / found.num_calls, group, cluster)
    value = float(found.seconds(cluster))
    size, domains = float(group.size), float(group.num_domains)
    ranks = f"{size:g} ranks of axis {found.axis}, {float(group.per_domain):g} per scale-up domain"
    link = cluster.scale_up if domains <= 1 or cluster.scale_out is None else cluster.scale_out
    num_bytes = float(found.num_bytes) / found.num_calls
    inputs = [
        Input("num_calls", float(found.num_calls), "equal messages, one after the other"),
        Input("num_bytes", num_bytes, f"{found.collective}: the full buffer of one per device"),
    ]
    curve = link.curves.get(f"{found.collective}/{size:g}") if domains <= 1 else None
    if curve is not None:
        inputs.append(Input("curve_s", float(curve.at(num_bytes)), f"{ranks}: measured at num_bytes, {link.source}"))
    else:
        inputs += [
            Input("traffic_ratio", float(cost.traffic_ratio), f"{found.collective} over {ranks}"),
            Input("bytes_per_s", float(cost.bytes_per_s), f"{link.name}, bus bandwidth: {link.source}"),
            Input("latency_s", float(cost.latency_s), f"{ranks}"),
        ]
    inputs.append(Input("achieved_fraction", cluster.communication_fraction, "the stack's coefficient of communication"))
    each = "num_bytes * traffic_ratio / bytes_per_s + latency_s" if curve is None else "curve_s"
    formula = f"num_calls * ({each}) / achieved_fraction" if value else "0"
    return explained(key, value, formula, inputs, source="planner/collectives.py pace: NVIDIA/nccl-tests doc/PERFORMANCE.md @a0b82b2")


def _fsdp(trace: Trace, key: str, path: str) -> Explanation:
    """FSDP of one part: what compute does not hide in each pass, or one of its collectives."""
    names = [part.name for part in trace.graph.parts]
    name, collective = look_up(key, path, names)
    work = _work(trace, names.index(name))
    gathers, scatters = fsdp_transfers(trace.graph, work.part, trace.groups, trace.job.efficiency)
    cluster, overlap = trace.job.cluster, trace.job.stack.overlap.fsdp
    if collective:
        return _collective(trace, key, collective, [*gathers, *scatters])
    forward_s = float(sum(work.times.forward.values()))
    backward_s = float(sum(work.times.backward_input.values()) + sum(work.times.backward_weight.values()) + work.times.recompute)
    inputs = [
        *_counts(trace, work),
        Input("gather_s", float(sum(t.seconds(cluster) for t in gathers)), f"explain {key}.all_gather"),
        Input("scatter_s", float(sum(t.seconds(cluster) for t in scatters)), f"explain {key}.reduce_scatter"),
        Input("forward_s", forward_s, f"{name}, one run"),
        Input("backward_s", backward_s, f"{name}, one run, recompute included"),
        Input("overlap_fraction", overlap.value, f"{overlap.evidence}: {overlap.source}"),
    ]
    formula = (
        "num_runs * num_microbatches * (max(gather_s - forward_s * overlap_fraction, gather_s * (1 - overlap_fraction))"
        " + max(gather_s + scatter_s - backward_s * overlap_fraction, (gather_s + scatter_s) * (1 - overlap_fraction)))"
    )
    scale = work.num_runs * float(trace.graph.num_microbatches)
    terms = {"forward": scale * work.fsdp[0], "backward": scale * work.fsdp[1]}
    children = [f"{key}.{t.axis}_{t.collective}" for t in (*gathers, *scatters) if float(t.seconds(cluster))]
    return explained(key, scale * sum(work.fsdp), formula, inputs, terms=terms, children=children, source=_SOURCES["fsdp"])


def _stage(trace: Trace, key: str, section: str, stage: int) -> Explanation:
    """time.stage_forward_s.N and stage_backward_s.N: one microbatch through one stage, exposed communication included."""
    runs, terms = part_runs(trace.graph), {}
    for i, part in enumerate(trace.graph.parts):
        work = _work(trace, i)
        backward = sum(work.times.backward_input.values()) + sum(work.times.backward_weight.values()) + work.times.recompute + work.fsdp[1]
        seconds = sum(work.times.forward.values()) + work.fsdp[0] if section == "stage_forward_s" else backward
        terms[f"{part.name} x {runs[i][stage]:g}"] = float(runs[i][stage] * seconds)
    return summed(key, trace.at(key), terms, {}, "runs on this stage times the seconds of one: compute and exposed communication")


def _bubble(trace: Trace, key: str, path: str) -> Explanation:
    """Makespan of the schedule less the work of the busiest stage."""
    if path:
        look_up(key, path, [])
    graph, time = trace.graph, trace.time
    if trace.at(key) == 0:
        return explained(key, 0.0, "0", source="one stage, or stages that never wait: the schedule's makespan is the work of the busiest one")
    passes = (time.stage_forward_s, time.stage_backward_input_s, time.stage_backward_weight_s)
    layout, m = graph.layout, graph.num_microbatches
    makespan = trace.schedule.makespan_s(*passes, time.transfer_s, layout.pp, layout.num_virtual_stages, m)
    busy = trace.schedule.busy_s(*passes, m).max(axis=-1)
    shape = f"{layout.pp} stages, {float(m):g} microbatches, transfer {float(time.transfer_s):.3g} s"
    documented = " ".join((type(trace.schedule).makespan_s.__doc__ or "").split("\n\n")[0].split())
    inputs = [
        Input("makespan_s", float(makespan), f"{layout.schedule}, {shape}: {documented}"),
        Input("busy_s", float(busy), f"work of stage {int(time.slowest_stage)} on all microbatches"),
    ]
    children = [f"time.stage_{way}_s.{int(time.slowest_stage)}" for way in ("forward", "backward")]
    module = " ".join((sys.modules[type(trace.schedule).__module__].__doc__ or "").split())
    source = module.split("Source:")[-1].strip()
    return explained(key, trace.at(key), "max(makespan_s - busy_s, 0)", inputs, children=children, source=source)


def _data_parallel(trace: Trace, key: str, path: str) -> Explanation:
    """Once per step: gradient sums behind the last backward pass, weight gathers behind the first forward pass."""
    graph, time, cluster, efficiency = trace.graph, trace.time, trace.job.cluster, trace.job.efficiency
    exposed = exposed_data_parallel(graph, trace.groups, cluster, efficiency, time.stage_backward_s, time.stage_forward_s)
    stage = int(np.argmax(exposed, axis=-1))
    if path:
        return _data_parallel_part(trace, key, path, stage)
    reduce_s, gather_s = (float(np.broadcast_to(s, exposed.shape)[stage]) for s in data_parallel_s(graph, trace.groups, cluster, efficiency))
    overlap = trace.job.stack.overlap.data_parallel
    inputs = [
        Input("reduce_s", reduce_s, f"explain {key}.reduce"),
        Input("gather_s", gather_s, f"explain {key}.gather"),
        trace.input("backward_s", f"time.stage_backward_s.{stage}"),
        trace.input("forward_s", f"time.stage_forward_s.{stage}"),
        Input("overlap_fraction", overlap.value, f"{overlap.evidence}: {overlap.source}"),
    ]
    formula = (
        "max(reduce_s - overlap_fraction * backward_s, reduce_s * (1 - overlap_fraction))"
        " + max(gather_s - overlap_fraction * forward_s, gather_s * (1 - overlap_fraction))"
    )
    source = f"on stage {stage}, where most is exposed; arXiv:1910.02054 section 7"
    children = [f"{key}.{name}" for name, s in (("reduce", reduce_s), ("gather", gather_s)) if s]
    return explained(key, trace.at(key), formula, inputs, children=children, source=source)


def _data_parallel_part(trace: Trace, key: str, path: str, stage: int) -> Explanation:
    """data_parallel.reduce, .reduce.block, .reduce.block.fsdp_reduce_scatter."""
    graph, cluster = trace.graph, trace.job.cluster
    direction, rest = look_up(key, path, ("reduce", "gather"))
    runs = part_runs(graph)
    found = {
        part.name: (float(runs[i][stage]), data_parallel_transfers(graph, part, trace.groups, trace.job.efficiency)[direction == "gather"])
        for i, part in enumerate(graph.parts)
    }
    source = f"{direction} of stage {stage}, in full, without overlap"
    if not rest:
        terms = {name: count * float(sum(t.seconds(cluster) for t in transfers)) for name, (count, transfers) in found.items()}
        return summed(key, sum(terms.values()), terms, {name: f"{key}.{name}" for name in terms}, source)
    name, collective = look_up(key, rest, list(found))
    count, transfers = found[name]
    if collective:
        return _collective(trace, key, collective, transfers)
    seconds = {f"{t.axis}_{t.collective}": float(t.seconds(cluster)) for t in transfers}
    inputs = [Input("num_runs", count, f"{name} on stage {stage}"), *(Input(f"{n}_s", s, f"explain {key}.{n}") for n, s in seconds.items())]
    formula = f"num_runs * ({' + '.join(f'{n}_s' for n in seconds)})"
    terms = {n: count * s for n, s in seconds.items()}
    return explained(key, sum(terms.values()), formula, inputs, terms=terms, children=[f"{key}.{n}" for n, s in seconds.items() if s], source=source)


def _optimizer(trace: Trace, key: str, path: str) -> Explanation:
    """Bytes that the update moves over the achieved memory bandwidth."""
    graph, efficiency = trace.graph, trace.job.efficiency
    moved = optimizer_bytes(graph)
    stage = int(np.argmax(moved, axis=-1))
    bandwidth = efficiency.accelerator.memory_bandwidth_bytes_per_s * efficiency.stack.memory.value
    achieved = efficiency.stack.memory
    origin = f"{efficiency.accelerator.id} memory bandwidth times {achieved.value} ({achieved.source})"
    if efficiency.curves is not None:
        bandwidth = float(np.atleast_1d(moved)[..., stage]) / trace.at("time.breakdown_s.optimizer")
        origin = f"this many bytes over their curve, the rest of a step's work included: {efficiency.curves.source}"
    device = Input("bytes_per_s", bandwidth, origin)
    if path:
        index, part, cost, _ = trace.locate(key, path)
        chosen = [(index, part if cost is None else replace(part, costs=(cost,)))]
    else:
        chosen = list(enumerate(graph.parts))
    num_bytes = {part.name: float(np.atleast_1d(optimizer_bytes(replace(graph, parts=(part,))))[..., stage]) for _, part in chosen}
    value = trace.at(key) if not path else sum(num_bytes.values()) / bandwidth
    source = f"stage {stage}: reads gradients twice, reads and writes masters and states, writes weights; optimizer {graph.workload.optimizer}"
    inputs = [Input("num_bytes", float(np.atleast_1d(moved)[..., stage]) if not path else sum(num_bytes.values()), source), device]
    terms = {name: n / bandwidth for name, n in num_bytes.items()}
    children = [] if path else [f"{key}.{name}" for name, n in num_bytes.items() if n]
    return explained(key, value, "num_bytes / bytes_per_s", inputs, terms=terms if not path else None, children=children, source=source)
