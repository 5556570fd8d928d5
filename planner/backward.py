"""The backward pass of one block, op by op: what is alive beside what the other blocks keep.

In: a block's `OpCost`s in order of execution. Out: a `Walk`, the worst moment of going through them backwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.graph import Part, StepGraph
from planner.op_cost import OpCost
from planner.stack import StackSpec
from planner.states import wraps_weights

__all__ = ["Walk", "cast_bytes", "kept_by", "kept_bytes", "part_casts", "walk"]

Array = Any


@dataclass(frozen=True)
class Walk:
    """What one block holds at the worst moment of its backward pass; numbers or arrays [n]."""

    saved: Array
    """Bytes of activations that its backward pass still needs, made again or kept."""
    casts: Array
    """Bytes of its weights in compute format."""
    gradients: Array
    """Parameters of the block that have their gradients by then."""
    temporaries: Array
    """Bytes of gradients of activations, of this op's weight, and of its workspace."""
    total: Array
    """All of them in bytes."""


def cast_bytes(cost: OpCost, graph: StepGraph, stack: StackSpec) -> Array:
    """Bytes of a matmul's weight in compute format, made anew in each microbatch by in-place stacks; FSDP gathers it so instead."""
    precision = graph.precision
    if stack.weight_storage != "fp32_in_place" or not precision.needs_master_weights or cost.gemm is None:
        return 0.0
    tied = 0.0 if graph.numerics.lora_rank else cost.tied_params  # frozen weights are kept in that format
    weight = cost.matrix_params + cost.embedding_params + tied
    return weight * precision.compute_bytes * ~wraps_weights(graph, is_expert=cost.op.is_expert)


def part_casts(part: Part, graph: StepGraph, stack: StackSpec) -> Array:
    """`cast_bytes` of all of a part's ops."""
    return sum(cast_bytes(cost, graph, stack) for cost in part.costs)


def kept_by(cost: OpCost, part: Part, graph: StepGraph, stack: StackSpec) -> dict[str, Array]:
    """Activations that one op of a part keeps for its backward pass, by what made them, where its block is not recomputed whole."""
    is_selective = graph.workload.recompute == "selective" and part.is_block
    dropped = {"logits", *(stack.selective_recompute if is_selective else [])}
    own = {"output": cost.output_bytes} if is_selective and stack.selective_keeps_outputs else {}
    return own | {producer: num_bytes for producer, num_bytes in cost.saved.items() if producer not in dropped}


def kept_bytes(part: Part, graph: StepGraph, stack: StackSpec) -> tuple[Array, Array]:
    """(activations, logits) that one run of the part keeps for its backward pass, under the recompute policy."""
    logits = sum(cost.saved.get("logits", 0.0) for cost in part.costs)
    if part.is_block and graph.workload.recompute == "full":
        return graph.stream_bytes, logits
    return sum(num_bytes for cost in part.costs for num_bytes in kept_by(cost, part, graph, stack).values()), logits


def walk(part: Part, graph: StepGraph, stack: StackSpec, gradient_bytes: Array) -> Walk:
    """The worst moment of a block's backward pass.

    Formula: at each op, from the last to the first: what the ops up to it saved, + the residual stream's gradient, + gradients of
    activations that wait, + the gradient that the op makes of its input (and the one to which it will be added), + its workspace, + the
    gradients of weights, first in compute format. Recomputation has made everything again before the first of them runs.

    Args:
        gradient_bytes: of one parameter's gradient from the op that made it to the end of the block.
    """
    b = graph.numerics.compute_bytes
    stream = graph.stream_bytes
    is_wrapped = wraps_weights(graph)
    saved: Array = part.total("saved_bytes")
    casts: Array = part_casts(part, graph, stack)
    waiting: Array = 0.0
    shared: Array = 0.0
    made: Array = 0.0
    worst = Walk(saved, casts, 0.0, stream, saved + casts + stream)
    for index in reversed(range(len(part.costs))):
        cost = part.costs[index]
        params = cost.matrix_params + cost.vector_params
        # fp32 sums of gradients: a weight's gradient in compute format becomes one in fp32 before it is added
        cast = np.where(is_wrapped | (b >= 4), b, b + 4.0) if stack.weight_storage == "fp32_in_place" else b
        taken = np.maximum(waiting - cost.grad_output_bytes, 0.0)
        at_op = waiting + shared + cost.grad_input_bytes + cost.workspace_bytes + params * b
        after = taken + shared + cost.grad_input_bytes + params * cast
        temporaries = stream + np.maximum(at_op, after)
        if getattr(cost.op, "is_residual", False):
            temporaries = 2 * stream + waiting
            taken = 0.0 * waiting
        total = saved + casts + made * gradient_bytes + temporaries
        is_worse = total > worst.total
        now = Walk(saved, casts, made, temporaries, total)
        worst = Walk(*(np.where(is_worse, getattr(now, name), getattr(worst, name)) for name in Walk.__dataclass_fields__))
        if getattr(cost.op, "shares_input", False):
            waiting, shared = taken, np.maximum(shared, cost.grad_input_bytes)
        elif _is_shared(part, index):
            waiting, shared = taken + cost.grad_input_bytes, 0.0 * shared
        else:
            waiting = taken + cost.grad_input_bytes
        saved, casts, made = saved - cost.saved_bytes, casts - cast_bytes(cost, graph, stack), made + params
    return worst


def _is_shared(part: Part, index: int) -> bool:
    """Whether the ops after it work on the same input."""
    return index + 1 < len(part.costs) and getattr(part.costs[index + 1].op, "shares_input", False)
