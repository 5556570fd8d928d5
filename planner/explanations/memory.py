"""Bytes per device: by stage, by what they hold, by part of the model, by op."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np

from planner.explanations._base import Explanation, Input, Trace, explained, summed
from planner.explanations.model import describe_op, op_formula
from planner.graph import Part, part_runs
from planner.memory import (
    INSTANTS,
    MemoryBreakdown,
    cast_bytes,
    gathered_params,
    gathered_rates,
    kept_bytes,
    part_states,
    state_format,
    trained_params,
    transient_bytes,
    workspace_bytes,
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
    "cast_weights": "weights of matmuls in compute format, made in each microbatch and kept for its backward pass",
    "recompute_workspace": "arXiv:2205.05198 section 5: the block that is being recomputed keeps everything once",
    "gathered_weights": "arXiv:2304.11277 section 3.3: FSDP's gathered blocks, one in use and one prefetched, and full gradients",
    "temporaries": "the op that holds most while it runs",
}


_KEPT = ("activations", "logits", "cast_weights")


def explain_memory(trace: Trace, key: str) -> Explanation:
    """Any number under `memory` that is not in the table of short formulas."""
    match = _KEY.fullmatch(key)
    if match is None:
        return _whole_stage(trace, key)
    stage = int(match["stage"]) if match["stage"] else int(trace.memory.peak_stage)
    what, path = match["what"], match["path"] or ""
    if what in ("weights", "gradients", "optimizer", *_KEPT):
        return _lasting(trace, key, what, stage, path)
    if what == "gathered_weights":
        return _gathered(trace, key, stage)
    if what in ("recompute_workspace", "temporaries"):
        return _largest_part(trace, key, what, stage, path)
    return _constant(trace, key, what, stage)


def _instant(trace: Trace, stage: int) -> str:
    """When the stage holds most."""
    return INSTANTS[int(trace.memory.instant[stage])]


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
    graph = trace.graph
    if what == "communication_buffers" and stack.pipeline_keeps_outputs and graph.layout.pp > 1:
        inputs = [
            Input("collective_buffers_bytes", stack.collective_buffers, source),
            Input("num_microbatches", float(graph.num_microbatches), "their outputs are kept until the step ends"),
            Input("local_tokens", float(graph.shard.local_tokens), "micro_batch_size * seq_len / cp, over tp with sequence parallelism"),
            Input("hidden_size", graph.model.hidden_size, "model"),
            Input("compute_bytes", graph.numerics.compute_bytes, f"precision {graph.precision.name}"),
        ]
        formula = "collective_buffers_bytes + num_microbatches * local_tokens * hidden_size * compute_bytes"
        return explained(key, value, formula, inputs, source=f"stack {stack.name}: torch.distributed.pipelining keeps what stages send")
    return explained(key, value, f"{what}_bytes", [Input(f"{what}_bytes", value, source if value else "one device: none")], source=source)


def _runs(trace: Trace, what: str) -> np.ndarray[Any, Any]:
    """How often a device holds each part, [parts, pp]; activations of DualPipe's two slices share the microbatches."""
    if what in _KEPT:
        return np.asarray(worked_runs(trace.graph))
    return np.asarray(trace.schedule.resident(part_runs(trace.graph)))


def _in_flight(trace: Trace, stage: int, *, is_head: bool) -> float:
    layout, schedule = trace.graph.layout, trace.schedule
    count = schedule.head_in_flight if is_head else schedule.in_flight
    return float(count(layout.pp, layout.num_virtual_stages, trace.graph.num_microbatches)[..., stage])


def _held(trace: Trace, what: str, part: Part, stage: int) -> Input:
    """Microbatches whose tensors of a kind are alive when the stage holds most."""
    is_head = not part.is_block and what != "activations"
    in_flight, instant = _in_flight(trace, stage, is_head=is_head), _instant(trace, stage)
    origin = f"microbatches that schedule {trace.graph.layout.schedule} holds on stage {stage}"
    if instant == "update":
        return Input("in_flight", 0.0, "after the last backward pass: none")
    if instant in ("blocks", "reduce") and is_head:
        return Input("in_flight", max(in_flight - 1, 0.0), f"{origin}, without the one that has passed the head")
    return Input("in_flight", in_flight, origin)


def _kept_bytes(trace: Trace, what: str, part: Part) -> float:
    """Bytes that one run of a part keeps in one microbatch."""
    if what != "cast_weights":
        return float(kept_bytes(part, trace.graph, trace.job.stack)[what == "logits"])
    if part.is_block and trace.graph.workload.recompute != "none":
        return 0.0
    return float(sum(cast_bytes(cost, trace.graph, trace.job.stack) for cost in part.costs))


def _part_bytes(trace: Trace, what: str, part: Part, stage: int) -> float:
    """Bytes of one run of a part, or of a part that is cut down to one op."""
    if what in _KEPT:
        return _kept_bytes(trace, what, part) * float(_held(trace, what, part, stage).value or 0)
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
    """Weights, gradients, optimizer states and activations: sums over parts, then over ops."""
    runs = _runs(trace, what)
    if not path and trace.at(key) == 0:
        return explained(key, 0.0, "0", source=f"{_SOURCES[what]}; none when the stage holds most, at instant {_instant(trace, stage)}")
    if not path:
        parts = {p.name: runs[i][stage] * _part_bytes(trace, what, p, stage) for i, p in enumerate(trace.graph.parts)}
        keys = {name: f"{key}.{name}" for name in parts}
        if what == "gradients":
            rest = float(trace.at(key)) - sum(parts.values())
            parts["placeholders and buckets" if rest > 0 else "not yet made"] = rest
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
    if what == "cast_weights":
        held, each = _held(trace, what, part, stage), Input("cast_bytes", _kept_bytes(trace, what, only), f"weight of {describe_op(cost)}")
        value = num_runs * _part_bytes(trace, what, only, stage)
        return explained(key, value, "num_runs * in_flight * cast_bytes", [count, held, each], source=_SOURCES[what])
    if what in _KEPT:
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
        _held(trace, "activations", part, stage),
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
    held = _held(trace, "logits" if is_logits else "activations", part, stage)
    scale = float(count.value or 0) * float(held.value or 0)
    dropped = trace.job.stack.selective_recompute if trace.graph.workload.recompute == "selective" else []
    kept = {
        f"{producer}_bytes": float(n)
        for producer, n in cost.saved.items()
        if (producer == "logits") == is_logits and (is_logits or producer not in dropped)
    }
    formula = f"num_runs * in_flight * ({' + '.join(kept) or '0'})"
    inputs = [
        count,
        held,
        *(Input(name, n, f"saved by {describe_op(cost)}") for name, n in kept.items()),
    ]
    terms = {name: scale * n for name, n in kept.items()}
    value = float(count.value or 0) * _part_bytes(trace, "logits" if is_logits else "activations", part, stage)
    return explained(key, value, formula, inputs, terms=terms, source=op_formula(cost))


def _gathered(trace: Trace, key: str, stage: int) -> Explanation:
    """What FSDP holds beyond its shards: in whole parts by their parameters."""
    graph, value, instant = trace.graph, float(trace.at(key)), _instant(trace, stage)
    if value == 0:
        return explained(key, value, "0", source=f"{_SOURCES['gathered_weights']}; does not apply to this plan")
    rates = gathered_rates(graph, trace.job.stack)
    present = [part for part in graph.parts if part.counts[stage] > 0]
    on_stage = sum(float(gathered_params(part, graph)) * float(part.counts[stage]) for part in present)
    inputs = [
        Input("stage_params", on_stage, "of this stage"),
        Input("kept_bytes", float(rates.kept), "where weights stay gathered through the step"),
    ]
    if instant == "loss":
        first = float(gathered_params(graph.parts[0], graph)) if graph.parts[0].counts[stage] else 0.0
        inputs += [
            Input("head_params", float(gathered_params(graph.parts[-1], graph)), "of the head"),
            Input("head_bytes", float(rates.head), "gathered, and as it arrived"),
            Input("first_params", first, "of the embedding, where it lies on this stage"),
            Input("leaving_bytes", float(rates.leaving), "gradients of the microbatch before, on their way"),
        ]
        formula = "stage_params * kept_bytes + head_params * head_bytes + first_params * leaving_bytes"
    else:
        largest = max((float(gathered_params(part, graph)) for part in present if part is not graph.parts[-1]), default=0.0)
        inputs += [
            Input("largest_params", largest, "of the largest part but the head"),
            Input("largest_bytes", float(rates.block if instant == "blocks" else rates.reduce), "parts in use and arriving, gradients that leave"),
        ]
        formula = "stage_params * kept_bytes + largest_params * largest_bytes"
    return explained(key, value, formula, inputs, source=_SOURCES["gathered_weights"])


def _largest_part(trace: Trace, key: str, what: str, stage: int, path: str) -> Explanation:
    """Transients: of the parts on the stage the one that holds most counts."""
    graph, stack, value = trace.graph, trace.job.stack, trace.at(key.removesuffix(f".{path}") if path else key)
    if value == 0 and not path:
        return explained(key, value, "0", source=f"{_SOURCES[what]}; does not apply to this plan")
    at_loss = _instant(trace, stage) == "loss"
    present = [part for part in graph.parts if part.counts[stage] > 0 and (part is graph.parts[-1]) == at_loss]
    if what == "temporaries":
        costs = [(float(transient_bytes(cost, graph)), part, cost) for part in present for cost in part.costs]
        _, winner, worst = max(costs, key=lambda found: found[0])
        return _transient(trace, key, winner, worst)
    winner = max(present, key=lambda part: float(workspace_bytes(part, graph, stack)))
    if not path:
        terms = {cost.op.name: float(workspace_bytes(replace(winner, costs=(cost,)), graph, stack)) for cost in winner.costs}
        return summed(key, value, terms, {name: f"{key}.{winner.name}.{name}" for name in terms}, f"{_SOURCES[what]}: {winner.name}")
    _, part, cost, _ = trace.locate(key, path)
    cost = cost if cost is not None else part.costs[0]
    names = {f"{producer}_bytes": float(n) for producer, n in cost.saved.items()} if graph.workload.recompute == "full" else {}
    names["cast_bytes"] = float(cast_bytes(cost, graph, stack))
    inputs = [Input(name, n, f"of {describe_op(cost)}") for name, n in names.items()]
    return explained(key, sum(names.values()), " + ".join(names), inputs, terms=names, source=op_formula(cost))


def _transient(trace: Trace, key: str, part: Part, cost: OpCost) -> Explanation:
    """What one op holds while it runs."""
    graph, stack, held = trace.graph, trace.job.stack, float(transient_bytes(cost, trace.graph))
    value = held + stack.workspace_bytes
    workspace = [
        Input("workspace_bytes", float(cost.workspace_bytes), describe_op(cost)),
        Input("library_bytes", stack.workspace_bytes, f"stack {stack.name}: scratch memory of math libraries"),
    ]
    source = f"{_SOURCES['temporaries']}: {part.name}.{cost.op.name}"
    if cost.gemm is None or held == float(cost.workspace_bytes):
        return explained(key, value, "workspace_bytes + library_bytes", workspace, source=source)
    m, n, k = (float(size) for size in cost.gemm)
    groups = float(getattr(cost.op, "num_experts", 1)) / (float(graph.shard.ep) if cost.op.is_expert else 1.0)
    inputs = [
        *workspace, Input("m", m, describe_op(cost)), Input("num_groups", groups, "experts on one device, or 1"), Input("n", n, describe_op(cost)),
        Input("k", k, describe_op(cost)), Input("compute_bytes", graph.numerics.compute_bytes, f"precision {graph.precision.name}"),
    ]  # fmt: skip
    return explained(key, value, "workspace_bytes + library_bytes + m * num_groups * (n + k) * compute_bytes", inputs, source=source)
