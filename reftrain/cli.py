"""The command line of the trainer. The only place that prints or exits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from planner.cli import JsonFlag, make_app, run_app
from planner.errors import InputError, MissingPieceError
from reftrain.cli_data import data_app, tokenizer_app
from reftrain.cli_dry_run import add_commands as add_dry_run
from reftrain.cli_loop import add_commands
from reftrain.cli_sweep import add_commands as add_sweep_commands

__all__ = ["app", "main"]

app = make_app("Run a plan as it is, and measure it against its prediction.")
PlanFile = Annotated[str, typer.Argument(metavar="PLAN.yaml", help="A plan file, as `planner estimate --out` writes it.")]
PROFILED_STEPS = 3
"""Of `--profile`, where no `--set profile_steps=N` says otherwise."""
add_commands(app)
add_dry_run(app)
add_sweep_commands(app)
app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app, name="tokenizer")


def _changes(settings: list[str] | None, steps: int | None, data: str | None, profile: bool) -> dict[str, Any]:
    """`--set key=value` and the short forms, as keys of `training:`."""
    from planner.files import parse_yaml

    changes: dict[str, Any] = {"profile_steps": PROFILED_STEPS} if profile else {}
    for text in settings or []:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise InputError.single("--set", text, "must be KEY=VALUE", "write e.g. --set learning_rate=3e-4")
        changes[key.removeprefix("training.")] = parse_yaml(value, "--set")
    if steps is not None:
        changes["num_steps"] = steps
    if data is not None:
        changes["data"] = data
    return changes


@app.command(epilog="Example: reftrain run plan.yaml --out runs/first --steps 200")
def run(
    plan: PlanFile,
    out: Annotated[str | None, typer.Option(metavar="RUN_DIR", help="Where to write; default runs/NAME beside the plan.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest good checkpoint of RUN_DIR.")] = False,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Steps, instead of the plan's tokens.", min=1)] = None,
    data: Annotated[str | None, typer.Option(metavar="DIR", help="corpus, synthetic, or a folder of `reftrain data prepare`.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A key of training:, e.g. learning_rate=3e-4.")] = None,
    max_restarts: Annotated[
        int | None, typer.Option("--max-restarts", metavar="N", help="Of a layout's processes when one dies; default 3.", min=0, max=1000)
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Trace 3 steps after warm-up to RUN_DIR/traces, for ui.perfetto.dev.")] = False,
    tune_micro_batch: Annotated[
        bool, typer.Option("--tune-micro-batch", help="Measure micro-batch sizes first, and run with the fastest that fits.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train as the plan says; also under torchrun."""
    from reftrain.cli_sweep import tune
    from reftrain.config import load_run_config
    from reftrain.launch import MAX_RESTARTS, is_restarted, is_worker, launch
    from reftrain.parallel import default_device
    from reftrain.prepare_run import check_folder
    from reftrain.progress import make_progress
    from reftrain.runnable import check_runnable
    from reftrain.train import RunOptions, train

    config = load_run_config(plan, _changes(settings, steps, data, profile))
    folder = Path(out) if out else Path(plan).resolve().parent / "runs" / Path(plan).stem
    arguments = [*sys.argv[1:], *(["--out", str(folder)] if out is None else [])]
    if tune_micro_batch:
        tuned = str(tune(config, folder, resume=resume, is_quiet=as_json))
        config = load_run_config(tuned)
        arguments = ["run", tuned, "--out", str(folder), *(["--resume"] if resume else []), *(["--json"] if as_json else [])]
    if not is_worker() and config.layout.num_devices > 1:
        check_runnable(config, default_device())  # once, and not by every process
        check_folder(config, folder, resume)
        raise typer.Exit(launch(arguments, folder, config.layout.num_devices, MAX_RESTARTS if max_restarts is None else max_restarts))
    progress, close = make_progress(config, is_quiet=as_json)
    try:
        summary = train(config, RunOptions(folder, resume=resume or is_restarted()), progress)
    finally:
        close()
    if summary.values:
        _report(summary.values, folder, as_json)
        if not summary.values["is_complete"]:
            raise typer.Exit(130)


def _report(values: dict[str, Any], folder: Path, as_json: bool) -> None:
    from planner.files import to_json
    from reftrain.progress import render_summary

    sys.stdout.write(to_json(values) if as_json else render_summary(values, folder))


def main() -> NoReturn:
    """Runs the command line and exits with its status."""
    try:
        import torch  # noqa: F401
    except ImportError:
        if not {"--help", "-h"} & set(sys.argv):
            error = MissingPieceError("reftrain needs torch, which is not installed: pip install 'llm-planner[reftrain]'")
            sys.stderr.write(f"{error}\n")
            sys.exit(error.exit_status)
    sys.exit(run_app(app, "reftrain"))
