"""Reading an HF configuration key by key, with errors in HF's own words."""

from __future__ import annotations

from typing import Any

from planner.errors import InputError, Problem
from planner.model_spec import ModelSpec
from planner.spec import build

__all__ = ["Config"]

MAX_SIZE = 10**9


class Config:
    """An HF configuration being read. Mistakes are collected; `spec` raises them all at once."""

    def __init__(self, values: dict[str, Any], name: str, where: str) -> None:
        self.values = values
        self.name = name
        self.where = where
        self._problems: list[Problem] = []

    def _fail(self, key: str, value: object, rule: str, fix: str) -> None:
        self._problems.append(Problem(f"model.{key}", value, rule, fix, self.where))

    def size(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        """A whole number of at least `minimum`; `default` when absent or null (None: required)."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                self._fail(key, None, "is required", f"add {key} as in the model's config.json")
                return max(minimum, 1)
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or abs(value) > MAX_SIZE or int(value) != value:
            self._fail(key, value, f"must be a whole number up to {MAX_SIZE:,}", "write a number")
            return max(minimum, 1)
        if value < minimum:
            self._fail(key, value, f"must be at least {minimum}", f"write {minimum} or more")
            return max(minimum, 1)
        return int(value)

    def flag(self, key: str, default: bool) -> bool:
        """A true or false; `default` when absent or null."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self._fail(key, value, "must be true or false", "write true or false")
            return default
        return value

    def fraction(self, key: str, default: float = 0.0) -> float:
        """A number from 0 up to, not including, 1."""
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            self._fail(key, value, "must be a number from 0 up to (not including) 1", "write e.g. 0.1")
            return default
        return float(value)

    def text(self, key: str, default: str, known: dict[str, str] | None = None) -> str:
        """A text; with `known`, one of its keys, translated to its value."""
        value = self.values.get(key, default)
        value = default if value is None else value
        if not isinstance(value, str) or (known is not None and value not in known):
            self._fail(key, value, f"must be one of {', '.join(known or ['a text'])}", f"write e.g. {default}")
            value = default
        return known[value] if known is not None else value

    def rule(self, holds: bool, key: str, rule: str, fix: str) -> None:
        """Notes a problem unless `holds`."""
        if not holds:
            self._fail(key, self.values.get(key), rule, fix)

    def heads(self, hidden_key: str, heads_key: str, hidden: int, heads: int) -> int:
        """hidden // heads, which must be exact."""
        self.rule(
            hidden % heads == 0,
            heads_key,
            f"must divide {hidden_key} = {hidden} when head_dim is not given",
            "correct one of the two, or add head_dim",
        )
        return max(hidden // heads, 1)

    def spec(self, **fields: Any) -> ModelSpec:
        """The ModelSpec of `fields`.

        Raises:
            InputError: every problem noted so far.
        """
        heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
        self.rule(heads % kv_heads == 0, "num_key_value_heads", f"must divide num_attention_heads = {heads}", "correct one of the two")
        if self._problems:
            raise InputError(*self._problems)
        return build(ModelSpec, {"name": self.name, **fields}, "model", self.where)
