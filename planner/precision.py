"""Number formats: which peak rate a matmul runs at, and how many bytes each tensor takes.

Storage of weights, gradients and optimizer states also depends on the software stack (a separate fp32 master copy, or
fp32 weights in place): see `efficiency.StackSpec`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from planner.registry import unknown_name

__all__ = ["PRECISIONS", "Precision", "get_precision"]


@dataclass(frozen=True)
class Precision:
    """A training precision.

    `matmul_rate` names the dense peak of the catalog that linear layers run at, `attention_rate` the one of the
    attention kernel; `compute_bytes` is the size of one activation, of one gathered weight and of one element of a
    tensor-parallel message; `saved_matmul_bytes` of one linear-layer input kept for the weight gradient;
    `quantized_weight_bytes` of the extra low-precision weight copies (0 where there are none).
    """

    name: str
    matmul_rate: str
    attention_rate: str
    compute_bytes: float
    saved_matmul_bytes: float
    quantized_weight_bytes: float
    source: str

    @property
    def is_quantized(self) -> bool:
        """Whether linear inputs are converted to a narrower format than the activations."""
        return self.saved_matmul_bytes < self.compute_bytes

    @property
    def needs_master_weights(self) -> bool:
        """Whether fp32 weights are kept beside, or instead of, the compute weights."""
        return self.compute_bytes < 4

    def on(self, has_fp4_units: bool) -> Precision:
        """The same on a device that multiplies 8-bit matrices in either order.

        Tensor cores of Blackwell, the first with fp4, do; those of Hopper and Ada go row by column only, so that every weight is kept twice.
        Blocks of scales (mxfp8, nvfp4) have one direction in any case.

        Source: NVIDIA/TransformerEngine transformer_engine/pytorch/utils.py, is_non_tn_fp8_gemm_supported.
        """
        return replace(self, quantized_weight_bytes=1) if self.name == "fp8" and has_fp4_units else self


_IEEE = "IEEE 754; NVIDIA A100 whitepaper for tf32"
_TE = "NVIDIA Transformer Engine: weights and inputs are kept row- and column-wise in the narrow format"
_OCP = "OCP Microscaling Formats v1.0: one 8-bit scale per 32 values; nvfp4: one fp8 scale per 16 values"

PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        Precision("fp32", "fp32", "fp32", 4, 4, 0, _IEEE),
        Precision("tf32", "tf32", "tf32", 4, 4, 0, _IEEE),
        Precision("fp16", "fp16", "fp16", 2, 2, 0, _IEEE),
        Precision("bf16", "bf16", "bf16", 2, 2, 0, _IEEE),
        Precision("fp8", "fp8", "bf16", 2, 1, 2, _TE),
        Precision("mxfp8", "mxfp8", "bf16", 2, 1 + 1 / 32, 2 + 2 / 32, _OCP),
        Precision("nvfp4", "nvfp4", "bf16", 2, 0.5 + 1 / 16, 1 + 2 / 16, _OCP),
    )
}


def get_precision(name: str) -> Precision:
    """The precision of that name.

    Raises:
        InputError: unknown name.
    """
    if name not in PRECISIONS:
        raise unknown_name("workload.precision", name, list(PRECISIONS))
    return PRECISIONS[name]
