"""Closed forms of the schedules against an event-driven simulation of their action lists."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.schedules import SCHEDULES
from planner.schedules._simulate import Simulation, simulate

CHUNKS = {"gpipe": (1,), "1f1b": (1,), "interleaved_1f1b": (2, 3, 4), "zb_h1": (1,), "dualpipe": (2,)}
MAX_ERROR = {"gpipe": 1e-9, "1f1b": 0.05, "interleaved_1f1b": 0.08, "zb_h1": 0.10, "dualpipe": 0.12}
"""For any pipeline of the strategy below; the docstrings give what is usual."""
COSTS_S = [(1.0, 1.0, 1.0), (1.0, 1.2, 0.8), (2.0, 5.0, 3.0), (3.0, 2.0, 1.0), (1.0, 1.0, 3.0), (1.0, 3.0, 5.0), (1.0, 2.0, 0.0)]


def pipelines(name: str) -> list[tuple[int, int, int]]:
    """Legal (pp, num_virtual_stages, num_microbatches)."""
    microbatches = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 24, 32)
    return [x for x in product((1, 2, 3, 4, 6, 8), CHUNKS[name], microbatches) if not SCHEDULES[name].problems(*x)]


def play(name: str, pp: int, v: int, m: int, f: object, b: object, w: object, p2p_s: float = 0.0) -> Simulation:
    f, b, w = (np.broadcast_to(np.asarray(x, dtype=float), (pp,)).tolist() for x in (f, b, w))
    return simulate(SCHEDULES[name], pp, v, m, f, b, w, p2p_s)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved_1f1b", "zb_h1"])
@pytest.mark.parametrize("costs_s", COSTS_S)
def test_equal_stages_without_transfers_are_exact(name: str, costs_s: tuple[float, float, float]) -> None:
    for pipeline in pipelines(name):
        expected = play(name, *pipeline, *costs_s).makespan_s
        assert SCHEDULES[name].makespan_s(*costs_s, 0.0, *pipeline) == pytest.approx(expected, rel=1e-12), pipeline


@pytest.mark.parametrize("f", [0.5, 1.0, 2.0])
def test_dualpipe_is_exact_where_forward_and_both_backwards_last_alike(f: float) -> None:
    for pipeline in pipelines("dualpipe"):
        expected = play("dualpipe", *pipeline, f, f, f).makespan_s
        assert SCHEDULES["dualpipe"].makespan_s(f, f, f, 0.0, *pipeline) == pytest.approx(expected, rel=1e-12), pipeline


@pytest.mark.parametrize(("name", "bound"), [("gpipe", 1e-12), ("1f1b", 1e-12), ("interleaved_1f1b", 1e-12), ("zb_h1", 1e-12), ("dualpipe", 0.01)])
def test_equal_stages_with_transfers(name: str, bound: float) -> None:
    for (pp, v, m), share in product(pipelines(name), (0.01, 0.05, 0.1)):
        p2p_s = share / v  # a share of the forward of one chunk
        expected = play(name, pp, v, m, 1.0, 1.1, 0.9, p2p_s).makespan_s
        assert SCHEDULES[name].makespan_s(1.0, 1.1, 0.9, p2p_s, pp, v, m) == pytest.approx(expected, rel=bound), (pp, v, m)


@pytest.mark.parametrize("name", sorted(CHUNKS))
def test_activations_held_are_exact(name: str) -> None:
    for pp, v, m in pipelines(name):
        assert SCHEDULES[name].in_flight(pp, v, m).tolist() == play(name, pp, v, m, 1.0, 1.0, 1.0).in_flight.tolist(), (pp, v, m)


@pytest.mark.parametrize("name", sorted(CHUNKS))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_unequal_stages(name: str, data: st.DataObject) -> None:
    pp, v, m = data.draw(st.sampled_from(pipelines(name)))
    seconds = st.lists(st.floats(1.0, 1.5), min_size=pp, max_size=pp)
    f, b, w = (np.array(data.draw(seconds)) * data.draw(st.floats(*scale)) for scale in ((1.0, 1.0), (0.8, 2.0), (0.5, 1.2)))
    p2p_s = data.draw(st.floats(0.0, 0.1)) / v
    expected = play(name, pp, v, m, f, b, w, p2p_s).makespan_s
    assert SCHEDULES[name].makespan_s(f, b, w, p2p_s, pp, v, m) == pytest.approx(expected, rel=MAX_ERROR[name])


@pytest.mark.parametrize("name", sorted(CHUNKS))
def test_the_simulator_itself_obeys_order_and_conserves_work(name: str) -> None:
    pp, v, m = next(x for x in pipelines(name) if x[0] == 4 and x[2] == 8)
    f, b, w = np.array([1.0, 1.5, 1.2, 1.1]), np.array([1.4, 1.0, 1.3, 1.1]), np.array([0.9, 1.2, 0.8, 1.0])
    played, schedule = play(name, pp, v, m, f, b, w, 0.05), SCHEDULES[name]
    assert played.makespan_s >= schedule.busy_s(f, b, w, m).max()
    done = {(x.action.kind, x.action.microbatch, schedule.position(s, x.action.chunk, pp)): x for s, spans in enumerate(played.spans) for x in spans}
    for (kind, microbatch, at), span in done.items():
        if kind == "F" and at > 0:
            assert span.start_s >= done["F", microbatch, at - 1].end_s + 0.05 - 1e-12
        if kind == "B" and ("B", microbatch, at + 1) in done:
            assert span.start_s >= done["B", microbatch, at + 1].end_s + 0.05 - 1e-12
        if kind != "F":
            assert span.start_s >= done["F", microbatch, at].end_s
    for spans in played.spans:
        assert all(b.start_s >= a.end_s - 1e-12 or (a.action.paired and b.start_s == a.start_s) for a, b in pairwise(spans))
