"""A run against its prediction: what was predicted, what was measured, how far apart, inside the interval or not.

In: the folder of a run, whose `plan.yaml` carries the planner's prediction. Nothing is priced here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from planner.errors import InputError
from planner.plan import COMMUNICATION_PARTS, build_request
from planner.run_files import Prediction, RunSummary, TimePrediction, read_plan, read_prediction, read_summary
from reftrain.measure import WARMUP_STEPS, read_metrics

__all__ = ["Comparison", "Metric", "compare_run", "to_dict"]

ADAPTER_NOTE = "FLOPs: the plan gives the first block's input a gradient, which nothing needs where only adapters are trained"
FLOPS_TOLERANCE_FRACTION = 0.005
"""FLOPs are counted, not timed: no interval, and next to no error."""


@dataclass(frozen=True)
class Metric:
    """One number, predicted and measured."""

    name: str
    unit: str
    predicted: float | None
    """None: the planner does not know it, and `note` says why."""
    measured: float
    low: float | None = None
    high: float | None = None
    gates: bool = True
    """Whether it decides the exit status; the loss law was fitted on far larger runs, and does not."""
    note: str = ""

    @property
    def error_fraction(self) -> float | None:
        """Predicted over measured, less 1; None where there is nothing to divide."""
        return self.predicted / self.measured - 1 if self.predicted is not None and self.measured else None

    def is_inside(self, tolerance_fraction: float | None) -> bool | None:
        """Measured inside the interval, or within the tolerance where one is given (or there is no interval); None: nothing to judge by."""
        error = self.error_fraction
        if error is None:
            return None
        if tolerance_fraction is None and self.low is not None and self.high is not None:
            return self.low <= self.measured <= self.high
        limit = FLOPS_TOLERANCE_FRACTION if self.unit.startswith("FLOP") or tolerance_fraction is None else tolerance_fraction
        return abs(error) <= limit


@dataclass(frozen=True)
class Comparison:
    """All metrics of a run, where its time went, and its loss curve."""

    run: str
    device: str
    accelerator: str
    metrics: tuple[Metric, ...]
    phases: tuple[tuple[str, float, float | None], ...]
    """(phase, predicted seconds, measured seconds or None) of one step."""
    losses: tuple[tuple[int, float], ...]
    step_s: tuple[float, ...]
    """Timed steps, in order."""
    tolerance_fraction: float | None
    notes: tuple[str, ...] = ()

    @property
    def is_within(self) -> bool:
        """Whether every metric that gates is inside."""
        return all(metric.is_inside(self.tolerance_fraction) is not False for metric in self.metrics if metric.gates)


def compare_run(folder: str | Path, tolerance_fraction: float | None = None) -> Comparison:
    """Puts `summary.json` and `metrics.jsonl` of a run beside the prediction in its `plan.yaml`.

    Raises:
        InputError: not a run's folder, a run that is not over or measured nothing, a plan without a prediction, a damaged file.
    """
    folder = Path(folder)
    plan, where = read_plan(folder), str(folder / "plan.yaml")
    request, prediction, summary = build_request(plan, where), read_prediction(plan, where), read_summary(folder)
    has_adapters = request.workload.job == "lora"
    metrics = _cost_metrics(prediction, summary, has_adapters)
    if not metrics:
        raise InputError.single("RUN_DIR", str(folder), "the run measured nothing: its first step takes no part", "run it for at least 10 steps")
    steps = [record for record in _read_log(folder) if record.get("kind") == "step"]
    return Comparison(
        run=str(folder),
        device=summary.device,
        accelerator=str(request.cluster.accelerator),
        metrics=(*metrics, *_loss_metrics(prediction, summary)),
        phases=tuple(_phases(prediction.time, summary.breakdown_s)),
        losses=tuple((record["step"], record["loss"]) for record in steps if isinstance(record["loss"], float)),
        step_s=tuple(record["step_s"] for record in steps if record.get("timed")),
        tolerance_fraction=tolerance_fraction,
        notes=(*_notes(prediction, summary), *((ADAPTER_NOTE,) if has_adapters else ())),
    )


def _read_log(folder: Path) -> list[dict[str, Any]]:
    if not (folder / "metrics.jsonl").is_file():
        raise InputError.single("RUN_DIR", str(folder), "holds no metrics.jsonl: the log of the steps is gone", "put it back, or run the plan again")
    return read_metrics(folder / "metrics.jsonl")


def _cost_metrics(prediction: Prediction, summary: RunSummary, has_adapters: bool) -> list[Metric]:
    """Time, memory and FLOPs, as far as the run was long enough to measure them."""
    step, peak, tokens = prediction.time.step_s, prediction.memory.peak_bytes, summary.tokens_per_step
    metrics = []
    if summary.step_s is not None:
        measured_s = summary.step_s.median
        metrics.append(Metric("step time", "s", step.value, measured_s, step.low, step.high))
        metrics.append(Metric("tokens/s", "tokens/s", tokens / step.value, tokens / measured_s, tokens / step.high, tokens / step.low))
    if summary.peak_bytes is not None:
        metrics.append(Metric("peak memory", "bytes", peak.value, summary.peak_bytes, peak.low, peak.high))
    if summary.flops_per_step:
        metrics.append(Metric("FLOPs per step", "FLOP", prediction.flops.counted_per_token * tokens, summary.flops_per_step, gates=not has_adapters))
    return metrics


def _loss_metrics(prediction: Prediction, summary: RunSummary) -> list[Metric]:
    """The loss law's guess beside the held-out loss, or the mean of the last tenth of the training steps; and bits per byte, which no law knows."""
    held_out = summary.eval
    measured = summary.recent_loss if held_out is None else held_out.loss
    if measured is None:
        return []
    name, perplexity = "training loss" if held_out is None else "held-out loss", math.exp(min(measured, 700.0))
    if prediction.loss is None or prediction.law_limits:
        note = "outside the law's range" if prediction.law_limits else "no law for this job"
        found = [Metric(name, "nats/token", None, measured, gates=False, note=note)]
    else:
        nats, guess = prediction.loss.nats_per_token, prediction.loss.perplexity
        found = [
            Metric(name, "nats/token", nats.value, measured, nats.low, nats.high, gates=False),
            Metric("perplexity", "", guess.value, perplexity, guess.low, guess.high, gates=False),
        ]
    if held_out is not None and held_out.bits_per_byte is not None:
        found.append(Metric("held-out bits per byte", "", None, held_out.bits_per_byte, gates=False, note="not predicted"))
    return found


def _notes(prediction: Prediction, summary: RunSummary) -> list[str]:
    """What a reader must know about the table."""
    notes = [] if summary.is_complete else ["the run was stopped before its end"]
    if summary.step_s is None:
        notes.append(f"too few steps to time: the first {WARMUP_STEPS} of a process are warm-up")
    return notes + prediction.law_limits


def _phases(time: TimePrediction, measured: dict[str, float]) -> list[tuple[str, float, float | None]]:
    """Forward, backward, optimizer and data, as far as each side knows them."""
    num, parts = time.num_microbatches, time.breakdown_s
    forward, backward = max(time.stage_forward_s) * num, max(time.stage_backward_s) * num
    found: list[tuple[str, float, float | None]] = []
    if "forward_backward" in measured:
        found.append(("forward and backward", forward + backward + parts.pipeline_transfer_and_bubble, measured["forward_backward"]))
    else:
        found.append(("forward", forward, measured.get("forward")))
        found.append(("backward", backward + parts.data_parallel, measured.get("backward")))
    found.append(("optimizer", parts.optimizer, measured.get("optimizer")))
    found.append(("data", 0.0, measured.get("data")))
    found.append(("of which communication", sum(getattr(parts, name) for name in COMMUNICATION_PARTS), measured.get("communication")))
    return found


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """The object that `reftrain compare --json` prints."""
    tolerance = comparison.tolerance_fraction
    return {
        "schema_version": 1, "run": comparison.run, "device": comparison.device, "accelerator": comparison.accelerator,
        "is_within": comparison.is_within, "tolerance_fraction": tolerance,
        "metrics": [
            {**asdict(metric), "error_fraction": metric.error_fraction, "is_inside": metric.is_inside(tolerance)} for metric in comparison.metrics
        ],
        "phases_s": [{"phase": name, "predicted": predicted, "measured": measured} for name, predicted, measured in comparison.phases],
        "notes": list(comparison.notes),
    }  # fmt: skip
