"""A comparison as text for a terminal, and as one HTML page with plots that needs no network."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any

from planner.errors import MissingPieceError
from planner.report._numbers import with_unit
from reftrain.compare import Comparison, Metric

__all__ = ["render_page", "render_text"]

PREDICTED, MEASURED = "#0072b2", "#d55e00"
"""Blue and vermilion of Okabe and Ito: told apart by all."""
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;width:100%}th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}svg{max-width:100%;height:auto}.out{color:#d55e00;font-weight:600}"""


def _cells(metric: Metric, tolerance: float | None) -> list[str]:
    """One row: name, predicted, measured, error, interval, verdict."""
    measured, error = with_unit(metric.measured, metric.unit), metric.error_fraction
    if metric.predicted is None or error is None:
        return [metric.name, metric.note, measured, "", "", "not judged"]
    interval = "" if metric.low is None or metric.high is None else f"{with_unit(metric.low, metric.unit)} to {with_unit(metric.high, metric.unit)}"
    verdict = "inside" if metric.is_inside(tolerance) else "outside"
    return [
        metric.name,
        with_unit(metric.predicted, metric.unit),
        measured,
        f"{error:+.1%}",
        interval,
        verdict + ("" if metric.gates else " (no gate)"),
    ]


HEADER = ["", "predicted", "measured", "error", "80% interval", "verdict"]


def _table(comparison: Comparison) -> list[list[str]]:
    return [HEADER, *(_cells(metric, comparison.tolerance_fraction) for metric in comparison.metrics)]


def _phase_table(comparison: Comparison) -> list[list[str]]:
    rows = [["one step", "predicted", "measured"]]
    for name, predicted, measured in comparison.phases:
        rows.append([name, with_unit(predicted, "s"), "not measured" if measured is None else with_unit(measured, "s")])
    return rows


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows
    ]


def render_text(comparison: Comparison) -> str:
    """Two tables and a verdict."""
    lines = [f"{comparison.run}: measured on {comparison.device}, predicted for {comparison.accelerator}", ""]
    lines += [*_aligned(_table(comparison)), "", *_aligned(_phase_table(comparison)), ""]
    lines += [f"note: {note}" for note in comparison.notes]
    limit = "the interval" if comparison.tolerance_fraction is None else f"{comparison.tolerance_fraction:.0%}"
    lines.append(f"within {limit}" if comparison.is_within else f"outside {limit}")
    return "\n".join(lines) + "\n"


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td{' class=out' if cell.startswith('outside') else ''}>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows[1:]
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def render_page(comparisons: Sequence[Comparison], title: str = "Measured against predicted") -> str:
    """One self-contained page for one run or several.

    Raises:
        MissingPieceError: matplotlib is not installed.
    """
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>{html.escape(title)}</title>"]
    parts.append(f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>")
    for comparison in comparisons:
        parts.append(f"<h2>{html.escape(comparison.run)}</h2><p>Measured on {html.escape(comparison.device)}, ")
        parts.append(f"predicted for {html.escape(comparison.accelerator)}. {'Within' if comparison.is_within else 'Outside'} tolerance.</p>")
        parts += [_html_table(_table(comparison)), _plots(comparison), _html_table(_phase_table(comparison))]
        parts += [f"<p>{html.escape(note)}</p>" for note in comparison.notes]
    return "".join(parts) + "</html>\n"


def _plots(comparison: Comparison) -> str:
    """Loss by step, step times with the predicted interval, and where a step's time goes, as one SVG."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPieceError("the page of plots needs matplotlib, which is not installed: pip install 'llm-planner[reftrain]'") from None
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    loss, steps, phases = figure.subplots(1, 3)
    _plot_loss(loss, comparison)
    _plot_steps(steps, comparison)
    _plot_phases(phases, comparison)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue()
    return text[text.index("<svg") :]


def _plot_loss(axes: Any, comparison: Comparison) -> None:
    axes.plot([step for step, _ in comparison.losses], [loss for _, loss in comparison.losses], color=MEASURED, label="measured")
    axes.set(title="Training loss", xlabel="step", ylabel="nats per token")


def _plot_steps(axes: Any, comparison: Comparison) -> None:
    axes.plot([1e3 * s for s in comparison.step_s], ".", color=MEASURED, markersize=3, label="measured")
    metric = next((metric for metric in comparison.metrics if metric.name == "step time"), None)
    if metric is not None and metric.predicted is not None and metric.low is not None and metric.high is not None:
        axes.axhline(1e3 * metric.predicted, color=PREDICTED, label="predicted")
        axes.axhspan(1e3 * metric.low, 1e3 * metric.high, color=PREDICTED, alpha=0.15, label="80% interval")
    axes.set(title="Step time", xlabel="timed step", ylabel="ms", ylim=(0, None))
    axes.legend(fontsize=8)


def _plot_phases(axes: Any, comparison: Comparison) -> None:
    shown = [phase for phase in comparison.phases if phase[2] is not None or phase[1] > 0]
    places = range(len(shown))
    axes.barh([p + 0.2 for p in places], [1e3 * predicted for _, predicted, _ in shown], 0.4, color=PREDICTED, label="predicted")
    axes.barh([p - 0.2 for p in places], [1e3 * (measured or 0.0) for _, _, measured in shown], 0.4, color=MEASURED, label="measured")
    axes.set_yticks(list(places), [name for name, _, _ in shown])
    axes.invert_yaxis()
    axes.set(title="Where a step's time goes", xlabel="ms")
    axes.legend(fontsize=8)
