"""All shipped stacks at once from one table of published runs: coefficients, residuals, and errors on runs that were left out.

Stacks share what they have in common: a term of a stack is the table's value, plus what all stacks add, plus what the stack adds, plus what
the stack adds on one accelerator. What the formulas still miss becomes `data/measurements/evidence.csv.gz` (see `planner.nearby`).
"""

from __future__ import annotations

import csv
import datetime
import gzip
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from planner.assemble import QUANTILE_90
from planner.calibration import DIGITS, INTERVAL_PERCENTILES, TOLD_SHARE, fold_of, stack_text
from planner.cases import Measured
from planner.coefficients import TERMS
from planner.files import to_yaml, write_bytes, write_text
from planner.fitting import NAMES, Fit, Level, Limits, fit_cases, make_batches, on_scale, predict_s, term_values
from planner.nearby import FEATURES, NearbyRuns, features_of, make_nearby, run_noise
from planner.spec import build
from planner.stack import StackSpec, load_stack, stack_names

__all__ = ["StackFits", "cross_validate", "fit_stacks", "levels_of"]

SHARED_FACTOR, KIN_FACTOR, DEVICE_FACTOR = 0.5, 0.5, 0.5
"""Of the terms' spreads: what all stacks may add to the table, one stack to its kin, and one device to a stack."""
NUM_FOLDS = 5
LEAST_NOISE_FRACTION, USUAL_NOISE_FRACTION, USUAL_COUNT = 0.015, 0.05, 10.0
NOISE_OF_RESIDUAL = 0.5
"""Share of the residuals' scatter that near runs do not have in common; the rest the Gaussian process explains."""
UNKNOWN_YEAR = 2024.5
"""Of software whose release was not published."""
UNKNOWN_SPREAD = 0.25
"""Of a stack of which no run is known: its coefficients are those of other stacks."""
MAD_FACTOR = 1.4826
"""Standard deviation over median absolute deviation."""


@dataclass(frozen=True)
class StackFits:
    """The fit to all runs, and what it reaches on runs left out."""

    steps: tuple[Measured, ...]
    fit: Fit
    rows: tuple[dict[str, Any], ...]
    """Of the table of evidence."""
    predicted_s: np.ndarray
    """Formulas and nearby runs, each run left out of both with its group."""
    spread: np.ndarray

    def save(self, folder: str | Path) -> None:
        """Writes `stacks/*.yaml` and `measurements/evidence.csv.gz` below a folder, e.g. `data`."""
        for part in ("stacks", "measurements"):
            (Path(folder) / part).mkdir(parents=True, exist_ok=True)
        for name in stack_names():
            write_text(Path(folder) / "stacks" / f"{name}.yaml", to_yaml(self.stack(name)))
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_bytes(Path(folder) / "measurements" / "evidence.csv.gz", gzip.compress(text.getvalue().encode(), mtime=0))

    def to_dict(self) -> dict[str, Any]:
        """The object that `calibrate --every-stack --json` prints."""
        measured_s = np.array([step.step_s for step in self.steps])
        errors = np.abs(self.predicted_s / measured_s - 1)
        reach = QUANTILE_90 * self.spread
        return {
            "schema_version": 1, "num_runs": len(self.steps), "median_abs_error_fraction": float(np.median(errors)),
            "p90_abs_error_fraction": float(np.quantile(errors, 0.9)),
            "interval_coverage_fraction": float(np.mean(np.abs(np.log(self.predicted_s / measured_s)) <= reach)),
            "median_interval_width_fraction": float(np.median(np.exp(reach) - np.exp(-reach))),
            "stacks": {name: self.stack(name).get("fit") for name in stack_names()},
        }  # fmt: skip

    def _after(self, start: np.ndarray, level: str, key: str) -> np.ndarray:
        """Values of all terms on the scale of the fit, [terms], with what a key of a level adds."""
        added = self.fit.of(level, key)
        return np.asarray(start + np.array([added.get(term, 0.0) for term in NAMES]))

    @staticmethod
    def _values(theta: np.ndarray, limits: Limits) -> dict[str, float]:
        """The same in the terms' own units, rounded."""
        values = term_values(theta[None], limits)[0].tolist()
        return {term: float(f"{value:.{DIGITS}g}") for term, value in zip(NAMES, values, strict=True)}

    def stack(self, name: str) -> dict[str, Any]:
        """A stack's file with the coefficients of this fit."""
        today = datetime.date.today().isoformat()
        steps = self.steps
        limits, own = Limits.physical(), [i for i, step in enumerate(steps) if step.job.stack.name == name]
        values = stack_text(load_stack(name))
        spec = load_stack(name)
        shared = self._after(on_scale([term.value for term in TERMS.values()]), "shared", "all")
        mine = self._after(self._after(shared, "root", spec.kin or name), "stack", name)
        told = {
            term
            for level in (("root", spec.kin or name), ("stack", name))
            for term, (share, _) in self.fit.told(*level).items()
            if share >= TOLD_SHARE
        }
        source = f"fitted to {len(own)} published runs on {today}" + (f", with those of {spec.kin}" if spec.kin else "")
        typical = f"what stacks with published runs have in common ({today})"
        values["coefficients"] = {
            term: {"value": value, "evidence": "fitted" if term in told else "assumed", "source": source if term in told else typical}
            for term, value in self._values(mine, limits).items()
        }
        if not own:
            return values
        counts: dict[str, int] = {}
        for i in own:
            accelerator = steps[i].job.cluster.accelerator.id
            counts[accelerator] = counts.get(accelerator, 0) + 1
        values["devices"] = {}
        for device, count in sorted(counts.items()):
            moved = self.fit.of("device", f"{name} on {device}")
            here = self._values(self._after(mine, "device", f"{name} on {device}"), limits)
            fitted = {"evidence": "fitted", "source": f"fitted to {count} published runs on {today}"}
            values["devices"][device] = {term: {"value": here[term], **fitted} for term, added in moved.items() if abs(added) >= LEAST_MOVE}
        measured_s = np.array([steps[i].step_s for i in own])
        ratio = measured_s / self.predicted_s[own]
        error = np.abs(1 / ratio - 1)
        low, high = np.percentile(ratio, INTERVAL_PERCENTILES)
        left_out = f"{len(own)} published runs, each left out of the fit with its like ({today})"
        values["fit"] = {
            "date": today, "num_runs": len(own), "accelerators": dict(sorted(counts.items())), "source": left_out,
            "median_error_fraction": round(float(np.median(error)), 4), "p90_error_fraction": round(float(np.quantile(error, 0.9)), 4),
        }  # fmt: skip
        values["time_interval"] = {
            "low": round(min(float(low), 0.97), 3), "high": round(max(float(high), 1.03), 3), "evidence": "fitted",
            "source": f"10th and 90th percentile of measured over predicted step time, {left_out}",
        }  # fmt: skip
        build(StackSpec, values, "stack")
        return values


LEAST_MOVE = 0.005
"""On the scale of the fit: what a device adds to less is left out of a stack's file."""


def levels_of(steps: Sequence[Measured]) -> list[Level]:
    """What all stacks add to the table, what stacks of one root add, what one of several adds, and what a device adds to a stack."""
    by_device = tuple(name for name, term in TERMS.items() if term.differs_by_device)
    stacks = [step.job.stack for step in steps]
    roots = {stack.kin for stack in stacks if stack.kin is not None}
    own = tuple(stack.name if stack.kin is not None or stack.name in roots else None for stack in stacks)
    return [
        Level("shared", ("all",) * len(steps), NAMES, SHARED_FACTOR),
        Level("root", tuple(stack.kin or stack.name for stack in stacks), NAMES),
        Level("stack", own, NAMES, KIN_FACTOR),
        Level("device", tuple(f"{step.job.stack.name} on {step.job.cluster.accelerator.id}" for step in steps), by_device, DEVICE_FACTOR),
    ]


def fit_stacks(steps: Sequence[Measured], num_folds: int = NUM_FOLDS) -> StackFits:
    """Fits all stacks, and judges the fit by groups left out in turn.

    Args:
        num_folds: 0: no judging, the errors are of the formulas on the very runs.
    """
    batches, measured_s = make_batches([step.work for step in steps]), np.array([step.step_s for step in steps])
    weight, limits = np.array([step.weight_factor for step in steps]), Limits.physical()
    fit = fit_cases(batches, measured_s, weight, levels_of(steps))
    log_ratio = np.log(measured_s / predict_s(batches, fit.theta, limits))
    predicted_s, spread = measured_s / np.exp(log_ratio), np.full(len(steps), UNKNOWN_SPREAD)
    if num_folds:
        predicted_s, spread = cross_validate(steps, fold_of([step.group for step in steps], num_folds))
    rows = _evidence(steps, np.ones(len(steps), bool), log_ratio)
    errors = predicted_s / measured_s - 1
    told = tuple(
        {**row, "left_out_error_fraction": round(float(error), 5), "left_out_spread": round(float(own), 4)}
        for row, error, own in zip(rows, errors, spread, strict=True)
    )
    return StackFits(tuple(steps), fit, told, predicted_s, spread)


def cross_validate(steps: Sequence[Measured], folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(seconds of every step, their spread), each by a fit and by nearby runs that saw no step of its fold; fold -1 is always seen."""
    batches, measured_s = make_batches([step.work for step in steps]), np.array([step.step_s for step in steps])
    weight, limits, levels = np.array([step.weight_factor for step in steps]), Limits.physical(), levels_of(steps)
    predicted_s, spread = np.full(len(steps), np.nan), np.full(len(steps), np.nan)
    for fold in np.unique(folds[folds >= 0]):
        is_out = folds == fold
        fit = fit_cases(batches, measured_s, np.where(is_out, 0.0, weight), levels)
        formulas_s = predict_s(batches, fit.theta, limits)
        nearby = _nearby(_evidence(steps, ~is_out, np.log(measured_s / formulas_s)))
        for i in np.flatnonzero(is_out).tolist():
            step, runs = steps[i], nearby.get(steps[i].job.stack.name)
            spread[i], predicted_s[i] = UNKNOWN_SPREAD, formulas_s[i]
            if runs is not None:
                at = (step.graph, step.job.cluster, step.job.software_year)
                spread[i], predicted_s[i] = runs.spread_at(*at), formulas_s[i] * np.exp(runs.log_ratio_at(*at))
    return predicted_s, spread


def _evidence(steps: Sequence[Measured], is_known: np.ndarray, log_ratio: np.ndarray) -> list[dict[str, Any]]:
    """Rows of the table of evidence."""
    rows: list[dict[str, Any]] = []
    by_stack: dict[str, list[int]] = {}
    for i in np.flatnonzero(is_known).tolist():
        by_stack.setdefault(steps[i].job.stack.name, []).append(i)
    for stack, own in sorted(by_stack.items()):
        places = np.array([features_of(steps[i].graph, steps[i].job.cluster, steps[i].job.software_year or UNKNOWN_YEAR) for i in own])
        ratios = log_ratio[own]
        scatter = NOISE_OF_RESIDUAL * (len(own) * MAD_FACTOR * float(np.median(np.abs(ratios))) + USUAL_COUNT * USUAL_NOISE_FRACTION)
        noise = run_noise(places, ratios, max(LEAST_NOISE_FRACTION, scatter / (len(own) + USUAL_COUNT)))
        for i, place, ratio, own_noise in zip(own, places, ratios, noise, strict=True):
            step = steps[i]
            rows.append(
                {
                    "stack": stack,
                    "id": step.name,
                    "source": step.source,
                    "model": step.model,
                    "accelerator": step.job.cluster.accelerator.id,
                    "num_devices": step.job.cluster.num_devices,
                    **{name: round(float(x), 4) for name, x in zip(FEATURES, place, strict=True)},
                    "measured_step_s": step.step_s,
                    "log_ratio": round(float(ratio), 5),
                    "noise": round(float(own_noise), 5),
                    "left_out_error_fraction": 0.0,
                    "left_out_spread": 0.0,
                }
            )
    order = {step.name: i for i, step in enumerate(steps)}
    return sorted(rows, key=lambda row: order[row["id"]])


def _nearby(rows: Sequence[dict[str, Any]]) -> dict[str, NearbyRuns]:
    stacks = dict.fromkeys(row["stack"] for row in rows)
    return {stack: make_nearby([row for row in rows if row["stack"] == stack]) for stack in stacks}
