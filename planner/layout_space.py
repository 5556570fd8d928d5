"""All layouts worth trying for a job, and the best of them.

In: a job, the keys of a layout that are given, numbers of devices. Out: grids of every legal layout that the job's stack can run; and the
fastest that fit, exact to the last digit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from planner.errors import InputError
from planner.layout import Layout, LayoutArrays, PartialLayout
from planner.layout_grid import Axes, LayoutGrid, make_grid, pipeline_of, without_unused
from planner.layout_rules import check_layout
from planner.resolve import Job
from planner.schedules import SCHEDULES

__all__ = ["LayoutSpace", "all_shards", "layout_space", "no_layout"]

LONGEST_CHUNKS = 8
"""Numbers of virtual stages that are tried for one pipeline, at most."""
LEAST_LOCAL_TOKENS = 1024
"""Context parallelism is tried while each rank keeps so many tokens of a sequence."""
LARGEST_MICRO_BATCH = 64
LARGEST_TP = 64


@dataclass(frozen=True, eq=False)
class LayoutSpace:
    """Every legal layout of a job."""

    grids: list[LayoutGrid]
    num_combined: int
    """Combinations of degrees that make up a number of devices asked for."""
    refused: dict[str, int]
    """How many of them each rule was the first to refuse."""

    @property
    def num_legal(self) -> int:
        """Layouts that keep every rule."""
        return sum(int(np.count_nonzero(grid.legal)) for grid in self.grids)


def layout_space(job: Job, given: PartialLayout, device_counts: Sequence[int] | None = None) -> LayoutSpace:
    """Every legal layout that the job's stack can run and that keeps the given keys.

    Tried: tp up to a scale-up domain, cp while ranks keep 1,024 tokens, pp up to the layers, all divisors of the experts for ep, every number of
    replicas, micro-batches that divide the batch up to 64, with and without sequence parallelism, the stack's ZeRO stages and schedules, with
    up to 8 numbers of virtual stages.

    Args:
        device_counts: numbers of devices to try; None: the job's own. All must have the job's nodes and links.
    """
    counts = sorted(set(device_counts or [job.cluster.num_devices]))
    axes = Axes(_shards(job, given, counts), _batches(job, given), np.array(counts), _replicas(given, counts), given.dp_shard)
    grids = [
        make_grid(job.facts, axes, pipeline, stages)
        for pipeline in _pipelines(job, given, counts)
        for stages in _zero_stages(job, given, pipeline[0])
    ]
    grids.sort(key=pipeline_of)
    refused: dict[str, int] = {}
    for grid in grids:
        for rule, count in grid.refused.items():
            refused[rule] = refused.get(rule, 0) + count
    return LayoutSpace(without_unused(grids), sum(grid.num_combined for grid in grids), refused)


def all_shards(job: Job, given: PartialLayout, device_counts: Sequence[int]) -> LayoutArrays:
    """Every tp, cp, ep, micro-batch and sequence parallelism of a space, legal or not, on devices that share no data; [W, B]."""
    tp, cp, ep = (row[:, None] for row in _shards(job, given, sorted(device_counts)))
    micro_batch_size, sequence_parallel = (row[None, :] for row in _batches(job, given))
    return LayoutArrays(1, 1, tp, cp, ep, 0, sequence_parallel.astype(bool), micro_batch_size)


def _divisors(numbers: Sequence[int], limit: int) -> list[int]:
    """All that divide one of the numbers."""
    found: set[int] = set()
    for number in numbers:
        small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
        found |= {d for each in small for d in (each, number // each) if d <= limit}
    return sorted(found)


def _shards(job: Job, given: PartialLayout, counts: Sequence[int]) -> np.ndarray:
    """tp, cp and ep, [3, W]."""

    def options(name: str, tried: list[int]) -> list[int]:
        value = getattr(given, name)
        return [value] if value is not None else tried if name in job.stack.axes else [1]

    tps = options("tp", _divisors(counts, min(job.cluster.scale_up.domain_size, LARGEST_TP)))
    cps = options("cp", _divisors(counts, max(job.seq_len // LEAST_LOCAL_TOKENS, 1)))
    experts = job.model.moe.num_experts if job.model.moe else 1
    return np.array(list(product(tps, cps, options("ep", _divisors([experts], experts))))).T


def _batches(job: Job, given: PartialLayout) -> np.ndarray:
    """micro_batch_size and sequence_parallel, [2, B]."""
    sizes = [given.micro_batch_size] if given.micro_batch_size else _divisors([job.global_batch_size], LARGEST_MICRO_BATCH)
    is_parallel = [given.sequence_parallel] if given.sequence_parallel is not None else [False, True] if "tp" in job.stack.axes else [False]
    return np.array(list(product(sizes, is_parallel))).T


def _replicas(given: PartialLayout, counts: Sequence[int]) -> np.ndarray:
    return np.array([given.dp_replicate] if given.dp_replicate is not None else _divisors(counts, max(counts)))


def _zero_stages(job: Job, given: PartialLayout, pp: int) -> list[list[int]]:
    """The ZeRO stages to try; in one list those that differ in what becomes of the optimizer alone."""
    in_pipelines = job.stack.zero_stages_in_pipelines
    tried = job.stack.zero_stages if pp == 1 or in_pipelines is None else in_pipelines
    stages: list[int] = [given.zero_stage] if given.zero_stage is not None else list(tried)
    if job.stack.weight_storage == "fp32_in_place":
        return [[stage] for stage in stages]
    alike = [stage for stage in stages if stage < 2]
    return [*([alike] if alike else []), *([stage] for stage in stages if stage >= 2)]


def _pipelines(job: Job, given: PartialLayout, counts: Sequence[int]) -> list[tuple[int, int, str]]:
    """(pp, num_virtual_stages, schedule) to try."""
    layers = job.model.num_layers
    tried = [given.pp] if given.pp is not None else _divisors(counts, layers + 2) if "pp" in job.stack.axes else [1]
    return [(pp, v, name) for pp in tried for name, v in _schedules(job, given, pp)]


def _schedules(job: Job, given: PartialLayout, pp: int) -> list[tuple[str, int]]:
    """(schedule, num_virtual_stages) to try for a pipeline of `pp` stages."""
    own = given.num_virtual_stages
    if given.schedule is None and pp == 1:
        names = ["interleaved_1f1b" if own is not None and own > 1 else "1f1b"]
    else:
        names = [given.schedule] if given.schedule is not None else list(job.stack.schedules)
    found: list[tuple[str, int]] = []
    for name in names:
        schedule = SCHEDULES[name]
        tried = _virtual_stages(job.model.num_layers, pp) if schedule.needs_virtual_stages else list(schedule.usual_virtual_stages)
        found += [(name, v) for v in ([own] if own is not None else tried)]
    return found


def _virtual_stages(num_layers: int, pp: int) -> list[int]:
    """Chunks per stage of which each number makes chunks of another size, the evenest first and at most 8 of them."""
    by_size: dict[int, int] = {}
    for v in range(2, num_layers // pp + 1):
        size = -(-num_layers // (pp * v))
        by_size[size] = max(by_size.get(size, 0), v)
    by_evenness = sorted(by_size.values(), key=lambda v: (-num_layers % (pp * v) / (pp * v), v))
    return sorted(by_evenness[:LONGEST_CHUNKS])


def no_layout(job: Job, given: PartialLayout) -> InputError:
    """Why nothing is left: the rules that a plain layout with the given keys breaks, or else the batch."""
    world = job.cluster.num_devices
    fixed = (given.tp or 1) * (given.cp or 1) * (given.pp or 1)
    layout: Layout = given.complete(dp_shard=max(world // (fixed * (given.dp_replicate or 1)), 1), zero_stage=1)
    try:
        check_layout(layout, job.facts)
    except InputError as error:
        return error
    shown = {name: value for name, value in given.model_dump().items() if value is not None}
    return InputError.single(
        "layout",
        shown,
        f"no layout of {world} devices and global_batch_size {job.global_batch_size} keeps these keys",
        "leave more keys open, or change num_devices or global_batch_size",
    )
