"""The best plan: every legal layout on every piece of hardware that may be used, by an objective, within limits.

In: a request, a `Hardware`, an objective, limits. Out: a `SearchResult`: the best plans (each one what `estimate` says of it), the Pareto front
of cost against time, how much was looked at and why the rest was not taken.
"""

from __future__ import annotations

import math
import time as clock
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from planner.best_layouts import Candidate, Counts, Pool, best_first, exact_candidate, scan_space
from planner.errors import InputError
from planner.estimate import estimate
from planner.hardware_options import Hardware, Site, list_sites
from planner.layout import PartialLayout
from planner.layout_space import LayoutSpace, all_shards, layout_space
from planner.plan import Plan, Request
from planner.points import OBJECTIVES, Limits, Objective, Point, cheapest, is_beaten, keeps, price_run, value_of
from planner.pricing import least_device_s
from planner.registry import unknown_name
from planner.remedies import Remedy, find_remedies
from planner.resolve import Job, resolve
from planner.units import DAY_S

__all__ = ["SearchResult", "Wanted", "search"]

NO_LIMITS = Limits()
RECOMPUTES = ("none", "selective", "full")


@dataclass(frozen=True)
class Wanted:
    """What is searched for."""

    objective: Objective = "time"
    limits: Limits = NO_LIMITS
    top: int = 5
    pareto: bool = False
    recomputes: Sequence[str] = ()
    """Empty: the request's own where it names one, else all."""
    precisions: Sequence[str] = ()
    """Empty: the request's own."""


ITS_OWN, FASTEST = Hardware(), Wanted()


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
    num_jobs: int
    """Machines and policies."""
    num_pruned: int
    """Of them, those that were not looked at: even with nothing to wait for they could not be better."""
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
    exact: dict[tuple[int, int, int], Candidate] = field(default_factory=dict)
    """Layouts that were priced by themselves."""
    spaces: dict[Site, LayoutSpace] = field(default_factory=dict)
    best: list[Point] = field(default_factory=list)
    """Of what was looked at so far."""
    front: list[Point] = field(default_factory=list)
    """Likewise."""
    num_pruned: int = 0
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
    jobs = sorted(_jobs(request, sites, wanted, seen), key=lambda each: each.least)
    for done, each in enumerate(jobs):
        if not _may_be_better(each, seen) or not _may_be_better(own := each.with_policy(request), seen):
            seen.num_pruned += 1
        else:
            _scan(own.site, own.job, request.layout, seen)
            seen.best = list(_best(seen))
            seen.front = _front(seen) if wanted.pareto else []
        if progress is not None:
            progress(done + 1, len(jobs))
    plans = tuple(estimate(_request_of(request, point)) for point in seen.best)
    remedies = () if plans else tuple(_relaxed(request, hardware, wanted) if seen.counts.fits else find_remedies(request))
    return SearchResult(
        request,
        wanted,
        seen.counts,
        _most_first(seen.counts.refused),
        tuple(seen.notes),
        len(jobs),
        seen.num_pruned,
        plans,
        tuple(seen.front),
        remedies,
        clock.perf_counter() - start_s,
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


@dataclass(frozen=True)
class _Job:
    """A job on a site, and what its best plan is worth at most."""

    site: Site
    job: Job
    recompute: str
    """The policy that is meant; `bounds` may be those of no recomputation, which holds for all."""
    objective: Objective
    bounds: dict[int, Point]
    """Devices -> a plan that no layout can better."""

    @property
    def least(self) -> tuple[float, ...]:
        """Value of the best of them."""
        return min(value_of(point, self.objective) for point in self.bounds.values())

    def with_policy(self, request: Request) -> _Job:
        """The same under its own policy of recomputation."""
        if self.job.workload.recompute == self.recompute:
            return self
        job = _job_at(request, self.site, self.recompute, self.job.workload.precision)
        return replace(self, job=job, bounds=_bounds(request, self.site, job, self.objective))


def _jobs(request: Request, sites: Sequence[Site], wanted: Wanted, seen: _Field) -> Iterator[_Job]:
    """The job on each site, under each policy that is open."""
    own = request.workload
    recomputes = wanted.recomputes or ([own.recompute] if "recompute" in own.model_fields_set else RECOMPUTES)
    for site, precision in product(sites, wanted.precisions or [own.precision]):
        try:
            job = _job_at(request, site, RECOMPUTES[0] if len(recomputes) > 1 else recomputes[0], precision)
        except InputError as error:
            if any(not problem.key.endswith("precision") for problem in error.problems):
                raise
            seen.notes.append(f"{site.first.cluster.accelerator.id}: {error.problems[0].rule}")
            continue
        bounds = _bounds(request, site, job, wanted.objective)
        yield from (_Job(site, job, recompute, wanted.objective, bounds) for recompute in recomputes)


def _job_at(request: Request, site: Site, recompute: str, precision: str) -> Job:
    own = request.workload
    workload = type(own).model_validate({**own.model_dump(exclude_unset=True), "recompute": recompute, "precision": precision})
    return resolve(request.model_copy(update={"cluster": site.first.spec, "workload": workload}))


def _bounds(request: Request, site: Site, job: Job, objective: Objective) -> dict[int, Point]:
    device_s = least_device_s(job, all_shards(job, request.layout, site.device_counts)) if job.efficiency.curves is None else 0.0
    return {count: cheapest(site, Candidate(job, None, 0, count, device_s / count, 0.0), objective) for count in site.device_counts}


def _may_be_better(each: _Job, seen: _Field) -> bool:
    """Whether a job could still add to what was found, or to the front."""
    wanted = seen.wanted
    hopes = [point for point in each.bounds.values() if keeps(point, wanted.limits)]
    if not hopes or not seen.entries:
        return not seen.entries  # one job is looked at all the same, so that there is something to tell
    found = seen.best
    if len(found) < wanted.top or min(value_of(point, wanted.objective) for point in hopes) <= value_of(found[-1], wanted.objective):
        return True
    return wanted.pareto and not all(is_beaten(point, seen.front) for point in hopes)


def _scan(site: Site, job: Job, given: PartialLayout, seen: _Field) -> None:
    """All layouts of a job on a site."""
    if site not in seen.spaces:  # policies have the same layouts
        seen.spaces[site] = layout_space(job, given, site.device_counts)
    space = seen.spaces[site]
    seen.counts.add_space(space)
    pool = Pool(job, 64 * seen.wanted.top)
    scan_space(job, space, seen.counts, [(site.first.cluster.accelerator.memory_bytes, pool)], _step_limits(job, site, seen.wanted.limits))
    seen.entries.append((site, pool))


def _step_limits(job: Job, site: Site, limits: Limits) -> dict[str, dict[int, float]]:
    """Reason -> devices -> seconds that a step may last at most: by the days, and by the money where the devices are cheapest."""
    found: dict[str, dict[int, float]] = {}
    if limits.num_days is not None:
        found["max_days"] = {n: limits.num_days * DAY_S / price_run(job, rentals[0], 1.0).train_s for n, rentals in site.rentals.items()}
    if limits.usd is not None:
        per_second = {n: [price_run(job, rental, 1.0).usd for rental in rentals] for n, rentals in site.rentals.items()}
        found["budget"] = {n: max((limits.usd / usd for usd in each if usd is not None), default=0.0) for n, each in per_second.items()}
    return found


def _exactly(seen: _Field, objective: Objective) -> Callable[[Point], Point]:
    """Prices points by themselves, each layout once."""
    site_of = {id(pool.job): site for site, pool in seen.entries}

    def exact(point: Point) -> Point:
        candidate = point.candidate
        key = (id(candidate.job), id(candidate.grid), candidate.index)
        if key not in seen.exact:
            seen.exact[key] = exact_candidate(candidate)
        return cheapest(site_of[id(candidate.job)], seen.exact[key], objective)

    return exact


def _best(seen: _Field) -> Iterator[Point]:
    """The best points that keep the limits, at most as many as wanted: the best one of each shape."""
    wanted = seen.wanted
    points = [cheapest(site, candidate, wanted.objective) for site, pool in seen.entries for candidate in pool.candidates()]
    if wanted.objective == "cost" and points and all(point.cost.usd is None for point in points):
        raise _no_price("--objective", "cost")
    shown: set[tuple[object, ...]] = set()
    for point in best_first(points, lambda point: value_of(point, wanted.objective), _exactly(seen, wanted.objective)):
        shape = _shape(point)
        if keeps(point, wanted.limits) and shape not in shown:
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
    groups = [(site, own) for site, pool in seen.entries for own in pool.fastest.values() if own]
    bounds = [(cheapest(site, own[0], "cost"), site, own) for site, own in groups]
    if bounds and all(bound.cost.usd is None for bound, _, _ in bounds):
        raise _no_price("--pareto", True)
    bounds.sort(key=lambda each: value_of(each[0], "cost"))
    found: list[Point] = []
    for bound, site, own in bounds:
        if bound.cost.usd is None or is_beaten(bound, found):
            continue
        points = [cheapest(site, candidate, "cost") for candidate in own]
        point = next(best_first(points, lambda each: value_of(each, "time"), _exactly(seen, "cost")))
        if keeps(point, seen.wanted.limits):
            found.append(point)
    front = [point for point in found if not is_beaten(point, [other for other in found if other is not point])]
    return sorted(front, key=lambda point: point.cost.train_s)


def _request_of(request: Request, point: Point) -> Request:
    """The complete request of a point."""
    job = point.candidate.job
    workload = request.workload.model_copy(update={"recompute": job.workload.recompute, "precision": job.workload.precision})
    layout = PartialLayout(**point.candidate.layout.model_dump())
    return request.model_copy(update={"cluster": point.rental.spec, "workload": workload, "layout": layout})


def _most_first(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda each: -each[1]))
