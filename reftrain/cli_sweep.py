"""Commands that try a plan more than one way: sweeps, and the measurements behind `run --tune-micro-batch`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli import JsonFlag
from planner.errors import InputError

if TYPE_CHECKING:
    from reftrain.config import RunConfig

__all__ = ["add_commands", "tune"]


def tune(config: RunConfig, folder: Path, *, resume: bool, is_quiet: bool) -> Path:
    """The plan file to run instead, with the fastest micro-batch size; a run that goes on keeps the one that was found when it started."""
    from reftrain.launch import is_worker
    from reftrain.prepare_run import check_folder
    from reftrain.tune import render_tuning, tune_micro_batch, tuned_plan

    if is_worker():
        rule = "starts processes of its own, and torchrun has started some"
        raise InputError.single("--tune-micro-batch", True, rule, "run it without torchrun, on one machine")
    check_folder(config, folder, resume)
    plan = tuned_plan(config, folder) if resume else None
    if plan is None:
        (sys.stderr if is_quiet else sys.stdout).write(render_tuning(tune_micro_batch(config, folder, _say_aside)))
        sys.stdout.flush()
        plan = tuned_plan(config, folder)
    assert plan is not None
    return plan


def measure_steps(
    plan: Annotated[str, typer.Argument(metavar="PLAN.yaml")], out: Annotated[str, typer.Option(metavar="DIR", help="Where to write.")]
) -> None:
    """Take a few steps as a plan says, and write what they took; what `run --tune-micro-batch` starts."""
    from reftrain.config import load_run_config
    from reftrain.launch import is_worker, launch
    from reftrain.tune import measure_steps as measure

    config = load_run_config(plan)
    if not is_worker() and config.layout.num_devices > 1:
        raise typer.Exit(launch(["measure-steps", plan, "--out", out], Path(out), config.layout.num_devices, 0))
    measure(config, Path(out))


def sweep(
    plan: Annotated[str, typer.Argument(metavar="PLAN.yaml", help="The plan that all runs vary.")],
    grid: Annotated[
        list[str], typer.Option("--grid", metavar="KEY=V,V", help="Values of a key of training:, or of workload.KEY or layout.KEY; may be repeated.")
    ],
    out: Annotated[str, typer.Option(metavar="DIR", help="Where runs and tables go; the same folder again goes on with what is not done.")],
    steps: Annotated[int | None, typer.Option(metavar="N", help="Steps of each run, instead of the plan's tokens.", min=1)] = None,
    as_json: JsonFlag = False,
) -> None:
    """Run every combination of some values, and rank the runs by loss."""
    from planner.files import to_json
    from reftrain.config import load_run_config
    from reftrain.sweep import parse_grid, plan_trials, render_sweep, run_sweep

    config, values = load_run_config(plan, {} if steps is None else {"num_steps": steps}), parse_grid(grid)
    if steps is not None and "training.num_steps" in values:
        raise InputError.single("--grid", "num_steps", "and --steps both say how long runs are", "leave one out")
    trials = plan_trials(config, values)
    show, close = _sweep_progress(len(trials))
    try:
        found, is_interrupted = run_sweep(config, trials, Path(out), show)
    finally:
        close()
    sys.stdout.write(to_json(found.to_dict()) if as_json else render_sweep(found))
    raise typer.Exit(130 if is_interrupted else 0 if found.best else 3)


def scaling_runs(
    minutes: Annotated[float, typer.Option(metavar="M", help="What all runs together may take, on this machine.", min=0.5)],
    out: Annotated[str, typer.Option(metavar="DIR", help="Where runs and runs.csv go; the same folder again goes on.")] = "scaling",
    data: Annotated[str | None, typer.Option(metavar="DIR", help="A folder of `reftrain data prepare`; without it, the shipped corpus.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Plan and make a ladder of small runs, and write what `planner scaling fit` reads."""
    from planner.files import to_json
    from reftrain.scaling_runs import render_scaling_runs, run_scaling

    runs = run_scaling(Path(out), minutes, data, _say_aside)
    sys.stdout.write(to_json(runs.to_dict()) if as_json else render_scaling_runs(runs, Path(out)))
    raise typer.Exit(130 if runs.is_interrupted else 0)


def _sweep_progress(num_runs: int) -> tuple[Callable[[str, int, int], None], Callable[[], None]]:
    """A bar over runs on a terminal, a line per run elsewhere; both on standard error."""
    if not sys.stderr.isatty():
        told: set[str] = set()

        def tell(name: str, number: int, _step: int) -> None:
            if name not in told:
                told.add(name)
                _say_aside(f"run {number + 1} of {num_runs}: {name}")

        return tell, lambda: None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    note = TextColumn("{task.fields[note]}")
    bar = Progress(TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), note, console=Console(stderr=True))
    task = bar.add_task("sweep", total=num_runs, note="")
    bar.start()
    return lambda name, number, step: bar.update(task, completed=number, note=f"{name}  step {step}"), bar.stop


def _say_aside(text: str) -> None:
    sys.stderr.write(text + "\n")


def add_commands(app: typer.Typer) -> None:
    """Puts them under a command line."""
    app.command(epilog="Example: reftrain sweep plan.yaml --grid learning_rate=1e-4,3e-4,1e-3 --grid layout.micro_batch_size=1,2 --out sweeps/lr")(
        sweep
    )
    app.command(epilog="Example: reftrain scaling-runs --minutes 60 --out scaling")(scaling_runs)
    app.command(hidden=True)(measure_steps)
