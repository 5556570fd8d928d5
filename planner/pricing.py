"""Many layouts at once: arrays of degrees in, arrays of seconds and bytes out.

The same `build_step_graph`, `estimate_memory` and `estimate_time` as for one layout. Layouts are grouped by pipeline
structure (pp, num_virtual_stages, schedule), because stages are an axis of the arrays; within a group everything is one
array operation. Whatever does not depend on data parallelism is computed once per distinct shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.graph import build_step_graph
from planner.layout import Layout, LayoutArrays
from planner.memory import peak_memory
from planner.resolve import Job
from planner.timing import estimate_time

__all__ = ["LayoutTable", "Prices", "price_layouts"]


CACHED_ELEMENTS = 2**17
"""1 MiB of floats, a core's second-level cache: a quarter less time than whole groups of 26,000 layouts and 64 stages."""


@dataclass(frozen=True)
class LayoutTable:
    """Layouts as columns of one length [n]; `schedule` holds names."""

    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.columns["tp"])

    def take(self, index: Any) -> LayoutTable:
        """The rows at `index`."""
        return LayoutTable({name: column[index] for name, column in self.columns.items()})

    def row(self, index: int) -> Layout:
        """One row as a Layout."""
        return Layout(**{name: column[index].item() for name, column in self.columns.items()})

    def groups(self) -> list[tuple[np.ndarray, LayoutArrays]]:
        """(row numbers, layouts) of each pipeline structure."""
        names = [name for name in self.columns if name not in ("pp", "num_virtual_stages", "schedule")]
        schedules, codes = np.unique(self.columns["schedule"], return_inverse=True)
        key = (self.columns["pp"] * 4096 + self.columns["num_virtual_stages"]) * len(schedules) + codes
        found = []
        for value in np.unique(key):
            rows = np.flatnonzero(key == value)
            first = self.row(rows[0])
            degrees: dict[str, Any] = {name: self.columns[name][rows] for name in names}
            found.append((rows, LayoutArrays(**degrees, pp=first.pp, num_virtual_stages=first.num_virtual_stages, schedule=first.schedule)))
        return found


@dataclass(frozen=True)
class Prices:
    """Per layout: seconds per step, peak bytes per device, whether it fits; [n] each."""

    step_s: np.ndarray
    peak_bytes: np.ndarray
    fits: np.ndarray


def _slices(table: LayoutTable) -> Iterator[tuple[np.ndarray, LayoutArrays]]:
    """The groups of a table, cut so that one array [n, pp] stays in a core's cache."""
    for rows, layouts in table.groups():
        size = max(CACHED_ELEMENTS // layouts.pp, 1)
        for start in range(0, len(rows), size):
            yield rows[start : start + size], layouts.take(slice(start, start + size))


def price_layouts(job: Job, table: LayoutTable) -> Prices:
    """Step time and memory of every row of `table`, which must be legal."""
    step_s, peak_bytes = np.empty(len(table)), np.empty(len(table))
    for rows, layouts in _slices(table):
        graph = build_step_graph(
            job.model, job.workload, layouts, job.numerics, job.precision, seq_len=job.seq_len, global_batch_size=job.global_batch_size
        )
        peak_bytes[rows] = peak_memory(graph, job.stack)
        step_s[rows] = estimate_time(graph, job.cluster, job.efficiency, job.nearby, job.software_year).step_s
    return Prices(step_s, peak_bytes, peak_bytes <= job.cluster.accelerator.memory_bytes)
