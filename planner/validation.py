"""Predictions against a table of measurements: errors of step time and memory, and how often the interval holds.

In: rows of `planner.measurements`. Out: a `ValidationReport`, as JSON (`validate --json`) or as the page docs/validation.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from planner.architectures import load_model
from planner.errors import InputError, shorten
from planner.estimate import estimate
from planner.graph import model_flops_per_token
from planner.layout import describe_layout
from planner.measurements import Measurement, read_rows, to_request
from planner.op_cost import Numerics
from planner.plan import Plan
from planner.units import GIB, MIB

__all__ = ["ErrorSummary", "RowResult", "Skipped", "ValidationReport", "read_rows", "render_markdown", "validate_rows"]

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
    predicted_memory_bytes: float
    measured_memory_bytes: float | None
    memory_error_fraction: float | None
    low_memory_bytes: float
    high_memory_bytes: float


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
    def throughput(self) -> ErrorSummary:
        """Errors of the step time."""
        return _time_summary(self.per_row)

    @property
    def memory(self) -> ErrorSummary:
        """Errors of the peak memory."""
        return _memory_summary(self.per_row)

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
            "by_source": self.by_source(),
            "per_row": [asdict(row) for row in self.per_row],
        }


def _summary(triples: Sequence[tuple[float, bool]]) -> ErrorSummary:
    if not triples:
        return ErrorSummary(0, None, None, None)
    errors = np.abs([error for error, _ in triples])
    covered = float(np.mean([inside for _, inside in triples]))
    return ErrorSummary(len(triples), float(np.median(errors)), float(np.quantile(errors, 0.9)), covered)


def _time_summary(rows: Iterable[RowResult]) -> ErrorSummary:
    return _summary(
        [
            (row.error_fraction, row.low_step_s <= row.measured_step_s <= row.high_step_s)
            for row in rows
            if row.error_fraction is not None and row.measured_step_s is not None
        ]
    )


def _memory_summary(rows: Iterable[RowResult]) -> ErrorSummary:
    return _summary(
        [
            (row.memory_error_fraction, row.low_memory_bytes <= row.measured_memory_bytes <= row.high_memory_bytes)
            for row in rows
            if row.memory_error_fraction is not None and row.measured_memory_bytes is not None
        ]
    )


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


def predicted_memory_bytes(plan: Plan, definition: str) -> float:
    """Peak bytes per device in the sense of a `mem_definition`: states and activations only, the framework's allocator, or all."""
    definition = definition.lower()
    stage = plan.memory.stages[-1] if "last rank" in definition else plan.memory.stages[plan.memory.peak_stage]
    parts = stage.breakdown_bytes
    if "breakdown" in definition:
        return sum(parts[name] for name in STATES)
    if "torch" in definition or "allocated" in definition or "peak" in definition:
        return stage.total_bytes - sum(parts[name] for name in (*OUTSIDE_TORCH, *RESERVED_ONLY))
    return stage.total_bytes


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
        predicted_memory_bytes=memory,
        measured_memory_bytes=found,
        memory_error_fraction=None if found is None else memory / found - 1,
        low_memory_bytes=plan.memory.peak_bytes.low * spread,
        high_memory_bytes=plan.memory.peak_bytes.high * spread,
    )


def validate_rows(rows: Iterable[Measurement]) -> ValidationReport:
    """Predicts every row that can be expressed, and compares.

    A row is skipped only when its configuration was not published in full or cannot be expressed, never for being far off.
    """
    results, skipped, sources = [], [], {}
    for row in rows:
        sources[row.id] = row.values.get("source", "")
        try:
            results.append(_result(row))
        except InputError as error:
            skipped.append(Skipped(row.id, "; ".join(f"{p.key} = {shorten(p.value, 60)}: {p.rule}" for p in error.problems)))
    return ValidationReport(tuple(results), tuple(skipped), sources)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f}%"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g} s"


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value / GIB:.1f} GiB"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def _row_table(rows: Sequence[RowResult]) -> list[str]:
    has_memory = any(row.measured_memory_bytes is not None for row in rows)
    header = ["row", "model", "devices", "layout", "batch x sequence", "measured", "predicted", "error"]
    cells = []
    for row in rows:
        line = [
            row.id, row.model, f"{row.num_devices} {row.accelerator}", row.layout, row.workload, _seconds(row.measured_step_s),
            _seconds(row.predicted_step_s), _signed(row.error_fraction),
        ]  # fmt: skip
        if has_memory:
            line += [_gib(row.measured_memory_bytes), _gib(row.predicted_memory_bytes), _signed(row.memory_error_fraction)]
        cells.append(line)
    return _table(header + (["memory measured", "predicted", "error"] if has_memory else []), cells)


def render_markdown(report: ValidationReport) -> str:
    """The page docs/validation.md: the summary, every row with its error, what was assumed, and how to make the page again."""
    time, memory = report.throughput, report.memory
    num_rows = len(report.per_row) + len(report.skipped)
    summary = (
        f"{num_rows} rows, {len(report.skipped)} skipped. Step time: median error {_percent(time.median_abs_error_fraction)},"
        f" 90th percentile {_percent(time.p90_abs_error_fraction)}, interval holds for {_percent(time.interval_coverage_fraction)}"
        f" of {time.num_rows} rows."
    )
    lines = [
        "# Validation",
        "",
        "Step time per optimizer step, predicted against measured. Error is predicted / measured - 1; the interval is the 80% interval that a plan",
        "states. No row of data/measurements/anchors.csv was used to fit a coefficient. Made by",
        "",
        "```",
        "python -m planner validate --measurements data/measurements/anchors.csv > docs/validation.md",
        "```",
        "",
        summary,
    ]
    if memory.num_rows:
        lines.append(
            f"Memory: median error {_percent(memory.median_abs_error_fraction)}, 90th percentile {_percent(memory.p90_abs_error_fraction)},"
            f" interval holds for {_percent(memory.interval_coverage_fraction)} of {memory.num_rows} rows."
        )
    lines += ["", "## By source", ""]
    lines += _table(
        ("source", "rows", "skipped", "median", "90th percentile", "interval holds"),
        (
            (
                source, str(found["rows"]), str(found["skipped"]), _percent(found["throughput"]["median_abs_error_fraction"]),
                _percent(found["throughput"]["p90_abs_error_fraction"]), _percent(found["throughput"]["interval_coverage_fraction"]),
            )
            for source, found in report.by_source().items()
        ),
    )  # fmt: skip
    lines += ["", "## Every row", ""]
    for source in dict.fromkeys(row.source for row in report.per_row):
        rows = [row for row in report.per_row if row.source == source]
        lines += [f"### {source}", "", f"{rows[0].source_detail}. Stack: {', '.join(dict.fromkeys(row.stack for row in rows))}.", ""]
        lines += [f"- {note}" for note in dict.fromkeys(row.notes for row in rows if row.notes)]
        lines += ["", *_row_table(rows), ""]
    if report.skipped:
        lines += ["## Skipped", "", *(f"- {s.id}: {s.reason}" for s in report.skipped), ""]
    return "\n".join(lines).rstrip() + "\n"
