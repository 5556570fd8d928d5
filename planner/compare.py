"""Two to six plans side by side, differences first. Plain data; `report.compare_text` formats it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from planner.errors import InputError
from planner.plan import Plan

__all__ = ["Comparison", "InputRow", "ResultRow", "compare"]

Better = Literal["lower", "higher", "neither"]
MIN_PLANS, MAX_PLANS = 2, 6
RELATIVE_TOLERANCE = 1e-9
"""Numbers closer than this are equal: what rounding leaves."""

_RESULTS: dict[str, Better] = {
    "memory.peak_bytes.value": "lower", "time.train_s.value": "lower", "cost.usd.value": "lower", "time.step_s.value": "lower",
    "time.tokens_per_s": "higher", "time.tokens_per_s_per_device": "higher", "time.mfu": "higher", "time.hfu": "neither",
    "time.num_steps": "neither", "time.num_microbatches": "neither", "time.bubble_fraction": "lower", "cost.usd_per_device_hour": "lower",
    "cost.device_hours": "lower", "cost.billed_device_hours": "lower", "cost.goodput_fraction": "higher", "cost.energy_kwh": "lower",
    "cost.co2e_kg": "lower", "loss.nats_per_token.value": "lower", "loss.perplexity.value": "lower", "params.total": "neither",
    "params.active": "neither", "flops.model_per_token": "neither", "flops.hardware_per_token": "neither",
    "flops.counted_per_token": "neither", "flops.total": "neither",
    "memory.usable_bytes": "neither",
}  # fmt: skip
_BREAKDOWNS = ("memory.breakdown_bytes", "time.breakdown_s", "cost.breakdown_usd")


@dataclass(frozen=True)
class InputRow:
    """One input; None where a plan does not have it."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class ResultRow:
    """One predicted number over all plans."""

    key: str
    values: tuple[float | None, ...]
    """None where a plan lacks it (no price, no loss law)."""
    ratios: tuple[float | None, ...]
    """Over the first plan's; None where either is missing or the first is 0."""
    best: tuple[int, ...]
    """Indices of the best plans among those that fit (among all where none fits); empty where no direction is better."""


@dataclass(frozen=True)
class Comparison:
    """What differs between plans, then what does not."""

    names: tuple[str, ...]
    """A, B, C, ..."""
    titles: tuple[str, ...]
    """Model, devices and layout of each plan."""
    fits: tuple[bool, ...]
    different_inputs: tuple[InputRow, ...]
    different_results: tuple[ResultRow, ...]
    equal_inputs: tuple[InputRow, ...]
    """One value each."""
    equal_results: tuple[ResultRow, ...]
    """One value each."""


def compare(plans: Sequence[Plan]) -> Comparison:
    """Inputs that differ, results with their ratio to the first plan and the best marked, then what is equal.

    Raises:
        InputError: fewer than 2 or more than 6 plans.

    Example:
        >>> from planner.estimate import estimate
        >>> gpt2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
        >>> one = {"model": gpt2, "cluster": {"accelerator": "a100-80gb-sxm", "num_devices": 1}}
        >>> two = {"model": gpt2, "cluster": {"accelerator": "h100-80gb-sxm", "num_devices": 1}}
        >>> found = compare([estimate(one), estimate(two)])
        >>> found.different_inputs[0].key, found.different_inputs[0].values
        ('cluster.accelerator', ('a100-80gb-sxm', 'h100-80gb-sxm'))
    """
    if not MIN_PLANS <= len(plans) <= MAX_PLANS:
        fix = f"name {MIN_PLANS} to {MAX_PLANS} plan files"
        raise InputError.single("plans", len(plans), f"compare takes {MIN_PLANS} to {MAX_PLANS} plans", fix)
    fits = tuple(plan.fits for plan in plans)
    inputs = _input_rows([_flat(plan.inputs) for plan in plans])
    results = _result_rows([plan.to_dict() for plan in plans], fits)
    rows: list[InputRow | ResultRow] = [*inputs, *results]
    is_equal = {row.key: _all_equal(row.values) for row in rows}
    return Comparison(
        names=tuple(chr(ord("A") + i) for i in range(len(plans))),
        titles=tuple(_title(plan) for plan in plans),
        fits=fits,
        different_inputs=tuple(row for row in inputs if not is_equal[row.key]),
        different_results=tuple(row for row in results if not is_equal[row.key]),
        equal_inputs=tuple(InputRow(row.key, row.values[:1]) for row in inputs if is_equal[row.key]),
        equal_results=tuple(ResultRow(row.key, row.values[:1], (), ()) for row in results if is_equal[row.key] and row.values[0] is not None),
    )


def _title(plan: Plan) -> str:
    model, cluster = plan.inputs["model"], plan.inputs["cluster"]
    name = model if isinstance(model, str) else str(model.get("name") or model.get("model_type") or "inline model")
    return f"{name} on {cluster['num_devices']} x {cluster['accelerator']}, {plan.inputs['stack']}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to what stands there; lists are values."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _input_rows(inputs: Sequence[Mapping[str, Any]]) -> list[InputRow]:
    """One row per key that any plan has, in the order of the plan file."""
    keys = dict.fromkeys(key for flat in inputs for key in flat)
    return [InputRow(key, tuple(flat.get(key) for flat in inputs)) for key in keys if key != "schema_version"]


def _result_rows(plains: Sequence[Mapping[str, Any]], fits: Sequence[bool]) -> list[ResultRow]:
    """Headline numbers first, then the breakdowns."""
    directions: dict[str, Better] = dict(_RESULTS)
    for prefix in _BREAKDOWNS:
        for plain in plains:
            directions |= {f"{prefix}.{name}": "neither" for name in _number(plain, prefix) or ()}
    flats = [_flat(plain) for plain in plains]
    return [_result_row(key, tuple(flat.get(key) for flat in flats), better, fits) for key, better in directions.items()]


def _number(plain: Mapping[str, Any], key: str) -> Any:
    found: Any = plain
    for step in key.split("."):
        found = found.get(step) if isinstance(found, dict) else None
    return found


def _result_row(key: str, values: tuple[float | None, ...], better: Better, fits: Sequence[bool]) -> ResultRow:
    first = values[0]
    ratios = tuple(None if value is None or not first else value / first for value in values)
    runnable = [i for i, value in enumerate(values) if value is not None and (fits[i] or not any(fits))]
    if better == "neither" or not runnable:
        return ResultRow(key, values, ratios, ())
    best = (min if better == "lower" else max)(values[i] or 0.0 for i in runnable)
    return ResultRow(key, values, ratios, tuple(i for i in runnable if _equal(values[i], best)))


def _all_equal(values: Sequence[Any]) -> bool:
    return all(_equal(values[0], value) for value in values[1:])


def _equal(a: Any, b: Any) -> bool:
    numbers = [isinstance(x, (int, float)) and not isinstance(x, bool) for x in (a, b)]
    return math.isclose(a, b, rel_tol=RELATIVE_TOLERANCE) if all(numbers) else bool(a == b and type(a) is type(b))
