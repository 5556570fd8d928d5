"""Parameters and FLOPs: of the model, of its parts, of one op."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from typing import Any

from planner.architectures import model_ops
from planner.assemble import counted_flops_per_token, hardware_flops_per_token, repeated_flops
from planner.attention_op import Attention
from planner.explanations._base import Explanation, Input, Trace, explained, look_up, part_keys, summed
from planner.graph import sum_model_flops, sum_params, whole_model
from planner.op_cost import Numerics, OpCost
from planner.ops import GroupedLinear

__all__ = ["describe_op", "explain_flops", "explain_hardware_flops", "explain_params", "forward_flops_formula"]

_SKIPPED = ("name", "kind", "is_expert")


def describe_op(cost: OpCost) -> str:
    """The op's class and what of it is not the default: `Linear in_features=4096, out_features=14336`."""
    op: Any = cost.op
    said = {f.name: getattr(op, f.name) for f in fields(op) if f.name not in _SKIPPED and getattr(op, f.name) != f.default}
    return f"{type(op).__name__} {', '.join(f'{name}={value}' for name, value in said.items())}".rstrip()


def op_formula(cost: OpCost) -> str:
    """What the op's documentation says that it computes."""
    text = inspect.getdoc(type(cost.op)) or ""
    return " ".join(text.split("\n\n")[0].split())


def forward_flops_formula(cost: OpCost, numerics: Numerics, seq_len: float, tokens: float) -> tuple[str, list[Input]]:
    """(formula, inputs) of the forward FLOPs over all attention pairs of one run; adapters and uneven experts are a plain number."""
    source = describe_op(cost)
    op: Any = cost.op
    if cost.gemm is not None and numerics.lora_rank == 0 and numerics.expert_imbalance == 1:
        m, n, k = (float(size) for size in cost.gemm)
        inputs = [Input("m", m, f"rows: {source}"), Input("n", n, f"columns: {source}"), Input("k", k, f"inner length: {source}")]
        if cost.num_gemms == 1:
            return "2 * m * n * k", inputs
        origin = "experts on one device" if isinstance(op, GroupedLinear) else "chunks of its rows"
        return "2 * m * n * k * num_groups", [*inputs, Input("num_groups", float(cost.num_gemms), origin)]
    if isinstance(op, Attention):
        heads = float(cost.model_forward_flops) / (2 * tokens * seq_len * (op.head_dim + op.v_head_dim))
        names = {"tokens": tokens, "seq_len": seq_len, "num_heads": heads, "head_dim": op.head_dim, "v_head_dim": op.v_head_dim}
        return "2 * tokens * seq_len * num_heads * (head_dim + v_head_dim)", [Input(name, value, source) for name, value in names.items()]
    return "forward_flops", [Input("forward_flops", float(cost.model_forward_flops), source)]


def _counted(trace: Trace, seq_len: int, numerics: Numerics) -> list[tuple[str, float, OpCost]]:
    """`whole_model` with the part names of keys."""
    listed = model_ops(trace.job.model)
    names = part_keys([name for name, _ in listed.blocks])
    blocks = tuple((name, ops) for name, (_, ops) in zip(names, listed.blocks, strict=True))
    return whole_model(replace(listed, blocks=blocks), seq_len, numerics)


def explain_params(trace: Trace, key: str) -> Explanation:
    """params.total, params.total.block, params.total.block.attention.q."""
    _, quantity, *rest = key.split(".")
    path = ".".join(rest)
    counted = _counted(trace, 1, Numerics())
    parts = list(dict.fromkeys(part for part, _, _ in counted))
    source = "sum over the model's ops, which are checked against the real modules"
    if not path:
        terms = {part: sum_params([c for c in counted if c[0] == part])[quantity] for part in parts}
        return summed(key, trace.at(key), terms, {part: f"{key}.{part}" for part in parts}, source)
    part, op_path = look_up(key, path, parts)
    own = {cost.op.name: (part, count, cost) for name, count, cost in counted if name == part}
    if not op_path:
        terms = {name: sum_params([entry])[quantity] for name, entry in own.items()}
        return summed(key, sum(terms.values()), terms, {name: f"{key}.{name}" for name in own}, source)
    entry = own[look_up(key, op_path, list(own))[0]]
    value = sum_params([entry])[quantity]
    _, count, cost = entry
    each = Input("params_each", value / count, describe_op(cost))
    return explained(key, value, "count * params_each", [Input("count", count, f"{part} in the model"), each], source=op_formula(cost))


def explain_flops(trace: Trace, key: str) -> Explanation:
    """flops.model_per_token and model_per_token_causal, by part and op."""
    _, quantity, *rest = key.split(".")
    convention, path = ("causal" if quantity.endswith("causal") else "full"), ".".join(rest)
    seq_len = trace.job.seq_len
    counted = _counted(trace, seq_len, trace.job.numerics)
    parts = list(dict.fromkeys(part for part, _, _ in counted))
    source = "forward once, backward twice (arXiv:2204.02311 appendix B); frozen weights have no gradient; lookups and elementwise ops count nothing"
    if not path:
        terms = {part: sum_model_flops([c for c in counted if c[0] == part], seq_len)[convention] for part in parts}
        return summed(key, trace.at(key), terms, {part: f"{key}.{part}" for part in parts}, source)
    part, op_path = look_up(key, path, parts)
    own = {cost.op.name: (part, count, cost) for name, count, cost in counted if name == part}
    if not op_path:
        terms = {name: sum_model_flops([entry], seq_len)[convention] for name, entry in own.items()}
        return summed(key, sum(terms.values()), terms, {name: f"{key}.{name}" for name in own}, source)
    entry = own[look_up(key, op_path, list(own))[0]]
    value = sum_model_flops([entry], seq_len)[convention]
    _, count, cost = entry
    forward, inputs = forward_flops_formula(cost, trace.job.numerics, seq_len, seq_len)
    inputs = [*inputs, Input("count", count, f"{part} in the model")]
    if not any(i.name == "seq_len" for i in inputs):
        inputs.append(Input("seq_len", seq_len, "explain inputs.workload.seq_len"))
    if isinstance(cost.op, Attention):
        formula = f"3 * count * {forward} / seq_len"
        if convention == "causal":
            formula += " * pairs_fraction"
            inputs.append(Input("pairs_fraction", cost.op.pairs_fraction(seq_len), "share of the pairs that the mask leaves"))
    else:
        formula = f"count * (2 * {forward} + weight_gradient_flops) / seq_len"
        inputs.append(Input("weight_gradient_flops", float(cost.backward_weight_flops), "as forward; 0 where the weight is frozen"))
    return explained(key, value, formula, inputs, source=op_formula(cost))


def explain_hardware_flops(trace: Trace, key: str) -> Explanation:
    """flops.hardware_per_token and flops.counted_per_token, by part and op."""
    is_counted = key.startswith("flops.counted_per_token")
    path = key.removeprefix("flops.counted_per_token" if is_counted else "flops.hardware_per_token").removeprefix(".")
    job, graph = trace.job, trace.graph
    source = "FLOPs as executed on all devices that share a microbatch, recompute included: "
    source += "attention over all pairs" if is_counted else "masked blocks skipped where the kernel skips them"
    flops_per_token = counted_flops_per_token if is_counted else hardware_flops_per_token
    if not path:
        terms = {part.name: sum(flops_per_token(job, graph, part)) for part in graph.parts}
        return summed(key, trace.at(key), terms, {name: f"{key}.{name}" for name in terms}, source)
    _, part, found, _ = trace.locate(key, path)
    names = [cost.op.name for cost in part.costs]
    terms = dict(zip(names, flops_per_token(job, graph, part), strict=True))
    if found is None:
        return summed(key, sum(terms.values()), terms, {name: f"{key}.{name}" for name in terms}, source)
    again = dict(zip(names, repeated_flops(job, graph, part), strict=True))[found.op.name]
    values = {
        "num_runs": (float(part.counts.sum()), f"{part.name} on all stages"),
        "forward_flops": (float(found.forward_flops), describe_op(found)),
        "backward_input_flops": (float(found.backward_input_flops), describe_op(found)),
        "backward_weight_flops": (float(found.backward_weight_flops), describe_op(found)),
        "repeated_flops": (again, f"recompute {job.workload.recompute}"),
        "tp": (graph.layout.tp, "explain inputs.layout.tp"),
        "cp": (graph.layout.cp, "explain inputs.layout.cp"),
        "tokens": (graph.layout.micro_batch_size * graph.seq_len, "micro_batch_size * seq_len"),
    }
    formula = "num_runs * (forward_flops + backward_input_flops + backward_weight_flops + repeated_flops) * tp * cp / tokens"
    inputs = [Input(name, value, origin) for name, (value, origin) in values.items()]
    if is_counted and isinstance(found.op, Attention):
        formula += " * all_pairs"
        inputs.append(Input("all_pairs", float(found.model_forward_flops / found.forward_flops), "all pairs over those that the kernel computes"))
    return explained(key, terms[found.op.name], formula, inputs, source=op_formula(found))
