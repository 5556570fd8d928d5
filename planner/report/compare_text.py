"""A comparison as plain text: differences first, one column per plan, the best of each row marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from planner.compare import Comparison, InputRow, ResultRow
from planner.explanations._base import unit_of
from planner.report._numbers import significant, with_unit, wrapped
from planner.units import DAY_S, GB, GIB, HOUR_S, format_usd

__all__ = ["render_comparison"]

MIN_WIDTH = 60
LABELS = {
    "memory.peak_bytes.value": "peak memory", "time.train_s.value": "training time", "cost.usd.value": "cost",
    "time.step_s.value": "step time", "time.tokens_per_s": "tokens/s", "time.tokens_per_s_per_device": "tokens/s per device", "time.mfu": "MFU",
    "time.hfu": "HFU", "time.num_steps": "steps", "time.num_microbatches": "microbatches", "time.bubble_fraction": "bubble share",
    "cost.usd_per_device_hour": "price per device-hour", "cost.device_hours": "device-hours", "cost.billed_device_hours": "billed device-hours",
    "cost.goodput_fraction": "goodput share", "cost.energy_kwh": "energy, kWh", "cost.co2e_kg": "CO2e, kg",
    "loss.nats_per_token.value": "loss, nats/token",
    "loss.perplexity.value": "perplexity", "params.total": "parameters", "params.active": "active parameters",
    "flops.model_per_token": "model FLOPs/token", "flops.hardware_per_token": "hardware FLOPs/token", "flops.total": "model FLOPs, total",
    "flops.counted_per_token": "counted FLOPs/token",
    "memory.usable_bytes": "usable memory",
}  # fmt: skip
_GROUPS = {"memory.breakdown_bytes.": "Memory per device", "time.breakdown_s.": "Time per step", "cost.breakdown_usd.": "Cost"}
Row = tuple[str, list[str]]


def render_comparison(c: Comparison, width: int = 80) -> str:
    """The whole comparison, `width` columns wide (60 or more); no colour, no control characters."""
    width = max(width, MIN_WIDTH)
    blocks = [_heads(c, width)]
    if c.different_inputs:
        blocks.append(_table("Inputs that differ", c.names, [(r.key, [_text(v) for v in r.values]) for r in c.different_inputs], width))
    for title, rows in _grouped(c.different_results):
        blocks.append(_table(title, c.names, [cells for row in rows for cells in _result(row)], width))
    if not c.different_inputs and not c.different_results:
        blocks.append(["The plans are the same."])
    else:
        blocks.append(
            ["* best of the plans that fit; 2.00x: over plan A"] if any(c.fits) else ["* best; 2.00x: over plan A. None of the plans fits."]
        )
    blocks.append(_equal(c.equal_inputs, c.equal_results, width))
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _heads(c: Comparison, width: int) -> list[str]:
    lines = []
    for name, title, fits in zip(c.names, c.titles, c.fits, strict=True):
        lines += wrapped(f"{title}: {'fits' if fits else 'DOES NOT FIT'}", width, f"{name}  ", "   ")
    return lines


def _grouped(rows: Sequence[ResultRow]) -> list[tuple[str, list[ResultRow]]]:
    """Headline numbers, then one table per breakdown."""
    groups: dict[str, list[ResultRow]] = {"Results that differ": [], **{title: [] for title in _GROUPS.values()}}
    for row in rows:
        groups[next((title for prefix, title in _GROUPS.items() if row.key.startswith(prefix)), "Results that differ")].append(row)
    return [(title, found) for title, found in groups.items() if found]


def _result(row: ResultRow) -> list[Row]:
    """Values with ratio and mark; bytes in both bases, on two rows."""
    label, unit = _label(row.key), unit_of(row.key)
    if unit == "bytes" and row.key not in LABELS:
        return [(f"{label}, GiB", _cells(row, lambda v: significant(v / GIB, is_count=False)))]
    if unit == "bytes":
        return [
            (f"{label}, GiB", _cells(row, lambda v: significant(v / GIB, is_count=False))),
            (f"{label}, GB", [_missing(v, lambda x: significant(x / GB, is_count=False)) for v in row.values]),
        ]
    if unit == "USD":
        return [(label, _cells(row, format_usd))]
    if unit == "s":
        name, scale = next(((n, s) for n, s in (("days", DAY_S), ("h", HOUR_S)) if min(v for v in row.values if v is not None) >= s), ("s", 1.0))
        return [(f"{label}, {name}", _cells(row, lambda v: significant(v / scale, is_count=False)))]
    return [(label, _cells(row, significant))]


def _label(key: str) -> str:
    return LABELS.get(key, key.rsplit(".", 1)[-1].replace("_", " "))


def _missing(value: float | None, show: Callable[[float], str]) -> str:
    return "-" if value is None else show(value)


def _cells(row: ResultRow, show: Callable[[float], str]) -> list[str]:
    cells = []
    for i, (value, ratio) in enumerate(zip(row.values, row.ratios, strict=True)):
        beside = f" {significant(ratio, is_count=False)}x" if i and ratio is not None else ""
        mark = " *" if i in row.best else "  " if row.best else ""
        cells.append(f"{_missing(value, show)}{beside}{mark}")
    return cells


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return significant(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _table(title: str, names: Sequence[str], rows: Sequence[Row], width: int) -> list[str]:
    """One column per plan; a row too wide for that names the plan before each value, so that no number is cut."""
    label_width = max(len(title), *(len(label) for label, _ in rows))
    budget = (width - label_width) // len(names) - 2
    narrow = [cells for _, cells in rows if max(map(len, cells)) <= budget]
    widths = [max(len(name), *(len(cells[i]) for cells in narrow)) if narrow else len(name) for i, name in enumerate(names)]

    def line(label: str, cells: Sequence[str]) -> str:
        return (f"{label:<{label_width}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths, strict=True))).rstrip()

    lines = [line(title, names) if narrow else title]
    for label, cells in rows:
        lines += [line(label, cells)] if max(map(len, cells)) <= budget else [label, *_flow(names, cells, width)]
    return lines


def _flow(names: Sequence[str], cells: Sequence[str], width: int) -> list[str]:
    """`A 1  B 2  C 3` in as many equal columns as there is room for."""
    items = [f"{name} {cell}".rstrip() for name, cell in zip(names, cells, strict=True)]
    longest = max(map(len, items))
    if longest > width - 2:
        return [text for item in items for text in wrapped(item, width, "  ", " " * 4)]
    count = max((width - 2) // (longest + 2), 1)
    return ["  " + "  ".join(f"{item:<{longest}}" for item in items[i : i + count]).rstrip() for i in range(0, len(items), count)]


def _equal(inputs: Sequence[InputRow], results: Sequence[ResultRow], width: int) -> list[str]:
    """What all plans share, as one paragraph each."""
    lines = []
    if inputs:
        lines += wrapped(", ".join(f"{row.key} {_text(row.values[0])}" for row in inputs), width, "Equal inputs: ", "  ")
    shown = [row for row in results if row.values[0]]
    if shown:
        named = [f"{_label(row.key).split(',')[0]} {with_unit(row.values[0] or 0.0, unit_of(row.key))}" for row in shown]
        lines += wrapped(", ".join(named), width, "Equal results: ", "  ")
    return lines
