"""Schedules: published bubbles and memory, legality, arrays against scalars, action lists."""

from __future__ import annotations

import numpy as np
import pytest

from planner.errors import InputError
from planner.schedules import SCHEDULES, Schedule, Stages, check_schedule

CHUNKS = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": 3, "zb_h1": 1, "dualpipe": 2}
NAMES = sorted(CHUNKS)


def bubble_s(name: str, pp: int, m: int, f: float = 1.0, b: float = 1.0, w: float = 1.0, v: int | None = None) -> float:
    stages = (np.full(pp, f), np.full(pp, b), np.full(pp, w))
    return float(SCHEDULES[name].bubble_s(*stages, 0.0, pp, v or CHUNKS[name], m))


def test_the_folder_registers_every_schedule_under_its_name() -> None:
    assert {name: schedule.name for name, schedule in SCHEDULES.items()} == {name: name for name in CHUNKS}


@pytest.mark.parametrize(("pp", "m"), [(2, 4), (4, 8), (8, 16), (8, 64)])
def test_published_bubbles(pp: int, m: int) -> None:
    ideal = 3.0 * m
    assert bubble_s("gpipe", pp, m) / ideal == pytest.approx((pp - 1) / m)  # arXiv:2104.04473 section 2.2.1
    assert bubble_s("1f1b", pp, m) / ideal == pytest.approx((pp - 1) / m)
    for v in (2, 4):
        assert bubble_s("interleaved_1f1b", pp, m, v=v) / ideal == pytest.approx((pp - 1) / (v * m))  # section 2.2.2
    f, b, w = 1.0, 1.2, 0.8
    assert bubble_s("zb_h1", pp, m, f, b, w) == pytest.approx((pp - 1) * (f + b - w))  # arXiv:2401.10241 table 2
    whole = b + w
    assert bubble_s("dualpipe", pp, m, f, b, w) == pytest.approx((pp / 2 - 1) * ((f + whole) + whole - 3 * w))  # arXiv:2412.19437 table 2


def test_published_memory() -> None:
    assert SCHEDULES["gpipe"].in_flight(4, 1, 8).tolist() == [8, 8, 8, 8]
    assert SCHEDULES["1f1b"].in_flight(4, 1, 8).tolist() == [4, 3, 2, 1]
    assert SCHEDULES["1f1b"].in_flight(4, 1, 2).tolist() == [2, 2, 2, 1]
    # arXiv:2205.05198 section 4.2.3: L (1 + (p - 1)/(p m)) layers' activations on the first stage, m = v chunks
    assert SCHEDULES["interleaved_1f1b"].in_flight(4, 2, 8)[0] == 4 * (1 + 3 / (4 * 2))
    assert SCHEDULES["zb_h1"].in_flight(4, 1, 8).max() == 4
    assert SCHEDULES["dualpipe"].in_flight(4, 2, 8).tolist() == [5, 5, 5, 5]
    assert [SCHEDULES[name].parameter_copies for name in NAMES] == [1, 2, 1, 1, 1]


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved_1f1b", "dualpipe"])
@pytest.mark.parametrize("pp", [2, 4, 8])
def test_the_head_holds_as_many_microbatches_as_its_timeline(name: str, pp: int) -> None:
    schedule, chunks, m = SCHEDULES[name], CHUNKS[name], 4 * pp
    last = pp * chunks // schedule.parameter_copies - 1
    expected = schedule.head_in_flight(pp, chunks, m) / schedule.parameter_copies
    for stage, actions in enumerate(schedule.timeline(pp, chunks, m)):
        held = np.cumsum([{"F": 1, "B": -1}.get(a.kind, 0) for a in actions if schedule.position(stage, a.chunk, pp) == last])
        if held.size:
            assert held.max() == expected[stage]


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb_h1"])
def test_one_stage_has_no_bubble_and_needs_no_transfer(name: str) -> None:
    schedule = SCHEDULES[name]
    assert schedule.makespan_s([2.0], [1.0], [3.0], 9.0, 1, 1, 7) == 42.0
    assert schedule.bubble_s([2.0], [1.0], [3.0], 9.0, 1, 1, [1, 7]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", NAMES)
def test_bubble_share_falls_with_more_microbatches_and_is_never_negative(name: str) -> None:
    pp, m = 4, np.array([8, 12, 16, 32, 128])
    rng = np.random.default_rng(3)
    stages = rng.uniform(0.5, 2.0, (3, pp))
    bubble = SCHEDULES[name].bubble_s(*stages, 0.0, pp, CHUNKS[name], m)
    share = bubble / SCHEDULES[name].makespan_s(*stages, 0.0, pp, CHUNKS[name], m)
    assert (bubble >= 0).all()
    assert (np.diff(share) < 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_slower_anything_never_finishes_sooner(name: str) -> None:
    schedule, pp, m, v = SCHEDULES[name], 4, 16, CHUNKS[name]
    rng = np.random.default_rng(5)
    base = [rng.uniform(1.0, 1.5, pp) for _ in range(3)]
    before = schedule.makespan_s(*base, 0.01, pp, v, m)
    assert schedule.makespan_s(*base, 0.02, pp, v, m) >= before
    for i in range(2):  # a slower W may be free in zb_h1 and dualpipe, F and B may not
        slower = [x * 1.1 if i == k else x for k, x in enumerate(base)]
        assert schedule.makespan_s(*slower, 0.01, pp, v, m) > before


@pytest.mark.parametrize("name", NAMES)
def test_arrays_equal_scalars_elementwise(name: str) -> None:
    schedule, pp, v = SCHEDULES[name], 4, CHUNKS[name]
    rng = np.random.default_rng(7)
    m = rng.choice([8, 12, 16, 24], (3, 5))
    f, b, w = rng.uniform(0.5, 2.0, (3, 3, 5, pp))
    p2p = rng.uniform(0.0, 0.2, (3, 5))
    many = schedule.makespan_s(f, b, w, p2p, pp, v, m)
    held, legal = schedule.in_flight(pp, v, m), schedule.legal(pp, v, m)
    assert (many.shape, held.shape, legal.shape) == (m.shape, (3, 5, pp), m.shape)
    for at in np.ndindex(m.shape):
        assert many[at] == schedule.makespan_s(f[at], b[at], w[at], p2p[at], pp, v, int(m[at]))
        assert held[at].tolist() == schedule.in_flight(pp, v, int(m[at])).tolist()
        assert legal[at] == (not schedule.problems(pp, v, int(m[at])))


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved_1f1b"])
def test_runs_of_alike_stages_are_looked_at_on_their_ends(name: str) -> None:
    """Never above the longest path through every stage; equal to it where there are more microbatches than stages."""
    schedule, rng = SCHEDULES[name], np.random.default_rng(11)
    for lengths in ([1, 6, 1], [2, 5], [8], [1, 1, 3, 1, 2]):
        stages, pp = Stages(np.array(lengths)), sum(lengths)
        f, b, w = rng.uniform(1.0, 1.3, (3, len(lengths)))
        each = [np.repeat(x, lengths) for x in (f, b, w)]
        assert stages.before(f).tolist() == pytest.approx((np.cumsum(each[0]) - each[0])[stages.number].tolist())
        assert stages.after(f).tolist() == pytest.approx((each[0].sum() - np.cumsum(each[0]))[stages.number].tolist())
        assert Stages.alike(np.array(each)).lengths.tolist() == lengths
        m = np.array([pp, 2 * pp, 3 * pp, 16 * pp])
        ends = schedule.longest_path_s(f, b, w, 0.01, stages, CHUNKS[name], m)
        whole = schedule.makespan_s(*each, 0.01, pp, CHUNKS[name], m)
        assert (ends <= whole * (1 + 1e-12)).all()
        assert ends[1:] == pytest.approx(whole[1:], rel=1e-12)


def test_numbers_broadcast_and_a_wrong_stage_axis_is_a_fault() -> None:
    schedule = SCHEDULES["1f1b"]
    assert schedule.makespan_s(1.0, 1.0, 1.0, [0.0, 0.5], 4, 1, [8, 8]).shape == (2,)
    with pytest.raises(ValueError, match="last axis must be the 4 stages"):
        schedule.makespan_s([1.0, 1.0], 1.0, 1.0, 0.0, 4, 1, 8)


@pytest.mark.parametrize(
    ("name", "pp", "v", "m", "words"),
    [
        ("gpipe", 4, 2, 8, ["one model chunk"]),
        ("1f1b", 4, 2, 8, ["one model chunk"]),
        ("zb_h1", 4, 2, 8, ["one model chunk"]),
        ("interleaved_1f1b", 1, 1, 8, ["pp = 1", "num_virtual_stages = 1"]),
        ("interleaved_1f1b", 4, 2, 10, ["must divide the number of microbatches = 10"]),
        ("dualpipe", 3, 1, 5, ["even pp", "2 chunks per device", "at least 2 pp = 6"]),
    ],
)
def test_illegal_pipelines_name_every_broken_rule(name: str, pp: int, v: int, m: int, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        check_schedule(name, pp, v, m)
    assert len(caught.value.problems) == len(words)
    assert all(word in str(caught.value) for word in words)
    assert all(problem.fix for problem in caught.value.problems)


@pytest.mark.parametrize("name", NAMES)
def test_legal_pipelines_pass(name: str) -> None:
    for v in (CHUNKS[name], *SCHEDULES[name].usual_virtual_stages):
        check_schedule(name, 4, v, 8)


def test_unknown_schedule_names_the_nearest() -> None:
    with pytest.raises(InputError, match="1f1b"):
        check_schedule("1f1", 4, 1, 8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("m", [8, 12])
def test_every_action_is_done_once(name: str, pp: int, m: int) -> None:
    schedule: Schedule = SCHEDULES[name]
    v = CHUNKS[name]
    timeline = schedule.timeline(pp, v, m)
    slices = pp * v // schedule.parameter_copies
    done = [(a.kind, a.microbatch, schedule.position(a.stage, a.chunk, pp)) for order in timeline for a in order]
    assert len(set(done)) == len(done)
    every = {(i, k) for i in range(m) for k in range(slices)}
    for kind in "FB":
        assert {d[1:] for d in done if d[0] == kind} == every
    if name == "zb_h1":
        assert {d[1:] for d in done if d[0] == "W"} == every
    assert all(a.stage == s and 0 <= a.chunk < v for s, order in enumerate(timeline) for a in order)


def test_mirror_slices_of_dualpipe() -> None:
    assert SCHEDULES["dualpipe"].resident([5.0, 1.0, 1.0, 2.0]).tolist() == [7.0, 2.0, 2.0, 7.0]
    assert SCHEDULES["1f1b"].resident([5.0, 1.0]).tolist() == [5.0, 1.0]
