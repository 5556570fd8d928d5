"""How fast a software stack runs an op of a given kind and size on a given accelerator.

In: a stack file (`data/stacks/*.yaml`), the attention curves (`data/attention_kernels.yaml`), an accelerator.
Out: an `Efficiency` whose methods turn FLOPs, bytes and sizes into `Work`: seconds at full rates, for numbers and arrays alike,
which the stack's coefficients then divide. Every coefficient carries its evidence: measured, fitted or assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from planner.coefficients import Coefficients
from planner.curves import Curve, DeviceCurves
from planner.errors import InputError
from planner.files import DATA_DIR, read_yaml
from planner.hardware import Accelerator
from planner.loss_op import Loss
from planner.op_cost import Op, OpCost
from planner.ops import Embedding, Norm
from planner.precision import Precision
from planner.stack import Coefficient, Evidence, StackSpec

__all__ = ["Efficiency", "Work", "add_work", "format_code", "op_class", "work_rates"]

Array = Any

UNMEASURED_MATMUL_FRACTION = 0.70
"""Best matmul rate over peak where nobody published one; the published ones span 0.51 to 0.97."""
EPILOGUE_K = 96
"""Inner length whose time a tile spends on prologue and epilogue; assumed."""
TILES = ((256, 128, 1.0), (128, 128, 0.94), (64, 128, 0.80))
"""Output tiles a matmul library chooses from, with the rate each reaches when it fills the device; assumed."""
ALIGNED_ELEMENTS = 64
UNALIGNED_FRACTION = 0.85
"""Rate of matmuls whose weight's dims are no multiples of 128 bytes; NVIDIA's guide asks for them (arXiv:2401.14489), the loss is assumed."""
MEMORY_RAMP_BYTES = 2e6
"""Bytes whose transfer time equals a memory-bound kernel's ramp up and down; assumed, gives 0.83 of the plateau at 10 MB."""


Phase = Literal["forward", "backward_input", "backward_weight"]
Work = dict[str, Array]
"""Seconds at full rates by the coefficient that divides them (`matmul`, `grouped_matmul`, `attention`, `memory`), number of `kernels`, and
seconds of measured `overhead` that nothing divides."""
QUANTIZED = ("fp8", "mxfp8", "nvfp4")


def add_work(*works: Work) -> Work:
    """Their sum.

    Example:
        >>> add_work({"memory": 1.0}, {"memory": 2.0, "kernels": 3.0})
        {'memory': 3.0, 'kernels': 3.0}
    """
    total: Work = {}
    for work in works:
        for kind, amount in work.items():
            total[kind] = total[kind] + amount if kind in total else amount
    return total


def format_code(precision: str) -> int:
    """Place of a narrow format among `QUANTIZED`, from 1; 0 for the others."""
    return QUANTIZED.index(precision) + 1 if precision in QUANTIZED else 0


def work_rates(coefficients: Coefficients, code: Array) -> dict[str, Array]:
    """Coefficient that divides each kind of work; `code`: see `format_code`."""
    narrow = [getattr(coefficients, f"{name}_matmul") for name in QUANTIZED]
    factor = np.choose(code, [1.0, *narrow]) if np.ndim(code) else [1.0, *narrow][int(code)]
    matmul = coefficients.matmul * factor
    return {
        "matmul": matmul, "grouped_matmul": matmul * coefficients.grouped_matmul, "attention": coefficients.attention,
        "memory": coefficients.memory,
    }  # fmt: skip


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
    def coefficients(self) -> Coefficients:
        """What the stack reaches on this accelerator."""
        return self.stack.coefficients_on(self.accelerator.id)

    @property
    def best_matmul(self) -> Coefficient:
        """Best rate of a matmul measured alone, over the dense peak."""
        measured, rate = self.accelerator.matmul_max_fraction, self.precision.matmul_rate
        if rate in measured:
            return Coefficient(value=measured[rate], evidence="measured", source=f"best {rate} matmul measured alone on {self.accelerator.id}")
        best = measured.get("bf16", UNMEASURED_MATMUL_FRACTION)
        return Coefficient(value=best, evidence="assumed", source=f"no measurement for {rate} on {self.accelerator.id}: {best:.3f} assumed")

    @property
    def rates(self) -> dict[str, Array]:
        """Coefficient that divides each kind of work."""
        return work_rates(self.coefficients, format_code(self.precision.name))

    def shape_fraction(self, m: Array, n: Array, k: Array) -> Array:
        """Share of the large-matmul rate that an [m, k] x [k, n] product reaches.

        Formula: best over tiles of rate * waves_needed / waves_run, times k / (k + EPILOGUE_K), less where rows do not start at
        multiples of 128 bytes; devices without known compute units (TPUs) pad n and k to 128 instead.
        """
        units = self.accelerator.num_compute_units
        inner = k / (k + EPILOGUE_K)
        if self.accelerator.kind == "gpu":
            inner = inner * np.where((np.mod(n, ALIGNED_ELEMENTS) != 0) | (np.mod(k, ALIGNED_ELEMENTS) != 0), UNALIGNED_FRACTION, 1.0)
        if units is None or self.accelerator.kind != "gpu":
            return inner * (n / (np.ceil(n / 128) * 128)) * (k / (np.ceil(k / 128) * 128))
        best: Array = 0.0
        for tile_m, tile_n, rate in TILES:
            exact = (m / tile_m) * (n / tile_n)
            waves = np.ceil(np.ceil(m / tile_m) * np.ceil(n / tile_n) / units)
            best = np.maximum(best, rate * exact / (waves * units))
        return inner * best

    def matmul_work(self, flops: Array, num_bytes: Array, gemm: tuple[Array, Array, Array], kind: str = "matmul") -> Work:
        """One matmul, FLOPs as executed: bound by compute, or by memory where its bytes take longer than that at full rates."""
        compute = flops / (self.peak_flops_per_s(self.precision.matmul_rate) * self.best_matmul.value * self.shape_fraction(*gemm))
        traffic = self.memory_s(num_bytes, 1)
        is_bound = traffic > compute
        return {kind: np.where(is_bound, 0.0, compute), "memory": np.where(is_bound, traffic, 0.0), "kernels": 1.0}

    def memory_s(self, num_bytes: Array, num_kernels: float) -> Array:
        """Seconds of memory-bound kernels that move `num_bytes` in all, at the data sheet's bandwidth."""
        return (num_bytes + num_kernels * MEMORY_RAMP_BYTES * (np.asarray(num_bytes) > 0)) / self.accelerator.memory_bandwidth_bytes_per_s

    def memory_work(self, num_bytes: Array, num_kernels: float) -> Work:
        """Memory-bound kernels that move `num_bytes` in all."""
        return {"memory": self.memory_s(num_bytes, num_kernels), "kernels": num_kernels * (np.asarray(num_bytes) > 0)}

    def attention_work(self, op: Any, seq_len: int, flops: Array, num_bytes: Array, is_flash: bool, phase: str) -> Work:
        """The attention kernel, forward or backward."""
        if not is_flash:
            # Batched matmuls per head, then softmax (and dropout) over all pairs: two kinds of kernels one after the other.
            depth = float(op.head_dim)
            peak = self.peak_flops_per_s(self.precision.attention_rate) * self.best_matmul.value
            return {"matmul": flops / (peak * depth / (depth + EPILOGUE_K)), "memory": self.memory_s(num_bytes, 3), "kernels": 5.0}
        peak = self.peak_flops_per_s(self.precision.attention_rate)
        reached, _ = self.attention_fraction(op, seq_len, phase)
        compute, traffic = flops / (peak * reached), self.memory_s(num_bytes, 1)
        is_bound = traffic > compute
        return {"attention": np.where(is_bound, 0.0, compute), "memory": np.where(is_bound, traffic, 0.0), "kernels": 1.0}

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

    def measured_work(self, cost: OpCost, seq_len: int, is_flash: bool, phase: Phase) -> Work | None:
        """One op from its curve, with its host time; None where nothing was measured."""
        alone = self._alone_s(cost, seq_len, is_flash, phase)
        if alone is None or self.curves is None:
            return None
        overhead = 0.0 if phase == "backward_weight" else self.curves.op_overhead_s
        kind = "attention" if cost.op.kind == "attention" else "matmul" if cost.gemm is not None else "memory"
        return {kind: alone, "overhead": overhead}

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
            return num_heads * curve.at(seq_len) * width / (2.0 * head_dim) * mask
        if cost.gemm is not None:
            grid = curves.matmul.get(f"{phase}/{precision}")
            return None if grid is None else grid.at(*cost.gemm) * cost.num_gemms
        curve_of_op = curves.ops.get(f"{op_class(cost.op)}/{phase}/{precision}")
        if curve_of_op is None:
            return None
        num_bytes = cost.forward_bytes if phase == "forward" else cost.backward_bytes
        return np.where(np.asarray(num_bytes) > 0, curve_of_op.at(num_bytes), 0.0)

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
        return np.where(is_trained, casts[0], 0.0), np.where(is_trained, casts[1] + adds, 0.0)

    def optimizer_s(self, name: str, num_bytes: Array) -> tuple[Array, float]:
        """(seconds of an update that moves `num_bytes` at full bandwidth, the norm of the gradients included; other work of a step)."""
        curves = self.curves
        curve = None if curves is None else curves.ops.get(f"optimizer/{name}")
        if curves is None or curve is None:
            return self.memory_s(num_bytes, 0), 0.0
        return curve.at(num_bytes), curves.step_overhead_s

    def forward_work(self, cost: OpCost, seq_len: int, is_flash: bool) -> Work:
        """One op in the forward pass."""
        measured = self.measured_work(cost, seq_len, is_flash, "forward")
        if measured is not None:
            return measured
        kind = cost.op.kind
        if kind == "attention":
            return self.attention_work(cost.op, seq_len, cost.forward_flops, cost.forward_bytes, is_flash, "forward")
        if cost.gemm is not None:
            return add_work(self.matmul_work(cost.forward_flops, cost.forward_bytes, cost.gemm, kind), self.conversion_work(cost))
        return self.memory_work(cost.forward_bytes, cost.num_kernels)

    def backward_input_work(self, cost: OpCost, seq_len: int, is_flash: bool) -> Work:
        """One op in the backward pass, without the weight gradients of matmuls."""
        measured = self.measured_work(cost, seq_len, is_flash, "backward_input")
        if measured is not None:
            return measured
        kind = cost.op.kind
        if kind == "attention":
            return self.attention_work(cost.op, seq_len, cost.backward_input_flops, cost.backward_bytes, is_flash, "backward")
        if cost.gemm is not None:
            m, n, k = cost.gemm
            return add_work(self.matmul_work(cost.backward_input_flops, cost.backward_bytes / 2, (m, k, n), kind), self.conversion_work(cost))
        return self.memory_work(cost.backward_bytes, cost.num_kernels)

    def backward_weight_work(self, cost: OpCost, seq_len: int, is_flash: bool) -> Work:
        """The weight gradients of one matmul; nothing for other ops."""
        if cost.gemm is None:
            return {}
        measured = self.measured_work(cost, seq_len, is_flash, "backward_weight")
        if measured is not None:
            return measured
        m, n, k = cost.gemm
        return self.matmul_work(cost.backward_weight_flops, cost.backward_bytes / 2, (k, n, m), cost.op.kind)

    def conversion_work(self, cost: OpCost) -> Work:
        """Casting a matmul's input to a narrow format: read in the compute format, write narrow."""
        if not self.precision.is_quantized or cost.gemm is None:
            return {}
        m, _, k = cost.gemm
        return self.memory_work(m * k * cost.num_gemms * (self.precision.compute_bytes + self.precision.saved_matmul_bytes), 1)
