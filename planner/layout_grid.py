"""Many layouts at once: every combination along four axes, as arrays that broadcast.

    shards [W, 1, 1, 1]      tp, cp, ep: what one device sees of the model
    batches [1, B, 1, 1]     micro_batch_size, sequence_parallel
    sizes [W, 1, N, 1]       devices, and so dp
    replicas [W, 1, N, R]    dp_replicate, and so dp_shard; zero_stage, [R]

A cost that depends on some axes only is computed once along the others: numpy's broadcasting sees to it, and the cost functions are the
very ones that price a single layout. Pipelines (pp, num_virtual_stages, schedule) have a grid each, and so have ZeRO stages that differ in more than
the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from planner.layout import Layout, LayoutArrays
from planner.layout_rules import Facts, legal_layouts
from planner.schedules import SCHEDULES

__all__ = ["Axes", "LayoutGrid", "make_grid", "pipeline_of", "without_unused"]

AXES_OF = {
    "tp": (0,), "cp": (0,), "ep": (0,), "micro_batch_size": (1,), "sequence_parallel": (1,),
    "dp_replicate": (0, 2, 3), "dp_shard": (0, 2, 3), "dp_in_all": (0, 2), "zero_stage": (3,),
}  # fmt: skip
"""The axes along which a degree of a grid differs."""


@dataclass(frozen=True)
class Axes:
    """What is combined."""

    shards: np.ndarray
    """tp, cp and ep, [3, W]."""
    batches: np.ndarray
    """micro_batch_size and sequence_parallel, [2, B]."""
    num_devices: np.ndarray
    """[N]"""
    replicas: np.ndarray
    """dp_replicate, [R]; without ZeRO there is one choice, all data-parallel ranks."""
    dp_shard: int | None = None
    """The only one that is wanted; None: any."""


@dataclass(frozen=True, eq=False)
class LayoutGrid:
    """The layouts of one pipeline."""

    layouts: LayoutArrays
    legal: np.ndarray
    """Which of the combinations keep the rules, [W, B, N, R]."""
    num_combined: int
    """Combinations whose degrees multiply to a number of devices asked for."""
    refused: dict[str, int]
    """How many of them each rule was the first to refuse."""
    num_devices: np.ndarray
    """[N]"""

    @property
    def shape(self) -> tuple[int, ...]:
        """[W, B, N, R]."""
        return self.legal.shape

    def layout(self, index: int) -> Layout:
        """The layout at a flat index."""
        at = np.unravel_index(index, self.shape)
        degrees = {name: np.broadcast_to(getattr(self.layouts, name), self.shape)[at].item() for name in AXES_OF if name != "dp_in_all"}
        degrees = {name: value if name == "sequence_parallel" else int(value) for name, value in degrees.items()}
        names = ("pp", "num_virtual_stages", "schedule")
        return Layout(**degrees, **{name: getattr(self.layouts, name) for name in names})

    def take(self, *at: np.ndarray | slice) -> LayoutGrid:
        """The part at some places of the leading axes."""
        arrays = {name: getattr(self.layouts, name) for name in AXES_OF}
        legal, num_devices = self.legal, self.num_devices
        for axis, places in enumerate(at):
            cut = (slice(None),) * axis + (places,)
            arrays = {name: array[cut] if axis in AXES_OF[name] else array for name, array in arrays.items()}
            legal, num_devices = legal[cut], num_devices[places] if axis == 2 else num_devices
        return replace(self, layouts=replace(self.layouts, **arrays), legal=legal, num_devices=num_devices)


def make_grid(facts: Facts, axes: Axes, pipeline: tuple[int, int, str], zero_stages: Sequence[int]) -> LayoutGrid:
    """The grid of a pipeline (pp, num_virtual_stages, schedule) and some ZeRO stages; `facts.num_devices` counts for nothing."""
    pp, num_virtual_stages, schedule = pipeline
    tp, cp, ep = (row[:, None, None, None] for row in axes.shards)
    micro_batch_size, sequence_parallel = (row[None, :, None, None] for row in axes.batches)
    inner = pp * tp * cp
    # Not rounded where it is no whole number, so that every degree is a product of one factor per axis.
    dp = axes.num_devices[None, None, :, None] / inner
    some = axes.replicas[None, None, None, :] * np.ones(dp.shape)
    dp_replicate = np.concatenate([dp if zero == 0 else some for zero in zero_stages], axis=3)
    zero_stage = np.concatenate([np.full(1 if zero == 0 else len(axes.replicas), zero) for zero in zero_stages])[None, None, None, :]
    dp_shard = dp / dp_replicate
    exists = (dp % 1 == 0) & (dp_shard % 1 == 0)
    if axes.dp_shard is not None:
        exists = exists & (dp_shard == axes.dp_shard)
    layouts = LayoutArrays(
        dp_replicate=dp_replicate, dp_shard=dp_shard, dp_in_all=dp, zero_stage=zero_stage, tp=tp, cp=cp, ep=ep,
        micro_batch_size=micro_batch_size, sequence_parallel=sequence_parallel.astype(bool),
        pp=pp, num_virtual_stages=num_virtual_stages, schedule=schedule,
    )  # fmt: skip
    exists = np.broadcast_to(exists, (axes.shards.shape[1], axes.batches.shape[1], *exists.shape[2:]))
    legal, refused = legal_layouts(layouts, replace(facts, num_devices=dp * inner), exists)
    runs = legal & SCHEDULES[schedule].legal(pp, num_virtual_stages, facts.global_batch_size / (dp * micro_batch_size))
    idle = int(np.count_nonzero(legal) - np.count_nonzero(runs))
    refused |= {"layout.schedule": idle} if idle else {}
    return LayoutGrid(layouts, runs, int(np.count_nonzero(exists)), refused, axes.num_devices)


def without_unused(grids: Sequence[LayoutGrid]) -> list[LayoutGrid]:
    """The same less what no layout is legal with: shards and batches in any grid, sizes and replicas in any of one pp and ZeRO stage.

    So all grids keep the same shards and batches, and the schedules of a pipeline all the same axes.
    """
    some = [grid for grid in grids if grid.legal.any()]
    if not some:
        return []
    shards, batches = _used(some, 0), _used(some, 1)
    found = []
    for _, alike in groupby(some, key=pipeline_of):
        family = list(alike)
        found += [grid.take(shards, batches, _used(family, 2), _used(family, 3)) for grid in family]
    return found


def pipeline_of(grid: LayoutGrid) -> tuple[int, int]:
    """(pp, largest ZeRO stage): what grids must share to have the same messages of data parallelism."""
    return grid.layouts.pp, int(grid.layouts.zero_stage.max())


def _used(grids: Sequence[LayoutGrid], axis: int) -> np.ndarray:
    others = tuple(a for a in range(4) if a != axis)
    return np.flatnonzero(np.any([grid.legal.any(axis=others) for grid in grids], axis=0))
