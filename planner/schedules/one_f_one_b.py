"""1F1B (PipeDream-Flush): as soon as a stage has filled, one backward follows each forward.

Source: Narayanan et al., arXiv:2104.04473, section 2.2.1: bubble (p - 1)/m of the ideal time, at most p activations held.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from planner.arrays import largest
from planner.schedules import SCHEDULES, Action, FloatArray, Schedule, StageNumbers, Stages, only_one_chunk, stage_numbers

__all__ = ["OneFOneB"]


class OneFOneB(Schedule):
    """One forward, one backward.

    Example:
        >>> OneFOneB().makespan_s(1.0, 1.0, 1.0, 0.0, pp=4, num_virtual_stages=1, num_microbatches=8).item()
        33.0
        >>> OneFOneB().in_flight(4, 1, 8).tolist()
        [4.0, 3.0, 2.0, 1.0]
    """

    name = "1f1b"

    def problems(self, pp: int, num_virtual_stages: int, num_microbatches: int) -> list[tuple[str, str]]:
        """One chunk per stage."""
        return only_one_chunk(self.name, num_virtual_stages)

    def in_flight(self, pp: int, num_virtual_stages: int, num_microbatches: ArrayLike, stage: StageNumbers = None) -> FloatArray:
        """min(m, pp - stage), [..., pp]."""
        return np.asarray(np.minimum(np.asarray(num_microbatches, dtype=float)[..., None], pp - stage_numbers(pp, stage)))

    def longest_path_s(
        self, f: FloatArray, bi: FloatArray, bw: FloatArray, p2p_s: ArrayLike, stages: Stages, num_virtual_stages: int, num_microbatches: ArrayLike,
    ) -> FloatArray:  # fmt: skip
        """Longest path that lives on one stage; equal stages without transfers: (m + p - 1)(F + B).

        Error against the simulator (random pipelines of 1 to 8 stages, stages up to 2x apart, a transfer up to a tenth of a
        chunk's forward): none for equal stages; else at most 3%, 0.1% on average.

        Formula: for stage s with n = p - s microbatches in flight, C = F + B and D = the way from s to the last stage and back,
        T_s = (way in and out) + C_s + max(D_s, (n-1) F_s) + (m - n - 1) rounds + C_s + max(D_s, (n-1) B_s). A round lasts C_s, or
        1/n of the round trip C_s + D_s where that is longer: n microbatches in flight cannot hide more (so a transfer costs
        2 (n-1)/n of itself in every round). With m <= n: C_s + D_s + (m-1) max(F_s, B_s).
        """
        m, p2p = np.asarray(num_microbatches, dtype=float)[..., None], np.asarray(p2p_s, dtype=float)[..., None]
        stage, n = stages.number, stages.count - stages.number
        whole = f + bi + bw
        ramp = stages.before(whole) + 2 * stage * p2p
        d = stages.after(whole) + 2 * (n - 1) * p2p
        f, b, c = (stages.at_ends(x) for x in (f, bi + bw, whole))
        rounds = np.maximum(m - n - 1, 0)
        trips = np.floor(rounds / n)
        partial = np.maximum(rounds - trips * n - 1, 0) * 2 * p2p
        steady = rounds * c + trips * np.maximum(d - (n - 1) * c, 0) + np.where(d >= (n - 1) * c, partial, 0)
        filled = ramp + steady + 2 * c + np.maximum(d, (n - 1) * f) + np.maximum(d, (n - 1) * b)
        few = ramp + c + np.maximum(d + (m - 1) * np.maximum(f, b), (m - 1) * c)
        return largest(np.where(m > n, filled, few))

    def timeline(self, pp: int, num_virtual_stages: int, num_microbatches: int) -> list[list[Action]]:
        """pp - stage - 1 forwards, then F B F B ..., then the backwards left."""
        out = []
        for s in range(pp):
            warm = min(num_microbatches, pp - s - 1)
            order = [Action(s, "F", i, 0) for i in range(warm)]
            for i in range(num_microbatches):
                order += [Action(s, "F", i + warm, 0)] if i + warm < num_microbatches else []
                order.append(Action(s, "B", i, 0))
            out.append(order)
        return out


SCHEDULES.register("1f1b")(OneFOneB())
