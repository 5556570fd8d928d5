"""The catalog as text: whole columns or none, units on every number, nothing that does not apply."""

from __future__ import annotations

import pytest

from planner.listing import entry, listing
from planner.report.catalog_text import render_entry, render_listing


@pytest.mark.parametrize("kind", ["accelerators", "offers"])
@pytest.mark.parametrize("width", [50, 66, 80, 100, 140, 400])
def test_a_listing_fits_and_says_what_it_hides(kind: str, width: int) -> None:
    lines = render_listing(kind, listing(kind), width).splitlines()
    assert max(map(len, lines)) <= width
    assert any(line.startswith("not shown") for line in lines) is (width < 80 or (kind == "offers" and width < 120))


def test_eighty_columns_keep_what_matters() -> None:
    head, first = render_listing("accelerators", listing("accelerators"), 80).splitlines()[:2]
    assert head.split() == ["accelerator", "GiB", "mem.", "rate", "bf16", "fp8", "link", "1-way", "domain", "year"]
    assert first.split()[:2] == ["v100-16gb-sxm2", "16.0"]
    table = render_listing("offers", listing("offers"), 80).splitlines()
    assert table[0].split() == ["offer", "accelerator", "$/h", "priced"], "a price stays with its date"
    assert next(line for line in table if line.startswith("aws/p5.48xlarge ")).split() == ["aws/p5.48xlarge", "h100-80gb-sxm", "6.88", "2026-01-31"]


def test_an_entry_has_units_and_sources() -> None:
    text = render_entry(entry("accelerators", "h100"), width=80)
    assert max(map(len, text.splitlines())) <= 80
    for line in (
        "id: h100-80gb-sxm",
        "memory_bytes: 79.7 GiB (85.5 GB)",
        "  bf16: 989.4 TFLOP/s",
        "power_watts: 700 W",
        "  latency_s: 1.9 us",
        "aliases: h100, h100-sxm, h100-sxm5",
    ):
        assert line in text.splitlines()
    assert "torus" not in text
    assert "source:" in text
    assert "  torus_shape: 16, 16, 16" in render_entry(entry("accelerators", "tpu-v4")).splitlines()


def test_a_pipe_keeps_each_value_on_its_line() -> None:
    text = render_entry(entry("offers", "aws/p5.48xlarge"))
    assert "price_date: 2026-01-31" in text.splitlines()
    assert "network_bytes_per_s: 400 GB/s" in text.splitlines()
    assert all(":" in line for line in text.splitlines())
