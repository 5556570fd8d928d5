"""Tornados and tables as plain text."""

from __future__ import annotations

from planner.explanations._base import unit_of
from planner.report._numbers import significant, with_unit
from planner.sensitivity import End, Table, Tornado

__all__ = ["render_table", "render_tornado"]

BAR_WIDTH = 24
"""Characters on either side of the base."""


def _shown(value: float | None, key: str) -> str:
    if value is None:
        return "-"
    unit = unit_of(key)
    return with_unit(value, unit).split(" (")[0] if unit else significant(value)


def render_tornado(found: Tornado) -> str:
    """A bar for each input, largest first: `<` the way of its first value, `>` that of its second."""
    farthest = max((abs(end.value - found.base) for each in found.swings for end in (each.low, each.high) if end.value is not None), default=0.0)
    lines = [f"{found.result} {_shown(found.base, found.result)}; what one input does, the others as they are", ""]
    for each in found.swings:
        lines.append(f"{each.name}: {each.why}")
        for end, mark in ((each.low, "<"), (each.high, ">")):
            lines.append(f"  {_bar(end, found.base, farthest, mark)}  {_shown(end.value, found.result):>12}  {end.setting}{_notes(end)}")
    return "\n".join(lines) + "\n"


def _bar(end: End, base: float, farthest: float, mark: str) -> str:
    if end.value is None or not farthest:
        return " " * (2 * BAR_WIDTH + 1)
    length = round(BAR_WIDTH * abs(end.value - base) / farthest)
    left, right = ("", mark * length) if end.value >= base else (mark * length, "")
    return f"{left:>{BAR_WIDTH}}|{right:<{BAR_WIDTH}}"


def _notes(end: End) -> str:
    notes = [note for note in (end.note, "" if end.fits or end.value is None else "does not fit") if note]
    return f" ({'; '.join(notes)})" if notes else ""


def _mark(cell: End) -> str:
    if cell.value is None:
        return ""
    return ("" if cell.fits else "*") + ("'" if cell.note else "")


def render_table(found: Table) -> str:
    """Values of the first input down, of the second across; `*` where the plan does not fit, `-` where it is wrong input."""
    cells = [[_shown(cell.value, found.result) + _mark(cell) for cell in row] for row in found.cells]
    heads = [*found.columns[1]]
    first = [found.rows[0], *found.rows[1]]
    widths = [max(len(heads[i]), *(len(row[i]) for row in cells)) for i in range(len(heads))]
    side = max(map(len, first))
    lines = [f"{found.result}, {found.rows[0]} down, {found.columns[0]} across", ""]
    lines.append("  ".join([" " * side, *(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True))]))
    for name, row in zip(found.rows[1], cells, strict=True):
        lines.append("  ".join([f"{name:<{side}}", *(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))]))
    wrong = sorted({cell.note for row in found.cells for cell in row if cell.value is None})
    if any("*" in cell for row in cells for cell in row):
        lines += ["", "* does not fit"]
    if any("'" in cell for row in cells for cell in row):
        lines += ["' with another layout: the base's is not legal there"]
    return "\n".join([*lines, *(f"- {note}" for note in wrong)]) + "\n"
