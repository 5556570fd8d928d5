"""Numbers as people read them: three significant digits, bytes in both bases."""

from __future__ import annotations

import math
import textwrap

from planner.units import GB, GIB, format_count, format_duration, format_si, format_usd

__all__ = ["significant", "with_unit", "wrapped"]

MIB, MEGA = GIB / 1024, GB / 1000


def significant(value: float, digits: int = 3, *, is_count: bool = True) -> str:
    """`digits` significant digits; whole numbers below a million in full, unless they are no count.

    Example:
        >>> significant(0.43624), significant(4096), significant(18.2749), significant(4.8143e11)
        ('0.436', '4,096', '18.3', '4.81e11')
    """
    if not math.isfinite(value):
        return f"{value:g}"
    if value == 0 or (is_count and float(value).is_integer() and abs(value) < 1e6):
        return f"{value:,.0f}"
    if 1e-3 <= abs(value) < 1e6:
        rounded = round(value, digits - 1 - math.floor(math.log10(abs(value))))
        decimals = max(digits - 1 - math.floor(math.log10(abs(rounded))), 0)
        return f"{rounded:,.{decimals}f}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def with_unit(value: float, unit: str) -> str:
    """A number with its unit, in the prefix that keeps it readable.

    Example:
        >>> with_unit(59057843732.48, "bytes"), with_unit(18.2749, "s"), with_unit(2, "bytes")
        ('55.0 GiB (59.1 GB)', '18.3 s', '2 bytes')
    """
    if unit == "bytes":
        if abs(value) < MIB:
            return f"{significant(value)} bytes"
        if abs(value) < 0.1 * GIB:
            return f"{significant(value / MIB, is_count=False)} MiB ({significant(value / MEGA, is_count=False)} MB)"
        return f"{significant(value / GIB, is_count=False)} GiB ({significant(value / GB, is_count=False)} GB)"
    if unit == "s":
        return format_duration(value) if value else "0 s"
    if unit == "USD":
        return format_usd(value)
    if unit in ("parameters", "tokens"):
        return f"{format_count(value) if abs(value) >= 1e6 else significant(value)} {unit}"
    if unit in ("FLOP", "FLOP/s", "FLOP/token", "bytes/s"):
        if abs(value) >= 1e21:  # no prefix left
            return f"{significant(value)} {unit}"
        return format_si(value, unit.replace("bytes/s", "B/s")) if abs(value) >= 1e6 else f"{significant(value)} {unit}"
    return f"{significant(value)} {unit}".rstrip()


def wrapped(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    """Lines of at most `width` columns."""
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False) or [first.rstrip()]
