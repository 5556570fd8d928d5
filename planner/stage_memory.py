"""What one pipeline stage holds, and when: every instant at which it may hold most, term by term.

In: a StepGraph and a stack. Out: `StageMemory`, whose methods return `Terms`; `planner.memory` takes the largest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.backward import kept_bytes, part_casts, walk
from planner.framework_buffers import placeholder_bytes, reduction_bucket_bytes
from planner.graph import Part, StepGraph, at_stages, first_of_each_kind, over_stages, part_runs
from planner.schedules import SCHEDULES
from planner.sharding import Sharding, expert_params, gathered_params
from planner.stack import StackSpec
from planner.states import part_gradients, part_states, wraps_weights

__all__ = ["THROUGHOUT", "WORKSPACES", "StageMemory", "Terms"]

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


class StageMemory:
    """What a stage holds at each instant; every number has shape [..., pp].

    Until the backward pass frees it: what the forward pass keeps, times microbatches in flight. At the loss: what the head works with;
    in the blocks: what one block works with, gathers and recomputes.

    Args:
        only_fullest: of stages with the same parts the first alone, where the schedule says that it holds most; `pp` is then their number.
    """

    def __init__(self, graph: StepGraph, stack: StackSpec, *, only_fullest: bool = False) -> None:
        layout, schedule = graph.layout, SCHEDULES[graph.layout.schedule]
        stages = first_of_each_kind(graph) if only_fullest and schedule.first_holds_most else np.arange(layout.pp)
        graph = graph if len(stages) == layout.pp else at_stages(graph, stages)
        self.graph, self.stack = graph, stack
        self.keeps_head = graph.numerics.loss_kernel != "chunked"  # which needs the head's weight no more
        self.weights, self.gradients, self.optimizer = (schedule.resident(state) for state in _states(graph, stack))
        self.gradients = self.gradients + placeholder_bytes(graph, stack) + reduction_bucket_bytes(graph, stack)
        self.in_flight = schedule.in_flight(layout.pp, layout.num_virtual_stages, graph.num_microbatches)[..., stages]
        kept, casts = [kept_bytes(part, graph, stack) for part in graph.parts], [part_casts(part, graph, stack) for part in graph.parts]
        per_stage = (schedule.resident(each) / schedule.parameter_copies for each in _kept(graph, kept, casts))
        self.activations, self.logits, self.casts, self.head_casts = per_stage
        self.sharding = Sharding.of(graph, stack)
        self.ends = [_End(graph, stack, index, kept[index][0]) for index in (0, -1)]
        self.block = _worst_block(graph, stack, self.sharding, [each[0] for each in kept[1:-1]], casts[1:-1])
        count = np.asarray(graph.num_microbatches, float)[..., None]
        waits = stack.pipeline_waits and layout.pp > 1
        has_buckets = (np.asarray(layout.dp) > 1) & (np.asarray(layout.zero_stage) == 0) & ~wraps_weights(graph)
        # share of the gradients that are there when as much is in flight as ever: none where all of the step is
        is_anew = ~has_buckets[..., None] & stack.frees_gradients
        self.there = np.where(is_anew, np.clip(count - self.in_flight, 0.0, 1.0), 1.0)
        self.is_late = self.there < 1
        self.past_head = schedule.head_in_flight(layout.pp, layout.num_virtual_stages, graph.num_microbatches)[..., stages]
        self.copies = schedule.parameter_copies
        # a chunk's gradients leave after its last microbatch
        one_chunk = np.clip((count - self.in_flight) * layout.num_virtual_stages, 0.0, 1.0)
        self.there_summed = np.where(count <= layout.pp, one_chunk, self.there) if waits and layout.num_virtual_stages > 1 else self.there
        self.most_with_all = np.minimum(self.in_flight, np.maximum(count - 1, 0.0))
        self.has_next = count > 1
        runs = part_runs(graph)
        stage_params = over_stages([gathered_params(part, graph) for part in graph.parts], runs)
        # Chunks of a stage take turns: three are whole at once, or the one that goes backwards; and until as many microbatches as there
        # are stages have been through, one has gradients.
        chunks = layout.num_virtual_stages if waits else 1
        self.gathered = stage_params * self.sharding.kept * min(WHOLE_CHUNKS, chunks) / chunks
        self.summed = stage_params * self.sharding.summed * np.where(count <= layout.pp, 1 / chunks, 1.0)
        self.shards = np.where(self.summed > 0, 0.0, self.gradients)
        # beside activations; pipelines that wait have none left by then
        self.leaves = (self.sharding.leaving > 0) & ((layout.pp == 1) | self.sharding.leaves_each)
        self.splits = schedule.splits_backward
        waiting = schedule.waiting(layout.pp, layout.num_virtual_stages, graph.num_microbatches)[..., stages]
        self.messages = _Messages(graph, stack, self.in_flight, waiting, stages)
        # what all instants have: masks, tokens and targets, outputs that wait for their gradients, the gradients that weights wait for
        self.made_for_weights = over_stages([_output_gradients(part, graph.numerics.compute_bytes) for part in graph.parts], runs)
        is_tied = graph.model.tie_word_embeddings and layout.pp == 1
        self.tied = self.ends[1].tied * is_tied
        self.throughout: Terms = {
            "activations": {
                "masks of attention": _masks(graph),
                "tokens and targets": _stage_axis(2 * INDEX_BYTES * graph.num_microbatches * graph.shard.tokens),
                "outputs of the stage": self.messages.outputs,
                "inputs that lie in buffers": -self.messages.inputs,
            },
            "temporaries": {"gradients that weights wait for": waiting * self.made_for_weights},
        }

    def at_loss(self) -> Terms:
        """The head's chunk of logits with their gradients, and everything that the forward pass kept."""
        head = self.ends[1]
        others = {
            "gradients": {"of earlier microbatches": self.shards * self.there},
            "activations": {"kept by the forward pass": self.activations * self.in_flight},
            "logits": {"of the loss": self.logits * self.past_head, "of one chunk": head.workspace, "hidden states": head.hidden},
            "cast_weights": {"of matmuls": self.casts * self.in_flight + self.head_casts * (self.in_flight if self.keeps_head else 1)},
            "gathered_weights": {
                **self._whole(self.there_summed),
                "of the head, and as it arrived": head.params * (self.sharding.gathered + self.sharding.arrived),
                "gradients of the microbatch before, that leave": self.before() * self.sharding.leaving,
            },
        }
        return _only(head.is_there, others)

    def before(self) -> Array:
        """Parameters of the part that went last in the microbatch before, where its gradients are still leaving."""
        return self.ends[0].params * self.sharding.leaves_before * self.there

    def at_head(self) -> Terms:
        """FSDP copies the head's gradients into the buffer that leaves."""
        head = self.ends[1]
        moving = self.sharding.gathered + self.sharding.unreduced + self.sharding.leaving
        terms = {
            **self._in_backward(self.in_flight, self.there),
            "activations": {"kept by the forward pass": self.activations * self.in_flight - head.kept},
            "gathered_weights": {**self._whole(self.there_summed), "of the head, and its gradients that leave": head.params * moving},
        }
        return _only(head.is_there & self.leaves & ~np.asarray(self.graph.model.tie_word_embeddings), terms)

    def _in_backward(self, in_flight: Array, there: Array) -> Terms:
        """Beside activations."""
        others = np.maximum(in_flight - 1, 0)
        head = self.ends[1]
        return {
            "gradients": {"of earlier microbatches": self.shards * there + head.gradients * (1 - there) * (self.summed == 0)},
            "logits": {"of other microbatches": self.logits * np.minimum(others, np.maximum(self.past_head - self.copies, 0))},
            "cast_weights": {"of matmuls": self.casts * in_flight + self.head_casts * others * self.keeps_head},
        }

    def _whole(self, there: Array) -> dict[str, Array]:
        tied = self.tied * self.sharding.gathered
        return {"of the stage": self.gathered, "of the tied table": tied, "sums of gradients": self.summed * there}

    def _block(self, in_flight: Array, there: Array, there_summed: Array, ends_kept: Array, before: Array) -> Terms:
        """One block of one of the microbatches in flight goes backwards; `before`: parameters of the part that went before it."""
        found = self._in_backward(in_flight, there)
        again = np.maximum(self.block.saved - self.block.kept, 0.0)
        freed = np.maximum(self.block.kept - self.block.saved, 0.0)
        late = self.block.made * self.sharding.made_late * (1 - there)
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

    def in_blocks(self) -> Terms:
        """The head, if there is one, is done."""
        head = self.ends[1]
        is_apart = head.is_there & ~np.asarray(self.graph.model.tie_word_embeddings)
        before = np.where(is_apart, head.params, np.where(head.is_there, self.before(), self.block.own_params))
        return self._block(self.in_flight, self.there, self.there_summed, head.kept, before)

    def in_second_block(self) -> Terms:
        """The block before it leaves, not the head."""
        ends_kept = self.ends[1].kept + self.block.kept
        found = self._block(self.in_flight, self.there, self.there_summed, ends_kept, self.block.own_params)
        return _only(self.block.count > 1, found)

    def in_next_blocks(self) -> Terms:
        """One microbatch is done, and gradients are there."""
        all_there = np.ones_like(self.there)
        found = self._block(self.most_with_all, all_there, all_there, 0.0, self.block.own_params)
        return _only(self.has_next & self.is_late, found)

    def in_last_block(self) -> Terms:
        """Of the first microbatch: all its other blocks are done, and their gradients there."""
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
        return _only(self.there == 0, found)

    def at_reduce(self) -> Terms:
        """FSDP copies a block's gradients into the buffer that leaves."""
        found = self._in_backward(self.in_flight, self.there)
        done = self.activations * self.in_flight - self.ends[1].kept - self.block.kept - self.block.later
        unit = np.maximum(self.block.own_params, self.block.params - self.block.own_params)
        moving = 2 * self.block.params * self.sharding.gathered + unit * (self.sharding.unreduced + self.sharding.leaving)
        found["activations"] = {"kept by the forward pass": done}
        found["gathered_weights"] = {**self._whole(self.there_summed), "of two blocks, and gradients that leave": moving}
        found["temporaries"] = {"gradient of the residual stream": self.block.stream, "gradient of the tied table, from the head": self._tied()}
        return _only(self.leaves, found)

    def at_embedding(self) -> Terms:
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
        return _only(first.is_there, terms)


class _End:
    """The embedding or the head, on the stage that has it; [..., pp]."""

    def __init__(self, graph: StepGraph, stack: StackSpec, index: int, kept: Array) -> None:
        part = graph.parts[index]
        self.is_there = part.counts > 0
        self.params = _stage_axis(gathered_params(part, graph)) * self.is_there
        self.table = _stage_axis(_most(part, "embedding_params")) * self.is_there
        self.tied = _stage_axis(part.total("tied_params")) * self.is_there
        is_chunked = graph.numerics.loss_kernel == "chunked"  # other losses keep the hidden states
        self.hidden = _stage_axis(sum(cost.grad_input_bytes for cost in part.costs if cost.op.name == "head")) * self.is_there * is_chunked
        self.kept = _stage_axis(kept) * self.is_there
        self.workspace = _stage_axis(_most(part, "workspace_bytes")) * self.is_there
        self.gradients = _stage_axis(part_gradients(graph, stack, part)) * self.is_there


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
    own_params: Array
    """Without experts that FSDP gathers apart."""
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
    return sum(by_window.values(), np.zeros(len(graph.parts[0].counts)))


def _worst_block(graph: StepGraph, stack: StackSpec, sharding: Sharding, kept: list[Array], casts: list[Array]) -> _Block:
    """`kept`, `casts`: of each kind of block, what one run keeps and its weights in compute format."""
    blocks = graph.parts[1:-1]
    rate = (sharding.unreduced + sharding.made_late)[..., 0]
    is_kept = graph.workload.recompute == "none"
    found: list[_Block] = []
    totals: list[Array] = []
    for part, own, cast in zip(blocks, kept, casts, strict=True):
        worst = walk(part, graph, stack, rate)
        freed = sum(np.multiply.outer(np.asarray(bytes_, float), later) for bytes_, later in zip(kept, part.later, strict=True))
        found.append(
            _Block(
                saved=_stage_axis(worst.saved),
                casts=_stage_axis(worst.casts),
                made=_stage_axis(worst.gradients),
                temporaries=_stage_axis(worst.temporaries),
                kept=_stage_axis(own),
                kept_casts=_stage_axis(cast if is_kept else 0.0),
                params=_stage_axis(gathered_params(part, graph)),
                own_params=_stage_axis(gathered_params(part, graph) - expert_params(part, graph)),
                gradients=_stage_axis(part_gradients(graph, stack, part)),
                stream=_stage_axis(graph.stream_bytes),
                count=part.counts,
                later=freed,
            )
        )
        totals.append(np.where(part.counts > 0, _stage_axis(worst.total - own) - freed, -np.inf))
    chosen = np.argmax(np.stack(np.broadcast_arrays(*totals)), axis=0)
    is_there = sum(part.counts for part in blocks) > 0
    names = _Block.__dataclass_fields__
    return _Block(*(is_there * np.choose(chosen, [np.broadcast_to(getattr(each, name), chosen.shape) for each in found]) for name in names))


def _only(where: Array, terms: Terms) -> Terms:
    """Nothing where the instant does not come."""
    if not np.any(where):
        return {}
    return {part: {name: np.where(where, value, 0.0) for name, value in found.items()} for part, found in terms.items()}


class _Messages:
    """What a pipeline stage holds of the activations and gradients that it receives and sends, [..., pp]; see `StackSpec`."""

    def __init__(self, graph: StepGraph, stack: StackSpec, in_flight: Array, waiting: Array, stages: np.ndarray) -> None:
        layout, count = graph.layout, np.asarray(graph.num_microbatches, float)[..., None]
        pp, chunks = layout.pp, layout.num_virtual_stages
        is_kept = stack.pipeline_keeps_outputs and pp > 1
        size = _stage_axis(graph.stream_bytes)
        message = size * is_kept
        sent, received = np.full(pp, float(chunks)), np.full(pp, float(chunks))
        sent[-1], received[0] = chunks - 1.0, chunks - 1.0
        sent, received = sent[stages], received[stages]
        waits = layout.schedule in stack.pipeline_waits_for_sends
        gradients = received * np.maximum(count - (in_flight - waiting), 0.0) if waits else 0.0
        self.buffers = message * ((sent + received) * count + gradients)
        is_held = (stack.pipeline_keeps_outputs or stack.pipeline_buffers_outputs) and pp > 1
        self.outputs = size * is_held * sent * (count if waits else in_flight)
        self.inputs = message * received * in_flight
        self.arriving = message * np.minimum(sent, 1.0)


def _output_gradients(part: Part, compute_bytes: float) -> Array:
    """Bytes of the gradients from which the part's weights get theirs; the head's are made with the loss."""
    total: Array = 0.0
    for cost in part.costs:
        if cost.gemm is not None and cost.op.name != "head":
            total = total + cost.gemm[0] * cost.num_gemms * cost.gemm[1] * compute_bytes
        elif cost.gemm is None and np.any(np.asarray(cost.vector_params)):
            total = total + cost.grad_output_bytes
    return total


def _stage_axis(value: Array) -> Array:
    """Adds the stage axis to a number or an array [n]."""
    return np.asarray(value, float)[..., None]


def _states(graph: StepGraph, stack: StackSpec) -> list[Array]:
    """Weights, gradients and optimizer states per stage, [..., pp]."""
    per_run = [part_states(graph, stack, part, is_expert) for part in graph.parts for is_expert in (False, True)]
    runs = np.repeat(part_runs(graph), 2, axis=0)
    return [over_stages(state, runs) for state in zip(*per_run, strict=True)]


def _kept(graph: StepGraph, kept: list[tuple[Array, Array]], casts: list[Array]) -> tuple[Array, Array, Array, Array]:
    """Per microbatch and stage: activations, logits, casts of blocks' weights, casts of the head's."""
    is_kept, runs = graph.workload.recompute == "none", part_runs(graph)
    of_blocks = [value if part.is_block and is_kept else 0.0 for part, value in zip(graph.parts, casts, strict=True)]
    of_head = [value if not part.is_block else 0.0 for part, value in zip(graph.parts, casts, strict=True)]
    activations, logits = zip(*kept, strict=True)
    return over_stages(activations, runs), over_stages(logits, runs), over_stages(of_blocks, runs), over_stages(of_head, runs)
