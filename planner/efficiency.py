"""How fast a software stack runs an op of a given kind and size on a given accelerator.

In: a stack file (`data/stacks/*.yaml`), the attention curves (`data/attention_kernels.yaml`), an accelerator.
Out: an `Efficiency` whose methods turn FLOPs, bytes and sizes into seconds, for numbers and arrays alike. Every
coefficient carries its evidence: measured, fitted or assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from planner.curves import Curve, DeviceCurves
from planner.errors import InputError
from planner.files import DATA_DIR, read_yaml
from planner.hardware import Accelerator
from planner.loss_op import Loss
from planner.op_cost import Op, OpCost
from planner.ops import Embedding, Norm
from planner.precision import Precision
from planner.stack import Coefficient, Evidence, StackSpec

__all__ = ["Efficiency", "op_class"]

Array = Any

UNMEASURED_MATMUL_FRACTION = 0.70
"""Best matmul rate over peak where nobody published one; the published ones span 0.51 to 0.97."""
EPILOGUE_K = 96
"""Inner length whose time a tile spends on prologue and epilogue; assumed."""
TILES = ((256, 128, 1.0), (128, 128, 0.94), (64, 128, 0.80))
"""Output tiles a matmul library chooses from, with the rate each reaches when it fills the device; assumed."""
MEMORY_RAMP_BYTES = 2e6
"""Bytes whose transfer time equals a memory-bound kernel's ramp up and down; assumed, gives 0.83 of the plateau at 10 MB."""


Phase = Literal["forward", "backward_input", "backward_weight"]


def op_class(op: Op) -> str:
    """The key under which a memory-bound op is measured."""
    if isinstance(op, Norm):
        return "rmsnorm" if op.is_rms else "layernorm"
    if isinstance(op, Loss):
        return "loss"
    if isinstance(op, Embedding):
        return "embedding"
    last = op.name.rsplit(".", 1)[-1]
    if last == "activation":
        return "gated_activation" if getattr(op, "num_between", 0.0) else "activation"
    return last if last in ("rope", "permute", "unpermute") else "residual"


def _nearest_head_dim(curves: dict[str, Curve], prefix: str, head_dim: int) -> tuple[Curve, int] | None:
    sizes = [int(key.rsplit("/", 1)[1]) for key in curves if key.startswith(prefix + "/")]
    if not sizes:
        return None
    best = min(sizes, key=lambda size: abs(size - head_dim))
    return curves[f"{prefix}/{best}"], best


@lru_cache(maxsize=1)
def _attention_curves() -> list[dict[str, Any]]:
    curves: list[dict[str, Any]] = read_yaml(DATA_DIR / "attention_kernels.yaml")["curves"]
    return curves


@dataclass(frozen=True)
class AttentionCurve:
    """Achieved share of peak against sequence length, for one head size and mask."""

    seq_lens: tuple[float, ...]
    fractions: tuple[float, ...]
    evidence: Evidence
    source: str

    def fraction(self, seq_len: Array) -> Array:
        """Interpolated in log2 of the sequence length, flat outside the table."""
        return np.interp(np.log2(seq_len), np.log2(self.seq_lens), self.fractions)


def _attention_curve(library: str, accelerator: Accelerator, head_dim: int, is_causal: bool, phase: str) -> AttentionCurve:
    """The published curve nearest to what runs: same library and device family, then nearest head size."""
    curves = [c for c in _attention_curves() if c["library"] == library and c["phase"] in (phase, "both")]
    if not curves:
        raise InputError.single(
            "stack.attention_library",
            library,
            "must be a library of data/attention_kernels.yaml",
            f"use one of {sorted({c['library'] for c in _attention_curves()})}",
        )
    here = [c for c in curves if any(fnmatch(accelerator.id, pattern) for pattern in c["accelerators"])] or curves[-1:]
    best = min(here, key=lambda c: (abs(c["head_dim"] - head_dim), c["causal"] != is_causal))
    return AttentionCurve(tuple(map(float, best["seq_lens"])), tuple(map(float, best["fractions"])), best["evidence"], best["source"])


@dataclass(frozen=True)
class Efficiency:
    """Seconds of ops for one (stack, accelerator, precision)."""

    stack: StackSpec
    accelerator: Accelerator
    precision: Precision

    def peak_flops_per_s(self, rate: str) -> float:
        """Dense peak of the catalog for a precision.

        Raises:
            InputError: the accelerator has no (known) rate for it.
        """
        rates = self.accelerator.dense_flops_per_s
        if rate not in rates:
            known = ", ".join(rates) or "none"
            raise InputError.single(
                "workload.precision",
                rate,
                f"{self.accelerator.id} has no known dense rate for it",
                f"use one of its rates ({known}), or add the rate with --catalog",
            )
        return rates[rate]

    @property
    def matmul_peak_fraction(self) -> Coefficient:
        """Rate of a large, well-shaped matmul in a training step over the dense peak."""
        fitted = self.stack.matmul_per_device.get(self.accelerator.id)
        if fitted is not None:
            return fitted
        measured = self.accelerator.matmul_max_fraction
        rate = self.precision.matmul_rate
        best = measured.get(rate, measured.get("bf16", UNMEASURED_MATMUL_FRACTION))
        is_measured = rate in measured
        origin = (
            f"best matmul measured alone {best:.3f} of peak"
            if is_measured
            else f"no measurement for {rate} on {self.accelerator.id}: {best:.3f} assumed"
        )
        evidence: Evidence = self.stack.matmul.evidence if is_measured else "assumed"
        return Coefficient(
            value=best * self.stack.matmul.value, evidence=evidence, source=f"{origin}; times {self.stack.matmul.value} ({self.stack.matmul.source})"
        )

    def shape_fraction(self, m: Array, n: Array, k: Array) -> Array:
        """Share of the large-matmul rate that an [m, k] x [k, n] product reaches.

        Formula: best over tiles of rate * waves_needed / waves_run, times k / (k + EPILOGUE_K); devices without known compute
        units (TPUs) pad n and k to 128 instead.
        """
        units = self.accelerator.num_compute_units
        inner = k / (k + EPILOGUE_K)
        if units is None or self.accelerator.kind != "gpu":
            return inner * (n / (np.ceil(n / 128) * 128)) * (k / (np.ceil(k / 128) * 128))
        best: Array = 0.0
        for tile_m, tile_n, rate in TILES:
            exact = (m / tile_m) * (n / tile_n)
            waves = np.ceil(np.ceil(m / tile_m) * np.ceil(n / tile_n) / units)
            best = np.maximum(best, rate * exact / (waves * units))
        return inner * best

    def matmul_s(self, flops: Array, num_bytes: Array, gemm: tuple[Array, Array, Array], is_grouped: bool = False) -> Array:
        """max(compute, memory) of one matmul; FLOPs as executed."""
        peak = self.peak_flops_per_s(self.precision.matmul_rate) * self.matmul_peak_fraction.value
        peak *= self.stack.grouped_matmul.value if is_grouped else 1.0
        return np.maximum(flops / (peak * self.shape_fraction(*gemm)), self.memory_s(num_bytes, 1))

    def memory_s(self, num_bytes: Array, num_kernels: float) -> Array:
        """Seconds of memory-bound kernels that move `num_bytes` in all."""
        bandwidth = self.accelerator.memory_bandwidth_bytes_per_s * self.stack.memory.value
        if num_kernels == 0:
            return num_bytes / bandwidth
        return np.maximum((num_bytes + num_kernels * MEMORY_RAMP_BYTES * (num_bytes > 0)) / bandwidth, num_kernels * self.stack.kernel_overhead)

    def attention_s(self, op: Any, seq_len: int, flops: Array, num_bytes: Array, is_flash: bool, phase: str) -> Array:
        """Seconds of the attention kernel, forward or backward."""
        if not is_flash:
            # Batched matmuls per head, then softmax (and dropout) over all pairs: two kinds of kernels one after the other.
            gemm = (float(seq_len), float(seq_len), float(op.head_dim))
            peak = self.peak_flops_per_s(self.precision.attention_rate) * self.matmul_peak_fraction.value
            return flops / (peak * gemm[2] / (gemm[2] + EPILOGUE_K)) + self.memory_s(num_bytes, 3)
        peak = self.peak_flops_per_s(self.precision.attention_rate)
        reached, _ = self.attention_fraction(op, seq_len, phase)
        return np.maximum(flops / (peak * reached * self.stack.attention.value), self.memory_s(num_bytes, 1))

    def attention_fraction(self, op: Any, seq_len: int, phase: str) -> tuple[Array, str]:
        """(share of peak that the published kernel reaches, its source)."""
        curve = _attention_curve(self.stack.attention_library, self.accelerator, op.head_dim, op.is_causal, phase)
        # A window leaves bands of the matrix: the kernel runs as on sequences of twice the window.
        effective = min(seq_len, 2 * op.window) if op.window else seq_len
        return curve.fraction(effective), f"{curve.source} ({curve.evidence})"

    @property
    def curves(self) -> DeviceCurves | None:
        """What was measured op by op on this very device under this stack."""
        return self.stack.measured.get(self.accelerator.id)

    def measured_s(self, cost: OpCost, seq_len: int, is_flash: bool, phase: Phase) -> Array | None:
        """Seconds of one op from its curve, with its host time; None where nothing was measured."""
        alone = self._alone_s(cost, seq_len, is_flash, phase)
        if alone is None or self.curves is None or phase == "backward_weight":
            return alone
        return alone + self.curves.op_overhead_s

    def _alone_s(self, cost: OpCost, seq_len: int, is_flash: bool, phase: Phase) -> Array | None:
        curves, precision = self.curves, self.precision.name
        if curves is None:
            return None
        kind = cost.op.kind
        if kind == "attention" and is_flash:
            op: Any = cost.op
            found = _nearest_head_dim(curves.attention, f"{'forward' if phase == 'forward' else 'backward'}/{precision}", op.head_dim)
            if found is None:
                return None
            curve, head_dim = found
            width = op.head_dim + op.v_head_dim
            num_heads = cost.model_forward_flops / (2.0 * seq_len * seq_len * width)
            mask = 1.0 if op.is_causal else 2.0  # measured with a causal mask
            return num_heads * curve.at(seq_len) * width / (2.0 * head_dim) * mask / self.stack.attention.value
        if cost.gemm is not None:
            grid = curves.matmul.get(f"{phase}/{precision}")
            return None if grid is None else grid.at(*cost.gemm) * cost.num_gemms / self.stack.matmul.value
        curve_of_op = curves.ops.get(f"{op_class(cost.op)}/{phase}/{precision}")
        if curve_of_op is None:
            return None
        num_bytes = cost.forward_bytes if phase == "forward" else cost.backward_bytes
        return np.where(np.asarray(num_bytes) > 0, curve_of_op.at(num_bytes), 0.0) / self.stack.memory.value

    def weight_handling_s(self, trained_params: Array, num_microbatches: Array) -> tuple[Array, Array]:
        """(casts of weights for the forward pass, casts and sums of their gradients) per microbatch, where they were measured."""
        curves = self.curves
        if curves is None:
            return 0.0, 0.0
        num_bytes, zero = 4.0 * trained_params, 0.0 * trained_params
        is_mixed = self.precision.needs_master_weights
        casts = [curves.ops[key].at(num_bytes) if is_mixed and key in curves.ops else zero for key in ("cast/forward", "cast/backward")]
        adds = curves.ops["accumulate"].at(num_bytes) * (1 - 1 / num_microbatches) if "accumulate" in curves.ops else zero
        is_trained = np.asarray(trained_params) > 0
        value = self.stack.memory.value
        return np.where(is_trained, casts[0], 0.0) / value, np.where(is_trained, casts[1] + adds, 0.0) / value

    def optimizer_s(self, name: str, num_bytes: Array) -> Array:
        """Seconds of one optimizer step that moves `num_bytes`, the norm of the gradients and other work of a step included."""
        curves = self.curves
        curve = None if curves is None else curves.ops.get(f"optimizer/{name}")
        if curves is None or curve is None:
            return self.memory_s(num_bytes, 0)
        return curve.at(num_bytes) / self.stack.memory.value + curves.step_overhead_s

    def forward_s(self, cost: OpCost, seq_len: int, is_flash: bool) -> Array:
        """Seconds of one op in the forward pass."""
        measured = self.measured_s(cost, seq_len, is_flash, "forward")
        if measured is not None:
            return measured
        kind = cost.op.kind
        if kind == "attention":
            return self.attention_s(cost.op, seq_len, cost.forward_flops, cost.forward_bytes, is_flash, "forward")
        if cost.gemm is not None:
            return self.matmul_s(cost.forward_flops, cost.forward_bytes, cost.gemm, kind == "grouped_matmul") + self.conversion_s(cost)
        return self.memory_s(cost.forward_bytes, cost.num_kernels)

    def backward_input_s(self, cost: OpCost, seq_len: int, is_flash: bool) -> Array:
        """Seconds of one op in the backward pass, without the weight gradients of matmuls."""
        measured = self.measured_s(cost, seq_len, is_flash, "backward_input")
        if measured is not None:
            return measured
        kind = cost.op.kind
        if kind == "attention":
            return self.attention_s(cost.op, seq_len, cost.backward_input_flops, cost.backward_bytes, is_flash, "backward")
        if cost.gemm is not None:
            m, n, k = cost.gemm
            return self.matmul_s(cost.backward_input_flops, cost.backward_bytes / 2, (m, k, n), kind == "grouped_matmul") + self.conversion_s(cost)
        return self.memory_s(cost.backward_bytes, cost.num_kernels)

    def backward_weight_s(self, cost: OpCost, seq_len: int, is_flash: bool) -> Array:
        """Seconds of the weight gradients of one matmul; 0 for other ops."""
        if cost.gemm is None:
            return 0.0
        measured = self.measured_s(cost, seq_len, is_flash, "backward_weight")
        if measured is not None:
            return measured
        m, n, k = cost.gemm
        return self.matmul_s(cost.backward_weight_flops, cost.backward_bytes / 2, (k, n, m), cost.op.kind == "grouped_matmul")

    def conversion_s(self, cost: OpCost) -> Array:
        """Casting a matmul's input to a narrow format: read in the compute format, write narrow."""
        if not self.precision.is_quantized or cost.gemm is None:
            return 0.0
        m, _, k = cost.gemm
        return self.memory_s(m * k * cost.num_gemms * (self.precision.compute_bytes + self.precision.saved_matmul_bytes), 1)
