"""StepGraph -> bytes per device on every pipeline stage, by what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.backward import cast_bytes, kept_bytes, walk
from planner.graph import Part, StepGraph, over_stages, part_runs
from planner.hardware import Cluster
from planner.schedules import SCHEDULES
from planner.stack import StackSpec
from planner.states import part_states, wraps_weights

__all__ = ["INSTANTS", "MemoryBreakdown", "estimate_memory", "memory_terms"]

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


WHOLE_CHUNKS = 3
"""Chunks of one stage whose weights torch.distributed.pipelining gathers at a time."""
INDEX_BYTES = 8
"""Of a token."""
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

Terms = dict[str, dict[str, Array]]
"""Part of the breakdown -> what -> bytes [..., pp]."""


def estimate_memory(graph: StepGraph, stack: StackSpec, cluster: Cluster) -> MemoryBreakdown:
    """Peak memory of every stage.

    Formula: states (weights, optimizer) and buffers, + the largest of what is alive at each of `INSTANTS`, + runtime + allocator slack.
    Left out: fragmentation beyond the slack fraction, load imbalance of experts, pinned host memory.
    Source: arXiv:1910.02054 (ZeRO), 2205.05198 (activations), 2104.04473 (in flight), 2304.11277 (FSDP).
    """
    lasting, found = memory_terms(graph, stack)
    names = MemoryBreakdown.CHANGING
    sums = [{name: sum(terms.get(name, {}).values(), np.zeros(1)) for name in names} for terms in found.values()]
    totals = [sum(parts.values()) for parts in sums]
    shape = np.broadcast_shapes(*(np.shape(total) for total in totals), *(np.shape(value) for value in lasting.values()))
    instant = np.argmax(np.stack([np.broadcast_to(total, shape) for total in totals]), axis=0)
    parts = {name: np.choose(instant, [np.broadcast_to(each[name], shape) for each in sums]) for name in names}
    parts |= {name: np.broadcast_to(value, shape) for name, value in lasting.items()}
    slack = sum(parts.values()) * stack.allocator_slack_fraction
    return MemoryBreakdown(**parts, context=np.full(shape, stack.context), allocator_slack=slack, instant=instant)


def memory_terms(graph: StepGraph, stack: StackSpec) -> tuple[dict[str, Array], dict[str, Terms]]:
    """(bytes that are always there, by part; what is there besides, by instant)."""
    held = _Held(graph, stack)
    found = {
        "loss": held.at_loss(), "head": held.at_head(), "blocks": held.in_blocks(), "second block": held.in_second_block(), "next blocks": held.in_next_blocks(),
        "reduce": held.at_reduce(), "last block": held.in_last_block(), "embedding": held.at_embedding(), "update": {"gradients": {"of the stage": held.gradients}},
    }  # fmt: skip
    for name, terms in found.items():
        if name != "update":
            for part, more in held.throughout.items():
                terms[part] = terms.get(part, {}) | more
    layout = graph.layout
    num_ranks = np.asarray(layout.dp * layout.tp * layout.cp * layout.pp)
    buffers = held.messages.buffers + _stage_axis(np.where(num_ranks > 1, stack.collective_buffers, 0.0))
    return {"weights": held.weights, "optimizer": held.optimizer, "communication_buffers": buffers}, found


class _Held:
    """What a stage holds at each instant; every number has shape [..., pp].

    Until the backward pass frees it: what the forward pass keeps, times microbatches in flight. At the loss: what the head works with;
    in the blocks: what one block works with, gathers and recomputes.
    """

    def __init__(self, graph: StepGraph, stack: StackSpec) -> None:
        layout, schedule = graph.layout, SCHEDULES[graph.layout.schedule]
        self.graph, self.stack = graph, stack
        self.keeps_head = graph.numerics.loss_kernel != "chunked"  # which needs the head's weight no more
        self.weights, self.gradients, self.optimizer = (schedule.resident(state) for state in _states(graph, stack))
        self.in_flight = schedule.in_flight(layout.pp, layout.num_virtual_stages, graph.num_microbatches)
        kept = _kept(graph, stack)
        self.activations, self.logits, self.casts, self.head_casts = (schedule.resident(each) / schedule.parameter_copies for each in kept)
        self.sharding = Sharding.of(graph, stack)
        self.ends = [_End(graph, stack, index, self.sharding) for index in (0, -1)]
        self.block = _worst_block(graph, stack, self.sharding)
        count = np.asarray(graph.num_microbatches, float)[..., None]
        has_buckets = (np.asarray(layout.dp) > 1) & (np.asarray(layout.zero_stage) == 0) & ~wraps_weights(graph)
        # share of the gradients that are there when as much is in flight as ever: none where all of the step is
        is_anew = ~has_buckets[..., None] & stack.frees_gradients
        self.there = np.where(is_anew, np.clip(count - self.in_flight, 0.0, 1.0), 1.0)
        self.is_late = self.there < 1
        self.most_with_all = np.minimum(self.in_flight, np.maximum(count - 1, 0.0))
        self.has_next = count > 1
        stage_params = over_stages([gathered_params(part, graph) for part in graph.parts], part_runs(graph))
        waits = stack.pipeline_waits and layout.pp > 1
        # Chunks of a stage take turns: three are whole at once, or the one that goes backwards; and until as many microbatches as there
        # are stages have been through, one has gradients.
        chunks = layout.num_virtual_stages if waits else 1
        self.gathered = stage_params * self.sharding.kept * min(WHOLE_CHUNKS, chunks) / chunks
        self.summed = stage_params * self.sharding.summed * np.where(count <= layout.pp, 1 / chunks, 1.0)
        self.shards = np.where(self.summed > 0, 0.0, self.gradients)
        self.messages = _Messages(graph, stack, self.in_flight)
        # what all instants have: masks, tokens and targets, outputs that wait for their gradients, the gradients that weights wait for
        waiting = schedule.waiting(layout.pp, layout.num_virtual_stages, graph.num_microbatches)
        is_tied = graph.model.tie_word_embeddings and layout.pp == 1
        self.tied = self.ends[1].tied * is_tied
        self.throughout: Terms = {
            "activations": {
                "masks of attention": _masks(graph), "tokens and targets": _stage_axis(2 * INDEX_BYTES * graph.num_microbatches * graph.shard.tokens),
                "outputs of the stage": self.messages.outputs, "inputs that lie in buffers": -self.messages.inputs,
            },
            "temporaries": {"gradients that weights wait for": waiting * over_stages([_output_gradients(part) for part in graph.parts], part_runs(graph))},
        }  # fmt: skip

    def at_loss(self) -> Terms:
        """The head's chunk of logits with their gradients, and everything that the forward pass kept."""
        head = self.ends[1]
        others = {
            "gradients": {"of earlier microbatches": self.shards * self.there},
            "activations": {"kept by the forward pass": self.activations * self.in_flight},
            "logits": {"of the loss": self.logits * self.in_flight, "of one chunk": head.workspace, "hidden states": head.hidden},
            "cast_weights": {"of matmuls": self.casts * self.in_flight + self.head_casts * (self.in_flight if self.keeps_head else 1)},
            "gathered_weights": {
                **self._whole(self.there), "of the head, and as it arrived": head.params * (self.sharding.gathered + self.sharding.arrived),
                "gradients of the microbatch before, that leave": self.ends[0].params * self.sharding.leaving * self.sharding.leaves_before * self.there,
            },
        }  # fmt: skip
        return _only(head.is_there, others)

    def at_head(self) -> Terms:
        """FSDP copies the head's gradients into the buffer that leaves."""
        head = self.ends[1]
        moving = self.sharding.gathered + self.sharding.unreduced + self.sharding.leaving
        terms = {
            **self._in_backward(self.in_flight, self.there),
            "activations": {"kept by the forward pass": self.activations * self.in_flight - head.kept},
            "gathered_weights": {**self._whole(self.there), "of the head, and its gradients that leave": head.params * moving},
        }
        return _only(head.is_there & (self.sharding.leaving > 0) & ~np.asarray(self.graph.model.tie_word_embeddings), terms)

    def _in_backward(self, in_flight: Array, there: Array) -> Terms:
        """Beside activations."""
        others = np.maximum(in_flight - 1, 0)
        head = self.ends[1]
        return {
            "gradients": {"of earlier microbatches": self.shards * there + head.gradients * (1 - there) * (self.summed == 0)},
            "logits": {"of other microbatches": self.logits * others},
            "cast_weights": {"of matmuls": self.casts * in_flight + self.head_casts * others * self.keeps_head},
        }

    def _whole(self, there: Array) -> dict[str, Array]:
        return {
            "of the stage": self.gathered, "of the tied table": self.tied * self.sharding.gathered, "sums of gradients": self.summed * there,
        }  # fmt: skip

    def _block(self, in_flight: Array, there: Array, ends_kept: Array, before: Array) -> Terms:
        """One block of one of the microbatches in flight goes backwards; `before`: parameters of the part that went before it."""
        found = self._in_backward(in_flight, there)
        again = np.maximum(self.block.saved - self.block.kept, 0.0)
        freed = np.maximum(self.block.kept - self.block.saved, 0.0)
        late = self.block.made * self.sharding.made_late * (1 - there)
        found["gradients"]["of this block"] = late
        found["activations"] = {"kept by the forward pass": self.activations * in_flight - ends_kept - freed - self.block.later}
        found["cast_weights"]["of this block"] = self.block.casts - self.block.kept_casts
        found["recompute_workspace"] = {"of this block": again}
        found["temporaries"] = {
            "of one op": self.block.temporaries - self.messages.arriving,
            "gradient of the tied table, from the head": self._tied(),
        }
        found["gathered_weights"] = {
            **self._whole(there), "of two blocks": 2 * self.block.params * self.sharding.gathered,
            "gradients that leave": before * self.sharding.leaving, "gradients of this block": self.block.made * self.sharding.unreduced,
        }  # fmt: skip
        return found

    def _tied(self) -> Array:
        """The head's share of a tied table's gradient waits for the embedding's."""
        return self.tied * self.sharding.table_gradient

    def in_blocks(self) -> Terms:
        """The head, if there is one, is done."""
        head = self.ends[1]
        is_apart = head.is_there & ~np.asarray(self.graph.model.tie_word_embeddings)
        tied = self.ends[0].params * self.sharding.leaves_before * self.there
        before = np.where(is_apart, head.params, np.where(head.is_there, tied, self.block.params))
        return self._block(self.in_flight, self.there, head.kept, before)

    def in_second_block(self) -> Terms:
        """The block before it leaves, not the head."""
        return _only(self.block.count > 1, self._block(self.in_flight, self.there, self.ends[1].kept + self.block.kept, self.block.params))

    def in_next_blocks(self) -> Terms:
        """One microbatch is done, and gradients are there."""
        return _only(self.has_next & self.is_late, self._block(self.most_with_all, np.ones_like(self.there), 0.0, self.block.params))

    def in_last_block(self) -> Terms:
        """All other blocks are done, and their gradients there."""
        found = self._block(np.ones_like(self.in_flight), 0.0 * self.there, 0.0, self.block.params)
        found["activations"] = {"kept by the first layers": self.ends[0].kept + np.minimum(self.block.kept, self.block.saved)}
        found["gradients"]["of earlier microbatches"] = np.maximum(self.gradients - self.ends[0].gradients - self.block.gradients, 0.0)
        found["cast_weights"] = {"of this block": self.block.casts}
        found["gathered_weights"]["of the stage"] = (self.ends[0].params + self.block.params) * self.sharding.kept
        return _only((self.there == 0) & (self.in_flight <= 1), found)

    def at_reduce(self) -> Terms:
        """FSDP copies a block's gradients into the buffer that leaves."""
        found = self._in_backward(self.in_flight, self.there)
        done = self.activations * self.in_flight - self.ends[1].kept - self.block.kept - self.block.later
        moving = 2 * self.sharding.gathered + self.sharding.unreduced + self.sharding.leaving
        found["activations"] = {"kept by the forward pass": done}
        found["gathered_weights"] = {**self._whole(self.there), "of two blocks, and gradients that leave": self.block.params * moving}
        found["temporaries"] = {"gradient of the residual stream": self.block.stream, "gradient of the tied table, from the head": self._tied()}
        return _only(self.sharding.leaving > 0, found)

    def at_embedding(self) -> Terms:
        """The table's gradient is made whole, and then added."""
        first, others = self.ends[0], np.maximum(self.in_flight - 1, 0)
        is_last = ~self.has_next
        terms = {
            **self._in_backward(others, self.there),
            "gradients": {"of the stage": np.where(is_last & self.is_late, self.gradients - first.gradients, self.shards)},
            "activations": {"kept by the forward pass": self.activations * others},
            "temporaries": {
                "gradient of the table": first.table * self.sharding.table_gradient, "of the tied table, from the head, and their sum": 2 * self._tied(),
                "gradient of the residual stream": self.block.stream * self.sharding.stream_casts,
            },
            "gathered_weights": {
                **self._whole(1.0 - is_last), "of the stage": np.where(is_last, first.params * self.sharding.kept, self.gathered),
                "gradients of a block, that leave": self.block.params * self.sharding.leaving,
            },
        }  # fmt: skip
        return _only(first.is_there, terms)


@dataclass(frozen=True)
class Sharding:
    """Bytes per parameter that FSDP, or the lack of it, holds beyond shards; [..., 1] each. Source: arXiv:2304.11277; FSDP2 under dry run."""

    gathered: Array
    """ZeRO-3: a part in use."""
    arrived: Array
    """The buffer in which the part that was gathered last arrived."""
    kept: Array
    """Without ZeRO-3, in-place stacks: all weights of the stage in compute format, through the step."""
    unreduced: Array
    """A gradient in compute format, before it leaves."""
    leaving: Array
    """A gradient in the buffer in which it leaves, until the next part's does."""
    leaves_before: Array
    """Whether the last part's buffer of one microbatch is still there in the next."""
    summed: Array
    """Whole gradients, summed over microbatches before they leave."""
    made_late: Array
    """A gradient of weights that nobody shares."""
    table_gradient: Array
    """Of the embedding, as it is made."""
    stream_casts: Array
    """Gradients of the residual stream, in fp32 too, while the embedding's is made; in streams of compute format."""

    @staticmethod
    def of(graph: StepGraph, stack: StackSpec) -> Sharding:
        """The rates of a stack under the layout's ZeRO stage."""
        precision, zero = graph.precision, np.asarray(graph.layout.zero_stage)
        compute, in_place = precision.compute_bytes, stack.weight_storage == "fp32_in_place"
        is_sharded, is_wrapped = np.asarray(graph.fsdp_degree) > 1, wraps_weights(graph)
        waits = stack.pipeline_waits and graph.layout.pp > 1
        drops = is_sharded & (zero == 3) & (not waits)
        sends = (is_wrapped & in_place) | drops
        many = np.asarray(graph.num_microbatches) > 1
        is_summed = sends & many & ((zero < 2) | waits)
        is_mixed = precision.needs_master_weights
        made = np.where(is_wrapped, compute, 4.0) if in_place else compute
        rates = (
            np.where(drops, compute + precision.quantized_weight_bytes, 0.0),
            np.where(sends & is_sharded & (drops | ~many), compute, 0.0),
            np.where(is_wrapped & ~drops & in_place & (is_sharded | is_mixed | (np.asarray(graph.layout.tp) > 1)), compute, 0.0),
            np.where(sends, compute, 0.0),
            np.where(sends, stack.reduce_bytes, 0.0),
            sends & many & (zero >= 2) & (not waits),
            np.where(is_summed, 4.0, 0.0),
            np.where(~is_wrapped & in_place, 4.0, 0.0),
            made,
            np.where(~is_wrapped & in_place, 1.0 + 4.0 / compute * is_mixed, 1.0),
        )
        return Sharding(*(np.asarray(rate)[..., None] for rate in rates))


class _End:
    """The embedding or the head, on the stage that has it; [..., pp]."""

    def __init__(self, graph: StepGraph, stack: StackSpec, index: int, sharding: Sharding) -> None:
        part = graph.parts[index]
        self.is_there = part.counts > 0
        self.params = _stage_axis(gathered_params(part, graph)) * self.is_there
        self.table = _stage_axis(_most(part, "embedding_params")) * self.is_there
        self.tied = _stage_axis(part.total("tied_params")) * self.is_there
        is_chunked = graph.numerics.loss_kernel == "chunked"  # other losses keep the hidden states
        self.hidden = _stage_axis(sum(cost.grad_input_bytes for cost in part.costs if cost.op.name == "head")) * self.is_there * is_chunked
        self.kept = _stage_axis(kept_bytes(part, graph, stack)[0]) * self.is_there
        self.workspace = _stage_axis(_most(part, "workspace_bytes")) * self.is_there
        self.gradients = _stage_axis(sum(part_states(graph, stack, part, is_expert)[1] for is_expert in (False, True))) * self.is_there


def _most(part: Part, quantity: str) -> Array:
    """Of one op."""
    return np.max(np.stack(np.broadcast_arrays(*(np.asarray(getattr(cost, quantity), float) for cost in part.costs))), axis=0)


@dataclass(frozen=True)
class _Block:
    """The block of a stage whose backward pass needs most; [..., pp]."""

    saved: Array
    casts: Array
    made: Array
    temporaries: Array
    kept: Array
    kept_casts: Array
    params: Array
    gradients: Array
    stream: Array
    count: Array
    """Blocks of its kind on the stage."""
    later: Array
    """What the blocks after it had kept, which is freed by then."""


def _masks(graph: StepGraph) -> Array:
    """One for each window of the stage's layers."""
    by_window: dict[int, Array] = {}
    for part in graph.parts[1:-1]:
        for cost in part.costs:
            if cost.op.kind == "attention":
                window = getattr(cost.op, "window", 0)
                by_window[window] = np.maximum(by_window.get(window, 0.0), _stage_axis(cost.mask_bytes) * (part.counts > 0))
    return sum(by_window.values(), np.zeros(graph.layout.pp))


def _worst_block(graph: StepGraph, stack: StackSpec, sharding: Sharding) -> _Block:
    blocks = graph.parts[1:-1]
    rate = (sharding.unreduced + sharding.made_late)[..., 0]
    is_kept = graph.workload.recompute == "none"
    stream = graph.shard.local_tokens * graph.model.hidden_size * graph.numerics.compute_bytes
    kept = [kept_bytes(part, graph, stack)[0] for part in blocks]
    found: list[_Block] = []
    totals: list[Array] = []
    for part, own in zip(blocks, kept, strict=True):
        worst = walk(part, graph, stack, rate)
        casts = sum(cast_bytes(cost, graph, stack) for cost in part.costs) if is_kept else 0.0
        gradients = sum(part_states(graph, stack, part, is_expert)[1] for is_expert in (False, True))
        freed = sum(np.multiply.outer(np.asarray(bytes_, float), later) for bytes_, later in zip(kept, part.later, strict=True))
        values = (worst.saved, worst.casts, worst.gradients, worst.temporaries, own, casts, gathered_params(part, graph), gradients, stream)
        found.append(_Block(*(_stage_axis(value) for value in values), part.counts, freed))
        totals.append(np.where(part.counts > 0, _stage_axis(worst.total - own) - freed, -np.inf))
    chosen = np.argmax(np.stack(np.broadcast_arrays(*totals)), axis=0)
    is_there = sum(part.counts for part in blocks) > 0
    names = _Block.__dataclass_fields__
    return _Block(*(is_there * np.choose(chosen, [np.broadcast_to(getattr(each, name), chosen.shape) for each in found]) for name in names))


def _only(where: Array, terms: Terms) -> Terms:
    """Nothing where the instant does not come."""
    return {part: {name: np.where(where, value, 0.0) for name, value in found.items()} for part, found in terms.items()}


def gathered_params(part: Part, graph: StepGraph) -> Array:
    """Parameters of one part in full; a parted tied head has its copy."""
    return part.total("params") + (part.total("tied_params") if graph.layout.pp > 1 else 0.0)


class _Messages:
    """What a pipeline stage holds of the activations and gradients that it receives and sends, [..., pp]; see `StackSpec`."""

    def __init__(self, graph: StepGraph, stack: StackSpec, in_flight: Array) -> None:
        layout, count = graph.layout, np.asarray(graph.num_microbatches, float)[..., None]
        pp, chunks = layout.pp, layout.num_virtual_stages
        is_kept = stack.pipeline_keeps_outputs and pp > 1
        message = _stage_axis(graph.shard.local_tokens * graph.model.hidden_size * graph.numerics.compute_bytes) * is_kept
        sent, received = np.full(pp, float(chunks)), np.full(pp, float(chunks))
        sent[-1], received[0] = chunks - 1.0, chunks - 1.0
        waits = layout.schedule in stack.pipeline_waits_for_sends
        waiting = SCHEDULES[layout.schedule].waiting(pp, chunks, count[..., 0])
        gradients = received * np.maximum(count - (in_flight - waiting), 0.0) if waits else 0.0
        self.buffers = message * ((sent + received) * count + gradients)
        self.outputs = message * sent * (count if waits else in_flight)
        self.inputs = message * received * in_flight
        self.arriving = message * np.minimum(sent, 1.0)


def _output_gradients(part: Part) -> Array:
    """Bytes of the gradients from which the part's weights get theirs."""
    return sum(
        cost.grad_output_bytes for cost in part.costs if cost.op.name != "head" and np.any(np.asarray(cost.matrix_params + cost.vector_params))
    )


def _stage_axis(value: Array) -> Array:
    """Adds the stage axis to a number or an array [n]."""
    return np.asarray(value, float)[..., None]


def _states(graph: StepGraph, stack: StackSpec) -> list[Array]:
    """Weights, gradients and optimizer states per stage, [..., pp]."""
    per_run = [part_states(graph, stack, part, is_expert) for part in graph.parts for is_expert in (False, True)]
    runs = np.repeat(part_runs(graph), 2, axis=0)
    return [over_stages(state, runs) for state in zip(*per_run, strict=True)]


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
