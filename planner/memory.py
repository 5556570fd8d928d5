"""StepGraph -> bytes per device on every pipeline stage, by what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.framework_buffers import frozen_matrix_bytes, pipeline_output_bytes, placeholder_bytes, reduction_bucket_bytes, step_gradient_bytes
from planner.graph import Part, StepGraph, over_stages, part_runs
from planner.hardware import Cluster
from planner.op_cost import OpCost
from planner.optimizers import get_optimizer
from planner.schedules import SCHEDULES
from planner.stack import StackSpec

__all__ = [
    "INSTANTS", "GatheredRates", "MemoryBreakdown", "StateFormat", "cast_bytes", "estimate_memory", "gathered_params", "gathered_rates", "kept_bytes",
    "makes_gradients_late", "part_states", "state_format", "trained_params", "transient_bytes", "workspace_bytes", "wraps_weights", "zero_degrees",
]  # fmt: skip

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


INSTANTS = ("loss", "blocks", "reduce", "update")
"""When a stage may hold most: at the loss and its gradient; in the backward pass of the first block that comes to it; when FSDP sends off
the largest block's gradients; and after the last block, where gradients that were not there before have taken the place of activations."""


def estimate_memory(graph: StepGraph, stack: StackSpec, cluster: Cluster) -> MemoryBreakdown:
    """Peak memory of every stage.

    Formula: the largest of what is alive at each of `INSTANTS`, + runtime + allocator slack. Always: states (weights, gradients,
    optimizer, each divided by its ZeRO group). Until the backward pass frees it: what the forward pass keeps, times microbatches in
    flight. At the loss: what the head works with; in the blocks: what one block works with, gathers and recomputes.
    Left out: fragmentation beyond the slack fraction, load imbalance of experts, pinned host memory.
    Source: arXiv:1910.02054 (ZeRO), 2205.05198 (activations), 2104.04473 (in flight).
    """
    layout, schedule = graph.layout, SCHEDULES[graph.layout.schedule]
    weights, gradients, optimizer = (schedule.resident(state) for state in _states(graph, stack))
    gradients = gradients + placeholder_bytes(graph, stack) + reduction_bucket_bytes(graph, stack)
    in_flight = schedule.in_flight(layout.pp, layout.num_virtual_stages, graph.num_microbatches)
    activations, logits, casts, head_casts = (schedule.resident(kept) / schedule.parameter_copies for kept in _kept(graph, stack))
    activations = activations + pipeline_output_bytes(graph, stack)
    heads = schedule.head_in_flight(layout.pp, layout.num_virtual_stages, graph.num_microbatches)
    others = np.maximum(heads - 1, 0)
    is_single = makes_gradients_late(graph, stack)
    head = _stage_axis(sum(part_states(graph, stack, graph.parts[-1], is_expert)[1] for is_expert in (False, True))) * _has_head(graph)
    at_loss, in_blocks, at_reduce = _gathered(graph, stack)
    in_backward = {
        "gradients": np.where(is_single, head, gradients), "activations": activations * in_flight, "logits": logits * others,
        "cast_weights": casts * in_flight + head_casts * others,
    }  # fmt: skip
    instants = [
        {
            "gradients": gradients * ~is_single, "activations": activations * in_flight, "logits": logits * heads,
            "cast_weights": casts * in_flight + head_casts * heads, "gathered_weights": at_loss,
            "temporaries": _temporaries(graph, is_head=True) + stack.workspace_bytes,
        },
        {
            **in_backward, "recompute_workspace": _recompute_workspace(graph, stack),
            "gathered_weights": in_blocks, "temporaries": _temporaries(graph, is_head=False) + stack.workspace_bytes,
        },
        {**in_backward, "gathered_weights": at_reduce},
        {"gradients": gradients},
    ]  # fmt: skip
    totals = [sum(parts.values()) for parts in instants]
    shape = np.broadcast_shapes(np.shape(weights), *(np.shape(total) for total in totals))
    totals = [np.broadcast_to(total, shape) for total in totals]
    totals[0] = np.where(_has_head(graph), totals[0], 0.0)
    instant = np.argmax(np.stack(totals), axis=0)
    names = ("gradients", "activations", "logits", "cast_weights", "recompute_workspace", "gathered_weights", "temporaries")
    found = {name: np.choose(instant, [np.broadcast_to(parts.get(name, 0.0), shape) for parts in instants]) for name in names}
    buffers = _buffers(graph, stack)
    lasting = {"weights": weights, "optimizer": optimizer, "communication_buffers": buffers}
    parts = {**found, **{name: np.broadcast_to(value, shape) for name, value in lasting.items()}}
    slack = sum(parts.values()) * stack.allocator_slack_fraction
    return MemoryBreakdown(**parts, context=np.full(shape, stack.context), allocator_slack=slack, instant=instant)


def _buffers(graph: StepGraph, stack: StackSpec) -> Array:
    """The library's own; and where the stack's pipelines keep what they sent until the step ends, that of every microbatch."""
    layout = graph.layout
    num_ranks = np.asarray(layout.dp * layout.tp * layout.cp * layout.pp)
    sent = graph.num_microbatches * graph.shard.local_tokens * graph.model.hidden_size * graph.numerics.compute_bytes
    is_kept = stack.pipeline_keeps_outputs and layout.pp > 1
    return _stage_axis(np.where(num_ranks > 1, stack.collective_buffers, 0.0) + (sent if is_kept else 0.0))


def _has_head(graph: StepGraph) -> Array:
    """Which stages hold the head, [pp]."""
    return graph.parts[-1].counts > 0


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
    accumulated = compute if is_pure else stack.gradient_bytes_by_precision.get(precision.name, stack.gradient_bytes)
    stored = 4.0 if in_place or not is_mixed else compute
    return StateFormat(
        stored=stored,
        matrix=0.0 if is_narrow else stored,
        frozen_matrix=frozen_matrix_bytes(graph, stack),
        quantized_copy=precision.quantized_weight_bytes * np.where(zero >= 3, 0.0, 1.0),
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
    by_weights, by_gradients, by_states = (np.where(zero >= stage, degree, 1) for stage in (first, 2, 1))
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
    weight_bytes = held / by_weights
    weight_bytes = weight_bytes + matrix * kept.quantized_copy
    states = other * optimizer.other_state_bytes + (4.0 * factored if optimizer.is_factored else matrix * optimizer.matrix_state_bytes)
    state_bytes = trained * kept.master + states * kept.state_scale
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


def cast_bytes(cost: OpCost, graph: StepGraph, stack: StackSpec) -> Array:
    """Bytes of a matmul's weight in compute format, made anew in each microbatch by in-place stacks; FSDP gathers it so instead."""
    precision = graph.precision
    if stack.weight_storage != "fp32_in_place" or not precision.needs_master_weights or cost.gemm is None:
        return 0.0
    weight = cost.matrix_params + cost.embedding_params + cost.tied_params
    return weight * precision.compute_bytes * ~wraps_weights(graph, is_expert=cost.op.is_expert)


def wraps_weights(graph: StepGraph, *, is_expert: bool = False) -> Array:
    """Whether FSDP holds the weights: wherever several ranks share data, but for plain data parallelism of whole models (DDP)."""
    layout = graph.layout
    zero, degree = np.asarray(layout.zero_stage), np.asarray(graph.expert_fsdp_degree if is_expert else graph.fsdp_degree)
    is_plain = np.asarray(layout.tp * layout.cp * layout.pp * layout.ep * layout.dp_shard) == 1
    return np.where(zero > 0, degree > 1, (np.asarray(layout.dp * layout.cp) > 1) & ~is_plain)


def makes_gradients_late(graph: StepGraph, stack: StackSpec) -> Array:
    """Whether the backward pass finds no gradients, [..., 1]: a stack that frees them after each step, with one microbatch a step.

    Plain data parallelism keeps its buckets, and pipelines have more microbatches.
    """
    layout = graph.layout
    if not stack.frees_gradients or layout.pp > 1:
        return np.zeros((1,), bool)
    has_buckets = (np.asarray(layout.dp) > 1) & (np.asarray(layout.zero_stage) == 0)
    return np.asarray((np.asarray(graph.num_microbatches) == 1) & ~has_buckets)[..., None]


def _kept(graph: StepGraph, stack: StackSpec) -> tuple[Array, Array, Array, Array]:
    """Per microbatch and stage: activations, logits, casts of blocks' weights, casts of the head's."""
    kept = [kept_bytes(part, graph, stack) for part in graph.parts]
    casts = [sum(cast_bytes(cost, graph, stack) for cost in part.costs) for part in graph.parts]
    is_kept = graph.workload.recompute == "none"
    of_blocks = [value if part.is_block and is_kept else 0.0 for part, value in zip(graph.parts, casts, strict=True)]
    of_head = [value if not part.is_block else 0.0 for part, value in zip(graph.parts, casts, strict=True)]
    runs = part_runs(graph)
    activations, logits = ([values[i] for values in kept] for i in (0, 1))
    return over_stages(activations, runs), over_stages(logits, runs), over_stages(of_blocks, runs), over_stages(of_head, runs)


def workspace_bytes(part: Part, graph: StepGraph, stack: StackSpec) -> Array:
    """What a block holds while it is recomputed, beyond what it kept: everything that full recompute dropped, and its weights' casts."""
    if not part.is_block or graph.workload.recompute == "none":
        return 0.0
    casts = sum(cast_bytes(cost, graph, stack) for cost in part.costs)
    return casts + (part.total("saved_bytes") if graph.workload.recompute == "full" else 0.0)


def _recompute_workspace(graph: StepGraph, stack: StackSpec) -> Array:
    """Of the largest block."""
    return _largest(graph, lambda part: workspace_bytes(part, graph, stack))


def _largest(graph: StepGraph, quantity: Any, *, is_head: bool = False) -> Array:
    """Largest value of `quantity(part)` over the parts present on each stage, [..., pp]; of the head alone, or without it."""
    parts = graph.parts[-1:] if is_head else graph.parts[:-1]
    present = np.stack([part.counts for part in parts]) > 0
    kinds, stages = np.unique(present, axis=1, return_inverse=True)
    values = np.stack(np.broadcast_arrays(*(np.asarray(quantity(part), float) for part in parts)), axis=-1)
    largest = np.stack([np.max(values * kinds[:, i], axis=-1) for i in range(kinds.shape[1])], axis=-1)
    return largest[..., stages.ravel()]


@dataclass(frozen=True)
class GatheredRates:
    """Bytes per parameter that FSDP holds beyond its shards; numbers or arrays [n]."""

    kept: Array
    """Without ZeRO-3, in-place stacks: all weights of the stage in compute format, through the step."""
    block: Array
    """ZeRO-3 in the backward pass: two parts in compute format (one in use, one that arrives) and the last part's gradients, that leave."""
    reduce: Array
    """ZeRO-3 between two blocks: the same, and this part's gradients in compute format, from which those that leave were copied."""
    head: Array
    """ZeRO-3 at the loss: the head, gathered and as it arrived."""
    leaving: Array
    """ZeRO-2 and 3 at the loss: gradients of the part that went last in the microbatch before, on their way."""


def gathered_rates(graph: StepGraph, stack: StackSpec) -> GatheredRates:
    """See `GatheredRates`. Source: arXiv:2304.11277 section 3.3; FSDP2 under `reftrain dry-run`."""
    precision, zero = graph.precision, np.asarray(graph.layout.zero_stage)
    in_place, is_sharded = stack.weight_storage == "fp32_in_place", np.asarray(graph.fsdp_degree) > 1
    compute = precision.compute_bytes
    block = 2 * (compute + precision.quantized_weight_bytes) + stack.reduce_bytes
    if stack.is_one_fsdp_unit:
        whole = np.where(is_sharded & (zero == 3), compute * (1 if graph.numerics.lora_rank else 2), 0.0)
        return GatheredRates(kept=whole, block=0.0, reduce=0.0, head=0.0, leaving=0.0)
    is_leaving = is_sharded & (zero >= 2) & (np.asarray(graph.num_microbatches) > 1) & in_place
    return GatheredRates(
        kept=np.where(wraps_weights(graph) & (zero < 3) & in_place & (is_sharded | precision.needs_master_weights), compute, 0.0),
        block=np.where(is_sharded & (zero == 3), block, 0.0),
        reduce=np.where(is_sharded & (zero == 3), block + compute, 0.0),
        head=np.where(is_sharded & (zero == 3), 2.0 * compute, 0.0),
        leaving=np.where(is_leaving, stack.reduce_bytes, 0.0),
    )


def gathered_params(part: Part, graph: StepGraph) -> Array:
    """Parameters of one part in full; a parted tied head has its copy."""
    return part.total("params") + (part.total("tied_params") if graph.layout.pp > 1 else 0.0)


def _gathered(graph: StepGraph, stack: StackSpec) -> tuple[Array, Array, Array]:
    """FSDP's bytes (at the loss, in the blocks, between them), [..., pp]."""
    rates = gathered_rates(graph, stack)
    kept = over_stages([gathered_params(part, graph) * rates.kept for part in graph.parts], part_runs(graph))
    first, head = (
        _stage_axis(gathered_params(part, graph) * rate) * (part.counts > 0)
        for part, rate in ((graph.parts[0], rates.leaving), (graph.parts[-1], rates.head))
    )
    largest = _largest(graph, lambda part: gathered_params(part, graph))
    return kept + first + head, kept + largest * _stage_axis(rates.block), kept + largest * _stage_axis(rates.reduce)


def transient_bytes(cost: OpCost, graph: StepGraph) -> Array:
    """One op's workspace plus the gradients of its input and output; those of the head are counted with the loss."""
    if cost.gemm is None or cost.op.name == "head":
        return cost.workspace_bytes
    m, n, k = cost.gemm
    return cost.workspace_bytes + m * cost.num_gemms * (n + k) * graph.numerics.compute_bytes


def _temporaries(graph: StepGraph, *, is_head: bool) -> Array:
    """What the op that needs most holds while it runs."""

    def worst(part: Part) -> Array:
        found: Array = 0.0
        for cost in part.costs:
            found = np.maximum(found, transient_bytes(cost, graph))
        return found

    return _largest(graph, worst, is_head=is_head)
