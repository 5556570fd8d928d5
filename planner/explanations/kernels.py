"""Seconds of one kernel: FLOPs over the rate it reaches, or bytes over the bandwidth."""

from __future__ import annotations

from typing import Any

from planner.efficiency import EPILOGUE_K, MEMORY_RAMP_BYTES, Efficiency
from planner.explanations._base import Explanation, Input, Trace, explained
from planner.explanations.model import describe_op
from planner.op_cost import OpCost

__all__ = ["explain_kernel"]


def explain_kernel(trace: Trace, key: str, cost: OpCost, phase: str) -> Explanation:
    """One run of an op in one pass: forward, backward_input or backward_weight."""
    efficiency, seq_len = trace.job.efficiency, trace.graph.seq_len
    is_flash = trace.graph.numerics.attention_kernel == "flash"
    value = getattr(efficiency, f"{phase}_s")(cost, seq_len, is_flash)
    measured = efficiency.measured_s(cost, seq_len, is_flash, phase)  # type: ignore[arg-type]
    if measured is not None and efficiency.curves is not None and not (phase == "backward_weight" and cost.gemm is None):
        curves = efficiency.curves
        source = f"curve of {curves.source} at this size, over the coefficient of stack {efficiency.stack.name}"
        inputs = [Input("measured_s", float(value), f"{describe_op(cost)}: {source}; {curves.op_overhead_s:.1e} s of host time included")]
        return explained(key, value, "measured_s", inputs, source=source)
    if cost.op.kind == "attention":
        formula, inputs = _attention(efficiency, cost, seq_len, is_flash, phase)
    elif cost.gemm is not None:
        formula, inputs = _matmul(efficiency, cost, phase)
    else:
        moved = cost.forward_bytes if phase == "forward" else cost.backward_bytes
        formula, inputs = _memory(efficiency, float(moved), cost.num_kernels, describe_op(cost))
    if phase == "backward_weight" and cost.gemm is None:
        formula, inputs = "0", []
    return explained(key, value, formula, inputs, source="roofline; coefficients as their sources say")


def _memory(efficiency: Efficiency, num_bytes: float, num_kernels: float, source: str) -> tuple[str, list[Input]]:
    """The formula of `Efficiency.memory_s`; a matmul's own traffic counts as one kernel."""
    device, stack = efficiency.accelerator, efficiency.stack
    bandwidth = device.memory_bandwidth_bytes_per_s * stack.memory.value
    inputs = [
        Input("num_bytes", num_bytes, source),
        Input("bytes_per_s", bandwidth, f"{device.id} data sheet times {stack.memory.value}: {stack.memory.source}"),
        Input("num_kernels", num_kernels, source),
    ]
    if num_kernels == 0:
        return "num_bytes / bytes_per_s", inputs
    inputs += [
        Input("ramp_bytes", MEMORY_RAMP_BYTES if num_bytes > 0 else 0.0, "planner/efficiency.py MEMORY_RAMP_BYTES, assumed"),
        Input("kernel_overhead_s", stack.kernel_overhead, f"stack {stack.name}"),
    ]
    return "max((num_bytes + num_kernels * ramp_bytes) / bytes_per_s, num_kernels * kernel_overhead_s)", inputs


def _matmul(efficiency: Efficiency, cost: OpCost, phase: str) -> tuple[str, list[Input]]:
    """The formula of `Efficiency.matmul_s`, with the cast of the input where the format is narrow."""
    m, n, k = (float(size) for size in cost.gemm or (0, 0, 0))
    if phase == "backward_input":
        n, k = k, n
    if phase == "backward_weight":
        m, k = k, m
    flops = float(getattr(cost, f"{phase}_flops"))
    moved = float(cost.forward_bytes) if phase == "forward" else float(cost.backward_bytes) / 2
    rate, fraction = efficiency.precision.matmul_rate, efficiency.matmul_peak_fraction
    device = efficiency.accelerator
    roof, memory_inputs = _memory(efficiency, moved, 1, describe_op(cost))
    shape: Any = efficiency.shape_fraction(m, n, k)
    inputs = [
        Input("flops", flops, f"2 m n k per matrix, m {m:g}, n {n:g}, k {k:g}: {describe_op(cost)}"),
        Input("peak_flops_per_s", efficiency.peak_flops_per_s(rate), f"dense {rate} of {device.id}: {device.source}"),
        Input("matmul_fraction", fraction.value, f"{fraction.evidence}: {fraction.source}"),
        Input("shape_fraction", float(shape), f"tiles that m {m:g}, n {n:g} fill, prologue of k {k:g}: planner/efficiency.py, assumed"),
    ]
    speed = "peak_flops_per_s * matmul_fraction * shape_fraction"
    if cost.op.kind == "grouped_matmul":
        grouped = efficiency.stack.grouped_matmul
        inputs.append(Input("grouped_fraction", grouped.value, f"{grouped.evidence}: {grouped.source}"))
        speed += " * grouped_fraction"
    formula = f"max(flops / ({speed}), {roof})"
    conversion = float(efficiency.conversion_s(cost)) if phase != "backward_weight" else 0.0
    if conversion:
        inputs.append(Input("conversion_s", conversion, f"casting the input to {efficiency.precision.name}"))
        formula += " + conversion_s"
    return formula, [*inputs, *memory_inputs]


def _attention(efficiency: Efficiency, cost: OpCost, seq_len: int, is_flash: bool, phase: str) -> tuple[str, list[Input]]:
    """The formula of `Efficiency.attention_s`."""
    op: Any = cost.op
    way = "forward" if phase == "forward" else "backward"
    flops, moved = float(getattr(cost, f"{phase}_flops")), float(getattr(cost, f"{way}_bytes"))
    rate, device, factor = efficiency.precision.attention_rate, efficiency.accelerator, efficiency.stack.attention
    roof, memory_inputs = _memory(efficiency, moved, 1 if is_flash else 3, describe_op(cost))
    inputs = [
        Input("flops", flops, f"pairs that the kernel computes: {describe_op(cost)}"),
        Input("peak_flops_per_s", efficiency.peak_flops_per_s(rate), f"dense {rate} of {device.id}: {device.source}"),
    ]
    if not is_flash:
        fraction = efficiency.matmul_peak_fraction
        inputs += [
            Input("matmul_fraction", fraction.value, f"{fraction.evidence}: {fraction.source}"),
            Input("head_dim", op.head_dim, describe_op(cost)),
            Input("epilogue_k", EPILOGUE_K, "planner/efficiency.py EPILOGUE_K, assumed"),
        ]
        return f"flops / (peak_flops_per_s * matmul_fraction * head_dim / (head_dim + epilogue_k)) + {roof}", [*inputs, *memory_inputs]
    reached, source = efficiency.attention_fraction(op, seq_len, way)
    inputs += [Input("kernel_fraction", float(reached), source), Input("attention_fraction", factor.value, f"{factor.evidence}: {factor.source}")]
    return f"max(flops / (peak_flops_per_s * kernel_fraction * attention_fraction), {roof})", [*inputs, *memory_inputs]
