"""What every pipeline stage holds over a step: at each instant, tensor by tensor, and which of them is its peak.

In: a request. Out: a `MemoryTimeline`, the same numbers as `estimate`, which `planner memory` prints and draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np

from planner.explanations._base import Trace
from planner.memory import INSTANTS, MemoryBreakdown, memory_terms
from planner.plan import Request
from planner.stage_memory import THROUGHOUT

__all__ = ["Instant", "MemoryTimeline", "StageTimeline", "alike", "memory_timeline"]


@dataclass(frozen=True)
class Instant:
    """What a stage holds at one moment of a step, in bytes."""

    name: str
    when: str
    breakdown_bytes: dict[str, float]
    """By what they hold, in the order of `estimate --json`; zeros are left out."""
    tensors: tuple[tuple[str, str, float], ...]
    """(part of the breakdown, which of its tensors, bytes), largest first; the stack's constants are among them."""

    @property
    def total_bytes(self) -> float:
        """All of them."""
        return sum(self.breakdown_bytes.values())


@dataclass(frozen=True)
class StageTimeline:
    """One stage's instants, in the order in which a step comes to them."""

    stage: int
    instants: tuple[Instant, ...]

    @property
    def peak(self) -> Instant:
        """The instant at which most is held."""
        return max(self.instants, key=lambda instant: instant.total_bytes)


@dataclass(frozen=True)
class MemoryTimeline:
    """All stages, and what a device can hold."""

    title: str
    usable_bytes: float
    stages: tuple[StageTimeline, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON: every instant with its total, the peak by name."""
        stages = []
        for stage in self.stages:
            instants = [asdict(instant) | {"total_bytes": instant.total_bytes} for instant in stage.instants]
            stages.append({"stage": stage.stage, "peak": stage.peak.name, "instants": instants})
        return {"schema_version": 1, "usable_bytes": self.usable_bytes, "stages": stages}


def alike(stages: Sequence[StageTimeline], key: Callable[[StageTimeline], object]) -> list[tuple[str, StageTimeline]]:
    """Neighbours with the same key as one: (`stage 0` or `stages 1 to 6`, the first of them)."""
    groups = [list(group) for _, group in groupby(stages, key)]
    return [(f"stage {g[0].stage}" if len(g) == 1 else f"stages {g[0].stage} to {g[-1].stage}", g[0]) for g in groups]


def memory_timeline(request: Request) -> MemoryTimeline:
    """What a request's plan holds over a step. `INSTANTS` that a stage does not come to are left out.

    Raises:
        InputError: wrong input.
    """
    trace = Trace.of(request)
    stack, plan = trace.job.stack, trace.plan
    lasting, found = memory_terms(trace.graph, stack)
    order = ("loss", "head", "blocks", "second block", "reduce", "last block", "embedding", "next blocks", "update")
    names = [name for name in order if found[name]]
    stages = []
    for stage in range(trace.graph.layout.pp):
        constants = {name: float(np.broadcast_to(value, np.shape(trace.memory.context))[stage]) for name, value in lasting.items()}
        constants["context"] = float(trace.memory.context[stage])
        instants = [_instant(name, constants, found[name], stage, stack.allocator_slack_fraction) for name in names]
        stages.append(StageTimeline(stage, tuple(instant for instant in instants if instant is not None)))
    cluster = plan.inputs["cluster"]
    title = f"{plan.model_name} on {cluster['num_devices']:,} x {cluster['accelerator']}"
    return MemoryTimeline(title, float(plan.memory.usable_bytes), tuple(stages))


def _instant(name: str, constants: dict[str, float], terms: dict[str, dict[str, Any]], stage: int, slack_fraction: float) -> Instant | None:
    """None where the stage has nothing to do then: no head, no embedding, nothing that leaves."""
    tensors = []
    parts = dict.fromkeys(MemoryBreakdown.PARTS, 0.0) | constants
    for part, values in terms.items():
        for what, value in values.items():
            num_bytes = float(np.asarray(value)[stage if np.size(value) > 1 else 0])
            parts[part] += num_bytes
            tensors.append((part, what, num_bytes))
    if not any(num_bytes for _, what, num_bytes in tensors if what not in THROUGHOUT):
        return None
    parts["allocator_slack"] = slack_fraction * (sum(parts.values()) - parts["context"])
    tensors += [
        (part, "of the stage" if part in ("weights", "optimizer") else "of the stack", parts[part]) for part in (*constants, "allocator_slack")
    ]
    shown = sorted((tensor for tensor in tensors if tensor[2]), key=lambda tensor: -tensor[2])
    return Instant(name, INSTANTS[name], {part: value for part, value in parts.items() if value}, tuple(shown))
