"""Stages of a pipeline as runs of neighbours that are alike: what differs from run to run has the runs as its last axis."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["Stages"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Stages:
    """`lengths[i]` neighbouring stages are alike; together they are the pipeline.

    The longest path through a pipeline lives on the first or the last stage of a run: between them its length grows by the same
    amount from stage to stage. So paths are looked at there alone (`ends`): 6 stages of a Llama's 128 and not all of them.

    Example:
        >>> stages = Stages(np.array([1, 3, 1]))
        >>> stages.number.tolist(), stages.before(np.array([2.0, 1.0, 4.0])).tolist()
        ([0, 1, 3, 4], [0.0, 2.0, 4.0, 5.0])
    """

    lengths: np.ndarray

    @staticmethod
    def each(count: int) -> Stages:
        """All stages by themselves."""
        return _each(count)

    @staticmethod
    def alike(per_stage: np.ndarray) -> Stages:
        """Runs of stages with the same numbers, [things, stages]."""
        changes = np.flatnonzero(np.any(per_stage[:, 1:] != per_stage[:, :-1], axis=0)) + 1
        return Stages(np.diff([0, *changes.tolist(), per_stage.shape[1]]))

    @cached_property
    def count(self) -> int:
        """Stages in all."""
        return int(self.lengths.sum())

    @cached_property
    def firsts(self) -> np.ndarray:
        """Number of the first stage of each run."""
        return np.asarray(np.cumsum(self.lengths) - self.lengths)

    @cached_property
    def run(self) -> np.ndarray:
        """The run of each end, [ends]."""
        return np.repeat(np.arange(len(self.lengths)), np.minimum(self.lengths, 2))

    @cached_property
    def _step(self) -> np.ndarray:
        """Stages of its run before each end, [ends]."""
        return np.concatenate([[0] if length == 1 else [0, length - 1] for length in self.lengths.tolist()])

    @cached_property
    def number(self) -> np.ndarray:
        """Number of the stage at each end, [ends]."""
        return np.asarray(self.firsts[self.run] + self._step)

    @cached_property
    def _is_each(self) -> bool:
        return bool(np.all(self.lengths == 1))

    def at_ends(self, per_run: FloatArray) -> FloatArray:
        """The value at each end, [..., ends]."""
        return per_run if self._is_each else per_run[..., self.run]

    def before(self, per_run: FloatArray) -> FloatArray:
        """At each end, the sum over all earlier stages, [..., ends]."""
        if self._is_each:
            return np.asarray(np.cumsum(per_run, axis=-1) - per_run)
        whole = per_run * self.lengths
        return np.asarray((np.cumsum(whole, axis=-1) - whole)[..., self.run] + self._step * per_run[..., self.run])

    def after(self, per_run: FloatArray) -> FloatArray:
        """At each end, the sum over all later stages, [..., ends]."""
        if self._is_each:
            return np.asarray(np.cumsum(per_run[..., ::-1], axis=-1)[..., ::-1] - per_run)
        whole = per_run * self.lengths
        later = np.cumsum(whole[..., ::-1], axis=-1)[..., ::-1] - whole
        return np.asarray(later[..., self.run] + (self.lengths[self.run] - 1 - self._step) * per_run[..., self.run])

    def total(self, per_run: FloatArray) -> FloatArray:
        """Sum over all stages, [...]."""
        return np.asarray((per_run * self.lengths).sum(axis=-1))


@lru_cache(maxsize=256)
def _each(count: int) -> Stages:
    return Stages(np.ones(count, int))
