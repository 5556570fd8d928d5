"""Removal of exact and near duplicates; the first of its kind stays.

Near duplicates: a document is its set of runs of five words; two are near when the Jaccard similarity (shared runs over all
runs) of their sets reaches a threshold. MinHash estimates it from 128 numbers a document, and banding finds the pairs
worth comparing without comparing all.

Source: A. Broder, On the resemblance and containment of documents, 1997; Leskovec, Rajaraman and Ullman, Mining of Massive
Datasets, chapter 3 (banding).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from reftrain.text.documents import Document, Ledger
from reftrain.text.words import UInt64Array, ngram_hashes, split_words, word_hashes

__all__ = ["NearDuplicates", "deduplicate", "minhash", "shingles"]

SHINGLE_WORDS = 5
NUM_PERMUTATIONS = 128
RECALL = 0.99
"""Wanted probability that two documents exactly at the threshold are compared."""
_BLOCK = 4096
_random = np.random.Generator(np.random.PCG64(20240229))
_FACTORS = _random.integers(0, 2**63, NUM_PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS = _random.integers(0, 2**63, NUM_PERMUTATIONS, dtype=np.uint64)
UInt32Array = npt.NDArray[np.uint32]


def shingles(text: str) -> UInt64Array:
    """The set of runs of five words as sorted numbers; a shorter text is one run."""
    hashes = word_hashes(split_words(text))
    return np.unique(ngram_hashes(hashes, min(SHINGLE_WORDS, max(len(hashes), 1))))


def minhash(items: UInt64Array) -> UInt32Array:
    """The signature [128] of a set: two sets agree at each place with a probability equal to their Jaccard similarity.

    The share of equal places estimates it with a standard deviation of at most sqrt(0.25 / 128) = 4.4 %.
    """
    signature = np.full(NUM_PERMUTATIONS, np.iinfo(np.uint32).max, np.uint32)
    for start in range(0, len(items), _BLOCK):
        # Multiply-shift hashing: the upper half of an odd multiple of an already well mixed number.
        hashed = (_FACTORS[:, None] * items[None, start : start + _BLOCK] + _OFFSETS[:, None]) >> np.uint64(32)
        signature = np.minimum(signature, hashed.min(axis=1).astype(np.uint32))
    return signature


def _rows_per_band(threshold: float) -> int:
    """The longest bands that still compare a pair at the threshold with probability `RECALL`: 1 - (1 - t^r)^(128 // r)."""
    fitting = [r for r in range(1, NUM_PERMUTATIONS + 1) if 1 - (1 - threshold**r) ** (NUM_PERMUTATIONS // r) >= RECALL]
    return max(fitting, default=1)


class NearDuplicates:
    """An index of signatures that finds an earlier one near a new one.

    Memory: 512 bytes of signature and about 128 / r band keys a document.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._rows = _rows_per_band(threshold)
        self._num_bands = NUM_PERMUTATIONS // self._rows
        self._bands: list[dict[bytes, list[int]]] = [{} for _ in range(self._num_bands)]
        self._signatures: list[UInt32Array] = []

    def find(self, signature: UInt32Array) -> tuple[int, float] | None:
        """(number, estimated Jaccard similarity) of the nearest earlier document at or above the threshold, or None."""
        candidates = sorted({number for band, key in zip(self._bands, self._keys(signature), strict=True) for number in band.get(key, ())})
        if not candidates:
            return None
        similarity = (np.stack([self._signatures[c] for c in candidates]) == signature).mean(axis=1)
        best = int(similarity.argmax())
        return (candidates[best], float(similarity[best])) if similarity[best] >= self.threshold else None

    def add(self, signature: UInt32Array) -> None:
        """Takes the next document in; its number is the count of those before."""
        for band, key in zip(self._bands, self._keys(signature), strict=True):
            band.setdefault(key, []).append(len(self._signatures))
        self._signatures.append(signature)

    def _keys(self, signature: UInt32Array) -> list[bytes]:
        data, width = signature.tobytes(), 4 * self._rows
        return [data[i * width : (i + 1) * width] for i in range(self._num_bands)]


def deduplicate(documents: Iterable[Document], ledger: Ledger, threshold: float | None = 0.7) -> Iterator[Document]:
    """Documents without copies of earlier ones.

    Args:
        threshold: Jaccard similarity from which two documents are near duplicates; None removes exact copies only.
    """
    seen: dict[bytes, str] = {}
    near, ids = NearDuplicates(threshold or 1.0), list[str]()
    for document in documents:
        digest = blake2b(document.text.encode(errors="surrogatepass"), digest_size=16).digest()
        if digest in seen:
            ledger.drop("dedupe", "exact duplicate", document, f"of {seen[digest]}")
            continue
        seen[digest] = document.id
        if threshold is not None:
            signature = minhash(shingles(document.text))
            found = near.find(signature)
            if found is not None:
                ledger.drop("dedupe", "near duplicate", document, f"of {ids[found[0]]}, similarity {found[1]:.2f}")
                continue
            near.add(signature)
            ids.append(document.id)
        yield document
