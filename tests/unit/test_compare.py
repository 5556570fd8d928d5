"""Plans side by side: what differs, by how much, which is best, and what is equal."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from planner.compare import Comparison, compare
from planner.errors import InputError
from planner.estimate import estimate
from planner.plan import Plan
from planner.report.compare_text import render_comparison

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip


def _plan(accelerator: str = "h100-80gb-sxm", num_devices: int = 64, price: str | None = "2.5 USD/h", layout: Any = None, **workload: Any) -> Plan:
    cluster = {"accelerator": accelerator, "num_devices": num_devices} | ({"price": price} if price else {})
    layout = layout or {"dp_shard": num_devices, "zero_stage": 3}
    workload = {"tokens": 1e12, "seq_len": 4096, "global_batch_size": 256, **workload}
    return estimate({"model": LLAMA, "cluster": cluster, "layout": layout, "workload": workload, "stack": "torchtitan"})


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    return [
        _plan(), _plan("a100-80gb-sxm"), _plan(num_devices=128), _plan(price=None), _plan(num_devices=1, price="1.5 USD/h"),
        _plan(layout={"dp_shard": 8, "tp": 8, "zero_stage": 1, "sequence_parallel": True}, recompute="full"),
    ]  # fmt: skip


def _row(found: Comparison, key: str) -> Any:
    return {row.key: row for row in (*found.different_inputs, *found.different_results)}[key]


def test_differences_and_equals_partition_the_inputs(plans: list[Plan]) -> None:
    found = compare(plans[:2])
    assert [row.key for row in found.different_inputs] == ["cluster.accelerator"]
    assert {row.key for row in found.different_inputs}.isdisjoint(row.key for row in found.equal_inputs)
    assert "workload.tokens" in {row.key for row in found.equal_inputs}
    assert "params.total" in {row.key for row in found.equal_results}


def test_ratios_are_to_the_first_and_the_best_is_marked(plans: list[Plan]) -> None:
    found = compare(plans[:3])
    step = _row(found, "time.step_s.value")
    assert step.values == tuple(plan.time.step_s.value for plan in plans[:3])
    assert step.ratios[0] == 1.0
    assert step.ratios[1] == pytest.approx(plans[1].time.step_s.value / plans[0].time.step_s.value)
    assert step.best == (2,)
    assert _row(found, "time.tokens_per_s").best == (2,)
    assert _row(found, "time.breakdown_s.matmul").best == ()


def test_a_plan_that_does_not_fit_is_never_best(plans: list[Plan]) -> None:
    found = compare([plans[0], plans[4]])
    assert found.fits == (True, False)
    for row in found.different_results:
        assert 1 not in row.best
    assert _row(found, "cost.usd_per_device_hour").best == (0,)


def test_missing_numbers_stay_missing(plans: list[Plan]) -> None:
    usd = _row(compare([plans[3], plans[0]]), "cost.usd.value")
    assert usd.values[0] is None
    assert usd.ratios == (None, None)
    assert usd.best == (1,)


def test_equal_plans_have_no_differences(plans: list[Plan]) -> None:
    found = compare([plans[0], plans[0]])
    assert not found.different_inputs
    assert not found.different_results
    assert "The plans are the same." in render_comparison(found, 80)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_two_to_six_plans(plans: list[Plan], count: int) -> None:
    with pytest.raises(InputError, match="2 to 6"):
        compare([plans[0]] * count)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_text_fits_and_cuts_no_number(plans: list[Plan], count: int, width: int) -> None:
    found = compare(plans[:count])
    text = render_comparison(found, width)
    assert max(map(len, text.splitlines())) <= max(width, 60)
    assert "..." not in text
    assert text.index("Inputs that differ") < text.index("Results that differ") < text.index("Equal inputs")
    assert ("peak memory, GiB" in text and "peak memory, GB" in text) == (count > 2)
    assert all(f"\n{name}  " in f"\n{text}" for name in found.names)


def test_plain_data(plans: list[Plan]) -> None:
    assert json.loads(json.dumps(asdict(compare(plans)), allow_nan=False))["names"] == list("ABCDEF")
