"""Summaries of errors against numbers worked out by hand, and the baseline against its definition."""

import pytest

from planner.estimate import estimate
from planner.summaries import (
    BASELINE_MFU,
    DEVICE_BANDS,
    PARAM_BANDS,
    Judged,
    TimeSummary,
    band,
    baseline_step_s,
    group_times,
    summarize_groups,
    summarize_times,
)


def judged(predicted_s: float, measured_s: float, baseline_s: float = 1.0, reach: float = 1.1) -> Judged:
    return Judged(predicted_s, measured_s, predicted_s / reach, predicted_s * reach, baseline_s, "here", "job", "layout")


def test_a_summary_by_hand() -> None:
    found = summarize_times([judged(1.1, 1.0, 2.0), judged(0.8, 1.0, 1.5), judged(1.05, 1.0, 0.5)])
    assert found.num_rows == 3
    assert found.median_abs_error_fraction == pytest.approx(0.10)
    assert found.p90_abs_error_fraction == pytest.approx(0.10 + 0.8 * 0.10)  # 0.05, 0.1, 0.2 at rank 1.8
    assert found.median_error_fraction == pytest.approx(0.05)
    assert found.interval_coverage_fraction == pytest.approx(2 / 3)  # 1.1 / 1.1 = 1 is still inside
    assert found.median_interval_range_fraction == pytest.approx(1.21 - 1)
    assert found.median_interval_width_fraction == pytest.approx(1.1 - 1 / 1.1)
    assert found.throughput_median_abs_error_fraction == pytest.approx(1 - 1 / 1.1)  # 1/1.1, 1/0.8, 1/1.05
    assert found.baseline_median_abs_error_fraction == pytest.approx(0.5)
    assert found.baseline_median_error_fraction == pytest.approx(0.5)


def test_nothing_measured_is_no_number() -> None:
    found = summarize_times([])
    assert found == TimeSummary(0)
    assert found.to_dict()["median_abs_error_fraction"] is None
    assert not found.loses_to_baseline


def test_losing_to_the_baseline_is_flagged_for_median_and_tail() -> None:
    worse = summarize_times([judged(1.2, 1.0, 1.1)] * 3)
    assert (worse.loses_to_baseline, worse.loses_tail_to_baseline) == (True, True)
    tail = summarize_times([judged(1.01, 1.0, 1.1)] * 4 + [judged(3.0, 1.0, 1.1)])
    assert (tail.loses_to_baseline, tail.loses_tail_to_baseline) == (False, True)
    assert tail.to_dict()["loses_tail_to_baseline"] is True


def test_groups_in_a_given_order_then_by_size() -> None:
    row = judged(1.0, 1.0)
    assert list(group_times([("b", row), ("a", row), ("c", row), ("c", row)])) == ["c", "a", "b"]
    assert list(group_times([("2-8", row), ("1", row), ("2-8", row)], [name for _, name in DEVICE_BANDS])) == ["1", "2-8"]


@pytest.mark.parametrize(
    ("value", "bands", "name"),
    [
        (1, DEVICE_BANDS, "1"), (2, DEVICE_BANDS, "2-8"), (9, DEVICE_BANDS, "9-64"), (512, DEVICE_BANDS, "65-512"), (513, DEVICE_BANDS, "over 512"),
        (1e9, PARAM_BANDS, "up to 1B"), (7e9, PARAM_BANDS, "1B-10B"), (7e10, PARAM_BANDS, "10B-100B"), (1e12, PARAM_BANDS, "over 100B"),
    ],
)  # fmt: skip
def test_bands(value: float, bands: tuple[tuple[float, str], ...], name: str) -> None:
    assert band(value, bands) == name


@pytest.mark.parametrize(("recompute", "per_param", "attention"), [("none", 6, 12), ("full", 8, 16)])
def test_the_baseline_counts_six_or_eight_flops_per_matmul_parameter(recompute: str, per_param: int, attention: int) -> None:
    """GPT-3 175B by hand: 96 layers of 12 h^2, an output layer of V h that is never recomputed, attention over all pairs."""
    layers, h, vocab, s = 96, 12288, 51200, 2048
    plan = estimate({
        "model": "gpt3-175b", "stack": "megatron-2021", "cluster": {"accelerator": "a100-80gb-sxm", "num_devices": 64},
        "workload": {"seq_len": s, "global_batch_size": 64, "precision": "bf16", "recompute": recompute},
        "layout": {"tp": 8, "pp": 8, "micro_batch_size": 1},
    })  # fmt: skip
    flops = (per_param * 12 * h**2 + attention * s * h) * layers + 6 * vocab * h
    assert plan.flops.counted_per_token == pytest.approx(flops, rel=0.003)  # the preset's vocabulary is its own
    found = baseline_step_s(plan.flops.counted_per_token, 64 * s, 64, plan.time.peak_flops_per_s)
    assert found == pytest.approx(64 * s * flops / (64 * 312e12 * BASELINE_MFU), rel=0.003)


def test_groups_weigh_the_same() -> None:
    rows = [("many", judged(1.01, 1.0, 2.0))] * 50 + [("few", judged(1.2, 1.0, 1.5)), ("one", judged(0.9, 1.0, 0.7))]
    found = summarize_groups(group_times(rows))
    assert found["num_groups"] == 3
    assert found["median_abs_error_fraction"] == pytest.approx(0.1)  # of 0.01, 0.2, 0.1
    assert found["baseline_median_abs_error_fraction"] == pytest.approx(0.5)  # of 1.0, 0.5, 0.3
    assert summarize_groups({})["median_abs_error_fraction"] is None
