"""Every error a user can meet.

    PlannerError                 base; `exit_status` is what the command line returns
      InputError                 wrong input: one or many `Problem`s, all at once     (2)
      InfeasibleError            valid input, but nothing fits                        (3)
      MissingPieceError          an optional package is not installed                 (6)

A plan that does not fit is not an exception: see `Plan.violations`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches

__all__ = ["InfeasibleError", "InputError", "MissingPieceError", "PlannerError", "Problem", "nearest", "shorten"]


def shorten(value: object, limit: int = 80) -> str:
    """`repr(value)` on one line, cut to `limit` characters, safe for hostile input.

    Example:
        >>> shorten("a" * 100, 10)
        "'aaaaaa..."
    """
    try:
        text = repr(value)
    except Exception as error:  # a repr that fails (a 10_000-digit int, a cycle) must not hide the real problem
        text = f"<{type(value).__name__}, {type(error).__name__} when shown>"
    text = _one_line(text)
    return text if len(text) <= limit else text[: limit - 3].rstrip() + "..."


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def nearest(name: object, known: Iterable[str], count: int = 3) -> tuple[str, ...]:
    """The known names that look most like `name`, best first; may be empty.

    Example:
        >>> nearest("h100-smx", ["h100-sxm", "a100-sxm", "tpu-v4"])
        ('h100-sxm', 'a100-sxm')
    """
    if not isinstance(name, str) or len(name) > 200:
        return ()
    by_fold = {k.casefold(): k for k in known}
    return tuple(by_fold[m] for m in get_close_matches(name.casefold(), list(by_fold), n=count, cutoff=0.6))


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the input, and how to mend it."""

    key: str
    """Dotted path of the offending key, e.g. `layout.tp`; `-` where there is none."""
    value: object
    """What the user gave."""
    rule: str
    """The rule that it breaks, with the numbers in it."""
    fix: str
    """What to write instead."""
    where: str = ""
    """File, or file:line:column."""

    def __str__(self) -> str:
        place = f"\n  in   {_one_line(self.where)}" if self.where else ""
        return f"error: {_one_line(self.key)} = {shorten(self.value)}\n  rule {self.rule}\n  fix  {self.fix}{place}"

    def at(self, where: str) -> Problem:
        """The same problem, located; an already located one stays as it is."""
        return self if self.where else replace(self, where=where)

    def under(self, prefix: str) -> Problem:
        """The same problem with `prefix.` before its key."""
        return replace(self, key=f"{prefix}.{self.key}" if self.key != "-" else prefix)


class PlannerError(Exception):
    """Base of all errors that a user can cause or cure."""

    exit_status = 1


class InputError(PlannerError):
    """Wrong input. Carries every problem found, not only the first."""

    exit_status = 2

    def __init__(self, *problems: Problem) -> None:
        if not problems:
            raise ValueError("InputError needs at least one Problem")
        super().__init__(problems)
        self.problems = problems

    @classmethod
    def single(cls, key: str, value: object, rule: str, fix: str, where: str = "") -> InputError:
        """An InputError with one problem."""
        return cls(Problem(key, value, rule, fix, where))

    def __str__(self) -> str:
        return "\n".join(str(p) for p in self.problems)

    def at(self, where: str) -> InputError:
        """The same error with `where` on every problem that has none."""
        return InputError(*(p.at(where) for p in self.problems))

    def under(self, prefix: str) -> InputError:
        """The same error with every key prefixed."""
        return InputError(*(p.under(prefix) for p in self.problems))


class InfeasibleError(PlannerError):
    """The input is valid, and no plan satisfies it."""

    exit_status = 3


class MissingPieceError(PlannerError):
    """An optional package is needed; `str()` holds the line that installs it."""

    exit_status = 6
