"""What lasts from step to step on one device: weights, gradients, optimizer states, as a stack, a precision and ZeRO store them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.arrays import pick
from planner.framework_buffers import frozen_matrix_bytes, step_gradient_bytes
from planner.graph import Part, StepGraph
from planner.optimizers import get_optimizer
from planner.stack import StackSpec

__all__ = ["StateFormat", "part_gradients", "part_states", "state_format", "trained_params", "wraps_weights", "zero_degrees"]

Array = Any


def trained_params(part: Part, is_expert: bool, is_split_from_embedding: bool) -> tuple[Array, Array]:
    """(matrix, other) parameters that receive gradients on this device, before ZeRO; a parted tied head has its copy."""
    matrix = part.param_total("matrix_params", is_expert=is_expert)
    other = part.param_total("embedding_params", is_expert=is_expert) + part.param_total("vector_params", is_expert=is_expert)
    if is_split_from_embedding:
        other = other + part.param_total("tied_params", is_expert=is_expert)
    return matrix, other


@dataclass(frozen=True)
class StateFormat:
    """Bytes per trained parameter of what lasts from step to step, before ZeRO divides it; numbers or arrays [n]."""

    stored: float
    """The weight itself."""
    matrix: float
    """The same of a matrix; 0 where its low-precision copy is all there is."""
    frozen_matrix: float
    """A matrix of a block that is not trained."""
    quantized_copy: Array
    """Low-precision copies of a matrix."""
    gradient: float
    master: float
    """A separate fp32 weight, with the optimizer; and the gradient in the format of its step."""
    state_scale: float
    """Size of an optimizer state over that in fp32."""


def state_format(graph: StepGraph, stack: StackSpec) -> StateFormat:
    """Formats of weights, gradients and master copies under a stack and a precision."""
    precision, zero = graph.precision, np.asarray(graph.layout.zero_stage)
    is_mixed, compute = precision.needs_master_weights, precision.compute_bytes
    in_place, is_pure = stack.weight_storage == "fp32_in_place", stack.weight_storage == "compute_only"
    is_narrow = stack.keeps_quantized_weights and precision.is_quantized
    accumulated = compute if is_pure else stack.accumulated_gradient_bytes(precision.name)
    stored = 4.0 if in_place or not is_mixed else compute
    return StateFormat(
        stored=stored,
        matrix=0.0 if is_narrow else stored,
        frozen_matrix=frozen_matrix_bytes(graph, stack),
        quantized_copy=precision.quantized_weight_bytes * pick(zero >= 3, 0.0, 1.0),
        gradient=4.0 if not is_mixed or in_place else accumulated,
        master=4.0 + step_gradient_bytes(graph, stack) if is_mixed and not in_place and not is_pure else 0.0,
        state_scale=compute / 4 if is_pure else 1.0,
    )


def zero_degrees(graph: StepGraph, stack: StackSpec, is_expert: bool) -> tuple[Array, Array, Array]:
    """Ranks over which ZeRO divides (weights, gradients, optimizer states).

    An in-place stack has one fp32 weight, which is sharded with its optimizer states: ZeRO-1 and 2 gather it in compute format for the
    length of a step (arXiv:2304.11277 section 3.3, SHARD_GRAD_OP).
    """
    zero, degree = np.asarray(graph.layout.zero_stage), graph.expert_fsdp_degree if is_expert else graph.fsdp_degree
    first = 1 if stack.weight_storage == "fp32_in_place" else 3
    by_weights, by_gradients, by_states = (pick(zero >= stage, degree, 1) for stage in (first, min(first, 2), 1))
    return by_weights, by_gradients, by_states


def part_states(graph: StepGraph, stack: StackSpec, part: Part, is_expert: bool) -> tuple[Array, Array, Array]:
    """(weights, gradients, optimizer states) of one run of a part's expert ops, or of its others, on one device."""
    precision, kept, optimizer = graph.precision, state_format(graph, stack), get_optimizer(graph.workload.optimizer)
    by_weights, by_gradients, by_states = zero_degrees(graph, stack, is_expert)
    matrix, other = trained_params(part, is_expert, graph.layout.pp > 1)
    frozen, frozen_matrix = (part.param_total(name, is_expert=is_expert) for name in ("frozen_params", "frozen_matrix_params"))
    factored = part.param_total("factored_elements", is_expert=is_expert)
    trained = matrix + other
    held = matrix * kept.matrix + other * kept.stored + frozen_matrix * kept.frozen_matrix + (frozen - frozen_matrix) * precision.compute_bytes
    weight_bytes = held / by_weights + matrix * kept.quantized_copy
    states = other * optimizer.other_state_bytes + (4.0 * factored if optimizer.is_factored else matrix * optimizer.matrix_state_bytes)
    state_bytes = trained * kept.master + states * kept.state_scale
    return weight_bytes, trained * kept.gradient / by_gradients, state_bytes / by_states


def part_gradients(graph: StepGraph, stack: StackSpec, part: Part) -> Array:
    """Gradients of one run of a part, its experts' included, on one device."""
    return sum(part_states(graph, stack, part, is_expert)[1] for is_expert in (False, True))


def wraps_weights(graph: StepGraph, *, is_expert: bool = False) -> Array:
    """Whether FSDP holds the weights: wherever several ranks share data, but for plain data parallelism of whole models (DDP)."""
    layout = graph.layout
    zero, degree = np.asarray(layout.zero_stage), np.asarray(graph.expert_fsdp_degree if is_expert else graph.fsdp_degree)
    is_plain = np.asarray(layout.tp * layout.cp * layout.pp * layout.ep * layout.dp_shard) == 1
    return pick(zero > 0, degree > 1, (np.asarray(layout.dp * layout.cp) > 1) & ~is_plain)
