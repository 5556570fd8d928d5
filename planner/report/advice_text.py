"""Advice as text and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from planner.advice import Advice, Choice
from planner.layout import describe_layout
from planner.units import format_count, format_duration, format_usd

__all__ = ["advice_to_dict", "render_advice"]


def advice_to_dict(found: Advice) -> dict[str, Any]:
    """The object that `advise --json` prints."""
    return {
        "schema_version": 1,
        "budget": asdict(found.budget),
        "inference_tokens": found.inference_tokens,
        "law": found.law,
        "best": _plain(found.choices[found.best]),
        "choices": [_plain(choice) for choice in found.choices],
        "notes": list(found.notes),
    }


def _plain(choice: Choice) -> dict[str, Any]:
    plan = choice.plan.to_dict()
    loss = {"value": choice.loss, "low": choice.loss_low, "high": choice.loss_high}
    return {
        "model": choice.model, "params": choice.params, "tokens": choice.tokens, "loss": {"nats_per_token": loss},
        "perplexity": {name: math.exp(value) for name, value in loss.items()}, "inference_flops": choice.inference_flops,
        "layout": plan["inputs"]["layout"], "time": plan["time"], "cost": plan["cost"], "flops": plan["flops"],
    }  # fmt: skip


def render_advice(found: Advice) -> str:
    """A line for each size, the best one marked, then its plan."""
    lines = [f"  {'parameters':>10}  {'tokens':>8}  {'per param':>9}  {'loss':>6}  {'80% interval':>13}  {'time':>9}  {'cost':>10}"]
    for place, choice in enumerate(found.choices):
        usd = "-" if choice.plan.cost.usd is None else format_usd(choice.plan.cost.usd.value)
        mark, days = ">" if place == found.best else " ", format_duration(choice.plan.time.train_s.value)
        size = f"{mark} {format_count(choice.params):>10}  {format_count(choice.tokens):>8}  {choice.tokens_per_param:9.1f}"
        lines.append(f"{size}  {choice.loss:6.3f}  {choice.loss_low:5.2f} to {choice.loss_high:4.2f}  {days:>9}  {usd:>10}")
    best = found.choices[found.best]
    model = best.model
    lines += [
        "",
        f"Best: {model['num_hidden_layers']} layers of {model['hidden_size']:,}, {model['num_attention_heads']} heads",
        f"Layout: {describe_layout(best.plan.layout)}",
        f"Loss by {found.law}",
        *(f"- {note}" for note in found.notes),
    ]
    return "\n".join(lines) + "\n"
