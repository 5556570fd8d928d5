"""The fastest layouts of a job that fit, exact to the last digit.

Grids are priced by sums in another order, and pipelines only at the ends of runs of stages: never above the exact time but for rounding. So a
layout counts only once it was priced by itself, and a search ends when no other can be better.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from planner.layout import Layout, PartialLayout
from planner.layout_grid import LayoutGrid
from planner.layout_space import LayoutSpace, layout_space, no_layout
from planner.memory import estimate_memory
from planner.pricing import Prices, price_grids
from planner.resolve import Job
from planner.timing import estimate_time

__all__ = ["Candidate", "Counts", "Pool", "best_first", "complete_layout", "exact_candidate", "exact_price", "scan_space"]

T = TypeVar("T")
ROUNDING_FRACTION = 1e-9
"""What sums in another order may differ by."""
POOL_SIZE = 64
"""Layouts that are kept for each number of devices."""


@dataclass(frozen=True)
class Candidate:
    """A layout: what it takes at least, or, once it was priced by itself, exactly. Without a grid: what any layout takes at least."""

    job: Job
    grid: LayoutGrid | None
    index: int
    num_devices: int
    step_s: float
    peak_bytes: float

    @property
    def layout(self) -> Layout:
        """The layout itself."""
        assert self.grid is not None
        return self.grid.layout(self.index)


@dataclass
class Counts:
    """What a search looked at."""

    enumerated: int = 0
    legal: int = 0
    priced: int = 0
    fits: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    """Reason -> layouts: the first rule that each breaks, then memory, then the limits of a search."""

    def add_space(self, space: LayoutSpace) -> None:
        """One more space was enumerated."""
        self.enumerated += space.num_combined
        self.legal += space.num_legal
        for rule, count in space.refused.items():
            self.refuse(rule, count)

    def refuse(self, reason: str, count: int) -> None:
        """More layouts are out for a reason."""
        if count:
            self.refused[reason] = self.refused.get(reason, 0) + count


@dataclass
class Pool:
    """The layouts of a job with the smallest times, at most `size` for each number of devices."""

    job: Job
    size: int = POOL_SIZE
    fastest: dict[int, list[Candidate]] = field(default_factory=dict)

    def candidates(self) -> list[Candidate]:
        """All of them."""
        return [each for own in self.fastest.values() for each in own]

    def add(self, prices: Prices, fits: np.ndarray) -> None:
        """More layouts; `fits`: which of them may be taken, [W, B, N, R]."""
        grid, times = prices.grid, np.where(fits, prices.step_s, np.inf)
        for n, count in enumerate(grid.num_devices.tolist()):
            own = times[:, :, n, :].ravel()
            known = self.fastest.setdefault(count, [])
            limit = known[-1].step_s if len(known) >= self.size else np.inf
            places = np.flatnonzero(own < limit)
            if len(places) > self.size:
                places = places[np.argpartition(own[places], self.size - 1)[: self.size]]
            if len(places):
                known += [self._candidate(prices, n, int(place)) for place in places]
                known.sort(key=lambda found: found.step_s)
                del known[self.size :]

    def _candidate(self, prices: Prices, n: int, place: int) -> Candidate:
        w, b, num_sizes, r = prices.grid.shape
        at = np.unravel_index(place, (w, b, r))
        where = (at[0], at[1], n, at[2])
        index = int(np.ravel_multi_index(where, (w, b, num_sizes, r)))
        least_s = float(prices.step_s[where]) * (1 - ROUNDING_FRACTION)
        return Candidate(self.job, prices.grid, index, int(prices.grid.num_devices[n]), least_s, float(prices.peak_bytes[where]))


def scan_space(
    job: Job,
    space: LayoutSpace,
    counts: Counts,
    pools: Sequence[tuple[float, Pool]],
    step_limits: Mapping[str, Mapping[int, float]] | None = None,
) -> None:
    """Prices a whole space and fills the pools, each with what fits and needs at most so many bytes.

    Args:
        step_limits: reason -> number of devices -> seconds of a step beyond which a layout is out for that reason.
    """
    for prices in price_grids(job, space.grids):
        legal = prices.grid.legal
        fits = legal & (prices.peak_bytes <= job.cluster.accelerator.memory_bytes)
        num_legal, num_fits = int(np.count_nonzero(legal)), int(np.count_nonzero(fits))
        counts.priced += num_legal
        counts.fits += num_fits
        counts.refuse("memory", num_legal - num_fits)
        for reason, longest_s in (step_limits or {}).items():
            longest = np.array([longest_s[count] for count in prices.grid.num_devices.tolist()])[:, None]
            kept = fits & (prices.step_s * (1 - ROUNDING_FRACTION) <= longest)
            counts.refuse(reason, int(np.count_nonzero(fits)) - int(np.count_nonzero(kept)))
            fits = kept
        for limit_bytes, pool in pools:
            pool.add(prices, fits & (prices.peak_bytes <= limit_bytes))


def exact_price(job: Job, layout: Layout) -> tuple[float, float]:
    """(seconds per step, peak bytes) of one layout, as `estimate` gives them."""
    graph = job.graph(layout)
    time = estimate_time(graph, job.cluster, job.efficiency, job.nearby, job.software_year)
    return float(time.step_s), float(estimate_memory(graph, job.stack, job.cluster).peak_bytes)


def exact_candidate(candidate: Candidate) -> Candidate:
    """The same, priced by itself."""
    step_s, peak_bytes = exact_price(candidate.job, candidate.layout)
    return replace(candidate, step_s=step_s, peak_bytes=peak_bytes)


def best_first(items: Iterable[T], value: Callable[[T], Any], exact: Callable[[T], T]) -> Iterator[T]:
    """The items in the order of `value`, each exact.

    Args:
        items: with lower bounds of their times.
        value: what is minimised; it never falls when a step takes longer.
        exact: an item once it is priced by itself.
    """
    queue = [(value(each), 0, place, each) for place, each in enumerate(items)]
    heapq.heapify(queue)
    while queue:
        _, is_exact, place, item = heapq.heappop(queue)
        if is_exact:
            yield item
        else:
            found = exact(item)
            heapq.heappush(queue, (value(found), 1, place, found))


def complete_layout(job: Job, given: PartialLayout) -> tuple[Layout, list[str]]:
    """The layout itself when complete; else the fastest one that fits, or the smallest one when none does.

    Raises:
        InputError: no layout keeps the given keys and the rules.
    """
    if given.is_complete:
        return given.complete(), []
    space = layout_space(job, given)
    if not space.grids:
        raise no_layout(job, given)
    limit = job.cluster.accelerator.memory_bytes
    safe, tight = Pool(job), Pool(job)
    scan_space(job, space, Counts(), [(limit / job.stack.memory_interval.high, safe), (limit, tight)])
    among = f"of {space.num_legal:,} legal ones"
    for pool, kind in ((safe, "that fits even at the upper bound of its memory"), (tight, "that fits; none fits at the upper bound of its memory")):
        found = next(best_first(pool.candidates(), lambda each: each.step_s, exact_candidate), None)
        if found is not None:
            return found.layout, [f"layout: the fastest {among} {kind}"]
    return _smallest(job, space), [f"layout: none {among} fits; this one needs least memory"]


def _smallest(job: Job, space: LayoutSpace) -> Layout:
    """The layout of a space that needs least memory; the first of several."""
    least_bytes, layout = np.inf, None
    for prices in price_grids(job, space.grids):
        held = np.where(prices.grid.legal, prices.peak_bytes, np.inf)
        index = int(np.argmin(held))
        if held.flat[index] < least_bytes:
            least_bytes, layout = held.flat[index], prices.grid.layout(index)
    assert layout is not None
    return layout
