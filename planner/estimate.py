"""THE MAIN PATH: a request in, a plan out."""

from __future__ import annotations

from typing import Any

from planner.assemble import assemble_plan
from planner.best_layouts import complete_layout
from planner.economics import estimate_cost, estimate_goodput
from planner.layout_rules import check_layout
from planner.memory import estimate_memory
from planner.plan import Plan, Request, build_request
from planner.resolve import resolve
from planner.schedules import check_schedule
from planner.timing import estimate_time

__all__ = ["estimate"]


def estimate(request: Request | dict[str, Any]) -> Plan:
    """Memory, time, cost and loss of one training run, with its best layout where none is given.

    Args:
        request: a `Request` (see `load_plan`) or a mapping with its keys.
    Returns:
        The plan; one that does not fit has `violations`.
    Raises:
        InputError: wrong input; every mistake at once.

    Example:
        >>> plan = estimate({"model": "llama-3.1-8b", "cluster": {"accelerator": "h100-80gb-sxm", "num_devices": 64}})
        >>> plan.fits
        True
    """
    request = build_request(request) if isinstance(request, dict) else request
    job = resolve(request)
    layout, why = complete_layout(job, request.layout)
    check_layout(layout, job.facts)
    check_schedule(layout.schedule, layout.pp, layout.num_virtual_stages, job.global_batch_size // (layout.dp * layout.micro_batch_size))

    graph = job.graph(layout)
    memory = estimate_memory(graph, job.stack, job.cluster)
    time = estimate_time(graph, job.cluster, job.efficiency, job.nearby, job.software_year)
    num_steps = -(-job.tokens // (job.global_batch_size * job.seq_len))
    goodput = estimate_goodput(job.cluster.num_devices / job.cluster.node_size)
    cost = estimate_cost(float(time.step_s), num_steps, job.cluster, goodput)
    return assemble_plan(request, job, layout, graph, memory, time, cost, goodput, why)
