"""`planner calibrate`: stacks from measured runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from planner.errors import InputError

if TYPE_CHECKING:
    from planner.cases import Measured

__all__ = ["add_commands"]


def add_commands(app: typer.Typer) -> None:
    """Puts `calibrate` on a command line."""
    app.command(epilog="Example: planner calibrate runs/a runs/b runs/c --out stack.yaml")(calibrate)


def calibrate(
    out: Annotated[str, typer.Option(metavar="STACK.yaml", help="Where to write the fitted stack.")],
    runs: Annotated[list[str] | None, typer.Argument(metavar="RUN_DIR...", help="Folders that `reftrain run` wrote.")] = None,
    measurements: Annotated[str | None, typer.Option(metavar="FILE.csv", help="Instead of runs: a table with the columns of validate's.")] = None,
    stack: Annotated[str | None, typer.Option(metavar="NAME", help="Stack to start from; default the runs' own.")] = None,
    every_stack: Annotated[bool, typer.Option("--every-stack", help="Fit all shipped stacks to the table; --out is then a folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Fit a stack to measured runs, and say how well it predicts runs that it was not fitted to."""
    from planner.calibration import calibrate as run
    from planner.files import to_json
    from planner.report.calibration_text import render_calibration, render_fits
    from planner.stack_fits import fit_stacks

    if every_stack and measurements is None:
        raise InputError.single("--every-stack", True, "needs a table of runs", "name one with --measurements FILE.csv")
    steps = _measured_steps(runs or [], measurements, stack)
    if every_stack:
        fits = fit_stacks(steps)
        fits.save(out)
        sys.stdout.write(to_json(fits.to_dict()) if as_json else render_fits(fits, out))
        return
    found = run(steps, stack, Path(out).stem)
    found.save(out)
    sys.stdout.write(to_json(found.to_dict()) if as_json else render_calibration(found, out))


def _measured_steps(runs: list[str], measurements: str | None, stack: str | None) -> list[Measured]:
    """The steps of run folders, or of the rows of a table that can be expressed."""
    from planner.cases import read_row, read_run
    from planner.measurements import read_rows

    if bool(runs) == (measurements is not None):
        given = "both" if runs else None
        raise InputError.single("RUN_DIR", given, "one of run folders and --measurements is needed", "name at least 3 runs, or a table")
    if measurements is None:
        return [read_run(folder, stack) for folder in runs]
    found, lost = [], 0
    for row in read_rows(measurements):
        try:
            step = read_row(row, stack)
        except InputError:
            lost += 1
            continue
        found += [step] if step is not None else []
    sys.stderr.write(f"{len(found)} rows have a step time and can be expressed; {lost} cannot (planner validate says why)\n")
    if not found:
        raise InputError.single("measurements", measurements, "no row has a step time and can be expressed", "see planner validate")
    return found
