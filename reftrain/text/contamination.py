"""Evaluation items that stand in the training text.

An item is flagged when one of its passages shares a run of 13 words with the training text (8 words when the passage is
shorter than 13). Passages under 8 words cannot be told from coincidence; items of only such are counted apart.

Source: T. Brown et al., Language Models are Few-Shot Learners, 2020, appendix C (13-grams); 8-grams for short items as in
A. Chowdhery et al., PaLM, 2022, section 8.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from planner.errors import InputError
from reftrain.text.documents import Document
from reftrain.text.jsonl import read_jsonl
from reftrain.text.words import UInt64Array, ngram_hashes, split_words, word_hashes

__all__ = ["EvaluationItems", "passages"]

LONG_WORDS, SHORT_WORDS = 13, 8
MAX_EXAMPLES = 5
_NOT_TEXT = {"id", "uid", "source", "title", "author", "section", "subject", "category", "field", "phenomenon", "relation", "task", "set", "pos"}


def passages(item: dict[str, Any]) -> list[str]:
    """Every text in an item but labels: question, context, each choice, each answer.

    Example:
        >>> passages({"id": "a", "question": "Who?", "choices": ["He", "She"], "gold": 1})
        ['Who?', 'He', 'She']
    """
    values = [value for key, value in item.items() if key not in _NOT_TEXT]
    return [text for value in values for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]


@dataclass
class _File:
    name: str
    items: int = 0
    too_short: int = 0
    flagged: dict[int, str] = field(default_factory=dict)


class EvaluationItems:
    """The items of evaluation files as n-grams, to be looked for in training text.

    Args:
        paths: jsonl or jsonl.gz files, or folders of such.
    Raises:
        InputError: a missing, unreadable or empty file.
    """

    def __init__(self, paths: Iterable[str | Path]) -> None:
        self.files: list[_File] = []
        self._names: list[tuple[int, int, str, list[str]]] = []  # file, item, id, words of the passage
        grams: dict[int, list[UInt64Array]] = {LONG_WORDS: [], SHORT_WORDS: []}
        owners: dict[int, list[UInt64Array]] = {LONG_WORDS: [], SHORT_WORDS: []}
        for path in _expand(paths):
            file = _File(str(path))
            self.files.append(file)
            for line in read_jsonl(path):
                self._add(file, line, grams, owners)
                file.items += 1
        self._grams: dict[int, tuple[UInt64Array, UInt64Array]] = {}
        for n, parts in grams.items():
            hashes, owner = (np.concatenate([np.zeros(0, np.uint64), *p]) for p in (parts, owners[n]))
            order = np.argsort(hashes, kind="stable")
            self._grams[n] = hashes[order], owner[order]

    def _add(self, file: _File, item: dict[str, Any], grams: dict[int, list[UInt64Array]], owners: dict[int, list[UInt64Array]]) -> None:
        found = False
        for text in passages(item):
            words = split_words(text)
            n = LONG_WORDS if len(words) >= LONG_WORDS else SHORT_WORDS
            hashes = ngram_hashes(word_hashes(words), n)
            if len(hashes):
                found = True
                grams[n].append(hashes)
                owners[n].append(np.full(len(hashes), len(self._names), np.uint64))
                self._names.append((len(self.files) - 1, file.items, str(item.get("id", file.items)), words))
        file.too_short += not found

    def look_in(self, document: Document) -> None:
        """Flags every item of which a run of words stands in `document`."""
        hashes = word_hashes(split_words(document.text))
        for n, (known, owner) in self._grams.items():
            if not len(known):
                continue
            here = np.unique(ngram_hashes(hashes, n))
            first, last = np.searchsorted(known, here, "left"), np.searchsorted(known, here, "right")
            for i in np.flatnonzero(last > first):
                for passage in np.unique(owner[first[i] : last[i]]):
                    file, item, _, words = self._names[int(passage)]
                    if item not in self.files[file].flagged:
                        self.files[file].flagged[item] = self._evidence(int(passage), words, n, int(here[i]), document.id)

    def _evidence(self, passage: int, words: list[str], n: int, gram: int, document_id: str) -> str:
        place = int(np.flatnonzero(ngram_hashes(word_hashes(words), n) == np.uint64(gram))[0])
        return f"{self._names[passage][2]}: “{' '.join(words[place : place + n])}” in {document_id}"

    def report(self) -> list[dict[str, Any]]:
        """By file: items, those flagged with their share of the items that could be checked, and examples."""
        return [
            {
                "file": file.name,
                "items": file.items,
                "too_short": file.too_short,
                "flagged": len(file.flagged),
                "flagged_fraction": len(file.flagged) / max(file.items - file.too_short, 1),
                "flagged_items": sorted(file.flagged),
                "examples": [file.flagged[i] for i in sorted(file.flagged)[:MAX_EXAMPLES]],
            }
            for file in self.files
        ]


def _expand(paths: Iterable[str | Path]) -> list[Path]:
    found: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(p for p in path.rglob("*") if p.name.endswith((".jsonl", ".jsonl.gz"))) if path.is_dir() else [path]
        if not inside:
            raise InputError.single("--eval", str(path), "must hold .jsonl or .jsonl.gz files", "name a file or another folder")
        found += inside
    return found
