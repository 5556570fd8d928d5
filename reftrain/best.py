"""The best of a run's evaluations so far, and whether there is any point in going on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

__all__ = ["Best"]


@dataclass
class Best:
    """Judges held-out losses as they come.

    Args:
        patience: evaluations in a row without a better one that end the run; None: it goes on.

    Example:
        >>> best = Best(patience=2)
        >>> [best.judge(step, loss) for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5), (40, 2.5))], best.step, best.is_over
        ([True, True, False, False], 20, True)
    """

    patience: int | None = None
    step: int = -1
    loss: float = math.inf
    num_worse: int = 0
    """Evaluations since the best one."""

    def judge(self, step: int, loss: float) -> bool:
        """Whether an evaluation is better than all before it; one of the same step again changes nothing."""
        if step == self.step:
            return False
        if loss < self.loss:
            self.step, self.loss, self.num_worse = step, loss, 0
            return True
        self.num_worse += 1
        return False

    @property
    def is_over(self) -> bool:
        """Whether patience has ended."""
        return self.patience is not None and self.num_worse >= self.patience

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"step": self.step, "loss": self.loss if self.step >= 0 else None, "num_worse": self.num_worse}

    def load_state(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.step, self.num_worse = state["step"], state["num_worse"]
        self.loss = math.inf if state["loss"] is None else state["loss"]
