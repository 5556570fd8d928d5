"""Seconds of a step: by kind of work, by part of the model, by op, by pass, by collective."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.explanations._base import Explanation, Input, Trace, explained, look_up, summed
from planner.explanations.kernels import explain_kernel
from planner.explanations.model import describe_op
from planner.explanations.wires import coefficient, explain_collective, exposed_formula, on_the_wire
from planner.graph import Part, part_runs
from planner.op_cost import OpCost
from planner.step_work import (
    AXES,
    PartWork,
    data_parallel_transfers,
    fsdp_transfers,
    group_transfer,
    optimizer_bytes,
    part_work,
    repeated_ops,
    wire,
)
from planner.timing import NAMES_OF_KINDS, PartTimes, TimeBreakdown, data_parallel_s, exposed_data_parallel, exposed_fsdp, part_times, worked_runs

__all__ = ["explain_time"]

_AXES = {name: axis for axis, name in AXES.items()}
_KIND_OF_NAME = {name: kind for kind, name in NAMES_OF_KINDS.items()}
SHOWN_RUNS = 3
_PASSES = ("forward", "backward_input", "backward_weight")
_SOURCES = {
    "matmul": "each matmul at the slower of compute and memory (roofline), with its shape's efficiency",
    "grouped_matmul": "experts' matmuls at the slower of compute and memory (roofline)",
    "attention": "attention kernels at their published share of peak",
    "memory_bound": "kernels that move bytes for longer than they compute, at the achieved memory bandwidth",
    "kernel_gaps": "device time between kernels, or their measured host time",
    "host": "passes that the host takes longer to launch than the device to run",
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
    special = {
        "pipeline_transfer_and_bubble": _bubble, "data_parallel": _data_parallel, "optimizer": _optimizer, "stragglers": _stragglers,
        "step_overhead": _step_overhead, "correction": _correction,
    }  # fmt: skip
    if what in special:
        return special[what](trace, key, path)
    return _worked(trace, key, what, path)


@dataclass(frozen=True)
class _Work:
    """Seconds per run of a part on the slowest stage, and how often it runs in a step."""

    part: Part
    work: PartWork
    times: PartTimes
    fsdp: tuple[float, float]
    num_runs: float


def _work(trace: Trace, index: int) -> _Work:
    part, c = trace.graph.parts[index], trace.job.efficiency.coefficients
    work = part_work(trace.graph, part, trace.groups, trace.job.cluster, trace.job.efficiency)
    times = part_times(work, c, trace.work.matmul_format)
    gather, scatter = exposed_fsdp(work, times, c)
    runs = float(worked_runs(trace.work.runs, trace.work.schedule)[index][int(trace.time.slowest_stage)])
    return _Work(part, work, times, (float(gather), float(scatter)), runs)


def _of_kind(times: PartTimes, what: str) -> float:
    kind = _KIND_OF_NAME.get(what, what)
    return float(sum(table.get(kind, 0.0) for table in (times.forward, times.backward_input, times.backward_weight)))


def _op_work(trace: Trace, part: Part, cost: OpCost) -> PartWork:
    return part_work(trace.graph, replace(part, costs=(cost,)), trace.groups, trace.job.cluster, trace.job.efficiency)


def _op_times(trace: Trace, part: Part, cost: OpCost) -> PartTimes:
    return part_times(_op_work(trace, part, cost), trace.job.efficiency.coefficients, trace.work.matmul_format)


def _op_seconds(trace: Trace, part: Part, what: str) -> dict[str, float]:
    """Op -> seconds of one run."""
    if what == "recompute":
        repeated = repeated_ops(trace.graph, part, trace.job.stack)
        again = zip(part.costs, repeated, strict=True)
        return {c.op.name: float(_op_times(trace, part, c).recompute) if is_repeated else 0.0 for c, is_repeated in again}
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
    if what in ("fsdp", "host"):
        return _fsdp(trace, key, path) if what == "fsdp" else _host(trace, key, path)
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
    kind = _KIND_OF_NAME.get(what, what)
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
        if what == "memory_bound" and trace.job.efficiency.curves is not None:
            times = _op_times(trace, part, cost)
            seconds = float(getattr(times, name).get("memory", 0.0))
            origin = "curves of the stack at these bytes; casts of the weight, casts and sums of its gradient included"
            return explained(key, seconds, "measured_s", [Input("measured_s", seconds, origin)], source=origin)
        return explain_kernel(trace, key, cost, name, _KIND_OF_NAME.get(what, what))
    phase, collective = look_up(key, left, ("forward", "backward"))
    transfers = [t for t in cost.transfers if t.axis == _AXES[what] and t.phase == phase]
    moved = [group_transfer(t, trace.groups) for t in transfers]
    if collective:
        return explain_collective(trace, key, collective, moved)
    times = _op_times(trace, part, cost)
    value = (times.forward if phase == "forward" else times.backward_input).get(what, 0.0)
    overlap = coefficient(trace, f"{what}_overlap", "overlap")
    whole, inputs = on_the_wire(trace, wire(moved, trace.job.cluster))
    children = [f"{key}.{t.collective}" for t in moved if float(t.seconds(trace.job.cluster))]
    if what != "context_parallel":
        return explained(key, value, f"({whole}) * (1 - overlap)", [*inputs, overlap], children=children, source=_SOURCES[what])
    kernel = (times.forward if phase == "forward" else times.backward_input).get(cost.op.kind, 0.0)
    kernel_key = key.replace("context_parallel", "attention").replace(".backward", ".backward_input")
    inputs += [overlap, Input("kernel_s", float(kernel), f"explain {kernel_key}")]
    formula = f"max(({whole}) - kernel_s * overlap, ({whole}) * (1 - overlap))"
    return explained(key, value, formula, inputs, children=children, source=_SOURCES[what])


def _fsdp(trace: Trace, key: str, path: str) -> Explanation:
    """FSDP of one part: what compute does not hide in each pass, or one of its collectives."""
    names = [part.name for part in trace.graph.parts]
    name, collective = look_up(key, path, names)
    work = _work(trace, names.index(name))
    gathers, scatters = fsdp_transfers(trace.graph, work.part, trace.groups, trace.job.efficiency)
    cluster, c = trace.job.cluster, trace.job.efficiency.coefficients
    if collective:
        return explain_collective(trace, key, collective, [*gathers, *scatters])
    inputs = [
        *_counts(trace, work),
        Input("gather_s", float(work.work.fsdp_gather.seconds(c)), "all-gathers of weights under the stack"),
        Input("return_s", float((work.work.fsdp_gather + work.work.fsdp_scatter).seconds(c)), "the same and reduce-scatters of gradients"),
        Input("forward_s", float(work.times.forward_s), f"{name}, one run"),
        Input("backward_s", float(work.times.backward_s), f"{name}, one run, recompute included"),
        coefficient(trace, "fsdp_overlap", "overlap"),
        coefficient(trace, "contention"),
    ]
    formula = f"num_runs * num_microbatches * ({exposed_formula('gather_s', 'forward_s')} + {exposed_formula('return_s', 'backward_s')})"
    scale = work.num_runs * float(trace.graph.num_microbatches)
    terms = {"forward": scale * work.fsdp[0], "backward": scale * work.fsdp[1]}
    children = [f"{key}.{t.axis}_{t.collective}" for t in (*gathers, *scatters) if float(t.seconds(cluster))]
    return explained(key, scale * sum(work.fsdp), formula, inputs, terms=terms, children=children, source=_SOURCES["fsdp"])


def _host(trace: Trace, key: str, path: str) -> Explanation:
    """What the host takes longer than the device, of one part."""
    names = [part.name for part in trace.graph.parts]
    work = _work(trace, names.index(look_up(key, path, names)[0]))
    times, own = work.times, work.work
    launches = [own.forward, own.backward_input, own.backward_weight, own.recompute]
    kernels = [float(w.get("kernels", 0.0)) for w in launches]
    waits = {"forward": float(times.forward["host"]), "backward": float(times.backward_input["host"])}
    inputs = [
        *_counts(trace, work),
        Input("forward_kernels", kernels[0], "launches of the forward pass"),
        Input("backward_kernels", sum(kernels[1:]), "launches of the backward pass, of work done again too"),
        Input(
            "code_s",
            float(times.forward_host_s) - kernels[0] * trace.job.efficiency.coefficients.launch,
            "block_host, tensor_parallel_host where tp > 1, and expert_host of experts",
        ),
        Input("code_passes", 1.0 + (kernels[3] > 0), "passes of the block's code on the way back"),
        coefficient(trace, "launch"),
        Input("forward_s", float(times.forward_s) - waits["forward"], "the device's forward pass"),
        Input("backward_s", float(times.backward_s) - waits["backward"], "the device's backward pass"),
    ]
    formula = (
        "num_runs * num_microbatches * (max(forward_kernels * launch + code_s - forward_s, 0)"
        " + max(backward_kernels * launch + code_passes * code_s - backward_s, 0))"
    )
    scale = work.num_runs * float(trace.graph.num_microbatches)
    terms = {name: scale * seconds for name, seconds in waits.items()}
    return explained(key, sum(terms.values()), formula, inputs, terms=terms, source=_SOURCES["host"])


def _stragglers(trace: Trace, key: str, path: str) -> Explanation:
    """Time lost to the slowest node."""
    if path:
        look_up(key, path, [])
    others = [name for name in TimeBreakdown.PARTS if name not in ("stragglers", "optimizer", "step_overhead", "correction")]
    worked = sum(trace.at(f"time.breakdown_s.{name}") for name in others)
    inputs = [
        Input("worked_s", worked, "all parts of the step but optimizer and step overhead"),
        coefficient(trace, "straggling"),
        Input("doublings", float(np.log2(trace.work.num_nodes)), f"log2 of {float(trace.work.num_nodes):g} nodes"),
    ]
    return explained(key, trace.at(key), "worked_s * straggling * doublings", inputs, source="planner/coefficients.py straggling")


def _step_overhead(trace: Trace, key: str, path: str) -> Explanation:
    """What a step costs beside model and optimizer."""
    if path:
        look_up(key, path, [])
    inputs = [coefficient(trace, "step_overhead"), Input("measured_s", float(trace.work.step_overhead_s), "measured beside the ops, where ops were")]
    return explained(key, trace.at(key), "step_overhead + measured_s", inputs, source="planner/coefficients.py step_overhead")


def _correction(trace: Trace, key: str, path: str) -> Explanation:
    """What measured runs near to the plan say beyond the formulas."""
    if path:
        look_up(key, path, [])
    nearby, job = trace.job.nearby, trace.job
    if nearby is None:
        return explained(key, 0.0, "0", source=f"no measured runs of the stack {job.stack.name} are shipped")
    log_ratio = nearby.log_ratio_at(trace.graph, job.cluster, job.software_year)
    nearest = nearby.nearest(trace.graph, job.cluster, SHOWN_RUNS, job.software_year)
    named = "; ".join(f"{run.model} on {run.num_devices} {run.accelerator} ({run.source}, {distance:.1f} away)" for distance, run in nearest)
    formulas = sum(trace.at(f"time.breakdown_s.{name}") for name in TimeBreakdown.PARTS if name != "correction")
    inputs = [
        Input("formulas_s", formulas, "all other parts of the step"),
        Input("log_ratio", float(log_ratio), f"log(measured / formulas) expected from {len(nearby.runs)} runs of the stack; nearest: {named}"),
    ]
    return explained(
        key, trace.at(key), "formulas_s * (exp(log_ratio) - 1)", inputs, source="planner/nearby.py: a Gaussian process over measured runs"
    )


def _stage(trace: Trace, key: str, section: str, stage: int) -> Explanation:
    """time.stage_forward_s.N and stage_backward_s.N: one microbatch through one stage, exposed communication included."""
    runs, terms = part_runs(trace.graph), {}
    for i, part in enumerate(trace.graph.parts):
        work = _work(trace, i)
        seconds = work.times.forward_s + work.fsdp[0] if section == "stage_forward_s" else work.times.backward_s + work.fsdp[1]
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
    documented = " ".join((type(trace.schedule).longest_path_s.__doc__ or "").split("\n\n")[0].split())
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
    time, c = trace.time, trace.job.efficiency.coefficients
    exposed = exposed_data_parallel(trace.work, c, time.stage_backward_s, time.stage_forward_s)
    stage = int(np.argmax(exposed, axis=-1))
    if path:
        return _data_parallel_part(trace, key, path, stage)
    reduce_s, gather_s = (float(np.broadcast_to(s, exposed.shape)[stage]) for s in data_parallel_s(trace.work, c))
    inputs = [
        Input("reduce_s", reduce_s, f"explain {key}.reduce"),
        Input("gather_s", gather_s, f"explain {key}.gather"),
        trace.input("backward_s", f"time.stage_backward_s.{stage}"),
        trace.input("forward_s", f"time.stage_forward_s.{stage}"),
        coefficient(trace, "data_parallel_overlap", "overlap"),
        coefficient(trace, "contention"),
    ]
    formula = f"{exposed_formula('reduce_s', 'backward_s')} + {exposed_formula('gather_s', 'forward_s')}"
    source = f"on stage {stage}, where most is exposed; arXiv:1910.02054 section 7"
    children = [f"{key}.{name}" for name, s in (("reduce", reduce_s), ("gather", gather_s)) if s]
    return explained(key, trace.at(key), formula, inputs, children=children, source=source)


def _data_parallel_part(trace: Trace, key: str, path: str, stage: int) -> Explanation:
    """data_parallel.reduce, .reduce.block, .reduce.block.fsdp_reduce_scatter."""
    graph, cluster, c = trace.graph, trace.job.cluster, trace.job.efficiency.coefficients
    direction, rest = look_up(key, path, ("reduce", "gather"))
    runs = part_runs(graph)
    found = {
        part.name: (float(runs[i][stage]), data_parallel_transfers(graph, part, trace.groups, trace.job.efficiency)[direction == "gather"])
        for i, part in enumerate(graph.parts)
    }
    source = f"{direction} of stage {stage}, in full, without overlap"
    if not rest:
        terms = {name: count * float(wire(transfers, cluster).seconds(c)) for name, (count, transfers) in found.items()}
        return summed(key, sum(terms.values()), terms, {name: f"{key}.{name}" for name in terms}, source)
    name, collective = look_up(key, rest, list(found))
    count, transfers = found[name]
    if collective:
        return explain_collective(trace, key, collective, transfers)
    whole, inputs = on_the_wire(trace, wire(transfers, cluster))
    children = [f"{key}.{t.axis}_{t.collective}" for t in transfers if float(t.seconds(cluster))]
    value = count * float(wire(transfers, cluster).seconds(c))
    return explained(
        key, value, f"num_runs * ({whole})", [Input("num_runs", count, f"{name} on stage {stage}"), *inputs], children=children, source=source
    )


def _optimizer(trace: Trace, key: str, path: str) -> Explanation:
    """Bytes that the update moves over the achieved memory bandwidth."""
    graph, efficiency = trace.graph, trace.job.efficiency
    moved = optimizer_bytes(graph)
    stage = int(np.argmax(moved, axis=-1))
    c = efficiency.coefficients
    bandwidth = efficiency.accelerator.memory_bandwidth_bytes_per_s * c.memory / c.optimizer
    memory, update = coefficient(trace, "memory"), coefficient(trace, "optimizer")
    origin = (
        f"{efficiency.accelerator.id} memory bandwidth times memory {memory.value} ({memory.source}) over optimizer {update.value} ({update.source})"
    )
    if efficiency.curves is not None:
        bandwidth = float(np.atleast_1d(moved)[..., stage]) / trace.at("time.breakdown_s.optimizer")
        origin = f"this many bytes over their curve: {efficiency.curves.source}"
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
