"""A run against its prediction: what was predicted, what was measured, how far apart, inside the interval or not.

In: the folder of a run, whose `plan.yaml` carries the planner's prediction. Nothing is priced here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from planner.errors import InputError
from planner.files import read_json, read_yaml
from planner.plan import COMMUNICATION_PARTS
from reftrain.measure import read_metrics

__all__ = ["Comparison", "Metric", "compare_run", "to_dict"]

FLOPS_TOLERANCE_FRACTION = 0.005
"""FLOPs are counted, not timed: no interval, and next to no error."""


@dataclass(frozen=True)
class Metric:
    """One number, predicted and measured."""

    name: str
    unit: str
    predicted: float
    measured: float
    low: float | None = None
    high: float | None = None
    gates: bool = True
    """Whether it decides the exit status; the loss law was fitted on far larger runs, and does not."""

    @property
    def error_fraction(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.measured - 1 if self.measured else math.nan

    def is_inside(self, tolerance_fraction: float | None) -> bool:
        """Measured inside the interval, or within the tolerance where one is given (or there is no interval)."""
        if tolerance_fraction is None and self.low is not None and self.high is not None:
            return self.low <= self.measured <= self.high
        limit = FLOPS_TOLERANCE_FRACTION if self.unit.startswith("FLOP") or tolerance_fraction is None else tolerance_fraction
        return abs(self.error_fraction) <= limit


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
        return all(metric.is_inside(self.tolerance_fraction) for metric in self.metrics if metric.gates)


def compare_run(folder: str | Path, tolerance_fraction: float | None = None) -> Comparison:
    """Puts `summary.json` and `metrics.jsonl` of a run beside the prediction in its `plan.yaml`.

    Raises:
        InputError: not a run's folder, a run that is not over, or a plan without a prediction.
    """
    folder = Path(folder)
    plan, summary = _read(folder)
    prediction, tokens = plan["prediction"], summary["tokens_per_step"]
    time, memory = prediction["time"], prediction["memory"]
    metrics = []
    if "step_s" in summary:
        step = time["step_s"]
        metrics.append(Metric("step time", "s", step["value"], summary["step_s"]["median"], step["low"], step["high"]))
        metrics.append(Metric("tokens/s", "tokens/s", tokens / step["value"], summary["tokens_per_s"], tokens / step["high"], tokens / step["low"]))
    if summary.get("peak_bytes"):
        peak = memory["peak_bytes"]
        metrics.append(Metric("peak memory", "bytes", peak["value"], summary["peak_bytes"], peak["low"], peak["high"]))
    if summary.get("flops_per_step") and "counted_per_token" in prediction["flops"]:
        metrics.append(Metric("FLOPs per step", "FLOP", prediction["flops"]["counted_per_token"] * tokens, summary["flops_per_step"]))
    metrics += _loss_metrics(prediction.get("loss"), summary)
    records = read_metrics(folder / "metrics.jsonl")
    steps = [record for record in records if record.get("kind") == "step"]
    notes = [] if summary["is_complete"] else ["the run was stopped before its end"]
    return Comparison(
        run=str(folder),
        device=summary["device"],
        accelerator=str(plan["cluster"]["accelerator"]),
        metrics=tuple(metrics),
        phases=tuple(_phases(time, summary)),
        losses=tuple((record["step"], record["loss"]) for record in steps if isinstance(record["loss"], float)),
        step_s=tuple(record["step_s"] for record in steps if record.get("timed")),
        tolerance_fraction=tolerance_fraction,
        notes=tuple(notes),
    )


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if not (folder / "plan.yaml").is_file():
        raise InputError.single("RUN_DIR", str(folder), "must be a folder that `reftrain run` wrote", "name such a folder")
    if not (folder / "summary.json").is_file():
        fix = f"let it end, or go on with it: python -m reftrain run {folder / 'plan.yaml'} --out {folder} --resume"
        raise InputError.single("RUN_DIR", str(folder), "holds no summary.json: the run is not over", fix)
    plan, summary = read_yaml(folder / "plan.yaml"), read_json(folder / "summary.json")
    if not isinstance(plan, dict) or not isinstance(plan.get("prediction"), dict):
        fix = "write the plan with `python -m planner estimate PLAN.yaml --out PLAN.yaml` before it runs"
        raise InputError.single("prediction", None, "the run's plan carries no prediction to compare with", fix, str(folder / "plan.yaml"))
    return plan, summary


def _loss_metrics(predicted: dict[str, Any] | None, summary: dict[str, Any]) -> list[Metric]:
    """The loss law's guess beside the held-out loss, or the mean of the last tenth of the training steps."""
    measured = summary.get("eval", {}).get("loss", summary.get("recent_loss"))
    if predicted is None or measured is None:
        return []
    nats, perplexity = predicted["nats_per_token"], predicted["perplexity"]
    return [
        Metric("loss", "nats/token", nats["value"], measured, nats["low"], nats["high"], gates=False),
        Metric("perplexity", "", perplexity["value"], math.exp(min(measured, 700.0)), perplexity["low"], perplexity["high"], gates=False),
    ]


def _phases(time: dict[str, Any], summary: dict[str, Any]) -> list[tuple[str, float, float | None]]:
    """Forward, backward, optimizer and data, as far as each side knows them."""
    measured = summary.get("breakdown_s", {})
    num, parts = time["num_microbatches"], time["breakdown_s"]
    forward, backward = max(time["stage_forward_s"]) * num, max(time["stage_backward_s"]) * num
    found: list[tuple[str, float, float | None]] = []
    if "forward_backward" in measured:
        found.append(("forward and backward", forward + backward + parts["pipeline_transfer_and_bubble"], measured["forward_backward"]))
    else:
        found.append(("forward", forward, measured.get("forward")))
        found.append(("backward", backward + parts["data_parallel"], measured.get("backward")))
    found.append(("optimizer", parts["optimizer"], measured.get("optimizer")))
    found.append(("data", 0.0, measured.get("data")))
    found.append(("of which communication", sum(parts[name] for name in COMMUNICATION_PARTS), measured.get("communication")))
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
