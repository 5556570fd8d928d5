"""Plan an LLM training run before you pay for it.

    from planner import estimate, load_plan
    plan = estimate(load_plan("examples/llama3_70b.yaml"))
    plan.fits, plan.time.train_s.value, plan.cost.usd

The names in `__all__` are the public interface; other modules may change.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.compare import compare
    from planner.errors import InfeasibleError, InputError, MissingPieceError, PlannerError, Problem
    from planner.estimate import estimate
    from planner.explain import explain
    from planner.plan import Plan, Request, build_request, load_plan

__all__ = [
    "InfeasibleError",
    "InputError",
    "MissingPieceError",
    "Plan",
    "PlannerError",
    "Problem",
    "Request",
    "build_request",
    "compare",
    "estimate",
    "explain",
    "load_plan",
]

_HOME = {
    "compare": "planner.compare",
    "estimate": "planner.estimate",
    "explain": "planner.explain",
    **dict.fromkeys(("Plan", "Request", "build_request", "load_plan"), "planner.plan"),
    **dict.fromkeys(("InfeasibleError", "InputError", "MissingPieceError", "PlannerError", "Problem"), "planner.errors"),
}


def _public(name: str) -> property:
    """A name that is imported when first asked for; the import system's own assignment of a like-named module is ignored."""
    return property(lambda _: getattr(import_module(_HOME[name]), name), lambda _, __: None)


class _Package(ModuleType):
    """`import planner` stays light, so that `--help` does; and `planner.estimate` is the function, not the file of that name."""

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


_names: Any = _Package
for _name in _HOME:
    setattr(_names, _name, _public(_name))
sys.modules[__name__].__class__ = _Package
