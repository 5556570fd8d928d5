"""What a finished run left behind: its plan with the prediction in it, and its summary. Read strictly; keys that nobody here needs are let pass."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import ConfigDict, Field

from planner.errors import InputError, Problem
from planner.files import read_json, read_yaml
from planner.spec import PositiveInt, Spec, build

__all__ = ["Prediction", "RunSummary", "TimePrediction", "read_plan", "read_prediction", "read_summary"]

OUTSIDE = "lies outside"
"""In the words of a plan's assumptions about the loss, where its law meets a size that it was not fitted on."""
Positive = Annotated[float, Field(gt=0)]
Number = Annotated[float, Field()]
"""Fields have the names of the files' keys, which scripts depend on; units stand beside them."""
S = TypeVar("S", bound=Spec)


class _Part(Spec):
    """A record of which only some keys matter."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="ignore")


class StepSpread(_Part):
    """Seconds of the timed steps."""

    median: Positive


class HeldOut(_Part):
    """The last evaluation on held-out text."""

    loss: Number
    """Nats per token."""
    bits_per_byte: Number | None = None


class RunSummary(_Part):
    """`summary.json`; what a short run did not get to measure is None."""

    device: str
    tokens_per_step: PositiveInt
    is_complete: bool
    step_s: StepSpread | None = None
    tokens_per_s: Number | None = None
    peak_bytes: Positive | None = None
    flops_per_step: Number | None = None
    breakdown_s: dict[str, float] = Field(default_factory=dict)
    recent_loss: Number | None = None
    eval: HeldOut | None = None


class Bounds(_Part):
    """A predicted value and its 80% interval."""

    value: Positive
    low: Positive
    high: Positive


class StepParts(_Part):
    """Predicted seconds of one step, as far as a run measures them apart."""

    optimizer: Number
    tensor_parallel: Number
    context_parallel: Number
    expert_parallel: Number
    fsdp: Number
    data_parallel: Number
    pipeline_transfer_and_bubble: Number


class TimePrediction(_Part):
    """`prediction.time` of a plan."""

    step_s: Bounds
    num_microbatches: PositiveInt
    stage_forward_s: list[float] = Field(min_length=1)
    stage_backward_s: list[float] = Field(min_length=1)
    breakdown_s: StepParts


class MemoryPrediction(_Part):
    """`prediction.memory`."""

    peak_bytes: Bounds


class FlopsPrediction(_Part):
    """`prediction.flops`."""

    counted_per_token: Positive


class LossPrediction(_Part):
    """`prediction.loss`."""

    nats_per_token: Bounds
    perplexity: Bounds


class Prediction(_Part):
    """`prediction:` of a plan, as far as a run can be compared with it."""

    time: TimePrediction
    memory: MemoryPrediction
    flops: FlopsPrediction
    loss: LossPrediction | None = None
    assumptions: list[str] = Field(default_factory=list)

    @property
    def law_limits(self) -> list[str]:
        """The plan's own words on why its loss law says nothing here; empty inside the range on which it was fitted."""
        return [text for text in self.assumptions if text.startswith("loss: ") and OUTSIDE in text]


def read_plan(folder: Path) -> dict[str, Any]:
    """The plan file of a run.

    Raises:
        InputError: not the folder of a run, or a file that is not a plan.
    """
    file = folder / "plan.yaml"
    if not file.is_file():
        raise InputError.single("RUN_DIR", str(folder), "must be a folder that `reftrain run` wrote", "name such a folder")
    plan = read_yaml(file)
    if not isinstance(plan, dict):
        raise InputError.single("plan", plan, "must be a mapping with the keys model, workload, cluster, layout", "put the plan back", str(file))
    return plan


def read_prediction(plan: dict[str, Any], where: str) -> Prediction:
    """What the plan of a run predicted.

    Raises:
        InputError: no prediction, or one without what a comparison needs.
    """
    fix = "write the plan with `python -m planner estimate PLAN.yaml --out PLAN.yaml` before it runs"
    if plan.get("prediction") is None:
        raise InputError.single("prediction", None, "the run's plan carries no prediction to compare with", fix, where)
    return _build(Prediction, plan["prediction"], "prediction", where, fix)


def read_summary(folder: Path) -> RunSummary:
    """What a run measured.

    Raises:
        InputError: a run that is not over, or a file that is damaged.
    """
    file, again = folder / "summary.json", f"python -m reftrain run {folder / 'plan.yaml'} --out {folder} --resume"
    if not file.is_file():
        raise InputError.single("RUN_DIR", str(folder), "holds no summary.json: the run is not over", f"let it end, or go on with it: {again}")
    fix = f"delete it, and have it written again: {again}"
    try:
        values = read_json(file)
    except InputError as error:
        raise InputError(*(Problem("summary", p.value, p.rule, fix, str(file)) for p in error.problems)) from None
    return _build(RunSummary, values, "summary", str(file), fix)


def _build(kind: type[S], values: object, key: str, where: str, fix: str) -> S:
    """`build`, with advice for files that a program wrote."""
    try:
        return build(kind, values, key, where)
    except InputError as error:
        raise InputError(*(Problem(p.key, p.value, p.rule, fix, p.where) for p in error.problems)) from None
