"""What one pipeline stage holds, and when: every instant at which it may hold most, term by term.

In: a StepGraph and a stack. Out: `StageMemory`, whose methods return `Terms`; `planner.memory` takes the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from planner.arrays import both, pick, times
from planner.framework_buffers import placeholder_bytes, reduction_bucket_bytes
from planner.graph import StepGraph, at_stages, first_of_each_kind, over_stages, part_runs
from planner.part_memory import PartMemory, parts_memory
from planner.pipeline_buffers import Messages, stage_axis
from planner.schedules import SCHEDULES
from planner.sharding import Sharding
from planner.stack import StackSpec
from planner.states import wraps_weights

__all__ = ["THROUGHOUT", "WORKSPACES", "Instant", "StageMemory", "Terms"]

Array = Any
Terms = dict[str, dict[str, Array]]
"""Part of the breakdown -> what -> bytes [..., pp]."""
WHOLE_CHUNKS = 3
"""Chunks of one stage whose weights torch.distributed.pipelining gathers at a time."""
WORKSPACES = "workspaces of libraries"
THROUGHOUT = {
    WORKSPACES, "masks of attention", "tokens and targets", "outputs of the stage", "inputs that lie in buffers", "gradients that weights wait for",
}  # fmt: skip
"""Terms that are there at every instant."""
INDEX_BYTES = 8
"""Of a token."""


class Instant(NamedTuple):
    """What a stage holds at one moment, on the stages to which it comes."""

    where: Array
    terms: Terms

    @property
    def comes(self) -> bool:
        """Whether it comes to any stage."""
        return bool(np.any(self.where))

    def masked(self) -> Terms:
        """Nothing where the instant does not come."""
        if not self.comes:
            return {}
        return {part: {name: np.atleast_1d(np.where(self.where, value, 0.0)) for name, value in found.items()} for part, found in self.terms.items()}


NEVER = Instant(np.False_, {})


class StageMemory:
    """What a stage holds at each instant; every number has shape [..., pp].

    Until the backward pass frees it: what the forward pass keeps, times microbatches in flight. At the loss: what the head works with;
    in the blocks: what one block works with, gathers and recomputes.

    Args:
        parts: what one run of each part holds, where that is known already.
        only_fullest: of stages with the same parts the first alone, where the schedule says that it holds most; `pp` is then their number.
    """

    def __init__(self, graph: StepGraph, stack: StackSpec, parts: Sequence[PartMemory] | None = None, *, only_fullest: bool = False) -> None:
        parts = parts_memory(graph, stack) if parts is None else parts
        layout, schedule = graph.layout, SCHEDULES[graph.layout.schedule]
        stages = first_of_each_kind(graph) if only_fullest and schedule.first_holds_most else np.arange(layout.pp)
        graph = graph if len(stages) == layout.pp else at_stages(graph, stages)
        self.graph, self.stack = graph, stack
        self.keeps_head = graph.numerics.loss_kernel != "chunked"  # which needs the head's weight no more
        self.weights, self.gradients, self.optimizer = (schedule.resident(state) for state in _states(graph, parts))
        self.gradients = self.gradients + placeholder_bytes(graph, stack) + reduction_bucket_bytes(graph, stack)
        self.in_flight = schedule.in_flight(layout.pp, layout.num_virtual_stages, graph.num_microbatches, stages)
        per_stage = (schedule.resident(each) / schedule.parameter_copies for each in _kept(graph, parts))
        self.activations, self.logits, self.casts, self.head_casts = per_stage
        self.sharding = Sharding.of(graph, stack)
        self.ends = [_End(parts[index], graph.parts[index].counts > 0) for index in (0, -1)]
        self.block = _worst_block(graph, parts[1:-1])
        count = np.asarray(graph.num_microbatches, float)[..., None]
        waits = stack.pipeline_waits and layout.pp > 1
        has_buckets = both(np.asarray(layout.zero_stage) == 0, (np.asarray(layout.dp) > 1) & ~wraps_weights(graph))
        # share of the gradients that are there when as much is in flight as ever: none where all of the step is
        is_anew = both(stack.frees_gradients, ~np.asarray(has_buckets)[..., None])
        self.there = np.asarray(pick(is_anew, np.clip(count - self.in_flight, 0.0, 1.0), 1.0))
        self.is_late = self.there < 1
        self.past_head = schedule.head_in_flight(layout.pp, layout.num_virtual_stages, graph.num_microbatches, stages)
        self.copies = schedule.parameter_copies
        # a chunk's gradients leave after its last microbatch
        one_chunk = np.clip((count - self.in_flight) * layout.num_virtual_stages, 0.0, 1.0)
        self.there_summed = np.where(count <= layout.pp, one_chunk, self.there) if waits and layout.num_virtual_stages > 1 else self.there
        self.most_with_all = np.minimum(self.in_flight, np.maximum(count - 1, 0.0))
        self.has_next = count > 1
        runs = part_runs(graph)
        stage_params = over_stages([part.gathered_params for part in parts], runs)
        # Chunks of a stage take turns: three are whole at once, or the one that goes backwards; and until as many microbatches as there
        # are stages have been through, one has gradients.
        chunks = layout.num_virtual_stages if waits else 1
        self.gathered = stage_params * self.sharding.kept * min(WHOLE_CHUNKS, chunks) / chunks
        self.summed = stage_params * self.sharding.summed * np.where(count <= layout.pp, 1 / chunks, 1.0)
        self.shards = np.where(self.summed > 0, 0.0, self.gradients)
        # beside activations; pipelines that wait have none left by then
        self.leaves = (self.sharding.leaving > 0) & ((layout.pp == 1) | self.sharding.leaves_each)
        self.splits = schedule.splits_backward
        waiting = schedule.waiting(layout.pp, layout.num_virtual_stages, graph.num_microbatches, stages)
        self.messages = Messages(graph, stack, self.in_flight, waiting, stages)
        # what all instants have: masks, tokens and targets, outputs that wait for their gradients, the gradients that weights wait for
        self.made_for_weights = over_stages([part.output_gradients for part in parts], runs)
        is_tied = graph.model.tie_word_embeddings and layout.pp == 1
        self.tied = self.ends[1].tied * is_tied
        self.throughout: Terms = {
            "activations": {
                "masks of attention": _masks(graph, parts),
                "tokens and targets": stage_axis(2 * INDEX_BYTES * graph.num_microbatches * graph.shard.tokens),
                "outputs of the stage": self.messages.outputs,
                "inputs that lie in buffers": -self.messages.inputs,
            },
            "temporaries": {"gradients that weights wait for": waiting * self.made_for_weights},
        }

    def instants(self) -> dict[str, Instant]:
        """All of them, by name."""
        return {
            "loss": self.at_loss(),
            "head": self.at_head(),
            "blocks": self.in_blocks(),
            "second block": self.in_second_block(),
            "next blocks": self.in_next_blocks(),
            "reduce": self.at_reduce(),
            "last block": self.in_last_block(),
            "embedding": self.at_embedding(),
        }

    def at_loss(self) -> Instant:
        """The head's chunk of logits with their gradients, and everything that the forward pass kept."""
        head = self.ends[1]
        others = {
            "gradients": {"of earlier microbatches": times(self.shards, self.there)},
            "activations": {"kept by the forward pass": self.activations * self.in_flight},
            "logits": {"of the loss": times(self.logits, self.past_head), "of one chunk": head.workspace, "hidden states": head.hidden},
            "cast_weights": {"of matmuls": times(self.casts, self.in_flight) + times(self.head_casts, self.in_flight if self.keeps_head else 1.0)},
            "gathered_weights": {
                **self._whole(self.there_summed),
                "of the head, and as it arrived": head.params * (self.sharding.gathered + self.sharding.arrived),
                "gradients of the microbatch before, that leave": self.before() * self.sharding.leaving,
            },
        }
        return Instant(head.is_there, others)

    def before(self) -> Array:
        """Parameters of the part that went last in the microbatch before, where its gradients are still leaving."""
        return self.ends[0].params * self.sharding.leaves_before * self.there

    def at_head(self) -> Instant:
        """FSDP copies the head's gradients into the buffer that leaves."""
        head = self.ends[1]
        where = head.is_there & self.leaves & ~np.asarray(self.graph.model.tie_word_embeddings)
        if not np.any(where):
            return NEVER
        moving = self.sharding.gathered + self.sharding.unreduced + self.sharding.leaving
        terms = {
            **self._in_backward(self.in_flight, self.there),
            "activations": {"kept by the forward pass": self.activations * self.in_flight - head.kept},
            "gathered_weights": {**self._whole(self.there_summed), "of the head, and its gradients that leave": head.params * moving},
        }
        return Instant(where, terms)

    def _in_backward(self, in_flight: Array, there: Array) -> Terms:
        """Beside activations."""
        others = np.maximum(in_flight - 1, 0)
        head = self.ends[1]
        return {
            "gradients": {"of earlier microbatches": times(self.shards, there) + times(1 - there, head.gradients * (self.summed == 0))},
            "logits": {"of other microbatches": times(self.logits, np.minimum(others, np.maximum(self.past_head - self.copies, 0)))},
            "cast_weights": {"of matmuls": times(self.casts, in_flight) + times(self.head_casts * self.keeps_head, others)},
        }

    def _whole(self, there: Array) -> dict[str, Array]:
        tied = self.tied * self.sharding.gathered
        return {"of the stage": self.gathered, "of the tied table": tied, "sums of gradients": times(self.summed, there)}

    def _block(self, in_flight: Array, there: Array, there_summed: Array, ends_kept: Array, before: Array) -> Terms:
        """One block of one of the microbatches in flight goes backwards; `before`: parameters of the part that went before it."""
        found = self._in_backward(in_flight, there)
        again = np.maximum(self.block.saved - self.block.kept, 0.0)
        freed = np.maximum(self.block.kept - self.block.saved, 0.0)
        late = times(self.sharding.made_late * (1 - there), self.block.made)
        found["gradients"]["of this block"] = late
        found["activations"] = {"kept by the forward pass": self.activations * in_flight - ends_kept - freed - self.block.later}
        found["cast_weights"]["of this block"] = self.block.casts - self.block.kept_casts
        found["recompute_workspace"] = {"of this block": again}
        one_op = self.block.temporaries - self.messages.arriving
        if self.splits:  # what the weights' gradients need stays, and what was made for them
            found["activations"] = {"kept by the forward pass": self.activations * in_flight}
            found["logits"] = {"of the microbatches": self.logits * in_flight}
            one_op = np.maximum(one_op, self.made_for_weights)
        found["temporaries"] = {
            "of one op": one_op,
            "gradient of the tied table, from the head": self._tied(),
        }
        found["gathered_weights"] = {
            **self._whole(there_summed),
            "of two blocks": 2 * self.block.params * self.sharding.gathered,
            "gradients that leave": before * self.sharding.leaving * self.sharding.leaves_each,
            "gradients of this block": self.block.made * self.sharding.unreduced,
        }
        return found

    def _tied(self) -> Array:
        """The head's share of a tied table's gradient waits for the embedding's; LoRA trains neither."""
        return self.tied * self.sharding.table_gradient * (self.graph.numerics.lora_rank == 0)

    def in_blocks(self) -> Instant:
        """The head, if there is one, is done."""
        head = self.ends[1]
        is_apart = head.is_there & ~np.asarray(self.graph.model.tie_word_embeddings)
        before = np.where(is_apart, head.params, np.where(head.is_there, self.before(), self.block.own_params))
        return Instant(np.True_, self._block(self.in_flight, self.there, self.there_summed, head.kept, before))

    def in_second_block(self) -> Instant:
        """The block before it leaves, not the head."""
        ends_kept = self.ends[1].kept + self.block.kept
        found = self._block(self.in_flight, self.there, self.there_summed, ends_kept, self.block.own_params)
        return Instant(self.block.count > 1, found)

    def in_next_blocks(self) -> Instant:
        """One microbatch is done, and gradients are there."""
        where = self.has_next & self.is_late
        if not np.any(where):
            return NEVER
        all_there = np.ones_like(self.there)
        found = self._block(self.most_with_all, all_there, all_there, 0.0, self.block.own_params)
        return Instant(where, found)

    def in_last_block(self) -> Instant:
        """Of the first microbatch: all its other blocks are done, and their gradients there."""
        if not np.any(self.there == 0):
            return NEVER
        first, others = self.ends[0], np.maximum(self.in_flight - 1, 0)
        found = self._block(self.in_flight, 0.0 * self.there, 0.0 * self.there, 0.0, self.block.own_params)
        not_made = first.params + self.block.params
        kept = self.activations * others + first.kept + np.minimum(self.block.kept, self.block.saved)
        found["activations"] = {"kept by the forward pass": kept}
        found["gradients"]["of earlier microbatches"] = np.maximum(self.shards - first.gradients - self.block.gradients, 0.0)
        found["cast_weights"] = {"of matmuls": self.casts * others, "of this block": self.block.casts}
        found["gathered_weights"] |= {
            "of the stage": np.where(self.has_next, self.gathered, not_made * self.sharding.kept),
            "sums of gradients": np.maximum(self.summed - not_made * self.sharding.summed, 0.0),
        }
        return Instant(self.there == 0, found)

    def at_reduce(self) -> Instant:
        """FSDP copies a block's gradients into the buffer that leaves."""
        if not np.any(self.leaves):
            return NEVER
        found = self._in_backward(self.in_flight, self.there)
        done = self.activations * self.in_flight - self.ends[1].kept - self.block.kept - self.block.later
        unit = np.maximum(self.block.own_params, self.block.params - self.block.own_params)
        moving = 2 * self.block.params * self.sharding.gathered + unit * (self.sharding.unreduced + self.sharding.leaving)
        found["activations"] = {"kept by the forward pass": done}
        found["gathered_weights"] = {**self._whole(self.there_summed), "of two blocks, and gradients that leave": moving}
        found["temporaries"] = {"gradient of the residual stream": self.block.stream, "gradient of the tied table, from the head": self._tied()}
        return Instant(self.leaves, found)

    def at_embedding(self) -> Instant:
        """The table's gradient is made whole, and then added."""
        first, others = self.ends[0], np.maximum(self.in_flight - 1, 0)
        is_last = ~self.has_next
        terms = {
            **self._in_backward(others, self.there),
            "gradients": {"of the stage": np.where(is_last & self.is_late, self.gradients - first.gradients, self.shards)},
            "activations": {"kept by the forward pass": self.activations * others},
            "temporaries": {
                "gradient of the table": first.table * self.sharding.table_gradient,
                "of the tied table, from the head, and their sum": 2 * self._tied(),
                "gradient of the residual stream": self.block.stream * self.sharding.stream_casts,
            },
            "gathered_weights": {
                **self._whole(1.0 - is_last),
                "of the stage": np.where(is_last, first.params * self.sharding.kept, self.gathered),
                "gradients of a block, that leave": self.block.own_params * self.sharding.leaving,
            },
        }  # fmt: skip
        return Instant(first.is_there, terms)


class _End:
    """The embedding or the head, on the stage that has it; [..., pp]."""

    def __init__(self, part: PartMemory, is_there: np.ndarray) -> None:
        self.is_there = is_there
        self.params, self.table, self.tied, self.hidden, self.kept, self.workspace, self.gradients = (
            stage_axis(value) * is_there
            for value in (part.gathered_params, part.table, part.tied, part.hidden, part.kept, part.workspace, part.gradients)
        )


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
    own_params: Array
    """Without experts that FSDP gathers apart."""
    gradients: Array
    stream: Array
    count: Array
    """Blocks of its kind on the stage."""
    later: Array
    """What the blocks after it had kept, which is freed by then."""


def _masks(graph: StepGraph, parts: Sequence[PartMemory]) -> Array:
    """One for each window of the stage's layers."""
    by_window: dict[int, Array] = {}
    for part, held in zip(graph.parts, parts, strict=True):
        for window, mask_bytes in held.masks.items():
            by_window[window] = np.maximum(by_window.get(window, 0.0), stage_axis(mask_bytes) * (part.counts > 0))
    return sum(by_window.values(), np.zeros(len(graph.parts[0].counts)))


def _worst_block(graph: StepGraph, blocks: Sequence[PartMemory]) -> _Block:
    """`blocks`: each kind of them."""
    is_kept = graph.workload.recompute == "none"
    found: list[_Block] = []
    totals: list[Array] = []
    for part, held in zip(graph.parts[1:-1], blocks, strict=True):
        worst = held.worst
        freed = sum(np.multiply.outer(np.asarray(each.kept, float), later) for each, later in zip(blocks, part.later, strict=True))
        found.append(
            _Block(
                saved=stage_axis(worst.saved),
                casts=stage_axis(worst.casts),
                made=stage_axis(worst.gradients),
                temporaries=stage_axis(worst.temporaries),
                kept=stage_axis(held.kept),
                kept_casts=stage_axis(held.casts if is_kept else 0.0),
                params=stage_axis(held.gathered_params),
                own_params=stage_axis(held.gathered_params - held.expert_params),
                gradients=stage_axis(held.gradients),
                stream=stage_axis(graph.stream_bytes),
                count=part.counts,
                later=freed,
            )
        )
        totals.append(np.where(part.counts > 0, stage_axis(worst.total - held.kept) - freed, -np.inf))
    is_there = sum(part.counts for part in graph.parts[1:-1]) > 0
    chosen = np.argmax(np.stack(np.broadcast_arrays(*totals)), axis=0) if len(found) > 1 else np.zeros(1, int)
    return _Block(*(is_there * _choose(chosen, [getattr(each, name) for each in found]) for name in _Block.__dataclass_fields__))


def _choose(chosen: np.ndarray, values: list[Array]) -> Array:
    """The value of the kind of block that was chosen, no wider than need be."""
    if len(values) == 1:
        return values[0]
    return np.choose(np.broadcast_to(chosen, np.broadcast_shapes(chosen.shape, *map(np.shape, values))), values)


def _states(graph: StepGraph, parts: Sequence[PartMemory]) -> list[Array]:
    """Weights, gradients and optimizer states per stage, [..., pp]."""
    runs = np.repeat(part_runs(graph), 2, axis=0)
    return [over_stages(state, runs) for state in zip(*(state for part in parts for state in part.states), strict=True)]


def _kept(graph: StepGraph, parts: Sequence[PartMemory]) -> tuple[Array, Array, Array, Array]:
    """Per microbatch and stage: activations, logits, casts of blocks' weights, casts of the head's."""
    is_kept, runs = graph.workload.recompute == "none", part_runs(graph)
    of_blocks = [held.casts if part.is_block and is_kept else 0.0 for part, held in zip(graph.parts, parts, strict=True)]
    of_head = [held.casts if not part.is_block else 0.0 for part, held in zip(graph.parts, parts, strict=True)]
    activations, logits = ([getattr(held, name) for held in parts] for name in ("kept", "logits"))
    return over_stages(activations, runs), over_stages(logits, runs), over_stages(of_blocks, runs), over_stages(of_head, runs)
