"""Bytes per device: by stage, by what they hold, by part of the model, by op."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np

from planner.backward import kept_by, kept_bytes
from planner.explanations._base import Explanation, Input, Trace, explained, look_up, summed
from planner.explanations.model import describe_op, op_formula
from planner.graph import Part, part_runs
from planner.memory import INSTANTS, MemoryBreakdown, memory_terms
from planner.optimizers import get_optimizer
from planner.states import part_states, state_format, trained_params, zero_degrees
from planner.timing import worked_runs

__all__ = ["explain_memory"]

_KEY = re.compile(r"memory\.(?:breakdown_bytes|stages\.(?P<stage>\d+)\.breakdown_bytes)\.(?P<what>\w+)(?:\.(?P<path>.+))?")
_SOURCES = {
    "weights": "arXiv:1910.02054 (ZeRO) section 5: parameters over the ZeRO-3 group",
    "gradients": "arXiv:1910.02054 section 5: gradients over the ZeRO-2 group",
    "optimizer": "arXiv:1910.02054 section 5: optimizer states over the ZeRO-1 group",
    "activations": "arXiv:2205.05198: what ops keep for the backward pass, times microbatches in flight (arXiv:2104.04473)",
    "logits": "what the loss keeps and works with",
    "cast_weights": "weights of matmuls in compute format, made in each microbatch and kept for its backward pass",
    "recompute_workspace": "arXiv:2205.05198 section 5: the block that is being recomputed holds what it had dropped",
    "gathered_weights": "arXiv:2304.11277 section 3.3: what FSDP gathered, gradients that are not sharded yet, and the buffers in which they leave",
    "temporaries": "gradients of activations and workspace while the op runs that needs most",
}
FORWARD = "kept by the forward pass"
"""The term of activations that is the sum of what the ops save."""


def explain_memory(trace: Trace, key: str) -> Explanation:
    """Any number under `memory` that is not in the table of short formulas."""
    match = _KEY.fullmatch(key)
    if match is None:
        return _whole_stage(trace, key)
    stage = int(match["stage"]) if match["stage"] else int(trace.memory.peak_stage)
    what, path = match["what"], match["path"] or ""
    if what in ("weights", "optimizer") or path:
        return _lasting(trace, key, what, stage, path)
    if what in MemoryBreakdown.CHANGING:
        return _at_instant(trace, key, what, stage)
    return _constant(trace, key, what, stage)


def _terms(trace: Trace, what: str, stage: int) -> dict[str, float]:
    """What a part of the breakdown is made of when the stage holds most."""
    graph = trace.graph
    _, found = memory_terms(graph, trace.job.stack)
    terms = found[_instant(trace, stage)].get(what, {})
    return {name: float(np.broadcast_to(value, graph.layout.pp)[stage]) for name, value in terms.items()}


def _at_instant(trace: Trace, key: str, what: str, stage: int) -> Explanation:
    """What the stage holds of something when it holds most; activations of the forward pass by part, less what was freed since."""
    instant, terms = _instant(trace, stage), _terms(trace, what, stage)
    children: dict[str, str] = {}
    if what == "activations" and terms.get(FORWARD):
        runs = _runs(trace, what)
        parts = {part.name: runs[i][stage] * _part_bytes(trace, what, part, stage) for i, part in enumerate(trace.graph.parts)}
        freed = terms.pop(FORWARD) - sum(parts.values())
        terms = {**parts, **terms, "freed since": freed if abs(freed) > 1e-9 * sum(parts.values()) else 0.0}
        children = {name: f"{key}.{name}" for name in parts}
    return summed(key, trace.at(key), terms, children, f"{_SOURCES[what]}; {INSTANTS[instant]}")


def _instant(trace: Trace, stage: int) -> str:
    """When the stage holds most."""
    return list(INSTANTS)[int(trace.memory.instant[stage])]


def _whole_stage(trace: Trace, key: str) -> Explanation:
    """memory.peak_bytes.value, memory.stages.N.total_bytes, memory.stages.N.stage."""
    value = trace.at(key)
    if key.endswith(".stage"):
        return explained(
            key, value, "stage", [Input("stage", value, "index of the pipeline stage, input side first")], source="pipeline stages in order"
        )
    at_peak = key == "memory.peak_bytes.value"
    prefix = "memory.breakdown_bytes" if at_peak else key.replace("total_bytes", "breakdown_bytes")
    source = "largest stage; parts of planner/memory.py: arXiv:1910.02054, 2205.05198, 2104.04473" if at_peak else "parts of planner/memory.py"
    return summed(key, value, trace.at(prefix), {name: f"{prefix}.{name}" for name in MemoryBreakdown.PARTS}, source)


def _constant(trace: Trace, key: str, what: str, stage: int) -> Explanation:
    """What the stack's data sheet says: context, communication buffers, slack."""
    stack, value = trace.job.stack, trace.at(key)
    source = f"stack {stack.name}: {stack.source}"
    if what == "allocator_slack":
        allocated = sum(getattr(trace.memory, name)[stage] for name in MemoryBreakdown.PARTS if name not in ("context", "allocator_slack"))
        inputs = [Input("allocated_bytes", allocated, "all parts but the context"), Input("slack_fraction", stack.allocator_slack_fraction, source)]
        return explained(key, value, "allocated_bytes * slack_fraction", inputs, source="reserved by the allocator above what is allocated")
    if what == "communication_buffers" and stack.pipeline_keeps_outputs and trace.graph.layout.pp > 1:
        messages = float(value) - stack.collective_buffers
        terms = {"of the communication library": stack.collective_buffers, "of the pipeline's messages": messages}
        return summed(key, value, terms, {}, f"{source}; torch.distributed.pipelining: a buffer for each that arrives in a step")
    return explained(key, value, f"{what}_bytes", [Input(f"{what}_bytes", value, source if value else "one device: none")], source=source)


def _runs(trace: Trace, what: str) -> np.ndarray[Any, Any]:
    """How often a device holds each part, [parts, pp]; activations of DualPipe's two slices share the microbatches."""
    if what == "activations":
        return np.asarray(worked_runs(part_runs(trace.graph), trace.graph.layout.schedule))
    return np.asarray(trace.schedule.resident(part_runs(trace.graph)))


def _held(trace: Trace, stage: int) -> Input:
    """Microbatches whose activations are alive when the stage holds most, in whole or in part."""
    layout, count = trace.graph.layout, float(trace.graph.num_microbatches)
    held = float(trace.schedule.in_flight(layout.pp, layout.num_virtual_stages, count)[..., stage])
    origin = f"microbatches that schedule {layout.schedule} holds on stage {stage}"
    instant = _instant(trace, stage)
    fewer = {"next blocks": min(held, count - 1), "embedding": max(held - 1, 0.0), "update": 0.0}
    return Input("in_flight", fewer.get(instant, held), f"{origin}, {INSTANTS[instant]}")


def _part_bytes(trace: Trace, what: str, part: Part, stage: int) -> float:
    """Bytes of one run of a part, or of a part that is cut down to one op."""
    if what == "activations":
        return float(kept_bytes(part, trace.graph, trace.job.stack)[0]) * float(_held(trace, stage).value or 0)
    index = ("weights", "gradients", "optimizer").index(what)
    return sum(float(part_states(trace.graph, trace.job.stack, part, is_expert)[index]) for is_expert in (False, True))


def _state_formula(trace: Trace, what: str, part: Part, is_expert: bool) -> tuple[str, list[Input]]:
    """The formula of `memory.part_states` in words."""
    graph, job = trace.graph, trace.job
    kept, optimizer = state_format(graph, job.stack), get_optimizer(graph.workload.optimizer)
    matrix, other = (float(n) for n in trained_params(part, is_expert, graph.layout.pp > 1))
    degree = float(zero_degrees(graph, job.stack, is_expert)[("weights", "gradients", "optimizer").index(what)])
    storage = f"stack {job.stack.name}, weight_storage {job.stack.weight_storage}, precision {graph.precision.name}"
    group = Input("zero_degree", degree, f"zero_stage {graph.layout.zero_stage}: ranks that share {what}")
    counts = [Input("matrix_params", matrix, "this device's, before ZeRO"), Input("other_params", other, "embeddings, norms, biases")]
    if what == "gradients":
        return "(matrix_params + other_params) * gradient_bytes / zero_degree", [*counts, Input("gradient_bytes", kept.gradient, storage), group]
    if what == "optimizer":
        inputs = [
            *counts,
            Input("master_bytes", kept.master, storage),
            Input("other_state_bytes", optimizer.other_state_bytes, optimizer.source),
            group,
        ]
        if optimizer.is_factored:
            factored = float(part.param_total("factored_elements", is_expert=is_expert))
            inputs.append(Input("factored_elements", factored, f"rows and columns: {optimizer.source}"))
            matrices = "4 * factored_elements"
        else:
            inputs.append(Input("matrix_state_bytes", optimizer.matrix_state_bytes, optimizer.source))
            matrices = "matrix_params * matrix_state_bytes"
        inputs.append(Input("state_scale", kept.state_scale, storage))
        states = f"(other_params * other_state_bytes + {matrices}) * state_scale"
        return f"((matrix_params + other_params) * master_bytes + {states}) / zero_degree", inputs
    frozen = [Input(name, float(part.param_total(name, is_expert=is_expert)), "not trained") for name in ("frozen_params", "frozen_matrix_params")]
    formula = (
        "(matrix_params * matrix_bytes + other_params * stored_bytes + frozen_matrix_params * frozen_matrix_bytes"
        " + (frozen_params - frozen_matrix_params) * compute_bytes) / zero_degree + matrix_params * quantized_copy_bytes"
    )
    return formula, [
        *counts,
        *frozen,
        Input("matrix_bytes", kept.matrix, storage),
        Input("frozen_matrix_bytes", kept.frozen_matrix, f"{storage}, frozen_format {graph.workload.frozen_format}"),
        Input("stored_bytes", kept.stored, storage),
        Input("compute_bytes", graph.precision.compute_bytes, graph.precision.source),
        group,
        Input("quantized_copy_bytes", float(kept.quantized_copy), graph.precision.source),
    ]


def _lasting(trace: Trace, key: str, what: str, stage: int, path: str) -> Explanation:
    """Weights, gradients, optimizer states and activations of the forward pass: sums over parts, then over ops.

    Raises:
        InputError: a path below something that has no parts.
    """
    if what not in ("weights", "gradients", "optimizer", "activations"):
        look_up(key, path, [])
    runs = _runs(trace, what)
    if not path:
        parts = {p.name: runs[i][stage] * _part_bytes(trace, what, p, stage) for i, p in enumerate(trace.graph.parts)}
        return summed(key, trace.at(key), parts, {name: f"{key}.{name}" for name in parts}, _SOURCES[what])
    index, part, cost, _ = trace.locate(key, path)
    num_runs = float(runs[index][stage])
    count = Input("num_runs", num_runs, f"{part.name} on stage {stage}")
    is_kept_whole = what == "activations" and part.is_block and trace.graph.workload.recompute == "full"
    if is_kept_whole:
        return _block_input(trace, key, part, count, stage)
    if cost is None:
        terms = {c.op.name: num_runs * _part_bytes(trace, what, replace(part, costs=(c,)), stage) for c in part.costs}
        return summed(key, sum(terms.values()), terms, {name: f"{key}.{name}" for name in terms}, _SOURCES[what])
    only = replace(part, costs=(cost,))
    if what == "activations":
        return _op_activations(trace, key, only, count, stage)
    formula, inputs = _state_formula(trace, what, only, cost.op.is_expert)
    return explained(
        key,
        num_runs * _part_bytes(trace, what, only, stage),
        f"num_runs * ({formula})",
        [count, *inputs],
        source=f"{describe_op(cost)}; {_SOURCES[what]}",
    )


def _block_input(trace: Trace, key: str, part: Part, count: Input, stage: int) -> Explanation:
    """Full recompute keeps the input of each block and nothing else."""
    graph = trace.graph
    inputs = [
        count,
        _held(trace, stage),
        Input("local_tokens", float(graph.shard.local_tokens), "micro_batch_size * seq_len / cp, over tp with sequence parallelism"),
        Input("hidden_size", graph.model.hidden_size, "model"),
        Input("compute_bytes", graph.numerics.compute_bytes, f"precision {graph.precision.name}"),
    ]
    value = float(count.value or 0) * _part_bytes(trace, "activations", part, stage)
    formula = "num_runs * in_flight * local_tokens * hidden_size * compute_bytes"
    return explained(key, value, formula, inputs, source="recompute full: the input of each block is kept (arXiv:2205.05198 section 5)")


def _op_activations(trace: Trace, key: str, part: Part, count: Input, stage: int) -> Explanation:
    """What one op keeps, by what made it."""
    cost, held = part.costs[0], _held(trace, stage)
    scale = float(count.value or 0) * float(held.value or 0)
    kept = {f"{producer}_bytes": float(n) for producer, n in kept_by(cost, part, trace.graph, trace.job.stack).items()}
    formula = f"num_runs * in_flight * ({' + '.join(kept) or '0'})"
    inputs = [count, held, *(Input(name, n, f"saved by {describe_op(cost)}") for name, n in kept.items())]
    terms = {name: scale * n for name, n in kept.items()}
    value = float(count.value or 0) * _part_bytes(trace, "activations", part, stage)
    return explained(key, value, formula, inputs, terms=terms, source=op_formula(cost))
