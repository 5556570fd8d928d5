"""What differs between software stacks in time: the coefficients of the step-time model, their meaning and physical bounds.

A stack file (`data/stacks/*.yaml`) gives values to some of them, for all devices or for one; the others have the value of this table.
`planner calibrate` fits them, never beyond their bounds and never without pulling them towards this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["TERMS", "Coefficients", "Term"]

Array = Any


@dataclass(frozen=True)
class Term:
    """One coefficient of the time model."""

    name: str
    meaning: str
    unit: Literal["ratio", "share", "s"]
    """`ratio`: of an achieved rate to a reference, `share`: 0 to 1, `s`: seconds."""
    value: float
    """Where nothing was measured: what a well-tuned stack does."""
    low: float
    high: float
    spread_factor: float
    """How far stacks lie from `value`: one standard deviation, of the logarithm (ratios, seconds) or of the share itself."""
    source: str
    differs_by_device: bool = False

    @property
    def is_log(self) -> bool:
        """Fitted on a logarithmic scale."""
        return self.unit != "share"


_OVERLAP = "share of this traffic that can hide behind compute, where there is enough of it"
_HOT = "published training runs against matmuls measured alone (stas00/ml-engineering @744d01e): devices run hot and share a power budget"
_LAUNCH = "one CUDA launch from an eager framework takes 4 to 10 us of host time (pytorch.org, profiler traces)"
_ASSUMED = "assumed: between the published stacks that do it well and those that do not"

TERMS: dict[str, Term] = {
    term.name: term
    for term in (
        Term("matmul", "rate of large matmuls over the best measured alone", "ratio", 0.80, 0.3, 1.05, 0.25, _HOT, True),
        Term("grouped_matmul", "rate of experts' grouped matmuls, over `matmul`", "ratio", 0.75, 0.2, 1.1, 0.4, _ASSUMED, True),
        Term("fp8_matmul", "rate of fp8 matmuls over their best, over `matmul`", "ratio", 0.85, 0.3, 1.15, 0.3, _ASSUMED, True),
        Term("mxfp8_matmul", "rate of mxfp8 matmuls over their best, over `matmul`", "ratio", 0.85, 0.3, 1.15, 0.3, _ASSUMED, True),
        Term("nvfp4_matmul", "rate of nvfp4 matmuls over their best, over `matmul`", "ratio", 0.75, 0.2, 1.15, 0.4, _ASSUMED, True),
        Term("attention", "rate of attention over the kernel's published curve", "ratio", 1.0, 0.2, 1.6, 0.3, _ASSUMED, True),
        Term("memory", "achieved memory bandwidth over the data sheet's", "ratio", 0.75, 0.2, 1.0, 0.35,
             "device copies reach 0.72 to 0.78, large fused kernels 0.9 (stas00/ml-engineering @744d01e; calculon systems @caa4b11)", True),
        Term("scale_up", "rate of collectives inside a scale-up domain over the links' model", "ratio", 0.85, 0.15, 1.2, 0.4, _ASSUMED, True),
        Term("scale_out", "rate of collectives across domains over the links' model: congestion", "ratio", 0.8, 0.1, 1.3, 0.5, _ASSUMED, True),
        Term("fsdp_overlap", f"FSDP: {_OVERLAP}", "share", 0.8, 0.0, 1.0, 0.15, "prefetching the next block's weights: arXiv:2304.11277 section 3.3"),
        Term("data_parallel_overlap", f"gradient sums and weight gathers: {_OVERLAP}", "share", 0.6, 0.0, 1.0, 0.25, "buckets: arXiv:2006.15704"),
        Term("tensor_parallel_overlap", f"tensor parallelism: {_OVERLAP}", "share", 0.1, 0.0, 1.0, 0.2, _ASSUMED),
        Term("expert_parallel_overlap", f"all-to-all: {_OVERLAP}", "share", 0.1, 0.0, 1.0, 0.2, _ASSUMED),
        Term("context_parallel_overlap", f"context parallelism: {_OVERLAP}", "share", 0.6, 0.0, 1.0, 0.2, "arXiv:2310.01889"),
        Term("pipeline_overlap", f"transfers between stages: {_OVERLAP}", "share", 0.0, 0.0, 1.0, 0.2, _ASSUMED),
        Term("contention", "slowdown of compute while communication hides behind it, over the time hidden", "ratio", 0.1, 0.005, 0.6, 0.7,
             "communication kernels take 2 to 15% of a device's units (calculon systems @caa4b11)"),
        Term("launch", "host time of one kernel launch", "s", 8e-6, 5e-7, 1e-4, 0.7, _LAUNCH, True),
        Term("block_host", "host time of one pass of one block beyond its launches: framework code", "s", 1e-4, 1e-7, 1e-2, 1.0, _ASSUMED, True),
        Term("tensor_parallel_host", "the same again where tensor parallelism is on", "s", 5e-5, 1e-7, 5e-3, 1.0, _ASSUMED),
        Term("expert_host", "the same again in blocks with experts: routing, waiting for the tokens' counts", "s", 3e-4, 1e-7, 2e-2, 1.0, _ASSUMED,
             True),
        Term("kernel_gap", "device time of one kernel beyond its work: starting and draining it", "s", 1.5e-6, 2e-7, 1e-5, 0.5, _ASSUMED),
        Term("sync", "wait of the ranks of a collective for each other, per doubling of the ranks", "s", 1e-5, 1e-6, 3e-4, 0.7, _ASSUMED, True),
        Term("optimizer", "time of the optimizer over that of its bytes at the achieved bandwidth", "ratio", 1.0, 0.2, 6.0, 0.5, _ASSUMED),
        Term("step_overhead", "time of a step outside of model and optimizer: data, scalars, logging", "s", 5e-3, 1e-5, 2.0, 1.0, _ASSUMED),
        Term("straggling", "time lost to the slowest node, per doubling of the nodes", "ratio", 0.01, 1e-4, 0.15, 0.7,
             "SimuMax docs/system.md @4dcaae5; MegaScale, arXiv:2402.15627 section 5"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Coefficients:
    """Values of all terms: numbers, or arrays [n] of one per run."""

    matmul: Array
    grouped_matmul: Array
    fp8_matmul: Array
    mxfp8_matmul: Array
    nvfp4_matmul: Array
    attention: Array
    memory: Array
    scale_up: Array
    scale_out: Array
    fsdp_overlap: Array
    data_parallel_overlap: Array
    tensor_parallel_overlap: Array
    expert_parallel_overlap: Array
    context_parallel_overlap: Array
    pipeline_overlap: Array
    contention: Array
    launch: Array
    block_host: Array
    tensor_parallel_host: Array
    expert_host: Array
    kernel_gap: Array
    sync: Array
    optimizer: Array
    step_overhead: Array
    straggling: Array
