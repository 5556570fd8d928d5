"""Importers: another trainer's configuration in, a plan's request out, so that a run that exists can be priced at once.

One file per source registers one `Importer`. Files are parsed, never executed. What a configuration does not say (the hardware,
for DeepSpeed also the model) is given beside it; what was assumed and what was not understood is listed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planner.errors import InputError, Problem
from planner.files import read_text
from planner.plan import Request, build_request
from planner.registry import Registry

__all__ = ["IMPORTERS", "Found", "Given", "Imported", "Importer", "import_config"]


@dataclass(frozen=True)
class Given:
    """What the user says beside the file; None where not."""

    accelerator: str | None = None
    num_devices: int | None = None
    model: str | None = None
    seq_len: int | None = None


@dataclass
class Found:
    """What a file says, in the plan's words, while it is being read."""

    layout: dict[str, Any] = field(default_factory=dict)
    workload: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    model: str | dict[str, Any] | None = None
    num_devices: int | None = None
    stack: str | None = None
    assumed: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


class Importer(ABC):
    """One source of configurations."""

    name: str
    """As in `--from`."""
    versions: tuple[str, ...]
    """Versions of the source whose files are understood."""
    summary: str

    @abstractmethod
    def read(self, text: str, where: str, given: Given) -> Found:
        """What the file says.

        Raises:
            InputError: not such a file, or a layout that the plan has no words for.
        """


IMPORTERS: Registry[Importer] = Registry("--from", "planner.importers")


@dataclass(frozen=True)
class Imported:
    """A request, and what to know about it."""

    request: Request
    assumed: tuple[str, ...]
    ignored: tuple[str, ...]


def import_config(source: str, path: str | Path, given: Given | None = None) -> Imported:
    """The request that a trainer's own configuration amounts to.

    Args:
        source: name of an importer.
        path: the file.
        given: what the file cannot say; what the user gives goes before what the file says.
    Raises:
        InputError: unknown source, unreadable file, something missing; all at once.
    """
    given = given or Given()
    importer, where = IMPORTERS[source], str(path)
    found = importer.read(read_text(path), where, given)
    model = given.model or found.model
    num_devices = given.num_devices or found.num_devices
    needed = {"--model": model, "--accelerator": given.accelerator, "--num-devices": num_devices}
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise InputError(*(Problem(name, None, f"is not in a {source} file", f"add {name}", where) for name in missing))
    values: dict[str, Any] = {
        "model": model,
        "workload": found.workload | ({"seq_len": given.seq_len} if given.seq_len else {}),
        "cluster": {"accelerator": given.accelerator, "num_devices": num_devices},
        "layout": found.layout,
    }
    values |= {"training": found.training} if found.training else {}
    values |= {"stack": found.stack} if found.stack else {}
    return Imported(build_request(values, where), tuple(found.assumed), tuple(found.ignored))


def whole(values: Mapping[str, Any], key: str, default: int, where: str, minimum: int = 1) -> int:
    """A whole number of a file; `default` where it is absent.

    Raises:
        InputError: not a whole number of at least `minimum`.
    """
    value = values.get(key)
    if value is None:
        return default
    text = str(value)
    if isinstance(value, bool) or not text.lstrip("-").isdigit() or len(text) > 12 or int(text) < minimum:
        raise InputError.single(key, value, f"must be a whole number of at least {minimum}", "correct the file", where)
    return int(text)


def real(values: Mapping[str, Any], key: str, default: float, where: str) -> float:
    """A number of a file; `default` where it is absent.

    Raises:
        InputError: no number, or not finite.
    """
    try:
        value = float(values.get(key, default))
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise InputError.single(key, values.get(key), "must be a number", "correct the file", where)
    return value


def quotient(world: int, per: int, key: str, where: str) -> int:
    """world / per, which must be exact.

    Raises:
        InputError: it is not.
    """
    if per < 1 or world % per:
        raise InputError.single(
            key, world, f"must be a multiple of {per}, the product of the other degrees", "give the number of devices of the run", where
        )
    return world // per
