"""Measured curves: what they say between, below and beyond the measured sizes, and that a stack with curves prices by them."""

from __future__ import annotations

import numpy as np
import pytest

from planner.curves import Curve, MatmulGrid
from planner.errors import InputError
from planner.spec import build


def test_a_curve_passes_through_its_points_and_grows_in_proportion_beyond() -> None:
    curve = Curve(sizes=[10.0, 100.0, 1000.0], seconds=[1.0, 2.0, 20.0])
    assert curve.at(np.array([1.0, 10.0, 100.0, 1000.0, 3000.0])) == pytest.approx([1.0, 1.0, 2.0, 20.0, 60.0])


def test_between_points_a_power_law_is_exact() -> None:
    sizes = [2.0, 64.0, 4096.0]
    curve = Curve(sizes=sizes, seconds=[s**0.7 for s in sizes])
    assert curve.at(500.0) == pytest.approx(500.0**0.7)


@pytest.mark.parametrize("size", [(8.0, 8.0, 8.0), (20.0, 100.0, 13.0), (64.0, 512.0, 64.0)])
def test_a_grid_of_a_power_law_is_exact_inside(size: tuple[float, float, float]) -> None:
    m, n, k = [8.0, 64.0], [8.0, 64.0, 512.0], [8.0, 64.0]
    seconds = [(a * b * c) ** 0.9 for a in m for b in n for c in k]
    assert MatmulGrid(m=m, n=n, k=k, seconds=seconds).at(*size) == pytest.approx(float(np.prod(size)) ** 0.9)


def test_a_grid_grows_with_the_work_beyond_it() -> None:
    grid = MatmulGrid(m=[8.0, 64.0], n=[8.0], k=[8.0], seconds=[1.0, 4.0])
    assert grid.at(128.0, 16.0, 8.0) == pytest.approx(16.0)


@pytest.mark.parametrize(
    "values", [{"sizes": [1.0, 1.0], "seconds": [1.0, 2.0]}, {"sizes": [1.0], "seconds": [0.0]}, {"sizes": [1.0, 2.0], "seconds": [1.0]}]
)
def test_wrong_curves_are_refused(values: dict[str, list[float]]) -> None:
    with pytest.raises(InputError):
        build(Curve, values, "curve")
