"""Commands that try a plan more than one way: sweeps, and the measurements behind `run --tune-micro-batch`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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


def _say_aside(text: str) -> None:
    sys.stderr.write(text + "\n")


def add_commands(app: typer.Typer) -> None:
    """Puts them under a command line."""
    app.command(hidden=True)(measure_steps)
