"""What an explanation is, and the objects behind a plan that explanations read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planner.estimate import estimate
from planner.graph import Part, StepGraph
from planner.memory import MemoryBreakdown, estimate_memory
from planner.op_cost import OpCost
from planner.plan import Plan, Request
from planner.registry import unknown_name
from planner.resolve import Job, resolve
from planner.schedules import SCHEDULES, Schedule
from planner.step_work import AxisGroups, StepWork, make_axis_groups, step_work
from planner.timing import TimeBreakdown, estimate_time

__all__ = ["Explanation", "Input", "Term", "Trace", "explained", "identifier", "look_up", "part_keys", "summed", "unit_of"]


@dataclass(frozen=True)
class Input:
    """A name of a formula: its value and where that comes from (`explain KEY` where it can be explained in turn)."""

    name: str
    value: float | str | None
    source: str


@dataclass(frozen=True)
class Term:
    """One of the parts that add up to a number."""

    name: str
    value: float
    share_fraction: float
    """Of the whole; 0 where the whole is 0."""


@dataclass(frozen=True)
class Explanation:
    """Where one number comes from."""

    key: str
    value: float | None
    """None in the overview."""
    unit: str
    formula: str
    """Arithmetic of the names in `inputs`, with max, min, ceil, exp, expm1 and sqrt."""
    substituted: str
    """`formula` with the values put in, to the last digit; evaluates to `value`."""
    inputs: tuple[Input, ...]
    terms: tuple[Term, ...]
    """Add up to `value`; empty where the number is no sum."""
    children: tuple[str, ...]
    """Keys to explain next."""
    source: str


@dataclass(frozen=True)
class Trace:
    """A plan and the objects that its numbers were read from."""

    request: Request
    plan: Plan
    plain: dict[str, Any]
    """`plan.to_dict()`."""
    job: Job
    graph: StepGraph
    memory: MemoryBreakdown
    work: StepWork
    time: TimeBreakdown
    groups: AxisGroups

    @classmethod
    def of(cls, request: Request) -> Trace:
        """The plan of a request, with its makings.

        Raises:
            InputError: wrong input.
        """
        plan = estimate(request)
        job = resolve(plan.to_request())
        graph = job.graph(plan.layout)
        names = part_keys([part.name for part in graph.parts])
        graph = replace(graph, parts=tuple(replace(part, name=name) for part, name in zip(graph.parts, names, strict=True)))
        memory, work = estimate_memory(graph, job.stack, job.cluster), step_work(graph, job.cluster, job.efficiency)
        time = estimate_time(graph, job.cluster, job.efficiency, job.nearby, job.software_year)
        return cls(request, plan, plan.to_dict(), job, graph, memory, work, time, make_axis_groups(graph, job.cluster))

    @property
    def schedule(self) -> Schedule:
        """The plan's pipeline schedule."""
        return SCHEDULES[self.plan.layout.schedule]

    def at(self, key: str) -> Any:
        """What stands at a dotted key of `plain`; raises KeyError, IndexError or ValueError where nothing does."""
        found: Any = self.plain
        for step in key.split("."):
            found = found[int(step)] if isinstance(found, list) else found[step]
        return found

    def input(self, name: str, key: str) -> Input:
        """A number of the plan as an input of a formula."""
        return Input(name, self.at(key), f"explain {key}")

    def locate(self, key: str, path: str) -> tuple[int, Part, OpCost | None, str]:
        """`block.attention.q.forward` -> (index of the part, part, cost of the op or None, what is left: `forward`).

        Raises:
            InputError: no such part or op; the nearest are named.
        """
        parts = {part.name: (i, part) for i, part in enumerate(self.graph.parts)}
        name, rest = look_up(key, path, list(parts))
        index, part = parts[name]
        if not rest:
            return index, part, None, ""
        ops = {cost.op.name: cost for cost in part.costs}
        op_name, left = look_up(key, rest, list(ops))
        return index, part, ops[op_name], left


def look_up(key: str, path: str, known: Sequence[str]) -> tuple[str, str]:
    """The longest known name that `path` begins with, and what follows it.

    Raises:
        InputError: none does.

    Example:
        >>> look_up("time.x", "attention.q.forward", ["attention", "attention.q"])
        ('attention.q', 'forward')
    """
    for name in sorted(known, key=len, reverse=True):
        if path == name or path.startswith(f"{name}."):
            return name, path[len(name) + 1 :]
    prefix = key[: len(key) - len(path)]
    raise unknown_name("key", key, [f"{prefix}{name}" for name in known])


_UNITS = (
    (r"bytes_per_s$", "bytes/s"), (r"flops_per_s(_per_device)?$", "FLOP/s"), (r"tokens_per_s(_per_device)?$", "tokens/s"),
    (r"usd_per_device_hour$", "USD/h"),
    (r"^flops\.\w+_per_token(_causal)?\b", "FLOP/token"), (r"^flops\.total\b", "FLOP"), (r"^params\.", "parameters"), (r"_hours$", "device-hours"),
    (r"_kwh$", "kWh"), (r"co2e_kg$", "kg"),
    (r"^cost\.(usd|breakdown_usd)\b", "USD"), (r"^loss\.nats_per_token\b", "nats/token"), (r"tokens$", "tokens"),
    (r"^(memory\.|violations\.).*bytes\b", "bytes"), (r"^time\.(step_s|train_s|breakdown_s|stage_\w+_s)\b", "s"), (r"_s$", "s"),
    (r"(^|_)bytes$", "bytes"), (r"(^|_)flops$", "FLOP"), (r"(^|_)usd$", "USD"),
)  # fmt: skip


def unit_of(key: str) -> str:
    """The unit that a key names; empty for plain counts and shares.

    Example:
        >>> unit_of("memory.breakdown_bytes.weights"), unit_of("time.mfu")
        ('bytes', '')
    """
    return next((unit for pattern, unit in _UNITS if re.search(pattern, key)), "")


def identifier(name: str) -> str:
    """A name that can stand in a formula: `attention.q` -> `attention_q`."""
    return re.sub(r"\W", "_", name)


def part_keys(names: Sequence[str]) -> list[str]:
    """Names of parts as keys: typed in a shell without quotes, and each once.

    Example:
        >>> part_keys(["embedding", "moe block", "moe block", "head"])
        ['embedding', 'moe_block', 'moe_block_2', 'head']
    """
    keys: list[str] = []
    for name in map(identifier, names):
        count = sum(re.fullmatch(rf"{name}(_\d+)?", key) is not None for key in keys)
        keys.append(f"{name}_{count + 1}" if count else name)
    return keys


def _literal(value: float | str | None) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(int(value)) if isinstance(value, bool) else str(value)
    return f"({value!r})" if value < 0 else repr(value)


def explained(
    key: str,
    value: Any,
    formula: str,
    inputs: Sequence[Input] = (),
    *,
    terms: Mapping[str, Any] | None = None,
    children: Sequence[str] = (),
    source: str,
) -> Explanation:
    """An Explanation whose `substituted` is made from formula and inputs; zero terms are left out."""
    plain = tuple(Input(i.name, i.value if isinstance(i.value, (str, bool, int)) or i.value is None else float(i.value), i.source) for i in inputs)
    values = {i.name: _literal(i.value) for i in plain}
    substituted = re.sub(r"[A-Za-z_]\w*", lambda match: values.get(match[0], match[0]), formula)
    whole = float(value)
    parts = {name: float(part) for name, part in (terms or {}).items() if float(part) != 0}
    listed = tuple(Term(name, part, part / whole if whole else 0.0) for name, part in parts.items())
    return Explanation(key, whole, unit_of(key), formula, substituted, plain, listed, tuple(children), source)


def summed(key: str, value: Any, terms: Mapping[str, Any], keys: Mapping[str, str], source: str) -> Explanation:
    """The explanation of a plain sum.

    Args:
        terms: name -> number; zeros are left out.
        keys: name -> key that explains the term, where there is one.
    """
    shown = {name: float(part) for name, part in terms.items() if float(part) != 0}
    inputs = [Input(identifier(name), part, f"explain {keys[name]}" if name in keys else source) for name, part in shown.items()]
    formula = " + ".join(i.name for i in inputs) or "0"
    return explained(key, value, formula, inputs, terms=shown, children=[keys[name] for name in shown if name in keys], source=source)
