"""Several processes: results in order, errors passed on."""

import math

import pytest

from planner.workers import map_ordered, num_cores


def test_the_order_is_that_of_the_items() -> None:
    items = [float(i) for i in range(100)]
    assert list(map_ordered(math.sqrt, items, 2)) == [math.sqrt(i) for i in items] == list(map_ordered(math.sqrt, items))


def test_errors_are_passed_on() -> None:
    with pytest.raises(ValueError, match="math domain error"):
        list(map_ordered(math.sqrt, [*range(40), -1, *range(40)], 2))


def test_a_caller_may_stop_early() -> None:
    for root in map_ordered(math.sqrt, range(100), 2):
        assert root == 0
        break


def test_there_is_a_core() -> None:
    assert num_cores() >= 1
