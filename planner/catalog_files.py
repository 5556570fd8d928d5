"""Catalog files as entries that are parsed when first looked at.

The files are cut at their top-level keys, which takes a millisecond; an estimate then parses the two entries it needs
instead of all 150.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from planner.errors import InputError, Problem, nearest
from planner.files import parse_yaml, read_text, to_yaml
from planner.spec import Spec, build

__all__ = ["Entries", "add_entries", "read_aliases", "read_entries"]

Texts = dict[str, tuple[str, str]]
"""Id -> (the YAML of its entry, the file it stands in)."""


class Entries(Mapping[str, Any]):
    """Entries of catalog files as records of one kind, built when first looked at."""

    def __init__(self, texts: Texts, kind: type[Spec]) -> None:
        self._texts = texts
        self._kind = kind
        self._built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            text, where = self._texts[name]
            values = parse_yaml(text, where)[name]
            if not isinstance(values, dict):
                raise InputError.single(name, values, "an entry is a mapping of keys", "see data/hardware_catalog.yaml", where)
            values = {key: value for key, value in values.items() if key != "replace"}
            self._built[name] = build(self._kind, {"id": name, **values}, name, where)
        return self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)


_TOP_KEY = re.compile(r"^(?:'([^'\n]+)'|\"([^\"\n]+)\"|([^\s#'\"][^:\n]*?)):", re.MULTILINE)


def _cut(text: str, where: str) -> Texts:
    """Top-level key -> (its lines, file), without parsing them."""
    found: Texts = {}
    matches = list(_TOP_KEY.finditer(text))
    for match, following in zip(matches, [*matches[1:], None], strict=True):
        name = match[1] or match[2] or match[3]
        if name in found:
            raise InputError.single(name, None, "stands twice in one catalog file", "remove one of the two entries", where)
        found[name] = (text[match.start() : following.start() if following else len(text)], where)
    return found


def read_entries(path: Path) -> Texts:
    """The entries of a shipped file, cut apart."""
    return _cut(read_text(path), path.name)


_ALIASES = re.compile(r"^\s+aliases:\s*\[([^\]]*)\]", re.MULTILINE)


def read_aliases(texts: Texts) -> dict[str, str]:
    """Alias -> id, read from the `aliases: [...]` lines alone.

    Raises:
        InputError: an alias that is an id, or the alias of another entry.
    """
    found: dict[str, str] = {}
    for name, (text, where) in texts.items():
        match = _ALIASES.search(text)
        for alias in match[1].split(",") if match else []:
            key = alias.strip().strip("'\"").lower()
            if key in texts or found.get(key, name) != name:
                rule = f"is already the name of {key if key in texts else found[key]}"
                raise InputError.single(f"{name}.aliases", key, rule, "choose another alias", where)
            if key:
                found[key] = name
    return found


def add_entries(path: Path, accelerators: Texts, offers: Texts) -> dict[str, list[str]]:
    """Puts the entries of a user's file among the shipped ones.

    Returns:
        The ids added, by section.

    Raises:
        InputError: not a catalog file, or ids that are taken; all problems at once.
    """
    values = parse_yaml(read_text(path), str(path))
    known = {"accelerators": accelerators, "offers": offers}
    fix = "see docs/adding.md"
    if not isinstance(values, dict) or not values:
        rule = "a catalog file holds accelerators: and offers:, each a mapping of entries"
        raise InputError.single("catalog", values, rule, fix, str(path))
    problems = []
    for section, entries in values.items():
        if section not in known:
            close = nearest(section, list(known))
            rule = "a catalog file holds accelerators: and offers:, each a mapping of entries"
            problems.append(Problem(section, entries, rule, f"did you mean {close[0]}?" if close else fix, str(path)))
        elif not isinstance(entries, dict):
            problems.append(Problem(section, entries, "must be a mapping of ids to entries", fix, str(path)))
        else:
            taken = [
                name for name, entry in entries.items() if name in known[section] and not (isinstance(entry, dict) and entry.get("replace") is True)
            ]
            problems += [
                Problem(f"{section}.{name}", name, "is already in the catalog", "choose another id, or add replace: true", str(path))
                for name in taken
            ]
            known[section].update({name: (to_yaml({name: entry}), str(path)) for name, entry in entries.items()})
    if problems:
        raise InputError(*problems)
    return {section: list(entries) for section, entries in values.items()}
