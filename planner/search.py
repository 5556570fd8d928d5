"""The best plan: every legal layout on every piece of hardware that may be used, by an objective, within limits.

In: a request, a `Hardware`, an objective, limits. Out: a `SearchResult`: the best plans (each one what `estimate` says of it), the Pareto front
of cost against time, how much was looked at and why the rest was not taken.
"""

from __future__ import annotations

import math
import time as clock
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from planner.best_layouts import Candidate, Counts, Pool, best_first, exact_candidate, scan_space
from planner.economics import CostBreakdown, Goodput, estimate_cost, estimate_goodput
from planner.errors import InputError
from planner.estimate import estimate
from planner.hardware_options import Hardware, Rental, Site, list_sites
from planner.layout import PartialLayout
from planner.layout_space import layout_space
from planner.plan import Plan, Request
from planner.registry import unknown_name
from planner.remedies import Remedy, find_remedies
from planner.resolve import Job, resolve
from planner.units import DAY_S

__all__ = ["OBJECTIVES", "Limits", "Objective", "Point", "SearchResult", "Wanted", "search"]

Objective = Literal["time", "cost", "devices", "energy"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
RECOMPUTES = ("none", "selective", "full")


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
class Wanted:
    """What is searched for."""

    objective: Objective = "time"
    limits: Limits = Limits()
    top: int = 5
    pareto: bool = False
    recomputes: Sequence[str] = ()
    """Empty: the request's own where it names one, else all."""
    precisions: Sequence[str] = ()
    """Empty: the request's own."""


ITS_OWN, FASTEST = Hardware(), Wanted()


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


@dataclass(frozen=True)
class SearchResult:
    """What a search found."""

    request: Request
    wanted: Wanted
    counts: Counts
    rejects: dict[str, int]
    """Reason -> layouts that were not taken for it."""
    notes: tuple[str, ...]
    """Hardware that was left out, and why."""
    plans: tuple[Plan, ...]
    """Best first."""
    pareto: tuple[Point, ...]
    """No other plan is both cheaper and faster; fastest first."""
    remedies: tuple[Remedy, ...]
    """Where nothing was found: the smallest changes that fit."""
    elapsed_s: float

    def save(self, path: str) -> None:
        """Writes the best plan."""
        self.plans[0].save(path)


@dataclass
class _Field:
    """What is being looked at: pools of candidates, and why others are out."""

    wanted: Wanted
    counts: Counts = field(default_factory=Counts)
    entries: list[tuple[Site, Pool]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def search(
    request: Request, hardware: Hardware = ITS_OWN, wanted: Wanted = FASTEST, progress: Callable[[int, int], None] | None = None
) -> SearchResult:
    """The best plans.

    Args:
        request: the model and the workload; `layout` may fix some keys. Its cluster is what `hardware` leaves open.
        progress: told after each (sites done, sites in all).

    Raises:
        InputError: wrong input, or no layout keeps the given keys anywhere.

    Example:
        >>> from planner.plan import build_request
        >>> found = search(build_request({"model": "llama-3.1-8b", "cluster": {"accelerator": "h100-80gb-sxm", "num_devices": 8}}))
        >>> found.plans[0].fits
        True
    """
    start_s = clock.perf_counter()
    wanted.limits.check()
    if wanted.objective not in OBJECTIVES:
        raise unknown_name("--objective", wanted.objective, list(OBJECTIVES))
    sites, refused = list_sites(request, _within(hardware, request, wanted.limits))
    seen = _Field(wanted, notes=refused)
    jobs = [(site, job) for site in sites for job in _jobs(request, site, wanted, seen)]
    for done, (site, job) in enumerate(jobs):
        _scan(site, job, request.layout, seen)
        if progress is not None:
            progress(done + 1, len(jobs))
    best = list(_best(seen))
    plans = tuple(estimate(_request_of(request, point)) for point in best)
    front = tuple(_front(seen)) if wanted.pareto else ()
    remedies = () if plans else tuple(_relaxed(request, hardware, wanted) if seen.counts.fits else find_remedies(request))
    return SearchResult(
        request, wanted, seen.counts, _most_first(seen.counts.refused), tuple(seen.notes), plans, front, remedies, clock.perf_counter() - start_s
    )


def _relaxed(request: Request, hardware: Hardware, wanted: Wanted) -> Iterator[Remedy]:
    """The least by which each limit must give way, the others kept; or both, where one alone is not enough."""
    limits = wanted.limits
    changes: list[tuple[Limits, Objective]] = []
    if limits.usd is not None:
        changes.append((replace(limits, usd=None), "cost"))
    if limits.num_days is not None:
        changes.append((replace(limits, num_days=None), "time"))
    for wider, objective in [*changes, (replace(limits, usd=None, num_days=None), "cost")]:
        if wider == limits:
            continue
        found = search(request, hardware, replace(wanted, objective=objective, limits=wider, top=1, pareto=False))
        for plan in found.plans:
            needed = []
            if wider.usd is None and limits.usd is not None and plan.cost.usd is not None:
                needed.append(f"--budget {math.ceil(plan.cost.usd.value):,} (now {limits.usd:,.0f})")
            if wider.num_days is None and limits.num_days is not None:
                needed.append(f"--max-days {math.ceil(plan.time.train_s.value / DAY_S * 10) / 10:g} (now {limits.num_days:g})")
            yield Remedy(" and ".join(needed), plan)
            if wider.usd is wider.num_days is None:
                return


def _within(hardware: Hardware, request: Request, limits: Limits) -> Hardware:
    """Without numbers of devices beyond the limit."""
    counts = list(hardware.device_counts or [request.cluster.num_devices])
    allowed = [count for count in counts if limits.num_devices is None or count <= limits.num_devices]
    if not allowed:
        raise InputError.single("--max-devices", limits.num_devices, f"is below all numbers of devices: {counts}", "name fewer with --num-devices")
    return replace(hardware, device_counts=allowed)


def _jobs(request: Request, site: Site, wanted: Wanted, seen: _Field) -> Iterator[Job]:
    """The job on a site, under each policy of recomputation and precision that is open."""
    own = request.workload
    recomputes = wanted.recomputes or ([own.recompute] if "recompute" in own.model_fields_set else RECOMPUTES)
    for precision in wanted.precisions or [own.precision]:
        for recompute in recomputes:
            workload = type(own).model_validate({**own.model_dump(exclude_unset=True), "recompute": recompute, "precision": precision})
            try:
                yield resolve(request.model_copy(update={"cluster": site.first.spec, "workload": workload}))
            except InputError as error:
                if any(problem.key.startswith("model") for problem in error.problems):
                    raise
                seen.notes.append(f"{site.first.cluster.accelerator.id}: {error.problems[0].rule}")
                break


def _scan(site: Site, job: Job, given: PartialLayout, seen: _Field) -> None:
    """All layouts of a job on a site."""
    space = layout_space(job, given, site.device_counts)
    seen.counts.add_space(space)
    pool = Pool(job, 64 * seen.wanted.top)
    scan_space(job, space, seen.counts, [(site.first.cluster.accelerator.memory_bytes, pool)], _step_limits(job, site, seen.wanted.limits))
    seen.entries.append((site, pool))


def _step_limits(job: Job, site: Site, limits: Limits) -> dict[str, dict[int, float]]:
    """Reason -> devices -> seconds that a step may last at most: by the days, and by the money where the devices are cheapest."""
    found: dict[str, dict[int, float]] = {}
    if limits.num_days is not None:
        found["max_days"] = {n: limits.num_days * DAY_S / _price(job, rentals[0], 1.0).train_s for n, rentals in site.rentals.items()}
    if limits.usd is not None:
        per_second = {n: [_price(job, rental, 1.0).usd for rental in rentals] for n, rentals in site.rentals.items()}
        found["budget"] = {n: max((limits.usd / usd for usd in each if usd is not None), default=0.0) for n, each in per_second.items()}
    return found


def _price(job: Job, rental: Rental, step_s: float) -> CostBreakdown:
    """The whole run, which is in proportion to the step."""
    num_steps = -(-job.tokens // (job.global_batch_size * job.seq_len))
    return estimate_cost(step_s, num_steps, rental.cluster, _goodput(rental))


def _goodput(rental: Rental) -> Goodput:
    return estimate_goodput(rental.cluster.num_devices / rental.cluster.node_size)


def _points(site: Site, candidate: Candidate) -> Iterator[Point]:
    """A layout at each price that its devices are let for."""
    for rental in site.rentals[candidate.num_devices]:
        yield Point(candidate, rental, _price(candidate.job, rental, candidate.step_s))


def _value(point: Point, objective: Objective) -> tuple[float, float]:
    """What is minimised, and what decides between equals."""
    cost = point.cost
    usd = math.inf if cost.usd is None else cost.usd
    return {
        "time": (cost.train_s, usd),
        "cost": (usd, cost.train_s),
        "devices": (float(point.num_devices), cost.train_s),
        "energy": (cost.energy_kwh, cost.train_s),
    }[objective]


def _cheapest(site: Site, candidate: Candidate, objective: Objective) -> Point:
    return min(_points(site, candidate), key=lambda point: _value(point, objective))


def _keeps(point: Point, limits: Limits) -> bool:
    usd = point.cost.usd
    return (limits.num_days is None or point.cost.train_s <= limits.num_days * DAY_S) and (limits.usd is None or (usd is not None and usd <= limits.usd))


def _exactly(site_of: dict[int, Site], objective: Objective) -> Callable[[Point], Point]:
    """Prices points by themselves."""

    def exact(point: Point) -> Point:
        return _cheapest(site_of[id(point.candidate.job)], exact_candidate(point.candidate), objective)

    return exact


def _best(seen: _Field) -> Iterator[Point]:
    """The best points that keep the limits, at most as many as wanted: the best one of each shape."""
    wanted = seen.wanted
    site_of = {id(pool.job): site for site, pool in seen.entries}
    points = [_cheapest(site, candidate, wanted.objective) for site, pool in seen.entries for candidate in pool.candidates()]
    if wanted.objective == "cost" and points and all(point.cost.usd is None for point in points):
        raise _no_price("--objective", "cost")
    shown: set[tuple[object, ...]] = set()
    for point in best_first(points, lambda point: _value(point, wanted.objective), _exactly(site_of, wanted.objective)):
        shape = _shape(point)
        if _keeps(point, wanted.limits) and shape not in shown:
            shown.add(shape)
            yield point
        if len(shown) == wanted.top:
            return


def _shape(point: Point) -> tuple[object, ...]:
    """What a person would call the same plan: prices, policies and the split of data parallelism apart."""
    layout, names = point.candidate.layout, ("tp", "cp", "pp", "ep", "num_virtual_stages", "schedule", "micro_batch_size")
    return (point.rental.cluster.accelerator.id, point.num_devices, *(getattr(layout, name) for name in names))


def _no_price(key: str, value: object) -> InputError:
    return InputError.single(key, value, "needs prices, and none is known for this hardware", "name offers with --offer, or give --price")


def _front(seen: _Field) -> list[Point]:
    """Cost against time: no other point is as fast and as cheap; fastest first."""
    site_of = {id(pool.job): site for site, pool in seen.entries}
    groups = [(site, own) for site, pool in seen.entries for own in pool.fastest.values() if own]
    bounds = [(_cheapest(site, own[0], "cost"), site, own) for site, own in groups]
    if bounds and all(bound.cost.usd is None for bound, _, _ in bounds):
        raise _no_price("--pareto", True)
    bounds.sort(key=lambda each: _value(each[0], "cost"))
    found: list[Point] = []
    for bound, site, own in bounds:
        if bound.cost.usd is None or _is_beaten(bound, found):
            continue
        points = [_cheapest(site, candidate, "cost") for candidate in own]
        point = next(best_first(points, lambda each: _value(each, "time"), _exactly(site_of, "cost")))
        if _keeps(point, seen.wanted.limits):
            found.append(point)
    front = [point for point in found if not _is_beaten(point, [other for other in found if other is not point])]
    return sorted(front, key=lambda point: point.cost.train_s)


def _is_beaten(point: Point, others: Iterable[Point]) -> bool:
    """Whether another is as fast and as cheap."""
    usd, train_s = point.cost.usd or math.inf, point.cost.train_s
    return any((other.cost.usd or math.inf) <= usd and other.cost.train_s <= train_s for other in others)


def _request_of(request: Request, point: Point) -> Request:
    """The complete request of a point."""
    job = point.candidate.job
    workload = request.workload.model_copy(update={"recompute": job.workload.recompute, "precision": job.workload.precision})
    layout = PartialLayout(**point.candidate.layout.model_dump())
    return request.model_copy(update={"cluster": point.rental.spec, "workload": workload, "layout": layout})


def _most_first(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda each: -each[1]))
