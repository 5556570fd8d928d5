"""ZB-H1: the backward is split, and the gradients of the weights fill what was bubble.

Source: Qi et al., arXiv:2401.10241, section 2.1, figure 3 (top) and table 2: bubble (p - 1)(F + B - W) for B the gradient of the inputs
and W that of the weights; activations of 1F1B's first stage, p, on every stage.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from planner.schedules import SCHEDULES, Action, FloatArray, Schedule, StageNumbers, Stages, only_one_chunk, stage_numbers

__all__ = ["ZeroBubbleH1"]


class ZeroBubbleH1(Schedule):
    """1F1B whose weight gradients start `stage` microbatches late.

    Example:
        >>> ZeroBubbleH1().makespan_s(1.0, 1.0, 1.0, 0.0, pp=4, num_virtual_stages=1, num_microbatches=8).item()
        27.0
    """

    name = "zb_h1"
    first_holds_most = False
    splits_backward = True
    looks_at_ends = False

    def problems(self, pp: int, num_virtual_stages: int, num_microbatches: int) -> list[tuple[str, str]]:
        """One chunk per stage."""
        return only_one_chunk(self.name, num_virtual_stages)

    def in_flight(self, pp: int, num_virtual_stages: int, num_microbatches: ArrayLike, stage: StageNumbers = None) -> FloatArray:
        """min(m, pp) on every stage, [..., pp]: from F until W.

        1F1B holds pp - stage until B; here as many as `stage` more wait for their W. A waiting one has shed what only B needs, which is
        little (section 2.1: 32 of 34 units of s b h stay, apart from attention scores); it is counted whole.
        """
        return np.asarray(np.minimum(np.asarray(num_microbatches, dtype=float)[..., None], pp) + np.zeros(len(stage_numbers(pp, stage))))

    def waiting(self, pp: int, num_virtual_stages: int, num_microbatches: ArrayLike, stage: StageNumbers = None) -> FloatArray:
        """All in flight but the pp - stage that 1F1B holds before their B."""
        return np.maximum(self.in_flight(pp, num_virtual_stages, num_microbatches, stage) - (pp - stage_numbers(pp, stage)), 0.0)

    def longest_path_s(
        self, f: FloatArray, bi: FloatArray, bw: FloatArray, p2p_s: ArrayLike, stages: Stages, num_virtual_stages: int, num_microbatches: ArrayLike,
    ) -> FloatArray:  # fmt: skip
        """Longest path that lives on one stage; equal stages without transfers, m >= pp: m (F + B + W) + (p - 1) max(F, B, F + B - W).

        Error against the simulator (random pipelines of 1 to 8 stages, stages up to 2x apart, a transfer up to a tenth of a
        chunk's forward): none for equal stages without transfers; else at most 6% low,
        0.2% on average.

        Formula: for stage s with n = p - s microbatches before their B and L = min(s + 1, m) late W's, D the way from s to the last stage
        and back (F and B), T_s = way in + m (F_s + B_s) + (m - L) W_s + [D_s - (n-1) F_s]+ + [D_s - (n-1)(B_s + W_s)]+ + way out:
        the B's of the earlier stages, or those down to some stage and the late W's there. Rounds wait for transfers where W does not cover
        them. With m <= n the two brackets are one.
        """
        b, w = bi, bw
        m, p2p = np.asarray(num_microbatches, dtype=float)[..., None], np.asarray(p2p_s, dtype=float)[..., None]
        stage, n = stages.number, stages.count - stages.number
        d = stages.after(f + b) + 2 * (n - 1) * p2p
        late = np.minimum(stage + 1, m)
        # The way out ends at the stage j <= s where late W's last longest: B's of j .. s-1, then the late W's of j.
        way = stages.before(b) + stage * p2p
        out = way + np.maximum.accumulate(late * w - way, axis=-1)
        ramp, c = stages.before(f) + stage * p2p, f + b + w
        late_w = (m - late) * w
        rounds = np.maximum(m - n - 1, 0)
        trip = np.maximum(d - (n - 1) * c, 0)
        trips = np.floor(rounds / n)
        steady = trips * trip + np.where(trip > 0, np.maximum(rounds - trips * n - 1, 0) * np.maximum(2 * p2p - w, 0), 0)
        head = np.maximum(d - (n - 1) * f, 0)
        tail = np.maximum(d - (n - 1) * b - np.minimum(n - 1, m - late) * w, 0)
        filled = m * (f + b) + late_w + head + tail + steady
        few = f + b + np.maximum(d + np.maximum((m - 1) * f, (m - 1) * b + late_w), (m - 1) * (f + b) + late_w)
        return np.asarray((ramp + np.where(m > n, filled, few) + out).max(axis=-1))

    def timeline(self, pp: int, num_virtual_stages: int, num_microbatches: int) -> list[list[Action]]:
        """1F1B; W of microbatch k - stage follows B of microbatch k; the last W's end the step."""
        out = []
        for s in range(pp):
            warm = min(num_microbatches, pp - s - 1)
            order = [Action(s, "F", i, 0) for i in range(warm)]
            for i in range(num_microbatches):
                order += [Action(s, "F", i + warm, 0)] if i + warm < num_microbatches else []
                order.append(Action(s, "B", i, 0))
                order += [Action(s, "W", i - s, 0)] if i >= s else []
            out.append(order + [Action(s, "W", i, 0) for i in range(max(num_microbatches - s, 0), num_microbatches)])
        return out


SCHEDULES.register("zb_h1")(ZeroBubbleH1())
