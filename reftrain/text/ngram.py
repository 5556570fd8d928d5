"""A word n-gram model with modified Kneser-Ney smoothing: what a neural model of the same text has to beat.

Each order is interpolated with the next lower one, and the lowest with a spelling model (the same smoothing over the bytes of
words), so that every text has a probability, unseen words included, and bits per byte compare with those of any other model.
Whitespace belongs to the words: `join(split_words(text)) == text`.

A k-gram is a number: its place in the sorted table of order k. It is found from the number of its first k-1 words and its last word,
so that whole texts are counted and looked up order by order, without a loop over words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

__all__ = ["KneserNey", "WordModel", "split_words"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
WORD = re.compile(r" ?\w+(?:['’]\w+)*| ?[^\w\s]|\s+")
END_OF_WORD = 256
"""Behind the 256 bytes."""
PLAIN_DISCOUNTS = (0.0, 0.5, 1.0, 1.5)
"""For texts too small to show how often n-grams are seen once, twice, three and four times."""


def split_words(text: str) -> list[str]:
    """Words, punctuation and whitespace; a single space goes with what follows it.

    Example:
        >>> split_words("It’s here, now.\\n\\nNo")
        ['It’s', ' here', ',', ' now', '.', '\\n\\n', 'No']
    """
    return WORD.findall(text)


@dataclass(frozen=True)
class _Order:
    """k-grams of one order."""

    keys: Ints
    """Sorted: number of the first k-1 words * symbols + last word."""
    share: Floats
    """(count - discount) / count of the context, per k-gram."""
    rest: Floats
    """What the discounts leave to the lower order, per context."""

    def find(self, keys: Ints) -> Ints:
        """Numbers of k-grams, -1 for those never seen."""
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, places, -1)


class KneserNey:
    """P(symbol | the order - 1 symbols before it), interpolated modified Kneser-Ney.

    Formula: p_k(w | c) = (n(cw) - D(n(cw))) / n(c) + rest(c) * p_{k-1}(w | c without its first symbol), down to p_0, the caller's;
    n counts occurrences in the highest order, distinct left neighbours below it; D has one value each for counts of 1, 2, and more.
    Source: Chen and Goodman 1998 (TR-10-98), section 3.

    Args:
        num_symbols: symbols 0 .. num_symbols - 1 are counted; larger ones are unseen, told apart by p_0 alone.
        end: the symbol behind every sequence, and its context before the first symbol.
    """

    def __init__(self, order: int, num_symbols: int, end: int) -> None:
        self.order, self.num_symbols, self.end = order, num_symbols, end
        self._orders: list[_Order] = []

    def fit(self, sequences: Iterable[Ints]) -> Self:
        """Counts the n-grams of `sequences`; a sequence knows nothing of the one before it."""
        ids, is_counted = self._stream(sequences)
        contexts, grams, ends = np.zeros_like(ids), [], []
        for _ in range(self.order):
            keys, numbers = np.unique(self._keys(contexts, ids), return_inverse=True)
            grams.append(keys)
            ends.append(numbers[is_counted])
            contexts = np.concatenate([[0], numbers[:-1]])
        num_contexts = 1
        for k, keys in enumerate(grams):
            is_highest = k == self.order - 1
            seen = ends[k] if is_highest else ends[k][np.unique(ends[k + 1], return_index=True)[1]]
            counts = np.bincount(seen, minlength=len(keys))
            self._orders.append(_smoothed(keys, counts, keys // (self.num_symbols + 1), num_contexts))
            num_contexts = len(keys)
        return self

    def probabilities(self, sequences: Iterable[Ints], base: Floats) -> Floats:
        """P of every symbol of every sequence, with the end symbol behind each, in one row.

        Args:
            base: p_0 by symbol, unseen ones included.
        """
        ids, is_counted = self._stream(sequences)
        found, contexts = base[ids], np.zeros_like(ids)
        for order in self._orders:
            numbers = np.where(contexts >= 0, order.find(self._keys(contexts, ids)), -1)
            share = np.where(numbers >= 0, order.share[numbers], 0.0)
            found = np.where(contexts >= 0, share + order.rest[contexts] * found, found)
            contexts = np.concatenate([[-1], numbers[:-1]])
        return found[is_counted]

    def _keys(self, contexts: Ints, ids: Ints) -> Ints:
        return contexts * (self.num_symbols + 1) + np.minimum(ids, self.num_symbols)

    def _stream(self, sequences: Iterable[Ints]) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """All sequences in one array, with order - 1 end symbols before each, which are context and not counted."""
        before = [self.end] * (self.order - 1)
        rows = [np.concatenate([before, row, [self.end]]).astype(np.int64) for row in sequences]
        is_counted = [np.arange(len(row)) >= self.order - 1 for row in rows]
        return np.concatenate(rows), np.concatenate(is_counted)


def _smoothed(keys: Ints, counts: Ints, contexts: Ints, num_contexts: int) -> _Order:
    discount = np.array(_discounts(counts))[np.minimum(counts, 3)]
    totals = np.bincount(contexts, counts, num_contexts)
    left = np.bincount(contexts, discount, num_contexts)
    is_seen = totals > 0
    rest = np.where(is_seen, left / np.where(is_seen, totals, 1), 1.0)
    return _Order(keys, (counts - discount) / np.where(is_seen, totals, 1)[contexts], rest)


def _discounts(counts: Ints) -> tuple[float, ...]:
    """D for counts of 0, 1, 2, and 3 or more."""
    n1, n2, n3, n4 = (int((counts == n).sum()) for n in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return PLAIN_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return (0.0, *found) if all(0 < d < n for n, d in enumerate(found, 1)) else PLAIN_DISCOUNTS


class WordModel:
    """Kneser-Ney over the words of documents, with a spelling model under it.

    Args:
        texts: the training documents.
        order: words in an n-gram.
        spelling_order: bytes in an n-gram of the spelling model, which learns from each distinct word once.

    Example:
        >>> model = WordModel(["the cat sat. the dog sat."] * 3, order=3, spelling_order=3)
        >>> model.bits(["the cat sat."]) < model.bits(["sat cat the."]) < model.bits(["xqz cat the."])
        True
    """

    def __init__(self, texts: Iterable[str], order: int = 4, spelling_order: int = 6) -> None:
        self.vocabulary = {"": 0}  # the end of a document is the word without letters
        documents = [np.array([self.vocabulary.setdefault(w, len(self.vocabulary)) for w in split_words(text)], np.int64) for text in texts]
        self.num_words = sum(map(len, documents))
        self._spelling = KneserNey(spelling_order, END_OF_WORD + 1, END_OF_WORD).fit(map(_spelled, self.vocabulary))
        self._words = KneserNey(order, len(self.vocabulary), 0).fit(documents)

    def bits(self, texts: Iterable[str]) -> float:
        """-log2 of the probability of documents (at least one), their ends included."""
        vocabulary = dict(self.vocabulary)
        documents = [np.array([vocabulary.setdefault(w, len(vocabulary)) for w in split_words(text)], np.int64) for text in texts]
        return -float(np.log2(self._words.probabilities(documents, self.spelling(vocabulary))).sum())

    def spelling(self, words: Iterable[str]) -> Floats:
        """P of each word to the spelling model; over all byte strings, the empty one included, they sum to 1."""
        spelled = [_spelled(word) for word in words]
        base = np.full(END_OF_WORD + 1, 1 / (END_OF_WORD + 1))
        starts = np.cumsum([0, *(len(row) + 1 for row in spelled[:-1])])
        found: Floats = np.exp(np.add.reduceat(np.log(self._spelling.probabilities(spelled, base)), starts))
        return found


def _spelled(word: str) -> Ints:
    return np.frombuffer(word.encode(), np.uint8).astype(np.int64)
