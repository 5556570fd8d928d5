"""Seconds measured on one device, op by op: what `reftrain bench-device` writes and `Efficiency` prefers to a roofline.

A curve holds seconds at some sizes; between them it is a straight line in the logarithms, beyond the last one time grows in proportion.
Small sizes level off at what a call costs, so host and launch time are part of a curve.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field, model_validator

from planner.spec import PositiveInt, Spec

__all__ = ["Curve", "DeviceCurves", "MatmulGrid"]

Array = Any
Seconds = list[float]


class Curve(Spec):
    """Seconds against a size (bytes moved, sequence length, bytes of a message)."""

    sizes: list[float] = Field(min_length=1)
    seconds: Seconds = Field(min_length=1)

    @model_validator(mode="after")
    def _sizes_rise(self) -> Curve:
        if len(self.sizes) != len(self.seconds) or min(self.seconds) <= 0 or min(self.sizes) <= 0:
            raise ValueError("sizes and seconds are positive and as many; correct the lists")
        if any(b <= a for a, b in zip(self.sizes, self.sizes[1:], strict=False)):
            raise ValueError("sizes rise; sort them")
        return self

    def at(self, size: Array) -> Array:
        """Seconds at any size; constant below the first, in proportion above the last.

        Example:
            >>> round(float(Curve(sizes=[1.0, 100.0], seconds=[1.0, 10.0]).at(400.0)), 6)
            40.0
        """
        size = np.maximum(size, 1e-30)
        inside = np.exp(np.interp(np.log(size), np.log(self.sizes), np.log(self.seconds)))
        return inside * np.maximum(size / self.sizes[-1], 1.0)


class MatmulGrid(Spec):
    """Seconds of an [m, k] x [k, n] product on a grid of sizes; m rows (tokens), n outputs, k inputs."""

    m: list[float]
    n: list[float]
    k: list[float]
    seconds: Seconds
    """In C order: k varies fastest."""

    @model_validator(mode="after")
    def _grid_is_whole(self) -> MatmulGrid:
        if len(self.seconds) != len(self.m) * len(self.n) * len(self.k) or min(self.seconds) <= 0:
            raise ValueError(f"seconds needs len(m) * len(n) * len(k) = {len(self.m) * len(self.n) * len(self.k)} positive values; correct the list")
        return self

    def at(self, m: Array, n: Array, k: Array) -> Array:
        """Trilinear in the logarithms; outside the grid in proportion to the FLOPs above it, constant below."""
        table = np.log(self.seconds).reshape(len(self.m), len(self.n), len(self.k))
        corners, beyond = [], 1.0
        for size, grid in ((m, self.m), (n, self.n), (k, self.k)):
            points = np.log(grid)
            place = np.interp(np.log(np.maximum(size, 1e-30)), points, np.arange(len(points), dtype=float))
            low = np.minimum(place.astype(int), max(len(points) - 2, 0))
            corners.append((low, np.minimum(low + 1, len(points) - 1), place - low))
            beyond = beyond * np.maximum(size / grid[-1], 1.0)
        found: Array = 0.0
        for i in (0, 1):
            for j in (0, 1):
                for h in (0, 1):
                    weight = 1.0
                    for corner, side in zip(corners, (i, j, h), strict=True):
                        weight = weight * (corner[2] if side else 1 - corner[2])
                    found = found + weight * table[corners[0][i], corners[1][j], corners[2][h]]
        return np.exp(found) * beyond


class DeviceCurves(Spec):
    """Everything measured about one device under one stack. Keys: `op/phase/precision`, e.g. `norm/forward/bf16`."""

    source: str
    date: str
    num_processes: PositiveInt = 1
    """Devices that worked at the same time while this was measured."""
    matmul: dict[str, MatmulGrid] = Field(default_factory=dict)
    """`forward`, `backward_input`, `backward_weight`, each per precision; m, n, k are those of the forward product."""
    attention: dict[str, Curve] = Field(default_factory=dict)
    """`forward/bf16/64`: seconds of one head of one sequence by its length, for a head size."""
    ops: dict[str, Curve] = Field(default_factory=dict)
    """Memory-bound ops by bytes moved; `optimizer/adamw` by bytes; `cast` and `accumulate` by bytes of fp32 parameters."""
    collectives: dict[str, Curve] = Field(default_factory=dict)
    """`all_reduce/2`: seconds by bytes of the full buffer, for a group of 2."""
    op_overhead_s: float = Field(default=0.0, ge=0)
    """Host time of one op in a model, forward or backward, beyond what it takes alone."""
    step_overhead_s: float = Field(default=0.0, ge=0)
    """Host time of one step beyond its microbatches and its optimizer."""
