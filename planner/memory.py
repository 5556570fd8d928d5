"""StepGraph -> bytes per device on every pipeline stage, by what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.graph import Part, StepGraph, over_stages, part_runs
from planner.hardware import Cluster
from planner.op_cost import OpCost
from planner.optimizers import get_optimizer
from planner.schedules import SCHEDULES
from planner.stack import StackSpec

__all__ = [
    "MemoryBreakdown", "StateFormat", "estimate_memory", "gathered_bytes_per_param", "gathered_params", "kept_bytes", "part_states",
    "replaced_gradients", "state_format", "trained_params", "transient_bytes", "zero_degrees",
]  # fmt: skip

Array = Any


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes per device and stage; every field has shape [..., pp] and they add up to `total_bytes`."""

    weights: Array
    """Parameters as stored between steps, with low-precision copies."""
    gradients: Array
    """Where they are made anew each step, those that live beside the activations which they replace."""
    optimizer: Array
    """Optimizer states and a separate fp32 master copy."""
    activations: Array
    """Kept from forward to backward, all microbatches in flight, without the logits."""
    logits: Array
    recompute_workspace: Array
    """Activations of the one block that is being recomputed."""
    gathered_weights: Array
    """Full weights and gradients of the blocks that FSDP has in hand."""
    temporaries: Array
    """Activation gradients and workspaces of the op that needs most."""
    communication_buffers: Array
    context: Array
    allocator_slack: Array

    PARTS = (
        "weights", "gradients", "optimizer", "activations", "logits", "recompute_workspace", "gathered_weights", "temporaries",
        "communication_buffers", "context", "allocator_slack",
    )  # fmt: skip

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


def estimate_memory(graph: StepGraph, stack: StackSpec, cluster: Cluster) -> MemoryBreakdown:
    """Peak memory of every stage.

    Formula: states (weights, gradients, optimizer, each divided by its ZeRO group) + what the forward pass keeps, times
    microbatches in flight + the largest transient of the backward pass + runtime + allocator slack.
    Left out: fragmentation beyond the slack fraction, load imbalance of experts, pinned host memory.
    Source: arXiv:1910.02054 (ZeRO), 2205.05198 (activations), 2104.04473 (in flight).
    """
    layout, schedule = graph.layout, SCHEDULES[graph.layout.schedule]
    states = [schedule.resident(state) for state in _states(graph, stack)]
    in_flight = schedule.in_flight(layout.pp, layout.num_virtual_stages, graph.num_microbatches)
    blocks, logits = (schedule.resident(kept) / schedule.parameter_copies for kept in _kept(graph, stack))
    shape = np.broadcast_shapes(np.shape(states[0]), np.shape(blocks), np.shape(in_flight))
    num_ranks = np.asarray(layout.dp * layout.tp * layout.cp * layout.pp)
    buffers = _stage_axis(np.where(num_ranks > 1, stack.collective_buffers, 0.0))
    parts = {
        "weights": states[0],
        "gradients": states[1] - replaced_gradients(graph, stack, states[1], (blocks + logits) * in_flight),
        "optimizer": states[2],
        "activations": blocks * in_flight,
        "logits": logits * in_flight,
        "recompute_workspace": _recompute_workspace(graph),
        "gathered_weights": _gathered(graph, stack),
        "temporaries": _temporaries(graph),
        "communication_buffers": buffers,
    }  # fmt: skip
    parts = {name: np.broadcast_to(value, shape) for name, value in parts.items()}
    allocated = sum(parts.values())
    slack = allocated * stack.allocator_slack_fraction
    return MemoryBreakdown(**parts, context=np.full(shape, stack.context), allocator_slack=slack)


def _stage_axis(value: Array) -> Array:
    """Adds the stage axis to a number or an array [n]."""
    return np.asarray(value, float)[..., None]


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
    cast_copy: Array
    """A copy of it in compute format that is not sharded."""
    quantized_copy: Array
    """Low-precision copies of a matrix."""
    gradient: float
    master: float
    """A separate fp32 weight, with the optimizer."""


def state_format(graph: StepGraph, stack: StackSpec) -> StateFormat:
    """Formats of weights, gradients and master copies under a stack and a precision."""
    precision, zero = graph.precision, np.asarray(graph.layout.zero_stage)
    is_mixed = precision.needs_master_weights
    in_place = stack.weight_storage == "fp32_in_place"
    return StateFormat(
        stored=4.0 if in_place or not is_mixed else precision.compute_bytes,
        # Without ZeRO-3 an in-place stack keeps a cast copy of all weights through the step.
        cast_copy=np.where(zero < 3, precision.compute_bytes, 0.0) if in_place and is_mixed else 0.0,
        quantized_copy=precision.quantized_weight_bytes * np.where(zero >= 3, 0.0, 1.0),
        gradient=4.0 if not is_mixed or in_place else stack.gradient_bytes,
        master=4.0 if is_mixed and not in_place else 0.0,
    )


def zero_degrees(graph: StepGraph, is_expert: bool) -> tuple[Array, Array, Array]:
    """Ranks over which ZeRO divides (weights, gradients, optimizer states)."""
    zero, degree = np.asarray(graph.layout.zero_stage), graph.expert_fsdp_degree if is_expert else graph.fsdp_degree
    by_weights, by_gradients, by_states = (np.where(zero >= stage, degree, 1) for stage in (3, 2, 1))
    return by_weights, by_gradients, by_states


def part_states(graph: StepGraph, stack: StackSpec, part: Part, is_expert: bool) -> tuple[Array, Array, Array]:
    """(weights, gradients, optimizer states) of one run of a part's expert ops, or of its others, on one device."""
    precision, kept, optimizer = graph.precision, state_format(graph, stack), get_optimizer(graph.workload.optimizer)
    by_weights, by_gradients, by_states = zero_degrees(graph, is_expert)
    matrix, other = trained_params(part, is_expert, graph.layout.pp > 1)
    frozen = part.param_total("frozen_params", is_expert=is_expert)
    factored = part.param_total("factored_elements", is_expert=is_expert)
    trained = matrix + other
    weight_bytes = (trained * kept.stored + frozen * precision.compute_bytes) / by_weights + trained * kept.cast_copy
    weight_bytes = weight_bytes + matrix * kept.quantized_copy
    state_bytes = trained * kept.master + other * optimizer.other_state_bytes
    state_bytes = state_bytes + (4.0 * factored if optimizer.is_factored else matrix * optimizer.matrix_state_bytes)
    return weight_bytes, trained * kept.gradient / by_gradients, state_bytes / by_states


def _states(graph: StepGraph, stack: StackSpec) -> list[Array]:
    """Weights, gradients and optimizer states per stage, [..., pp]."""
    per_run = [part_states(graph, stack, part, is_expert) for part in graph.parts for is_expert in (False, True)]
    runs = np.repeat(part_runs(graph), 2, axis=0)
    return [over_stages(state, runs) for state in zip(*per_run, strict=True)]


def kept_bytes(part: Part, graph: StepGraph, stack: StackSpec) -> tuple[Array, Array]:
    """(activations, logits) that one run of the part keeps for its backward pass, under the recompute policy."""
    logits: Array = 0.0
    total: Array = 0.0
    dropped = stack.selective_recompute if graph.workload.recompute == "selective" else []
    for cost in part.costs:
        for producer, num_bytes in cost.saved.items():
            if producer == "logits":
                logits = logits + num_bytes
            elif producer not in dropped:
                total = total + num_bytes
    if part.is_block and graph.workload.recompute == "full":
        total = graph.shard.local_tokens * graph.model.hidden_size * graph.numerics.compute_bytes
    return total, logits


def replaced_gradients(graph: StepGraph, stack: StackSpec, gradients: Array, activations: Array) -> Array:
    """Bytes of gradients that are not there yet when the activations are all there, [..., pp].

    Formula: with one microbatch a step, a stack that frees gradients after each step makes them while the backward pass frees activations
    (and cast weights); the head's come first. The peak is max(activations + head gradients, all gradients), so min(activations,
    other gradients) of the sum of both is never alive. Plain data parallelism keeps its buckets, and pipelines have more microbatches.
    """
    if not stack.frees_gradients or graph.layout.pp > 1:
        return 0.0
    layout, kept = graph.layout, state_format(graph, stack)
    head = sum(part_states(graph, stack, graph.parts[-1], is_expert)[1] for is_expert in (False, True))
    trained = [sum(sum(trained_params(part, is_expert, False)) for is_expert in (False, True)) for part in graph.parts]
    casts = over_stages([num_params * kept.cast_copy for num_params in trained], part_runs(graph))
    alive = np.minimum(gradients - _stage_axis(head), activations + casts)
    has_buckets = (np.asarray(layout.dp) > 1) & (np.asarray(layout.zero_stage) == 0)
    return alive * _stage_axis((np.asarray(graph.num_microbatches) == 1) & ~has_buckets)


def _kept(graph: StepGraph, stack: StackSpec) -> tuple[Array, Array]:
    kept = [kept_bytes(part, graph, stack) for part in graph.parts]
    runs = part_runs(graph)
    return over_stages([activations for activations, _ in kept], runs), over_stages([logits for _, logits in kept], runs)


def _recompute_workspace(graph: StepGraph) -> Array:
    """Everything the largest block keeps, once, while it is recomputed."""
    if graph.workload.recompute != "full":
        return 0.0
    return _largest(graph, lambda part: part.total("saved_bytes") if part.is_block else 0.0)


def _largest(graph: StepGraph, quantity: Any) -> Array:
    """Largest value of `quantity(part)` over the parts present on each stage, [..., pp]."""
    present = part_runs(graph) > 0
    kinds, stages = np.unique(present, axis=1, return_inverse=True)
    values = np.stack(np.broadcast_arrays(*(np.asarray(quantity(part), float) for part in graph.parts)), axis=-1)
    largest = np.stack([np.max(values * kinds[:, i], axis=-1) for i in range(kinds.shape[1])], axis=-1)
    return largest[..., stages.ravel()]


def gathered_bytes_per_param(graph: StepGraph, stack: StackSpec) -> Array:
    """ZeRO-3 holds two gathered parts in compute format (one in use, one prefetched) and one part's full gradients."""
    precision = graph.precision
    per_param = 2 * (precision.compute_bytes + precision.quantized_weight_bytes) + precision.compute_bytes + stack.reduce_bytes
    is_sharded = (np.asarray(graph.layout.zero_stage) == 3) & (np.asarray(graph.fsdp_degree) > 1)
    return np.where(is_sharded, per_param, 0.0)


def gathered_params(part: Part, graph: StepGraph) -> Array:
    """Parameters of one part in full; a parted tied head has its copy."""
    return part.total("params") + (part.total("tied_params") if graph.layout.pp > 1 else 0.0)


def _gathered(graph: StepGraph, stack: StackSpec) -> Array:
    per_param = gathered_bytes_per_param(graph, stack)
    return _largest(graph, lambda part: gathered_params(part, graph) * per_param)


def transient_bytes(cost: OpCost, graph: StepGraph) -> Array:
    """One op's workspace plus the gradients of its input and output; those of the head are counted with the loss."""
    if cost.gemm is None or cost.op.name == "head":
        return cost.workspace_bytes
    m, n, k = cost.gemm
    return cost.workspace_bytes + m * cost.num_gemms * (n + k) * graph.numerics.compute_bytes


def _temporaries(graph: StepGraph) -> Array:
    """What the op that needs most holds while it runs."""

    def worst(part: Part) -> Array:
        found: Array = 0.0
        for cost in part.costs:
            found = np.maximum(found, transient_bytes(cost, graph))
        return found

    return _largest(graph, worst)
