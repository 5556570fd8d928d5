"""Whether the layout that is predicted fastest is the fastest, where several layouts of one job were measured.

In: `Judged` rows. Out: a `Choice` for each job with enough layouts, and their means by source. Pure functions.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from planner.summaries import Judged

__all__ = ["LEAST_LAYOUTS", "Choice", "ChoiceSummary", "choices", "spearman", "summarize_choices"]

LEAST_LAYOUTS = 4
"""Fewer measured layouts of one job say little about choosing."""


@dataclass(frozen=True)
class Choice:
    """A job of which several layouts were measured."""

    source: str
    num_layouts: int
    regret_fraction: float
    """Measured time of the layout predicted fastest over the best measured, less 1."""
    spearman: float
    """Rank correlation of predicted and measured times."""


@dataclass(frozen=True)
class ChoiceSummary:
    """Of several choices."""

    num_groups: int
    num_layouts: int
    mean_regret_fraction: float
    max_regret_fraction: float
    mean_spearman: float


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation: Pearson's of the ranks; ties share their mean rank; 0 where one side is constant.

    Source: Spearman 1904, The proof and measurement of association between two things.

    Example:
        >>> spearman([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 40.0, 30.0])
        0.8
    """
    ranks = [np.array([(np.sum(x < a) + np.sum(x <= a) + 1) / 2 for a in x]) for x in (np.asarray(one), np.asarray(other))]
    spread = [rank - rank.mean() for rank in ranks]
    scale = float(np.sqrt(np.sum(spread[0] ** 2) * np.sum(spread[1] ** 2)))
    return round(float(np.sum(spread[0] * spread[1])) / scale, 12) if scale else 0.0


def choices(rows: Iterable[Judged]) -> list[Choice]:
    """One for every job of which at least `LEAST_LAYOUTS` different layouts were measured, in order of appearance.

    A layout that was measured more than once counts once, with its median times: repeats of a run are no choice.
    """
    jobs: dict[Hashable, dict[str, list[Judged]]] = {}
    for row in rows:
        jobs.setdefault(row.job, {}).setdefault(row.layout, []).append(row)
    found = []
    for layouts in jobs.values():
        if len(layouts) < LEAST_LAYOUTS:
            continue
        runs = [layouts[name] for name in sorted(layouts)]
        predicted, measured = ([float(np.median([getattr(run, key) for run in own])) for own in runs] for key in ("predicted_s", "measured_s"))
        regret = measured[int(np.argmin(predicted))] / min(measured) - 1
        found.append(Choice(runs[0][0].source, len(runs), regret, spearman(predicted, measured)))
    return found


def summarize_choices(found: Sequence[Choice]) -> dict[str, ChoiceSummary]:
    """`all` of them, then by source; empty where there is none."""
    groups: dict[str, list[Choice]] = {"all": list(found)} if found else {}
    for choice in found:
        groups.setdefault(choice.source, []).append(choice)
    return {name: _summary(own) for name, own in groups.items()}


def _summary(found: Sequence[Choice]) -> ChoiceSummary:
    regrets = [choice.regret_fraction for choice in found]
    return ChoiceSummary(
        len(found),
        sum(choice.num_layouts for choice in found),
        float(np.mean(regrets)),
        float(np.max(regrets)),
        float(np.mean([choice.spearman for choice in found])),
    )
