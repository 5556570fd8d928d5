"""Commands that close the loop: compare, bench-device, demo."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from planner.cli import JsonFlag
from planner.errors import InputError

__all__ = ["add_commands"]


def compare(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="Folder that `reftrain run` wrote.")],
    html: Annotated[str | None, typer.Option(metavar="PAGE.html", help="Also write a page with plots.")] = None,
    tolerance: Annotated[float | None, typer.Option(metavar="FRACTION", help="Largest error, instead of the intervals.", min=0.0)] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measured against predicted; exit status 5 where a measurement lies outside."""
    from planner.files import to_json, write_text
    from reftrain.compare import compare_run, to_dict
    from reftrain.compare_report import render_page, render_text

    found = compare_run(run_dir, tolerance)
    if html is not None:
        write_text(html, render_page([found]))
    sys.stdout.write(to_json(to_dict(found)) if as_json else render_text(found))
    raise typer.Exit(0 if found.is_within else 5)


def bench_device(
    name: Annotated[str, typer.Option(metavar="NAME", help="Of the accelerator and stack.")] = "cpu-local",
    precisions: Annotated[str, typer.Option(metavar="A,B", help="fp32, bf16.")] = "",
    processes: Annotated[str, typer.Option(metavar="N,N", help="Processes that share the machine, e.g. 1,2.")] = "1",
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes only, under a minute; fp32 unless --precisions says otherwise.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Measure this machine into an accelerator and a stack that the planner prices like any other."""
    from planner.files import to_json
    from reftrain.bench_device import bench_device as run
    from reftrain.bench_ops import DTYPES

    wanted = (precisions or ("fp32" if quick else "fp32,bf16")).split(",")
    unknown = [p for p in wanted if p not in DTYPES]
    counts = [text for text in processes.split(",") if not text.isdigit() or int(text) < 1]
    if unknown or "fp32" not in wanted:
        raise InputError.single("--precisions", precisions, f"names {', '.join(DTYPES)}, fp32 among them", "write e.g. fp32,bf16")
    if counts:
        raise InputError.single("--processes", processes, "holds whole numbers from 1", "write e.g. 1,2")
    if not name.replace("-", "").replace("_", "").isalnum():
        raise InputError.single("--name", name, "is made of letters, digits, - and _", "write e.g. cpu-local")
    catalog, stack = run(name, wanted, [int(text) for text in processes.split(",")], _say_aside, is_quick=quick)
    if as_json:
        sys.stdout.write(to_json({"schema_version": 1, "accelerator": name, "catalog": str(catalog), "stack": str(stack)}))
    else:
        precision = "" if "bf16" in wanted else " --precision fp32"  # estimate's own default is bf16
        request = f"--accelerator {name} --num-devices {processes.split(',')[0]} --model gpt2{precision}"
        sys.stdout.write(f"written: {catalog} and {stack}\nuse it: python -m planner estimate {request}\n")


def demo(out: Annotated[str, typer.Option(metavar="DIR", help="Folder for everything it writes.")] = "demo") -> None:
    """Plan, run, compare, calibrate, plan again: the whole loop on the shipped corpus, in about three minutes on two cores."""
    from reftrain.demo import demo as run

    run(Path(out), _say)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _say_aside(text: str) -> None:
    sys.stderr.write(text + "\n")


def add_commands(app: typer.Typer) -> None:
    """Puts them under a command line."""
    app.command(epilog="Example: reftrain compare runs/first --html first.html")(compare)
    app.command(epilog="Example: reftrain bench-device --processes 1,2")(bench_device)
    app.command(epilog="Example: reftrain demo --out demo")(demo)
