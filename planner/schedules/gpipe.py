"""GPipe: all forwards, then all backwards.

Source: Huang et al., arXiv:1811.06965, section 2.3 and figure 2c: bubble (p - 1)/(m + p - 1) of the time, all m activations held.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from planner.schedules import SCHEDULES, Action, FloatArray, Schedule, StageNumbers, Stages, only_one_chunk, stage_numbers

__all__ = ["GPipe"]


class GPipe(Schedule):
    """All forwards, then all backwards.

    Example:
        >>> GPipe().makespan_s(1.0, 1.0, 1.0, 0.0, pp=4, num_virtual_stages=1, num_microbatches=8).item()
        33.0
    """

    name = "gpipe"

    def problems(self, pp: int, num_virtual_stages: int, num_microbatches: int) -> list[tuple[str, str]]:
        """One chunk per stage."""
        return only_one_chunk(self.name, num_virtual_stages)

    def in_flight(self, pp: int, num_virtual_stages: int, num_microbatches: ArrayLike, stage: StageNumbers = None) -> FloatArray:
        """Every microbatch of the step, on every stage, [..., pp]."""
        m = np.asarray(num_microbatches, dtype=float)[..., None]
        return np.asarray(m + np.zeros(len(stage_numbers(pp, stage))))

    def longest_path_s(
        self, f: FloatArray, bi: FloatArray, bw: FloatArray, p2p_s: ArrayLike, stages: Stages, num_virtual_stages: int, num_microbatches: ArrayLike,
    ) -> FloatArray:  # fmt: skip
        """Two flow shops of alike jobs, one after the other; exact, also for unequal stages and with transfers.

        Formula: sum F + (m - 1) max F + sum B + (m - 1) max B + 2 (p - 1) p2p, with B = backward_input + backward_weight.
        Equal stages: (m + p - 1)(F + B).
        """
        m, p2p, b = np.asarray(num_microbatches), np.asarray(p2p_s, dtype=float), bi + bw
        ramp = stages.total(f + b) + 2 * (stages.count - 1) * p2p
        return np.asarray(ramp + (m - 1) * (f.max(axis=-1) + b.max(axis=-1)))

    def timeline(self, pp: int, num_virtual_stages: int, num_microbatches: int) -> list[list[Action]]:
        """F 0 .. m-1, then B 0 .. m-1, on every stage."""
        return [[Action(s, kind, i, 0) for kind in ("F", "B") for i in range(num_microbatches)] for s in range(pp)]


SCHEDULES.register("gpipe")(GPipe())
