"""Predictions against a table of measurements: errors of step time and memory, and how often the interval holds.

In: rows of `planner.measurements`. Out: a `ValidationReport`, as JSON (`validate --json`) or as a page (`report/validation_text.py`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from planner.assemble import QUANTILE_90
from planner.errors import InputError, shorten
from planner.estimate import estimate
from planner.files import to_json
from planner.layout import describe_layout
from planner.measured_requests import inferred, to_request
from planner.measured_values import measured_memory_bytes, measured_step_s, memory_kind, predicted_memory_bytes
from planner.measurements import Measurement, read_rows
from planner.nearby import KnownRun
from planner.plan import Plan
from planner.ranking import ChoiceSummary, choices, summarize_choices
from planner.resolve import resolve
from planner.summaries import (
    BASELINE_MFU,
    DEVICE_BANDS,
    PARAM_BANDS,
    Judged,
    TimeSummary,
    band,
    baseline_step_s,
    group_times,
    summarize_groups,
    summarize_times,
)
from planner.workers import map_ordered

__all__ = ["ErrorSummary", "RowResult", "Skipped", "ValidationReport", "read_rows", "validate_rows"]


@dataclass(frozen=True)
class Skipped:
    """A row that could not be expressed, and why."""

    id: str
    reason: str
    kind: str
    """The reason without the row's own value."""


@dataclass(frozen=True)
class RowResult:
    """One row, predicted and measured; None where the row has no such measurement. Errors are predicted / measured - 1."""

    id: str
    source: str
    model: str
    accelerator: str
    num_devices: int
    stack: str
    layout: str
    recompute: str
    workload: str
    source_detail: str
    notes: str
    predicted_step_s: float
    measured_step_s: float | None
    error_fraction: float | None
    low_step_s: float
    high_step_s: float
    memory_kind: str
    """What the measured peak counts, and so the predicted one: see `memory_kind`."""
    fitted: str
    """What the row was used for, and may not judge: `coefficients` (nothing is judged by it), `interval` (not how often that holds)."""
    predicted_memory_bytes: float
    measured_memory_bytes: float | None
    memory_error_fraction: float | None
    low_memory_bytes: float
    high_memory_bytes: float
    precision: str
    num_params: int
    baseline_step_s: float
    """See `planner.summaries.baseline_step_s`."""
    job_key: str
    """The same for rows that differ in their layout and recompute alone."""
    is_left_out: bool
    """The stack was fitted to this row: its error in the summaries is that of a fit, and of nearby runs, without it and its like."""
    judged_error_fraction: float | None
    judged_spread: float | None
    """Standard deviation of log(measured / predicted) that goes with it; None: the interval above."""
    assumptions: tuple[str, ...]
    """What was not published and what it was taken to be."""

    @property
    def judged(self) -> Judged | None:
        """The row as a judge of step times; None where no time was measured."""
        if self.measured_step_s is None or self.judged_error_fraction is None:
            return None
        predicted_s = self.measured_step_s * (1 + self.judged_error_fraction)
        reach = None if self.judged_spread is None else math.exp(QUANTILE_90 * self.judged_spread)
        low, high = (self.low_step_s, self.high_step_s) if reach is None else (predicted_s / reach, predicted_s * reach)
        layout = f"{self.layout}, recompute {self.recompute}"
        return Judged(predicted_s, self.measured_step_s, low, high, self.baseline_step_s, self.source, self.job_key, layout)


@dataclass(frozen=True)
class ErrorSummary:
    """Of absolute relative errors; None where nothing was measured."""

    num_rows: int
    median_abs_error_fraction: float | None
    p90_abs_error_fraction: float | None
    interval_coverage_fraction: float | None


@dataclass(frozen=True)
class ValidationReport:
    """All rows of a table."""

    per_row: tuple[RowResult, ...]
    skipped: tuple[Skipped, ...]
    sources: dict[str, str]
    """Row id -> source, skipped rows included."""

    @property
    def throughput(self) -> TimeSummary:
        """Errors of the step time."""
        return _time_summary(self.per_row)

    @property
    def num_left_out(self) -> int:
        """Rows that a stack was fitted to, judged by a fit without them."""
        return sum(row.is_left_out for row in self.per_row if row.judged is not None)

    @property
    def baseline(self) -> dict[str, float | None]:
        """Errors of the step time that a constant share of peak makes on the same rows."""
        time = self.throughput
        return {
            "mfu_fraction": BASELINE_MFU,
            "median_abs_error_fraction": time.baseline_median_abs_error_fraction,
            "p90_abs_error_fraction": time.baseline_p90_abs_error_fraction,
            "median_error_fraction": time.baseline_median_error_fraction,
        }

    @property
    def choosing(self) -> dict[str, ChoiceSummary]:
        """Whether the layout predicted fastest is the fastest, by source."""
        return summarize_choices(choices(row.judged for row in self.per_row if row.judged is not None))

    @property
    def time_groups(self) -> dict[str, dict[str, TimeSummary]]:
        """Errors of the step time by each kind of group, bands in order of size, else the largest group first."""
        rows = [(row, row.judged) for row in self.per_row]
        return {name: group_times(((key(row), judged) for row, judged in rows if judged is not None), order) for name, (key, order) in GROUPS.items()}

    @property
    def sources_alike(self) -> dict[str, float | None]:
        """Errors of the step time where each source weighs the same: a source of many similar runs decides less."""
        return summarize_groups(self.time_groups["source"])

    @property
    def skipped_reasons(self) -> dict[str, list[str]]:
        """Reason -> ids of the rows that were skipped for it, the most frequent one first."""
        found: dict[str, list[str]] = {}
        for one in self.skipped:
            found.setdefault(one.kind, []).append(one.id)
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))

    @property
    def memory(self) -> ErrorSummary:
        """Errors of the peak memory."""
        return _memory_summary(self.per_row)

    @property
    def memory_by_kind(self) -> dict[str, ErrorSummary]:
        """The same for peaks of each kind: allocated and reserved are different numbers."""
        kinds = dict.fromkeys(row.memory_kind for row in self.per_row if row.measured_memory_bytes is not None)
        return {kind: _memory_summary(row for row in self.per_row if row.memory_kind == kind) for kind in kinds}

    def by_source(self) -> dict[str, dict[str, Any]]:
        """The same summaries for each source."""
        found: dict[str, dict[str, Any]] = {}
        for source in dict.fromkeys(self.sources.values()):
            rows = [row for row in self.per_row if row.source == source]
            lost = sum(self.sources[s.id] == source for s in self.skipped)
            found[source] = {
                "rows": len(rows) + lost, "skipped": lost, "throughput": _time_summary(rows).to_dict(), "memory": asdict(_memory_summary(rows)),
            }  # fmt: skip
        return found

    def to_dict(self) -> dict[str, Any]:
        """The object that `validate --json` prints."""
        return {
            "rows": len(self.per_row) + len(self.skipped),
            "skipped": [asdict(s) for s in self.skipped],
            "skipped_reasons": {reason: len(ids) for reason, ids in self.skipped_reasons.items()},
            "throughput": self.throughput.to_dict(),
            "baseline": self.baseline,
            "sources_alike": self.sources_alike,
            "memory": asdict(self.memory),
            "memory_by_kind": {kind: asdict(found) for kind, found in self.memory_by_kind.items()},
            "num_left_out_rows": self.num_left_out,
            "by_source": self.by_source(),
            **{
                f"by_{name}": {group: found.to_dict() for group, found in groups.items()}
                for name, groups in self.time_groups.items()
                if name != "source"
            },
            "choosing": {source: asdict(found) for source, found in self.choosing.items()},
            "per_row": [asdict(row) for row in self.per_row],
        }


def _summary(judged: Sequence[tuple[float, bool | None]]) -> ErrorSummary:
    """Of (error, whether the interval holds; None where the interval was fitted to the row)."""
    if not judged:
        return ErrorSummary(0, None, None, None)
    errors = np.abs([error for error, _ in judged])
    held = [inside for _, inside in judged if inside is not None]
    covered = float(np.mean(held)) if held else None
    return ErrorSummary(len(judged), float(np.median(errors)), float(np.quantile(errors, 0.9)), covered)


def _time_summary(rows: Iterable[RowResult]) -> TimeSummary:
    return summarize_times(row.judged for row in rows if row.judged is not None)


GROUPS: dict[str, tuple[Callable[[RowResult], str], tuple[str, ...]]] = {
    "source": (lambda row: row.source, ()),
    "accelerator": (lambda row: row.accelerator, ()),
    "stack": (lambda row: row.stack, ()),
    "precision": (lambda row: row.precision, ()),
    "devices": (lambda row: band(row.num_devices, DEVICE_BANDS), tuple(name for _, name in DEVICE_BANDS)),
    "params": (lambda row: band(row.num_params, PARAM_BANDS), tuple(name for _, name in PARAM_BANDS)),
}
"""By what errors of step times are grouped, and the order of the groups where they have one."""


def _memory_summary(rows: Iterable[RowResult]) -> ErrorSummary:
    found: list[tuple[float, bool | None]] = []
    for row in rows:
        if row.memory_error_fraction is None or row.measured_memory_bytes is None or row.fitted == "coefficients":
            continue
        is_inside = row.low_memory_bytes <= row.measured_memory_bytes <= row.high_memory_bytes
        found.append((row.memory_error_fraction, None if row.fitted == "interval" else is_inside))
    return _summary(found)


def _result(row: Measurement) -> RowResult:
    """One row, predicted.

    Raises:
        InputError: it cannot be expressed.
    """
    request = to_request(row)
    plan = estimate(request)
    time, layout = plan.time.step_s, plan.layout
    measured = measured_step_s(row, request, plan.time.peak_flops_per_s)
    left_out = None if measured is None else _known_run(plan, measured)
    found = measured_memory_bytes(row)
    if measured is None and found is None:
        raise InputError.single("measured_step_s", None, "neither time nor memory was published in known terms", "leave the row out")
    memory = predicted_memory_bytes(plan, row.text("mem_definition"))
    spread = memory / plan.memory.peak_bytes.value
    workload = request["workload"]
    return RowResult(
        id=row.id,
        source=row.values.get("source", ""),
        model=row.values.get("model", ""),
        accelerator=request["cluster"]["accelerator"],
        num_devices=layout.num_devices,
        stack=request["stack"],
        layout=describe_layout(layout),
        recompute=workload["recompute"],
        workload=f"{workload['global_batch_size']} x {workload['seq_len']}, {workload['precision']}, recompute {workload['recompute']}",
        source_detail=row.values.get("source_detail", ""),
        notes=row.values.get("notes", ""),
        predicted_step_s=time.value,
        measured_step_s=measured,
        error_fraction=None if measured is None else time.value / measured - 1,
        low_step_s=time.low,
        high_step_s=time.high,
        memory_kind=memory_kind(row.text("mem_definition")),
        fitted=row.text("fitted"),
        predicted_memory_bytes=memory,
        measured_memory_bytes=found,
        memory_error_fraction=None if found is None else memory / found - 1,
        low_memory_bytes=plan.memory.peak_bytes.low * spread,
        high_memory_bytes=plan.memory.peak_bytes.high * spread,
        precision=workload["precision"],
        num_params=plan.params.total,
        baseline_step_s=_baseline_step_s(plan),
        job_key=_job_key(row, request),
        is_left_out=left_out is not None,
        judged_error_fraction=None if measured is None else time.value / measured - 1 if left_out is None else left_out.left_out_error_fraction,
        judged_spread=None if left_out is None else left_out.left_out_spread,
        assumptions=inferred(row, request),
    )


def _known_run(plan: Plan, measured_step_s: float) -> KnownRun | None:
    """The run that the plan's stack was fitted to, where the measurement is one."""
    job = resolve(plan.to_request())
    if job.nearby is None:
        return None
    graph = job.graph(plan.layout)
    return job.nearby.same(graph, job.cluster, measured_step_s, job.software_year)


def _job_key(row: Measurement, request: dict[str, Any]) -> str:
    """Source and request, less what the planner can be asked to choose, and less the length of the run."""
    workload = {name: value for name, value in request["workload"].items() if name not in ("recompute", "tokens")}
    key = to_json([row.text("source"), {**request, "workload": workload, "layout": None}])
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _baseline_step_s(plan: Plan) -> float:
    tokens = plan.time.tokens_per_s * plan.time.step_s.value
    return baseline_step_s(plan.flops.counted_per_token, tokens, plan.layout.num_devices, plan.time.peak_flops_per_s)


def predict_row(row: Measurement) -> RowResult | Skipped:
    """One row, or why it cannot be predicted: its configuration was not published in full or cannot be expressed; never that it is far off."""
    try:
        return _result(row)
    except InputError as error:
        reason = "; ".join(f"{p.key} = {shorten(p.value, 60)}: {p.rule}" for p in error.problems)
        return Skipped(row.id, reason, "; ".join(f"{p.key}: {p.rule}" for p in error.problems))


def validate_rows(rows: Iterable[Measurement], on_row: Callable[[int], None] | None = None, num_processes: int = 1) -> ValidationReport:
    """Predicts every row that can be expressed, and compares.

    Args:
        on_row: told how many rows are done.
        num_processes: the report is the same for any.
    """
    rows = list(rows)
    found = []
    for one in map_ordered(predict_row, rows, num_processes):
        found.append(one)
        if on_row is not None:
            on_row(len(found))
    return ValidationReport(
        tuple(one for one in found if isinstance(one, RowResult)),
        tuple(one for one in found if isinstance(one, Skipped)),
        {row.id: row.values.get("source", "") for row in rows},
    )
