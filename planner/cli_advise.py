"""`planner advise`: the size and the tokens that a budget is best spent on."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from planner.cli_options import JsonFlag, number_of, read_request, takes_request

__all__ = ["add_commands"]


def add_commands(app: typer.Typer) -> None:
    """Puts `advise` on a command line."""
    app.command(epilog="Example: planner advise --accelerator h100 --num-devices 64 --offer aws/p5.48xlarge --budget 100k")(advise)


@takes_request
def advise(
    plan: str | None,
    given: dict[str, str],
    budget: Annotated[str | None, typer.Option(metavar="USD", help="Money to spend.")] = None,
    max_days: Annotated[str | None, typer.Option(metavar="DAYS", help="Time to spend, on all the devices.")] = None,
    flops: Annotated[str | None, typer.Option(metavar="N", help="Model FLOPs to spend, e.g. 1e23.")] = None,
    inference_tokens: Annotated[str | None, typer.Option(metavar="N", help="Tokens to be served in all: larger models serve dearer.")] = None,
    out: Annotated[str | None, typer.Option(metavar="PLAN.yaml", help="Write the best plan, ready to run.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Which size of model, trained on how many tokens, has the least expected loss for a budget."""
    from planner.advice import Budget
    from planner.advice import advise as run
    from planner.files import to_json
    from planner.report.advice_text import advice_to_dict, render_advice

    amounts = (("--budget", budget), ("--max-days", max_days), ("--flops", flops))
    spent = Budget(*(number_of(text, key) for key, text in amounts))
    served = number_of(inference_tokens, "--inference-tokens") or 0.0
    request = read_request(plan, {"model": "llama-3.1-8b", **given} if plan is None else given)
    found = run(request, spent, served, _progress)
    if out is not None:
        found.choices[found.best].plan.save(out)
    sys.stdout.write(to_json(advice_to_dict(found)) if as_json else render_advice(found))


def _progress(done: int, _total: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done} sizes \r")
        sys.stderr.flush()
