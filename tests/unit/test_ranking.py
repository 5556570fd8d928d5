"""Regret and rank correlation against examples worked out by hand; which rows are layouts of one job."""

import random

import pytest

from planner.ranking import Choice, choices, spearman, summarize_choices
from planner.summaries import Judged


def judged(layout: str, predicted_s: float, measured_s: float, job: str = "job", source: str = "here") -> Judged:
    return Judged(predicted_s, measured_s, predicted_s, predicted_s, 1.0, source, job, layout)


FOUR = [judged("a", 1.0, 12.0), judged("b", 2.0, 10.0), judged("c", 3.0, 20.0), judged("d", 4.0, 30.0)]
"""Predicted ranks 1 2 3 4, measured 2 1 3 4."""


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 2, 3, 4], [2, 4, 6, 8], 1.0),
        ([1, 2, 3, 4], [8, 6, 4, 2], -1.0),
        ([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 0.82078268),  # ties: textbook value, mean ranks 1 2 3.5 5 3.5
        ([1, 2, 3], [7, 7, 7], 0.0),
        ([106, 100, 86, 101, 99, 103, 97, 113, 112, 110], [7, 27, 2, 50, 28, 29, 20, 12, 6, 17], -29 / 165),  # IQ and hours of television
    ],
)
def test_rank_correlation(one: list[float], other: list[float], expected: float) -> None:
    assert spearman(one, other) == pytest.approx(expected)
    assert spearman(other, one) == pytest.approx(expected)


def test_rank_correlation_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(3)
    for size in (4, 9, 40):
        one, other = ([float(draw.randint(0, 12)) for _ in range(size)] for _ in range(2))
        assert spearman(one, other) == pytest.approx(float(stats.spearmanr(one, other).statistic))


def test_regret_of_the_pick() -> None:
    assert choices(FOUR) == [Choice("here", 4, pytest.approx(0.2), pytest.approx(0.8))]


def test_the_order_of_rows_does_not_matter() -> None:
    assert choices(reversed(FOUR)) == choices(FOUR)


def test_three_layouts_are_too_few_however_often_they_ran() -> None:
    assert choices([*FOUR[:3], *FOUR[:3]]) == []


def test_repeats_count_once_with_their_median() -> None:
    again = [judged("b", 2.0, 100.0), judged("b", 2.0, 12.0)]
    (found,) = choices([*FOUR, *again])
    assert found.num_layouts == 4
    assert found.regret_fraction == pytest.approx(0)  # a and b both 12
    assert found.spearman == pytest.approx(0.9486832980505138)  # measured ranks 1.5 1.5 3 4


def test_jobs_are_kept_apart_and_summed_by_source() -> None:
    best = [judged(r.layout, r.measured_s, r.measured_s, "other", "there") for r in FOUR]
    found = summarize_choices(choices([*FOUR, *best]))
    assert list(found) == ["all", "here", "there"]
    assert found["all"].num_groups == 2
    assert found["all"].num_layouts == 8
    assert found["all"].mean_regret_fraction == pytest.approx(0.1)
    assert found["all"].max_regret_fraction == pytest.approx(0.2)
    assert found["all"].mean_spearman == pytest.approx(0.9)
    assert found["there"].max_regret_fraction == 0


def test_no_group_is_no_summary() -> None:
    assert summarize_choices([]) == {}
