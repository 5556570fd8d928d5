"""A step's memory as plain text: stages over instants, then what is alive at a stage's peak, tensor by tensor."""

from __future__ import annotations

import textwrap

from planner.peaks import Instant, MemoryTimeline, alike
from planner.units import format_gib

__all__ = ["render_memory"]

MIN_WIDTH, BAR = 60, 24
LEAST_SHARE = 0.002
"""Of the peak: smaller tensors are summed up in one line."""


def render_memory(timeline: MemoryTimeline, stage: int | None = None, width: int = 80) -> str:
    """The whole report, `width` columns wide (60 or more); of one stage, or of the fullest."""
    width = max(width, MIN_WIDTH)
    fullest = max(timeline.stages, key=lambda each: each.peak.total_bytes)
    shown = timeline.stages[stage] if stage is not None else fullest
    lines = [f"{timeline.title}: bytes per device over a step, in GiB; {format_gib(timeline.usable_bytes)} can be used", ""]
    if len(timeline.stages) > 1:
        lines += [*_stages(timeline), ""]
    lines += [f"Stage {shown.stage}, in the order of a step"]
    lines += [_bar(instant, instant is shown.peak, timeline.usable_bytes) for instant in shown.instants]
    lines += ["", *textwrap.wrap(f"Alive at the peak, {shown.peak.when}", width), *_tensors(shown.peak, width)]
    return "\n".join(lines) + "\n"


def _stages(timeline: MemoryTimeline) -> list[str]:
    """One line for stages that hold the same at the same instant."""
    lines = []
    for name, stage in alike(timeline.stages, lambda stage: (format_gib(stage.peak.total_bytes), stage.peak.name)):
        total = stage.peak.total_bytes
        lines.append(f"  {name:<18} peak {format_gib(total):>8}  {_room(total, timeline.usable_bytes):<14} {stage.peak.name}")
    return lines


def _room(num_bytes: float, usable_bytes: float) -> str:
    left = usable_bytes - num_bytes
    return f"{format_gib(left)} free" if left >= 0 else f"{format_gib(-left)} too much"


def _bar(instant: Instant, is_peak: bool, usable_bytes: float) -> str:
    scale = min(instant.total_bytes / usable_bytes, 1.0)
    bar = "#" * round(BAR * scale) + "." * (BAR - round(BAR * scale))
    over = " too much" if instant.total_bytes > usable_bytes else ""
    return f"  {instant.name:<13}{format_gib(instant.total_bytes):>8} [{bar}]{over}{' <- peak' if is_peak else ''}"


def _tensors(peak: Instant, width: int) -> list[str]:
    """Largest first, with their share of the peak."""
    large = [tensor for tensor in peak.tensors if abs(tensor[2]) >= LEAST_SHARE * peak.total_bytes]
    rest = peak.total_bytes - sum(num_bytes for _, _, num_bytes in large)
    rows = [(f"{part.replace('_', ' ')}: {what}", num_bytes) for part, what, num_bytes in large]
    rows += [("smaller ones", rest)] if rest else []
    room = width - 20
    return [
        f"  {name if len(name) <= room else name[: room - 3] + '...':<{room}}{format_gib(size):>9} {size / peak.total_bytes:>6.1%}"
        for name, size in rows
    ]
