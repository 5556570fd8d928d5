"""A law is not asked where its answer would be worse than guessing."""

from __future__ import annotations

import math

import pytest

from planner.estimate import estimate
from planner.plan import build_request


@pytest.mark.parametrize(("tokens", "is_predicted"), [(1.0, False), (1e5, False), (1e11, True)])
def test_no_loss_above_that_of_guessing(tokens: float, is_predicted: bool) -> None:
    workload = {"seq_len": 1024, "global_batch_size": 8, "tokens": tokens, "precision": "bf16"}
    cluster = {"accelerator": "h100-80gb-sxm", "num_devices": 1}
    plan = estimate(build_request({"schema_version": 1, "model": "smollm-135m", "workload": workload, "cluster": cluster, "stack": "torchtitan"}))
    assert (plan.loss is not None) is is_predicted
    if plan.loss is None:
        assert any("more than guessing costs, 10.8 among 49,152 tokens" in note for note in plan.assumptions)
    else:
        assert plan.loss.nats_per_token.value < math.log(49152)
