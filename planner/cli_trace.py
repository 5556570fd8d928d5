"""`planner trace`: the predicted step as a timeline."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

__all__ = ["add_commands"]


def add_commands(app: typer.Typer) -> None:
    """Puts `trace` on a command line."""
    app.command(epilog="Example: planner trace plan.yaml --out step.json")(trace)


def trace(
    plan: Annotated[str, typer.Argument(metavar="PLAN.yaml", help="A plan file; a layout left open is searched for.")],
    out: Annotated[str, typer.Option(metavar="STEP.json", help="Where to write the timeline.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """The predicted step as a Perfetto timeline: each stage's computation, communication and bubbles."""
    from planner.files import to_json, write_text
    from planner.plan import load_plan
    from planner.report.trace_text import render_trace
    from planner.step_trace import trace_step

    found = trace_step(load_plan(plan))
    write_text(out, to_json(found.to_dict()))
    summary = {
        "step_s": found.step_s,
        "num_events": len(found.events),
        "stages": [vars(stage) for stage in found.stages],
        "out": out,
        **found.metadata,
    }
    sys.stdout.write(to_json(summary) if as_json else render_trace(found, out))
