"""Changes that make a plan fit: they do, and no smaller step of theirs does."""

from __future__ import annotations

from typing import Any

import pytest

from planner import build_request, estimate
from planner.remedies import DEVICE_FACTORS, find_remedies
from planner.report.remedies_text import render_remedies


def request(**changes: Any) -> dict[str, Any]:
    cluster = {"accelerator": "h100-80gb-sxm", "num_devices": changes.pop("num_devices", 8)}
    workload = {"seq_len": 8192, "global_batch_size": 512, "tokens": 1e11, **changes.pop("workload", {})}
    return {"model": changes.pop("model", "llama-3.1-8b"), "workload": workload, "cluster": cluster, "stack": "torchtitan", **changes}


@pytest.mark.parametrize(
    "values",
    [
        request(layout={"tp": 1, "pp": 1, "dp_shard": 8, "zero_stage": 3, "micro_batch_size": 8}),
        request(model="llama-3.1-70b"),
        request(model="llama-3.1-405b"),
        request(model="llama-3.1-70b", workload={"recompute": "full"}),
    ],
    ids=["large micro-batch", "70B on one node", "405B on one node", "70B, full recompute already"],
)
def test_every_remedy_fits_and_says_so(values: dict[str, Any]) -> None:
    plan = estimate(values)
    assert not plan.fits
    remedies = find_remedies(build_request(values))
    assert remedies
    assert all(remedy.plan.fits for remedy in remedies)
    text = render_remedies(plan, remedies, 80)
    assert all(remedy.change in text for remedy in remedies)
    assert max(map(len, text.splitlines())) <= 80


def test_the_fewest_doublings_of_devices_are_named() -> None:
    values = request(model="llama-3.1-405b", workload={"recompute": "full"})
    (remedy,) = find_remedies(build_request(values))
    count = remedy.plan.inputs["cluster"]["num_devices"]
    assert count in [8 * factor for factor in DEVICE_FACTORS]
    assert not estimate(request(model="llama-3.1-405b", num_devices=count // 2, workload={"recompute": "full"})).fits


def test_nothing_is_promised_where_nothing_fits() -> None:
    values = request(model="megatron-1008b", workload={"seq_len": 2048, "global_batch_size": 1}, num_devices=1)
    plan = estimate(values)
    assert find_remedies(build_request(values)) == []
    assert "Nothing tried fits" in render_remedies(plan, [], 80)
