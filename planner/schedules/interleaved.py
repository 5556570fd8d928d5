"""Interleaved 1F1B: each device holds several chunks of the model, so that the pipeline fills sooner.

Source: Narayanan et al., arXiv:2104.04473, section 2.2.2: bubble (p - 1)/(v m) of the ideal time, for v times the transfers.
Order and warm-up as in NVIDIA/Megatron-LM, megatron/core/pipeline_parallel/schedules.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.arrays import largest
from planner.schedules import SCHEDULES, Action, FloatArray, Schedule, StageNumbers, Stages, stage_numbers, use_microbatches

__all__ = ["Interleaved"]


class Interleaved(Schedule):
    """1F1B over num_virtual_stages chunks per device.

    Example:
        >>> Interleaved().makespan_s(1.0, 1.0, 1.0, 0.0, pp=4, num_virtual_stages=3, num_microbatches=8).item()
        27.0
    """

    name = "interleaved_1f1b"
    needs_virtual_stages = True
    usual_virtual_stages = (2, 4)

    def problems(self, pp: int, num_virtual_stages: int, num_microbatches: int) -> list[tuple[str, str]]:
        """At least 2 stages and 2 chunks; microbatches go round in groups of pp."""
        found = []
        if pp < 2:
            found.append((f"interleaved_1f1b needs a pipeline, and pp = {pp}", "set pp: 2 or more, or schedule: 1f1b"))
        if num_virtual_stages < 2:
            rule = f"interleaved_1f1b needs 2 or more virtual stages, and num_virtual_stages = {num_virtual_stages}"
            found.append((rule, "set num_virtual_stages: 2, or schedule: 1f1b"))
        if num_microbatches % pp:
            near = max(num_microbatches // pp, 1) * pp
            found.append((f"pp = {pp} must divide the number of microbatches = {num_microbatches}", use_microbatches(near, "1f1b")))
        return found

    def legal(self, pp: int, num_virtual_stages: int, num_microbatches: ArrayLike) -> NDArray[np.bool_]:
        """As `problems`."""
        return np.asarray((np.asarray(num_microbatches) % pp == 0) & (pp > 1) & (num_virtual_stages > 1))

    @staticmethod
    def _warm_up(pp: int, num_virtual_stages: int, stage: StageNumbers = None) -> np.ndarray:
        """Chunk forwards before the first backward, less the one that precedes it in the steady state, [pp]."""
        return 2 * (pp - stage_numbers(pp, stage) - 1) + (num_virtual_stages - 1) * pp

    def in_flight(self, pp: int, num_virtual_stages: int, num_microbatches: ArrayLike, stage: StageNumbers = None) -> FloatArray:
        """min(m v, 2 (pp - stage - 1) + (v - 1) pp + 1) / v, [..., pp]."""
        chunks = np.asarray(num_microbatches, dtype=float)[..., None] * num_virtual_stages
        return np.asarray(np.minimum(chunks, self._warm_up(pp, num_virtual_stages, stage) + 1) / num_virtual_stages)

    def head_in_flight(self, pp: int, num_virtual_stages: int, num_microbatches: ArrayLike, stage: StageNumbers = None) -> FloatArray:
        """At most 1: the last chunk's forward pass is followed by its backward pass at once (arXiv:2104.04473 section 2.2.2)."""
        return np.minimum(self.in_flight(pp, num_virtual_stages, num_microbatches, stage), 1.0)

    def longest_path_s(
        self, f: FloatArray, bi: FloatArray, bw: FloatArray, p2p_s: ArrayLike, stages: Stages, num_virtual_stages: int, num_microbatches: ArrayLike,
    ) -> FloatArray:  # fmt: skip
        """Longest path that lives on one stage; equal stages without transfers: m (F + B) + (p - 1)(F + B)/v.

        Error against the simulator (random pipelines of 1 to 8 stages, stages up to 2x apart, a transfer up to a tenth of a
        chunk's forward): none for equal stages; else at most 4% low, 0.2% on average.

        Formula: with f = F/v, b = B/v and w_s warm-up chunks, T_s = (way in and out of s: f, b of the earlier stages) + m (F_s + B_s)
        + what the first microbatch's way through all chunks to its first backward on s exceeds (w_s + 1) f_s
        + what the last microbatch's way exceeds (w_s + 1) b_s + what transfers exceed the slack of the steady state.
        """
        v, pp, stage = num_virtual_stages, stages.count, stages.number
        f, b = f / v, (bi + bw) / v
        m, p2p = np.asarray(num_microbatches)[..., None], np.asarray(p2p_s, dtype=float)[..., None]
        before_first = self._warm_up(pp, v, stage) + 1
        way = stages.after(f + b) + 2 * (pp - stage - 1) * p2p
        ramp = stages.before(f + b) + 2 * stage * p2p
        laps = [(v - 1) * _lap(x, p2p, stages) for x in (f, b)]
        f, b = stages.at_ends(f), stages.at_ends(b)
        fewer = np.minimum(before_first, m * v) - 1
        head, tail = laps[0] + way - fewer * f, laps[1] + way - fewer * b
        detours = np.where(m * v > before_first, np.maximum(head, 0) + np.maximum(tail, 0), np.maximum(np.maximum(head, tail), 0))
        return largest(ramp + m * v * (f + b) + detours)

    def timeline(self, pp: int, num_virtual_stages: int, num_microbatches: int) -> list[list[Action]]:
        """Groups of pp microbatches go through chunk 0, 1, .. v - 1 (backward: v - 1, .. 0); warm-up, then F B F B ..., then the backwards left."""
        total, group = num_microbatches * num_virtual_stages, pp * num_virtual_stages

        def action(s: int, kind: str, k: int) -> Action:
            chunk, microbatch = k % group // pp, k // group * pp + k % pp
            return Action(s, "F", microbatch, chunk) if kind == "F" else Action(s, "B", microbatch, num_virtual_stages - 1 - chunk)

        out = []
        for s, warm in enumerate(np.minimum(self._warm_up(pp, num_virtual_stages), total).tolist()):
            order = [action(s, "F", k) for k in range(warm)]
            for k in range(total):
                order += [action(s, "F", k + warm)] if k + warm < total else []
                order.append(action(s, "B", k))
            out.append(order)
        return out


def _lap(chunk_s: FloatArray, p2p_s: FloatArray, stages: Stages) -> FloatArray:
    """Seconds between the starts of two chunks on one stage while the pipeline fills, [..., 1]: once round, or pp chunks of the slowest stage."""
    return np.asarray(np.maximum(stages.total(chunk_s)[..., None] + stages.count * p2p_s, stages.count * chunk_s.max(axis=-1, keepdims=True)))


SCHEDULES.register("interleaved_1f1b")(Interleaved())
