"""An export as text: the files, how to start them, what to fill in, and what the target cannot be told."""

from __future__ import annotations

from typing import Any

from planner.errors import shorten
from planner.exporters import EXPORTERS, Export

__all__ = ["render_export", "render_targets", "targets"]


def targets() -> list[dict[str, Any]]:
    """One row per target."""
    return [{"target": name, "kind": e.kind, "versions": list(e.versions), "summary": e.summary} for name, e in EXPORTERS.items()]


def render_targets() -> str:
    """The table of `planner export --list`, trainers first."""
    rows = [(row["target"], row["kind"], ", ".join(row["versions"]), row["summary"]) for row in targets()]
    rows = sorted(rows, key=lambda row: ("trainer", "launcher", "model").index(row[1]))
    widths = [max(len(row[i]) for row in [("target", "kind", "versions", ""), *rows]) for i in range(3)]
    table = [("target", "kind", "versions", "writes"), *rows]
    return "".join("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip() + "\n" for row in table)


def render_export(found: Export, folder: str | None) -> str:
    """What to know beside the files."""
    lines = [f"{found.target} {found.target_version}: {', '.join(found.files)}" + (f" in {folder}" if folder else ""), f"start    {found.how}"]
    if not found.fits:
        lines.append("warning  the plan does not fit the memory of its devices: planner estimate says by how much")
    open_names = [p for p in found.placeholders if not p.is_filled]
    lines += [f"fill in  {p.name if p.meaning.endswith('(optional)') else f'<{p.name}>'}: {p.meaning}" for p in open_names]
    lines += [f"note     {text}" for text in found.notes]
    lines += [f"not exported  {n.key} = {shorten(n.value, 60)}: {n.why}" for n in found.not_exported]
    return "\n".join(lines) + "\n"
