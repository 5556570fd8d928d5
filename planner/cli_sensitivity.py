"""`planner sensitivity` and `planner sweep`: what moves a plan."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from planner.cli_options import JsonFlag, read_request, show_progress, takes_request
from planner.errors import InputError

__all__ = ["add_commands"]


def add_commands(app: typer.Typer) -> None:
    """Puts `sensitivity` and `sweep` on a command line."""
    app.command(epilog="Example: planner sensitivity plan.yaml --of time.train_s --vary num_devices=64,128,256 --against tp=1,2,4,8")(sensitivity)
    app.command(epilog="Example: planner sweep plan.yaml --vary num_devices=64,128,256 --vary precision=bf16,fp8 --out sweep.csv")(sweep)


@takes_request
def sensitivity(
    plan: str | None,
    given: dict[str, str],
    of: Annotated[str | None, typer.Option(metavar="KEY", help="Result, e.g. time.train_s; money where a price is known.")] = None,
    vary: Annotated[str | None, typer.Option(metavar="NAME=V1,V2", help="A table instead: an option and its values, one row each.")] = None,
    against: Annotated[str | None, typer.Option(metavar="NAME=V1,V2", help="The table's columns.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Which input moves a result most, or a table of it over two inputs."""
    from dataclasses import asdict

    from planner.files import to_json
    from planner.report.sensitivity_text import render_table, render_tornado
    from planner.sensitivity import make_table, make_tornado

    request = read_request(plan, given)
    if (vary is None) != (against is None):
        missing = "--against" if against is None else "--vary"
        raise InputError.single(missing, None, "a table has rows and columns", "give both --vary and --against, or neither")
    if vary is None or against is None:
        tornado = make_tornado(request, of)
        sys.stdout.write(to_json(asdict(tornado)) if as_json else render_tornado(tornado))
        return
    table = make_table(request, _varied(vary, "--vary"), _varied(against, "--against"), of, show_progress)
    sys.stdout.write(to_json(asdict(table)) if as_json else render_table(table))


@takes_request
def sweep(
    plan: str | None,
    given: dict[str, str],
    out: Annotated[str, typer.Option(metavar="FILE.csv", help="Where the rows go, each as soon as it is known.")],
    vary: Annotated[list[str], typer.Option(metavar="NAME=V1,V2", help="An option and its values; may be given again.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a file of the same sweep.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Every combination of some options' values, as a CSV."""
    from planner.files import to_json
    from planner.sweep import sweep as run

    values = dict(_varied(each, "--vary") for each in vary)
    added = run(read_request(plan, given), values, out, resume=resume, progress=show_progress)
    sys.stdout.write(to_json({"out": out, "rows_added": added}) if as_json else f"{added} rows added to {out}\n")


def _varied(text: str, key: str) -> tuple[str, list[str]]:
    name, _, values = text.partition("=")
    found = [value.strip() for value in values.split(",") if value.strip()]
    if not name.strip() or not found:
        raise InputError.single(key, text, "must be an option and its values", "write num_devices=64,128,256")
    return name.strip().lstrip("-").replace("-", "_").rsplit(".", 1)[-1], found
