"""A plan as plain text: verdict, money, parts that add up, trust, assumptions."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping

from planner.assemble import PUBLISHED_RUN
from planner.plan import Evidence, Interval, Plan
from planner.units import DAY_S, format_count, format_duration, format_gib, format_si, format_usd

__all__ = ["render_plan"]

TWO_COLUMN_WIDTH = 76
LABELS = {
    "recompute_workspace": "recompute workspace",
    "gathered_weights": "gathered weights",
    "communication_buffers": "communication buffers",
    "allocator_slack": "allocator slack",
    "context": "runtime context",
    "memory_bound": "memory-bound kernels",
    "grouped_matmul": "expert matmuls",
    "tensor_parallel": "tensor parallel, exposed",
    "context_parallel": "context parallel, exposed",
    "expert_parallel": "expert parallel, exposed",
    "fsdp": "FSDP, exposed",
    "data_parallel": "data parallel, exposed",
    "host": "waiting for the host",
    "kernel_gaps": "gaps between kernels",
    "step_overhead": "rest of a step",
    "correction": "as runs nearby say",
    "pipeline_transfer_and_bubble": "pipeline bubble",
    "matmul": "matmuls",
}


def render_plan(plan: Plan, width: int = 80, hints: bool = True) -> str:
    """The whole report, `width` columns wide (60 or more); no colour, no control characters.

    Args:
        hints: whether to end with what to run next; off in pipes.
    """
    width = max(width, 60)
    blocks = [_title(plan, width), _verdict(plan, width), _tables(plan, width), _trust(plan, width), _assumptions(plan, width)]
    if hints:
        blocks.append(_next(plan))
    return "\n\n".join(blocks) + "\n"


def _title(plan: Plan, width: int) -> str:
    inputs = plan.inputs
    cluster, workload = inputs["cluster"], inputs["workload"]
    active = f", {format_count(plan.params.active)} active" if plan.params.active < 0.9 * plan.params.total else ""
    parts = [
        f"{plan.model_name} ({format_count(plan.params.total)}{active})",
        f"{cluster['num_devices']:,} x {cluster['accelerator']}",
        f"{format_count(workload['tokens'])} tokens",
        f"{workload['precision']}, {inputs['stack']}",
    ]
    layout = plan.layout
    degrees = [f"{name} {getattr(layout, name):,}" for name in ("dp_replicate", "dp_shard", "tp", "cp", "pp", "ep") if getattr(layout, name) > 1]
    degrees += ["sequence parallel"] if layout.sequence_parallel else []
    degrees += [f"zero {layout.zero_stage}", f"micro-batch {layout.micro_batch_size}", f"{plan.time.num_microbatches} microbatches"]
    if layout.pp > 1:
        degrees.append(layout.schedule + (f" x {layout.num_virtual_stages}" if layout.num_virtual_stages > 1 else ""))
    shape = f"batch {workload['global_batch_size']:,} x {workload['seq_len']:,} tokens, recompute {workload['recompute']}"
    return "\n".join(_wrapped(text, width) for text in (" | ".join(parts), shape, "layout: " + ", ".join(degrees)))


def _wrapped(text: str, width: int, indent: str = "") -> str:
    return textwrap.fill(text, width, subsequent_indent=indent, break_long_words=True, break_on_hyphens=False)


def _verdict(plan: Plan, width: int) -> str:
    """One line per question, and a second one with what it is made of."""
    time, cost = plan.time, plan.cost
    rate = format_si(time.tokens_per_s_per_device)
    lines = [
        _fit(plan),
        f"TIME   {_range(plan.time.train_s, format_duration)}",
        f"       {format_duration(time.step_s.value)} per step, {time.num_steps:,} steps, {rate} tokens/s per device",
        *_money(plan),
        f"MFU    {time.mfu:.1%} of {format_si(time.peak_flops_per_s, 'FLOP/s')} {time.peak_name}",
        f"       {time.mfu_causal:.1%} with causal attention FLOPs, HFU {time.hfu:.1%}",
    ]
    if plan.loss is not None:
        loss, perplexity = plan.loss.nats_per_token, plan.loss.perplexity
        lines.append(f"LOSS   {_range(loss, lambda x: f'{x:.2f}')} nats per token, perplexity {_range(perplexity, lambda x: f'{x:.1f}')}")
    lines.append(f"ENERGY {format_si(cost.energy_kwh * 1000, 'Wh')}, {_mass(cost.co2e_kg)} CO2e")
    return "\n".join(_wrapped(line, width, " " * 7) for line in lines)


def _mass(kilograms: float) -> str:
    return format_si(kilograms / 1000, "t") if kilograms >= 1000 else f"{kilograms:.3g} kg"


def _range(interval: Interval, show: Callable[[float], str]) -> str:
    return f"{show(interval.value)}  [{show(interval.low)} to {show(interval.high)}]"


def _fit(plan: Plan) -> str:
    memory = plan.memory
    peak, usable = memory.peak_bytes, memory.usable_bytes
    stage = f" (stage {memory.peak_stage} of {len(memory.stages)})" if len(memory.stages) > 1 else ""
    if not plan.fits:
        return (
            f"DOES NOT FIT   needs {format_gib(peak.value)} GiB, {format_gib(usable)} usable: {format_gib(peak.value - usable)} GiB too much{stage}"
        )
    tight = "; tight: the upper bound does not fit" if peak.high > usable else ""
    free = f"{format_gib(usable - peak.value)} GiB free{stage}{tight}"
    return f"FITS   {format_gib(peak.value)} of {format_gib(usable)} GiB ({peak.value / usable:.0%}), {free}"


def _money(plan: Plan) -> list[str]:
    cost = plan.cost
    hours = f"{format_si(cost.billed_device_hours)} device-hours"
    if cost.usd is None or cost.price is None:
        return [f"COST   unknown: no price given; {hours}"]
    price = cost.price
    origin = f"{price['offer']} {price['region']}, {price['pricing']}, {price['date']}" if "offer" in price else "price given"
    return [f"COST   {_range(cost.usd, format_usd)}", f"       {hours} x {format_usd(price['usd_per_device_hour'])}, {origin}"]


def _table(title: str, unit: str, parts: Mapping[str, float], total: float, scale: float, width: int) -> list[str]:
    """Name, value and bar per part that is not zero; the total last."""
    shown = {name: value for name, value in parts.items() if value > 0}
    values = {name: _number(value / scale) for name, value in shown.items()}
    number_width = max([len(unit), *(len(v) for v in values.values()), len(_number(total / scale))])
    name_width = 25
    bar_width = max(width - name_width - number_width - 3, 0)
    lines = [f"{title:<{name_width}} {unit:>{number_width}}"]
    for name, value in sorted(shown.items(), key=lambda item: -item[1]):
        bar = "#" * round(bar_width * value / total) if total > 0 else ""
        lines.append(f" {LABELS.get(name, name):<{name_width - 1}} {values[name]:>{number_width}} {bar}".rstrip())
    lines.append(f" {'total':<{name_width - 1}} {_number(total / scale):>{number_width}}")
    return lines


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _tables(plan: Plan, width: int) -> str:
    memory, time = plan.memory, plan.time
    columns = 2 if width >= TWO_COLUMN_WIDTH else 1
    each = (width - 3) // 2 if columns == 2 else width
    stage = f", stage {memory.peak_stage}" if len(memory.stages) > 1 else ""
    left = _table(f"Memory per device{stage}", "GiB", memory.breakdown_bytes, memory.peak_bytes.value, 2.0**30, each)
    milli = time.step_s.value < 1
    right = _table("Time per step", "ms" if milli else "s", time.breakdown_s, time.step_s.value, 1e-3 if milli else 1.0, each)
    if columns == 1:
        return "\n".join([*left, "", *right])
    rows = max(len(left), len(right))
    left += [""] * (rows - len(left))
    right += [""] * (rows - len(right))
    return "\n".join(f"{a[:each]:<{each}}   {b}".rstrip() for a, b in zip(left, right, strict=True))


def _trust(plan: Plan, width: int) -> str:
    runs = [e for e in plan.evidence if e.name.startswith(PUBLISHED_RUN)]
    coefficients = [e for e in plan.evidence if e not in runs]
    counts = {kind: sum(1 for e in coefficients if e.evidence == kind) for kind in ("measured", "fitted", "assumed")}
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    days = plan.cost.mean_time_between_failures_s / DAY_S
    often = f"{days:.1f} days" if days >= 1 else format_duration(plan.cost.mean_time_between_failures_s)
    parts = [
        *([f"nearest published run {_nearest(runs[0])}"] if runs else ["no published run of this stack is known"]),
        f"{len(coefficients)} coefficients: {kinds}",
        f"goodput {plan.cost.goodput_fraction:.1%}, one failure every {often}",
        "ranges in brackets are meant to hold 8 times in 10",
    ]
    return _wrapped("Trust  " + "; ".join(parts), width, " " * 7)


def _nearest(run: Evidence) -> str:
    """What it was and how far off it was predicted."""
    what, place = run.name.removeprefix(PUBLISHED_RUN).split(",")[0].strip(": "), run.source.split(";")[0]
    return f"({what}; {place}) was predicted {run.value:+.1%} off without it"


def _assumptions(plan: Plan, width: int) -> str:
    return "\n".join(["Assumed", *(_wrapped(f"  - {note}", width, "    ") for note in plan.assumptions)])


def _next(plan: Plan) -> str:
    key = "time" if plan.fits else "memory"
    return f"Next   planner estimate ... --out plan.yaml\n       planner explain plan.yaml {key}"
