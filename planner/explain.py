"""Where a number of a plan comes from: `explain(request, key)` walks from any number down to formulas and sources.

Keys are dotted paths as in the JSON of `estimate` (`memory.breakdown_bytes.weights`, `time.step_s.value`), and go on below it:
part of the model, op, pass, collective (`time.breakdown_s.matmul.block.mlp.up.forward`). `Explanation.children` lists them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from planner.errors import InputError
from planner.explanations._base import Explanation, Input, Term, Trace, explained, unit_of
from planner.explanations.memory import explain_memory
from planner.explanations.model import explain_flops, explain_hardware_flops, explain_params
from planner.explanations.simple import FORMULAS, explain_evidence, explain_formula, explain_input, explain_interval
from planner.explanations.time import explain_time
from planner.plan import Request, build_request
from planner.registry import unknown_name

__all__ = ["MAIN_KEYS", "Explanation", "Input", "Term", "Trace", "explain", "explain_in", "numeric_keys"]

MAIN_KEYS = (
    "params.total", "params.active", "flops.model_per_token", "flops.hardware_per_token", "memory.peak_bytes.value", "memory.usable_bytes",
    "time.step_s.value", "time.tokens_per_s", "time.mfu", "time.hfu", "time.train_s.value", "loss.nats_per_token.value", "loss.perplexity.value",
    "cost.usd.value", "cost.device_hours", "cost.goodput_fraction", "cost.energy_kwh", "cost.co2e_kg",
)  # fmt: skip
SHORT_FORMS = {
    "params": "params.total", "parameters": "params.total", "flops": "flops.model_per_token", "memory": "memory.peak_bytes.value",
    "time": "time.step_s.value", "step": "time.step_s.value", "loss": "loss.nats_per_token.value", "cost": "cost.usd.value",
    "goodput": "cost.goodput_fraction", "energy": "cost.energy_kwh", "carbon": "cost.co2e_kg", "price": "cost.usd_per_device_hour",
    "bubble": "time.breakdown_s.pipeline_transfer_and_bubble", "train": "time.train_s.value", "tokens": "inputs.workload.tokens",
}  # fmt: skip
"""Words for the number most people mean; besides these, the last word of a key will do where it is the only one."""
_EXPLAINERS: tuple[tuple[str, Callable[[Trace, str], Explanation]], ...] = (
    (r"(memory\.peak_bytes|time\.step_s|time\.train_s|cost\.usd)\.(low|high)", explain_interval),
    (r"memory\..+", explain_memory),
    (r"time\..+", explain_time),
    (r"params\..+", explain_params),
    (r"flops\.(hardware|counted)_per_token.*", explain_hardware_flops),
    (r"flops\..+", explain_flops),
    (r"evidence\.\d+\.value", explain_evidence),
    (r"inputs\..+", explain_input),
)


def explain(request: Request | dict[str, Any], key: str | None = None) -> Explanation:
    """Formula, values put in, parts and source of one number of the plan of `request`.

    Args:
        request: as for `estimate`.
        key: dotted key or a short form (`memory`, `mfu`, `usd`); None for the overview, whose `inputs` are the main numbers.

    Raises:
        InputError: wrong input, an unknown key (the nearest are named), or a number that this plan does not have.

    Example:
        >>> gpt2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
        >>> found = explain({"model": gpt2, "cluster": {"accelerator": "a100-80gb-sxm", "num_devices": 1}}, "params")
        >>> found.key, found.value, found.formula
        ('params.total', 124439808.0, 'embedding + head + block')
    """
    return explain_in(Trace.of(build_request(request) if isinstance(request, dict) else request), key)


def explain_in(trace: Trace, key: str | None = None) -> Explanation:
    """`explain` of a plan that has been traced already, for many keys in a row.

    Raises:
        InputError: an unknown key, or a number that this plan does not have.
    """
    if key is None:
        return _overview(trace)
    full = _resolve(trace.plain, key)
    if full in FORMULAS:
        return explain_formula(trace, full)
    for pattern, explainer in _EXPLAINERS:
        if re.fullmatch(pattern, full):
            return explainer(trace, full)
    return _as_it_stands(trace, full)


def numeric_keys(value: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of all numbers in plain data, truth values excepted.

    Example:
        >>> list(numeric_keys({"a": {"b": 1}, "c": [2.0, "x"], "d": True}))
        ['a.b', 'c.0']
    """
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        if isinstance(item, (dict, list)):
            yield from numeric_keys(item, f"{prefix}{name}.")
        elif isinstance(item, (int, float)) and not isinstance(item, bool):
            yield f"{prefix}{name}"


def _overview(trace: Trace) -> Explanation:
    keys = set(numeric_keys(trace.plain))
    shown = [key for key in MAIN_KEYS if key in keys]
    inputs = tuple(Input(key, trace.at(key), unit_of(key)) for key in shown)
    return Explanation("plan", None, "", "", "", inputs, (), tuple(shown), "explain any of these keys, or any other number of estimate --json")


def _resolve(plain: dict[str, Any], key: str) -> str:
    """The full key behind `key`: exact, a short form, a unique last word, or a path below one of the plan's numbers."""
    name = re.sub(r"\[(\d+)\]", r".\1", key.strip().strip("."))
    known = [*numeric_keys(plain), "memory.fits"]
    for candidate in (name, f"{name}.value", SHORT_FORMS.get(name, "")):
        if candidate in known:
            return candidate
    whole = next((k for k in sorted(known, key=len, reverse=True) if name.startswith(f"{k}.")), None)
    if whole is not None:
        return name
    suffixes = (f".{name}", f".{name}.value")
    main = [k for k in known if k.endswith(suffixes) and not re.match(r"memory\.stages|evidence|violations|cost\.price", k)]
    outputs = [k for k in main if not k.startswith("inputs.")] or main
    if len(outputs) == 1:
        return outputs[0]
    _refuse_unknown_number(plain, name, SHORT_FORMS.get(name, name))
    if outputs:
        raise InputError.single("key", key, "names more than one number", f"use one of {', '.join(outputs[:6])}")
    raise unknown_name("key", key, sorted({*known, *SHORT_FORMS}), " (without a key, explain lists the main numbers)")


def _refuse_unknown_number(plain: dict[str, Any], name: str, full: str) -> None:
    """A key of the contract whose number this plan lacks, and why."""
    if (full.startswith("cost.") and full.split(".")[1] in plain["cost"]) or name == "usd":
        raise InputError.single(
            "key", name, "is unknown in this plan: no price is known", "name an offer with cluster.offer, or a price with cluster.price"
        )
    if full.startswith("loss.") or name in ("perplexity", "nats_per_token"):
        raise InputError.single("key", name, "is unknown in this plan: no law for fine-tuning or masked language models", "explain another number")


def _as_it_stands(trace: Trace, key: str) -> Explanation:
    """Numbers that repeat another one: violations, schema_version, provenance."""
    value = trace.at(key)
    match = re.fullmatch(r"violations\.(\d+)\.(\w+)", key)
    name = key.split(".")[-1]
    if match is None:
        return explained(key, value, name, [Input(name, value, "as it stands")], source="format of the plan")
    stage = trace.plan.violations[int(match[1])].stage
    origin = {"needed_bytes": f"memory.stages.{stage}.total_bytes", "available_bytes": "memory.usable_bytes"}.get(
        match[2], f"memory.stages.{stage}.stage"
    )
    return explained(key, value, name, [trace.input(name, origin)], children=[origin], source="a stage that needs more than the device has")
