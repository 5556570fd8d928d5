"""Published runs that no coefficient was fitted to: how far off the planner is, row by row."""

import re
from pathlib import Path

import pytest

from planner.files import DATA_DIR
from planner.validation import ValidationReport, read_rows, render_markdown, validate_rows

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
    assert set(stated) == {row.id for row in report.per_row}
    for row in report.per_row:
        assert row.error_fraction is not None
        assert f"{100 * row.error_fraction:+.1f}%" == stated[row.id], row.id


def test_the_page_is_what_the_command_prints(report: ValidationReport) -> None:
    # Made again with: python -m planner validate --measurements data/measurements/anchors.csv > docs/validation.md
    assert (ROOT / "docs" / "validation.md").read_text(encoding="utf-8") == render_markdown(report)
