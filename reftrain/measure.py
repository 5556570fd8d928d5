"""What a run measures about itself: FLOPs by op, peak memory, a log line per step, and medians without warm-up.

One early step is instrumented (exact live bytes, FLOPs of every op) and takes no part in the timings, so that timed steps carry
a handful of clock reads and nothing else; see `reftrain.looks` for all steps that are looked at.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planner.errors import InputError
from planner.files import read_text, write_text
from planner.hardware import load_catalog
from planner.precision import get_precision
from reftrain.config import RunConfig
from reftrain.flop_count import FLOPS
from reftrain.live_memory import LiveMemory

__all__ = ["Instruments", "MetricsLog", "Summary", "Utilization", "find_utilization", "read_metrics", "summarize"]

INSTRUMENTED_STEP = 1
"""The second step of a process: optimizer states are there, and it is not a timed one."""
WARMUP_STEPS = 3
"""First steps of a process that no median counts: allocators, caches and lazy initialization settle."""
PHASES = ("data", "forward", "backward", "forward_backward", "optimizer")
"""They follow each other; communication happens inside them."""


class _Watch(LiveMemory):  # type: ignore[no-untyped-call]
    """Counts FLOPs beside live bytes. torch's FlopCounterMode may not run with it: it keeps tensors alive that a step frees."""

    def __init__(self, existing: Sequence[Tensor]) -> None:
        super().__init__(existing)
        self.flops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `LiveMemory`."""
        out = super().__torch_dispatch__(func, types, args, kwargs)
        packet = func._overloadpacket
        if packet in FLOPS:
            self.flops[packet.__name__] += FLOPS[packet](*args, **(kwargs or {}), out_val=out)
        return out


class Instruments:
    """Looks closely at one step: `with instruments.watch(...)` around it."""

    def __init__(self) -> None:
        self.flops: dict[str, int] = {}
        self.peak_bytes = 0
        self.state_bytes = 0

    @contextmanager
    def watch(self, tensors: Sequence[Tensor], device: torch.device) -> Iterator[None]:
        """Counts FLOPs and live bytes of its body; `tensors` are those alive before."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with _Watch(tensors) as watch:
            yield
        self.flops = dict(watch.flops)
        self.state_bytes = watch.start_bytes
        self.peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else watch.peak_bytes

    @property
    def attention_flops(self) -> int:
        """FLOPs of attention kernels, over all pairs of positions."""
        return sum(count for op, count in self.flops.items() if "scaled_dot_product" in op or "flash" in op)

    @property
    def total_flops(self) -> int:
        """FLOPs of all matmuls and attention kernels on this rank."""
        return sum(self.flops.values())


class MetricsLog:
    """`metrics.jsonl`: one JSON object per line, appended and flushed; a torn last line of a killed run is cut off when reopened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) != len(data):
                os.truncate(path, len(whole))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record; numbers that JSON lacks become text."""
        spelled = {key: str(value) if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
        self._file.write(json.dumps(spelled, default=str, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a log. What came after a checkpoint that the run went back to, for a resume or a rollback, no longer counts.

    Raises:
        InputError: no such file.
    """
    records: list[dict[str, Any]] = []
    for line in read_text(path, max_bytes=1 << 30).splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict):
            continue
        if record.get("kind") in ("resumed", "rolled_back"):
            last = {"step": record["step"] - 1, "eval": record["step"]}
            records = [r for r in records if r.get("step", 0) <= last.get(r.get("kind", ""), math.inf)]
        records.append(record)
    return records


@dataclass(frozen=True)
class Summary:
    """What a run measured, as `summary.json` holds it."""

    values: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes it whole or not at all."""
        write_text(path, json.dumps(self.values, indent=1) + "\n")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, and number of values.

    Example:
        >>> spread([1.0, 2.0, 3.0])
        {'median': 2.0, 'p10': 1.0, 'p90': 3.0, 'count': 3}
    """
    ordered = sorted(values)
    last = len(ordered) - 1
    return {"median": statistics.median(ordered), "p10": ordered[round(0.1 * last)], "p90": ordered[round(0.9 * last)], "count": len(ordered)}


@dataclass(frozen=True)
class Utilization:
    """What turns a step's time into MFU.

    Formula: mfu = model_flops / (step_s * peak_flops_per_s), with attention over all pairs of positions and without recompute.
    """

    model_flops: float
    """Per step, over all ranks."""
    peak_flops_per_s: float
    """Dense peak of all devices in the plan's precision."""
    accelerator: str

    def mfu(self, step_s: float) -> float:
        """Model FLOPs utilization of a step that took `step_s`."""
        return self.model_flops / (step_s * self.peak_flops_per_s)


def find_utilization(config: RunConfig, counted_flops: float, on: torch.device) -> Utilization | None:
    """The catalog's peak for the plan's accelerator, and the model's FLOPs in a step.

    Those are the counted ones where nothing is recomputed, else the plan's prediction. None where there is no such peak or prediction,
    or the run is on another kind of device than the plan is for.
    """
    model_flops = counted_flops
    if config.workload.recompute != "none":
        model_flops = ((config.request.prediction or {}).get("flops") or {}).get("model_per_token", 0.0) * config.tokens_per_step
    try:
        catalog = load_catalog(Path(config.request.catalog) if config.request.catalog else None)
        device = catalog.resolve(config.request.cluster).accelerator
    except InputError:
        return None
    peak = device.dense_flops_per_s.get(get_precision(config.workload.precision).matmul_rate)
    if not model_flops or not peak or (device.kind == "cpu") != (on.type == "cpu"):
        return None
    return Utilization(model_flops, peak * config.layout.num_devices, device.id)


def summarize(records: Sequence[dict[str, Any]], facts: dict[str, Any], utilization: Utilization | None = None) -> Summary:
    """Medians over the timed steps of a run, beside `facts` that do not change from step to step.

    `breakdown_s` holds the phases, which add up to a step but for the agreement on loss and norm, and `communication`, which lies inside them.
    """
    steps = [r for r in records if r.get("kind") == "step"]
    timed = [r for r in steps if r.get("timed")]
    sound = [r["loss"] for r in steps if not r.get("skipped")]
    values: dict[str, Any] = {"num_steps": len(steps), "final_loss": sound[-1] if sound else None, **facts}
    recent = sound[-max(len(sound) // 10, 1) :]
    values["recent_loss"] = statistics.fmean(recent) if recent else None
    if timed:
        values["step_s"] = spread([r["step_s"] for r in timed])
        values["tokens_per_s"] = facts["tokens_per_step"] / values["step_s"]["median"]
        values["breakdown_s"] = {
            phase: statistics.median(r["phases_s"].get(phase, 0.0) for r in timed) for phase in PHASES if any(phase in r["phases_s"] for r in timed)
        }
        if utilization is not None:
            values |= {"mfu": utilization.mfu(values["step_s"]["median"]), "utilization": asdict(utilization)}
        if "communication" in facts:
            values["breakdown_s"]["communication"] = facts["communication"]["exposed_s"]
    return Summary(values)
