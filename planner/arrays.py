"""Small helpers for numbers that may be arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["both", "largest", "pick", "times"]

Array = Any


def pick(condition: Array, then: Array, otherwise: Array) -> Array:
    """`np.where`, but where one condition holds for all, that branch as it is: no wider than it was.

    Example:
        >>> pick(np.zeros((2, 2), bool), np.zeros((4, 4)), 1.0)
        1.0
    """
    if not np.any(condition):
        return otherwise
    return then if np.all(condition) else np.where(condition, then, otherwise)


def times(amount: Array, factor: Array) -> Array:
    """Their product; where there is none of the amount, a plain 0.

    Example:
        >>> times(np.zeros(3), np.ones((5, 3)))
        0.0
    """
    return amount * factor if np.any(amount) else 0.0


def largest(per_stage: Array) -> np.ndarray:
    """`np.max` over the last axis, the stages: column by column, because numpy is slow along short axes.

    Example:
        >>> largest(np.array([[1.0, 3.0], [5.0, 2.0]])).tolist()
        [3.0, 5.0]
    """
    found = per_stage[..., 0]
    for place in range(1, per_stage.shape[-1]):
        found = np.maximum(found, per_stage[..., place])
    return np.asarray(found)


def both(one: Array, other: Array) -> Array:
    """`one & other`; where one of them is false for all, just that.

    Example:
        >>> both(False, np.ones((2, 2), bool))
        False
    """
    if not np.any(one) or not np.any(other):
        return False
    return np.asarray(one, bool) & np.asarray(other, bool)
