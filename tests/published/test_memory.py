"""Published peaks of device memory, source by source: how far off the planner may be at most, and that no row judges what it was fitted to."""

import math

import pytest

from planner.files import DATA_DIR
from planner.stack import load_stack
from planner.validation import ValidationReport, read_rows, validate_rows

MOST = {
    "simumax-b200": (0.01, 0.015),
    "korthikanti-2205.05198": (0.03, 0.06),
    "bigscience-176B-prequel": (0.05, 0.09),
    "bigscience-1B3": (0.14, 0.23),
    "bigscience-gpt2-v100": (0.05, 0.12),
    "litgpt": (0.06, 0.20),
    "nanotron-bench": (0.10, 0.15),
    "mlperf-v5.0": (0.035, 0.07),
    "mlperf-v5.1": (0.01, 0.02),
    "megatron-bridge-ab": (0.10, 0.14),
    "megatron-ci-functional": (0.025, 0.13),
    "dgxc-benchmarking": (0.09, 0.09),
}
"""Source -> (median, 90th percentile) of absolute relative errors, a little above what was reached."""


@pytest.fixture(scope="module")
def report() -> ValidationReport:
    return validate_rows(read_rows(DATA_DIR / "measurements" / "memory.csv"))


@pytest.mark.parametrize("source", MOST)
def test_errors_by_source(report: ValidationReport, source: str) -> None:
    found = report.by_source()[source]["memory"]
    assert found["median_abs_error_fraction"] <= MOST[source][0]
    assert found["p90_abs_error_fraction"] <= MOST[source][1]


def test_all_sources_together(report: ValidationReport) -> None:
    assert report.memory.num_rows > 300
    assert report.memory.median_abs_error_fraction is not None
    assert report.memory.median_abs_error_fraction < 0.033
    assert report.memory.p90_abs_error_fraction is not None
    assert report.memory.p90_abs_error_fraction < 0.13


def test_intervals_hold_about_as_often_as_they_say(report: ValidationReport) -> None:
    found = report.memory.interval_coverage_fraction
    assert found is not None
    assert 0.70 <= found <= 0.92


def test_fitted_rows_judge_nothing(report: ValidationReport) -> None:
    fitted = [row for row in report.per_row if row.fitted == "coefficients"]
    assert fitted
    assert report.memory.num_rows == sum(row.measured_memory_bytes is not None for row in report.per_row) - len(fitted)


def test_peaks_are_judged_by_the_number_of_their_kind(report: ValidationReport) -> None:
    rows = {row.source: row for row in report.per_row}
    assert rows["simumax-b200"].memory_kind == "allocated"
    assert rows["bigscience-1B3"].memory_kind == "device"
    assert rows["nanotron-bench"].memory_kind == "reserved"
    assert rows["korthikanti-2205.05198"].memory_kind == "states"
    assert sum(found.num_rows for found in report.memory_by_kind.values()) == report.memory.num_rows


def test_bytes_of_deepspeeds_fp16_states_as_regressed_from_bigsciences_runs() -> None:
    # 56 runs fit 4 + 17.3 / dp bytes per parameter: 2 + 2, and over the data-parallel ranks 4 + 8 + (4 + 2).
    stack = load_stack("megatron-deepspeed")
    always, sharded = 2 + stack.gradient_bytes, 4 + 8 + stack.step_gradient_bytes + 2
    assert always == pytest.approx(4.27, rel=0.1)
    assert sharded == pytest.approx(17.34, rel=0.05)


def test_placeholders_of_llama_405b_are_one_of_each_shape(report: ValidationReport) -> None:
    # qkv, projection, up and gate, down of one block and the head, in bf16, on one of two stages without tensor parallelism.
    h, f, v, kv = 16384, 53248, 128256, 16 * 128
    expected = 2 * (h * (h + 2 * kv) + h * h + 3 * h * f + h * v)
    row = next(row for row in read_rows(DATA_DIR / "measurements" / "memory.csv") if "405b" in row.text("model") and row.text("cp") == "8")
    from planner.estimate import estimate
    from planner.measured_requests import to_request

    memory = estimate(to_request(row)).memory.stages[0]
    params = 4 * (h * (h + 2 * kv) + h * h + 3 * h * f + 2 * h) + 2 * h * v + h
    assert math.isclose(memory.breakdown_bytes["gradients"] - 4 * params, expected, rel_tol=1e-6)
