"""Catalog rows and entries as plain text. Numbers are never shortened; a narrow terminal loses whole columns instead."""

from __future__ import annotations

import textwrap
from typing import Any

from planner.units import GB, TERA, format_bytes, format_count, format_duration, format_gib, format_rate, format_si

__all__ = ["render_entry", "render_listing"]

HEADS = {
    "memory_bytes": "GiB", "memory_bandwidth_bytes_per_s": "mem. rate",
    "bf16_flops_per_s": "bf16", "fp8_flops_per_s": "fp8",
    "scale_up_bytes_per_s": "link 1-way", "domain_size": "domain",
    "on_demand_usd_per_device_hour": "$/h", "spot_usd_per_device_hour": "spot",
    "price_date": "priced", "is_stale": "old?", "published_params": "published", "num_layers": "layers", "hidden_size": "hidden",
}  # fmt: skip
FIRST = {"offers": ["offer", "accelerator", "on_demand_usd_per_device_hour", "price_date", "spot_usd_per_device_hour", "devices", "region"]}
"""Which columns a narrow terminal keeps, where that is not the order they stand in."""
FOOT = {
    "accelerators": "bf16, fp8: dense TFLOP/s; link: all links of one device, one direction; domain: devices that the link joins",
    "offers": "prices in USD per device-hour",
}


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "old" if value else ""
    if name == "memory_bytes":
        return format_gib(value)
    if name.endswith("flops_per_s"):
        return f"{value / TERA:g}"
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
    kept: list[str] = []
    for name in dict.fromkeys([*FIRST.get(kind, []), *names]):
        if not kept or sum(widths[n] + 2 for n in kept) + widths[name] <= width:
            kept.append(name)
    shown = [name for name in names if name in kept]
    left = {name for name in shown if all(row[name] is None or isinstance(row[name], str) for row in rows)}

    def line(values: list[str]) -> str:
        return "  ".join(v.ljust(widths[n]) if n in left else v.rjust(widths[n]) for n, v in zip(shown, values, strict=True)).rstrip()

    body = [line([cells[name][i] for name in shown]) for i in range(len(rows))]
    hidden = [HEADS.get(n, n) for n in names if n not in shown]
    foot = [f"{len(rows)} {kind}", FOOT.get(kind, ""), f"not shown at this width: {', '.join(hidden)}" if hidden else ""]
    notes = [part for text in foot if text for part in textwrap.wrap(text, max(width, 20))]
    return "\n".join([line([HEADS.get(name, name) for name in shown]), *body, *notes]) + "\n"


def _value(name: str, group: str, value: Any) -> str:
    """One value of an entry, with its unit."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        if "flops_per_s" in (name, group) or group.endswith("flops_per_s"):
            return format_si(value, "OP/s" if name == "int8" else "FLOP/s", 4)
        if name.endswith("bytes_per_s"):
            return format_rate(value)
        if name.endswith("_bytes"):
            return format_bytes(value) if value >= GB else format_si(value, "B")
        if name.endswith("_s"):
            return format_duration(value)
        if name.endswith("_watts"):
            return f"{value:g} W"
    return str(value)


def render_entry(found: dict[str, Any], indent: int = 0, width: int = 400, group: str = "") -> str:
    """Key and value per line, nested records indented; what does not apply (an empty list, a torus of no axes) is left out."""
    lines = []
    pad = " " * indent
    for key, value in found.items():
        if value in ([], (), {}) or (found.get("torus_axes") == 0 and key in ("torus_axes", "wraparound_min_axis")):
            continue
        if isinstance(value, dict):
            lines.append(f"{pad}{key}:")
            lines.append(render_entry(value, indent + 2, width, key).rstrip("\n"))
        else:
            text = f"{pad}{key}: {_value(key, group, value)}"
            lines += textwrap.wrap(text, max(width, 30), subsequent_indent=pad + "    ", break_long_words=False, break_on_hyphens=False) or [text]
    return "\n".join(lines) + "\n"
