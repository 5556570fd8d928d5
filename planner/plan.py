"""Request and Plan: what a user asks for, and the answer. Both are YAML; a plan is a request made complete.

schema_version, model, workload, cluster, stack, layout        the request
prediction, provenance                                         what the planner adds, ignored when read again
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from planner.errors import InputError
from planner.files import parse_json, parse_yaml, read_text, to_yaml, write_text
from planner.hardware import ClusterSpec
from planner.layout import Layout, PartialLayout
from planner.spec import Spec, build
from planner.stack import Spread
from planner.workload import Workload

__all__ = [
    "COMMUNICATION_PARTS", "Cost", "Evidence", "Flops", "Interval", "Loss", "Memory", "Params", "Plan", "Request", "StageMemory",
    "Time", "Violation",
    "build_request", "load_plan",
]  # fmt: skip

SCHEMA_VERSION = 1
COMMUNICATION_PARTS = ("tensor_parallel", "context_parallel", "expert_parallel", "fsdp", "data_parallel", "pipeline_transfer_and_bubble")
"""Of `time.breakdown_s`: what a step spends on other devices, waiting for them included."""


class Request(Spec):
    """What a user asks for. `layout` may be partial or absent: the best one is then searched."""

    schema_version: Literal[1] = 1
    model: str | dict[str, Any]
    workload: Workload = Workload()
    cluster: ClusterSpec
    stack: str | None = None
    software_year: float | None = Field(default=None, ge=2015, le=2100)
    """When the stack was released, e.g. 2025.5; None: as the newest release that was measured."""
    layout: PartialLayout = PartialLayout()
    catalog: str | None = None
    """Path to a file of own accelerators and offers."""
    training: dict[str, Any] | None = None
    """What only the trainer reads (learning rate, data, checkpoints); carried along as it is."""
    prediction: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None

    def as_given(self) -> dict[str, Any]:
        """The keys that were given, as plain data; without what the planner adds."""
        return self.model_dump(by_alias=True, exclude_unset=True, exclude={"prediction", "provenance"})

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, values: Any) -> Any:
        """`layout:` with nothing behind it means no layout given."""
        if isinstance(values, dict):
            return {key: {} if value is None and key in ("layout", "workload") else value for key, value in values.items()}
        return values


def build_request(values: Any, where: str = "") -> Request:
    """A Request from plain data, with every mistake reported at once.

    Raises:
        InputError: unknown or missing keys, wrong types and values, an unknown schema_version.
    """
    if not isinstance(values, dict):
        raise InputError.single("plan", values, "must be a mapping with the keys model, workload, cluster, layout", "see docs/quickstart.md", where)
    version = values.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise InputError.single(
            "schema_version", version, f"this planner reads schema_version {SCHEMA_VERSION}", f"write schema_version: {SCHEMA_VERSION}", where
        )
    return build(Request, values, "", where)


def read_plan_file(path: str | Path) -> Any:
    """The plain data of a plan file: YAML, JSON, or the `inputs` of what `estimate --json` printed.

    Raises:
        InputError: unreadable file.
    """
    text = read_text(path)
    values = parse_json(text, str(path)) if str(path).endswith(".json") else parse_yaml(text, str(path))
    return values["inputs"] if isinstance(values, dict) and isinstance(values.get("inputs"), dict) else values


def load_plan(path: str | Path) -> Request:
    """The request in a plan file, YAML or JSON; predictions in it are ignored.

    Raises:
        InputError: unreadable file or a wrong request.
    """
    return build_request(read_plan_file(path), str(path))


@dataclass(frozen=True)
class Interval:
    """A prediction with its 80% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def around(cls, value: float, spread: Spread) -> Interval:
        """`value` with the bounds that a stack's residuals give it."""
        return cls(value, value * spread.low, value * spread.high)

    def scaled(self, factor: float) -> Interval:
        """Each bound times `factor`."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Params:
    """Parameter counts of the model."""

    total: int
    active: int
    embedding: int


@dataclass(frozen=True)
class Flops:
    """FLOPs per trained token, forward and backward. Each number under both attention conventions."""

    model_per_token: float
    hardware_per_token: float
    """As executed: recompute included, masked blocks skipped where the kernel skips them."""
    counted_per_token: float
    """As executed, with attention over all pairs: what a counter of FLOPs sees that does not look at masks."""
    attention_convention: Literal["full", "causal"]
    model_per_token_causal: float
    total: float
    """Model FLOPs of the whole run."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes per device of one pipeline stage."""

    stage: int
    total_bytes: float
    breakdown_bytes: dict[str, float]


@dataclass(frozen=True)
class Memory:
    """Peak memory per device, over pipeline stages."""

    peak_bytes: Interval
    usable_bytes: float
    fits: bool
    peak_stage: int
    breakdown_bytes: dict[str, float]
    stages: tuple[StageMemory, ...]


@dataclass(frozen=True)
class Time:
    """Seconds per step and for the run."""

    step_s: Interval
    tokens_per_s: float
    tokens_per_s_per_device: float
    model_flops_per_s_per_device: float
    mfu: float
    hfu: float
    mfu_causal: float
    peak_flops_per_s: float
    peak_name: str
    breakdown_s: dict[str, float]
    stage_forward_s: tuple[float, ...]
    stage_backward_s: tuple[float, ...]
    slowest_stage: int
    num_steps: int
    num_microbatches: int
    bubble_fraction: float
    train_s: Interval
    """Wall time of the run, goodput included."""


@dataclass(frozen=True)
class Loss:
    """Quality at the end of training; None where no law applies (fine-tuning, encoders)."""

    nats_per_token: Interval
    perplexity: Interval
    law: str


@dataclass(frozen=True)
class Cost:
    """Money and energy of the run; dollars are None where no price is known."""

    usd: Interval | None
    usd_per_device_hour: float | None
    price: dict[str, Any] | None
    device_hours: float
    billed_device_hours: float
    goodput_fraction: float
    mean_time_between_failures_s: float
    checkpoint_interval_s: float
    energy_kwh: float
    co2e_kg: float
    breakdown_usd: dict[str, float]


@dataclass(frozen=True)
class Violation:
    """A valid plan that cannot run, and by how much."""

    rule: str
    stage: int
    needed_bytes: float
    available_bytes: float


@dataclass(frozen=True)
class Evidence:
    """A coefficient behind the prediction, or a published run near to it."""

    name: str
    value: float
    evidence: str
    source: str


@dataclass(frozen=True)
class Plan:
    """The answer: the request made complete, predictions, what is wrong with it, and why to believe it."""

    inputs: dict[str, Any]
    params: Params
    flops: Flops
    memory: Memory
    time: Time
    loss: Loss | None
    cost: Cost
    violations: tuple[Violation, ...]
    assumptions: tuple[str, ...]
    evidence: tuple[Evidence, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether every stage fits the device's memory."""
        return not self.violations

    @property
    def layout(self) -> Layout:
        """The complete layout."""
        return Layout(**self.inputs["layout"])

    @property
    def model_name(self) -> str:
        """The preset, or what an inline model calls itself."""
        model = self.inputs["model"]
        return model if isinstance(model, str) else str(model.get("name", "inline model"))

    def to_dict(self) -> dict[str, Any]:
        """The object that `estimate --json` prints; SI units as the names say, None where unknown."""
        return {"schema_version": SCHEMA_VERSION, **{name: _plain(value) for name, value in asdict(self).items()}}

    def to_request(self) -> Request:
        """The complete request that gives this plan again."""
        return build_request(self.inputs)

    def to_yaml(self) -> str:
        """The plan file: the complete request, then prediction and provenance."""
        plain = self.to_dict()
        prediction = {name: plain[name] for name in ("params", "flops", "memory", "time", "loss", "cost", "violations", "assumptions")}
        prediction["memory"] = {k: v for k, v in prediction["memory"].items() if k != "stages"}
        return to_yaml({**plain["inputs"], "prediction": prediction, "provenance": plain["provenance"]})

    def save(self, path: str | Path) -> None:
        """Writes the plan file, whole or not at all.

        Raises:
            InputError: the path cannot be written.
        """
        write_text(path, self.to_yaml())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def spec_to_plain(spec: Spec) -> dict[str, Any]:
    """A spec as it is written in YAML, without the keys that say nothing."""
    return spec.model_dump(by_alias=True, exclude_none=True)
