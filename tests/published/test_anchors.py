"""Published runs that no coefficient was fitted to: how far off the planner is, row by row."""

import re
from pathlib import Path

import pytest

from planner.files import DATA_DIR
from planner.report.validation_text import render_markdown
from planner.validation import ValidationReport, read_rows, validate_rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report() -> ValidationReport:
    return validate_rows(read_rows(DATA_DIR / "measurements" / "anchors.csv"))


def test_every_row_is_predicted(report: ValidationReport) -> None:
    assert report.skipped == ()
    assert len(report.per_row) == 30
    assert all(row.error_fraction is not None for row in report.per_row)


def test_median_time_error_is_under_ten_percent(report: ValidationReport) -> None:
    found = report.throughput.median_abs_error_fraction
    assert found is not None
    assert found < 0.10


def test_each_row_is_within_its_interval_or_the_page_says_so(report: ValidationReport) -> None:
    page = (ROOT / "docs" / "validation.md").read_text(encoding="utf-8")
    stated = dict(re.findall(r"^\| (\S+) \| .* \| ([+-][\d.]+%) \|$", page, re.MULTILINE))
    assert {row.id for row in report.per_row} <= set(stated)
    for row in report.per_row:
        assert row.error_fraction is not None
        assert f"{100 * row.error_fraction:+.1f}%" == stated[row.id], row.id


def test_the_page_is_what_the_command_prints() -> None:
    # Made again with the command that stands on the page.
    files = ["data/measurements/anchors.csv", "data/measurements/memory.csv"]
    whole = validate_rows(row for name in files for row in read_rows(ROOT / name))
    assert (ROOT / "docs" / "validation.md").read_text(encoding="utf-8") == render_markdown(whole, files)
