"""One step as a timeline: what every pipeline stage computes, sends and waits for, in the Trace Event Format that Perfetto reads.

In: a request. Out: a `StepTrace`. The times are those of `planner.timing`: each stage's passes play the pipeline schedule event by event
(`planner/schedules/_simulate.py`). Two factors, both in the metadata, make the end of the last slice the predicted step time: the schedule's
closed form over the simulation (1 for equal stages), and the correction by measured runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.estimate import estimate
from planner.plan import Plan, Request
from planner.resolve import resolve
from planner.schedules import SCHEDULES, Action
from planner.schedules._simulate import Simulation, simulate
from planner.step_work import AXES, StepWork, step_work
from planner.timing import NAMES_OF_KINDS, PartTimes, TimeBreakdown, exposed_fsdp, part_times

__all__ = ["StepTrace", "trace_step"]

MICROSECONDS_PER_S = 1e6
MOST_DETAILED_ACTIONS = 6000
"""Passes on all stages up to which each shows its parts: beyond, files would grow past what a browser opens."""
COMPUTE = "compute"
STREAMS = (COMPUTE, *AXES.values(), "fsdp", "pipeline")
PASSES = {"F": "forward", "B": "backward", "W": "backward_weight"}
AFTER = ("data_parallel", "stragglers", "optimizer", "step_overhead")
"""Parts of a step that follow the pipeline, in order."""


@dataclass(frozen=True)
class StageLoad:
    """Seconds of one stage, of a step."""

    busy_s: float
    """Passes, their exposed communication included."""
    bubble_s: float
    exposed_communication_s: float


@dataclass(frozen=True)
class StepTrace:
    """A step, played."""

    plan: Plan
    events: list[dict[str, Any]]
    stages: tuple[StageLoad, ...]
    step_s: float
    metadata: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The object that Perfetto opens."""
        return {"traceEvents": self.events, "displayTimeUnit": "ms", "otherData": self.metadata}


@dataclass(frozen=True)
class _Pass:
    """What one pass of one stage consists of, per microbatch through all chunks of the stage."""

    kinds: dict[str, float]
    """On the compute stream, exposed communication and waiting for the host included; adds up to the pass."""
    streams: dict[str, float]
    """Whole traffic on each communication stream, hidden or not."""


def trace_step(request: Request) -> StepTrace:
    """The predicted step of a request.

    Raises:
        InputError: wrong input.
    """
    plan = estimate(request)
    job = resolve(plan.to_request())
    graph = job.graph(plan.layout)
    work = step_work(graph, job.cluster, job.efficiency)
    c = job.efficiency.coefficients
    passes = _passes(work, [part_times(part, c, work.matmul_format) for part in work.parts], c)
    time, schedule, m = plan.time, SCHEDULES[work.schedule], int(work.num_microbatches)
    seconds = {way: [sum(own[way].kinds.values()) for own in passes] for way in PASSES.values()}
    transfer_s = float(work.stage_transfer.seconds(c) * (1 - c.pipeline_overlap))
    played = simulate(schedule, work.pp, work.num_virtual_stages, m, seconds["forward"], seconds["backward"], seconds["backward_weight"], transfer_s)
    parts = time.breakdown_s
    correction = time.step_s.value / (time.step_s.value - parts["correction"])
    closed_s = sum(parts[name] for name in TimeBreakdown.PARTS if name not in (*AFTER, "correction"))
    factor = correction * closed_s / played.makespan_s
    writer = _Writer(work, passes, played, factor, transfer_s * factor)
    events = list(writer.events())
    end_s = closed_s * correction
    for name in AFTER:
        if parts[name]:
            events += [_slice(stage, COMPUTE, name, end_s, parts[name] * correction) for stage in range(work.pp)]
            end_s += parts[name] * correction
    metadata = {
        "step_s": time.step_s.value, "simulated_s": played.makespan_s, "closed_form_over_simulation": closed_s / played.makespan_s,
        "correction_factor": correction, "schedule": work.schedule, "num_microbatches": m, "parts_of_passes_shown": writer.is_detailed,
        "model": plan.inputs["model"] if isinstance(plan.inputs["model"], str) else "own model",
        "planner_version": plan.provenance["planner_version"],
    }  # fmt: skip
    return StepTrace(plan, events, tuple(writer.load(stage) for stage in range(work.pp)), end_s, metadata)


def _passes(work: StepWork, times: list[PartTimes], c: Any) -> list[dict[str, _Pass]]:
    """Per stage: forward, backward (of inputs) and backward_weight."""
    found = []
    fsdp = [exposed_fsdp(part, own, c) for part, own in zip(work.parts, times, strict=True)]
    for stage in range(work.pp):
        runs = [float(work.runs[i, stage]) for i in range(len(work.parts))]
        kinds: dict[str, dict[str, float]] = {way: {} for way in PASSES.values()}
        streams: dict[str, dict[str, float]] = {way: {} for way in PASSES.values()}
        for count, part, own, (gathered, returned) in zip(runs, work.parts, times, fsdp, strict=True):
            tables = {
                "forward": {**own.forward, "fsdp": gathered},
                "backward": {**own.backward_input, "recompute": own.recompute, "fsdp": returned},
                "backward_weight": own.backward_weight,
            }
            for way, table in tables.items():
                for kind, value in table.items():
                    name = NAMES_OF_KINDS.get(kind, kind)
                    kinds[way][name] = kinds[way].get(name, 0.0) + count * float(value)
            for axis, name in AXES.items():
                for way, phases in (("forward", ("forward",)), ("backward", ("backward", "recompute"))):
                    sent = sum(float(part.wires[axis, phase].seconds(c)) for phase in phases if (axis, phase) in part.wires)
                    streams[way][name] = streams[way].get(name, 0.0) + count * sent
            streams["forward"]["fsdp"] = streams["forward"].get("fsdp", 0.0) + count * float(part.fsdp_gather.seconds(c))
            both = float((part.fsdp_gather + part.fsdp_scatter).seconds(c))
            streams["backward"]["fsdp"] = streams["backward"].get("fsdp", 0.0) + count * both
        found.append({way: _Pass(kinds[way], streams[way]) for way in PASSES.values()})
    return found


def _slice(stage: int, stream: str, name: str, start_s: float, length_s: float, **args: Any) -> dict[str, Any]:
    event = {
        "ph": "X",
        "pid": stage,
        "tid": STREAMS.index(stream),
        "name": name,
        "ts": start_s * MICROSECONDS_PER_S,
        "dur": length_s * MICROSECONDS_PER_S,
    }
    return {**event, "args": args} if args else event


@dataclass(frozen=True)
class _Writer:
    """Events of a played pipeline."""

    work: StepWork
    passes: list[dict[str, _Pass]]
    played: Simulation
    factor: float
    transfer_s: float

    @property
    def is_detailed(self) -> bool:
        """Whether passes show their parts."""
        return sum(len(spans) for spans in self.played.spans) <= MOST_DETAILED_ACTIONS

    def events(self) -> Iterator[dict[str, Any]]:
        """Names of stages and streams, then everything that happens."""
        for stage in range(self.work.pp):
            yield {"ph": "M", "pid": stage, "tid": 0, "name": "process_name", "args": {"name": f"stage {stage}"}}
            yield {"ph": "M", "pid": stage, "tid": 0, "name": "process_sort_index", "args": {"sort_index": stage}}
            for tid, name in enumerate(STREAMS):
                yield {"ph": "M", "pid": stage, "tid": tid, "name": "thread_name", "args": {"name": name.replace("_", " ")}}
            yield from self._stage(stage)
        yield from self._sent()

    def _stage(self, stage: int) -> Iterator[dict[str, Any]]:
        clock, partner = 0.0, ""
        for span in self.played.spans[stage]:
            start, length = span.start_s * self.factor, (span.end_s - span.start_s) * self.factor
            if span.action.paired:
                partner = f"{self._name(span.action)} + "
                continue  # two passes in one slot, drawn with the second
            if start - clock > 1e-12:
                yield _slice(stage, COMPUTE, "bubble", clock, start - clock)
            name = partner + self._name(span.action)
            yield _slice(stage, COMPUTE, name, start, length, microbatch=span.action.microbatch, chunk=span.action.chunk)
            if self.is_detailed and not partner:
                yield from self._inside(stage, span.action, start, length)
            clock, partner = start + length, ""
        end = self.played.makespan_s * self.factor
        if end - clock > 1e-12:
            yield _slice(stage, COMPUTE, "bubble", clock, end - clock)

    @staticmethod
    def _name(action: Action) -> str:
        return f"{PASSES[action.kind].replace('_', ' ')} {action.microbatch}"

    def _inside(self, stage: int, action: Action, start: float, length: float) -> Iterator[dict[str, Any]]:
        """Kinds of work one after the other, in proportion; beside them the traffic."""
        own = self.passes[stage][PASSES[action.kind]]
        whole = dict(own.kinds)
        if action.kind == "B" and not any(span.action.kind == "W" for span in self.played.spans[stage]):
            for kind, value in self.passes[stage]["backward_weight"].kinds.items():
                whole[kind] = whole.get(kind, 0.0) + value
        total = sum(whole.values())
        scale, at = (length / total if total else 0.0), start
        for kind, value in whole.items():
            if value:
                yield _slice(stage, COMPUTE, kind, at, value * scale)
                at += value * scale
        for stream, value in own.streams.items():
            if value:
                yield _slice(stage, stream, stream.replace("_", " "), start, min(value * scale, length), exposed_s=own.kinds.get(stream, 0.0) * scale)

    def _sent(self) -> Iterator[dict[str, Any]]:
        """Activations and gradients on their way to the next stage, with arrows."""
        if self.work.pp == 1 or not self.is_detailed:
            return
        schedule, pp = SCHEDULES[self.work.schedule], self.work.pp
        begun = {
            (span.action.kind, span.action.microbatch, schedule.position(stage, span.action.chunk, pp)): (stage, span)
            for stage, spans in enumerate(self.played.spans)
            for span in spans
        }
        for number, ((kind, microbatch, at), (stage, span)) in enumerate(begun.items()):
            target = begun.get((kind, microbatch, at + (1 if kind == "F" else -1))) if kind in "FB" else None
            if target is None or target[0] == stage:
                continue
            end = span.end_s * self.factor
            yield _slice(stage, "pipeline", f"send {PASSES[kind]} {microbatch}", end, self.transfer_s)
            flow = {"cat": "pipeline", "name": "activation" if kind == "F" else "gradient", "id": number}
            yield {"ph": "s", "pid": stage, "tid": STREAMS.index("pipeline"), "ts": end * MICROSECONDS_PER_S, **flow}
            arrival = target[1].start_s * self.factor * MICROSECONDS_PER_S
            yield {"ph": "f", "bp": "e", "pid": target[0], "tid": 0, "ts": arrival, **flow}

    def load(self, stage: int) -> StageLoad:
        """What the stage did with its time."""
        busy = sum(span.end_s - span.start_s for span in self.played.spans[stage] if not span.action.paired) * self.factor
        per_microbatch = sum(own.kinds.get(stream, 0.0) for own in self.passes[stage].values() for stream in STREAMS)
        share = per_microbatch / max(sum(sum(own.kinds.values()) for own in self.passes[stage].values()), 1e-30)
        whole = self.played.makespan_s * self.factor
        return StageLoad(float(busy), float(np.maximum(whole - busy, 0.0)), float(busy * share))
