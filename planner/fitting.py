"""Coefficients of the time model from measured steps: robust, pulled towards physics, bounded, and the same every time.

In: the `StepWork` of each case, a measured step, and levels of keys. Out: a `Fit`: for every case the values of all coefficients, as a sum of
what each level adds; for instance what all stacks share, what one stack adds, and what one device adds to that.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from planner.coefficients import TERMS, Coefficients
from planner.efficiency import Work
from planner.step_work import PartWork, StepWork, Wire
from planner.timing import time_step

__all__ = [
    "NAMES",
    "OWN_NOISE_FRACTION",
    "PUBLISHED_NOISE_FRACTION",
    "Batch",
    "Fit",
    "Level",
    "Limits",
    "fit_cases",
    "make_batches",
    "on_scale",
    "predict_s",
    "term_values",
]

NAMES = tuple(TERMS)
IS_LOG = np.array([term.is_log for term in TERMS.values()])
PUBLISHED_NOISE_FRACTION, OWN_NOISE_FRACTION = 0.06, 0.03
"""Expected scatter of a measured step around the model: what weighs cases against the pull of the priors. Publications leave out what
they did not think of; one's own runs on one machine differ by less."""
HUBER = 1.5
"""In units of the noise: beyond it a row pulls with a constant force (Huber, 1964)."""
NUDGE = 1e-3
TINY = 1e-12
"""What stands for a term that a stack switches off, on a logarithmic scale."""
LEAST_RATE, MOST_RATE = 0.2, 5.0
MAX_ROUNDS, MAX_TRIES = 60, 8
ENOUGH = 5e-5
"""A relative gain below which the fit has converged."""


def on_scale(values: Sequence[float]) -> np.ndarray:
    """Values of all terms on the scale of the fit: logarithms, but for shares."""
    return np.array([np.log(max(value, TINY)) if is_log else value for value, is_log in zip(values, IS_LOG, strict=True)])


@dataclass(frozen=True)
class Limits:
    """Bounds of all terms on the scale of the fit, [terms]."""

    low: np.ndarray
    high: np.ndarray

    @classmethod
    def physical(cls) -> Limits:
        """Those of the table."""
        return cls(on_scale([term.low for term in TERMS.values()]), on_scale([term.high for term in TERMS.values()]))

    @classmethod
    def of_measured_device(cls) -> Limits:
        """Rates around curves that were measured on the device itself, where the table's references are not the data sheet."""
        ends = [(LEAST_RATE, MOST_RATE) if term.unit == "ratio" and term.differs_by_device else (term.low, term.high) for term in TERMS.values()]
        return cls(on_scale([low for low, _ in ends]), on_scale([high for _, high in ends]))


@dataclass(frozen=True)
class Batch:
    """Cases whose pipelines have one shape, as one StepWork with arrays [n]."""

    rows: np.ndarray
    work: StepWork


@dataclass(frozen=True)
class Level:
    """One layer of the model: cases of one key share what it adds to the terms named; None: it adds nothing to the case."""

    name: str
    keys: tuple[Hashable, ...]
    terms: tuple[str, ...]
    scale_factor: float = 1.0
    """Of the terms' spreads."""


@dataclass(frozen=True)
class Fit:
    """What was found."""

    theta: np.ndarray
    """Values of all terms for each case, [n, terms], on the scale of the fit."""
    labels: tuple[tuple[str, Hashable, str], ...]
    """(level, key, term) of each unknown."""
    added: np.ndarray
    """What each unknown adds, on the scale of the fit."""
    spread: np.ndarray
    """Of each unknown before any case."""
    information: np.ndarray
    """[n, unknowns]: how much each case says about each unknown, in units of one over its variance."""

    def of(self, level: str, key: Hashable) -> dict[str, float]:
        """Term -> what a key of a level adds."""
        return {name: float(x) for (own, which, name), x in zip(self.labels, self.added, strict=True) if (own, which) == (level, key)}

    def told(self, level: str, key: Hashable) -> dict[str, tuple[float, np.ndarray]]:
        """Term -> (share of what is known of it that the cases told and not the prior, the cases that told most first)."""
        found = {}
        for j, (own, which, name) in enumerate(self.labels):
            if (own, which) == (level, key):
                total = float(self.information[:, j].sum())
                order = np.argsort(-self.information[:, j], kind="stable")
                found[name] = (total / (total + self.spread[j] ** -2), order[self.information[order, j] > 0])
        return found


def _stack(values: Sequence[Any]) -> np.ndarray:
    return np.array([np.asarray(value, float).reshape(()) for value in values])


def _join_work(works: Sequence[Work]) -> Work:
    kinds = dict.fromkeys(kind for work in works for kind in work)
    return {kind: _stack([work.get(kind, 0.0) for work in works]) for kind in kinds}


def _join_wires(wires: Sequence[Wire]) -> Wire:
    return Wire(*(_stack([getattr(w, field.name) for w in wires]) for field in fields(Wire)))


def _join_parts(parts: Sequence[PartWork]) -> PartWork:
    keys = dict.fromkeys(key for part in parts for key in part.wires)
    joined: dict[str, Any] = {}
    for field in fields(PartWork):
        values = [getattr(part, field.name) for part in parts]
        if field.name == "wires":
            joined["wires"] = {key: _join_wires([wires.get(key, Wire()) for wires in values]) for key in keys}
        elif field.name == "ring_s":
            joined["ring_s"] = {way: _join_work([ring[way] for ring in values]) for way in ("forward", "backward")}
        elif isinstance(values[0], Wire):
            joined[field.name] = _join_wires(values)
        else:
            joined[field.name] = _join_work(values) if isinstance(values[0], dict) else _stack(values)
    return PartWork(**joined)


NOTHING = PartWork({}, {}, {}, {}, {}, {"forward": {}, "backward": {}}, Wire(), Wire(), Wire(), Wire(), 0.0, 0.0, 0.0)


def _join(works: Sequence[StepWork]) -> StepWork:
    first, num_parts = works[0], max(len(work.parts) for work in works)
    padded = [work.parts + (NOTHING,) * (num_parts - len(work.parts)) for work in works]
    runs = np.zeros((len(works), num_parts, first.pp))
    for row, work in zip(runs, works, strict=True):
        row[: len(work.parts)] = work.runs
    return replace(
        first,
        parts=tuple(_join_parts([parts[i] for parts in padded]) for i in range(num_parts)),
        runs=runs,
        stage_transfer=_join_wires([work.stage_transfer for work in works]),
        num_microbatches=_stack([work.num_microbatches for work in works]),
        optimizer_s=_stack([work.optimizer_s for work in works]),
        step_overhead_s=_stack([work.step_overhead_s for work in works]),
        num_nodes=_stack([work.num_nodes for work in works]),
        matmul_format=_stack([work.matmul_format for work in works]).astype(int),
    )


def make_batches(works: Sequence[StepWork]) -> list[Batch]:
    """Works grouped by what a StepWork has one value of."""
    shapes: dict[Hashable, list[int]] = {}
    for i, work in enumerate(works):
        shapes.setdefault((work.schedule, work.pp, work.num_virtual_stages), []).append(i)
    return [Batch(np.array(rows), _join([works[i] for i in rows])) for rows in shapes.values()]


def term_values(theta: np.ndarray, limits: Limits) -> np.ndarray:
    """Values in the terms' own units, inside their bounds; same shape. Terms that are switched off stay so."""
    inside = np.clip(theta, limits.low, limits.high)
    values = np.where(IS_LOG, np.exp(np.where(IS_LOG, inside, 0.0)), inside)
    return np.where(IS_LOG & (theta < np.log(TINY) + 1), 0.0, values)


def predict_s(batches: Sequence[Batch], theta: np.ndarray, limits: Limits) -> np.ndarray:
    """Seconds of one step of every case, [n]."""
    values, seconds = term_values(theta, limits), np.empty(len(theta))
    for batch in batches:
        own = Coefficients(**{name: values[batch.rows, k] for k, name in enumerate(NAMES)})
        seconds[batch.rows] = time_step(batch.work, own).step_s
    return seconds


@dataclass(frozen=True)
class _Design:
    """Columns: one unknown each, what a key of a level adds to a term."""

    term: np.ndarray
    members: np.ndarray
    """[n, unknowns], 1 where the unknown is in force."""
    spread: np.ndarray
    labels: tuple[tuple[str, Hashable, str], ...]

    @classmethod
    def of(cls, levels: Sequence[Level]) -> _Design:
        terms: list[int] = []
        members: list[np.ndarray] = []
        labels: list[tuple[str, Hashable, str]] = []
        spread: list[float] = []
        for level in levels:
            for key in sorted({key for key in level.keys if key is not None}, key=str):
                own = np.array([k == key for k in level.keys], float)
                terms += [NAMES.index(name) for name in level.terms]
                members += [own] * len(level.terms)
                labels += [(level.name, key, name) for name in level.terms]
                spread += [TERMS[name].spread_factor * level.scale_factor for name in level.terms]
        return cls(np.array(terms), np.stack(members, 1), np.array(spread), tuple(labels))

    def theta(self, start: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Values of all terms for each case."""
        theta = start.copy()
        for k in range(len(NAMES)):
            own = self.term == k
            theta[:, k] += self.members[:, own] @ x[own]
        return theta


def fit_cases(
    batches: Sequence[Batch],
    measured_s: np.ndarray,
    weight: np.ndarray,
    levels: Sequence[Level],
    start: np.ndarray | None = None,
    limits: Limits | None = None,
    noise_fraction: float = PUBLISHED_NOISE_FRACTION,
) -> Fit:
    """Fits all levels at once.

    Formula: minimizes sum_i w_i huber(log(predicted_i / measured_i) / noise) + sum_j (x_j / spread_j)^2 / 2 over what each key of each
    level adds, x, by damped Gauss-Newton steps with finite differences of one value per case and term. Rows of weight 0 are predicted and
    do not pull.

    Args:
        start: [n, terms], where the first level adds to; None: the table of `planner.coefficients`.
        limits: bounds that no value leaves; None: the table's.
        noise_fraction: expected scatter of a step around the model.
    """
    problem = _Problem(
        batches, np.log(measured_s), weight, _Design.of(levels),
        np.tile(on_scale([term.value for term in TERMS.values()]), (len(measured_s), 1)) if start is None else start,
        limits or Limits.physical(), noise_fraction,
    )  # fmt: skip
    spread = problem.design.spread
    x, damping = np.zeros(len(spread)), 1e-2
    current = problem.loss(x)
    information = np.zeros((len(measured_s), len(spread)))
    for _ in range(MAX_ROUNDS):
        jacobian, pull, off = problem.linearized(x)
        information = jacobian**2 * pull[:, None]
        hessian = (jacobian * pull[:, None]).T @ jacobian + np.diag(spread**-2)
        gradient = (jacobian * pull[:, None]).T @ off + x / spread**2
        before = current
        for _ in range(MAX_TRIES):
            step = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), -gradient)
            tried = x + np.clip(step, -spread, spread)
            value = problem.loss(tried)
            if value < current:
                x, current, damping = tried, value, max(damping / 4, 1e-4)
                break
            damping *= 5
        if before - current <= ENOUGH * before:
            break
    return Fit(problem.design.theta(problem.start, x), problem.design.labels, x, spread, information)


@dataclass(frozen=True)
class _Problem:
    """What is minimized."""

    batches: Sequence[Batch]
    target: np.ndarray
    weight: np.ndarray
    design: _Design
    start: np.ndarray
    limits: Limits
    noise_fraction: float

    def loss(self, x: np.ndarray) -> float:
        """The function of `fit_cases`."""
        off = np.abs(np.log(predict_s(self.batches, self.design.theta(self.start, x), self.limits)) - self.target) / self.noise_fraction
        huber = np.where(off < HUBER, off**2 / 2, HUBER * off - HUBER**2 / 2)
        return float(np.sum(self.weight * huber) + np.sum((x / self.design.spread) ** 2) / 2)

    def linearized(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(slopes of the scaled residuals [n, unknowns], weights after Huber [n], scaled residuals [n]) at x."""
        theta = self.design.theta(self.start, x)
        here = np.log(predict_s(self.batches, theta, self.limits))
        slopes = np.empty_like(theta)
        for k in range(theta.shape[1]):
            nudge = np.where(theta[:, k] + NUDGE < self.limits.high[k], NUDGE, -NUDGE)
            moved = theta.copy()
            moved[:, k] += nudge
            slopes[:, k] = (np.log(predict_s(self.batches, moved, self.limits)) - here) / nudge
        off = (here - self.target) / self.noise_fraction
        pull = self.weight * np.where(np.abs(off) < HUBER, 1.0, HUBER / np.maximum(np.abs(off), HUBER))
        return self.design.members * slopes[:, self.design.term] / self.noise_fraction, pull, off
