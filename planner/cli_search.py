"""`planner search`: the best plan, over layouts, hardware and offers."""

from __future__ import annotations

import sys
from typing import Annotated, Any, cast

import typer

from planner.cli_options import JsonFlag, number_of, read_request, show_progress, takes_request, terminal_width
from planner.errors import InputError

__all__ = ["add_commands"]

FEWEST_DEVICES, MOST_DEVICES = 8, 16384
"""What is tried, in doublings, where no number of devices is named."""


def add_commands(app: typer.Typer) -> None:
    """Puts `search` on a command line."""
    app.command(epilog="Example: planner search --model llama-3.1-8b --tokens 1T --accelerator any --offer any --objective cost --max-days 30")(
        search
    )


@takes_request
def search(
    plan: str | None,
    given: dict[str, str],
    accelerator: Annotated[str | None, typer.Option(metavar="NAME,..|any", help="Accelerators to choose from; patterns like `h*` too.")] = None,
    num_devices: Annotated[str | None, typer.Option(metavar="N,..|A..B", help="Numbers of devices to choose from; A..B doubles.")] = None,
    offer: Annotated[str | None, typer.Option(metavar="NAME,..|any", help="Cloud offers to choose from; patterns like `aws/*` too.")] = None,
    provider: Annotated[str | None, typer.Option(metavar="NAME,..", help="Only offers of these clouds.")] = None,
    region: Annotated[str | None, typer.Option(metavar="NAME,..", help="Only offers in these regions.")] = None,
    pricing: Annotated[str | None, typer.Option(metavar="NAME,..", help="on_demand, spot, reserved_1y, reserved_3y.")] = None,
    precision: Annotated[str | None, typer.Option(metavar="NAME,..", help="Precisions to choose from.")] = None,
    recompute: Annotated[str | None, typer.Option(metavar="NAME,..", help="Policies to choose from; all three where none is named.")] = None,
    objective: Annotated[str, typer.Option(metavar="NAME", help="time, cost, devices or energy: what should be least.")] = "time",
    budget: Annotated[str | None, typer.Option(metavar="USD", help="Leave out what costs more.")] = None,
    max_days: Annotated[str | None, typer.Option(metavar="DAYS", help="Leave out what takes longer.")] = None,
    max_devices: Annotated[str | None, typer.Option(metavar="N", help="Leave out what needs more devices.")] = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="Also the plans of which none other is both cheaper and faster.")] = False,
    top: Annotated[int, typer.Option(metavar="N", help="How many plans to show.")] = 5,
    out: Annotated[str | None, typer.Option(metavar="PLAN.yaml", help="Write the best plan, ready to run.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """The best plans: every legal layout on all the hardware named, by an objective, within limits."""
    from planner.files import to_json
    from planner.hardware_options import Hardware
    from planner.points import Limits
    from planner.report.search_text import render_search, search_to_dict
    from planner.search import Wanted
    from planner.search import search as run

    if top < 1:
        raise InputError.single("--top", top, "must be 1 or more", "leave it out for 5")
    usd, days, most = (number_of(text, key) for text, key in ((budget, "--budget"), (max_days, "--max-days"), (max_devices, "--max-devices")))
    limits = Limits(usd, days, None if most is None else int(most))
    values: dict[str, Any] = {"precision": _listed(precision), "recompute": _listed(recompute), "pricing": _listed(pricing)}
    request, counts = _request(plan, given, accelerator, num_devices, limits, values)
    hardware = Hardware(_listed(accelerator), counts, _listed(offer), _listed(provider), _listed(region), values["pricing"])
    wanted = Wanted(cast("Any", objective), limits, top, pareto, values["recompute"], values["precision"])
    found = run(request, hardware, wanted, _progress)
    if out is not None and found.plans:
        found.save(out)
    sys.stdout.write(to_json(search_to_dict(found)) if as_json else render_search(found, out, terminal_width()))
    raise typer.Exit(0 if found.plans else 3)


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()] if text else []


def _request(
    plan: str | None, given: dict[str, str], accelerator: str | None, num_devices: str | None, limits: Any, values: dict[str, Any]
) -> tuple[Any, list[int]]:
    """(the request with the first of everything that is open, the numbers of devices to try)."""
    named = {name: found[0] for name, found in values.items() if found}
    accelerators = _listed(accelerator)
    if accelerators:
        named["accelerator"] = accelerators[0] if accelerators[0] != "any" and "*" not in accelerators[0] else "h100-80gb-sxm"
    counts = _counts(num_devices)
    if plan is None and not counts:
        most = limits.num_devices or MOST_DEVICES
        counts = [2**k for k in range(30) if min(FEWEST_DEVICES, most) <= 2**k <= most]
    if counts:
        named["num_devices"] = str(counts[-1])
    if plan is None and not accelerators:
        raise InputError.single("--accelerator", None, "is required", "name accelerators, e.g. --accelerator h100,b200, or --accelerator any")
    return read_request(plan, {**given, **named}), counts


def _counts(text: str | None) -> list[int]:
    """`8,16,32`, or `8..64`: every doubling of 8 up to 64.

    Raises:
        InputError: no such list.
    """
    from planner.units import parse_count

    found: list[int] = []
    for part in _listed(text):
        first, is_range, last = part.partition("..")
        low = int(parse_count(first, "--num-devices"))
        high = int(parse_count(last, "--num-devices")) if is_range else low
        if not 0 < low <= high:
            raise InputError.single("--num-devices", part, "must be numbers from 1 on, or a range upwards", "write 8,16,32 or 8..64")
        while low <= high:
            found.append(low)
            low *= 2
    return sorted(set(found))


def _progress(done: int, total: int) -> None:
    if total > 1:
        show_progress(done, total, "machines and policies")
