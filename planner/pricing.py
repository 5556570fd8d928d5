"""Seconds and bytes of whole grids of layouts, by the same functions as those of one.

What a step does is computed where it can differ and nowhere else: kernels and messages of tp, cp and ep once for all pipelines and splits;
messages of data parallelism once for all schedules of a pipeline; the rest per schedule, on the few stages that are not alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from planner.coefficients import Coefficients
from planner.efficiency import format_code
from planner.graph import StepGraph, in_pipeline
from planner.layout import LayoutArrays
from planner.layout_grid import LayoutGrid, pipeline_of
from planner.memory import peak_memory
from planner.part_memory import PartMemory, parts_memory
from planner.resolve import Job
from planner.step_work import PartWork, assemble_work, make_axis_groups, part_kernels, with_sharding
from planner.timing import PartPasses, PartTimes, exposed_fsdp, part_passes, part_times, whole_step_s

__all__ = ["Prices", "least_device_s", "price_grids"]

CACHED_ELEMENTS = 2**15
"""Layouts at once: 256 KiB a number of each, a few of which a core's second-level cache holds."""


@dataclass(frozen=True, eq=False)
class Prices:
    """Of every combination of a grid, legal or not, [W, B, N, R]."""

    grid: LayoutGrid
    step_s: np.ndarray
    peak_bytes: np.ndarray


def price_grids(job: Job, grids: Sequence[LayoutGrid]) -> Iterator[Prices]:
    """Step time and peak memory of all layouts of grids with the same shards and batches, part by part."""
    if not grids:
        return
    num_shards = grids[0].shape[0]
    largest = max(int(np.prod(grid.shape[1:])) for grid in grids)
    size = max(CACHED_ELEMENTS // largest, 1)
    for start in range(0, num_shards, size):
        at = slice(start, start + size)
        yield from _price(job, [part for grid in grids if (part := grid.take(at)).legal.any()])


def _price(job: Job, grids: Sequence[LayoutGrid]) -> Iterator[Prices]:
    if not grids:
        return
    efficiency, cluster = job.efficiency, job.cluster
    first = job.graph(replace(grids[0].layouts, dp_replicate=1, dp_shard=1, dp_in_all=None, zero_stage=0))
    kernels = None if efficiency.curves is not None else _kernels(job, first)
    for _, alike in groupby(grids, key=pipeline_of):
        passes: list[PartPasses] = []
        held: list[PartMemory] = []
        for grid in alike:
            graph = in_pipeline(first, grid.layouts)
            groups = make_axis_groups(graph, cluster)
            if not passes:
                own = kernels or _kernels(job, graph)
                parts = [with_sharding(work, graph, part, groups, cluster, efficiency) for part, (work, _) in zip(graph.parts, own, strict=True)]
                held = parts_memory(graph, job.stack)
                passes = [_passes(part, times, efficiency.coefficients) for part, (_, times) in zip(parts, own, strict=True)]
            step_s = whole_step_s(assemble_work(graph, parts, groups, cluster, efficiency), passes, efficiency.coefficients)
            if job.nearby is not None:
                step_s = step_s * np.exp(job.nearby.log_ratio_over(graph, cluster, job.software_year))
            yield Prices(grid, np.broadcast_to(step_s, grid.shape), np.broadcast_to(peak_memory(graph, job.stack, held), grid.shape))


def _passes(part: PartWork, times: PartTimes, c: Coefficients) -> PartPasses:
    return part_passes(part, times, exposed_fsdp(part, times, c), c)


def least_device_s(job: Job, shards: LayoutArrays) -> float:
    """Seconds of one step times the devices that it takes: no layout with one of these shards and batches needs less.

    Formula: the passes of all parts through the whole model, on every device of the (tp, cp) group, for all sequences of the batch; less what
    measured runs nearby may say at most. Left out, all of which only adds: messages of data parallelism, bubbles, the optimizer.
    """
    graph = job.graph(shards)
    one = sum((times.forward_s + times.backward_s) * np.sum(part.counts) for part, (_, times) in zip(graph.parts, _kernels(job, graph), strict=True))
    whole = one * (job.global_batch_size / shards.micro_batch_size) * shards.tp * shards.cp
    nearby = 0.0 if job.nearby is None else job.nearby.least_log_ratio(graph, job.cluster, job.software_year)
    return float(np.min(whole)) * math.exp(nearby)


def _kernels(job: Job, graph: StepGraph) -> list[tuple[PartWork, PartTimes]]:
    """Each part's kernels, and their seconds."""
    groups, efficiency = make_axis_groups(graph, job.cluster), job.efficiency
    works = [part_kernels(graph, part, groups, job.cluster, efficiency) for part in graph.parts]
    return [(work, part_times(work, efficiency.coefficients, format_code(job.precision.name))) for work in works]
