"""Four kinds of tokenizer: deterministic, lossless where promised, and deaf to special tokens in the text."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import InputError
from planner.files import DATA_DIR
from reftrain.tokenizer import KINDS, SPECIAL_TOKENS, Tokenizer, tokenizer_info, train_tokenizer


def sample(num_documents: int) -> list[str]:
    with gzip.open(DATA_DIR / "corpus" / "books.valid.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line, _ in zip(file, range(num_documents), strict=False)]


TEXTS = sample(6)
BYTE_BPE = train_tokenizer(TEXTS, "byte_bpe", 600)


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=200))
def test_byte_bpe_gives_any_text_back(text: str) -> None:
    assert BYTE_BPE.decode(BYTE_BPE.encode(text)) == text


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind(kind: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, kind, 800)
    assert tokenizer.vocab_size <= 800
    assert [tokenizer.engine.token_to_id(name) for name in SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert (tokenizer.end_of_text_id, tokenizer.pad_id, tokenizer.unknown_id, tokenizer.mask_id) == (0, 1, 2, 3)
    sentence = "the little girl had a very great secret"
    assert tokenizer.decode(tokenizer.encode(sentence), skip_special_tokens=True).split()[:2] == ["the", "little"]
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.sha256 == tokenizer.sha256 == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0]) == tokenizer.encode_batch(TEXTS)[0]
    info = tokenizer_info(tokenizer, TEXTS)
    assert info.text_bytes == sum(len(t.encode()) for t in TEXTS)
    assert info.num_tokens == sum(len(ids) for ids in tokenizer.encode_batch(TEXTS))
    assert (info.unknown_fraction > 0.05) == (kind == "word")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_special_tokens_in_a_text_are_text(kind: str) -> None:
    tokenizer = train_tokenizer(TEXTS, kind, 800)
    text = "one<|endoftext|>two <|pad|> <|mask|>"
    assert not {0, 1, 3} & set(tokenizer.encode(text)), "a document ended another one"
    assert not {0, 1, 3} & set(tokenizer.encode_batch([text])[0])


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_lower_case_holds_for_use_too(kind: str, tmp_path: Path) -> None:
    train_tokenizer(TEXTS, kind, 800, lower_case=True).save(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("A LITTLE Girl") == tokenizer.encode("a little girl")


def test_training_is_deterministic_across_processes() -> None:
    """Hash maps are seeded anew in each process; ids must not depend on that."""
    code = (
        "import gzip, json\nfrom planner.files import DATA_DIR\nfrom reftrain.tokenizer import train_tokenizer\n"
        "texts = [json.loads(x)['text'] for x in gzip.open(DATA_DIR / 'corpus' / 'books.valid.jsonl.gz')][:6]\n"
        "print([train_tokenizer(texts, kind, 800).sha256 for kind in ('byte_bpe', 'wordpiece', 'word')])"
    )
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(3)}
    assert len(runs) == 1


def test_bytes_per_token_by_hand() -> None:
    info = tokenizer_info(train_tokenizer(["aa"], "byte_bpe", 260), ["añ"])
    assert (info.num_tokens, info.text_bytes, info.bytes_per_token) == (3, 3, 1.0)


@pytest.mark.parametrize(
    ("kind", "vocab_size", "rule"), [("bpe", 1000, "byte_bpe"), ("byte_bpe", 200, "between"), ("word", 2, "between"), ("word", 10**9, "between")]
)
def test_bad_options(kind: str, vocab_size: int, rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        train_tokenizer(TEXTS, kind, vocab_size)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1, 2]",
        "not json",
        '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": [["a", "b"]]}}',
        '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}',
        '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"</s>": 4000000000}, "unk_token": "a"}}',
        '{"version": "1.0", "model": {"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]]}}',
        BYTE_BPE.text[: len(BYTE_BPE.text) // 2],
    ],
)
def test_what_is_no_tokenizer_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Tokenizer.load(path)


def test_missing_and_oversized_files(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        Tokenizer.load(tmp_path / "absent.json")
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(InputError, match="at most"):
        Tokenizer.load(tmp_path)


def test_padding_and_truncation_in_a_file_are_switched_off() -> None:
    engine = Tokenizer.from_text(BYTE_BPE.text).engine
    engine.enable_truncation(3)
    engine.enable_padding(length=9)
    loaded = Tokenizer.from_text(engine.to_str())
    assert loaded.encode(TEXTS[0][:500]) == BYTE_BPE.encode(TEXTS[0][:500])
