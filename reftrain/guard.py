"""What to do with a step whose loss or gradient is bad: skip it, then roll back, then stop.

Source: OLMo-core skips steps beyond 6 sigma of the last 128; PaLM rolls back and leaves out the batches (arXiv:2204.02311, 5.1).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

from planner.errors import PlannerError

__all__ = ["SpikeGuard", "TrainingDivergedError"]

WINDOW, LEAST_HISTORY = 128, 16
LEAST_SPREAD = 0.05
"""Smallest standard deviation assumed, as a share of the mean: a very quiet history must not make noise look like a spike."""


COUNTERS = ("skipped_in_row", "num_skipped", "num_rollbacks", "recent_rollbacks", "good_in_row")


class TrainingDivergedError(PlannerError):
    """The run stopped because skipping and rolling back did not help."""


@dataclass
class SpikeGuard:
    """Judges each step by the steps before it. Loss is judged on its own scale, gradient norms on a log scale."""

    sigmas: float = 6.0
    max_skipped: int = 5
    max_rollbacks: int = 2
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    skipped_in_row: int = 0
    num_skipped: int = 0
    num_rollbacks: int = 0
    recent_rollbacks: int = 0
    """Since the last `WINDOW` good steps in a row: troubles far apart do not add up to a divergence."""
    good_in_row: int = 0

    def judge(self, loss: float, norm: float) -> Literal["good", "skip", "roll_back", "stop"]:
        """What to do with a step; good ones become part of the history."""
        if not self._is_bad(loss, norm):
            self.losses.append(loss)
            self.norms.append(math.log(norm + 1e-30))
            self.skipped_in_row = 0
            self.good_in_row += 1
            if self.good_in_row >= WINDOW:
                self.recent_rollbacks = 0
            return "good"
        self.good_in_row = 0
        self.skipped_in_row += 1
        self.num_skipped += 1
        if self.skipped_in_row < self.max_skipped:
            return "skip"
        self.skipped_in_row = 0
        if self.recent_rollbacks >= self.max_rollbacks:
            return "stop"
        self.recent_rollbacks += 1
        self.num_rollbacks += 1
        return "roll_back"

    def _is_bad(self, loss: float, norm: float) -> bool:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return True
        if len(self.losses) < LEAST_HISTORY:
            return False
        return self._above(self.losses, loss) or self._above(self.norms, math.log(norm + 1e-30), least=math.log(2.0) / 2)

    def _above(self, history: deque[float], value: float, least: float = 0.0) -> bool:
        mean = sum(history) / len(history)
        spread = math.sqrt(sum((x - mean) ** 2 for x in history) / len(history))
        return value > mean + self.sigmas * max(spread, LEAST_SPREAD * abs(mean), least)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"losses": list(self.losses), "norms": list(self.norms), **{name: getattr(self, name) for name in COUNTERS}}

    def load_state(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.losses, self.norms = deque(state["losses"], maxlen=WINDOW), deque(state["norms"], maxlen=WINDOW)
        for name in COUNTERS:
            setattr(self, name, state[name])
