"""Runs a ladder for a scaling law on this machine, within a time budget; the same command again goes on with what is not done.

In: text. Out: `runs.csv` (run, params, tokens, unique_tokens, loss), which `planner scaling fit` reads, and `ladder.json` with all that was
planned and measured.
"""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from planner.errors import InputError, PlannerError
from planner.files import read_json, to_json, to_yaml, write_text
from planner.report._numbers import with_unit
from planner.units import format_count
from reftrain.data import TokenDataset
from reftrain.scaling_plan import NUM_RATED, Ladder, Rung, plan_ladder, plan_of, rate_at, shapes
from reftrain.trials import Child, rendered

__all__ = ["Ran", "ScalingRuns", "render_scaling_runs", "run_scaling"]

VOCAB_SIZE = 1024
"""Small, so that the table does not outweigh such small models."""
PROBES = (0, 4, 12)
"""Members of the family whose speed is measured; others lie between."""
PROBE_BATCH = 16
COLUMNS = ("run", "params", "tokens", "unique_tokens", "loss")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Ran:
    """One run that is over."""

    rung: Rung
    learning_rate: float
    loss: float
    """Nats per token, over all held-out text."""
    took_s: float


@dataclass
class ScalingRuns:
    """Where a ladder stands."""

    ladder: Ladder
    done: dict[str, Ran] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    is_interrupted: bool = False

    @property
    def rows(self) -> list[Ran]:
        """Those that count: of each run's trials the best, once all of them are over."""
        trials = self._best_trials()
        return [ran for ran in self.done.values() if not ran.rung.is_trial] + trials

    def _best_trials(self) -> list[Ran]:
        found = []
        for params in sorted({rung.params for rung in self.ladder.rungs if rung.is_trial}):
            names = [rung.name for rung in self.ladder.rungs if rung.is_trial and rung.params == params]
            if all(name in self.done for name in names):
                found.append(min((self.done[name] for name in names), key=lambda ran: ran.loss))
        return found

    def rate(self, rung: Rung) -> float:
        """Its own, or the one that the trials lead to."""
        if rung.learning_rate is not None:
            return rung.learning_rate
        best = [(ran.rung.hidden_size, ran.learning_rate) for ran in self._best_trials()]
        own = dict(best).get(rung.hidden_size)
        return own if own is not None else rate_at(rung.hidden_size, best)

    def is_ready(self, rung: Rung) -> bool:
        """Whether its rate is known."""
        return rung.learning_rate is not None or len(self._best_trials()) == NUM_RATED

    def to_csv(self) -> str:
        """For `planner scaling fit`."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for ran in sorted(self.rows, key=lambda ran: (ran.rung.params, ran.rung.tokens, ran.rung.seed)):
            rung = ran.rung
            writer.writerow((rung.name, rung.params, rung.tokens, min(rung.tokens, self.ladder.unique_tokens), f"{ran.loss:.6f}"))
        return text.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """As `ladder.json` holds it."""
        return {
            "schema_version": 1, "vocab_size": self.ladder.vocab_size, "unique_tokens": self.ladder.unique_tokens,
            "eval_tokens": self.ladder.eval_tokens, "predicted_s": self.ladder.predicted_s, "rungs": [asdict(rung) for rung in self.ladder.rungs],
            "done": {name: {"learning_rate": ran.learning_rate, "loss": ran.loss, "took_s": ran.took_s} for name, ran in self.done.items()},
            "skipped": self.skipped, "is_complete": len(self.done) == len(self.ladder.rungs),
        }  # fmt: skip

    def save(self, out: Path) -> None:
        """Both files, each whole or not at all."""
        write_text(out / "ladder.json", to_json(self.to_dict()))
        write_text(out / "runs.csv", self.to_csv())


def run_scaling(out: Path, minutes: float, data: str | None, say: Say, child: Child | None = None) -> ScalingRuns:
    """Plans the ladder (or takes the one that is there) and makes its runs, cheapest first, as long as the time lasts.

    Raises:
        InputError: a folder that holds something else, text that cannot be read.
        InfeasibleError: no ladder fits into the time.
        PlannerError: a run failed.
    """
    start, child = time.monotonic(), child or Child()
    with child.listening():
        source = _data(out, data, child, say)
        runs = _load(out) if (out / "ladder.json").is_file() else None
        if runs is None:
            ladder = _plan(out, source, 60 * minutes - (time.monotonic() - start), child, say)
            runs = ScalingRuns(ladder)
            runs.save(out)
        say(f"{len(runs.ladder.rungs)} runs, {runs.ladder.predicted_s / 60:.1f} minutes in all by the speed measured")
        _run_all(runs, out, source, child, say, lambda: 60 * minutes - (time.monotonic() - start))
    runs.is_interrupted = child.stop_signal != 0
    return runs


def _data(out: Path, data: str | None, child: Child, say: Say) -> str:
    """The token shards that all runs share."""
    if data is not None:
        return str(Path(data).resolve())
    folder = out.resolve() / "data"
    if not (folder / "train" / "index.json").is_file():
        out.mkdir(parents=True, exist_ok=True)
        say("tokenizing the shipped corpus")
        _checked(child, ["data", "prepare", "--out", str(folder), "--vocab-size", str(VOCAB_SIZE), "--json"], out / "data.log")
    return str(folder)


def _checked(child: Child, arguments: Sequence[str], log: Path) -> None:
    status = child.run(arguments, log)
    if status != 0 and not child.stop_signal:
        raise PlannerError(f"error: reftrain {arguments[0]} ended with status {status}: see {log}")
    if child.stop_signal:
        raise KeyboardInterrupt


def _plan(out: Path, data: str, budget_s: float, child: Child, say: Say) -> Ladder:
    train, valid = (TokenDataset.open(Path(data) / part) for part in ("train", "valid"))
    say("measuring this machine's speed")
    speed = _speeds(out / "speed", train.vocab_size, child)
    return plan_ladder(budget_s, train.vocab_size, train.num_tokens, valid.num_tokens, speed)


def _speeds(out: Path, vocab_size: int, child: Child) -> Callable[[int], float]:
    """Tokens per second by parameters: a power law between neighbours of those measured, and beyond them."""
    family, found = shapes(vocab_size), []
    for number in PROBES:
        shape = family[number]
        rung = Rung(f"probe{number}", shape.hidden_size, shape.params, 20, PROBE_BATCH, 0.0)
        ladder = Ladder((rung,), vocab_size, 1, 1)
        folder = out / rung.name
        folder.mkdir(parents=True, exist_ok=True)
        write_text(out / f"{rung.name}.yaml", to_yaml(plan_of(rung, ladder, "synthetic", 1e-3)))
        if not (folder / "summary.json").is_file():
            _checked(child, ["measure-steps", str(out / f"{rung.name}.yaml"), "--out", str(folder)], out / f"{rung.name}.log")
        found.append((rung.params, float(read_json(folder / "summary.json")["tokens_per_s"])))
    return lambda params: between(found, params)


def between(points: Sequence[tuple[int, float]], x: float) -> float:
    """A power law through the two points on either side of x, or the last two.

    Example:
        >>> between([(1, 8.0), (2, 4.0), (4, 3.0)], 0.5)
        16.0
    """
    place = next((i for i in range(1, len(points) - 1) if x < points[i][0]), len(points) - 1)
    (left, low), (right, high) = points[place - 1], points[place]
    return float(low * (x / left) ** (math.log(high / low) / math.log(right / left)))


def _load(out: Path) -> ScalingRuns:
    """A ladder as it was saved.

    Raises:
        InputError: a file of something else.
    """
    values = read_json(out / "ladder.json")
    try:
        ladder = Ladder(tuple(Rung(**rung) for rung in values["rungs"]), values["vocab_size"], values["unique_tokens"], values["eval_tokens"])
        by_name = {rung.name: rung for rung in ladder.rungs}
        return ScalingRuns(ladder, {name: Ran(by_name[name], **ran) for name, ran in values["done"].items()})
    except (KeyError, TypeError) as error:
        raise InputError.single("--out", str(out), f"holds a ladder.json of something else ({error})", "choose another folder") from None


def _run_all(runs: ScalingRuns, out: Path, data: str, child: Child, say: Say, left_s: Callable[[], float]) -> None:
    """Runs of which the time that is left, at the pace so far, would not see the end are not started."""
    (out / "runs").mkdir(exist_ok=True)
    runs.skipped = []
    for number, rung in enumerate(runs.ladder.rungs, 1):
        if rung.name in runs.done or child.stop_signal:
            continue
        expected_s = rung.predicted_s * _pace(runs)
        if expected_s > left_s() or not runs.is_ready(rung):
            runs.skipped.append(rung.name)
            continue
        rate = runs.rate(rung)
        say(f"run {number} of {len(runs.ladder.rungs)}: {rung.name}, {rung.steps} steps, rate {rate:.2g}, about {with_unit(expected_s, 's')}")
        ran = _run(replace(rung), rate, runs.ladder, out, data, child)
        if ran is not None:
            runs.done[rung.name] = ran
            runs.save(out)
    runs.save(out)


def _pace(runs: ScalingRuns) -> float:
    """Time taken over time predicted, of what is done."""
    predicted = sum(ran.rung.predicted_s for ran in runs.done.values())
    return sum(ran.took_s for ran in runs.done.values()) / predicted if predicted else 1.0


def _run(rung: Rung, rate: float, ladder: Ladder, out: Path, data: str, child: Child) -> Ran | None:
    """Starts or resumes a run; None if it was told to stop."""
    file, folder, log = (out / "runs" / f"{rung.name}{suffix}" for suffix in (".yaml", "", ".log"))
    write_text(file, to_yaml(plan_of(rung, ladder, data, rate)))
    start = time.monotonic()
    status = child.run(["run", str(file), "--out", str(folder), "--resume", "--json"], log)
    if child.stop_signal:
        return None
    if status != 0:
        raise PlannerError(f"error: run {rung.name} ended with status {status}: see {log}")
    return Ran(rung, rate, float(read_json(folder / "summary.json")["eval"]["loss"]), time.monotonic() - start)


def render_scaling_runs(runs: ScalingRuns, out: Path) -> str:
    """The rows as a table, what is missing, and what to do with them."""
    table = Table("run", "parameters", "tokens", "epochs", "rate", "held-out loss", "took")
    for ran in sorted(runs.rows, key=lambda ran: (ran.rung.params, ran.rung.tokens, ran.rung.seed)):
        rung = ran.rung
        table.add_row(
            rung.name, format_count(rung.params), format_count(rung.tokens), f"{rung.tokens / runs.ladder.unique_tokens:.2f}",
            f"{ran.learning_rate:.2g}", f"{ran.loss:.4f}", with_unit(ran.took_s, "s"),
        )  # fmt: skip
    left = len(runs.ladder.rungs) - len(runs.done)
    more = f"{left} of {len(runs.ladder.rungs)} runs are not done: the same command goes on\n" if left else ""
    return f"{rendered(table)}{more}written: {out / 'runs.csv'}    use it: python -m planner scaling fit --runs {out / 'runs.csv'}\n"
