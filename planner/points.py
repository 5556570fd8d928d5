"""A layout on rented devices: what the whole run takes and costs, and which of two such points is better.

In: a `Candidate` and a `Site`. Out: `Point`s, and their order under an objective and limits. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from planner.best_layouts import Candidate
from planner.economics import CostBreakdown, Goodput, estimate_cost, estimate_goodput
from planner.errors import InputError
from planner.hardware_options import Rental, Site
from planner.resolve import Job
from planner.units import DAY_S

__all__ = ["OBJECTIVES", "Limits", "Objective", "Point", "cheapest", "is_beaten", "keeps", "price_run", "value_of"]

Objective = Literal["time", "cost", "devices", "energy"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


@dataclass(frozen=True)
class Limits:
    """What a plan may cost and take at most."""

    usd: float | None = None
    num_days: float | None = None
    num_devices: int | None = None

    def check(self) -> None:
        """Refuses limits that nothing can keep.

        Raises:
            InputError: a limit of nothing.
        """
        for key, value in (("--budget", self.usd), ("--max-days", self.num_days), ("--max-devices", self.num_devices)):
            if value is not None and not value > 0:
                raise InputError.single(key, value, "must be more than 0", f"leave {key} out, or raise it")


@dataclass(frozen=True)
class Point:
    """A layout on a rental, with what the whole run takes and costs."""

    candidate: Candidate
    rental: Rental
    cost: CostBreakdown

    @property
    def num_devices(self) -> int:
        """Devices in all."""
        return self.candidate.num_devices


def price_run(job: Job, rental: Rental, step_s: float) -> CostBreakdown:
    """The whole run, which is in proportion to the step."""
    num_steps = -(-job.tokens // (job.global_batch_size * job.seq_len))
    return estimate_cost(step_s, num_steps, rental.cluster, _goodput(rental))


def _goodput(rental: Rental) -> Goodput:
    return estimate_goodput(rental.cluster.num_devices / rental.cluster.node_size)


def points_of(site: Site, candidate: Candidate) -> Iterator[Point]:
    """A layout at each price that its devices are let for."""
    for rental in site.rentals[candidate.num_devices]:
        yield Point(candidate, rental, price_run(candidate.job, rental, candidate.step_s))


def value_of(point: Point, objective: Objective) -> tuple[float, ...]:
    """What is minimised, and what decides between equals."""
    cost = point.cost
    usd = math.inf if cost.usd is None else cost.usd
    return {
        "time": (cost.train_s, usd),
        "cost": (usd, cost.train_s),
        "devices": (float(point.num_devices), cost.train_s, usd),
        "energy": (cost.energy_kwh, cost.train_s, usd),
    }[objective]


def cheapest(site: Site, candidate: Candidate, objective: Objective) -> Point:
    """The layout at the best of the prices that its devices are let for."""
    return min(points_of(site, candidate), key=lambda point: value_of(point, objective))


def keeps(point: Point, limits: Limits) -> bool:
    """Whether it costs and takes no more than it may."""
    usd = point.cost.usd
    is_in_time = limits.num_days is None or point.cost.train_s <= limits.num_days * DAY_S
    return is_in_time and (limits.usd is None or (usd is not None and usd <= limits.usd))


def is_beaten(point: Point, others: Iterable[Point]) -> bool:
    """Whether another is as fast and as cheap."""
    usd, train_s = point.cost.usd or math.inf, point.cost.train_s
    return any((other.cost.usd or math.inf) <= usd and other.cost.train_s <= train_s for other in others)
