"""Errors of many predictions in a few numbers: medians, tails, intervals, against a constant share of peak, and whether the best is picked.

In: `Judged` rows. Out: summaries for all of them and for groups, and `Choice`s: groups of rows that differ in their layout alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["BASELINE_MFU", "Choice", "Judged", "TimeSummary", "choices", "group_times", "spearman", "summarize_choices", "summarize_times"]

BASELINE_MFU = 0.45
"""What stands beside every error: hardware FLOPs over devices, peak and this."""
LEAST_LAYOUTS = 4


@dataclass(frozen=True)
class Judged:
    """One measured step time and its prediction, by a fit that did not see it."""

    predicted_s: float
    measured_s: float
    low_s: float
    high_s: float
    baseline_s: float
    group: Hashable
    """Rows of one group differ in their layout alone."""
    source: str

    @property
    def error_fraction(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted_s / self.measured_s - 1


@dataclass(frozen=True)
class TimeSummary:
    """Of absolute relative errors; None where nothing was measured."""

    num_rows: int
    median_abs_error_fraction: float | None
    p90_abs_error_fraction: float | None
    interval_coverage_fraction: float | None
    median_error_fraction: float | None = None
    """Signed: the bias."""
    median_interval_width_fraction: float | None = None
    """(high - low) / predicted."""
    baseline_median_abs_error_fraction: float | None = None
    baseline_p90_abs_error_fraction: float | None = None

    @property
    def loses_to_baseline(self) -> bool:
        """Whether a constant share of peak has the smaller median error."""
        own, other = self.median_abs_error_fraction, self.baseline_median_abs_error_fraction
        return own is not None and other is not None and own > other


def summarize_times(rows: Iterable[Judged]) -> TimeSummary:
    """Errors of some rows."""
    judged = list(rows)
    if not judged:
        return TimeSummary(0, None, None, None)
    predicted, measured, low, high, baseline = (
        np.array([getattr(row, name) for row in judged]) for name in ("predicted_s", "measured_s", "low_s", "high_s", "baseline_s")
    )
    errors, naive = predicted / measured - 1, np.abs(baseline / measured - 1)
    return TimeSummary(
        len(judged),
        float(np.median(np.abs(errors))),
        float(np.quantile(np.abs(errors), 0.9)),
        float(np.mean((low <= measured) & (measured <= high))),
        float(np.median(errors)),
        float(np.median((high - low) / predicted)),
        float(np.median(naive)),
        float(np.quantile(naive, 0.9)),
    )


def group_times(rows: Iterable[tuple[str, Judged]]) -> dict[str, TimeSummary]:
    """The same for each name, in order of appearance."""
    groups: dict[str, list[Judged]] = {}
    for name, row in rows:
        groups.setdefault(name, []).append(row)
    return {name: summarize_times(own) for name, own in groups.items()}


@dataclass(frozen=True)
class Choice:
    """A group of layouts of one job, all measured."""

    source: str
    num_layouts: int
    regret_fraction: float
    """Measured time of the layout predicted fastest over the best measured, less 1."""
    spearman: float
    """Rank correlation of predicted and measured times."""


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation; ties share their mean rank; 0 where one side is constant.

    Example:
        >>> spearman([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 40.0, 30.0])
        0.8
    """
    ranks = [np.array([(np.sum(x < a) + np.sum(x <= a) + 1) / 2 for a in x]) for x in (np.asarray(one), np.asarray(other))]
    spread = [rank - rank.mean() for rank in ranks]
    scale = float(np.sqrt(np.sum(spread[0] ** 2) * np.sum(spread[1] ** 2)))
    return round(float(np.sum(spread[0] * spread[1])) / scale, 12) if scale else 0.0


def choices(rows: Iterable[Judged]) -> list[Choice]:
    """Every group of at least `LEAST_LAYOUTS` layouts."""
    groups: dict[Hashable, list[Judged]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    found = []
    for own in groups.values():
        if len(own) >= LEAST_LAYOUTS:
            predicted, measured = [row.predicted_s for row in own], [row.measured_s for row in own]
            picked = measured[int(np.argmin(predicted))]
            found.append(Choice(own[0].source, len(own), picked / min(measured) - 1, spearman(predicted, measured)))
    return found


def summarize_choices(found: Sequence[Choice]) -> dict[str, dict[str, Any]]:
    """By source, and `all`: groups, mean and largest regret, mean rank correlation."""
    by: dict[str, Callable[[Choice], bool]] = {"all": lambda _: True}
    by |= {source: (lambda choice, name=source: choice.source == name) for source in dict.fromkeys(choice.source for choice in found)}  # type: ignore[misc]
    summary = {}
    for name, belongs in by.items():
        own = [choice for choice in found if belongs(choice)]
        if own:
            regrets = [choice.regret_fraction for choice in own]
            summary[name] = {
                "num_groups": len(own), "mean_regret_fraction": float(np.mean(regrets)), "max_regret_fraction": float(np.max(regrets)),
                "mean_spearman": float(np.mean([choice.spearman for choice in own])),
            }  # fmt: skip
    return summary
