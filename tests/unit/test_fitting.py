"""The fit of coefficients: batches against single steps, what it finds, what it leaves alone, and that nothing depends on chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from planner.cases import Measured, measure_request
from planner.coefficients import TERMS, Coefficients
from planner.fitting import NAMES, Level, Limits, fit_cases, make_batches, on_scale, predict_s, term_values
from planner.plan import build_request
from planner.stack import load_stack, stack_names
from planner.timing import time_step

LAYOUTS: tuple[dict[str, Any], ...] = (
    {"dp_shard": 8, "zero_stage": 3}, {"dp_shard": 4, "tp": 2, "zero_stage": 1, "sequence_parallel": True}, {"dp_replicate": 8, "zero_stage": 0},
    {"dp_shard": 2, "pp": 4, "zero_stage": 1}, {"dp_shard": 2, "pp": 4, "num_virtual_stages": 2, "schedule": "interleaved_1f1b", "zero_stage": 1},
    {"dp_shard": 4, "cp": 2, "zero_stage": 1},
)  # fmt: skip
MODELS = ("llama-3.2-1b", "gpt3-1.3b", "qwen3-30b-a3b")


def steps() -> list[Measured]:
    found = []
    for model in MODELS:
        for i, layout in enumerate(LAYOUTS):
            for precision in ("bf16", "fp8"):
                for recompute in ("none", "full"):
                    request = {
                        "model": model,
                        "workload": {"seq_len": 2048, "global_batch_size": 64, "tokens": 1e9, "precision": precision, "recompute": recompute},
                        "cluster": {"accelerator": "h100-80gb-sxm", "num_devices": 8},
                        "stack": "megatron-core",
                        "layout": {"ep": 1, "micro_batch_size": 1 + i % 2, **layout},
                    }
                    found.append(measure_request(f"{model} {i} {precision} {recompute}", build_request(request), 1.0, None))
    return found


@pytest.fixture(scope="module")
def cases() -> list[Measured]:
    return steps()


def everywhere(**values: float) -> np.ndarray:
    """The table's values on the scale of the fit, some of them changed."""
    return on_scale([values.get(name, TERMS[name].value) for name in NAMES])


def test_batches_predict_what_single_steps_do(cases: list[Measured]) -> None:
    """Parts, messages and stages of unlike models are padded: nothing may leak from one run into another."""
    numbers = np.random.default_rng(0)
    theta = np.array([everywhere() for _ in cases]) + numbers.normal(0, 0.1, (len(cases), len(NAMES)))
    limits = Limits.physical()
    together = predict_s(make_batches([case.work for case in cases]), theta, limits)
    for case, row, seconds in zip(cases, term_values(theta, limits), together, strict=True):
        alone = time_step(case.work, Coefficients(**dict(zip(NAMES, row.tolist(), strict=True)))).step_s
        assert seconds == pytest.approx(float(alone), rel=1e-12)


def test_the_fit_predicts_runs_it_did_not_see_of_a_stack_with_other_coefficients(cases: list[Measured]) -> None:
    limits, batches = Limits.physical(), make_batches([case.work for case in cases])
    true = np.tile(everywhere(matmul=0.62, memory=0.5, tensor_parallel_overlap=0.6, scale_up=0.5, launch=2e-5, expert_host=2e-3), (len(cases), 1))
    measured_s = predict_s(batches, true, limits)
    is_seen = np.arange(len(cases)) % 3 != 0
    levels = [Level("stack", ("all",) * len(cases), NAMES)]
    before = np.abs(predict_s(batches, np.tile(everywhere(), (len(cases), 1)), limits) / measured_s - 1)[~is_seen]
    fit = fit_cases(batches, measured_s, is_seen.astype(float), levels)
    after = np.abs(predict_s(batches, fit.theta, limits) / measured_s - 1)[~is_seen]
    assert np.median(before) > 0.15, "there was something to find"
    assert np.median(after) < 0.015
    assert np.max(after) < 0.06


def test_a_run_that_is_wrong_pulls_little(cases: list[Measured]) -> None:
    limits, batches = Limits.physical(), make_batches([case.work for case in cases])
    measured_s = predict_s(batches, np.tile(everywhere(matmul=0.7), (len(cases), 1)), limits)
    levels, ones = [Level("stack", ("all",) * len(cases), NAMES)], np.ones(len(cases))
    clean = predict_s(batches, fit_cases(batches, measured_s, ones, levels).theta, limits)
    spoilt = measured_s.copy()
    spoilt[5] *= 4
    moved = predict_s(batches, fit_cases(batches, spoilt, ones, levels).theta, limits)
    assert np.max(np.abs(moved / clean - 1)) < 0.03


def test_terms_that_no_run_has_stay_and_none_leaves_its_bounds(cases: list[Measured]) -> None:
    limits = Limits.physical()
    dense = [case for case in cases if case.name.startswith("llama")]
    batches = make_batches([case.work for case in dense])
    measured_s = 50 * predict_s(batches, np.tile(everywhere(), (len(dense), 1)), limits)
    fit = fit_cases(batches, measured_s, np.ones(len(dense)), [Level("stack", ("all",) * len(dense), NAMES)])
    added, told = fit.of("stack", "all"), fit.told("stack", "all")
    for name in ("grouped_matmul", "expert_host", "nvfp4_matmul", "expert_parallel_overlap"):
        assert added[name] == pytest.approx(0, abs=1e-9)
        assert told[name][0] == pytest.approx(0, abs=1e-9)
        assert len(told[name][1]) == 0
    values = dict(zip(NAMES, term_values(fit.theta, limits)[0].tolist(), strict=True))
    for name, term in TERMS.items():
        assert term.low * (1 - 1e-9) <= values[name] <= term.high * (1 + 1e-9)


def test_what_constrains_a_term_is_named(cases: list[Measured]) -> None:
    """Only runs with context parallelism say anything about its overlap."""
    batches = make_batches([case.work for case in cases])
    measured_s = predict_s(batches, np.tile(everywhere(context_parallel_overlap=0.3), (len(cases), 1)), Limits.physical())
    fit = fit_cases(batches, measured_s, np.ones(len(cases)), [Level("stack", ("all",) * len(cases), NAMES)])
    share, order = fit.told("stack", "all")["context_parallel_overlap"]
    assert share > 0
    assert {int(cases[i].graph.layout.cp) for i in order} == {2}


def test_the_fit_is_the_same_every_time(cases: list[Measured]) -> None:
    batches = make_batches([case.work for case in cases])
    measured_s = np.random.default_rng(1).uniform(0.8, 1.2, len(cases)) * predict_s(
        batches, np.tile(everywhere(), (len(cases), 1)), Limits.physical()
    )
    levels = [Level("shared", ("all",) * len(cases), NAMES, 0.5), Level("model", tuple(case.name.split()[0] for case in cases), NAMES)]
    first, second = (fit_cases(batches, measured_s, np.ones(len(cases)), levels) for _ in range(2))
    assert np.array_equal(first.theta, second.theta)


@pytest.mark.parametrize("name", stack_names())
def test_shipped_coefficients_are_physical(name: str) -> None:
    stack = load_stack(name)
    for given in (stack.coefficients, *stack.devices.values()):
        for term, coefficient in given.items():
            assert TERMS[term].low * 0.999 <= coefficient.value <= TERMS[term].high * 1.001, term


def test_the_table_and_the_record_of_coefficients_agree() -> None:
    assert tuple(Coefficients.__dataclass_fields__) == tuple(TERMS)
    for term in TERMS.values():
        assert term.low <= term.value <= term.high
        assert term.spread_factor > 0
