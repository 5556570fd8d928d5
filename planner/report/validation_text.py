"""The page docs/validation.md: summaries of step time and memory, then every row with its error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from planner.summaries import BASELINE_MFU, TimeSummary
from planner.units import GIB
from planner.validation import TIME_GROUPS, RowResult, ValidationReport

__all__ = ["render_markdown"]

KINDS = {
    "allocated": "tensors held at once (torch.cuda.max_memory_allocated)",
    "reserved": "what the allocator took for them",
    "device": "all that nvidia-smi sees, with runtime and communication library",
    "states": "weights, gradients, optimizer states and activations of a published breakdown",
}
MARKS = {"coefficients": "fitted", "interval": "interval"}
MOST_NOTES = 4
MOST_SKIPPED = 40


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


def _place(row: RowResult) -> tuple[str, ...]:
    return (row.id, row.model, f"{row.num_devices} {row.accelerator}", row.layout, row.workload)


def _time_table(rows: Sequence[RowResult]) -> list[str]:
    header = ("row", "model", "devices", "layout", "batch x sequence", "measured", "predicted", "error")
    cells = ((*_place(r), _seconds(r.measured_step_s), _seconds(r.predicted_step_s), _signed(r.error_fraction)) for r in rows)
    return _table(header, cells)


def _memory_table(rows: Sequence[RowResult]) -> list[str]:
    header = ("row", "model", "devices", "layout", "batch x sequence", "measured", "predicted", "used for", "error")

    def cells(row: RowResult) -> tuple[str, ...]:
        both = (_gib(row.measured_memory_bytes), _gib(row.predicted_memory_bytes))
        return (*_place(row), *both, MARKS.get(row.fitted, "judging"), _signed(row.memory_error_fraction))

    return _table(header, map(cells, rows))


def _cells(summary: dict[str, Any]) -> tuple[str, ...]:
    names = ("median_abs_error_fraction", "p90_abs_error_fraction", "interval_coverage_fraction")
    return (str(summary["num_rows"]), *(_percent(summary[name]) for name in names))


def _source_table(report: ValidationReport, quantity: str) -> list[str]:
    header = ("source", "rows", "skipped", "judged", "median", "90th percentile", "interval holds")
    found = ((source, numbers) for source, numbers in report.by_source().items() if numbers[quantity]["num_rows"])
    return _table(header, ((source, str(n["rows"]), str(n["skipped"]), *_cells(n[quantity])) for source, n in found))


def _sections(rows: Sequence[RowResult], table: Callable[[Sequence[RowResult]], list[str]]) -> list[str]:
    lines: list[str] = []
    for source in dict.fromkeys(row.source for row in rows):
        found = [row for row in rows if row.source == source]
        details, stacks = dict.fromkeys(row.source_detail for row in found), ", ".join(dict.fromkeys(row.stack for row in found))
        lines += [f"### {source}", "", f"{next(iter(details))}{' and others' if len(details) > 1 else ''}. Stack: {stacks}.", ""]
        notes = dict.fromkeys(row.notes for row in found if row.notes)
        lines += [f"- {note}" for note in list(notes)[:MOST_NOTES]]
        lines += ["- more notes: in the table of measurements"] if len(notes) > MOST_NOTES else []
        lines += ["", *table(found), ""]
    return lines


def _time_cells(found: TimeSummary) -> tuple[str, ...]:
    numbers = (found.median_abs_error_fraction, found.p90_abs_error_fraction, found.interval_coverage_fraction)
    baseline = (found.baseline_median_abs_error_fraction, found.baseline_p90_abs_error_fraction)
    naive = _percent(baseline[0]) + (" **better**" if found.loses_to_baseline else "")
    own = (_percent(numbers[0]), _percent(numbers[1]), _signed(found.median_error_fraction), _percent(numbers[2]))
    return (str(found.num_rows), *own, naive, _percent(baseline[1]))


TIME_COLUMNS = ("rows", "median", "90th percentile", "bias", "interval holds", "45% of peak: median", "its 90th percentile")


def _group_tables(report: ValidationReport) -> list[str]:
    lines: list[str] = []
    for name, key in {"source": lambda row: row.source, **TIME_GROUPS}.items():
        groups = report.times_by(key)
        if len(groups) > 1:
            lines += [f"By {name}:", "", *_table((name, *TIME_COLUMNS), ((group, *_time_cells(found)) for group, found in groups.items())), ""]
    return lines


def _choosing(report: ValidationReport) -> list[str]:
    if not report.choosing:
        return []
    header = ("source", "groups", "mean regret", "largest regret", "mean rank correlation")
    cells = (
        (name, str(c["num_groups"]), _percent(c["mean_regret_fraction"]), _percent(c["max_regret_fraction"]), f"{c['mean_spearman']:.2f}")
        for name, c in report.choosing.items()
    )
    told = "Does it choose well? Rows that differ in their layout alone, at least four of them; regret is the measured time of the layout"
    return [told, "predicted fastest over the best measured, less 1.", "", *_table(header, cells), ""]


def _time_section(report: ValidationReport) -> list[str]:
    time = report.throughput
    rows = [row for row in report.per_row if row.measured_step_s is not None and not row.is_left_out]
    left_out = (
        f"{report.num_left_out} of the rows are among those that the stacks are fitted to: each of these is judged by a fit, and by nearby runs,"
        " that saw neither it nor any row of its model, accelerator, number of devices and precision."
        if report.num_left_out
        else "No row was used to fit a coefficient."
    )
    own = _percent(time.median_interval_width_fraction)
    return [
        "## Step time",
        "",
        (
            f"Median error {_percent(time.median_abs_error_fraction)}, 90th percentile {_percent(time.p90_abs_error_fraction)}, interval holds for"
            f" {_percent(time.interval_coverage_fraction)} of {time.num_rows} rows (its median width {own}). {left_out}"
        ),
        "",
        f"Beside it what a constant {100 * BASELINE_MFU:.0f}% of peak would have said, every executed FLOP counted.",
        "",
        *_group_tables(report),
        *_choosing(report),
        *(["Rows that no stack was fitted to; `planner validate --json` has all:", ""] if report.num_left_out else []),
        *_sections(rows, _time_table),
    ]


def _memory_section(report: ValidationReport) -> list[str]:
    rows = [row for row in report.per_row if row.measured_memory_bytes is not None]
    header = ("kind", "what it counts", "judged", "median", "90th percentile", "interval holds")
    return [
        "## Memory",
        "",
        "Peak per device, against the number of the plan that counts the same. Rows marked `fitted` gave a stack its coefficients and judge",
        "nothing; rows marked `interval` gave it the width of its interval, and judge the error but not how often the interval holds.",
        "",
        *_table(header, ((kind, KINDS[kind], *_cells(vars(found))) for kind, found in report.memory_by_kind.items())),
        "",
        *_source_table(report, "memory"),
        "",
        *_sections(rows, _memory_table),
    ]


def render_markdown(report: ValidationReport, files: Sequence[str]) -> str:
    """The page: the summary, every row with its error, and how to make the page again.

    Args:
        files: the tables of measurements, as the command names them.
    """
    options = " ".join(f"--measurements {name}" for name in files)
    lines = [
        "# Validation",
        "",
        "Predicted against measured: error is predicted / measured - 1; the interval is the 80% interval that a plan states. Made by",
        "",
        "```",
        f"python -m planner validate {options} > docs/validation.md",
        "```",
        "",
        f"{len(report.per_row) + len(report.skipped)} rows, {len(report.skipped)} skipped because their configuration was not published or cannot",
        "be expressed.",
        "",
    ]
    lines += _time_section(report) if report.throughput.num_rows else []
    lines += _memory_section(report) if any(row.measured_memory_bytes is not None for row in report.per_row) else []
    if report.skipped:
        reasons = Counter(s.reason for s in report.skipped)
        listed = (f"- {s.id}: {s.reason}" for s in report.skipped)
        counted = (f"- {count} x {reason}" for reason, count in reasons.most_common())
        lines += ["## Skipped", "", *(listed if len(report.skipped) <= MOST_SKIPPED else counted), ""]
    return "\n".join(lines).rstrip() + "\n"
