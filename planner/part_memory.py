"""What one run of a part holds, whatever the pipeline: computed once for all schedules of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.backward import Walk, kept_bytes, part_casts, walk
from planner.graph import Part, StepGraph
from planner.sharding import Sharding, expert_params, gathered_params
from planner.stack import StackSpec
from planner.states import part_states

__all__ = ["PartMemory", "parts_memory"]

Array = Any


@dataclass(frozen=True)
class PartMemory:
    """One run of the embedding, of a kind of block, or of the head; numbers or arrays of layouts."""

    states: tuple[tuple[Array, Array, Array], ...]
    """(weights, gradients, optimizer states) of what all ranks have, and of the experts."""
    kept: Array
    """Activations from forward to backward."""
    logits: Array
    casts: Array
    """Weights in compute format that the backward pass needs again."""
    gathered_params: Array
    expert_params: Array
    """Of them, those of a unit of its own."""
    output_gradients: Array
    """Bytes of the gradients from which the part's weights get theirs; the head's are made with the loss."""
    worst: Walk
    """The worst moment of its backward pass."""
    masks: dict[int, Array]
    """Window of attention -> bytes of a mask."""
    table: Array
    """Parameters of its largest table."""
    tied: Array
    hidden: Array
    """Gradient of the head's input, where its loss works in chunks."""
    workspace: Array

    @property
    def gradients(self) -> Array:
        """All of its gradients on one device."""
        return sum(state[1] for state in self.states)


def parts_memory(graph: StepGraph, stack: StackSpec) -> list[PartMemory]:
    """All parts of a model."""
    sharding = Sharding.of(graph, stack)
    rate = (sharding.unreduced + sharding.made_late)[..., 0]
    is_chunked = graph.numerics.loss_kernel == "chunked"  # other losses keep the hidden states
    found = []
    for part in graph.parts:
        kept, logits = kept_bytes(part, graph, stack)
        found.append(
            PartMemory(
                states=tuple(part_states(graph, stack, part, is_expert) for is_expert in (False, True)),
                kept=kept,
                logits=logits,
                casts=part_casts(part, graph, stack),
                gathered_params=gathered_params(part, graph),
                expert_params=expert_params(part, graph),
                output_gradients=_output_gradients(part, graph.numerics.compute_bytes),
                worst=walk(part, graph, stack, rate) if part.is_block else Walk(0.0, 0.0, 0.0, 0.0, 0.0),
                masks=_masks(part),
                table=_most(part, "embedding_params"),
                tied=part.total("tied_params"),
                hidden=sum(cost.grad_input_bytes for cost in part.costs if cost.op.name == "head") * is_chunked,
                workspace=_most(part, "workspace_bytes"),
            )
        )
    return found


def _masks(part: Part) -> dict[int, Array]:
    found: dict[int, Array] = {}
    for cost in part.costs:
        if part.is_block and cost.op.kind == "attention":
            window = getattr(cost.op, "window", 0)
            found[window] = np.maximum(found.get(window, 0.0), cost.mask_bytes)
    return found


def _most(part: Part, quantity: str) -> Array:
    """Of one op."""
    return np.max(np.stack(np.broadcast_arrays(*(np.asarray(getattr(cost, quantity), float) for cost in part.costs))), axis=0)


def _output_gradients(part: Part, compute_bytes: float) -> Array:
    """Bytes of the gradients from which the part's weights get theirs; the head's are made with the loss."""
    total: Array = 0.0
    for cost in part.costs:
        if cost.gemm is not None and cost.op.name != "head":
            total = total + cost.gemm[0] * cost.num_gemms * cost.gemm[1] * compute_bytes
        elif cost.gemm is None and np.any(np.asarray(cost.vector_params)):
            total = total + cost.grad_output_bytes
    return total
