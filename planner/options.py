"""A plan's keys as flat options with text values, as the command line and the app give them: `num_devices="512"`, `tokens="15T"`, `tp="4"`.

`put_options` puts them into a plan's mapping, `options_in` reads them out of one; `command_line` writes the command that says the same.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, get_args, get_origin

from planner.errors import InputError
from planner.files import parse_yaml
from planner.hardware import ClusterSpec
from planner.layout import PartialLayout
from planner.units import parse_count
from planner.workload import Workload

__all__ = ["command_line", "option_choices", "option_places", "options_in", "put_options"]

SECTIONS = (("workload", Workload), ("cluster", ClusterSpec), ("layout", PartialLayout))
AT_THE_TOP = ("model", "stack", "software_year")


@lru_cache(maxsize=1)
def option_places() -> dict[str, tuple[str, bool]]:
    """Option -> (section of the plan that it belongs to, whether its value is text whatever it looks like)."""
    found = {}
    for section, kind in SECTIONS:
        for name, field in kind.model_fields.items():
            kinds = get_args(field.annotation) or (field.annotation,)
            is_text = any(k is str or (get_origin(k) is Literal and isinstance(get_args(k)[0], str)) for k in (*kinds, field.annotation))
            found[field.alias or name] = (section, is_text or field.alias is not None)
    return found


@lru_cache(maxsize=1)
def option_choices() -> dict[str, tuple[str, ...]]:
    """Option -> all the values it may have, of options that have few; truth values among them."""
    found = {}
    for _, kind in SECTIONS:
        for name, field in kind.model_fields.items():
            kinds = (field.annotation, *get_args(field.annotation))
            few = next((get_args(k) for k in kinds if get_origin(k) is Literal), ("true", "false") if bool in kinds else ())
            if few:
                found[field.alias or name] = tuple(str(value) for value in few)
    found["zero_stage"] = ("0", "1", "2", "3")
    return found


def put_options(values: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    """The plan's mapping with the options in it; what is wrong with them is left to `build_request`.

    Example:
        >>> put_options({"model": "gpt2"}, {"num_devices": "8", "price": "2.10"})
        {'model': 'gpt2', 'cluster': {'num_devices': 8, 'price': '2.10 USD/h'}}
    """
    found, places = dict(values), option_places()
    for name, text in given.items():
        section, is_text = places.get(name, (None, name != "software_year"))
        value = f"{text} USD/h" if name == "price" and not any(c.isalpha() for c in text) else text if is_text else _scalar(text)
        if section is None:
            found[name] = value
        else:
            inner = found.get(section)
            found[section] = {**(inner if isinstance(inner, dict) else {}), name: value}
    return found


def options_in(values: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """(options, the rest) of a plan's mapping: what no option can say, such as a model in full, stays a mapping.

    Example:
        >>> options_in({"model": {"model_type": "gpt2"}, "workload": {"tokens": 1.5e13}})
        ({'tokens': '15T'}, {'model': {'model_type': 'gpt2'}})
    """
    options: dict[str, str] = {}
    rest: dict[str, Any] = {}
    for key, value in values.items():
        if key in dict(SECTIONS) and isinstance(value, Mapping):
            known = {name: _text(inner) for name, inner in value.items() if option_places().get(name, ("",))[0] == key and _is_scalar(inner)}
            options |= {name: text for name, text in known.items() if text}
            unknown = {name: inner for name, inner in value.items() if name not in known}
            rest |= {key: unknown} if unknown else {}
        elif key in AT_THE_TOP and _is_scalar(value):
            options |= {key: _text(value)} if value is not None else {}
        else:
            rest[key] = value
    return options, rest


def command_line(options: Mapping[str, str], file: str = "", command: str = "estimate") -> str:
    """The command that estimates the same, ready to be pasted.

    Example:
        >>> command_line({"model": "gpt2", "num_devices": "8"})
        'planner estimate --model gpt2 --num-devices 8'
    """
    flags = [part for name, text in options.items() for part in ("--" + name.replace("_", "-"), text)]
    return shlex.join(["planner", command, *([file] if file else []), *flags])


def _scalar(text: str) -> Any:
    """An option's text as YAML would read it; what is no scalar stays text, and fails as such."""
    try:
        value = parse_yaml(text)
    except InputError:
        return text
    return value if isinstance(value, (bool, int, float)) else text


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, (str, bool, int, float))


def _text(value: Any) -> str:
    """A value as a user would type it: large round numbers with their letter."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
            short = f"{value / factor:g}{letter}"
            if abs(value) >= factor and parse_count(short) == value:
                return short
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    return str(value)
