"""DualPipe: microbatches enter at both ends, and each forward runs together with a backward of the other direction.

Source: DeepSeek-AI, arXiv:2412.19437, section 3.2.1, figure 5 and table 2: bubble (PP/2 - 1)(F&B + B - 3W), 2 copies of the
parameters, PP + 1 activations. Order and limits as in deepseek-ai/DualPipe @3da1bbe, dualpipe/dualpipe.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.schedules import SCHEDULES, Action, FloatArray, Schedule, StageNumbers, Stages, stage_numbers, use_microbatches

__all__ = ["DualPipe"]


class DualPipe(Schedule):
    """Bidirectional pipeline. The model is cut into pp slices; device s holds slice s (chunk 0) and slice pp - 1 - s (chunk 1).

    Half of the microbatches goes each way. F&B is taken as F + B: what the pairing hides is communication inside the layers, which is
    not compute.
    """

    name = "dualpipe"
    first_holds_most = False
    looks_at_ends = False
    usual_virtual_stages = (2,)
    parameter_copies = 2

    def problems(self, pp: int, num_virtual_stages: int, num_microbatches: int) -> list[tuple[str, str]]:
        """Even pp, 2 chunks, an even number of microbatches, at least 2 pp: the limits of the published implementation."""
        found = []
        if pp % 2:
            found.append((f"dualpipe needs an even pp, and pp = {pp}", f"set pp: {pp + 1}, or schedule: zb_h1"))
        if num_virtual_stages != 2:
            rule = f"dualpipe holds 2 chunks per device, one per direction, and num_virtual_stages = {num_virtual_stages}"
            found.append((rule, "set num_virtual_stages: 2"))
        if num_microbatches % 2 or num_microbatches < 2 * pp:
            least = max(2 * pp, num_microbatches + num_microbatches % 2)
            rule = f"dualpipe needs an even number of microbatches, at least 2 pp = {2 * pp}, and there are {num_microbatches}"
            found.append((rule, use_microbatches(least, "zb_h1")))
        return found

    def legal(self, pp: int, num_virtual_stages: int, num_microbatches: ArrayLike) -> NDArray[np.bool_]:
        """As `problems`."""
        m = np.asarray(num_microbatches)
        return np.asarray((m % 2 == 0) & (m >= 2 * pp) & (pp % 2 == 0) & (num_virtual_stages == 2))

    def position(self, stage: int, chunk: int, pp: int) -> int:
        """Slice `stage` going forward, its mirror in the other direction."""
        return pp - 1 - stage if chunk else stage

    def resident(self, per_stage: ArrayLike) -> FloatArray:
        """A slice and its mirror, [..., pp]."""
        own = np.asarray(per_stage, dtype=float)
        return np.asarray(own + own[..., ::-1])

    def in_flight(self, pp: int, num_virtual_stages: int, num_microbatches: ArrayLike, stage: StageNumbers = None) -> FloatArray:
        """pp + 1 on every device, both directions together, [..., pp]."""
        return np.full((*np.shape(num_microbatches), len(stage_numbers(pp, stage))), pp + 1.0)

    def head_in_flight(self, pp: int, num_virtual_stages: int, num_microbatches: ArrayLike, stage: StageNumbers = None) -> FloatArray:
        """1 in each direction, 2 together: at either end the last slice's forward pass is followed by its backward pass."""
        return np.full((*np.shape(num_microbatches), len(stage_numbers(pp, stage))), 2.0)

    def longest_path_s(
        self, f: FloatArray, bi: FloatArray, bw: FloatArray, p2p_s: ArrayLike, stages: Stages, num_virtual_stages: int, num_microbatches: ArrayLike,
    ) -> FloatArray:  # fmt: skip
        """The published bubble on top of the average device's work; at least the busiest device's work and its way in.

        Error against the simulator (random pipelines of 1 to 8 stages, stages up to 2x apart, a transfer up to a tenth of a
        chunk's forward): none where F = B = W and p2p = 0; at most 3% for equal stages;
        else at most 8%, 1% on average.

        Formula: with k = pp/2 - 1, averages over the slices F, B (inputs), W, and F&B = F + B + W:
        max(m (F + B + W) + k max(F&B + (B + W) - 3W, 2F), max over devices(m/2 (work of both slices) + forwards of the devices
        outside of it)) + p2p (m (pp - 1)/pp + 1.5 pp - 2). The 2F holds where forwards outlast the rest (the fill is then what
        waits); the factor of p2p is fitted to the simulator, in which a pair waits for both of its inputs.
        """
        b, w, pp = bi, bw, stages.count
        m, p2p = np.asarray(num_microbatches), np.asarray(p2p_s, dtype=float)
        busy = self.busy_s(f, b, w, m)
        mean_f, mean_b, mean_w = f.mean(axis=-1), b.mean(axis=-1), w.mean(axis=-1)
        filled = busy.mean(axis=-1) + (pp / 2 - 1) * np.maximum(mean_f + 2 * mean_b - mean_w, 2 * mean_f)
        outside = np.minimum(stages.before(f), stages.after(f))
        transfers = (m * (pp - 1) / pp + 1.5 * pp - 2) * p2p
        return np.asarray(np.maximum(filled, (busy + outside).max(axis=-1)) + transfers)

    def timeline(self, pp: int, num_virtual_stages: int, num_microbatches: int) -> list[list[Action]]:
        """The eight steps of the published algorithm; a pair that runs together is drawn as F, then B."""
        return [list(_order(s, pp, num_microbatches // 2)) for s in range(pp)]


def _order(stage: int, pp: int, half: int) -> Iterator[Action]:
    """Actions of one device; phase 0 is the direction whose end is nearer, `half` the microbatches per direction."""
    near, wide = min(stage, pp - 1 - stage), pp // 2
    done: dict[tuple[str, int], int] = {}
    late: list[tuple[int, int]] = []

    def act(kind: Literal["F", "B", "W"], phase: int) -> Iterator[Action]:
        chunk = phase ^ int(stage >= wide)
        k = done.get((kind, chunk), 0)
        done[kind, chunk] = k + 1
        yield Action(stage, kind, k + chunk * half, chunk)

    def backward(phase: int, split: bool = False) -> Iterator[Action]:
        for action in act("B", phase):
            late.extend([(action.microbatch, action.chunk)] if split else [])
            yield action

    def weights() -> Iterator[Action]:
        yield Action(stage, "W", *late.pop(0))

    def together(forward: int, back: int, paired: bool = True) -> Iterator[Action]:
        for action in act("F", forward):
            yield action._replace(paired=paired)
        yield from backward(back)

    for _ in range(2 * (wide - near - 1)):
        yield from act("F", 0)
    for _ in range(near + 1):
        yield from act("F", 0)
        yield from act("F", 1)
    for _ in range(wide - near - 1):
        yield from backward(1, split=True)
        yield from weights()
        yield from act("F", 1)
    for i in range(half - pp + near + 1):
        yield from together(0, 1, paired=i > 0 or near < wide - 1)
        yield from together(1, 0)
    for _ in range(wide - near - 1):
        yield from backward(1)
        yield from together(1, 0)
    for i in range(2 * (near + 1)):
        yield from backward(1 - i % 2, split=i > near)
    for _ in range(wide - near - 1):
        yield from weights()
        yield from backward(0, split=True)
    for _ in range(near + 1):
        yield from weights()


SCHEDULES.register("dualpipe")(DualPipe())
