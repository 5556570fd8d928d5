"""Advice: the budget is spent, no neighbouring size is better, and serving makes models smaller."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from planner import build_request
from planner.advice import Advice, Budget, advise
from planner.cli import app
from planner.errors import InputError
from planner.units import DAY_S

REQUEST: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "workload": {"seq_len": 4096, "global_batch_size": 512},
    "cluster": {"accelerator": "h100-80gb-sxm", "num_devices": 64, "price": "2 USD/h"},
}


@pytest.fixture(scope="module")
def by_flops() -> Advice:
    return advise(build_request(REQUEST), Budget(flops=1e22))


def test_flops_are_spent_about_as_chinchilla_says(by_flops: Advice) -> None:
    best = by_flops.choices[by_flops.best]
    assert best.plan.flops.model_per_token * best.tokens == pytest.approx(1e22, rel=1e-6)
    assert 10 < best.tokens_per_param < 45
    assert 0 < by_flops.best < len(by_flops.choices) - 1
    assert all(choice.loss >= best.loss for choice in by_flops.choices)


def test_money_and_days_are_spent() -> None:
    paid = advise(build_request(REQUEST), Budget(usd=20_000))
    cost = paid.choices[paid.best].plan.cost.usd
    assert cost is not None
    assert cost.value == pytest.approx(20_000, rel=0.01)
    timed = advise(build_request(REQUEST), Budget(num_days=5))
    assert timed.choices[timed.best].plan.time.train_s.value == pytest.approx(5 * DAY_S, rel=0.01)


def test_a_model_that_serves_much_is_smaller_and_trained_longer(by_flops: Advice) -> None:
    """arXiv:2401.00448."""
    served = advise(build_request(REQUEST), Budget(flops=1e22), inference_tokens=5e11)
    alone, best = by_flops.choices[by_flops.best], served.choices[served.best]
    assert best.params < alone.params
    assert best.plan.flops.model_per_token * best.tokens + best.inference_flops == pytest.approx(1e22, rel=1e-6)


@pytest.mark.parametrize("budget", [Budget(), Budget(usd=1.0, flops=1.0), Budget(flops=-1.0)])
def test_wrong_budgets_are_refused(budget: Budget) -> None:
    with pytest.raises(InputError):
        advise(build_request(REQUEST), budget)


def test_the_command() -> None:
    base = ["advise", "--accelerator", "h100", "--num-devices", "64", "--seq-len", "4096"]
    result = CliRunner().invoke(app, [*base, "--flops", "1e22", "--json"])
    assert result.exit_code == 0
    assert {"best", "choices", "law"} <= set(json.loads(result.stdout))
    assert isinstance(CliRunner().invoke(app, [*base, "--budget", "1M"]).exception, InputError)
