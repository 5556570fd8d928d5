"""A step's memory as a picture: for every stage its instants as stacked bars, by what they hold, under the line of what a device has."""

from __future__ import annotations

from html import escape

from planner.memory import MemoryBreakdown
from planner.peaks import Instant, MemoryTimeline, alike
from planner.units import GIB, format_gib

__all__ = ["draw_memory"]

COLOURS = dict(
    zip(
        MemoryBreakdown.PARTS,
        ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#88ccaa", "#ddaa33", "#aa3377", "#bbbbbb", "#997700", "#555555", "#dddddd"),
        strict=True,
    )
)
"""After Paul Tol's bright scheme, which the colour-blind can tell apart."""
ROW, LABEL, PLOT, TOP, LEGEND = 18, 150, 560, 56, 16
MOST_STAGES = 64


def draw_memory(timeline: MemoryTimeline) -> str:
    """A self-contained SVG; each segment tells its name and size when pointed at. Stages that are like the one before are not repeated."""
    shown = alike(timeline.stages, lambda stage: stage.instants)[:MOST_STAGES]
    largest = max([timeline.usable_bytes, *(stage.peak.total_bytes for _, stage in shown)]) * 1.05
    rows, y = [], float(TOP)
    for name, stage in shown:
        rows.append(f'<text x="8" y="{y + 12:.0f}" font-weight="bold">{name}, peak {format_gib(stage.peak.total_bytes)} GiB</text>')
        y += ROW
        for instant in stage.instants:
            rows.append(_row(instant, instant is stage.peak, y, largest))
            y += ROW
        y += ROW / 2
    limit = LABEL + PLOT * timeline.usable_bytes / largest
    height = y + LEGEND * (1 + (len(COLOURS) + 3) // 4)
    line = f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="{TOP - 6}" y2="{y:.0f}" stroke="#cc3311" stroke-width="1.5" stroke-dasharray="5 3"/>'
    head = f'<text x="8" y="20" font-size="14" font-weight="bold">{escape(timeline.title)}</text>'
    note = f'<text x="{limit - 4:.1f}" y="{TOP - 10}" text-anchor="end" fill="#cc3311">{format_gib(timeline.usable_bytes)} GiB can be used</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LABEL + PLOT + 90}" height="{height:.0f}" font-family="sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="white"/>{head}{note}{"".join(rows)}{line}{_legend(y)}</svg>\n'
    )


def _row(instant: Instant, is_peak: bool, y: float, largest: float) -> str:
    weight = ' font-weight="bold"' if is_peak else ""
    parts = [f'<text x="16" y="{y + 12:.0f}"{weight}><title>{escape(instant.when)}</title>{escape(instant.name)}</text>']
    x = float(LABEL)
    for name, num_bytes in instant.breakdown_bytes.items():
        width = PLOT * num_bytes / largest
        title = f"{name.replace('_', ' ')}: {num_bytes / GIB:.2f} GiB"
        parts.append(
            f'<rect x="{x:.2f}" y="{y + 2:.0f}" width="{width:.2f}" height="{ROW - 4}" fill="{COLOURS[name]}"><title>{escape(title)}</title></rect>'
        )
        x += width
    return "".join(parts) + f'<text x="{x + 4:.1f}" y="{y + 12:.0f}"{weight}>{format_gib(instant.total_bytes)}</text>'


def _legend(y: float) -> str:
    items = []
    for number, (name, colour) in enumerate(COLOURS.items()):
        x, at = 8 + (number % 4) * 195, y + 10 + LEGEND * (number // 4)
        items.append(f'<rect x="{x}" y="{at:.0f}" width="10" height="10" fill="{colour}"/>')
        items.append(f'<text x="{x + 14}" y="{at + 9:.0f}">{name.replace("_", " ")}</text>')
    return "".join(items)
