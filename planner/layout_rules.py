"""The arithmetic that a layout must keep. Memory is not among the rules: a plan that does not fit is still a plan.

One list serves both ways: `check_layout` explains what is wrong with one layout, `legal_layouts` filters many at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.errors import InputError, Problem
from planner.layout import Layout, LayoutArrays
from planner.model_spec import ModelSpec

__all__ = ["Facts", "check_layout", "legal_layouts"]

Array = Any
AnyLayout = Any
"""A `Layout` or a `LayoutArrays`: rules read attributes only."""


@dataclass(frozen=True)
class Facts:
    """What a layout must agree with."""

    model: ModelSpec
    num_devices: int
    seq_len: int
    global_batch_size: int


@dataclass(frozen=True)
class Rule:
    """One rule: where it holds, and how to tell a person that it does not."""

    key: str
    holds: Callable[[AnyLayout, Facts], Array]
    text: Callable[[AnyLayout, Facts], str]
    fix: Callable[[AnyLayout, Facts], str]


def _world(layout: AnyLayout) -> Array:
    return layout.dp * layout.tp * layout.cp * layout.pp


def _product(layout: AnyLayout) -> str:
    degrees = (layout.dp_replicate, layout.dp_shard, layout.tp, layout.cp, layout.pp)
    return f"dp_replicate*dp_shard*tp*cp*pp = {'*'.join(map(str, degrees))} = {_world(layout)}"


def _divisors(number: int, limit: int = 16) -> str:
    found = [d for d in range(1, min(number, 4096) + 1) if number % d == 0]
    return "use one of " + ", ".join(str(d) for d in found[:limit]) + (", ..." if len(found) > limit else "")


def _per_round(layout: AnyLayout) -> Array:
    return layout.dp * layout.micro_batch_size


def _batch_fix(layout: AnyLayout, facts: Facts) -> str:
    per_round = _per_round(layout)
    below, above = facts.global_batch_size // per_round * per_round, -(-facts.global_batch_size // per_round) * per_round
    return f"use global_batch_size {above}" + (f" or {below}" if below else "")


def _stage_world(layout: AnyLayout) -> Array:
    return layout.dp * layout.cp * layout.tp


def _experts(facts: Facts) -> int:
    return facts.model.moe.num_experts if facts.model.moe else 1


def _slices(layout: AnyLayout) -> int:
    """Slices of the model: DualPipe's second chunk is a copy, not a slice."""
    return int(layout.pp * (1 if layout.schedule == "dualpipe" else layout.num_virtual_stages))


RULES: tuple[Rule, ...] = (
    Rule(
        "layout",
        lambda x, f: _world(x) == f.num_devices,
        lambda x, f: f"{_product(x)} must equal cluster.num_devices = {f.num_devices}",
        lambda x, f: f"set cluster.num_devices to {_world(x)}, or choose degrees whose product is {f.num_devices}",
    ),
    Rule(
        "tp",
        lambda x, f: f.model.num_attention_heads % x.tp == 0,
        lambda x, f: f"must divide num_attention_heads = {f.model.num_attention_heads}",
        lambda x, f: _divisors(f.model.num_attention_heads),
    ),
    Rule(
        "tp",
        lambda x, f: (f.model.num_key_value_heads % x.tp == 0) | (x.tp % f.model.num_key_value_heads == 0),
        lambda x, f: f"must divide num_key_value_heads = {f.model.num_key_value_heads}, or be a multiple of it",
        lambda x, f: _divisors(f.model.num_key_value_heads),
    ),
    Rule(
        "tp",
        lambda x, f: f.model.intermediate_size % x.tp == 0,
        lambda x, f: f"must divide intermediate_size = {f.model.intermediate_size}",
        lambda x, f: _divisors(f.model.intermediate_size),
    ),
    Rule(
        "pp",
        # Two more slices than layers are possible: one with the embedding alone, one with the head alone (Llama 3 405B).
        lambda x, f: np.asarray(_slices(x) <= f.model.num_layers + 2 * (_slices(x) > 2)),
        lambda x, f: f"pp * num_virtual_stages = {_slices(x)} must not exceed num_layers + 2 = {f.model.num_layers + 2}",
        lambda x, f: f"use pp * num_virtual_stages of at most {f.model.num_layers}",
    ),
    Rule(
        "cp",
        lambda x, f: (x.cp == 1) | (f.seq_len % (2 * x.cp) == 0),
        lambda x, f: f"2 * cp must divide seq_len = {f.seq_len}: each rank holds two slices, so that causal work is even",
        lambda x, f: _divisors(f.seq_len // 2) if f.seq_len % 2 == 0 else "use cp: 1, or an even seq_len",
    ),
    Rule(
        "sequence_parallel",
        lambda x, f: np.logical_not(x.sequence_parallel) | (f.seq_len % (x.cp * x.tp) == 0),
        lambda x, f: f"cp * tp = {x.cp * x.tp} must divide seq_len = {f.seq_len}",
        lambda x, f: "set sequence_parallel: false, or change seq_len",
    ),
    Rule(
        "sequence_parallel",
        lambda x, f: np.logical_not(x.sequence_parallel) | (x.tp > 1),
        lambda x, f: "splits the sequence over the tp ranks, and tp = 1",
        lambda x, f: "set sequence_parallel: false, or tp: 2",
    ),
    Rule(
        "zero_stage",
        lambda x, f: (np.asarray(x.zero_stage) > 0) | (x.dp_shard == 1),
        lambda x, f: f"stage 0 shards nothing, but dp_shard = {x.dp_shard}",
        lambda x, f: f"use zero_stage: 1, 2 or 3; or dp_replicate: {x.dp} with dp_shard: 1",
    ),
    Rule(
        "micro_batch_size",
        lambda x, f: f.global_batch_size % _per_round(x) == 0,
        lambda x, f: (
            f"global_batch_size = {f.global_batch_size} must be a multiple of dp * micro_batch_size = {x.dp} * {x.micro_batch_size} = {_per_round(x)}"
        ),
        _batch_fix,
    ),
    Rule(
        "ep",
        lambda x, f: np.asarray(_experts(f) % x.ep == 0),
        lambda x, f: f"must divide num_experts = {_experts(f)}" if f.model.moe else f"must be 1: {f.model.name} has no experts",
        lambda x, f: _divisors(_experts(f)),
    ),
    Rule(
        "ep",
        lambda x, f: _stage_world(x) % x.ep == 0,
        lambda x, f: f"must divide dp * cp * tp = {_stage_world(x)}, the devices of one pipeline stage",
        lambda x, f: _divisors(_stage_world(x)),
    ),
    Rule(
        "ep",
        lambda x, f: (x.ep == 1) | (x.tp == 1) | np.asarray(x.sequence_parallel, bool),
        lambda x, f: "with tp > 1 each tp rank must route tokens of its own",
        lambda x, f: "set sequence_parallel: true",
    ),
    Rule(
        "tp",
        lambda x, f: (np.asarray(x.ep) > 1) | ((f.model.moe.intermediate_size if f.model.moe else 0) % x.tp == 0),
        lambda x, f: f"must divide the experts' intermediate_size = {f.model.moe.intermediate_size if f.model.moe else 0} when ep = 1",
        lambda x, f: "use a smaller tp, or ep > 1",
    ),
)


def check_layout(layout: Layout, facts: Facts) -> None:
    """Refuses a layout that breaks a rule.

    Raises:
        InputError: one Problem per broken rule, with the numbers in it and the values that would do.
    """
    broken = [rule for rule in RULES if not bool(np.all(rule.holds(layout, facts)))]
    if broken:
        raise InputError(
            *(
                Problem(_path(rule.key), getattr(layout, rule.key, layout.num_devices), rule.text(layout, facts), rule.fix(layout, facts))
                for rule in broken
            )
        )


def _path(key: str) -> str:
    return key if key == "layout" else f"layout.{key}"


def legal_layouts(layouts: LayoutArrays, facts: Facts, among: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """Which of many layouts keep every rule, and how many each rule was the first to refuse.

    Args:
        facts: `num_devices` may differ from layout to layout.
        among: those that are looked at; its shape is that of all layouts, and of the answer.
    """
    legal = among
    refused: dict[str, int] = {}
    for rule in RULES:
        holds = np.broadcast_to(rule.holds(layouts, facts), legal.shape)
        lost = int(np.count_nonzero(legal & ~holds))
        if lost:
            refused[_path(rule.key)] = refused.get(_path(rule.key), 0) + lost
        legal = legal & holds
    return legal, refused
