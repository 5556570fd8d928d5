"""Predictions against a table of measurements: errors of step time and memory, and how often the interval holds.

In: rows of `planner.measurements`. Out: a `ValidationReport`, as JSON (`validate --json`) or as a page (`report/validation_text.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from planner.architectures import load_model
from planner.assemble import QUANTILE_90
from planner.errors import InputError, shorten
from planner.estimate import estimate
from planner.files import to_json
from planner.graph import build_step_graph, model_flops_per_token
from planner.layout import describe_layout
from planner.measured_requests import inferred, to_request
from planner.measurements import Measurement, read_rows
from planner.nearby import KnownRun
from planner.op_cost import Numerics
from planner.plan import Plan
from planner.resolve import resolve
from planner.summaries import BASELINE_MFU, Judged, TimeSummary, choices, group_times, summarize_choices, summarize_times
from planner.units import GIB, MIB

__all__ = ["ErrorSummary", "RowResult", "Skipped", "ValidationReport", "memory_kind", "read_rows", "validate_rows"]

JOB_COLUMNS = ("source", "model", "accelerator", "num_devices", "precision", "global_batch_size", "seq_len", "framework")
"""What rows have in common that differ in their layout alone."""
STATES = ("weights", "gradients", "optimizer", "activations", "logits")
OUTSIDE_TORCH = ("context", "communication_buffers")
"""What the framework's allocator does not count."""
RESERVED_ONLY = ("allocator_slack",)


@dataclass(frozen=True)
class Skipped:
    """A row that could not be expressed, and why."""

    id: str
    reason: str


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
    """Hardware FLOPs at `BASELINE_MFU` of peak."""
    job_key: str
    """The same for rows that differ in their layout alone."""
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
        return Judged(predicted_s, self.measured_step_s, low, high, self.baseline_step_s, self.job_key, self.source)


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
    def choosing(self) -> dict[str, dict[str, Any]]:
        """Whether the layout predicted fastest is the fastest, by source."""
        return summarize_choices(choices(row.judged for row in self.per_row if row.judged is not None))

    def times_by(self, key: Callable[[RowResult], str]) -> dict[str, TimeSummary]:
        """Errors of the step time by some key of the rows."""
        return group_times((key(row), row.judged) for row in self.per_row if row.judged is not None)

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
                "rows": len(rows) + lost, "skipped": lost, "throughput": asdict(_time_summary(rows)), "memory": asdict(_memory_summary(rows)),
            }  # fmt: skip
        return found

    def to_dict(self) -> dict[str, Any]:
        """The object that `validate --json` prints."""
        return {
            "rows": len(self.per_row) + len(self.skipped),
            "skipped": [asdict(s) for s in self.skipped],
            "throughput": asdict(self.throughput),
            "memory": asdict(self.memory),
            "memory_by_kind": {kind: asdict(found) for kind, found in self.memory_by_kind.items()},
            "num_left_out_rows": self.num_left_out,
            "by_source": self.by_source(),
            **{f"by_{name}": {group: asdict(found) for group, found in self.times_by(key).items()} for name, key in TIME_GROUPS.items()},
            "choosing": self.choosing,
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


def _band(value: float, edges: Sequence[tuple[float, str]]) -> str:
    return next(name for edge, name in edges if value <= edge)


_DEVICES = ((1.0, "1"), (8.0, "2-8"), (64.0, "9-64"), (512.0, "65-512"), (math.inf, "over 512"))
_PARAMS = ((1e9, "up to 1B"), (1e10, "1B-10B"), (1e11, "10B-100B"), (math.inf, "over 100B"))
TIME_GROUPS: dict[str, Callable[[RowResult], str]] = {
    "accelerator": lambda row: row.accelerator,
    "stack": lambda row: row.stack,
    "precision": lambda row: row.precision,
    "devices": lambda row: _band(row.num_devices, _DEVICES),
    "params": lambda row: _band(row.num_params, _PARAMS),
}
"""By what errors of step times are grouped, beside their source."""


def _memory_summary(rows: Iterable[RowResult]) -> ErrorSummary:
    found: list[tuple[float, bool | None]] = []
    for row in rows:
        if row.memory_error_fraction is None or row.measured_memory_bytes is None or row.fitted == "coefficients":
            continue
        is_inside = row.low_memory_bytes <= row.measured_memory_bytes <= row.high_memory_bytes
        found.append((row.memory_error_fraction, None if row.fitted == "interval" else is_inside))
    return _summary(found)


def measured_step_s(row: Measurement, request: dict[str, Any], peak_flops_per_s: float) -> float | None:
    """Seconds per step of a row: as printed, or from tokens/s, or from FLOP/s or MFU where their definition is known.

    Formula: tokens per step / (devices * tokens/s/device); tokens/s/device = FLOP/s/device / FLOPs per token. The FLOPs per token are
    eq. 3 of arXiv:2104.04473, 96 B s l h^2 (1 + s/6h + V/16lh), or model FLOPs with full or causal-half attention.
    """
    if row.number("measured_step_s"):
        return row.number("measured_step_s")
    workload = request["workload"]
    tokens = workload["global_batch_size"] * workload["seq_len"] / request["cluster"]["num_devices"]
    rate = row.number("measured_tokens_per_s_per_device") or row.number("tokens_per_s_per_device_from_flops")
    if rate is None:
        flops_per_s = (row.number("measured_tflops_per_device") or 0.0) * 1e12 or (row.number("measured_mfu") or 0.0) * peak_flops_per_s
        per_token = _published_flops_per_token(row, request)
        rate = flops_per_s / per_token if per_token else None
    return tokens / rate if rate else None


def _published_flops_per_token(row: Measurement, request: dict[str, Any]) -> float | None:
    definition, seq_len = row.text("flops_definition"), request["workload"]["seq_len"]
    if "96bslh" in definition:
        h, layers, vocab = (float(row.count(name)) for name in ("hidden_size", "num_layers", "vocab"))
        per_token: float = 96.0 * layers * h**2 * (1 + seq_len / (6 * h) + vocab / (16 * layers * h))
        return per_token
    if not definition.startswith("model"):
        return None
    flops = model_flops_per_token(load_model(request["model"]), seq_len, Numerics())
    convention = "causal" if "causal" in definition else "full" if "attn full" in definition else ""
    return flops.get(convention)


def memory_kind(definition: str) -> str:
    """What a published peak counts, from its `mem_definition`.

    `states`: a breakdown into weights, gradients, optimizer states and activations. `allocated`: tensors that the framework held at once
    (torch.cuda.max_memory_allocated). `reserved`: what its allocator took for them; so nanotron's chart is read, which prints one of the
    two and lies about a tenth above what is allocated. `device`: all that nvidia-smi sees of the device, the
    runtime's and the communication library's memory too; also where nothing is said.

    Example:
        >>> memory_kind("nvidia-smi, GB as printed"), memory_kind("torch max allocated GiB")
        ('device', 'allocated')
    """
    definition = definition.lower()
    for kind, word in (("device", "nvidia-smi"), ("states", "breakdown"), ("reserved", "reserved"), ("reserved", "nanotron")):
        if word in definition:
            return kind
    return "allocated" if any(word in definition for word in ("torch", "allocated", "peak")) else "device"


def predicted_memory_bytes(plan: Plan, definition: str) -> float:
    """Peak bytes per device in the sense of a `mem_definition`; of the last stage where that is what its words are about."""
    kind, stages = memory_kind(definition), plan.memory.stages
    stage = stages[-1] if "last rank" in definition.lower() else stages[plan.memory.peak_stage]
    parts = stage.breakdown_bytes
    if kind == "states":
        return sum(parts[name] for name in STATES)
    outside = {"allocated": (*OUTSIDE_TORCH, *RESERVED_ONLY), "reserved": OUTSIDE_TORCH, "device": ()}[kind]
    return stage.total_bytes - sum(parts[name] for name in outside)


def _memory_unit_bytes(definition: str) -> float:
    """GiB, but for gigabytes read off nvidia-smi, which prints MiB: thousands of them. (BigScience saw 80 GB on devices of 81,251 MiB.)."""
    return 1000 * MIB if "nvidia-smi" in definition and "gb" in definition.replace("gib", "") else GIB


def _result(row: Measurement) -> RowResult:
    """One row, predicted.

    Raises:
        InputError: it cannot be expressed.
    """
    request = to_request(row)
    published_gib = row.number("measured_peak_mem_gib")
    plan = estimate(request)
    time, layout = plan.time.step_s, plan.layout
    measured = measured_step_s(row, request, plan.time.peak_flops_per_s)
    left_out = None if measured is None else _known_run(plan, measured)
    if measured is None and published_gib is None:
        raise InputError.single("measured_step_s", None, "neither time nor memory was published in known terms", "leave the row out")
    memory = predicted_memory_bytes(plan, row.text("mem_definition"))
    spread = memory / plan.memory.peak_bytes.value
    found = None if published_gib is None else published_gib * _memory_unit_bytes(row.text("mem_definition"))
    workload = request["workload"]
    return RowResult(
        id=row.id,
        source=row.values.get("source", ""),
        model=row.values.get("model", ""),
        accelerator=request["cluster"]["accelerator"],
        num_devices=layout.num_devices,
        stack=request["stack"],
        layout=describe_layout(layout),
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
        job_key=to_json([row.text(name) for name in JOB_COLUMNS]),
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
    graph = build_step_graph(
        job.model, job.workload, plan.layout, job.numerics, job.precision, seq_len=job.seq_len, global_batch_size=job.global_batch_size
    )
    return job.nearby.same(graph, job.cluster, measured_step_s, job.software_year)


def _baseline_step_s(plan: Plan) -> float:
    """Seconds of a step at a constant share of peak, every executed FLOP counted, attention over all pairs."""
    tokens = plan.time.tokens_per_s * plan.time.step_s.value
    return plan.flops.counted_per_token * tokens / (plan.layout.num_devices * plan.time.peak_flops_per_s * BASELINE_MFU)


def validate_rows(rows: Iterable[Measurement], on_row: Callable[[int], None] | None = None) -> ValidationReport:
    """Predicts every row that can be expressed, and compares.

    Args:
        on_row: told how many rows are done.

    A row is skipped only when its configuration was not published in full or cannot be expressed, never for being far off.
    """
    results, skipped, sources = [], [], {}
    for count, row in enumerate(rows):
        if on_row is not None:
            on_row(count)
        sources[row.id] = row.values.get("source", "")
        try:
            results.append(_result(row))
        except InputError as error:
            skipped.append(Skipped(row.id, "; ".join(f"{p.key} = {shorten(p.value, 60)}: {p.rule}" for p in error.problems)))
    return ValidationReport(tuple(results), tuple(skipped), sources)
