"""The ladder of small runs: what is planned, what is chosen of trials, what goes on and what is left out."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner.architectures import load_model
from planner.errors import InfeasibleError, InputError, PlannerError
from planner.files import read_yaml
from planner.graph import count_params
from planner.plan import build_request
from reftrain import scaling_runs
from reftrain.config import make_run_config
from reftrain.scaling_plan import LEAST_STEPS, MOST_EPOCHS, RATES, Ladder, plan_ladder, plan_of, rate_at, shapes
from reftrain.scaling_runs import ScalingRuns, render_scaling_runs, run_scaling

UNIQUE, HELD_OUT = 6_000_000, 200_000


def speed(params: int) -> float:
    return 8e5 * (4e4 / params) ** 0.8


@pytest.fixture(scope="module")
def ladder() -> Ladder:
    return plan_ladder(10 * 60, 1024, UNIQUE, HELD_OUT, speed)


def test_the_ladder_follows_the_protocol(ladder: Ladder) -> None:
    counted = [rung for rung in ladder.rungs if not rung.is_trial or rung.learning_rate == RATES[0]]
    assert len(counted) == 11
    grid = {(rung.params, rung.tokens) for rung in counted}
    assert len({params for params, _ in grid}) == 3
    assert len(grid) == 9
    assert all(5 <= tokens / params <= 100 for params, tokens in grid)
    compute = [params * tokens for params, tokens in grid]
    assert max(compute) / min(compute) >= 30
    assert all(rung.steps >= LEAST_STEPS and rung.tokens <= 1.01 * MOST_EPOCHS * UNIQUE for rung in ladder.rungs)
    assert sorted(rung.seed for rung in counted) == [0] * 9 + [1, 2]
    assert ladder.predicted_s <= 0.85 * 600
    costs = [[rung.predicted_s for rung in part] for _, part in itertools.groupby(ladder.rungs, key=lambda rung: rung.is_trial)]
    assert costs == [sorted(part) for part in costs]


def test_more_time_makes_a_larger_ladder_until_the_text_ends() -> None:
    largest = [max(rung.params for rung in plan_ladder(60.0 * minutes, 1024, UNIQUE, HELD_OUT, speed).rungs) for minutes in (5, 15, 40, 400, 4000)]
    assert largest == sorted(largest)
    assert largest[0] < largest[2]
    assert largest[3] == largest[4]
    with pytest.raises(InfeasibleError, match="minutes on this machine"):
        plan_ladder(20, 1024, UNIQUE, HELD_OUT, speed)
    with pytest.raises(InfeasibleError, match="too few"):
        plan_ladder(6e5, 1024, 20_000, 1000, speed)


def test_plans_say_what_the_protocol_wants_and_can_run(ladder: Ladder) -> None:
    for rung in ladder.rungs:
        config = make_run_config(build_request(plan_of(rung, ladder, "synthetic", 3e-3)))
        assert config.num_steps * config.tokens_per_step == rung.tokens
        assert config.training.min_lr_fraction == 0
        assert config.warmup_steps == round(0.05 * rung.steps)
        assert config.training.eval_tokens == HELD_OUT
    for shape in shapes(1024)[::7]:
        assert shape.params == count_params(load_model(shape.config))["total"], "the tied table once"


def test_a_rate_follows_the_widths_that_were_tried() -> None:
    assert rate_at(128, [(32, 8e-3), (64, 4e-3)]) == pytest.approx(2e-3)
    assert rate_at(4096, [(32, 8e-3), (64, 4e-3)]) == min(RATES)
    assert rate_at(128, [(32, 2e-3), (64, 2e-3)]) == pytest.approx(2e-3)


class Pretended:
    """A child that trains nothing: losses follow a law, best at a rate of 4e-3."""

    def __init__(self, stop_after: int = 10**9, fail: str = "") -> None:
        self.stop_signal, self.names, self.stop_after, self.fail = 0, [], stop_after, fail  # type: ignore[var-annotated]

    @contextmanager
    def listening(self) -> Iterator[None]:
        yield

    def run(self, arguments: Any, log: Path, look: Callable[[], None] = lambda: None) -> int:
        assert arguments[0] == "run"
        assert "--resume" in arguments
        plan, folder = read_yaml(arguments[1]), Path(arguments[3])
        if folder.name == self.fail:
            return 1
        self.names.append(folder.name)
        if len(self.names) > self.stop_after:
            self.stop_signal = 15
            return 130
        params, tokens = (int(x) for x in re.findall(r"n(\d+)-d(\d+)", folder.name)[0])
        rate, seed = plan["training"]["learning_rate"], plan["training"]["seed"]
        loss = 1.7 + 400 / params**0.34 + 410 / tokens**0.28 + 30 * abs(rate - 4e-3) + 0.01 * seed
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"eval": {"loss": loss}}))
        return 0


def go(out: Path, child: Pretended, ladder: Ladder, monkeypatch: pytest.MonkeyPatch, minutes: float = 10) -> ScalingRuns:
    monkeypatch.setattr(scaling_runs, "_plan", lambda *_: ladder)
    out.mkdir(exist_ok=True)
    return run_scaling(out, minutes, "somewhere", lambda _: None, child)  # type: ignore[arg-type]


def test_rows_are_the_best_of_their_trials(ladder: Ladder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = go(tmp_path / "x", Pretended(), ladder, monkeypatch)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "x/runs.csv").read_text())))
    assert list(rows[0]) == ["run", "params", "tokens", "unique_tokens", "loss"]
    assert len(rows) == 11
    assert all(ran.learning_rate == pytest.approx(4e-3) for ran in runs.rows)
    assert all(int(row["unique_tokens"]) == min(int(row["tokens"]), UNIQUE) for row in rows)
    assert json.loads((tmp_path / "x/ladder.json").read_text())["is_complete"]
    shown = render_scaling_runs(runs, tmp_path / "x")
    assert "planner scaling fit --runs" in shown
    assert "not done" not in shown


def test_trials_come_first_and_a_rate_waits_for_them(ladder: Ladder) -> None:
    runs = ScalingRuns(ladder)
    assert [runs.is_ready(rung) for rung in ladder.rungs] == [True] * 6 + [False] * 9


def test_a_ladder_goes_on_where_it_was_stopped(ladder: Ladder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, first, second = tmp_path / "x", Pretended(stop_after=7), Pretended()
    assert go(out, first, ladder, monkeypatch).is_interrupted
    assert len(csv_rows(out)) == 3, "two of trials, one other"
    runs = go(out, second, replace(ladder, rungs=()), monkeypatch)
    assert len(runs.done) == len(ladder.rungs)
    assert first.names[:7] + second.names == [rung.name for rung in ladder.rungs], "nothing twice, by the ladder that was there"
    go(tmp_path / "whole", Pretended(), ladder, monkeypatch)
    assert csv_rows(out) == csv_rows(tmp_path / "whole")


def csv_rows(out: Path) -> list[str]:
    return (out / "runs.csv").read_text().splitlines()[1:]


def test_what_the_time_does_not_allow_is_not_started(ladder: Ladder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling_runs, "_pace", lambda runs: 1.0)
    few, longest = replace(ladder, rungs=(*ladder.rungs[:6], ladder.rungs[-1])), ladder.rungs[-1].predicted_s
    runs = go(tmp_path / "x", Pretended(), few, monkeypatch, minutes=0.9 * longest / 60)
    assert runs.skipped == [ladder.rungs[-1].name]
    assert "1 of 7 runs are not done" in render_scaling_runs(runs, tmp_path / "x")
    assert not go(tmp_path / "x", Pretended(), few, monkeypatch, minutes=1.1 * longest / 60).skipped


def test_failures_and_foreign_folders_are_named(ladder: Ladder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlannerError, match=ladder.rungs[1].name):
        go(tmp_path / "x", Pretended(fail=ladder.rungs[1].name), ladder, monkeypatch)
    assert list(json.loads((tmp_path / "x/ladder.json").read_text())["done"]) == [ladder.rungs[0].name]
    (tmp_path / "x/ladder.json").write_text("{}")
    with pytest.raises(InputError, match="something else"):
        go(tmp_path / "x", Pretended(), ladder, monkeypatch)
