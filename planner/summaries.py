"""Errors of many predicted step times in a few numbers: medians, tails, bias, intervals, beside a constant share of peak.

In: `Judged` rows. Out: a `TimeSummary` of all of them, and of groups. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

__all__ = [
    "BASELINE_MFU", "DEVICE_BANDS", "PARAM_BANDS", "Judged", "TimeSummary", "band", "baseline_step_s", "group_times", "summarize_groups",
    "summarize_times",
]  # fmt: skip

BASELINE_MFU = 0.45
"""The share of peak that the baseline assumes of every run; the median of the ten runs of arXiv:2104.04473 table 1, which flatters it there."""
DEVICE_BANDS = ((1.0, "1"), (8.0, "2-8"), (64.0, "9-64"), (512.0, "65-512"), (math.inf, "over 512"))
PARAM_BANDS = ((1e9, "up to 1B"), (1e10, "1B-10B"), (1e11, "10B-100B"), (math.inf, "over 100B"))
"""Largest value of each band, and its name."""


@dataclass(frozen=True)
class Judged:
    """One measured step time and its prediction, by a fit that did not see it."""

    predicted_s: float
    measured_s: float
    low_s: float
    high_s: float
    baseline_s: float
    source: str
    job: Hashable
    """The same for rows that differ in their layout alone."""
    layout: str


@dataclass(frozen=True)
class TimeSummary:
    """Of relative errors; None where nothing was measured. Errors are of the step time, predicted / measured - 1, unless their name says else."""

    num_rows: int
    median_abs_error_fraction: float | None = None
    p90_abs_error_fraction: float | None = None
    interval_coverage_fraction: float | None = None
    median_error_fraction: float | None = None
    """Signed: the bias."""
    median_interval_width_fraction: float | None = None
    """(high - low) / predicted, as `planner calibrate` states it."""
    median_interval_range_fraction: float | None = None
    """high / low - 1."""
    throughput_median_abs_error_fraction: float | None = None
    """Of tokens per second: measured step / predicted step - 1."""
    throughput_p90_abs_error_fraction: float | None = None
    baseline_median_abs_error_fraction: float | None = None
    baseline_p90_abs_error_fraction: float | None = None
    baseline_median_error_fraction: float | None = None

    @property
    def loses_to_baseline(self) -> bool:
        """Whether a constant share of peak has the smaller median error."""
        return _is_above(self.median_abs_error_fraction, self.baseline_median_abs_error_fraction)

    @property
    def loses_tail_to_baseline(self) -> bool:
        """Whether it has the smaller 90th percentile."""
        return _is_above(self.p90_abs_error_fraction, self.baseline_p90_abs_error_fraction)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {**asdict(self), "loses_to_baseline": self.loses_to_baseline, "loses_tail_to_baseline": self.loses_tail_to_baseline}


def _is_above(own: float | None, other: float | None) -> bool:
    return own is not None and other is not None and own > other


def baseline_step_s(flops_per_token: float, tokens: float, num_devices: int, peak_flops_per_s: float) -> float:
    """Seconds of a step at a constant share of peak: what the planner has to beat.

    Formula: hardware FLOPs / (devices * peak * 0.45).

    Args:
        flops_per_token: hardware FLOPs, that is 6 per matmul parameter and attention over all pairs (none skipped for the causal mask), and
            2 more for what is recomputed: all of it under full recompute, so 8 in all.
        tokens: of one step, all devices together.
        peak_flops_per_s: dense, of one device, at the rate of the run's precision (fp8's for an fp8 run).
    Source: the usual rule of thumb; 45% as in comparisons of training simulators.

    Example:
        >>> baseline_step_s(6 * 7e9, 4e6, 128, 312e12)
        9.348290598290598
    """
    return flops_per_token * tokens / (num_devices * peak_flops_per_s * BASELINE_MFU)


def summarize_times(rows: Iterable[Judged]) -> TimeSummary:
    """Errors of some rows."""
    judged = list(rows)
    if not judged:
        return TimeSummary(0)
    predicted, measured, low, high, baseline = (
        np.array([getattr(row, name) for row in judged]) for name in ("predicted_s", "measured_s", "low_s", "high_s", "baseline_s")
    )
    errors, rates, naive = predicted / measured - 1, measured / predicted - 1, baseline / measured - 1
    return TimeSummary(
        num_rows=len(judged),
        median_abs_error_fraction=float(np.median(np.abs(errors))),
        p90_abs_error_fraction=float(np.quantile(np.abs(errors), 0.9)),
        interval_coverage_fraction=float(np.mean((low <= measured) & (measured <= high))),
        median_error_fraction=float(np.median(errors)),
        median_interval_width_fraction=float(np.median((high - low) / predicted)),
        median_interval_range_fraction=float(np.median(high / low - 1)),
        throughput_median_abs_error_fraction=float(np.median(np.abs(rates))),
        throughput_p90_abs_error_fraction=float(np.quantile(np.abs(rates), 0.9)),
        baseline_median_abs_error_fraction=float(np.median(np.abs(naive))),
        baseline_p90_abs_error_fraction=float(np.quantile(np.abs(naive), 0.9)),
        baseline_median_error_fraction=float(np.median(naive)),
    )


def band(value: float, bands: Sequence[tuple[float, str]]) -> str:
    """Name of the band that a value is in.

    Example:
        >>> band(64, DEVICE_BANDS), band(65, DEVICE_BANDS)
        ('9-64', '65-512')
    """
    return next(name for most, name in bands if value <= most)


def group_times(rows: Iterable[tuple[str, Judged]], order: Sequence[str] = ()) -> dict[str, TimeSummary]:
    """The same for each name: those of `order` first and so, then the largest groups."""
    groups: dict[str, list[Judged]] = {name: [] for name in order}
    for name, row in rows:
        groups.setdefault(name, []).append(row)
    others = sorted(groups.keys() - set(order), key=lambda name: (-len(groups[name]), name))
    return {name: summarize_times(groups[name]) for name in (*order, *others) if groups[name]}


def summarize_groups(groups: dict[str, TimeSummary]) -> dict[str, float | None]:
    """Medians over the groups of their own numbers: each group weighs the same, however many rows it has."""
    own = ("median_abs_error_fraction", "p90_abs_error_fraction", "median_error_fraction")
    names = (*own, "interval_coverage_fraction", *(f"baseline_{name}" for name in own))
    found: dict[str, float | None] = {"num_groups": len(groups)}
    return found | {name: float(np.median([getattr(one, name) for one in groups.values()])) if groups else None for name in names}
