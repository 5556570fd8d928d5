"""What moves a plan: one input at a time (a tornado), or two against each other (a table).

In: a request. Out: swings and tables of one result. Every number is that of an `estimate`, or a bound of its interval; no formula here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from planner.errors import InputError
from planner.estimate import estimate
from planner.options import option_places, put_options
from planner.plan import Interval, Plan, Request, build_request
from planner.registry import unknown_name

__all__ = ["RESULTS", "Swing", "Table", "Tornado", "check_option", "default_result", "estimate_changed", "make_table", "make_tornado", "result_of"]

PRICE_FACTORS = (0.8, 1.2)
"""Negotiated discounts and price changes of a quarter; assumed."""

RESULTS: dict[str, Callable[[Plan], float | None]] = {
    "cost.usd": lambda plan: None if plan.cost.usd is None else plan.cost.usd.value,
    "cost.energy_kwh": lambda plan: plan.cost.energy_kwh,
    "time.train_s": lambda plan: plan.time.train_s.value,
    "time.step_s": lambda plan: plan.time.step_s.value,
    "time.mfu": lambda plan: plan.time.mfu,
    "memory.peak_bytes": lambda plan: plan.memory.peak_bytes.value,
    "loss.nats_per_token": lambda plan: None if plan.loss is None else plan.loss.nats_per_token.value,
}
"""Key of the result -> where it is in a plan; None where it is not known."""
INTERVALS: dict[str, Callable[[Plan], Interval | None]] = {
    "cost.usd": lambda plan: plan.cost.usd,
    "time.train_s": lambda plan: plan.time.train_s,
    "time.step_s": lambda plan: plan.time.step_s,
    "memory.peak_bytes": lambda plan: plan.memory.peak_bytes,
    "loss.nats_per_token": lambda plan: None if plan.loss is None else plan.loss.nats_per_token,
}


@dataclass(frozen=True)
class End:
    """One end of a bar."""

    setting: str
    value: float | None
    """None where the plan is wrong input."""
    fits: bool
    note: str = ""


@dataclass(frozen=True)
class Swing:
    """What an input does."""

    name: str
    low: End
    high: End
    why: str
    """Why these two values."""

    @property
    def size(self) -> float:
        """Distance of its ends; nothing where one is not known."""
        return 0.0 if self.low.value is None or self.high.value is None else abs(self.high.value - self.low.value)


@dataclass(frozen=True)
class Tornado:
    """All swings of one result, largest first."""

    result: str
    base: float
    swings: tuple[Swing, ...]


@dataclass(frozen=True)
class Table:
    """A result for every pair of values of two inputs."""

    result: str
    rows: tuple[str, tuple[str, ...]]
    """(input, its values)."""
    columns: tuple[str, tuple[str, ...]]
    cells: tuple[tuple[End, ...], ...]
    """[rows][columns]"""


def default_result(plan: Plan) -> str:
    """Money where a price is known, else time."""
    return "time.train_s" if plan.cost.usd is None else "cost.usd"


def result_of(plan: Plan, key: str) -> float | None:
    """One result of a plan.

    Raises:
        InputError: no such result.
    """
    if key not in RESULTS:
        raise unknown_name("--of", key, list(RESULTS))
    return RESULTS[key](plan)


def make_tornado(request: Request, result: str | None = None) -> Tornado:
    """One input at a time, the others as they are; the layout stays where it can, and is searched for again where it cannot.

    Raises:
        InputError: wrong input, or a result that the plan does not have.

    Example:
        >>> from planner.plan import build_request
        >>> found = make_tornado(build_request({"model": "gpt2", "cluster": {"accelerator": "h100", "num_devices": 8}}), "time.train_s")
        >>> found.swings[0].size >= found.swings[-1].size
        True
    """
    plan = estimate(request)
    key = result or default_result(plan)
    base = result_of(plan, key)
    if base is None:
        raise InputError.single("--of", key, "is not known for this plan", "name an offer or --price for money; pretraining of a decoder for loss")
    swings = []
    for name, ends, why in _inputs(plan):
        low, high = (_end(plan.inputs, changes, key, text) for changes, text in ends)
        swings.append(Swing(name, low, high, why))
    interval = INTERVALS[key](plan) if key in INTERVALS else None
    if interval is not None:
        low, high = (End(text, value, plan.fits) for text, value in (("low", interval.low), ("high", interval.high)))
        swings.append(Swing("prediction itself", low, high, "its 80% interval"))
    return Tornado(key, base, tuple(sorted((each for each in swings if each.size > 0), key=lambda each: -each.size)))


def _inputs(plan: Plan) -> Iterator[tuple[str, list[tuple[dict[str, str], str]], str]]:
    """(name, the two changed sets of options, why these values)."""
    inputs = plan.inputs
    workload, cluster = inputs["workload"], inputs["cluster"]
    for name, value, why in (
        ("num_devices", cluster["num_devices"], "half and twice"),
        ("global_batch_size", workload["global_batch_size"], "half and twice"),
        ("seq_len", workload["seq_len"], "half and twice"),
        ("tokens", workload["tokens"], "half and twice"),
        ("micro_batch_size", inputs["layout"]["micro_batch_size"], "the neighbouring powers of two"),
    ):
        halves = value / 2 if name == "tokens" else max(value // 2, 1)
        yield name, [({name: f"{number:g}" if name == "tokens" else str(number)}, f"{number:,.4g}") for number in (halves, value * 2)], why
    yield "recompute", [({"recompute": policy}, policy) for policy in ("none", "full")], "least and most"
    price = plan.cost.usd_per_device_hour
    if price is not None:
        yield "price", [({"price": f"{price * factor!r}"}, f"{price * factor:.2f} USD/h") for factor in PRICE_FACTORS], "a fifth less and more"


def check_option(name: str) -> None:
    """Refuses what no plan has.

    Raises:
        InputError: an unknown option; the nearest ones are named.
    """
    known = [*option_places(), "model", "stack"]
    if name not in known:
        raise unknown_name("--vary", name, known)


def estimate_changed(base: dict[str, Any], changes: dict[str, str]) -> tuple[Plan, bool]:
    """(the plan of a base with changed options, whether its layout is another): the base's layout where that is still legal.

    Raises:
        InputError: wrong input under any layout.
    """
    try:
        return estimate(build_request(put_options(base, changes))), False
    except InputError as error:
        if not base.get("layout") or not any(problem.key.startswith("layout") for problem in error.problems):
            raise
        return estimate(build_request(put_options({**base, "layout": {}}, changes))), True


def _end(base: dict[str, Any], changes: dict[str, str], key: str, text: str) -> End:
    """The result under changed options."""
    try:
        plan, is_other = estimate_changed(base, changes)
    except InputError as error:
        return End(text, None, False, error.problems[0].rule)
    return End(text, result_of(plan, key), plan.fits, "another layout" if is_other else "")


def make_table(
    request: Request, rows: tuple[str, Sequence[str]], columns: tuple[str, Sequence[str]], result: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Table:  # fmt: skip
    """A result for every pair of values; layouts that the request leaves open are searched for in each cell.

    Args:
        rows, columns: (option, values) as on the command line: `("num_devices", ["8", "16"])`.

    Raises:
        InputError: an unknown option or result, or a base that is wrong input.
    """
    for name, _ in (rows, columns):
        check_option(name)
    key = result or default_result(estimate(request))
    base = request.as_given()
    cells, done, total = [], 0, len(rows[1]) * len(columns[1])
    for row in rows[1]:
        line = []
        for column in columns[1]:
            line.append(_end(base, {rows[0]: row, columns[0]: column}, key, f"{rows[0]} {row}, {columns[0]} {column}"))
            done += 1
            if progress is not None:
                progress(done, total)
        cells.append(tuple(line))
    return Table(key, (rows[0], tuple(rows[1])), (columns[0], tuple(columns[1])), tuple(cells))
