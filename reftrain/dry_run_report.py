"""From a ledger of storages to what a person wants to know: the peak, what was alive then, and how it came about."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from reftrain.dry_run_ledger import CATEGORIES, EXCHANGED, Record, Step, Traffic

__all__ = ["LABELS", "LeftOut", "StageDryRun", "read_step"]

LABELS = tuple(reversed([name for name in CATEGORIES if name != EXCHANGED]))
NUM_POINTS = 400
"""Of a timeline."""
NUM_LARGEST = 40


@dataclass(frozen=True)
class StageDryRun:
    """One rank of a pipeline stage in its second optimizer step."""

    stage: int
    rank: int
    peak_bytes: int
    peak_phase: str
    peak_op: int
    """Ops of the step before the peak."""
    breakdown_bytes: dict[str, int]
    """At the peak, by category; adds up to `peak_bytes`."""
    highest_bytes: dict[str, int]
    """The most that each category reaches at any time."""
    phase_peak_bytes: dict[str, int]
    between_steps_bytes: int
    modules_bytes: dict[str, dict[str, int]]
    """At the peak: module (layers together) -> category -> bytes."""
    largest: list[dict[str, Any]]
    """Live tensors at the peak, alike ones together, largest first."""
    flops: dict[str, int]
    traffic: list[dict[str, Any]]
    timeline: dict[str, Any]
    num_ops: int
    wall_s: float

    @property
    def total_flops(self) -> int:
        """Of all matmuls and attention kernels."""
        return sum(self.flops.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "total_flops": self.total_flops}


@dataclass(frozen=True)
class LeftOut:
    """Microbatches that were not simulated, and how to find what they would have added."""

    num_simulated: int
    num_left_out: int
    period: int
    """Microbatches after which the schedule repeats itself."""
    num_chunks: int
    """Model parts of this rank."""


def read_step(step: Step, stage: int, rank: int, wall_s: float, left_out: LeftOut) -> StageDryRun:
    """Adds up what one step's ledger holds."""
    names = list(LABELS)
    ops, bytes_by_category = _replay(step, names)
    totals = bytes_by_category.sum(axis=1)
    place = int(totals.argmax())
    alive = _alive_at(step, place)
    modules: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for record, num_bytes in alive:
        modules[_without_layer(record.module) or "(none)"][_label(record)] += num_bytes
    ordered = sorted(modules.items(), key=lambda pair: -sum(pair[1].values()))
    return StageDryRun(
        stage, rank, int(totals[place]), _phase_at(step, int(ops[place])), int(ops[place]),
        breakdown_bytes=dict(zip(names, map(int, bytes_by_category[place]), strict=True)),
        highest_bytes=dict(zip(names, map(int, bytes_by_category.max(axis=0)), strict=True)),
        phase_peak_bytes=_phase_peaks(step, ops, totals), between_steps_bytes=int(totals[0]),
        modules_bytes={module: dict(sizes) for module, sizes in ordered}, largest=_largest(alive),
        flops=_flops(step, left_out),
        traffic=_traffic(step, left_out),
        timeline=_timeline(step, ops, bytes_by_category, names), num_ops=int(ops[-1]), wall_s=wall_s,
    )  # fmt: skip


def _flops(step: Step, left_out: LeftOut) -> dict[str, int]:
    """Of all microbatches, and once of the optimizer."""
    every = {op: count * (left_out.num_simulated + left_out.num_left_out) // left_out.num_simulated for op, count in step.flops.items()}
    return {op: every.get(op, 0) + step.flops_once.get(op, 0) for op in {**every, **step.flops_once}}


def _traffic(step: Step, left_out: LeftOut) -> list[dict[str, Any]]:
    """Of all microbatches: those left out move what the last period before the last forward pass moved."""
    marks, found = step.traffic_at_forwards, []
    for (kind, axis), moved in step.traffic.items():
        numbers = asdict(moved)
        if left_out.num_left_out:
            last, before = (asdict(marks[i].get((kind, axis), Traffic())) for i in (-1, -1 - left_out.period * left_out.num_chunks))
            numbers = {name: value + (last[name] - before[name]) * left_out.num_left_out // left_out.period for name, value in numbers.items()}
        found.append({"collective": kind, "axis": axis, **numbers})
    return found


def _label(record: Record) -> str:
    return "communication_buffers" if record.category == EXCHANGED else record.category


def _replay(step: Step, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(ops so far [n + 1], live bytes by category [n + 1, categories]) at the start and after each of n changes."""
    index = {name: i for i, name in enumerate(names)}
    ops = np.zeros(len(step.changes) + 1, np.int64)
    sizes = np.zeros((len(step.changes) + 1, len(names)), np.int64)
    for record, num_bytes in step.start:
        sizes[0, index[_label(record)]] += num_bytes
    for i, (op, record, num_bytes) in enumerate(step.changes, 1):
        ops[i] = op
        sizes[i, index[_label(record)]] = num_bytes
    return ops, sizes.cumsum(axis=0)


def _alive_at(step: Step, place: int) -> list[tuple[Record, int]]:
    sizes: dict[int, int] = defaultdict(int)
    records: dict[int, Record] = {}
    for record, num_bytes in [*step.start, *((record, num_bytes) for _, record, num_bytes in step.changes[:place])]:
        records[id(record)] = record
        sizes[id(record)] += num_bytes
    return [(records[key], num_bytes) for key, num_bytes in sizes.items() if num_bytes]


def _phase_at(step: Step, op: int) -> str:
    return next((phase for begin, phase in reversed(step.phases) if begin < op), "") or "between steps"


def _phase_peaks(step: Step, ops: np.ndarray, totals: np.ndarray) -> dict[str, int]:
    found: dict[str, int] = {}
    begins = [*step.phases, (int(ops[-1]) + 1, "")]
    for (begin, phase), (end, _) in pairwise(begins):
        inside = totals[(ops > begin) & (ops <= end)]
        if phase and len(inside):
            found[phase] = max(found.get(phase, 0), int(inside.max()))
    return found


def _without_layer(module: str) -> str:
    return re.sub(r"\bblocks\.\d+", "blocks.*", module)


def _largest(alive: Sequence[tuple[Record, int]]) -> list[dict[str, Any]]:
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for record, num_bytes in alive:
        groups[_label(record), _without_layer(record.module), record.op, record.phase, record.shape, record.dtype].append(num_bytes)
    ordered = sorted(groups.items(), key=lambda pair: -sum(pair[1]))[:NUM_LARGEST]
    keys = ("category", "module", "op", "phase", "shape", "dtype")
    return [{**dict(zip(keys, group, strict=True)), "count": len(sizes), "bytes": sum(sizes)} for group, sizes in ordered]


def _timeline(step: Step, ops: np.ndarray, sizes: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Live bytes over the step: of each stretch of ops its fullest moment, so that the peak is always there."""
    totals = sizes.sum(axis=1)
    edges = np.unique(np.linspace(0, len(totals), min(NUM_POINTS, len(totals)) + 1).astype(int))
    chosen = [int(begin + totals[begin:end].argmax()) for begin, end in pairwise(edges)]
    return {
        "op": [int(ops[i]) for i in chosen],
        "live_bytes": {name: [int(sizes[i, column]) for i in chosen] for column, name in enumerate(names) if sizes[:, column].any()},
        "phases": [{"op": begin, "phase": phase} for begin, phase in step.phases],
    }
