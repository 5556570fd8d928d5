"""Catalog rows and entries as plain text. Numbers are never shortened; a narrow terminal loses whole columns instead."""

from __future__ import annotations

from typing import Any

from planner.units import format_count, format_gib, format_rate, format_si

__all__ = ["render_entry", "render_listing"]

HEADS = {
    "memory_bytes": "GiB", "memory_bandwidth_bytes_per_s": "memory",
    "bf16_flops_per_s": "bf16 dense", "fp8_flops_per_s": "fp8 dense",
    "scale_up_bytes_per_s": "link, one way", "domain_size": "domain",
    "on_demand_usd_per_device_hour": "$/device-h", "spot_usd_per_device_hour": "spot",
    "price_date": "priced", "is_stale": "old?", "published_params": "published", "num_layers": "layers", "hidden_size": "hidden",
}  # fmt: skip


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "old" if value else ""
    if name == "memory_bytes":
        return format_gib(value)
    if name.endswith("flops_per_s"):
        return format_si(value, "FLOP/s")
    if name.endswith("bytes_per_s"):
        return format_rate(value)
    if name.endswith("usd_per_device_hour"):
        return f"{value:.2f}"
    if name == "params":
        return format_count(value)
    return f"{value:,}" if isinstance(value, int) and name != "year" else str(value)


def render_listing(kind: str, rows: list[dict[str, Any]], width: int) -> str:
    """A table of `rows`, as many of its columns as fit into `width`."""
    if not rows:
        return f"no {kind}\n"
    names = list(rows[0])
    cells = {name: [_cell(name, row[name]) for row in rows] for name in names}
    widths = {name: max(len(HEADS.get(name, name)), *(len(c) for c in cells[name])) for name in names}
    shown: list[str] = []
    for name in names:
        if not shown or sum(widths[n] + 2 for n in shown) + widths[name] <= width:
            shown.append(name)
    left = {name for name in shown if all(isinstance(row[name], str) for row in rows)}

    def line(values: list[str]) -> str:
        return "  ".join(v.ljust(widths[n]) if n in left else v.rjust(widths[n]) for n, v in zip(shown, values, strict=True)).rstrip()

    body = [line([cells[name][i] for name in shown]) for i in range(len(rows))]
    hidden = [HEADS.get(n, n) for n in names if n not in shown]
    note = [f"(not shown at this width: {', '.join(hidden)})"] if hidden else []
    return "\n".join([line([HEADS.get(name, name) for name in shown]), *body, f"{len(rows)} {kind}", *note]) + "\n"


def render_entry(found: dict[str, Any], indent: int = 0) -> str:
    """Key and value per line, nested records indented."""
    lines = []
    for key, value in found.items():
        if isinstance(value, dict):
            lines.append(f"{' ' * indent}{key}:")
            lines.append(render_entry(value, indent + 2).rstrip("\n"))
        else:
            shown = _cell(key, value) if key.endswith(("bytes_per_s", "flops_per_s")) and isinstance(value, float) else value
            lines.append(f"{' ' * indent}{key}: {shown}")
    return "\n".join(lines) + "\n"
