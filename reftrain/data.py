"""Token shards and the deterministic order in which training reads them.

A folder of shards is one long stream of tokens: `<|endoftext|>`, then every document followed by `<|endoftext|>`. It is cut
into windows of `seq_len + 1` tokens (inputs and targets overlap by all but one), one every `seq_len` tokens. The sampler has
no state: sample position p belongs to epoch p // num_windows, and each epoch is a keyed permutation of the windows. Resuming
at a position, or giving every rank its own positions, is therefore exact and costs nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field

from planner.errors import InputError, Problem
from planner.files import read_json, to_json, write_bytes, write_text
from planner.spec import NonNegativeInt, PositiveInt, Spec, build

__all__ = ["SyntheticDataset", "TokenDataset", "TokenIndex", "TokenSource", "TokenWriter", "permute"]

Int64Array = npt.NDArray[np.int64]
SHARD_TOKENS = 1 << 26
"""Tokens per shard: 128 MiB of uint16, small enough to copy and check one at a time."""
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TokenSource(Protocol):
    """What training reads: tokens by sample position."""

    @property
    def vocab_size(self) -> int:
        """Every token is below this."""

    def sequences(self, first: int, count: int, seq_len: int, seed: int, shuffle: bool = True) -> Int64Array:
        """Samples first .. first + count - 1, int64 [count, seq_len + 1]."""


class ShardEntry(Spec):
    """One shard file."""

    file: Annotated[str, Field(pattern=r"^[0-9]{5}\.bin$")]
    num_tokens: PositiveInt
    sha256: _Sha256


class TokenIndex(Spec):
    """`index.json` beside the shards."""

    format: Literal["reftrain-tokens"]
    schema_version: Literal[1]
    dtype: Literal["uint16", "uint32"]
    vocab_size: PositiveInt
    num_tokens: PositiveInt
    num_documents: NonNegativeInt
    text_bytes: NonNegativeInt
    """UTF-8 bytes of the documents; the markers between them are tokens but no text."""
    tokenizer_sha256: _Sha256
    shards: Annotated[list[ShardEntry], Field(min_length=1)]


class TokenWriter:
    """Writes shards, and at the end the index that makes them a dataset; a folder without an index is no dataset.

    Use as a context manager: the index is written only when the block ends without an error.

    Args:
        folder: made if missing; an older index in it is removed first, so that half a rewrite is never taken for a dataset.
        vocab_size: decides uint16 or uint32.
        end_of_text_id: written before the first and after every document, so that each document token has a predecessor.
        shard_tokens: tokens per file at most.
    """

    def __init__(self, folder: str | Path, *, vocab_size: int, end_of_text_id: int, tokenizer_sha256: str, shard_tokens: int = SHARD_TOKENS) -> None:
        if not 0 <= end_of_text_id < vocab_size or shard_tokens < 1:
            raise ValueError(f"end_of_text_id {end_of_text_id} must be in the vocabulary and shard_tokens {shard_tokens} positive")
        self.folder = Path(folder)
        self._dtype = np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")
        self._vocab_size, self._end_of_text_id, self._tokenizer_sha256 = vocab_size, end_of_text_id, tokenizer_sha256
        self._shard_tokens = shard_tokens
        self._waiting: list[npt.NDArray[Any]] = [np.array([end_of_text_id], self._dtype)]
        self._num_waiting, self._num_documents, self._text_bytes = 1, 0, 0
        self._shards: list[ShardEntry] = []

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "index.json").unlink(missing_ok=True)
        except OSError as error:
            rule = f"must be a place that can be written ({error.strerror or error})"
            raise InputError.single("out", str(self.folder), rule, "check the folder and its space") from None
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self._finish()

    def add(self, tokens: Sequence[int], text_bytes: int) -> None:
        """One document: its tokens without markers, and the UTF-8 bytes of its text."""
        ids = np.asarray([*tokens, self._end_of_text_id], np.int64)
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            raise ValueError(f"token {int(ids.max())} is outside a vocabulary of {self._vocab_size}")
        self._waiting.append(ids.astype(self._dtype))
        self._num_waiting += len(ids)
        self._num_documents += 1
        self._text_bytes += text_bytes
        while self._num_waiting >= self._shard_tokens:
            self._write_shard()

    def _write_shard(self) -> None:
        stream = np.concatenate(self._waiting)
        data, rest = stream[: self._shard_tokens].tobytes(), stream[self._shard_tokens :]
        self._waiting, self._num_waiting = [rest], len(rest)
        name = f"{len(self._shards):05d}.bin"
        write_bytes(self.folder / name, data)
        self._shards.append(ShardEntry(file=name, num_tokens=len(data) // self._dtype.itemsize, sha256=hashlib.sha256(data).hexdigest()))

    def _finish(self) -> None:
        if self._num_waiting:
            self._write_shard()
        index = TokenIndex(
            format="reftrain-tokens",
            schema_version=1,
            dtype="uint16" if self._dtype.itemsize == 2 else "uint32",
            vocab_size=self._vocab_size,
            num_tokens=sum(s.num_tokens for s in self._shards),
            num_documents=self._num_documents,
            text_bytes=self._text_bytes,
            tokenizer_sha256=self._tokenizer_sha256,
            shards=self._shards,
        )
        write_text(self.folder / "index.json", to_json(index.model_dump()))


class TokenDataset:
    """Memory-mapped shards, read by sample position. Made by `TokenDataset.open`."""

    def __init__(self, folder: Path, index: TokenIndex) -> None:
        self.folder, self.index = folder, index
        dtype = np.dtype(index.dtype).newbyteorder("<")
        self._shards = [np.memmap(folder / s.file, dtype, mode="r", shape=(s.num_tokens,)) for s in index.shards]
        self._starts = np.cumsum([0, *(s.num_tokens for s in index.shards)])

    @classmethod
    def open(cls, folder: str | Path, verify: bool = False) -> TokenDataset:
        """The dataset in a folder that `TokenWriter` made.

        Args:
            verify: also read every shard and compare its SHA-256; without it only names and sizes are compared.
        Raises:
            InputError: no index, a foreign one, or shards that are missing, cut or changed; every bad file is named.
        """
        folder = Path(folder)
        if not (folder / "index.json").is_file():
            raise InputError.single(
                "data", str(folder), "must be a folder of token shards with an index.json", "make one with `reftrain data prepare --out DIR`"
            )
        where = str(folder / "index.json")
        index = build(TokenIndex, read_json(where), "index", where)
        problems = [problem for shard in index.shards if (problem := _shard_problem(folder, shard, np.dtype(index.dtype).itemsize, verify))]
        if index.num_tokens != sum(s.num_tokens for s in index.shards):
            problems.append(Problem("index.num_tokens", index.num_tokens, "must be the sum over the shards", "prepare the data again", where))
        if problems:
            raise InputError(*problems)
        return cls(folder, index)

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary that wrote the tokens."""
        return self.index.vocab_size

    @property
    def num_tokens(self) -> int:
        """Tokens in all, markers included."""
        return self.index.num_tokens

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of text that all tokens stand for: bits per byte = total nats / ln 2 / text_bytes."""
        return self.index.text_bytes

    def facts(self) -> dict[str, Any]:
        """What it holds, for reports."""
        index = self.index
        return {
            "documents": index.num_documents, "text_bytes": index.text_bytes, "tokens": index.num_tokens,
            "bytes_per_token": index.text_bytes / index.num_tokens, "shards": len(index.shards),
        }  # fmt: skip

    def num_sequences(self, seq_len: int) -> int:
        """Windows in one epoch: (num_tokens - 1) // seq_len. At most seq_len - 1 tokens at the end are left out.

        Raises:
            InputError: the stream is shorter than one window.
        """
        if seq_len < 1 or self.num_tokens <= seq_len:
            raise InputError.single(
                "workload.seq_len", seq_len, f"must be between 1 and {self.num_tokens - 1:,}, the tokens in {self.folder}", "use a shorter seq_len"
            )
        return (self.num_tokens - 1) // seq_len

    def sequences(self, first: int, count: int, seq_len: int, seed: int, shuffle: bool = True) -> Int64Array:
        """The windows at sample positions first .. first + count - 1.

        Epoch e = position // num_sequences is a permutation of all windows keyed by (seed, e); without `shuffle` they come in order.

        Returns:
            int64 [count, seq_len + 1]: inputs are [:, :-1], targets [:, 1:].
        """
        if first < 0 or count < 0:
            raise ValueError(f"first {first} and count {count} must not be negative")
        num_windows = self.num_sequences(seq_len)
        positions = np.arange(first, first + count, dtype=np.int64)
        epochs, windows = positions // num_windows, positions % num_windows
        if shuffle:
            for epoch in np.unique(epochs):
                chosen = epochs == epoch
                windows[chosen] = permute(windows[chosen], num_windows, f"{seed}:{epoch}")
        result = np.empty((count, seq_len + 1), np.int64)
        for row, window in zip(result, windows, strict=True):
            self._copy(int(window) * seq_len, row)
        if count and result.max() >= self.vocab_size:
            raise InputError.single(
                "data", str(self.folder), f"holds a token beyond its vocabulary of {self.vocab_size:,}", "a shard is damaged: prepare the data again"
            )
        return result

    def iterate_windows(self, seq_len: int, batch_size: int = 1) -> Iterator[Int64Array]:
        """All windows in order, for validation: each token but the first marker is a target exactly once.

        The last window is shorter when seq_len does not divide the stream; it comes alone. All targets together
        stand for `text_bytes` bytes of text.

        Yields:
            int64 [at most batch_size, seq_len + 1]; at the end perhaps [1, remainder + 1].
        """
        seq_len = min(seq_len, self.num_tokens - 1)
        num_whole = self.num_sequences(seq_len)
        for first in range(0, num_whole, batch_size):
            yield self.sequences(first, min(batch_size, num_whole - first), seq_len, 0, shuffle=False)
        remainder = self.num_tokens - 1 - num_whole * seq_len
        if remainder:
            row = np.empty((1, remainder + 1), np.int64)
            self._copy(num_whole * seq_len, row[0])
            yield row

    def _copy(self, start: int, row: Int64Array) -> None:
        """Tokens start .. start + len(row) - 1 of the stream into `row`, across shards where they meet."""
        done = 0
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while done < len(row):
            offset = start + done - int(self._starts[shard])
            part = self._shards[shard][offset : offset + len(row) - done]
            row[done : done + len(part)] = part
            done, shard = done + len(part), shard + 1


def _shard_problem(folder: Path, shard: ShardEntry, itemsize: int, verify: bool) -> Problem | None:
    path, expected_bytes = folder / shard.file, shard.num_tokens * itemsize
    fix = "prepare the data again, or copy the folder again"
    try:
        found_bytes = path.stat().st_size
        if found_bytes != expected_bytes:
            return Problem("shard", shard.file, f"must hold {expected_bytes:,} bytes, holds {found_bytes:,}", fix, str(path))
        if verify:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                    return Problem("shard", shard.file, "its SHA-256 must be the one in the index", fix, str(path))
    except OSError as error:
        return Problem("shard", shard.file, f"must be a readable file ({error.strerror})", fix, str(path))
    return None


def permute(index: Int64Array, size: int, key: str) -> Int64Array:
    """A pseudo-random permutation of 0 .. size - 1, evaluated at `index` alone.

    A Feistel network over the smallest power of two that holds `size`; what falls outside is sent through again until it
    is inside ("cycle walking", on average less than two rounds through the network). Memory and time are O(len(index)),
    whatever `size`. A Feistel network is a bijection whatever its round function, and so is cycle walking.

    Source: J. Black and P. Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002.

    Example:
        >>> sorted(permute(np.arange(10), 10, "seed:0").tolist())
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    bits = (size - 1).bit_length()
    keys = np.frombuffer(hashlib.blake2b(f"{key}:{size}".encode()).digest(), "<u8")
    result = index.astype(np.uint64)
    outside = np.ones(len(result), bool)
    while outside.any():
        result[outside] = _feistel(result[outside], bits, keys)
        outside = result >= size
    return result.astype(np.int64)


def _feistel(value: npt.NDArray[np.uint64], bits: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Eight rounds; the halves swap places, and so do their widths when `bits` is odd."""
    low_bits, high_bits = np.uint64(bits - bits // 2), np.uint64(bits // 2)
    for key in keys:
        low, high = value & _ones(low_bits), value >> low_bits
        value = (low << high_bits) | (high ^ (_mix(low ^ key) & _ones(high_bits)))
        low_bits, high_bits = high_bits, low_bits
    return value


def _ones(bits: np.uint64) -> np.uint64:
    return np.uint64((1 << int(bits)) - 1)


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64: every input bit changes every output bit. Source: Steele et al., OOPSLA 2014."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class SyntheticDataset:
    """Endless tokens that need no files: a noisy Markov chain that a model can learn.

    Each token is followed by its fixed successor three times in four, else by a token drawn log-uniformly (Zipf's law), so the
    loss falls at first as frequencies are learned and then as successors are. A sample is a pure function of (the dataset's
    seed, its position): `seed` and `shuffle` of `sequences` change nothing, since there is no order to shuffle.

    Args:
        vocab_size: tokens are 0 .. vocab_size - 1.
        seed: another seed is another language, not only other samples of it.

    Example:
        >>> SyntheticDataset(100, seed=1).sequences(5, 2, 8, seed=0).shape
        (2, 9)
    """

    NOISE_FRACTION = 0.25

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        if not 2 <= vocab_size < 1 << 31:
            raise InputError.single("vocab_size", vocab_size, "must be between 2 and 2**31", "use a vocabulary of that size")
        self._vocab_size = vocab_size
        self._key = np.frombuffer(hashlib.blake2b(f"synthetic:{seed}".encode(), digest_size=8).digest(), "<u8")
        self._successor = permute(np.arange(vocab_size), vocab_size, f"successor:{seed}")

    @property
    def vocab_size(self) -> int:
        """As given."""
        return self._vocab_size

    def sequences(self, first: int, count: int, seq_len: int, seed: int = 0, shuffle: bool = True) -> Int64Array:
        """Samples first .. first + count - 1, int64 [count, seq_len + 1]."""
        if first < 0 or count < 0 or seq_len < 1:
            raise ValueError(f"first {first} and count {count} must not be negative, seq_len {seq_len} must be positive")
        position = np.arange(first, first + count, dtype=np.uint64)[:, None]
        place = np.arange(seq_len + 1, dtype=np.uint64)[None, :]
        random = _mix(_mix(position ^ self._key) + place * np.uint64(0x9E3779B97F4A7C15))
        is_noise = (random >> np.uint64(32)).astype(float) * 2.0**-32 < self.NOISE_FRACTION
        uniform = (random & np.uint64(0xFFFFFFFF)).astype(float) * 2.0**-32
        drawn = np.minimum((self._vocab_size + 1.0) ** uniform, self._vocab_size).astype(np.int64) - 1
        tokens = drawn.copy()
        for t in range(1, seq_len + 1):
            tokens[:, t] = np.where(is_noise[:, t], drawn[:, t], self._successor[tokens[:, t - 1]])
        return tokens
