"""Measured steps as cases of a fit: rows of a table of publications, and runs of the reference trainer.

In: a request and its measured seconds. Out: a `Measured`: the job and the graph that the planner makes of the request, and its `StepWork`.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from planner.best_layouts import complete_layout
from planner.errors import InputError
from planner.files import to_json
from planner.graph import StepGraph
from planner.layout_rules import check_layout
from planner.measured_requests import to_request
from planner.measured_values import measured_step_s
from planner.measurements import Measurement
from planner.plan import Request, build_request
from planner.resolve import Job, resolve
from planner.run_files import read_plan, read_summary
from planner.schedules import check_schedule
from planner.step_work import StepWork, step_work

__all__ = ["Measured", "measure_request", "read_row", "read_run"]


INCONSISTENT_WEIGHT = 0.05
"""Of a row whose published figures disagree with each other."""


@dataclass(frozen=True)
class Measured:
    """One measured step and what the planner makes of its request."""

    name: str
    request: Request
    job: Job
    graph: StepGraph
    work: StepWork
    step_s: float
    peak_bytes: float | None
    group: Hashable
    """Steps of one group tell of each other."""
    weight_factor: float = 1.0
    source: str = ""
    model: str = ""
    """Its name where it was published."""


def measure_request(
    name: str, request: Request, step_s: float, peak_bytes: float | None, group: Hashable = None, weight_factor: float = 1.0
) -> Measured:
    """What the planner makes of a request.

    Raises:
        InputError: wrong input.
    """
    job = resolve(request)
    layout, _ = complete_layout(job, request.layout)
    check_layout(layout, job.facts)
    check_schedule(layout.schedule, layout.pp, layout.num_virtual_stages, job.global_batch_size // (layout.dp * layout.micro_batch_size))
    graph = job.graph(layout)
    work = step_work(graph, job.cluster, job.efficiency)
    return Measured(name, request, job, graph, work, step_s, peak_bytes, _configuration(job, graph) if group is None else group, weight_factor)


def _configuration(job: Job, graph: StepGraph) -> str:
    """The same for runs that differ in nothing that is priced per step."""
    workload = {key: value for key, value in job.workload.model_dump(mode="json").items() if key != "tokens"}
    cluster = [job.cluster.accelerator.id, job.cluster.num_devices]
    return to_json([job.model.model_dump(mode="json"), workload, cluster, graph.layout.model_dump(mode="json")])  # type: ignore[union-attr]


def read_run(folder: str | Path, stack: str | None = None) -> Measured:
    """A run that `reftrain run` finished.

    Args:
        stack: None: the one that its plan names.

    Raises:
        InputError: no such run, or one without timed steps.
    """
    folder = Path(folder)
    plan, summary = read_plan(folder), read_summary(folder)
    if summary.step_s is None or summary.peak_bytes is None:
        raise InputError.single("RUN_DIR", str(folder), "the run has no timed steps", "run it for at least 10 steps")
    request = build_request(plan, str(folder / "plan.yaml"))
    return measure_request(str(folder), _under(request, stack), summary.step_s.median, summary.peak_bytes)


def _under(request: Request, stack: str | None) -> Request:
    return request if stack is None else request.model_copy(update={"stack": stack})


def read_row(row: Measurement, stack: str | None = None) -> Measured | None:
    """A row of a table; None where it has no time.

    Raises:
        InputError: it cannot be expressed.
    """
    values: dict[str, Any] = to_request(row)
    request = _under(build_request(values), stack)
    group = tuple(row.text(column) for column in ("model", "accelerator", "num_devices", "precision"))
    found = measure_request(row.id, request, 1.0, None, group)
    peak = found.job.efficiency.peak_flops_per_s(found.job.precision.matmul_rate)
    step_s = measured_step_s(row, values, peak)
    if step_s is None:
        return None
    weight = 1.0 if row.is_consistent else INCONSISTENT_WEIGHT
    return replace(found, step_s=step_s, weight_factor=weight, source=row.values.get("source", ""), model=row.values.get("model", ""))
