"""What must hold for every plan, whatever the model, the layout, the stack and the hardware."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from planner.estimate import estimate
from planner.files import parse_yaml
from planner.plan import Plan, build_request
from tests.strategies import is_legal, requests, with_layout

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
STATES = ("weights", "optimizer")
"""What is there at every instant; gradients that are made late are not all alive at the peak."""
COMMUNICATION = ("tensor_parallel", "context_parallel", "expert_parallel", "fsdp", "pipeline_transfer_and_bubble", "data_parallel")
ROUNDING = 1 + 1e-9


def states(plan: Plan) -> list[float]:
    return [sum(stage.breakdown_bytes[name] for name in STATES) for stage in plan.memory.stages]


def formulas_s(plan: Plan) -> float:
    """The step before measured runs correct it: what obeys physics exactly."""
    return plan.time.step_s.value - plan.time.breakdown_s["correction"]


@quick
@given(requests())
def test_parts_add_up_to_the_total(request: dict[str, Any]) -> None:
    plan = estimate(request)
    for stage in plan.memory.stages:
        assert sum(stage.breakdown_bytes.values()) == pytest.approx(stage.total_bytes, rel=1e-12)
        assert all(value >= 0 for value in stage.breakdown_bytes.values())
    assert plan.memory.peak_bytes.value == max(stage.total_bytes for stage in plan.memory.stages)
    assert sum(plan.time.breakdown_s.values()) == pytest.approx(plan.time.step_s.value, rel=1e-12)
    # What measured runs say beyond the formulas may be less.
    assert all(value >= -1e-12 * plan.time.step_s.value for name, value in plan.time.breakdown_s.items() if name != "correction")
    assert plan.time.step_s.low <= plan.time.step_s.value <= plan.time.step_s.high
    assert plan.fits == (plan.memory.peak_bytes.value <= plan.memory.usable_bytes)


@quick
@given(requests(tp=1, ep=1, zero_stage=3, stack="torchtitan"))
def test_weights_of_all_devices_add_up_to_the_model_where_nothing_is_copied(request: dict[str, Any]) -> None:
    assume(request["layout"]["schedule"] != "dualpipe" and not request["model"]["tie_word_embeddings"])
    plan = estimate(request)
    layout = plan.layout
    per_replica = sum(stage.breakdown_bytes["weights"] for stage in plan.memory.stages) * layout.dp_shard * layout.cp
    assert per_replica == pytest.approx(4.0 * plan.params.total, rel=1e-12)


@quick
@given(requests())
def test_more_tensor_parallelism_never_raises_weight_bytes(request: dict[str, Any]) -> None:
    more = with_layout(request, tp=2 * request["layout"]["tp"])
    assume(is_legal(more))
    before, after = estimate(request), estimate(more)
    for one, two in zip(before.memory.stages, after.memory.stages, strict=True):
        # Whole experts stay on their rank when ep > 1: equal, never more.
        assert two.breakdown_bytes["weights"] <= one.breakdown_bytes["weights"] * ROUNDING


@quick
@given(requests())
def test_never_faster_than_the_peak_allows(request: dict[str, Any]) -> None:
    plan = estimate(request)
    tokens = request["workload"]["global_batch_size"] * request["workload"]["seq_len"]
    least_s = plan.flops.model_per_token_causal * tokens / (plan.layout.num_devices * plan.time.peak_flops_per_s)
    assert plan.time.step_s.value >= least_s
    assert plan.time.mfu_causal <= 1
    assert plan.time.mfu_causal <= plan.time.mfu * ROUNDING


@quick
@given(requests(dp_replicate=1, dp_shard=1, tp=1, cp=1, pp=1, ep=1, num_virtual_stages=1, schedule="1f1b", zero_stage=0))
def test_one_device_talks_to_nobody(request: dict[str, Any]) -> None:
    plan = estimate(request)
    for name in COMMUNICATION:  # the bubble is a difference of two equal sums
        assert abs(plan.time.breakdown_s[name]) <= 1e-12 * plan.time.step_s.value
    assert plan.memory.breakdown_bytes["communication_buffers"] == 0
    assert plan.memory.breakdown_bytes["gathered_weights"] == 0


@quick
@given(requests(dp_replicate=1), st.data())
def test_zero_never_raises_states(request: dict[str, Any], data: st.DataObject) -> None:
    ranks = request["layout"]["dp_shard"]
    plain = with_layout(request, zero_stage=0, dp_replicate=ranks, dp_shard=1)
    assume(is_legal(plain))
    held = [states(estimate(plain))] + [states(estimate(with_layout(request, zero_stage=stage))) for stage in (1, 2, 3)]
    for more, less in pairwise(held):
        assert all(a <= b * ROUNDING for a, b in zip(less, more, strict=True))


@quick
@given(requests())
def test_recompute_trades_activations_for_time(request: dict[str, Any]) -> None:
    plans = [estimate(request | {"workload": request["workload"] | {"recompute": policy}}) for policy in ("none", "selective", "full")]
    for less, more in pairwise(plans):
        for one, two in zip(less.memory.stages, more.memory.stages, strict=True):
            assert two.breakdown_bytes["activations"] <= one.breakdown_bytes["activations"] * ROUNDING
        assert formulas_s(more) >= formulas_s(less) / ROUNDING
        assert more.flops.hardware_per_token >= less.flops.hardware_per_token / ROUNDING
    assert plans[0].flops.model_per_token == plans[2].flops.model_per_token


@quick
@given(requests())
def test_more_microbatches_never_need_less_memory_or_time(request: dict[str, Any]) -> None:
    layout = request["layout"]
    count = request["workload"]["global_batch_size"] // (layout["dp_replicate"] * layout["dp_shard"] * layout["micro_batch_size"])
    more = with_layout(request, num_microbatches=2 * count)
    assume(is_legal(more))
    before, after = estimate(request), estimate(more)
    for one, two in zip(before.memory.stages, after.memory.stages, strict=True):
        assert two.total_bytes >= one.total_bytes / ROUNDING
    assert after.time.step_s.value >= before.time.step_s.value


@quick
@given(requests())
def test_a_plan_written_and_read_is_the_same_plan(request: dict[str, Any]) -> None:
    plan = estimate(request)
    again = estimate(build_request(parse_yaml(plan.to_yaml())))
    assert again.inputs == plan.inputs
    assert again.to_dict() == plan.to_dict()
