"""Bytes per device: by stage, by what they hold, by part of the model, by op."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from planner.explanations._base import Explanation, Input, Trace, explained, summed
from planner.explanations.model import describe_op, op_formula
from planner.graph import Part, part_runs
from planner.memory import (
    MemoryBreakdown,
    gathered_bytes_per_param,
    gathered_params,
    kept_bytes,
    part_states,
    replaced_gradients,
    state_format,
    trained_params,
    transient_bytes,
    zero_degrees,
)
from planner.op_cost import OpCost
from planner.optimizers import get_optimizer
from planner.timing import worked_runs

__all__ = ["explain_memory"]

_KEY = re.compile(r"memory\.(?:breakdown_bytes|stages\.(?P<stage>\d+)\.breakdown_bytes)\.(?P<what>\w+)(?:\.(?P<path>.+))?")
_SOURCES = {
    "weights": "arXiv:1910.02054 (ZeRO) section 5: parameters over the ZeRO-3 group",
    "gradients": "arXiv:1910.02054 section 5: gradients over the ZeRO-2 group",
    "optimizer": "arXiv:1910.02054 section 5: optimizer states over the ZeRO-1 group",
    "activations": "arXiv:2205.05198: what ops keep for the backward pass, times microbatches in flight (arXiv:2104.04473)",
    "logits": "what the loss keeps, times microbatches in flight",
    "recompute_workspace": "arXiv:2205.05198 section 5: the block that is being recomputed keeps everything once",
    "gathered_weights": "arXiv:2304.11277 section 3.3: FSDP's gathered blocks, one in use and one prefetched, and full gradients",
    "temporaries": "the op that holds most while it runs",
}


def explain_memory(trace: Trace, key: str) -> Explanation:
    """Any number under `memory` that is not in the table of short formulas."""
    match = _KEY.fullmatch(key)
    if match is None:
        return _whole_stage(trace, key)
    stage = int(match["stage"]) if match["stage"] else int(trace.memory.peak_stage)
    what, path = match["what"], match["path"] or ""
    if what in ("weights", "gradients", "optimizer", "activations", "logits"):
        return _lasting(trace, key, what, stage, path)
    if what in ("recompute_workspace", "gathered_weights", "temporaries"):
        return _largest_part(trace, key, what, stage, path)
    return _constant(trace, key, what, stage)


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
    return explained(key, value, f"{what}_bytes", [Input(f"{what}_bytes", value, source if value else "one device: none")], source=source)


def _runs(trace: Trace, what: str) -> np.ndarray[Any, Any]:
    """How often a device holds each part, [parts, pp]; activations of DualPipe's two slices share the microbatches."""
    if what in ("activations", "logits"):
        return np.asarray(worked_runs(trace.graph))
    return np.asarray(trace.schedule.resident(part_runs(trace.graph)))


def _in_flight(trace: Trace, stage: int) -> float:
    layout = trace.graph.layout
    held = trace.schedule.in_flight(layout.pp, layout.num_virtual_stages, trace.graph.num_microbatches)
    return float(held[..., stage])


def _part_bytes(trace: Trace, what: str, part: Part, stage: int) -> float:
    """Bytes of one run of a part, or of a part that is cut down to one op."""
    if what in ("activations", "logits"):
        return float(kept_bytes(part, trace.graph, trace.job.stack)[what == "logits"]) * _in_flight(trace, stage)
    index = ("weights", "gradients", "optimizer").index(what)
    return sum(float(part_states(trace.graph, trace.job.stack, part, is_expert)[index]) for is_expert in (False, True))


def _state_formula(trace: Trace, what: str, part: Part, is_expert: bool) -> tuple[str, list[Input]]:
    """The formula of `memory.part_states` in words."""
    graph, job = trace.graph, trace.job
    kept, optimizer = state_format(graph, job.stack), get_optimizer(graph.workload.optimizer)
    matrix, other = (float(n) for n in trained_params(part, is_expert, graph.layout.pp > 1))
    degree = float(zero_degrees(graph, is_expert)[("weights", "gradients", "optimizer").index(what)])
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
        return f"((matrix_params + other_params) * master_bytes + other_params * other_state_bytes + {matrices}) / zero_degree", inputs
    formula = (
        "((matrix_params + other_params) * stored_bytes + frozen_params * compute_bytes) / zero_degree"
        " + (matrix_params + other_params) * cast_copy_bytes + matrix_params * quantized_copy_bytes"
    )
    return formula, [
        *counts,
        Input("frozen_params", float(part.param_total("frozen_params", is_expert=is_expert)), "not trained"),
        Input("stored_bytes", kept.stored, storage),
        Input("compute_bytes", graph.precision.compute_bytes, graph.precision.source),
        group,
        Input("cast_copy_bytes", float(kept.cast_copy), storage),
        Input("quantized_copy_bytes", float(kept.quantized_copy), graph.precision.source),
    ]


def _lasting(trace: Trace, key: str, what: str, stage: int, path: str) -> Explanation:
    """Weights, gradients, optimizer states and activations: sums over parts, then over ops."""
    runs = _runs(trace, what)
    if not path:
        parts = {p.name: runs[i][stage] * _part_bytes(trace, what, p, stage) for i, p in enumerate(trace.graph.parts)}
        keys = {name: f"{key}.{name}" for name in parts}
        if what == "gradients":
            kept = trace.memory.activations + trace.memory.logits
            parts["not yet made"] = -float(np.sum(replaced_gradients(trace.graph, trace.job.stack, np.array([sum(parts.values())]), kept)))
        return summed(key, trace.at(key), parts, keys, _SOURCES[what])
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
    if what in ("activations", "logits"):
        return _op_activations(trace, key, only, count, stage, is_logits=what == "logits")
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
        Input("in_flight", _in_flight(trace, stage), f"microbatches that schedule {graph.layout.schedule} holds on stage {stage}"),
        Input("local_tokens", float(graph.shard.local_tokens), "micro_batch_size * seq_len / cp, over tp with sequence parallelism"),
        Input("hidden_size", graph.model.hidden_size, "model"),
        Input("compute_bytes", graph.numerics.compute_bytes, f"precision {graph.precision.name}"),
    ]
    value = float(count.value or 0) * _part_bytes(trace, "activations", part, stage)
    formula = "num_runs * in_flight * local_tokens * hidden_size * compute_bytes"
    return explained(key, value, formula, inputs, source="recompute full: the input of each block is kept (arXiv:2205.05198 section 5)")


def _op_activations(trace: Trace, key: str, part: Part, count: Input, stage: int, *, is_logits: bool) -> Explanation:
    """What one op keeps, by what made it."""
    cost = part.costs[0]
    in_flight = _in_flight(trace, stage)
    scale = float(count.value or 0) * in_flight
    dropped = trace.job.stack.selective_recompute if trace.graph.workload.recompute == "selective" else []
    kept = {
        f"{producer}_bytes": float(n)
        for producer, n in cost.saved.items()
        if (producer == "logits") == is_logits and (is_logits or producer not in dropped)
    }
    formula = f"num_runs * in_flight * ({' + '.join(kept) or '0'})"
    inputs = [
        count,
        Input("in_flight", in_flight, f"microbatches that schedule {trace.graph.layout.schedule} holds on stage {stage}"),
        *(Input(name, n, f"saved by {describe_op(cost)}") for name, n in kept.items()),
    ]
    terms = {name: scale * n for name, n in kept.items()}
    value = float(count.value or 0) * _part_bytes(trace, "logits" if is_logits else "activations", part, stage)
    return explained(key, value, formula, inputs, terms=terms, source=op_formula(cost))


def _largest_part(trace: Trace, key: str, what: str, stage: int, path: str) -> Explanation:
    """Transients: of the parts on the stage the one that holds most counts."""
    graph, value = trace.graph, trace.at(key.removesuffix(f".{path}") if path else key)
    per_param = float(gathered_bytes_per_param(graph, trace.job.stack))
    quantities: dict[str, Callable[[Part], float]] = {
        "recompute_workspace": lambda part: float(part.total("saved_bytes")) if part.is_block and graph.workload.recompute == "full" else 0.0,
        "gathered_weights": lambda part: float(gathered_params(part, graph)) * per_param,
        "temporaries": lambda part: max((float(transient_bytes(cost, graph)) for cost in part.costs), default=0.0),
    }
    present = [part for part in graph.parts if part.counts[stage] > 0]
    winner = max(present, key=quantities[what])
    if value == 0 and not path:
        return explained(key, value, "0", source=f"{_SOURCES[what]}; does not apply to this plan")
    if what == "temporaries":
        worst = max(winner.costs, key=lambda cost: float(transient_bytes(cost, graph)))
        return _transient(trace, key, winner, worst)
    if not path:
        terms = {cost.op.name: quantities[what](replace(winner, costs=(cost,))) for cost in winner.costs}
        return summed(key, value, terms, {name: f"{key}.{winner.name}.{name}" for name in terms}, f"{_SOURCES[what]}: {winner.name}")
    _, part, cost, _ = trace.locate(key, path)
    cost = cost if cost is not None else part.costs[0]
    only = replace(part, costs=(cost,))
    if what == "gathered_weights":
        inputs = [
            Input("params", float(gathered_params(only, graph)), describe_op(cost)),
            Input("bytes_per_param", per_param, "two gathered copies in compute format, full gradients in compute and reduce format"),
        ]
        return explained(key, quantities[what](only), "params * bytes_per_param", inputs, source=_SOURCES[what])
    names = {f"{producer}_bytes": float(n) for producer, n in cost.saved.items()}
    inputs = [Input(name, n, f"saved by {describe_op(cost)}") for name, n in names.items()]
    return explained(key, quantities[what](only), " + ".join(names) or "0", inputs, terms=names, source=op_formula(cost))


def _transient(trace: Trace, key: str, part: Part, cost: OpCost) -> Explanation:
    """What one op holds while it runs."""
    graph, value = trace.graph, float(transient_bytes(cost, trace.graph))
    workspace = Input("workspace_bytes", float(cost.workspace_bytes), describe_op(cost))
    source = f"{_SOURCES['temporaries']}: {part.name}.{cost.op.name}"
    if cost.gemm is None or value == float(cost.workspace_bytes):
        return explained(key, value, "workspace_bytes", [workspace], source=source)
    m, n, k = (float(size) for size in cost.gemm)
    groups = float(getattr(cost.op, "num_experts", 1)) / (float(graph.shard.ep) if cost.op.is_expert else 1.0)
    inputs = [
        workspace, Input("m", m, describe_op(cost)), Input("num_groups", groups, "experts on one device, or 1"), Input("n", n, describe_op(cost)),
        Input("k", k, describe_op(cost)), Input("compute_bytes", graph.numerics.compute_bytes, f"precision {graph.precision.name}"),
    ]  # fmt: skip
    return explained(key, value, "workspace_bytes + m * num_groups * (n + k) * compute_bytes", inputs, source=source)
