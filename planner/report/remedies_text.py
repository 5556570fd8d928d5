"""Changes that make a plan fit, as plain text."""

from __future__ import annotations

import textwrap

from planner.plan import Plan
from planner.remedies import Remedy
from planner.units import format_duration, format_gib

__all__ = ["render_remedies"]


def render_remedies(plan: Plan, remedies: list[Remedy], width: int) -> str:
    """One line per change: what it needs and how much longer or shorter the run gets."""
    if not remedies:
        return "Nothing tried fits: recompute, micro-batch, layout, and up to 64 times the devices.\n"
    lines = ["Fits with (each tried)"]
    for remedy in remedies:
        days, before = remedy.plan.time.train_s.value, plan.time.train_s.value
        text = f"  - {remedy.change}: {format_gib(remedy.plan.memory.peak_bytes.value)} GiB, {format_duration(days)} ({days / before - 1:+.0%} time)"
        lines.append(textwrap.fill(text, width, subsequent_indent="    ", break_on_hyphens=False))
    return "\n".join(lines) + "\n"
