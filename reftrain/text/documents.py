"""A document, and the ledger of what every step kept, changed and dropped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Document", "Ledger"]

MAX_EXAMPLES = 3
EXAMPLE_CHARACTERS = 160


@dataclass(frozen=True)
class Document:
    """One text on its way to the shards."""

    id: str
    """Unique where the source says so; names the document in the report."""
    text: str
    split: str = ""
    """train, valid or test; empty until it is decided."""

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8."""
        return len(self.text.encode(errors="replace"))


@dataclass
class _Step:
    documents_in: int = 0
    bytes_in: int = 0
    documents_out: int = 0
    bytes_out: int = 0
    dropped: dict[str, dict[str, Any]] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)


class Ledger:
    """Counts documents and bytes by step and reason, with a few examples of each reason.

    Args:
        steps: the names of the steps, in the order in which the report shows them.
    """

    def __init__(self, *steps: str) -> None:
        self._steps = {name: _Step() for name in steps}

    def step(self, name: str) -> _Step:
        """The counts of one step, a new one if need be."""
        return self._steps.setdefault(name, _Step())

    def drop(self, step: str, reason: str, document: Document, detail: str = "") -> None:
        """Books a dropped document under its reason."""
        entry = self.step(step).dropped.setdefault(reason, {"documents": 0, "bytes": 0, "examples": []})
        entry["documents"] += 1
        entry["bytes"] += document.num_bytes
        if len(entry["examples"]) < MAX_EXAMPLES:
            text = " ".join(document.text[: 2 * EXAMPLE_CHARACTERS].split())[:EXAMPLE_CHARACTERS]
            entry["examples"].append({"id": document.id, "text": text, **({"detail": detail} if detail else {})})

    def change(self, step: str, what: str, count: int = 1) -> None:
        """Books that `what` was done to `count` documents."""
        changed = self.step(step).changed
        changed[what] = changed.get(what, 0) + count

    def count_in(self, step: str, documents: Iterable[Document]) -> Iterator[Document]:
        """Passes documents on and counts them as the step's input."""
        counts = self.step(step)
        for document in documents:
            counts.documents_in += 1
            counts.bytes_in += document.num_bytes
            yield document

    def count_out(self, step: str, documents: Iterable[Document]) -> Iterator[Document]:
        """Passes documents on and counts them as the step's output."""
        counts = self.step(step)
        for document in documents:
            counts.documents_out += 1
            counts.bytes_out += document.num_bytes
            yield document

    def to_dict(self) -> dict[str, Any]:
        """The report's `steps`: by step, in and out, and by reason what was dropped."""
        return {
            name: {
                "documents_in": step.documents_in,
                "documents_out": step.documents_out,
                "bytes_in": step.bytes_in,
                "bytes_out": step.bytes_out,
                "dropped": step.dropped,
                "changed": step.changed,
            }
            for name, step in self._steps.items()
        }
