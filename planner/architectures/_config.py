"""Reading an HF configuration key by key, with errors in HF's own words."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from planner.errors import InputError, Problem
from planner.model_spec import ModelSpec, Moe
from planner.spec import build

__all__ = ["MAX_LAYERS", "Config"]

MAX_SIZE = 10**9
MAX_LAYERS = 10_000
"""Of blocks; the deepest published models have some hundreds."""
MISSPELT_CUTOFF = 0.9
"""Likeness from which an unread key counts as a misspelt one; no pair of real keys of one family comes closer."""


class Config:
    """An HF configuration being read. Mistakes are collected; `spec` raises them all at once.

    A key that is left out has the value that transformers' configuration class gives it, because transformers leaves out of
    the files that it writes whatever equals its default. The sizes that make a model what it is are required.
    """

    def __init__(self, values: dict[str, Any], name: str, where: str) -> None:
        self.values = values
        self.name = name
        self.where = where
        self.model_type = str(values.get("model_type"))
        self._asked = {"model_type", "name"}
        self._other_names: dict[str, str] = {}
        self._problems: list[Problem] = []
        self._prefix = "model."

    def _fail(self, key: str, value: object, rule: str, fix: str) -> None:
        self._problems.append(Problem(f"{self._prefix}{key}", value, rule, fix, self.where))

    def get(self, key: str) -> Any:
        """The raw value, None when absent."""
        self._asked.add(key)
        return self.values.get(key)

    def is_null(self, key: str) -> bool:
        """Whether the key is given with the value null, which may mean another thing than leaving it out."""
        return key in self.values and self.values[key] is None

    def also_called(self, **other_names: str) -> None:
        """Other names that transformers reads where the first one is absent: `n_layer="num_hidden_layers"`."""
        self._other_names |= other_names
        self._asked |= set(other_names.values())

    def size(self, key: str, default: int | None = None, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
        """A whole number from `minimum` to `maximum`; `default` when absent or null (None: required)."""
        name, value = key, self.get(key)
        if value is None and key in self._other_names:
            name, value = self._other_names[key], self.get(self._other_names[key])
            name = key if value is None else name
        fallback = max(minimum, 1)
        if value is None:
            if default is None:
                self._fail(key, None, "is required", f"add {key} as in the model's config.json")
                return fallback
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or abs(value) > maximum or int(value) != value:
            self._fail(name, value, f"must be a whole number up to {maximum:,}", "write a number")
            return fallback
        if value < minimum:
            self._fail(name, value, f"must be at least {minimum}", f"write {minimum} or more")
            return fallback
        return int(value)

    def layers(self, key: str, default: int | None = None) -> int:
        """A number of blocks."""
        return self.size(key, default, maximum=MAX_LAYERS)

    def flag(self, key: str, default: bool) -> bool:
        """A true or false; `default` when absent or null."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self._fail(key, value, "must be true or false", "write true or false")
            return default
        return value

    def fraction(self, key: str, default: float = 0.0) -> float:
        """A number from 0 up to, not including, 1."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            self._fail(key, value, "must be a number from 0 up to (not including) 1", "write e.g. 0.1")
            return default
        return float(value)

    def text(self, key: str, default: str, known: dict[str, str] | None = None) -> str:
        """A text; with `known`, one of its keys, translated to its value."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, str) or (known is not None and value not in known):
            self._fail(key, value, f"must be one of {', '.join(known or ['a text'])}", f"write e.g. {default}")
            value = default
        return known[value] if known is not None else value

    def names(self, key: str, known: tuple[str, ...]) -> list[str] | None:
        """A list whose entries are all in `known`; None when absent or null."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or any(entry not in known for entry in value):
            self._fail(key, value, f"must be a list of {' and '.join(known)}", f"write e.g. [{known[0]}]")
            return None
        return value

    def leading_layers(self, key: str) -> int:
        """How many layers a list such as [0, 1] names; it may name the first ones only. 0 when absent or null."""
        value = self.get(key)
        if value is None:
            return 0
        is_leading = isinstance(value, list) and len(value) <= MAX_LAYERS and sorted(map(str, value)) == sorted(map(str, range(len(value))))
        self.rule(is_leading, key, "must be a list of the first layers, counted from 0", "write e.g. [0, 1], or []")
        return len(value) if is_leading else 0

    def mapping(self, key: str) -> dict[str, Any]:
        """A nested mapping; empty when absent or null."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            self._fail(key, value, "must be a mapping of keys to values", "write e.g. {key: value}, or leave it out")
        return value if isinstance(value, dict) else {}

    def section(self, key: str) -> Config:
        """The nested mapping under `key`, empty when absent or null; its mistakes are raised with these."""
        inner = Config(self.mapping(key), self.name, self.where)
        inner._problems, inner._prefix = self._problems, f"{self._prefix}{key}."
        return inner

    def rule(self, holds: bool, key: str, rule: str, fix: str) -> None:
        """Notes a problem unless `holds`."""
        if not holds:
            self._fail(key, self.get(key), rule, fix)

    def heads(self, hidden_key: str, heads_key: str, hidden: int, heads: int) -> int:
        """hidden // heads, which must be exact."""
        self.rule(
            hidden % heads == 0,
            heads_key,
            f"must divide {hidden_key} = {hidden} when head_dim is not given",
            "correct one of the two, or add head_dim",
        )
        return max(hidden // heads, 1)

    def moe(self, experts_key: str, **fields: Any) -> Moe:
        """The mixture of `fields`, with `num_experts` read from `experts_key`.

        Raises:
            InputError: every problem noted so far, which may have left sizes that no mixture can have.
        """
        fields["num_experts"] = num = self.size(experts_key)
        self.rule(fields["num_experts_per_token"] <= num, "num_experts_per_tok", f"must be at most {experts_key} = {num}", "correct one of the two")
        self.raise_problems()
        return build(Moe, fields, "model", self.where)

    def raise_problems(self) -> None:
        """Raises every problem noted so far; returns when there is none."""
        if self._problems:
            raise InputError(*self._problems)

    @property
    def unread(self) -> set[str]:
        """Keys that nobody asked for: they do not change what the model costs."""
        return {key for key in self.values if key not in self._asked}

    def _note_misspelt(self) -> None:
        """A key that nobody reads, and that looks like one which is missing, would be defaulted in silence."""
        missing = [key for key in self._asked if self.values.get(key) is None]
        for key, value in self.values.items():
            if isinstance(key, str) and key not in self._asked and len(key) < 100:
                close = get_close_matches(key, missing, n=1, cutoff=MISSPELT_CUTOFF)
                if close:
                    self._fail(key, value, f"is not a key of {self.model_type}", f"did you mean {close[0]}?")

    def spec(self, *, kv_heads_key: str = "num_key_value_heads", **fields: Any) -> ModelSpec:
        """The ModelSpec of `fields`.

        Args:
            kv_heads_key: what the family calls the number of key-value heads.
        Raises:
            InputError: every problem noted so far.
        """
        heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
        self.rule(heads % kv_heads == 0, kv_heads_key, f"{kv_heads} must divide num_attention_heads = {heads}", "correct one of the two")
        self._note_misspelt()
        self.raise_problems()
        return build(ModelSpec, {"name": self.name, **fields}, "model", self.where)
