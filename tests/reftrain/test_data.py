"""The shards are what was written, and the sampler is exact at every position."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import InputError
from reftrain.data import SyntheticDataset, TokenDataset, TokenWriter, permute

END = 0
HASH = "ab" * 32


def write(folder: Path, documents: list[list[int]], vocab_size: int = 1000, shard_tokens: int = 1 << 20) -> list[int]:
    """Shards of `documents`; returns the stream that they must hold."""
    with TokenWriter(folder, vocab_size=vocab_size, end_of_text_id=END, tokenizer_sha256=HASH, shard_tokens=shard_tokens) as writer:
        for document in documents:
            writer.add(document, 3 * len(document))
    return [END, *(token for document in documents for token in [*document, END])]


@pytest.fixture
def numbers(tmp_path: Path) -> TokenDataset:
    """A stream of 0, 1, 2, ... 500, 0 in seven shards, so that a token tells its place."""
    write(tmp_path / "numbers", [list(range(1, 501))], shard_tokens=77)
    return TokenDataset.open(tmp_path / "numbers", verify=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64))
def test_permutation_is_one(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, str(key))), np.arange(size))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2**62), st.data())
def test_permutation_of_a_huge_range_stays_inside_and_keeps_distinct(size: int, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, size - 1), unique=True, max_size=50))
    result = permute(np.array(chosen, np.int64), size, "k")
    assert len(set(result.tolist())) == len(chosen)
    assert all(0 <= value < size for value in result.tolist())


def test_permutation_mixes() -> None:
    """Every window is about equally likely at every place: chi-square over 5,000 keys; 99.9 % point for 81 degrees of freedom is 126."""
    counts = np.zeros((10, 10))
    for key in range(5000):
        counts[np.arange(10), permute(np.arange(10), 10, str(key))] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 126


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 999), max_size=40), max_size=12), st.integers(1, 50), st.integers(1, 12))
def test_shards_hold_the_stream_and_validation_scores_each_token_once(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], shard_tokens: int, seq_len: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    stream = write(folder, documents, shard_tokens=shard_tokens)
    dataset = TokenDataset.open(folder, verify=True)
    assert dataset.num_tokens == len(stream)
    assert dataset.text_bytes == 3 * sum(map(len, documents))
    assert dataset.index.num_documents == len(documents)
    assert all(entry.num_tokens <= shard_tokens for entry in dataset.index.shards)
    if len(stream) > 1:
        for batch_size in (1, 3):
            targets = [token for batch in dataset.iterate_windows(seq_len, batch_size) for token in batch[:, 1:].ravel().tolist()]
            assert targets == stream[1:]


@settings(max_examples=30, deadline=None)
@given(seq_len=st.integers(1, 60), seed=st.integers(0, 2**63))
def test_every_window_exactly_once_per_epoch(tmp_path_factory: pytest.TempPathFactory, seq_len: int, seed: int) -> None:
    folder = tmp_path_factory.mktemp("epoch")
    stream = write(folder, [list(range(1, 300))], shard_tokens=50)
    dataset = TokenDataset.open(folder)
    n = dataset.num_sequences(seq_len)
    expected = Counter(tuple(stream[i * seq_len : (i + 1) * seq_len + 1]) for i in range(n))
    epochs = [[tuple(row) for row in dataset.sequences(e * n, n, seq_len, seed).tolist()] for e in range(3)]
    assert all(Counter(epoch) == expected for epoch in epochs)
    if n > 10:
        assert epochs[0] != epochs[1]
        assert dataset.sequences(0, n, seq_len, seed + 1).tolist() != dataset.sequences(0, n, seq_len, seed).tolist()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["numbers", "synthetic"]), st.integers(0, 500), st.integers(1, 40), st.integers(1, 8), st.integers(1, 20))
def test_any_split_over_ranks_and_any_resume_gives_the_same_samples(
    tmp_path_factory: pytest.TempPathFactory, kind: str, first: int, count: int, num_ranks: int, seq_len: int
) -> None:
    folder = tmp_path_factory.mktemp("ranks")
    write(folder, [list(range(1, 200))], shard_tokens=31)
    dataset = TokenDataset.open(folder) if kind == "numbers" else SyntheticDataset(1000, seed=3)
    whole = dataset.sequences(first, count * num_ranks, seq_len, seed=7)
    by_rank = [dataset.sequences(first + rank * count, count, seq_len, seed=7) for rank in range(num_ranks)]
    assert np.array_equal(np.concatenate(by_rank), whole)
    one_by_one = [dataset.sequences(first + i, 1, seq_len, seed=7)[0] for i in range(count)]
    assert np.array_equal(np.stack(one_by_one), whole[:count])
    assert dataset.sequences(first, 0, seq_len, seed=7).shape == (0, seq_len + 1)


def test_order_is_pinned(numbers: TokenDataset) -> None:
    """A run resumed with a later version must see the same samples: a change here is a change of format."""
    assert numbers.sequences(0, 6, 10, seed=1)[:, 0].tolist() == [220, 180, 410, 190, 230, 140]
    assert SyntheticDataset(50, seed=1).sequences(10**12, 1, 9, seed=0).tolist() == [[8, 26, 46, 2, 7, 31, 3, 44, 18, 1]]


def test_without_shuffle_windows_come_in_order_and_overlap_by_one(numbers: TokenDataset) -> None:
    rows = numbers.sequences(0, 50, 10, seed=0, shuffle=False)
    assert rows[:, 0].tolist() == list(range(0, 500, 10))
    assert np.array_equal(rows[1:, 0], rows[:-1, -1])
    assert rows.dtype == np.int64


def test_large_vocabularies_use_uint32(tmp_path: Path) -> None:
    write(tmp_path, [[70_000, 5]], vocab_size=100_000)
    dataset = TokenDataset.open(tmp_path)
    assert dataset.index.dtype == "uint32"
    assert next(dataset.iterate_windows(3)).tolist() == [[0, 70_000, 5, 0]]


def test_synthetic_tokens_have_structure_at_two_levels() -> None:
    """Unigram entropy is below uniform, and bigram entropy far below that: a loss falls twice."""
    tokens = SyntheticDataset(64, seed=0).sequences(0, 400, 255, seed=0)
    assert tokens.min() >= 0
    assert tokens.max() < 64
    unigram = np.bincount(tokens.ravel(), minlength=64) / tokens.size
    pairs = np.bincount((tokens[:, :-1] * 64 + tokens[:, 1:]).ravel(), minlength=64 * 64).reshape(64, 64) / tokens[:, 1:].size

    def entropy(p: np.ndarray) -> float:
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    conditional = entropy(pairs) - entropy(pairs.sum(1))
    assert entropy(unigram) < np.log(64) - 0.05
    assert conditional < 0.6 * entropy(unigram)


@pytest.mark.parametrize("damage", ["cut", "longer", "missing", "flipped", "folder"])
def test_damaged_shard_is_named(numbers: TokenDataset, damage: str) -> None:
    path = numbers.folder / "00003.bin"
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"cut": data[:-1], "longer": data + b"\0", "flipped": bytes([data[0] ^ 1]) + data[1:]}[damage])
    with pytest.raises(InputError) as error:
        TokenDataset.open(numbers.folder, verify=True)
    assert [p.value for p in error.value.problems] == ["00003.bin"]


def test_every_single_bit_flip_of_a_shard_is_found(tmp_path: Path) -> None:
    write(tmp_path, [[1, 2, 3]])
    path = tmp_path / "00000.bin"
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        path.write_bytes(bytes(byte ^ (1 << bit % 8 if i == bit // 8 else 0) for i, byte in enumerate(data)))
        with pytest.raises(InputError, match="SHA-256"):
            TokenDataset.open(tmp_path, verify=True)


def test_token_beyond_the_vocabulary_is_refused_even_unverified(tmp_path: Path) -> None:
    write(tmp_path, [[1, 2, 3]], vocab_size=10)
    (tmp_path / "00000.bin").write_bytes(np.array([0, 1, 2, 60_000, 0], "<u2").tobytes())
    with pytest.raises(InputError, match="vocabulary"):
        TokenDataset.open(tmp_path).sequences(0, 1, 4, seed=0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "something-else"),
        ("schema_version", 2),
        ("dtype", "float64"),
        ("vocab_size", -1),
        ("num_tokens", 7),
        ("shards", []),
        ("shards", [{"file": "../../etc/passwd", "num_tokens": 5, "sha256": HASH}]),
        ("shards", [{"file": "00000.bin\n", "num_tokens": 5, "sha256": HASH}]),
        ("surplus", 1),
    ],
)
def test_foreign_index_is_refused(tmp_path: Path, key: str, value: object) -> None:
    write(tmp_path, [[1, 2, 3]])
    path = tmp_path / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(InputError, match=key.rstrip("s")):
        TokenDataset.open(tmp_path)


def test_no_index_is_no_dataset_and_an_error_leaves_none(tmp_path: Path) -> None:
    write(tmp_path, [[1, 2, 3]])

    class BrokenError(Exception):
        pass

    def rewrite() -> None:
        with TokenWriter(tmp_path, vocab_size=9, end_of_text_id=0, tokenizer_sha256=HASH) as writer:
            writer.add([1], 1)
            raise BrokenError

    with pytest.raises(BrokenError):
        rewrite()
    with pytest.raises(InputError, match="must be a folder of token shards"):
        TokenDataset.open(tmp_path)


def test_windows_longer_than_the_stream(tmp_path: Path) -> None:
    write(tmp_path, [[1, 2, 3]])
    dataset = TokenDataset.open(tmp_path)
    with pytest.raises(InputError, match="seq_len"):
        dataset.sequences(0, 1, 5, seed=0)
    assert [w.tolist() for w in dataset.iterate_windows(100)] == [[[0, 1, 2, 3, 0]]]


def test_writing_where_one_cannot(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="written"):
        write(tmp_path / "file" / "below", [[1]])
