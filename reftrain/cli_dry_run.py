"""The command dry-run."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from planner.cli import JsonFlag

__all__ = ["add_commands"]


def dry_run(
    plan: Annotated[str, typer.Argument(metavar="PLAN.yaml", help="A plan file, as `planner estimate --out` writes it.")],
    stage: Annotated[list[int] | None, typer.Option("--stage", metavar="N", help="A pipeline stage, from 0; default all.", min=0)] = None,
    rounding: Annotated[int, typer.Option("--rounding", metavar="BYTES", help="An allocator's block size: 512 as CUDA's.", min=1)] = 1,
    all_microbatches: Annotated[bool, typer.Option("--all-microbatches", help="Also those that change nothing in the peak.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Run the trainer's own code on tensors without bytes: the peak memory, FLOPs and traffic of any layout, without hardware."""
    from planner.files import to_json
    from reftrain.config import load_run_config
    from reftrain.dry_run import dry_run as run
    from reftrain.dry_run_text import render

    found = run(load_run_config(plan), stages=stage or None, rounding_bytes=rounding, all_microbatches=all_microbatches)
    sys.stdout.write(to_json(found.to_dict()) if as_json else render(found))


def add_commands(app: typer.Typer) -> None:
    """Puts it under a command line."""
    app.command("dry-run", epilog="Example: reftrain dry-run plan.yaml --stage 0")(dry_run)
