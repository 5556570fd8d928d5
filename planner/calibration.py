"""Runs -> a stack whose predictions fit them: coefficients, intervals, and errors on runs that were left out of the fit.

A step's seconds are a sum over kinds of work, each divided by one coefficient of the stack, and a rest that no coefficient divides. The fit
scales those coefficients towards the runs, and stays near where it started for kinds that the runs say little about.
"""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from planner.errors import InputError, Problem
from planner.estimate import estimate
from planner.files import to_json, to_yaml, write_text
from planner.plan import Plan, Request, build_request
from planner.run_files import read_plan, read_summary
from planner.spec import build
from planner.stack import StackSpec, load_stack

__all__ = ["Calibration", "Run", "calibrate", "read_run"]

KINDS = ("matmul", "attention", "memory", "communication")
"""Coefficients of a stack that divide seconds of a step; `matmul` stands for those of single accelerators too."""
NUDGE_FRACTION = 0.01
"""How much slower one kind is made to see how many seconds of a step it divides."""
PRIOR_WEIGHT = 0.02
"""Weight of staying where one was, against the mean squared relative error of the runs; chosen on no run: a fifth of a kind's time may
move freely when ten runs ask for it."""
LEAST_FACTOR, MOST_FACTOR = 0.2, 5.0
LEAST_RUNS = 3
INTERVAL_PERCENTILES = (10.0, 90.0)
LEAST_INTERVAL_FRACTION = 0.03
"""An interval from a handful of residuals is never narrower than this on either side."""


@dataclass(frozen=True)
class Run:
    """One measured run."""

    name: str
    request: Request
    step_s: float
    peak_bytes: float


@dataclass(frozen=True)
class Calibration:
    """The fitted stack and how well it does."""

    stack: dict[str, Any]
    factors: dict[str, float]
    """Time factor of each kind: 1.1 means that it takes 10% longer than predicted before."""
    rows: tuple[dict[str, Any], ...]
    """Per run: predicted step before, after, and by a fit without this run; measured."""
    median_error_before_fraction: float
    median_error_after_fraction: float
    median_error_left_out_fraction: float

    def save(self, path: str | Path) -> None:
        """Writes the stack file."""
        write_text(path, to_yaml(self.stack))

    def to_dict(self) -> dict[str, Any]:
        """The object that `calibrate --json` prints."""
        return {
            "schema_version": 1, "stack": self.stack["name"], "factors": self.factors, "rows": list(self.rows),
            "median_abs_error_fraction": {
                "before": self.median_error_before_fraction, "after": self.median_error_after_fraction,
                "left_out": self.median_error_left_out_fraction,
            },
        }  # fmt: skip


def read_run(folder: str | Path) -> Run:
    """A run that `reftrain run` finished.

    Raises:
        InputError: no such run, or one without timed steps.
    """
    folder = Path(folder)
    plan, summary = read_plan(folder), read_summary(folder)
    if summary.step_s is None or summary.peak_bytes is None:
        raise InputError.single("RUN_DIR", str(folder), "the run has no timed steps", "run it for at least 10 steps")
    return Run(str(folder), build_request(plan, str(folder / "plan.yaml")), summary.step_s.median, summary.peak_bytes)


def calibrate(runs: Sequence[Run], stack_name: str | None = None, name: str | None = None) -> Calibration:
    """Fits a stack to runs.

    Formula: minimizes mean(((r_i + sum_k x_k t_ik) / y_i - 1)^2) + PRIOR_WEIGHT * mean((x_k - 1)^2) over the time factors x_k of the kinds
    k, with y_i the measured seconds of run i, t_ik those predicted for kind k and r_i those that no kind divides; a coefficient becomes the old
    one over x_k.
    The interval is the 10th to 90th percentile of measured over predicted, each predicted by a fit without the runs of that configuration.
    t_ik is the change of the predicted step per relative change of x_k, so that work done again, overheads and overlap count as they are
    priced. It is taken where the old stack stands; the errors that are reported come from whole predictions by the new one.

    Args:
        stack_name: the stack to start from; None: the runs' own.
        name: of the new stack; None: the old one's with `-calibrated`.

    Raises:
        InputError: fewer than three configurations, a run named twice, or runs of several stacks.
    """
    _check_runs(runs)
    plans = [_estimate(run, stack_name) for run in runs]
    start, groups = _common_stack(plans), _configurations(plans)
    old = load_stack(start)
    before = np.array([plan.time.step_s.value for plan in plans])
    measured, times = np.array([run.step_s for run in runs]), _seconds_by_kind(runs, before, old)
    rest = before - times.sum(axis=1)
    factors = _fit(times, rest, measured)
    after = _predict(runs, old, factors)
    left_out = np.empty(len(runs))
    for group in set(groups):
        own = groups == group
        fitted = _fit(times[~own], rest[~own], measured[~own])
        left_out[own] = _predict([run for run, is_own in zip(runs, own, strict=True) if is_own], old, fitted)
    memory = np.array([run.peak_bytes / plan.memory.peak_bytes.value for run, plan in zip(runs, plans, strict=True)])
    stack = _new_stack(old, name or f"{start}-calibrated", factors, measured / left_out, memory, runs)
    rows = tuple(
        {"run": run.name, "measured_step_s": run.step_s, "before_step_s": float(b), "after_step_s": float(a), "left_out_step_s": float(o)}
        for run, b, a, o in zip(runs, before, after, left_out, strict=True)
    )
    errors = [float(np.median(np.abs(predicted / measured - 1))) for predicted in (before, after, left_out)]
    return Calibration(stack, dict(zip(KINDS, map(float, factors), strict=True)), rows, *errors)


def _check_runs(runs: Sequence[Run]) -> None:
    """Enough runs, each counted once."""
    names = [str(Path(run.name).resolve()) for run in runs]
    problems = [
        Problem("RUN_DIR", run.name, "is named twice", "name each run once")
        for i, (run, name) in enumerate(zip(runs, names, strict=True))
        if name in names[:i]
    ]
    if len(runs) < LEAST_RUNS:
        problems.append(Problem("RUN_DIR", len(runs), f"a fit needs at least {LEAST_RUNS} runs", "measure more, of different sizes"))
    if problems:
        raise InputError(*problems)


def _configurations(plans: Sequence[Plan]) -> np.ndarray:
    """A number per run, the same for runs that differ in nothing that is priced per step: one tells what the other measured."""
    keys = []
    for plan in plans:
        workload = {key: value for key, value in plan.inputs["workload"].items() if key != "tokens"}
        keys.append(to_json([plan.inputs["model"], workload, plan.inputs["cluster"], plan.inputs["layout"]]))
    distinct = sorted(set(keys))
    if len(distinct) < LEAST_RUNS:
        rule = f"a fit needs at least {LEAST_RUNS} different configurations, and these {len(plans)} runs are of {len(distinct)}"
        raise InputError.single("RUN_DIR", len(distinct), rule, "measure other sizes, lengths or layouts")
    return np.array([distinct.index(key) for key in keys])


def _estimate(run: Run, stack: str | None) -> Plan:
    return estimate(run.request if stack is None else run.request.model_copy(update={"stack": stack}))


def _predict(runs: Sequence[Run], old: StackSpec, factors: np.ndarray) -> np.ndarray:
    """Predicted seconds of one step, [runs], by the old stack with these time factors."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/scaled.yaml"
        write_text(path, to_yaml(_scaled(old, factors, "assumed", "a step of the fit")))
        return np.array([_estimate(run, path).time.step_s.value for run in runs])


def _seconds_by_kind(runs: Sequence[Run], before: np.ndarray, old: StackSpec) -> np.ndarray:
    """Predicted seconds of one step that each coefficient divides, [runs, kinds]."""
    nudged = [_predict(runs, old, 1 + NUDGE_FRACTION * unit) for unit in np.eye(len(KINDS))]
    seconds: np.ndarray = (np.array(nudged).T - before[:, None]) / NUDGE_FRACTION
    return seconds


def _common_stack(plans: Sequence[Plan]) -> str:
    names = sorted({str(plan.inputs["stack"]) for plan in plans})
    if len(names) > 1:
        raise InputError.single("RUN_DIR", names, "the runs name several stacks", "name one with --stack, or calibrate them apart")
    return names[0]


def _fit(times: np.ndarray, rest: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Time factors, [kinds]: ridge regression towards 1 on relative errors, inside bounds: the best of all ways to hold some at a bound."""
    design, target = times / measured[:, None], 1 - rest / measured
    num_runs, num_kinds = design.shape
    gram = design.T @ design / num_runs + PRIOR_WEIGHT / num_kinds * np.eye(num_kinds)
    goal = design.T @ target / num_runs + PRIOR_WEIGHT / num_kinds
    best, least = np.ones(num_kinds), np.inf
    for bounds in product((None, LEAST_FACTOR, MOST_FACTOR), repeat=num_kinds):  # 81 of them: the bounded optimum exactly
        free = [k for k, bound in enumerate(bounds) if bound is None]
        factors = np.array([1.0 if bound is None else bound for bound in bounds])
        held = [k for k in range(num_kinds) if k not in free]
        factors[free] = np.linalg.solve(gram[np.ix_(free, free)], goal[free] - gram[np.ix_(free, held)] @ factors[held])
        value = factors @ gram @ factors / 2 - goal @ factors
        if value < least and np.all((factors >= LEAST_FACTOR) & (factors <= MOST_FACTOR)):
            best, least = factors, value
    return best


def _scaled(old: StackSpec, factors: np.ndarray, evidence: str, source: str) -> dict[str, Any]:
    """The old stack's file with each rate divided by the time factor of its kind."""
    values = old.model_dump(exclude_none=True, by_alias=True)
    rates = {kind: 1.0 if values.get(kind) is None else values[kind]["value"] for kind in KINDS}
    origin = {"evidence": evidence, "source": source}
    values |= {kind: {"value": float(rates[kind] / factor), **origin} for kind, factor in zip(KINDS, factors, strict=True)}
    values["matmul_per_device"] = {
        device: {"value": float(rate.value / factors[KINDS.index("matmul")]), **origin} for device, rate in old.matmul_per_device.items()
    }
    sizes = {key: f"{values.pop(key)!r} B" for key in ("context", "collective_buffers", "workspace") if values[key]}
    values.pop("workspace", None)  # none: the default, which no text with a unit may say
    return values | {"kernel_overhead": f"{old.kernel_overhead!r} s", **sizes}


def _new_stack(
    old: StackSpec, name: str, factors: np.ndarray, time_ratio: np.ndarray, memory_ratio: np.ndarray, runs: Sequence[Run]
) -> dict[str, Any]:
    """The old stack's file with new coefficients and intervals."""
    today = datetime.date.today().isoformat()
    source = f"fitted to {len(runs)} runs on {today}, from the stack {old.name}"
    values = _scaled(old, factors, "fitted", source)
    values |= {"name": name, "description": f"{old.description}, calibrated", "source": source, "date": today}
    spread_source = f"10th and 90th percentile of measured over predicted in {len(runs)} runs, each left out of its own fit ({today})"
    values["time_interval"] = _spread(time_ratio, spread_source)
    values["memory_interval"] = _spread(memory_ratio, f"10th and 90th percentile of measured over predicted in {len(runs)} runs ({today})")
    build(StackSpec, values, "stack")
    return values


def _spread(ratios: np.ndarray, source: str) -> dict[str, Any]:
    low, high = np.percentile(ratios, INTERVAL_PERCENTILES)
    bounds = {"low": min(float(low), 1 - LEAST_INTERVAL_FRACTION), "high": max(float(high), 1 + LEAST_INTERVAL_FRACTION)}
    return {**bounds, "evidence": "fitted", "source": source}
