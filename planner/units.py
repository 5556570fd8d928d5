"""Units: the only place that knows 1e9 and 2**30.

Inside the planner every number is in SI base units, and its name says which (`_bytes`, `_s`, `_flops_per_s`,
`_bytes_per_s`, `_usd`, `_watts`). Text with a unit is read by `parse` and written by the `format_*` functions.
"""

from __future__ import annotations

import math
import re

from planner.errors import InputError

__all__ = [
    "GB", "GIB", "MIB", "HOUR_S", "DAY_S", "TERA", "format_bytes", "format_count", "format_duration", "format_gib",
    "format_rate", "format_si", "format_usd", "parse", "parse_count",
]  # fmt: skip

KILO, MEGA, GIGA, TERA, PETA, EXA = 1e3, 1e6, 1e9, 1e12, 1e15, 1e18
KIB, MIB, GIB, TIB, PIB = 2.0**10, 2.0**20, 2.0**30, 2.0**40, 2.0**50
GB = GIGA
HOUR_S, DAY_S = 3600.0, 86400.0

_DECIMAL = {"": 1.0, "k": KILO, "M": MEGA, "G": GIGA, "T": TERA, "P": PETA, "E": EXA}
_BYTES = {f"{p}B": f for p, f in _DECIMAL.items()} | {"KB": KILO, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB, "PiB": PIB}
_BITS = {f"{p}bit": f / 8 for p, f in _DECIMAL.items() if p} | {"Gb": GIGA / 8, "Mb": MEGA / 8}

UNITS: dict[str, dict[str, float]] = {
    "bytes": _BYTES,
    "bytes_per_s": {f"{u}/s": f for u, f in _BYTES.items()} | {f"{u}/s": f for u, f in _BITS.items()} | {"Gbps": GIGA / 8},
    "flops_per_s": {f"{p}FLOP/s": f for p, f in _DECIMAL.items()} | {f"{p}OP/s": f for p, f in _DECIMAL.items()},
    "s": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9, "min": 60.0, "h": HOUR_S, "d": DAY_S, "days": DAY_S},
    "watts": {"W": 1.0, "kW": KILO, "MW": MEGA},
    "usd_per_hour": {"USD/h": 1.0, "$/h": 1.0},
    "hz": {"Hz": 1.0, "MHz": MEGA, "GHz": GIGA},
}
"""Quantity -> unit text -> factor to the SI base unit."""

_COUNTS = {"": 1.0, "k": KILO, "K": KILO, "M": MEGA, "B": GIGA, "G": GIGA, "T": TERA}
_NUMBER = re.compile(r"\s*([+-]?(?:\d[\d_,]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(\S*)\s*\Z")


def parse(text: object, quantity: str, key: str = "-") -> float:
    """Reads `"3.35 TB/s"` into SI base units.

    Args:
        text: a number and its unit; a bare number is refused, because nobody can tell GB from GiB afterwards.
        quantity: a key of `UNITS`.
        key: what to name in the error.
    Raises:
        InputError: not text, no unit, unknown unit, not finite.

    Example:
        >>> parse("3.35 TB/s", "bytes_per_s")
        3350000000000.0
        >>> parse("80 GiB", "bytes")
        85899345920.0
    """
    units = UNITS[quantity]
    some = ", ".join(list(units)[:8])
    if not isinstance(text, str):
        raise InputError.single(key, text, f"{quantity} is written as text with its unit", f'write e.g. "8 {list(units)[-1]}" (units: {some})')
    match = _NUMBER.match(text) if len(text) <= 64 else None
    if match is None or match[2] not in units:
        raise InputError.single(key, text, f"{quantity} is a number and one of the units {some}", f'write e.g. "8 {list(units)[-1]}"')
    value = float(match[1].replace("_", "").replace(",", "")) * units[match[2]]
    if not math.isfinite(value):
        raise InputError.single(key, text, f"{quantity} must be finite", "write a smaller number")
    return value


def parse_count(text: object, key: str = "-") -> float:
    """Reads a plain count, `15T`, `15e12`, `1_024` or `4,096` into a number.

    Example:
        >>> parse_count("15T")
        15000000000000.0
        >>> parse_count(512)
        512.0
    """
    fix = "write a number such as 512, 15e12 or 15T"
    if isinstance(text, bool) or not isinstance(text, (int, float, str)):
        raise InputError.single(key, text, "a count is a number", fix)
    if isinstance(text, str):
        match = _NUMBER.match(text) if len(text) <= 64 else None
        if match is None or match[2] not in _COUNTS:
            raise InputError.single(key, text, "a count is a number with an optional k, M, B or T", fix)
        value = float(match[1].replace("_", "").replace(",", "")) * _COUNTS[match[2]]
    else:
        try:
            value = float(text)
        except OverflowError:
            value = math.inf
    if not math.isfinite(value):
        raise InputError.single(key, text, "a count must be finite", fix)
    return value


def format_si(value: float, unit: str = "", digits: int = 3) -> str:
    """`1.5e13` -> `15.0 T`: `digits` significant digits with a decimal prefix; below 0.01 and above 1000 E as `1.2e-05`.

    Example:
        >>> format_si(989.4e12, "FLOP/s")
        '989 TFLOP/s'
    """
    if value == 0 or not math.isfinite(value) or not 0.01 <= abs(value) < 999.5 * EXA:
        return f"{value:.{digits}g} {unit}".rstrip()
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    power = min(max(int(math.log10(abs(value)) // 3), 0), len(prefixes) - 1)
    if round(abs(value) / 1000.0**power, digits - 1 - int(math.log10(max(abs(value) / 1000.0**power, 1)))) >= 1000 and power < len(prefixes) - 1:
        power += 1
    scaled = value / 1000.0**power
    decimals = max(digits - 1 - math.floor(math.log10(max(abs(scaled), 1))), 0)
    return f"{scaled:.{decimals}f} {prefixes[power]}{unit}".rstrip()


def format_count(value: float) -> str:
    """A count of things as people write it: `405B`, `15.0T`.

    Example:
        >>> format_count(405.85e9)
        '406B'
    """
    return format_si(value).replace(" G", "B").replace(" ", "")


def format_gib(num_bytes: float) -> str:
    """Bytes as GiB, one decimal: `43.2`."""
    return f"{num_bytes / GIB:.1f}" if num_bytes / GIB < 9999.5 else f"{num_bytes / GIB:,.0f}"


def format_bytes(num_bytes: float) -> str:
    """Bytes in both bases, so that nobody has to guess.

    Example:
        >>> format_bytes(80e9)
        '74.5 GiB (80.0 GB)'
    """
    return f"{format_gib(num_bytes)} GiB ({num_bytes / GB:.1f} GB)"


def format_rate(bytes_per_s: float) -> str:
    """Bytes per second with a decimal prefix."""
    return format_si(bytes_per_s, "B/s")


def format_duration(seconds: float) -> str:
    """Seconds in the largest unit that keeps the number readable.

    Example:
        >>> format_duration(6.97e6)
        '80.7 days'
        >>> format_duration(0.0123)
        '12.3 ms'
    """
    for factor, name in ((DAY_S, "days"), (HOUR_S, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(seconds) >= factor * (1.0 if name != "days" else 2.0):
            scaled = seconds / factor
            return f"{scaled:,.0f} {name}" if scaled >= 1000 else f"{scaled:.3g} {name}" if scaled < 100 else f"{scaled:.1f} {name}"
    return f"{seconds * 1e9:.3g} ns"


def format_usd(usd: float) -> str:
    """Dollars, three significant digits above 10,000; never `$0.00` for a price that is not zero.

    Example:
        >>> format_usd(1039876.0)
        '$1,040,000'
        >>> format_usd(12.345)
        '$12.35'
    """
    if usd >= 10_000:
        step = 10.0 ** (math.floor(math.log10(usd)) - 2)
        return f"${round(usd / step) * step:,.0f}"
    return f"${usd:,.2f}" if usd >= 0.01 or usd == 0 else f"${usd:.2g}"
