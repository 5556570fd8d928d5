"""The command line; the only place that prints or exits.

Exit status: 0 done and feasible, 1 a fault of ours, 2 wrong input, 3 valid but does not fit, 4 a gate broken, 6 an
optional piece is missing, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.exceptions import TyperException

from planner.cli_advise import add_commands as add_advise_commands
from planner.cli_calibrate import add_commands as add_calibrate_commands
from planner.cli_export import add_commands as add_export_commands
from planner.cli_options import JsonFlag, read_request, show_progress, takes_request, terminal_width
from planner.cli_search import add_commands as add_search_commands
from planner.cli_sensitivity import add_commands as add_sensitivity_commands
from planner.cli_trace import add_commands as add_trace_commands
from planner.errors import InputError, PlannerError, Problem, nearest

__all__ = ["JsonFlag", "app", "main", "make_app", "run_app"]


def make_app(text: str) -> typer.Typer:
    """A command line with plain help; errors are left to `run_app`."""
    return typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True, help=text)


app = make_app("Plan an LLM training run before you pay for it.")
add_export_commands(app)
add_calibrate_commands(app)
add_search_commands(app)
add_sensitivity_commands(app)
add_advise_commands(app)
add_trace_commands(app)

PROGRESS_ROWS = 50
MANY_ROWS = 200
"""From here on several processes are faster, though each loads everything again."""


@app.command(epilog="Example: planner estimate --model llama-3.1-8b --accelerator h100 --num-devices 64 --tokens 1T")
@takes_request
def estimate(
    plan: str | None,
    given: dict[str, str],
    budget: Annotated[str | None, typer.Option(metavar="USD", help="Exit with status 4 when the run costs more.")] = None,
    max_days: Annotated[str | None, typer.Option(metavar="DAYS", help="Exit with status 4 when it takes longer.")] = None,
    out: Annotated[str | None, typer.Option(metavar="PLAN.yaml", help="Write the complete plan.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Memory, time, cost and loss of one training run; the best layout where none is given."""
    from planner.estimate import estimate as run
    from planner.files import to_json

    gates = _gates(budget, max_days)
    request = read_request(plan, given)
    result = run(request)
    if out is not None:
        result.save(out)
    sys.stdout.write(to_json(result.to_dict()) if as_json else _report(result, request))
    broken = [text for text, holds in ((text, check(result)) for text, check in gates) if not holds]
    for text in broken:
        sys.stderr.write(f"gate broken: {text}\n")
    raise typer.Exit(3 if not result.fits else 4 if broken else 0)


def _report(plan: Any, request: Any) -> str:
    """The plan as text and, where it does not fit, what would."""
    from planner.report.plan_text import render_plan

    text = render_plan(plan, terminal_width(), hints=sys.stdout.isatty())
    if plan.fits:
        return text
    from planner.remedies import find_remedies
    from planner.report.remedies_text import render_remedies

    return text + "\n" + render_remedies(plan, find_remedies(request), terminal_width())


def _gates(budget: str | None, max_days: str | None) -> list[tuple[str, Any]]:
    from planner.units import DAY_S, format_usd, parse_count

    gates: list[tuple[str, Any]] = []
    if budget is not None:
        limit = parse_count(budget, "--budget")
        gates.append(
            (f"the run costs more than {format_usd(limit)}, or its price is unknown", lambda p: p.cost.usd is not None and p.cost.usd.value <= limit)
        )
    if max_days is not None:
        days = parse_count(max_days, "--max-days")
        gates.append((f"the run takes longer than {days:g} days", lambda p: p.time.train_s.value <= days * DAY_S))
    return gates


@app.command(epilog="Example: planner explain plan.yaml memory.breakdown_bytes.activations")
def explain(
    plan: Annotated[str, typer.Argument(metavar="PLAN.yaml")],
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="Dotted key as in --json; without it, the list of keys.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Where a number comes from: formula, values put in, sources, term by term."""
    from dataclasses import asdict

    from planner.explain import explain as run
    from planner.files import to_json
    from planner.report.explain_text import render_explanation

    found = run(read_request(plan, {}), key)
    sys.stdout.write(to_json(asdict(found)) if as_json else render_explanation(found, terminal_width()))


@app.command(epilog="Example: planner memory plan.yaml --svg memory.svg")
def memory(
    plan: Annotated[str, typer.Argument(metavar="PLAN.yaml")],
    stage: Annotated[int | None, typer.Option(metavar="N", help="Pipeline stage to show; default the fullest.")] = None,
    svg: Annotated[str | None, typer.Option(metavar="FILE.svg", help="Also draw every stage's step as a picture.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """What a device holds over a step: every instant, the peak, and which tensors are alive at it."""
    from planner.files import to_json, write_text
    from planner.peaks import memory_timeline
    from planner.report.memory_svg import draw_memory
    from planner.report.memory_text import render_memory

    timeline = memory_timeline(read_request(plan, {}))
    if stage is not None and not 0 <= stage < len(timeline.stages):
        raise InputError.single("stage", stage, f"must be 0 to {len(timeline.stages) - 1}", "name a stage of the plan")
    if svg is not None:
        write_text(svg, draw_memory(timeline))
    sys.stdout.write(to_json(timeline.to_dict()) if as_json else render_memory(timeline, stage, terminal_width()))


@app.command(epilog="Example: planner compare a.yaml b.yaml")
def compare(plans: Annotated[list[str], typer.Argument(metavar="PLAN.yaml PLAN.yaml ...")], as_json: JsonFlag = False) -> None:
    """Two to six plans side by side, differences first."""
    from dataclasses import asdict

    from planner.compare import compare as run
    from planner.estimate import estimate as estimate_one
    from planner.files import to_json
    from planner.report.compare_text import render_comparison

    if not 2 <= len(plans) <= 6:
        raise InputError.single("plans", len(plans), "compare takes 2 to 6 plans", "name 2 to 6 plan files")
    found = run([estimate_one(read_request(path, {})) for path in plans])
    sys.stdout.write(to_json(asdict(found)) if as_json else render_comparison(found, terminal_width()))


@app.command(epilog="Example: planner catalog accelerators h100-80gb-sxm")
def catalog(
    kind: Annotated[str, typer.Argument(metavar="accelerators|offers|models|stacks")],
    name: Annotated[str | None, typer.Argument(help="One entry in full.")] = None,
    extra: Annotated[str | None, typer.Option("--catalog", metavar="FILE", help="Own accelerators and offers.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """What can be named in a plan."""
    from planner.files import to_json
    from planner.listing import KINDS, entry, listing
    from planner.registry import unknown_name
    from planner.report.catalog_text import render_entry, render_listing

    if kind not in KINDS:
        raise unknown_name("kind", kind, list(KINDS))
    path = Path(extra) if extra else None
    width = terminal_width() if sys.stdout.isatty() else 400
    if name is not None:
        found = entry(kind, name, path)
        sys.stdout.write(to_json(found) if as_json else render_entry(found, width=width))
    else:
        rows = listing(kind, path)
        sys.stdout.write(to_json({kind: rows}) if as_json else render_listing(kind, rows, width))


@app.command(epilog="Example: planner validate --measurements data/measurements/anchors.csv")
def validate(
    measurements: Annotated[list[str], typer.Option(metavar="FILE.csv", help="Published or own measurements; may be given again.")],
    as_json: JsonFlag = False,
) -> None:
    """Predictions against tables of measurements."""
    from planner.files import to_json
    from planner.report.validation_text import render_markdown
    from planner.validation import read_rows, validate_rows
    from planner.workers import num_cores

    rows = [row for name in measurements for row in read_rows(name)]
    report = validate_rows(rows, lambda done: _progress(done, len(rows)), num_cores() if len(rows) >= MANY_ROWS else 1)
    sys.stdout.write(to_json(report.to_dict()) if as_json else render_markdown(report, measurements))


def _progress(done: int, total: int) -> None:
    if done % PROGRESS_ROWS == 0 or done == total:
        show_progress(done, total, "rows")


def _fail(error: PlannerError, as_json: bool) -> int:
    from planner.files import to_json

    if as_json:
        problems = [
            {"key": p.key, "value": repr(p.value)[:200], "rule": p.rule, "fix": p.fix, "where": p.where} for p in getattr(error, "problems", ())
        ]
        sys.stdout.write(to_json({"error": problems or [{"rule": str(error)}]}))
    sys.stderr.write(f"{error}\n")
    return error.exit_status


def _usage_problem(error: TyperException) -> Problem:
    """The option parser's complaints in our words."""
    context: Any = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "planner"
    option = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption" and option is not None:
        known = [name for p in (context.command.params if context else []) for name in p.opts if name.startswith("--")]
        close = nearest(option, known)
        return Problem(option, None, f"is no option of {command}", f"did you mean {', '.join(close)}?" if close else f"see {command} --help")
    if "No such command" in error.message and hasattr(getattr(context, "command", None), "commands"):
        known = list(context.command.commands)
        name = error.message.split("'")[1] if "'" in error.message else error.message
        close = nearest(name, known)
        return Problem(
            "command", name, f"must be one of {', '.join(known)}", f"did you mean {', '.join(close)}?" if close else f"see {command} --help"
        )
    return Problem("command line", error.format_message(), f"must be as {command} --help shows", f"see {command} --help")


def main() -> NoReturn:
    """Runs the command line and exits with its status."""
    sys.exit(run_app(app, "planner"))


def run_app(command: typer.Typer, name: str) -> int:
    """Runs a command line; every error becomes a message and the exit status of the contract, never a traceback."""
    as_json = "--json" in sys.argv
    try:
        result = command(standalone_mode=False, prog_name=name)
        status = result if isinstance(result, int) else 0
        sys.stdout.flush()
    except PlannerError as error:
        status = _fail(error, as_json)
    except TyperException as error:
        status = _fail(InputError(_usage_problem(error)), as_json)
    except typer.Exit as error:
        status = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("interrupted\n")
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except Exception as error:  # the last line of defence: a fault of ours must still read like one
        debug = f"{name.upper()}_DEBUG"
        sys.stderr.write(
            f"{name} failed: {type(error).__name__}: {error}\nThis is a fault of ours; set {debug}=1 to see where, and please report it.\n"
        )
        if os.environ.get(debug):
            traceback.print_exc()
        status = 1
    return status
