"""An explanation as plain text: value, formula, the same with numbers, inputs with their sources, parts, what to ask next."""

from __future__ import annotations

import re

from planner.explain import Explanation, Input
from planner.explanations._base import unit_of
from planner.report._numbers import significant, with_unit, wrapped

__all__ = ["render_explanation"]

MIN_WIDTH = 60
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def render_explanation(e: Explanation, width: int = 80) -> str:
    """The whole explanation, `width` columns wide (60 or more); no colour, no control characters."""
    width = max(width, MIN_WIDTH)
    if e.value is None:
        return "\n".join(_overview(e, width)) + "\n"
    lines = [f"{e.key} = {with_unit(e.value, e.unit)}", ""]
    lines += wrapped(e.formula, width, "formula  ", " " * 9)
    if e.substituted != e.formula:
        lines += wrapped(_short(e.substituted), width, "       = ", " " * 9)
    lines += wrapped(e.source, width, "source   ", " " * 9)
    if e.terms:
        lines += ["", *_terms(e, width)]
    if e.inputs and not (e.terms and set(e.formula.split(" + ")) <= {i.name for i in e.inputs}):  # the parts of a plain sum are listed once
        lines += ["", *_inputs(e.inputs, width)]
    if e.children:
        lines += ["", "Explain next", *(f"  {child}" for child in e.children)]
    return "\n".join(lines) + "\n"


def _short(substituted: str) -> str:
    """Three significant digits for each number."""
    return _NUMBER.sub(lambda match: significant(float(match[0])).replace(",", ""), substituted)


def _overview(e: Explanation, width: int) -> list[str]:
    name_width = max(len(i.name) for i in e.inputs)
    lines = ["Numbers of this plan", ""]
    lines += [f"  {i.name:<{name_width}}  {with_unit(float(i.value), i.source)}" for i in e.inputs if isinstance(i.value, (int, float))]
    return [*lines, "", *wrapped(e.source, width)]


def _terms(e: Explanation, width: int) -> list[str]:
    """Largest first; value and share in full, a bar in what is left."""
    rows = [(t.name, with_unit(t.value, e.unit), f"{t.share_fraction:.1%}", t.share_fraction) for t in sorted(e.terms, key=lambda t: -abs(t.value))]
    total = ("total", with_unit(e.value or 0.0, e.unit), "100.0%", 0.0)
    name_width, value_width, share_width = (max(len(str(row[i])) for row in (*rows, total)) for i in range(3))
    bar_width = max(width - name_width - value_width - share_width - 8, 0)
    listed = []
    for name, value, share, fraction in (*rows, total):
        bar = "#" * round(min(max(fraction, 0.0), 1.0) * bar_width)
        listed.append(f"  {name:<{name_width}}  {value:>{value_width}}  {share:>{share_width}}  {bar}".rstrip())
    return ["Adds up from", *listed]


def _inputs(inputs: tuple[Input, ...] | list[Input], width: int) -> list[str]:
    """Name and value in full; the source beside them, or below where the terminal is narrow."""
    shown = [(i.name, with_unit(i.value, unit_of(i.name)) if isinstance(i.value, (int, float)) else str(i.value), i.source) for i in inputs]
    name_width, value_width = (max(len(row[k]) for row in shown) for k in (0, 1))
    indent = name_width + value_width + 6
    lines = ["Values put in"]
    for name, value, source in shown:
        first = f"  {name:<{name_width}}  {value:>{value_width}}  "
        if width - indent >= width // 3:
            lines += wrapped(source, width, first, " " * indent)
        else:
            lines += [first.rstrip(), *wrapped(source, width, " " * 6, " " * 6)]
    return lines
