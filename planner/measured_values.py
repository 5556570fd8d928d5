"""What a row of a table measured, and what of a plan is comparable with it: seconds per step, and peak memory of the published kind.

In: rows of `planner.measurements`. Out: seconds and bytes.
"""

from __future__ import annotations

from typing import Any

from planner.architectures import load_model
from planner.graph import model_flops_per_token
from planner.measurements import Measurement
from planner.op_cost import Numerics
from planner.plan import Plan
from planner.units import GIB, MIB

__all__ = ["measured_memory_bytes", "measured_step_s", "memory_kind", "predicted_memory_bytes"]

STATES = ("weights", "gradients", "optimizer", "activations", "logits")
OUTSIDE_TORCH = ("context", "communication_buffers")
"""What the framework's allocator does not count."""
RESERVED_ONLY = ("allocator_slack",)


def measured_step_s(row: Measurement, request: dict[str, Any], peak_flops_per_s: float) -> float | None:
    """Seconds per step of a row: as printed, or from tokens/s, or from FLOP/s or MFU where their definition is known.

    Formula: tokens per step / (devices * tokens/s/device); tokens/s/device = FLOP/s/device / FLOPs per token. The FLOPs per token are
    eq. 3 of arXiv:2104.04473, 96 B s l h^2 (1 + s/6h + V/16lh), or model FLOPs with full or causal-half attention.
    """
    if row.number("measured_step_s"):
        return row.number("measured_step_s")
    workload = request["workload"]
    tokens = workload["global_batch_size"] * workload["seq_len"] / request["cluster"]["num_devices"]
    rate = row.number("measured_tokens_per_s_per_device") or row.number("tokens_per_s_per_device_from_flops")
    if rate is None:
        flops_per_s = (row.number("measured_tflops_per_device") or 0.0) * 1e12 or (row.number("measured_mfu") or 0.0) * peak_flops_per_s
        per_token = _published_flops_per_token(row, request)
        rate = flops_per_s / per_token if per_token else None
    return tokens / rate if rate else None


def _published_flops_per_token(row: Measurement, request: dict[str, Any]) -> float | None:
    definition, seq_len = row.text("flops_definition"), request["workload"]["seq_len"]
    if "96bslh" in definition:
        h, layers, vocab = (float(row.count(name)) for name in ("hidden_size", "num_layers", "vocab"))
        per_token: float = 96.0 * layers * h**2 * (1 + seq_len / (6 * h) + vocab / (16 * layers * h))
        return per_token
    if not definition.startswith("model"):
        return None
    flops = model_flops_per_token(load_model(request["model"]), seq_len, Numerics())
    convention = "causal" if "causal" in definition else "full" if "attn full" in definition else ""
    return flops.get(convention)


def memory_kind(definition: str) -> str:
    """What a published peak counts, from its `mem_definition`.

    `states`: a breakdown into weights, gradients, optimizer states and activations. `allocated`: tensors that the framework held at once
    (torch.cuda.max_memory_allocated). `reserved`: what its allocator took for them; so nanotron's chart is read, which prints one of the
    two and lies about a tenth above what is allocated. `device`: all that nvidia-smi sees of the device, the
    runtime's and the communication library's memory too; also where nothing is said.

    Example:
        >>> memory_kind("nvidia-smi, GB as printed"), memory_kind("torch max allocated GiB")
        ('device', 'allocated')
    """
    definition = definition.lower()
    for kind, word in (("device", "nvidia-smi"), ("states", "breakdown"), ("reserved", "reserved"), ("reserved", "nanotron")):
        if word in definition:
            return kind
    return "allocated" if any(word in definition for word in ("torch", "allocated", "peak")) else "device"


def predicted_memory_bytes(plan: Plan, definition: str) -> float:
    """Peak bytes per device in the sense of a `mem_definition`; of the last stage where that is what its words are about."""
    kind, stages = memory_kind(definition), plan.memory.stages
    stage = stages[-1] if "last rank" in definition.lower() else stages[plan.memory.peak_stage]
    parts = stage.breakdown_bytes
    if kind == "states":
        return sum(parts[name] for name in STATES)
    outside = {"allocated": (*OUTSIDE_TORCH, *RESERVED_ONLY), "reserved": OUTSIDE_TORCH, "device": ()}[kind]
    return stage.total_bytes - sum(parts[name] for name in outside)


def measured_memory_bytes(row: Measurement) -> float | None:
    """Published peak bytes per device; None where none was published."""
    published_gib, definition = row.number("measured_peak_mem_gib"), row.text("mem_definition")
    return None if published_gib is None else published_gib * _memory_unit_bytes(definition)


def _memory_unit_bytes(definition: str) -> float:
    """GiB, but for gigabytes read off nvidia-smi, which prints MiB: thousands of them. (BigScience saw 80 GB on devices of 81,251 MiB.)."""
    return 1000 * MIB if "nvidia-smi" in definition and "gb" in definition.replace("gib", "") else GIB
