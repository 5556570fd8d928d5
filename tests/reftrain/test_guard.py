"""The policy for bad steps."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reftrain.guard import LEAST_HISTORY, WINDOW, SpikeGuard


def calm(seed=0, steps=200, **keys):
    """A guard that has seen a falling, noisy loss."""
    guard, numbers = SpikeGuard(**keys), random.Random(seed)
    for step in range(steps):
        assert guard.judge(2 + 4 * math.exp(-step / 60) + numbers.gauss(0, 0.03), math.exp(numbers.gauss(0, 0.2))) == "good"
    return guard


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (2.0, math.nan), (math.inf, 1.0), (-math.inf, 1.0), (2.0, math.inf), (200.0, 1.0), (2.0, 100.0)])
def test_bad_steps_are_skipped_and_forgotten(bad):
    guard = calm()
    losses, norms = list(guard.losses), list(guard.norms)
    assert guard.judge(*bad) == "skip"
    assert (list(guard.losses), list(guard.norms)) == (losses, norms)
    assert guard.judge(2.0, 1.0) == "good"
    assert guard.skipped_in_row == 0


@pytest.mark.parametrize(("loss", "verdict"), [(math.nan, "skip"), (math.inf, "skip"), (300.0, "good")])
def test_without_history_only_what_is_no_number_is_bad(loss, verdict):
    guard = SpikeGuard()
    for _ in range(LEAST_HISTORY - 1):
        guard.judge(3.0, 1.0)
    assert guard.judge(loss, 1.0) == verdict


@given(st.integers(1, 6), st.integers(0, 3))
def test_skips_then_rollbacks_then_the_end(max_skipped, max_rollbacks):
    guard = calm(steps=20, max_skipped=max_skipped, max_rollbacks=max_rollbacks)
    verdicts = [guard.judge(math.nan, math.nan) for _ in range(max_skipped * (max_rollbacks + 1))]
    row = ["skip"] * (max_skipped - 1)
    assert verdicts == [*([*row, "roll_back"] * max_rollbacks), *row, "stop"]
    assert (guard.num_skipped, guard.num_rollbacks) == (len(verdicts), max_rollbacks)


def test_troubles_far_apart_do_not_end_a_run():
    guard = SpikeGuard(max_skipped=1, max_rollbacks=1)
    for _ in range(5):
        for _ in range(WINDOW):
            assert guard.judge(3.0, 1.0) == "good"
        assert guard.judge(math.nan, 1.0) == "roll_back"
    for _ in range(WINDOW - 1):
        guard.judge(3.0, 1.0)
    assert guard.judge(math.nan, 1.0) == "stop"


@given(st.integers(0, 2**31), st.floats(1e-3, 1e3), st.floats(1e-6, 1e6))
def test_verdicts_do_not_depend_on_the_scale_of_loss_and_gradient(seed, loss_scale, norm_scale):
    numbers, one, other = random.Random(seed), SpikeGuard(), SpikeGuard()
    for _ in range(60):
        loss, norm = abs(3 + numbers.gauss(0, 0.1)) * numbers.choice((1, 1, 1, 1, 1, 50)), math.exp(numbers.gauss(0, 0.3))
        assert one.judge(loss, norm) == other.judge(loss * loss_scale, norm * norm_scale)


def test_a_state_goes_through_a_checkpoint():
    guard = calm()
    guard.judge(math.nan, 1.0)
    copy = SpikeGuard()
    copy.load_state(guard.state())
    numbers = random.Random(3)
    for _ in range(300):
        step = (numbers.choice((2.0, 2.1, 30.0, math.nan)), numbers.choice((1.0, 1.2, 40.0)))
        assert guard.judge(*step) == copy.judge(*step)
    assert guard.state() == copy.state()
