"""Measured steps -> a stack whose predictions fit them: coefficients, intervals, and errors on steps that were left out of the fit.

The coefficients start where the old stack has them, and move as far as the steps ask for and their spreads and bounds allow: terms that
the steps say little about stay where they were.
"""

from __future__ import annotations

import datetime
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from planner.cases import Measured
from planner.coefficients import TERMS
from planner.errors import InputError, Problem
from planner.estimate import estimate
from planner.files import to_yaml, write_text
from planner.fitting import (
    NAMES,
    OWN_NOISE_FRACTION,
    PUBLISHED_NOISE_FRACTION,
    Batch,
    Fit,
    Level,
    Limits,
    fit_cases,
    make_batches,
    on_scale,
    predict_s,
    term_values,
)
from planner.spec import build
from planner.stack import StackSpec, load_stack

__all__ = ["DIGITS", "INTERVAL_PERCENTILES", "TOLD_SHARE", "Calibration", "calibrate", "fold_of", "left_out_s", "stack_text"]

LEAST_RUNS = 3
MOST_FOLDS = 10
INTERVAL_PERCENTILES = (10.0, 90.0)
LEAST_INTERVAL_FRACTION = 0.03
"""An interval from a handful of residuals is never narrower than this on either side."""
TOLD_SHARE = 0.1
"""A coefficient counts as constrained when so much of what is known about it comes from the steps."""
SHOWN_STEPS = 3
DIGITS = 4


@dataclass(frozen=True)
class Calibration:
    """The fitted stack and how well it does."""

    stack: dict[str, Any]
    coefficients: dict[str, dict[str, Any]]
    """Term -> before, after, share of it that the steps told, at_bound, and the steps that told most."""
    rows: tuple[dict[str, Any], ...]
    """Per step: predicted before, after, and by a fit without its group; measured."""
    ranges: dict[str, tuple[float, float]]
    """What the steps span; a prediction outside extrapolates."""
    median_error_before_fraction: float
    median_error_after_fraction: float
    median_error_left_out_fraction: float

    def save(self, path: str | Path) -> None:
        """Writes the stack file."""
        write_text(path, to_yaml(self.stack))

    def to_dict(self) -> dict[str, Any]:
        """The object that `calibrate --json` prints."""
        return {
            "schema_version": 1, "stack": self.stack["name"], "coefficients": self.coefficients, "rows": list(self.rows), "ranges": self.ranges,
            "median_abs_error_fraction": {
                "before": self.median_error_before_fraction, "after": self.median_error_after_fraction,
                "left_out": self.median_error_left_out_fraction,
            },
        }  # fmt: skip


def calibrate(steps: Sequence[Measured], stack_name: str | None = None, name: str | None = None) -> Calibration:
    """Fits a stack to measured steps.

    The intervals are the 10th to 90th percentile of measured over predicted, each predicted by a fit without the steps of its group.

    Args:
        steps: made with the stack to start from.
        stack_name: that stack; None: the steps' own.
        name: of the new one; None: the old one's with `-calibrated`.

    Raises:
        InputError: fewer than three groups, a step named twice, or steps of several stacks.
    """
    _check(steps)
    old = load_stack(stack_name or steps[0].request.stack or steps[0].job.stack.name)
    batches, measured_s = make_batches([step.work for step in steps]), np.array([step.step_s for step in steps])
    start = np.array([start_of(old, step.job.cluster.accelerator.id) for step in steps])
    has_curves = any(step.job.cluster.accelerator.id in old.measured for step in steps)
    limits = Limits.of_measured_device() if has_curves else Limits.physical()
    levels = [Level("stack", ("all",) * len(steps), tuple(name for name in NAMES if np.all(start[:, NAMES.index(name)] > np.log(1e-9))))]
    weight = np.array([step.weight_factor for step in steps])
    noise = OWN_NOISE_FRACTION if all(step.peak_bytes is not None for step in steps) else PUBLISHED_NOISE_FRACTION
    fit = fit_cases(batches, measured_s, weight, levels, start, limits, noise)
    before_s, after_s = predict_s(batches, start, limits), predict_s(batches, fit.theta, limits)
    left_s = left_out_s(batches, measured_s, weight, levels, start, limits, [step.group for step in steps], noise_fraction=noise)
    memory = np.array([step.peak_bytes / estimate(step.request).memory.peak_bytes.value for step in steps if step.peak_bytes is not None])
    stack = _new_stack(old, name or f"{old.name}-calibrated", fit, limits, measured_s / left_s, memory, steps)
    rows = tuple(
        {"run": step.name, "measured_step_s": step.step_s, "before_step_s": float(b), "after_step_s": float(a), "left_out_step_s": float(o)}
        for step, b, a, o in zip(steps, before_s, after_s, left_s, strict=True)
    )
    errors = [float(np.median(np.abs(predicted / measured_s - 1))) for predicted in (before_s, after_s, left_s)]
    return Calibration(stack, _coefficients(fit, limits, old, steps), rows, _ranges(steps), *errors)


def start_of(stack: StackSpec, accelerator: str) -> np.ndarray:
    """Values of all terms of a stack on an accelerator, on the scale of the fit."""
    return on_scale([stack.coefficient(name, accelerator).value for name in NAMES])


def left_out_s(
    batches: Sequence[Batch],
    measured_s: np.ndarray,
    weight: np.ndarray,
    levels: Sequence[Level],
    start: np.ndarray | None,
    limits: Limits,
    groups: Sequence[Hashable],
    num_folds: int = MOST_FOLDS,
    noise_fraction: float = PUBLISHED_NOISE_FRACTION,
) -> np.ndarray:
    """Seconds of every step, predicted by a fit that saw no step of its group."""
    folds, predicted = fold_of(groups, num_folds), np.empty(len(measured_s))
    for fold in np.unique(folds):
        fit = fit_cases(batches, measured_s, np.where(folds == fold, 0.0, weight), levels, start, limits, noise_fraction)
        predicted[folds == fold] = predict_s(batches, fit.theta, limits)[folds == fold]
    return predicted


def fold_of(groups: Sequence[Hashable], num_folds: int) -> np.ndarray:
    """A fold for every step, the same for all steps of a group; groups are dealt out in an order that does not depend on the table's."""
    distinct = sorted(set(groups), key=str)
    dealt = np.random.default_rng(0).permutation(len(distinct)) % num_folds
    place = dict(zip(distinct, dealt.tolist(), strict=True))
    return np.array([place[group] for group in groups])


def _check(steps: Sequence[Measured]) -> None:
    """Enough steps, each counted once, all of one stack."""
    names = [str(Path(step.name).resolve()) for step in steps]
    problems = [
        Problem("RUN_DIR", step.name, "is named twice", "name each run once")
        for i, (step, name) in enumerate(zip(steps, names, strict=True))
        if name in names[:i]
    ]
    if len(steps) < LEAST_RUNS:
        problems.append(Problem("RUN_DIR", len(steps), f"a fit needs at least {LEAST_RUNS} runs", "measure more, of different sizes"))
    if problems:
        raise InputError(*problems)
    groups = len({step.group for step in steps})
    if groups < LEAST_RUNS:
        rule = f"a fit needs at least {LEAST_RUNS} different configurations, and these {len(steps)} runs are of {groups}"
        raise InputError.single("RUN_DIR", groups, rule, "measure other sizes, lengths or layouts")
    stacks = sorted({step.request.stack or step.job.stack.name for step in steps})
    if len(stacks) > 1:
        raise InputError.single("RUN_DIR", stacks, "the runs name several stacks", "name one with --stack, or calibrate them apart")


def _coefficients(fit: Fit, limits: Limits, old: StackSpec, steps: Sequence[Measured]) -> dict[str, dict[str, Any]]:
    """What became of each term."""
    first, found = steps[0].job.cluster.accelerator.id, {}
    after = dict(zip(NAMES, term_values(fit.theta[:1], limits)[0].tolist(), strict=True))
    for name, (share, order) in fit.told("stack", "all").items():
        k = NAMES.index(name)
        found[name] = {
            "before": old.coefficient(name, first).value,
            "after": after[name],
            "told_share": float(share),
            "at_bound": bool(fit.theta[0, k] <= limits.low[k] or fit.theta[0, k] >= limits.high[k]),
            "told_by": [steps[i].name for i in order[:SHOWN_STEPS]] if share >= TOLD_SHARE else [],
        }
    return found


def _ranges(steps: Sequence[Measured]) -> dict[str, tuple[float, float]]:
    """What the steps span."""
    spans = {
        "num_devices": [step.job.cluster.num_devices for step in steps],
        "hidden_size": [step.job.model.hidden_size for step in steps],
        "num_layers": [step.job.model.num_layers for step in steps],
        "seq_len": [step.job.seq_len for step in steps],
        "micro_batch_size": [int(np.max(step.graph.layout.micro_batch_size)) for step in steps],
    }
    return {name: (float(min(values)), float(max(values))) for name, values in spans.items()}


def stack_text(stack: StackSpec) -> dict[str, Any]:
    """A stack as its file has it, sizes with units."""
    values = stack.model_dump(exclude_none=True, by_alias=True)
    sizes = {key: f"{values.pop(key)!r} B" for key in ("context", "collective_buffers", "workspace") if values[key]}
    values.pop("workspace", None)  # none: the default, which no text with a unit may say
    return values | sizes


def _new_stack(
    old: StackSpec, name: str, fit: Fit, limits: Limits, time_ratio: np.ndarray, memory_ratio: np.ndarray, steps: Sequence[Measured]
) -> dict[str, Any]:
    """The old stack's file with new coefficients and intervals."""
    today = datetime.date.today().isoformat()
    source = f"fitted to {len(steps)} runs on {today}, from the stack {old.name}"
    values = stack_text(old)
    added = fit.of("stack", "all")
    places: list[tuple[dict[str, Any], list[str]]] = [(values["coefficients"], list(added))]
    places += [(values["devices"][device], [term for term in own if term in added]) for device, own in old.devices.items()]
    for place, terms in places:
        for term in terms:
            known = place.get(term, {"value": TERMS[term].value})["value"]
            theta = on_scale([known] * len(NAMES))
            theta[NAMES.index(term)] += added[term]
            value = float(term_values(theta[None], limits)[0, NAMES.index(term)])
            place[term] = {"value": value, "evidence": "fitted", "source": source}
    values |= {"name": name, "description": f"{old.description}, calibrated", "source": source, "date": today}
    spread_source = f"10th and 90th percentile of measured over predicted in {len(steps)} runs, each left out of its own fit ({today})"
    values["time_interval"] = _spread(time_ratio, spread_source)
    if len(memory_ratio):
        values["memory_interval"] = _spread(
            memory_ratio, f"10th and 90th percentile of measured over predicted in {len(memory_ratio)} runs ({today})"
        )
    build(StackSpec, values, "stack")
    return values


def _spread(ratios: np.ndarray, source: str) -> dict[str, Any]:
    low, high = np.percentile(ratios, INTERVAL_PERCENTILES)
    bounds = {"low": min(float(low), 1 - LEAST_INTERVAL_FRACTION), "high": max(float(high), 1 + LEAST_INTERVAL_FRACTION)}
    return {**bounds, "evidence": "fitted", "source": source}
