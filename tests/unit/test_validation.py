"""The report of `validate`: groups, baseline, choosing, skipped reasons, and the page made of them."""

import re

import pytest

from planner.files import DATA_DIR, to_json
from planner.measurements import Measurement, read_rows
from planner.report.validation_text import render_markdown
from planner.validation import ValidationReport, validate_rows

ANCHORS = {row.id: row for row in read_rows(DATA_DIR / "measurements" / "anchors.csv")}
PLAIN = ANCHORS["megatron-t1-7.5b"]
CONTRACT = {"median_abs_error_fraction", "p90_abs_error_fraction", "interval_coverage_fraction"}


def changed(**cells: str) -> Measurement:
    return Measurement({name: cell for name, cell in (PLAIN.values | cells).items() if cell})


def tried(tp: int, micro_batch_size: int, step_s: float, **cells: str) -> Measurement:
    """A layout of one job on 128 devices."""
    return changed(
        id=f"tp{tp}-mb{micro_batch_size}-{len(cells)}", tp=str(tp), dp=str(128 // tp), micro_batch_size=str(micro_batch_size), grad_accum="",
        measured_step_s=repr(step_s), measured_tflops_per_device="", **cells,
    )  # fmt: skip


@pytest.fixture(scope="module")
def report() -> ValidationReport:
    lost = [changed(id="no-precision", precision=""), changed(id="nor-here", precision=""), changed(id="abacus", accelerator="abacus")]
    return validate_rows([*ANCHORS.values(), *lost])


def test_the_keys_of_the_contract(report: ValidationReport) -> None:
    found = report.to_dict()
    assert found.keys() >= {"rows", "skipped", "throughput", "memory", "by_source", "per_row"}
    assert found["throughput"].keys() >= CONTRACT
    assert found["memory"].keys() >= CONTRACT
    assert found["skipped"][0].keys() >= {"id", "reason"}
    assert found["per_row"][0].keys() >= {"id", "predicted_step_s", "measured_step_s", "error_fraction", "low_step_s", "high_step_s"}
    for row in found["per_row"]:
        assert row["error_fraction"] == pytest.approx(row["predicted_step_s"] / row["measured_step_s"] - 1)


@pytest.mark.parametrize("name", ["accelerator", "stack", "precision", "devices", "params"])
def test_groups_hold_every_row_once(report: ValidationReport, name: str) -> None:
    groups = report.to_dict()[f"by_{name}"]
    assert sum(found["num_rows"] for found in groups.values()) == report.throughput.num_rows == 30
    assert all(found.keys() >= CONTRACT | {"median_error_fraction", "baseline_median_abs_error_fraction"} for found in groups.values())


def test_groups_are_named_as_users_name_things(report: ValidationReport) -> None:
    groups = report.time_groups
    assert set(groups["accelerator"]) == {"a100-80gb-sxm", "h100-80gb-sxm", "tpu-v4"}
    assert set(groups["precision"]) == {"fp16", "bf16"}
    assert list(groups["devices"]) == ["2-8", "9-64", "65-512", "over 512"]
    assert list(groups["params"]) == ["1B-10B", "10B-100B", "over 100B"]
    assert "megatron-2021" in groups["stack"]


def test_the_baseline_is_near_on_the_runs_it_was_taken_from(report: ValidationReport) -> None:
    """arXiv:2104.04473 table 1: 137 138 142 135 138 140 148 155 163 163 TFLOP/s of 312, whose median is 45%: 3.1%, 16.1% at the 90th percentile."""
    found = report.time_groups["source"]["arXiv:2104.04473 table 1"]
    assert found.baseline_median_abs_error_fraction == pytest.approx(0.031, abs=0.002)
    assert found.baseline_p90_abs_error_fraction == pytest.approx(0.161, abs=0.002)
    assert report.baseline["mfu_fraction"] == 0.45
    assert not report.throughput.loses_to_baseline


def test_skipped_rows_are_counted_by_reason(report: ValidationReport) -> None:
    assert report.skipped_reasons["precision: was not published"] == ["no-precision", "nor-here"]
    assert list(report.to_dict()["skipped_reasons"].values()) == [2, 1]
    assert "| 2 | precision: was not published | no-precision, nor-here |" in render_markdown(report, ["rows.csv"])


def test_the_page_begins_with_the_planner_beside_the_baseline(report: ValidationReport) -> None:
    page = render_markdown(report, ["rows.csv"])
    places = [page.index(text) for text in ("step time, planner", "step time, 45% of peak", "## Step time\n", "## Skipped", "row by row")]
    assert places == sorted(places)
    assert "peak memory, planner" not in page  # nothing was measured
    for name in ("source", "accelerator", "stack", "precision", "devices", "params"):
        assert f"By {name}:" in page
    table = re.search(r"By devices:\n\n((?:\|.*\n)+)", page)
    assert table is not None
    assert len({len(line) for line in table[1].splitlines()}) == 1  # lined up


def test_groups_where_the_baseline_is_better_are_marked() -> None:
    (row,) = validate_rows([PLAIN]).per_row
    at_baseline = changed(id="slow", num_devices="64", dp="16", measured_step_s=repr(2 * row.baseline_step_s), measured_tflops_per_device="")
    found = validate_rows([PLAIN, at_baseline])
    assert found.to_dict()["by_devices"]["9-64"]["loses_to_baseline"]
    assert re.search(r"\| 9-64 .*\(better\) 0\.0%", render_markdown(found, []))


def test_choosing_compares_layouts_of_one_job() -> None:
    rows = [tried(4, 1, 5.0), tried(4, 4, 4.0), tried(4, 8, 3.9), tried(8, 1, 9.0), tried(8, 4, 7.0)]
    found = validate_rows(rows).to_dict()["choosing"]
    assert found["all"]["num_groups"] == 1
    assert found["all"]["num_layouts"] == 5
    assert found["all"]["mean_spearman"] > 0.5
    other = [tried(4, 1, 5.0), tried(4, 4, 4.0), tried(4, 8, 3.9), tried(8, 1, 9.0, hidden_size="8192", ffn_hidden="32768", params_total="")]
    assert validate_rows(other).choosing == {}, "a model of the same name is not the same model"
    repeated = [tried(4, 1, 5.0 + i, year=str(2021), notes="again" * i) for i in range(5)]
    assert validate_rows(Measurement(row.values | {"id": str(i)}) for i, row in enumerate(repeated)).choosing == {}


def test_the_report_is_the_same_from_several_processes() -> None:
    rows = [*ANCHORS.values(), changed(id="abacus", accelerator="abacus")]
    done: list[int] = []
    several = validate_rows(rows, done.append, num_processes=2)
    assert to_json(several.to_dict()) == to_json(validate_rows(rows).to_dict())
    assert done == list(range(1, len(rows) + 1))
