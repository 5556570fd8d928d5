"""Sweeps: the product of a grid over a plan's keys, one run in a folder of its own for each point, and a table of them all.

What has been done is read from the runs' own folders, so a sweep that was ended in any way goes on when it is started again: finished
runs stand, one that was cut short resumes, one that failed is tried again. `sweep.json` and `sweep.csv` are written anew after each run.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from planner.errors import InputError, Problem, nearest
from planner.files import parse_yaml, read_json, read_text, to_json, to_yaml, write_text
from planner.layout import Layout
from planner.plan import build_request
from planner.report._numbers import significant, with_unit
from planner.spec import Spec
from planner.workload import Workload
from reftrain.config import RunConfig, Training, make_run_config
from reftrain.measure import read_metrics
from reftrain.parallel import default_device
from reftrain.prepare_run import prepare_data
from reftrain.runnable import check_runnable
from reftrain.trials import Child, rendered, vary

__all__ = ["Row", "Sweep", "Trial", "parse_grid", "plan_trials", "render_sweep", "run_sweep"]

MAX_RUNS = 1000
SECTIONS: dict[str, type[Spec]] = {"training": Training, "workload": Workload, "layout": Layout}
UNEQUAL = {"workload.seq_len", "training.data", "training.mask_fraction", "training.eval_tokens"}
"""Keys that change what the loss is a mean of."""
NUM_SOUND_DECIMALS = 5
FINAL = ("done", "diverged")
"""What another try would only repeat."""


@dataclass(frozen=True)
class Trial:
    """One point of the grid."""

    name: str
    settings: dict[str, Any]
    """Dotted key -> value."""
    plan: dict[str, Any]
    config: RunConfig


@dataclass(frozen=True)
class Row:
    """One run as the table shows it."""

    name: str
    settings: dict[str, Any]
    status: str = "not started"
    """done | diverged | failed | interrupted | not started."""
    num_steps: int = 0
    eval_loss: float | None = None
    recent_loss: float | None = None
    tokens_per_s: float | None = None
    peak_bytes: int | None = None
    error: str = ""
    rank: int | None = None
    """1 is best; only runs that are done have one."""


@dataclass(frozen=True)
class Sweep:
    """Where a sweep stands."""

    folder: Path
    rows: tuple[Row, ...]
    ranked_by: str = "eval_loss"
    """Held-out loss, or `recent_loss` (mean over the last tenth of training steps) where a run has no held-out text."""
    notes: tuple[str, ...] = field(default=())

    @property
    def best(self) -> Row | None:
        """The run with the lowest loss."""
        return next((row for row in self.rows if row.rank == 1), None)

    def to_dict(self) -> dict[str, Any]:
        """The object that `sweep --json` prints and `sweep.json` holds."""
        best = self.best
        runs = [{**asdict(row), "folder": str(self.folder / "runs" / row.name)} for row in self.rows]
        return {"schema_version": 1, "ranked_by": self.ranked_by, "best": best.name if best else None, "runs": runs, "notes": list(self.notes)}

    def save(self) -> None:
        """Writes `sweep.json` and `sweep.csv`, each whole or not at all."""
        write_text(self.folder / "sweep.json", to_json(self.to_dict()))
        keys = list(dict.fromkeys(key for row in self.rows for key in row.settings))
        columns = ["rank", "name", *keys, "status", "num_steps", "eval_loss", "recent_loss", "tokens_per_s", "peak_bytes", "error"]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**asdict(row), **row.settings} for row in self.rows)
        write_text(self.folder / "sweep.csv", text.getvalue())


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`KEY=VALUE,VALUE` to dotted keys and values.

    Raises:
        InputError: every text that is wrong: no values, an unknown key, one that stands twice, a value that stands twice.

    Example:
        >>> parse_grid(["learning_rate=1e-4,3e-4", "layout.micro_batch_size=1,2"])
        {'training.learning_rate': [0.0001, 0.0003], 'layout.micro_batch_size': [1, 2]}
    """
    grid: dict[str, list[Any]] = {}
    problems = []
    for text in texts:
        name, sign, values = text.partition("=")
        section, dot, rest = name.strip().partition(".")
        key = name.strip() if dot else f"training.{section}"
        if not sign or not name.strip() or not all(value.strip() for value in values.split(",")):
            problems.append(Problem("--grid", text, "must be KEY=VALUE,VALUE,...", "write e.g. --grid learning_rate=1e-4,3e-4"))
        elif dot and section not in SECTIONS:
            fix = "write KEY, training.KEY, workload.KEY or layout.KEY"
            problems.append(Problem("--grid", name, "is no key that a sweep can change", fix))
        elif (known := SECTIONS[section if dot else "training"].model_fields) and (rest or section) not in known:
            close = nearest(rest or section, known)
            fix = f"did you mean {', '.join(close)}?" if close else f"known keys: {', '.join(known)}"
            problems.append(Problem("--grid", name, f"is not a key of {section if dot else 'training'}", fix))
        elif key in grid:
            problems.append(Problem("--grid", name, "stands here twice", "give all its values at once"))
        else:
            try:
                grid[key] = [parse_yaml(value.strip(), "--grid") for value in values.split(",")]
            except InputError as error:
                problems += [replace(problem, value=text) for problem in error.problems]
            if len({repr(value) for value in grid.get(key, ())}) < len(grid.get(key, ())):
                problems.append(Problem("--grid", text, "names a value twice", "leave one out"))
    if problems:
        raise InputError(*problems)
    return grid


def plan_trials(config: RunConfig, grid: Mapping[str, Sequence[Any]]) -> list[Trial]:
    """All points of the grid as plans that can run here, the last key changing fastest.

    Raises:
        InputError: too many points, or some that cannot run; each mistake once.
    """
    count = math.prod(len(values) for values in grid.values())
    if count > MAX_RUNS:
        raise InputError.single("--grid", count, f"a sweep has at most {MAX_RUNS:,} runs", "give fewer values")
    plan, trials = config.plan, []
    problems: dict[str, Problem] = {}
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        try:
            varied = vary(plan, settings)
            trial = Trial(_name(settings), settings, varied, make_run_config(build_request(varied)))
            check_runnable(trial.config, default_device())
            trials.append(trial)
        except InputError as error:
            problems |= {str(problem): problem for problem in error.problems}
    if problems:
        raise InputError(*problems.values())
    return trials


def _name(settings: Mapping[str, Any]) -> str:
    """A folder's name: what a person looks for, and a digest that tells apart what the name cannot.

    Example:
        >>> _name({"training.learning_rate": 0.001})
        'learning_rate=0.001-fc875b1e'
    """
    text = ",".join(f"{key.removeprefix('training.')}={value}" for key, value in settings.items())
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9._=,+-]', '_', text)[:100]}-{digest}"


def run_sweep(config: RunConfig, trials: Sequence[Trial], out: Path, show: Callable[[str, int, int], None]) -> tuple[Sweep, bool]:
    """Runs what is not finished yet; returns the table, and whether a signal ended it before its end.

    Args:
        config: the run that all trials vary.
        show: called with (what is going on, number of runs that are over, step of the one that is not).
    Raises:
        InputError: `out` holds another plan's sweep, is in use, or cannot be written.
    """
    with _held(out) as lock:
        _check_plan(config, out)
        (out / "runs").mkdir(exist_ok=True)
        errors: dict[str, str] = {}
        shards = [Path(prepare_data(trial.config, out)) for trial in trials]  # the shipped corpus is prepared once for all
        child = Child(held_files=(lock,))
        with child.listening():
            _tabulate(trials, out, errors).save()
            for number, (trial, data) in enumerate(zip(trials, shards, strict=True)):
                if not child.stop_signal and _row(trial, out, errors).status not in FINAL:
                    errors[trial.name] = _run(trial, out, data, child, partial(show, trial.name, number))
                    _tabulate(trials, out, errors).save()
        sweep = _tabulate(trials, out, errors)
        return sweep, any(row.status in ("interrupted", "not started") for row in sweep.rows) and child.stop_signal != 0


@contextmanager
def _held(out: Path) -> Iterator[int]:
    """Keeps every other sweep out of the folder. The lock is shared with the run of the moment, which may outlive a sweep that was killed.

    Raises:
        InputError: see `run_sweep`.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError.single("--out", str(out), f"cannot be made ({error.strerror})", "choose another folder") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield handle
    except BlockingIOError:
        rule = "is in use by another sweep, or by a run that a killed sweep left behind"
        raise InputError.single("--out", str(out), rule, "wait for it, stop it, or choose another folder") from None
    finally:
        os.close(handle)


def _check_plan(config: RunConfig, out: Path) -> None:
    """The plan that is varied stays the same for the life of a sweep; the grid may grow."""
    file = out / "plan.yaml"
    plan = to_yaml({key: value for key, value in config.plan.items() if key not in ("prediction", "provenance")})
    if not file.exists():
        if any(path.name != ".lock" for path in out.iterdir()):
            raise InputError.single("--out", str(out), "holds something else already", "choose an empty folder")
        write_text(file, plan)
    elif read_text(file) != plan:
        rule = "holds the sweep of another plan, or of another number of steps"
        raise InputError.single("--out", str(out), rule, f"go on with the plan in {file}, or choose another folder")


def _run(trial: Trial, out: Path, data: Path, child: Child, show: Callable[[int], None]) -> str:
    """Starts or resumes a run; returns why it failed, empty where it did not or was told to stop."""
    file, folder, log = (out / "runs" / f"{trial.name}{suffix}" for suffix in (".yaml", "", ".log"))
    is_shared = trial.config.training.data == "corpus"
    write_text(file, to_yaml(vary(trial.plan, {"training.data": str(data.resolve())}) if is_shared else trial.plan))
    start = log.stat().st_size if log.exists() else 0
    arguments = ["run", str(file), "--out", str(folder), "--resume", "--json"]
    status = child.run(arguments, log, lambda: show(_last_step(folder / "metrics.jsonl")))
    if status == 0 or child.stop_signal:
        return ""
    said = log.read_bytes()[start:].decode(errors="replace")
    found = re.search(r"^(error|reftrain failed): .*(\n  rule .*)?", said, re.MULTILINE)
    line = re.sub(r"\n  rule", ":", found.group()) if found else ""
    ended = f"ended by signal {-status}" if status < 0 else f"ended with status {status}"
    return f"{line or ended} (see {log})"


def _last_step(metrics: Path) -> int:
    """The last step in a log, without reading all of it."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(metrics.stat().st_size - 4096, 0))
            found = re.findall(rb'"kind": "step", "step": (\d+)', file.read())
    except OSError:
        return 0
    return int(found[-1]) + 1 if found else 0


def _row(trial: Trial, out: Path, errors: Mapping[str, str]) -> Row:
    """What a run's folder says about it."""
    folder, row = out / "runs" / trial.name, Row(trial.name, trial.settings, error=errors.get(trial.name, ""))
    records = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    if not records:
        return replace(row, status="failed" if row.error else "not started")
    steps = [record for record in records if record.get("kind") == "step"]
    summary = read_json(folder / "summary.json") if (folder / "summary.json").is_file() else {}
    if summary.get("is_complete"):
        return replace(
            row, status="done", num_steps=summary["num_steps"], eval_loss=_number(summary.get("eval", {}).get("loss")),
            recent_loss=_number(summary.get("recent_loss")), tokens_per_s=summary.get("tokens_per_s"), peak_bytes=summary.get("peak_bytes"),
        )  # fmt: skip
    status = "diverged" if records[-1].get("kind") == "diverged" else "failed" if row.error else "interrupted"
    return replace(row, status=status, num_steps=len(steps), recent_loss=_number(steps[-1]["loss"]) if steps else None)


def _number(value: object) -> float | None:
    """A finite number; logs spell the others as text."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _tabulate(trials: Sequence[Trial], out: Path, errors: Mapping[str, str]) -> Sweep:
    """All rows: those that are done by their loss, then the others in the grid's order."""
    rows = [_row(trial, out, errors) for trial in trials]
    done = [row for row in rows if row.status == "done"]
    measure = "eval_loss" if done and all(row.eval_loss is not None for row in done) else "recent_loss"
    ranked = sorted(done, key=lambda row: _order(getattr(row, measure), row))
    ranked = [replace(row, rank=None if getattr(row, measure) is None else i) for i, row in enumerate(ranked, 1)]
    unequal = sorted(UNEQUAL & {key for row in rows for key in row.settings})
    notes = [f"losses are means over different tokens where {' and '.join(unequal)} differ"] if unequal else []
    return Sweep(out, (*ranked, *(row for row in rows if row.status != "done")), measure, tuple(notes))


def _order(loss: float | None, row: Row) -> tuple[float, float]:
    """By loss; the faster first where losses differ by no more than the order of summation makes them."""
    return math.inf if loss is None else round(loss, NUM_SOUND_DECIMALS), -(row.tokens_per_s or 0.0)


def render_sweep(sweep: Sweep) -> str:
    """The table, best first and marked."""
    keys = list(dict.fromkeys(key for row in sweep.rows for key in row.settings))
    loss = "held-out loss" if sweep.ranked_by == "eval_loss" else "recent loss"
    table = Table("", *(key.removeprefix("training.") for key in keys), loss, "tokens/s", "peak memory", "steps", "state")
    for row in sweep.rows:
        value = row.eval_loss if sweep.ranked_by == "eval_loss" and row.status == "done" else row.recent_loss
        table.add_row(
            "" if row.rank is None else f"{row.rank}{' *' if row.rank == 1 else ''}",
            *(str(row.settings.get(key)) for key in keys),
            "" if value is None else f"{value:.4f}" + ("" if row.status == "done" else " (not final)"),
            "" if row.tokens_per_s is None else significant(row.tokens_per_s),
            "" if row.peak_bytes is None else with_unit(row.peak_bytes, "bytes"),
            str(row.num_steps), row.status,
        )  # fmt: skip
    lines = [f"{row.name}: {row.error}" for row in sweep.rows if row.error]
    lines += [f"note: {note}" for note in sweep.notes]
    if (best := sweep.best) is not None:
        lines.append(f"* best: {sweep.folder / 'runs' / best.name}")
    return rendered(table) + "".join(f"{line}\n" for line in [*lines, f"written: {sweep.folder / 'sweep.csv'} and sweep.json"])
