"""`--set KEY=VALUE` and its short forms, as keys of `training:`."""

from __future__ import annotations

from typing import Any

from planner.errors import InputError

__all__ = ["training_changes"]

PROFILED_STEPS = 3
"""Of `--profile`, where no `--set profile_steps=N` says otherwise."""


def training_changes(settings: list[str] | None, steps: int | None, data: str | None, profile: bool = False) -> dict[str, Any]:
    """Keys of `training:` to change.

    Raises:
        InputError: a setting that is not KEY=VALUE.

    Example:
        >>> training_changes(["learning_rate=3e-4"], 10, None)
        {'learning_rate': 0.0003, 'num_steps': 10}
    """
    from planner.files import parse_yaml

    changes: dict[str, Any] = {"profile_steps": PROFILED_STEPS} if profile else {}
    for text in settings or []:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise InputError.single("--set", text, "must be KEY=VALUE", "write e.g. --set learning_rate=3e-4")
        changes[key.removeprefix("training.")] = parse_yaml(value, "--set")
    if steps is not None:
        changes["num_steps"] = steps
    if data is not None:
        changes["data"] = data
    return changes
