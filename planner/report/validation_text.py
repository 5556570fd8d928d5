"""The page docs/validation.md, and what `validate` shows in a terminal: summaries of step time and memory, then every row with its error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from planner.ranking import LEAST_LAYOUTS
from planner.summaries import BASELINE_MFU, TimeSummary
from planner.units import GIB
from planner.validation import RowResult, ValidationReport

__all__ = ["render_markdown"]

KINDS = {
    "allocated": "tensors held at once (torch.cuda.max_memory_allocated)",
    "reserved": "what the allocator took for them",
    "device": "all that nvidia-smi sees, with runtime and communication library",
    "states": "weights, gradients, optimizer states and activations of a published breakdown",
}
MARKS = {"coefficients": "fitted", "interval": "interval"}
MOST_NOTES = 4
MOST_IDS = 3
BASELINE = f"{100 * BASELINE_MFU:.0f}% of peak"
BETTER = "(better) "
TIME_COLUMNS = ("rows", "median", "90th percentile", "bias", "interval holds", f"{BASELINE}: median", "its 90th percentile")


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


def _aligned(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table whose columns line up in a terminal too: the first to the left, numbers to the right."""
    cells = [list(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (cell.rjust(widths[i]) if i else cell.ljust(widths[i]) for i, cell in enumerate(row))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ":" if i else "-" * (width + 2) for i, width in enumerate(widths)) + "|"
    return [line(cells[0]), rule, *map(line, cells[1:])]


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
    return _aligned(header, ((source, str(n["rows"]), str(n["skipped"]), *_cells(n[quantity])) for source, n in found))


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


def _summary(report: ValidationReport) -> list[str]:
    header = ("", "rows", "median error", "90th percentile", "bias", "80% interval holds")
    rows: list[tuple[str, ...]] = []

    def add(what: str, count: int, numbers: Mapping[str, float | None], prefix: str = "") -> None:
        median, tail, bias = (numbers[prefix + name] for name in ("median_abs_error_fraction", "p90_abs_error_fraction", "median_error_fraction"))
        held = None if prefix else numbers["interval_coverage_fraction"]
        rows.append((what, str(count), _percent(median), _percent(tail), _signed(bias), _percent(held)))

    if report.throughput.num_rows:
        alike, count = report.sources_alike, report.throughput.num_rows
        for numbers, of in ((report.throughput.to_dict(), ""), (alike, f", middle one of {alike['num_groups']} sources")):
            if not of or len(report.time_groups["source"]) > 1:
                add(f"step time, planner{of}", count, numbers)
                add(f"step time, {BASELINE}{of}", count, numbers, "baseline_")
    if report.memory.num_rows:
        add("peak memory, planner", report.memory.num_rows, {**vars(report.memory), "median_error_fraction": None})
    return [*_aligned(header, rows), ""] if rows else []


def _time_cells(found: TimeSummary) -> tuple[str, ...]:
    own = (_percent(found.median_abs_error_fraction), _percent(found.p90_abs_error_fraction), _signed(found.median_error_fraction))
    naive = (
        (BETTER if found.loses_to_baseline else "") + _percent(found.baseline_median_abs_error_fraction),
        (BETTER if found.loses_tail_to_baseline else "") + _percent(found.baseline_p90_abs_error_fraction),
    )
    return (str(found.num_rows), *own, _percent(found.interval_coverage_fraction), *naive)


def _group_tables(report: ValidationReport) -> list[str]:
    lines: list[str] = []
    for name, groups in report.time_groups.items():
        if len(groups) > 1:
            lines += [f"By {name}:", "", *_aligned((name, *TIME_COLUMNS), ((group, *_time_cells(found)) for group, found in groups.items())), ""]
    return lines


def _choosing(report: ValidationReport) -> list[str]:
    if not report.choosing:
        return []
    header = ("source", "groups", "layouts", "mean regret", "largest regret", "mean rank correlation")
    cells = (
        (name, str(c.num_groups), str(c.num_layouts), _percent(c.mean_regret_fraction), _percent(c.max_regret_fraction), f"{c.mean_spearman:.2f}")
        for name, c in report.choosing.items()
    )
    return [
        "## Choosing",
        "",
        f"Groups of runs of one source that differ in layout and recompute alone, at least {LEAST_LAYOUTS} layouts in each. Regret: measured time of",
        "the layout predicted fastest over the best measured, less 1. Rank correlation (Spearman): of predicted and measured times.",
        "",
        *_aligned(header, cells),
        "",
    ]


def _time_section(report: ValidationReport) -> list[str]:
    time = report.throughput
    left_out = (
        f"{report.num_left_out} of the rows are among those that the stacks are fitted to: each of these is judged by a fit, and by nearby runs,"
        " that saw neither it nor any row of its model, accelerator, number of devices and precision."
        if report.num_left_out
        else "No row was used to fit a coefficient."
    )
    rates = f"{_percent(time.throughput_median_abs_error_fraction)} and {_percent(time.throughput_p90_abs_error_fraction)}"
    held, width = _percent(time.interval_coverage_fraction), _percent(time.median_interval_width_fraction)
    return [
        "## Step time",
        "",
        (
            f"Median error {_percent(time.median_abs_error_fraction)}, 90th percentile {_percent(time.p90_abs_error_fraction)}, interval holds for"
            f" {held} of {time.num_rows} rows (its median width {width}). Errors are of the step time; those of tokens per second,"
            f" measured step / predicted step - 1, are {rates}. {left_out}"
        ),
        "",
        f"Beside it what {BASELINE} would have said: step time = hardware FLOPs / (devices * dense peak at the run's precision * {BASELINE_MFU});",
        "hardware FLOPs are 6 per matmul parameter and token, attention over all pairs, and the forward pass again as far as it is recomputed.",
        f"{BETTER.strip()} marks where that has the smaller error.",
        "",
        *_group_tables(report),
    ]


def _memory_section(report: ValidationReport) -> list[str]:
    header = ("kind", "judged", "median", "90th percentile", "interval holds")
    return [
        "## Memory",
        "",
        "Peak per device, against the number of the plan that counts the same:",
        "",
        *(f"- {kind}: {KINDS[kind]}" for kind in report.memory_by_kind),
        "",
        "Rows marked `fitted` gave a stack its coefficients and judge nothing; rows marked `interval` gave it the width of its interval, and judge",
        "the error but not how often the interval holds.",
        "",
        *_aligned(header, ((kind, *_cells(vars(found))) for kind, found in report.memory_by_kind.items())),
        "",
        *_source_table(report, "memory"),
        "",
    ]


def _skipped(report: ValidationReport) -> list[str]:
    def ids(names: Sequence[str]) -> str:
        return ", ".join(names[:MOST_IDS]) + (f", {len(names) - MOST_IDS} more" if len(names) > MOST_IDS else "")

    told = "Rows whose configuration was not published in full or cannot be expressed; every one with its own reason: `planner validate --json`."
    cells = ((str(len(names)), reason, ids(names)) for reason, names in report.skipped_reasons.items())
    return ["## Skipped", "", told, "", *_table(("rows", "reason", "which"), cells), ""] if report.skipped else []


def _time_rows(report: ValidationReport) -> list[str]:
    """Those that judge the plan as shipped; the others' errors would be those of a fit to themselves."""
    rows = [row for row in report.per_row if row.measured_step_s is not None and not row.is_left_out]
    told = ["Rows that no stack was fitted to; `planner validate --json` has all.", ""] if report.num_left_out else []
    return ["## Step time, row by row", "", *told, *_sections(rows, _time_table)] if rows else []


def _memory_rows(report: ValidationReport) -> list[str]:
    rows = [row for row in report.per_row if row.measured_memory_bytes is not None]
    return ["## Memory, row by row", "", *_sections(rows, _memory_table)] if rows else []


def render_markdown(report: ValidationReport, files: Sequence[str]) -> str:
    """The page: a summary, groups, whether it chooses well, what was skipped, every row with its error, and how to make the page again.

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
        *_summary(report),
        *(_time_section(report) if report.throughput.num_rows else []),
        *_choosing(report),
        *(_memory_section(report) if report.memory_by_kind else []),
        *_skipped(report),
        *_time_rows(report),
        *_memory_rows(report),
    ]
    return "\n".join(lines).rstrip() + "\n"
