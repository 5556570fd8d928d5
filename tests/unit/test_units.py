"""Reading and writing numbers with units."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import InputError
from planner.units import UNITS, format_bytes, format_count, format_duration, format_si, format_usd, parse, parse_count


@pytest.mark.parametrize(
    ("text", "quantity", "value"),
    [
        ("80 GB", "bytes", 80e9),
        ("80 GiB", "bytes", 80 * 2**30),
        ("3.35 TB/s", "bytes_per_s", 3.35e12),
        ("400 Gbit/s", "bytes_per_s", 50e9),
        ("3200 Gbps", "bytes_per_s", 400e9),
        ("989.4 TFLOP/s", "flops_per_s", 989.4e12),
        ("4 us", "s", 4e-6),
        ("2.10 USD/h", "usd_per_hour", 2.1),
        ("700W", "watts", 700),
        ("1,555 GB/s", "bytes_per_s", 1555e9),
    ],
)
def test_text_with_its_unit(text: str, quantity: str, value: float) -> None:
    assert parse(text, quantity) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    "text", [80, 80.0, None, True, "80", "GB", "80 gb", "80 GBps", "80 GB/s", "nan GB", "inf GB", "1e400 GB", "80 GB extra", "9" * 100 + " GB", ""]
)
def test_a_bare_or_wrong_number_of_bytes_is_refused(text: object) -> None:
    with pytest.raises(InputError, match=r"rule .*bytes"):
        parse(text, "bytes", "memory")


@given(st.sampled_from([(q, u) for q, units in UNITS.items() for u in units]), st.floats(1e-3, 1e6))
def test_every_unit_parses_to_its_factor(pair: tuple[str, str], number: float) -> None:
    quantity, unit = pair
    assert parse(f"{number!r} {unit}", quantity) == pytest.approx(number * UNITS[quantity][unit])


@pytest.mark.parametrize(
    ("text", "value"), [("15T", 15e12), ("15e12", 15e12), (512, 512), ("4,096", 4096), ("1_024", 1024), ("1.4B", 1.4e9), ("20k", 2e4), (0.5, 0.5)]
)
def test_counts(text: object, value: float) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["15X", "", "T", None, True, [], math.nan, math.inf, 10**400, "1e999"])
def test_wrong_counts(text: object) -> None:
    with pytest.raises(InputError):
        parse_count(text)


@given(st.floats(1e-300, 1e300))
def test_si_text_never_loses_the_number(value: float) -> None:
    number, _, prefix = format_si(value).partition(" ")
    scale = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}[prefix]
    assert float(number) * scale == pytest.approx(value, rel=0.51, abs=0)
    assert len(number) <= 9


@given(st.floats(1e-2, 1e20))
def test_si_text_is_the_number_to_three_digits(value: float) -> None:
    text = format_si(value)
    number, _, prefix = text.partition(" ")
    assert float(number) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}[prefix] == pytest.approx(value, rel=6e-3, abs=6e-3)
    assert float(number) < 1000 or value > 1e20


@given(st.floats(0, 1e12))
def test_a_price_is_never_shown_as_zero(usd: float) -> None:
    assert (format_usd(usd) == "$0.00") == (usd == 0)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (format_bytes(80e9), "74.5 GiB (80.0 GB)"),
        (format_count(405.85e9), "406B"),
        (format_count(999.9e9), "1.00T"),
        (format_duration(6.97e6), "80.7 days"),
        (format_duration(90), "1.5 min"),
        (format_usd(1039876), "$1,040,000"),
    ],
)
def test_shown_numbers(shown: str, expected: str) -> None:
    assert shown == expected
