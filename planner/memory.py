"""StepGraph -> bytes per device on every pipeline stage, by what they hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from planner.arrays import largest
from planner.graph import StepGraph
from planner.hardware import Cluster
from planner.part_memory import PartMemory
from planner.stack import StackSpec
from planner.stage_memory import WORKSPACES, Instant, StageMemory, Terms

__all__ = ["INSTANTS", "MemoryBreakdown", "estimate_memory", "memory_terms", "peak_memory"]

Array = Any


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes per device and stage; every field has shape [..., pp] and they add up to `total_bytes`."""

    weights: Array
    """Parameters as stored between steps, with low-precision copies."""
    gradients: Array
    """Where they are made anew each step, those that live beside the activations which they replace. With placeholders and
    buckets of the reduction."""
    optimizer: Array
    """Optimizer states and a separate fp32 master copy."""
    activations: Array
    """Kept from forward to backward, all microbatches in flight, without the logits."""
    logits: Array
    """What the loss keeps: logits, or the gradients that it made with them."""
    cast_weights: Array
    """Copies in compute format that the backward pass needs again, of each microbatch in flight."""
    recompute_workspace: Array
    """Activations of the one block that is being recomputed."""
    gathered_weights: Array
    """Full weights and gradients of the blocks that FSDP has in hand; all of the stage's weights with ZeRO-1 and 2 of in-place stacks."""
    temporaries: Array
    """Activation gradients and workspaces of the op that needs most."""
    communication_buffers: Array
    context: Array
    allocator_slack: Array
    instant: Array
    """Index into `INSTANTS`: when the stage holds most."""

    PARTS = (
        "weights", "gradients", "optimizer", "activations", "logits", "cast_weights", "recompute_workspace", "gathered_weights",
        "temporaries", "communication_buffers", "context", "allocator_slack",
    )  # fmt: skip
    CHANGING = ("gradients", "activations", "logits", "cast_weights", "recompute_workspace", "gathered_weights", "temporaries")
    """Those of which a step has more at some instants than at others."""

    @property
    def total_bytes(self) -> Array:
        """Peak per device, [..., pp]."""
        return sum(getattr(self, name) for name in self.PARTS)

    @property
    def peak_bytes(self) -> Array:
        """Largest stage, [...]."""
        return np.max(self.total_bytes, axis=-1)

    @property
    def peak_stage(self) -> Array:
        """Index of the largest stage."""
        return np.argmax(self.total_bytes, axis=-1)


INSTANTS = {
    "loss": "at the loss, which makes its own gradient",
    "head": "when the head's gradients leave for other ranks",
    "blocks": "in the first block that the backward pass comes to",
    "second block": "in the block after that",
    "next blocks": "in that block of the next microbatch, when there are gradients",
    "reduce": "when the largest block's gradients leave for other ranks",
    "last block": "in the last block that the backward pass comes to",
    "embedding": "at the embedding's gradient",
    "update": "after the last backward pass",
}
"""When a stage may hold most."""


def estimate_memory(graph: StepGraph, stack: StackSpec, cluster: Cluster) -> MemoryBreakdown:
    """Peak memory of every stage.

    Formula: states (weights, optimizer) and buffers, + the largest of what is alive at each of `INSTANTS`, + runtime + allocator slack.
    Left out: fragmentation beyond the slack fraction, load imbalance of experts, pinned host memory.
    Source: arXiv:1910.02054 (ZeRO), 2205.05198 (activations), 2104.04473 (in flight), 2304.11277 (FSDP).
    """
    lasting, found = memory_terms(graph, stack)
    at = [_by_part(lasting, terms) for terms in found.values()]
    totals = [_sum(parts) for parts in at]
    shape = np.broadcast_shapes(*(np.shape(total) for total in totals))
    instant = np.argmax(np.stack([np.broadcast_to(total, shape) for total in totals]), axis=0)
    parts = {name: np.choose(instant, [np.broadcast_to(each[name], shape) for each in at]) for name in at[0]}
    slack = _sum(parts) * stack.allocator_slack_fraction
    return MemoryBreakdown(**parts, context=np.full(shape, stack.context), allocator_slack=slack, instant=instant)


def peak_memory(graph: StepGraph, stack: StackSpec, parts: Sequence[PartMemory] | None = None) -> Array:
    """`estimate_memory(...).peak_bytes`, [...], but for rounding and without the parts: for many layouts.

    Stages of a kind that hold no more than the first of it are left out.
    """
    held = StageMemory(graph, stack, parts, only_fullest=True)
    # Sums of few numbers first: what differs between splits of the data, and what is there at all instants, is added last.
    alive = reduce(np.maximum, (_where(instant) for instant in held.instants().values()))
    alive = np.maximum(total_of([alive, *_values(held.throughout)]), held.gradients)
    most = total_of([alive, stack.workspace, *_lasting(held, graph, stack).values()])
    return largest(most) * (1 + stack.allocator_slack_fraction) + stack.context


def _where(instant: Instant) -> Array:
    """Bytes at one instant; nothing where it does not come."""
    if not instant.comes:
        return np.zeros(1)
    total = total_of(_values(instant.terms))
    return total if np.all(instant.where) else np.where(instant.where, total, 0.0)


def _values(terms: Terms) -> list[Array]:
    return [num_bytes for held in terms.values() for num_bytes in held.values()]


def total_of(values: Sequence[Array]) -> Array:
    """Their sum, arrays of one shape among themselves first and small ones before large ones."""
    by_shape: dict[tuple[int, ...], Array] = {}
    for value in values:
        shape = np.shape(value)
        by_shape[shape] = by_shape[shape] + value if shape in by_shape else value
    return sum(by_shape[shape] for shape in sorted(by_shape, key=math.prod))


def _by_part(lasting: dict[str, Array], terms: Terms) -> dict[str, Array]:
    """Bytes of each part, in the order of `PARTS`."""
    names = (name for name in MemoryBreakdown.PARTS if name not in ("context", "allocator_slack"))
    return {name: lasting[name] if name in lasting else sum(terms.get(name, {}).values(), np.zeros(1)) for name in names}


def _sum(parts: dict[str, Array]) -> Array:
    """One after the other, as `total_bytes` adds them."""
    return sum(parts.values())


def memory_terms(graph: StepGraph, stack: StackSpec) -> tuple[dict[str, Array], dict[str, Terms]]:
    """(bytes that are always there, by part; what is there besides, by instant)."""
    held = StageMemory(graph, stack)
    found: dict[str, Terms] = {name: instant.masked() for name, instant in held.instants().items()}
    for terms in found.values():
        for part, more in held.throughout.items():
            terms[part] = terms.get(part, {}) | more
    found["update"] = {"gradients": {"of the stage": held.gradients}}
    for terms in found.values():
        terms["temporaries"] = terms.get("temporaries", {}) | {WORKSPACES: np.full(1, stack.workspace)}
    return _lasting(held, graph, stack), found


def _lasting(held: StageMemory, graph: StepGraph, stack: StackSpec) -> dict[str, Array]:
    """Bytes that are always there, by part."""
    num_ranks = np.asarray(graph.layout.num_devices)
    buffers = held.messages.buffers + np.where(num_ranks > 1, stack.collective_buffers, 0.0)[..., None]
    return {"weights": held.weights, "optimizer": held.optimizer, "communication_buffers": buffers}
