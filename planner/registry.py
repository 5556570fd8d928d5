"""Name -> object, with errors that name the nearest known names.

A folder marked [+] registers one object per file: `load_folder` imports every module of a package, so that a new file
is enough to add an architecture, a schedule or an exporter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Generic, TypeVar

from planner.errors import InputError, nearest

__all__ = ["Registry", "unknown_name"]

T = TypeVar("T")


def unknown_name(key: str, name: object, known: list[str], hint: str = "") -> InputError:
    """The error for a name that is not in a catalog: nearest names first, else all (at most 40)."""
    close = nearest(name, known)
    listed = ", ".join(sorted(known)[:40]) + (", ..." if len(known) > 40 else "")
    fix = f"did you mean {', '.join(close)}?" if close else f"use one of: {listed}"
    return InputError.single(key, name, f"must be one of {len(known)} known names", fix + hint)


class Registry(Generic[T]):
    """A mapping that fails on duplicates and helps on unknown names.

    Args:
        key: what an unknown name is called in the error, e.g. `layout.schedule`.
        package: a package whose modules register themselves when first looked at; None for none.
    """

    def __init__(self, key: str, package: str | None = None) -> None:
        self._key = key
        self._package = package
        self._items: dict[str, T] = {}

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator: the object under each of `names`."""

        def add(item: T) -> T:
            for name in names:
                if name in self._items:
                    raise ValueError(f"{self._key}: {name!r} is registered twice")
                self._items[name] = item
            return item

        return add

    def _load(self) -> dict[str, T]:
        if self._package is not None:
            package, self._package = self._package, None
            folder = Path(str(import_module(package).__file__)).parent
            for path in sorted(folder.glob("*.py")):
                if not path.stem.startswith("_"):
                    import_module(f"{package}.{path.stem}")
        return self._items

    def __getitem__(self, name: str) -> T:
        items = self._load()
        if name not in items:
            raise unknown_name(self._key, name, list(items))
        return items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._load()

    def __iter__(self) -> Iterator[str]:
        return iter(self._load())

    def items(self) -> list[tuple[str, T]]:
        """All (name, object), in order of registration."""
        return list(self._load().items())
