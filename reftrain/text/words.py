"""Words and n-grams of words as 64-bit numbers, the common ground of near-duplicate and contamination checks."""

from __future__ import annotations

import re
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

__all__ = ["ngram_hashes", "split_words", "word_hashes"]

UInt64Array = npt.NDArray[np.uint64]
_WORD = re.compile(r"[^\W_]+")
_MULTIPLIER = 0x9E3779B97F4A7C15
_MAX_CACHED = 1 << 20
_cache: dict[str, int] = {}


def split_words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits: line breaks, punctuation, case and `_emphasis_` make no difference.

    Example:
        >>> split_words("“You _want_ to tell me,\\n and I...”")
        ['you', 'want', 'to', 'tell', 'me', 'and', 'i']
    """
    return _WORD.findall(text.lower())


def word_hashes(words: list[str]) -> UInt64Array:
    """One number per word, the same in every process."""
    if len(_cache) > _MAX_CACHED:
        _cache.clear()
    for word in set(words).difference(_cache):
        _cache[word] = int.from_bytes(blake2b(word.encode(errors="replace"), digest_size=8).digest(), "little")
    return np.fromiter(map(_cache.__getitem__, words), np.uint64, len(words))


def ngram_hashes(hashes: UInt64Array, n: int) -> UInt64Array:
    """A number for each run of `n` words, [max(len - n + 1, 0)]; its value depends on the words and their order.

    Formula: polynomial in the words' numbers modulo 2**64, by Horner's rule, with an odd multiplier, then mixed so that all bits are good.
    """
    count = max(len(hashes) - n + 1, 0)
    total = np.zeros(count, np.uint64)
    for i in range(n):
        total = total * np.uint64(_MULTIPLIER) + hashes[i : i + count]
    total ^= total >> np.uint64(32)
    total *= np.uint64(0xD6E8FEB86659FD93)
    return total ^ (total >> np.uint64(32))
