"""The command line of the trainer. The only place that prints or exits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from planner.cli import JsonFlag, make_app, run_app
from planner.errors import MissingPieceError
from reftrain.cli_data import data_app, tokenizer_app
from reftrain.cli_dry_run import add_commands as add_dry_run
from reftrain.cli_finetune import add_commands as add_finetune
from reftrain.cli_loop import add_commands
from reftrain.cli_settings import training_changes
from reftrain.cli_start import start
from reftrain.cli_sweep import add_commands as add_sweep_commands

__all__ = ["app", "main"]

app = make_app("Run a plan as it is, and measure it against its prediction.")
PlanFile = Annotated[str, typer.Argument(metavar="PLAN.yaml", help="A plan file, as `planner estimate --out` writes it.")]
add_commands(app)
add_dry_run(app)
add_finetune(app)
add_sweep_commands(app)
app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app, name="tokenizer")


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

    config = load_run_config(plan, training_changes(settings, steps, data, profile))
    folder = Path(out) if out else Path(plan).resolve().parent / "runs" / Path(plan).stem
    arguments = [*sys.argv[1:], *(["--out", str(folder)] if out is None else [])]
    if tune_micro_batch:
        tuned = str(tune(config, folder, resume=resume, is_quiet=as_json))
        config = load_run_config(tuned)
        arguments = ["run", tuned, "--out", str(folder), *(["--resume"] if resume else []), *(["--json"] if as_json else [])]
    start(config, folder, arguments, resume=resume, max_restarts=max_restarts, as_json=as_json)


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
