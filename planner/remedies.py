"""The smallest changes that make a plan fit, each one tried.

In: a request whose plan does not fit. Out: changes whose plans do, in the order in which a user would try them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from planner.errors import InputError
from planner.estimate import estimate
from planner.layout import PartialLayout
from planner.plan import Plan, Request

__all__ = ["Remedy", "find_remedies"]

DEVICE_FACTORS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Remedy:
    """A change, and the plan that it leads to."""

    change: str
    plan: Plan


def find_remedies(request: Request) -> list[Remedy]:
    """Changes that fit: recompute, smaller microbatches, another layout, then the fewest devices that do.

    More devices keep the global batch; they are tried in doublings, and only the first number that fits is kept, without and
    with full recompute.
    """
    found = [Remedy(text, plan) for text, changed in _same_devices(request) if (plan := _fitting(changed)) is not None]
    for recompute in dict.fromkeys((request.workload.recompute, "full")):
        wanted = _with(request, recompute=recompute)
        for factor in () if found else DEVICE_FACTORS:
            count = request.cluster.num_devices * factor
            cluster = wanted.cluster.model_copy(update={"num_devices": count})
            plan = _fitting(wanted.model_copy(update={"cluster": cluster, "layout": PartialLayout()}))
            if plan is not None:
                text = f"num_devices {count:,}" + (f", recompute {recompute}" if recompute != request.workload.recompute else "")
                found.append(Remedy(text, plan))
                break
    return found


def _same_devices(request: Request) -> Iterator[tuple[str, Request]]:
    """Changes that need no more hardware, smallest first."""
    layout, recompute = request.layout, request.workload.recompute
    stronger = {"none": ("selective", "full"), "selective": ("full",), "full": ()}[recompute]
    for policy in stronger:
        yield f"recompute {policy}", _with(request, recompute=policy)
    if (layout.micro_batch_size or 1) > 1:
        yield "micro_batch_size 1", request.model_copy(update={"layout": layout.model_copy(update={"micro_batch_size": 1})})
    if layout != PartialLayout():
        anywhere = request.model_copy(update={"layout": PartialLayout()})
        yield "another layout", anywhere
        for policy in stronger:
            yield f"another layout, recompute {policy}", _with(anywhere, recompute=policy)


def _with(request: Request, *, recompute: str) -> Request:
    return request.model_copy(update={"workload": request.workload.model_copy(update={"recompute": recompute})})


def _fitting(request: Request) -> Plan | None:
    """The plan of a request if it is legal and fits."""
    try:
        plan = estimate(request)
    except InputError:  # e.g. more data-parallel ranks than the batch has sequences
        return None
    return plan if plan.fits else None
