"""Seconds of one kernel: FLOPs over the rate it reaches, or bytes over the bandwidth."""

from __future__ import annotations

from typing import Any

from planner.efficiency import EPILOGUE_K, MEMORY_RAMP_BYTES, QUANTIZED, Efficiency, Work
from planner.explanations._base import Explanation, Input, Trace, explained
from planner.explanations.model import describe_op
from planner.op_cost import OpCost
from planner.timing import work_seconds

__all__ = ["explain_kernel"]


def explain_kernel(trace: Trace, key: str, cost: OpCost, phase: str, kind: str) -> Explanation:
    """One kind of work of one run of an op in one pass: forward, backward_input or backward_weight."""
    efficiency, seq_len = trace.job.efficiency, trace.graph.seq_len
    is_flash = trace.graph.numerics.attention_kernel == "flash"
    work = getattr(efficiency, f"{phase}_work")(cost, seq_len, is_flash)
    c = efficiency.coefficients
    value = float(work_seconds(work, efficiency.rates, c.kernel_gap).get(kind, 0.0))
    if kind == "gaps":
        return _gaps(trace, key, work, value)
    rate = efficiency.rates[kind]
    if efficiency.curves is not None and efficiency.measured_work(cost, seq_len, is_flash, phase) is not None:  # type: ignore[arg-type]
        source = f"curve of {efficiency.curves.source} at this size"
        inputs = [Input("measured_s", float(work[kind]), f"{describe_op(cost)}: {source}"), _coefficient(efficiency, kind)]
        return explained(key, value, "measured_s / coefficient", inputs, source=source)
    if not value:
        return explained(key, 0.0, "0", source=f"{describe_op(cost)}: no such work in this pass")
    if cost.op.kind == "memory":
        moved = cost.forward_bytes if phase == "forward" else cost.backward_bytes
        formula, inputs = _memory(efficiency, float(moved), cost.num_kernels, describe_op(cost))
    elif cost.op.kind == "attention":
        formula, inputs = _attention(efficiency, cost, seq_len, is_flash, phase, kind)
    else:
        formula, inputs = _matmul(efficiency, cost, phase, kind)
    inputs.append(Input("coefficient", float(rate), _coefficient(efficiency, kind).source))
    return explained(key, value, f"({formula}) / coefficient", inputs, source="roofline; coefficients as their sources say")


def _coefficient(efficiency: Efficiency, kind: str) -> Input:
    """What divides a kind of work: `matmul` with the stack's rate of a narrow format."""
    names = [kind] if kind in ("attention", "memory") else ["matmul", *(["grouped_matmul"] if kind == "grouped_matmul" else [])]
    if efficiency.precision.name in QUANTIZED and kind in ("matmul", "grouped_matmul"):
        names.append(f"{efficiency.precision.name}_matmul")
    told = [(name, efficiency.stack.coefficient(name, efficiency.accelerator.id)) for name in names]
    source = "; times ".join(f"{name} {found.value:.4g}, {found.evidence}: {found.source}" for name, found in told)
    return Input("coefficient", float(efficiency.rates[kind]), source)


def _gaps(trace: Trace, key: str, work: Work, value: float) -> Explanation:
    gap = trace.job.stack.coefficient("kernel_gap", trace.job.cluster.accelerator.id)
    inputs = [
        Input("num_kernels", float(work.get("kernels", 0.0)), "kernels of the op"),
        Input("kernel_gap_s", gap.value, f"{gap.evidence}: {gap.source}"),
        Input("overhead_s", float(work.get("overhead", 0.0)), "measured host time of an op, where ops were measured one by one"),
    ]
    return explained(key, value, "num_kernels * kernel_gap_s + overhead_s", inputs, source="planner/coefficients.py kernel_gap")


def _memory(efficiency: Efficiency, num_bytes: float, num_kernels: float, source: str) -> tuple[str, list[Input]]:
    """The formula of `Efficiency.memory_s`; a matmul's own traffic counts as one kernel."""
    device = efficiency.accelerator
    inputs = [
        Input("num_bytes", num_bytes, source),
        Input("bytes_per_s", device.memory_bandwidth_bytes_per_s, f"{device.id} data sheet: {device.source}"),
        Input("num_kernels", num_kernels, source),
        Input("ramp_bytes", MEMORY_RAMP_BYTES if num_bytes > 0 else 0.0, "planner/efficiency.py MEMORY_RAMP_BYTES, assumed"),
    ]
    return "(num_bytes + num_kernels * ramp_bytes) / bytes_per_s", inputs


def _matmul(efficiency: Efficiency, cost: OpCost, phase: str, kind: str) -> tuple[str, list[Input]]:
    """The formula of `Efficiency.matmul_work`: compute, or memory and the cast of the input where the format is narrow."""
    m, n, k = (float(size) for size in cost.gemm or (0, 0, 0))
    if phase == "backward_input":
        n, k = k, n
    if phase == "backward_weight":
        m, k = k, m
    flops = float(getattr(cost, f"{phase}_flops"))
    moved = float(cost.forward_bytes) if phase == "forward" else float(cost.backward_bytes) / 2
    rate, fraction, device = efficiency.precision.matmul_rate, efficiency.best_matmul, efficiency.accelerator
    shape: Any = efficiency.shape_fraction(m, n, k)
    if kind == "memory":
        own = float(efficiency.matmul_work(flops, moved, (m, n, k))["memory"])
        conversion = float(efficiency.conversion_work(cost).get("memory", 0.0)) if phase != "backward_weight" else 0.0
        formula, inputs = _memory(efficiency, moved, 1, f"bytes take longer than FLOPs: {describe_op(cost)}") if own else ("", [])
        if conversion:
            inputs.append(Input("conversion_s", conversion, f"casting the input to {efficiency.precision.name}"))
            formula = f"{formula} + conversion_s" if formula else "conversion_s"
        return formula, inputs
    return "flops / (peak_flops_per_s * best_fraction * shape_fraction)", [
        Input("flops", flops, f"2 m n k per matrix, m {m:g}, n {n:g}, k {k:g}: {describe_op(cost)}"),
        Input("peak_flops_per_s", efficiency.peak_flops_per_s(rate), f"dense {rate} of {device.id}: {device.source}"),
        Input("best_fraction", fraction.value, f"{fraction.evidence}: {fraction.source}"),
        Input("shape_fraction", float(shape), f"tiles that m {m:g}, n {n:g} fill, prologue of k {k:g}: planner/efficiency.py, assumed"),
    ]


def _attention(efficiency: Efficiency, cost: OpCost, seq_len: int, is_flash: bool, phase: str, kind: str) -> tuple[str, list[Input]]:
    """The formula of `Efficiency.attention_work`."""
    op: Any = cost.op
    way = "forward" if phase == "forward" else "backward"
    flops, moved = float(getattr(cost, f"{phase}_flops")), float(getattr(cost, f"{way}_bytes"))
    if kind == "memory":
        return _memory(efficiency, moved, 1 if is_flash else 3, describe_op(cost))
    rate, device = efficiency.precision.attention_rate, efficiency.accelerator
    inputs = [
        Input("flops", flops, f"pairs that the kernel computes: {describe_op(cost)}"),
        Input("peak_flops_per_s", efficiency.peak_flops_per_s(rate), f"dense {rate} of {device.id}: {device.source}"),
    ]
    if not is_flash:
        fraction = efficiency.best_matmul
        inputs += [
            Input("best_fraction", fraction.value, f"{fraction.evidence}: {fraction.source}"),
            Input("head_dim", op.head_dim, describe_op(cost)),
            Input("epilogue_k", EPILOGUE_K, "planner/efficiency.py EPILOGUE_K, assumed"),
        ]
        return "flops / (peak_flops_per_s * best_fraction * head_dim / (head_dim + epilogue_k))", inputs
    reached, source = efficiency.attention_fraction(op, seq_len, way)
    return "flops / (peak_flops_per_s * kernel_fraction)", [*inputs, Input("kernel_fraction", float(reached), source)]
