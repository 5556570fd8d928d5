"""The base of every input record: frozen, strict, and with errors a person can act on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from planner.errors import InputError, Problem, nearest
from planner.units import parse, parse_count

__all__ = [
    "Bytes", "BytesPerSecond", "Count", "FlopsPerSecond", "Fraction", "NonNegativeInt", "PositiveInt", "ScheduleName", "Seconds", "Spec",
    "UsdPerHour", "ZeroStage", "Watts", "build",
]  # fmt: skip

S = TypeVar("S", bound="Spec")


class Spec(BaseModel):
    """A frozen record; unknown keys, wrong types, NaN and infinity are errors."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=False)


def _with_unit(quantity: str) -> Callable[[object], float]:
    def read(value: object) -> float:
        try:
            return parse(value, quantity)
        except InputError as error:  # pydantic only collects ValueErrors
            raise ValueError(f"{error.problems[0].rule}; {error.problems[0].fix}") from None

    return read


def _count(value: object) -> float:
    try:
        return parse_count(value)
    except InputError as error:
        raise ValueError(f"{error.problems[0].rule}; {error.problems[0].fix}") from None


def _whole(value: object) -> object:
    """15e12 and 512.0 are whole numbers to a person; True is not."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def _no_bool(value: object) -> object:
    """`true` equals 1 in Python, and a Literal would take it."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false; write 0, 1, 2 or 3")
    return value


Bytes = Annotated[float, BeforeValidator(_with_unit("bytes")), Field(gt=0)]
BytesPerSecond = Annotated[float, BeforeValidator(_with_unit("bytes_per_s")), Field(gt=0)]
FlopsPerSecond = Annotated[float, BeforeValidator(_with_unit("flops_per_s")), Field(gt=0)]
Seconds = Annotated[float, BeforeValidator(_with_unit("s")), Field(ge=0)]
Watts = Annotated[float, BeforeValidator(_with_unit("watts")), Field(gt=0)]
UsdPerHour = Annotated[float, BeforeValidator(_with_unit("usd_per_hour")), Field(gt=0)]
ScheduleName = Literal["gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "dualpipe"]
ZeroStage = Annotated[Literal[0, 1, 2, 3], BeforeValidator(_no_bool)]
Count = Annotated[float, BeforeValidator(_count), Field(gt=0, le=1e30)]
PositiveInt = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=10**12)]
NonNegativeInt = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=10**12)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def build(kind: type[S], values: object, key: str, where: str = "") -> S:
    """`kind(**values)`, with every mistake reported as a `Problem` at once.

    Args:
        values: what a file or the command line held; must be a mapping.
        key: the dotted path of this record, put before each offending key.
    Raises:
        InputError: one Problem per mistake; unknown keys name the nearest known one.
    """
    if not isinstance(values, dict):
        raise InputError.single(key, values, "must be a mapping of keys to values", f"write e.g. {{{_some_keys(kind)}: ...}}", where)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(*(_problem(kind, e, key, where) for e in error.errors(include_url=False))) from None


def _known_keys(kind: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in kind.model_fields.items()]


def _some_keys(kind: type[BaseModel]) -> str:
    return ", ".join(_known_keys(kind)[:12])


def _problem(kind: type[BaseModel], error: Any, key: str, where: str) -> Problem:
    path = ".".join([key, *(str(part) for part in error["loc"])]) if key else ".".join(str(part) for part in error["loc"])
    value, context = error["input"], error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        name = str(error["loc"][-1])
        close = nearest(name, _known_keys(kind))
        return Problem(
            path,
            value,
            f"is not a key of {key or kind.__name__}",
            f"did you mean {', '.join(close)}?" if close else f"known keys: {_some_keys(kind)}",
            where,
        )
    if error["type"] == "missing":
        return Problem(path, None, "is required", f"add the key {error['loc'][-1]!r}", where)
    if error["type"] == "literal_error":
        known = [k.strip("'") for k in str(context["expected"]).replace(" or ", ", ").split(", ")]
        close = nearest(value, known)
        return Problem(
            path,
            value,
            f"must be one of {', '.join(known)}",
            f"did you mean {', '.join(close)}?" if close else f"use one of {', '.join(known)}",
            where,
        )
    message = str(error["msg"]).removeprefix("Value error, ")
    rule, _, fix = message.partition("; ")
    return Problem(path, value, rule[:1].lower() + rule[1:], fix or "give a value that satisfies the rule", where)
