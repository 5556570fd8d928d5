"""Numbers that are one short formula of other numbers of the plan: rates, totals of the run, money, energy, loss."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from planner import economics
from planner.assemble import time_interval
from planner.explanations._base import Explanation, Input, Trace, explained
from planner.scaling_laws import EPOCH_2024
from planner.units import HOUR_S

__all__ = ["FORMULAS", "Formula", "explain_evidence", "explain_formula", "explain_input", "explain_interval"]

Origin = str | Callable[[Trace], tuple[Any, str]]
"""A key of the plan, or a function that gives (value, source)."""


@dataclass(frozen=True)
class Formula:
    """A formula, where its names come from, and who says so."""

    text: str
    names: Mapping[str, Origin]
    source: str
    terms: Mapping[str, str] = field(default_factory=dict)
    """Name -> key, where the number is also a sum."""


def _assumed(name: str) -> Origin:
    return lambda trace: (getattr(economics, name), f"planner/economics.py {name}")


def _law(name: str) -> Origin:
    return lambda trace: (getattr(EPOCH_2024, name), EPOCH_2024.source)


def _num_nodes(trace: Trace) -> tuple[Any, str]:
    return trace.job.cluster.num_devices / trace.job.cluster.node_size, f"num_devices / node_size {trace.job.cluster.node_size}"


def _billed(trace: Trace) -> tuple[Any, str]:
    offer = trace.job.cluster.offer
    size = offer.devices_per_instance if offer is not None else 1
    return -(-trace.job.cluster.num_devices // size) * size, f"whole instances of {size} device(s)"


def _power(trace: Trace) -> tuple[Any, str]:
    device = trace.job.cluster.accelerator
    return device.power_watts or 0.0, device.source if device.power_watts else "not published: hosts only"


def _usable(trace: Trace) -> tuple[Any, str]:
    device = trace.job.cluster.accelerator
    return device.memory_bytes, f"{device.id} as reported by the runtime: {device.source}"


def _peak(trace: Trace) -> tuple[Any, str]:
    return trace.plan.time.peak_flops_per_s, f"{trace.plan.time.peak_name}: {trace.job.cluster.accelerator.source}"


def _price(trace: Trace) -> tuple[Any, str]:
    price = trace.plan.cost.price or {}
    return trace.plan.cost.usd_per_device_hour, " ".join(str(price[k]) for k in ("offer", "region", "pricing", "date", "source") if price.get(k))


def _seconds(trace: Trace) -> tuple[Any, str]:
    return HOUR_S, "seconds per hour"


def _slowest_stage(trace: Trace) -> tuple[Any, str]:
    return int(trace.time.slowest_stage), "the stage with most work"


def _peak_stage(trace: Trace) -> tuple[Any, str]:
    return int(trace.memory.peak_stage), "the stage with most bytes"


_BATCH = {"global_batch_size": "inputs.workload.global_batch_size", "seq_len": "inputs.workload.seq_len"}
_STEP = {"step_s": "time.step_s.value"}
_TRAIN: dict[str, Origin] = {"train_s": "time.train_s.value", "seconds_per_hour": _seconds}
_DEVICES = {"num_devices": "inputs.cluster.num_devices"}
_PER_DEVICE = {"tokens_per_s_per_device": "time.tokens_per_s_per_device"}
_PEAK = {"peak_flops_per_s": "time.peak_flops_per_s"}
_MTBF: dict[str, Origin] = {"mean_time_between_failures_s": "cost.mean_time_between_failures_s", "checkpoint_stall_s": _assumed("CHECKPOINT_STALL_S")}
_NATS: dict[str, Origin] = {"nats_per_token": "loss.nats_per_token.value", "relative_error_fraction": _law("relative_error_fraction")}
_DALY = "Daly 2006, doi:10.1016/j.future.2004.11.016"
_MFU = "arXiv:2204.02311 appendix B: model FLOPs per second over the dense peak"
_BREAKDOWN = ("training", "failures_and_checkpoints", "idle_devices")

FORMULAS: dict[str, Formula] = {
    "time.tokens_per_s": Formula("global_batch_size * seq_len / step_s", {**_BATCH, **_STEP}, "tokens of a step over its time"),
    "time.tokens_per_s_per_device": Formula(
        "tokens_per_s / num_devices", {"tokens_per_s": "time.tokens_per_s", **_DEVICES}, "even share of all devices"
    ),
    "time.model_flops_per_s_per_device": Formula(
        "tokens_per_s_per_device * model_flops_per_token", {**_PER_DEVICE, "model_flops_per_token": "flops.model_per_token"}, _MFU
    ),
    "time.mfu": Formula(
        "tokens_per_s_per_device * model_flops_per_token / peak_flops_per_s",
        {**_PER_DEVICE, "model_flops_per_token": "flops.model_per_token", **_PEAK},
        f"{_MFU}; attention over all pairs",
    ),
    "time.mfu_causal": Formula(
        "tokens_per_s_per_device * model_flops_per_token_causal / peak_flops_per_s",
        {**_PER_DEVICE, "model_flops_per_token_causal": "flops.model_per_token_causal", **_PEAK},
        f"{_MFU}; attention over the pairs that the mask leaves",
    ),
    "time.hfu": Formula(
        "tokens_per_s_per_device * hardware_flops_per_token / peak_flops_per_s",
        {**_PER_DEVICE, "hardware_flops_per_token": "flops.hardware_per_token", **_PEAK},
        "arXiv:2205.05198 section 5: FLOPs as executed, recompute included, over the dense peak",
    ),
    "time.peak_flops_per_s": Formula("peak_flops_per_s", {"peak_flops_per_s": _peak}, "hardware catalog: dense, without sparsity"),
    "time.num_steps": Formula(
        "ceil(tokens / (global_batch_size * seq_len))", {"tokens": "inputs.workload.tokens", **_BATCH}, "the last step may be short of tokens"
    ),
    "time.num_microbatches": Formula(
        "global_batch_size / (dp_replicate * dp_shard * micro_batch_size)",
        {
            "global_batch_size": "inputs.workload.global_batch_size",
            **{name: f"inputs.layout.{name}" for name in ("dp_replicate", "dp_shard", "micro_batch_size")},
        },
        "microbatches per pipeline and step",
    ),
    "time.bubble_fraction": Formula(
        "bubble_s / step_s", {"bubble_s": "time.breakdown_s.pipeline_transfer_and_bubble", **_STEP}, "arXiv:2104.04473 section 2.2"
    ),
    "time.train_s.value": Formula(
        "step_s * num_steps / goodput_fraction",
        {**_STEP, "num_steps": "time.num_steps", "goodput_fraction": "cost.goodput_fraction"},
        "time of all steps over the share of wall time that advances training",
    ),
    "time.slowest_stage": Formula("slowest_stage", {"slowest_stage": _slowest_stage}, "first of the busiest stages"),
    "memory.usable_bytes": Formula("memory_bytes", {"memory_bytes": _usable}, "hardware catalog"),
    "memory.fits": Formula(
        "peak_bytes <= usable_bytes", {"peak_bytes": "memory.peak_bytes.value", "usable_bytes": "memory.usable_bytes"}, "the largest stage decides"
    ),
    "memory.peak_stage": Formula("peak_stage", {"peak_stage": _peak_stage}, "first of the largest stages"),
    "flops.total": Formula(
        "model_per_token * tokens", {"model_per_token": "flops.model_per_token", "tokens": "inputs.workload.tokens"}, "model FLOPs of the run"
    ),
    "cost.usd_per_device_hour": Formula("usd_per_device_hour", {"usd_per_device_hour": _price}, "the offer's price, or the one given"),
    "cost.price.usd_per_device_hour": Formula("usd_per_device_hour", {"usd_per_device_hour": _price}, "the offer's price, or the one given"),
    "cost.usd.value": Formula(
        "train_s / seconds_per_hour * num_billed_devices * usd_per_device_hour",
        {**_TRAIN, "num_billed_devices": _billed, "usd_per_device_hour": "cost.usd_per_device_hour"},
        "wall time of all billed devices at the price",
        {name: f"cost.breakdown_usd.{name}" for name in _BREAKDOWN},
    ),
    "cost.breakdown_usd.training": Formula(
        "usd - idle_usd - lost_usd",
        {"usd": "cost.usd.value", "idle_usd": "cost.breakdown_usd.idle_devices", "lost_usd": "cost.breakdown_usd.failures_and_checkpoints"},
        "what is left of the whole",
    ),
    "cost.breakdown_usd.idle_devices": Formula(
        "usd * (1 - num_devices / num_billed_devices)",
        {"usd": "cost.usd.value", **_DEVICES, "num_billed_devices": _billed},
        "devices of the last instance that the layout leaves idle",
    ),
    "cost.breakdown_usd.failures_and_checkpoints": Formula(
        "usd * num_devices / num_billed_devices * (1 - goodput_fraction)",
        {"usd": "cost.usd.value", **_DEVICES, "num_billed_devices": _billed, "goodput_fraction": "cost.goodput_fraction"},
        "time that does not advance training",
    ),
    "cost.device_hours": Formula("train_s / seconds_per_hour * num_devices", {**_TRAIN, **_DEVICES}, "devices that work"),
    "cost.billed_device_hours": Formula(
        "train_s / seconds_per_hour * num_billed_devices", {**_TRAIN, "num_billed_devices": _billed}, "whole instances"
    ),
    "cost.mean_time_between_failures_s": Formula(
        "1000 * 86400 / (failures_per_1000_node_days * num_nodes)",
        {"failures_per_1000_node_days": _assumed("FAILURES_PER_1000_NODE_DAYS"), "num_nodes": _num_nodes},
        "mature clusters: arXiv:2410.21680, 2407.21783",
    ),
    "cost.checkpoint_interval_s": Formula(
        "sqrt(2 * checkpoint_stall_s * mean_time_between_failures_s) * (1 + sqrt(checkpoint_stall_s / (2 * mean_time_between_failures_s)) / 3"
        " + checkpoint_stall_s / (18 * mean_time_between_failures_s)) - checkpoint_stall_s",
        _MTBF,
        _DALY,
    ),
    "cost.goodput_fraction": Formula(
        "checkpoint_interval_s / (mean_time_between_failures_s * exp(restart_s / mean_time_between_failures_s)"
        " * expm1((checkpoint_interval_s + checkpoint_stall_s) / mean_time_between_failures_s))",
        {"checkpoint_interval_s": "cost.checkpoint_interval_s", **_MTBF, "restart_s": _assumed("RESTART_S")},
        _DALY,
    ),
    "cost.energy_kwh": Formula(
        "device_hours * (power_watts * board_power_fraction + host_watts_per_device) / 1000 * power_usage_effectiveness",
        {
            "device_hours": "cost.device_hours",
            "power_watts": _power,
            "board_power_fraction": _assumed("BOARD_POWER_FRACTION"),
            "host_watts_per_device": _assumed("HOST_WATTS_PER_DEVICE"),
            "power_usage_effectiveness": _assumed("POWER_USAGE_EFFECTIVENESS"),
        },
        "board draw while training: arXiv:2412.08602",
    ),
    "cost.co2e_kg": Formula(
        "energy_kwh * grid_g_per_kwh / 1000",
        {"energy_kwh": "cost.energy_kwh", "grid_g_per_kwh": _assumed("GRID_G_PER_KWH")},
        "world average, IEA 2019",
    ),
    "loss.nats_per_token.value": Formula(
        "irreducible + size_factor / params**size_exponent + data_factor / tokens**data_exponent",
        {
            **{name: _law(name) for name in ("irreducible", "size_factor", "size_exponent", "data_factor", "data_exponent")},
            "params": "params.active",
            "tokens": "inputs.workload.tokens",
        },
        EPOCH_2024.source,
    ),
    "loss.nats_per_token.low": Formula(
        "max(nats_per_token * (1 - relative_error_fraction), irreducible)",
        {**_NATS, "irreducible": _law("irreducible")},
        EPOCH_2024.source,
    ),
    "loss.nats_per_token.high": Formula(
        "nats_per_token * (1 + relative_error_fraction)",
        _NATS,
        EPOCH_2024.source,
    ),
    **{
        f"loss.perplexity.{bound}": Formula("exp(nats_per_token)", {"nats_per_token": f"loss.nats_per_token.{bound}"}, "perplexity of a loss in nats")
        for bound in ("value", "low", "high")
    },
}  # fmt: skip


def explain_formula(trace: Trace, key: str) -> Explanation:
    """A number of `FORMULAS`."""
    rule = FORMULAS[key]
    inputs = [trace.input(name, origin) if isinstance(origin, str) else Input(name, *origin(trace)) for name, origin in rule.names.items()]
    terms = {name: trace.at(origin) for name, origin in rule.terms.items()}
    if key == "loss.nats_per_token.value":
        values = {i.name: float(i.value or 0) for i in inputs}
        terms = {
            "irreducible": values["irreducible"],
            "model size": values["size_factor"] / values["params"] ** values["size_exponent"],
            "data": values["data_factor"] / values["tokens"] ** values["data_exponent"],
        }
    children = [origin for origin in (*rule.terms.values(), *rule.names.values()) if isinstance(origin, str)]
    return explained(key, trace.at(key), rule.text, inputs, terms=terms, children=children, source=rule.source)


def explain_interval(trace: Trace, key: str) -> Explanation:
    """The bounds of the intervals of memory, time and money: value times what the stack's residuals say."""
    name, bound = key.rsplit(".", 1)
    stack = trace.job.stack
    spread = stack.memory_interval if key.startswith("memory.") else time_interval(trace.job, trace.time)
    inputs = [
        trace.input("value", f"{name}.value"),
        Input("factor", getattr(spread, bound), f"{spread.evidence}, stack {stack.name}: {spread.source}"),
    ]
    formula = "value * factor"
    return explained(key, trace.at(key), formula, inputs, children=[f"{name}.value"], source="80% interval")


def explain_evidence(trace: Trace, key: str) -> Explanation:
    """A coefficient that the step time rests on."""
    entry = trace.plan.evidence[int(key.split(".")[1])]
    source = f"{entry.name}, {entry.evidence}: {entry.source}"
    return explained(key, entry.value, "coefficient", [Input("coefficient", entry.value, source)], source=source)


def explain_input(trace: Trace, key: str) -> Explanation:
    """A number of the request: given, guessed (as the assumptions say), or the default."""
    name = key.split(".")[-1]
    value = trace.at(key)
    guess = next((text for text in trace.plan.assumptions if re.match(rf"{re.escape(name)}\b", text)), None)
    layout_guess = next((text for text in trace.plan.assumptions if text.startswith("layout")), None)
    given: Any = trace.request.model_dump(by_alias=True, exclude_unset=True)
    for step in key.split(".")[1:]:
        given = given.get(step) if isinstance(given, dict) else None
    if given is not None:
        source = "given in the request"
    elif key.startswith("inputs.layout.") and layout_guess is not None:
        source = layout_guess
    else:
        source = guess or "default"
    return explained(key, value, name, [Input(name, value, source)], source=source)
