"""Tokenizers: four kinds trained from text with the `tokenizers` package, one file format, `tokenizer.json`.

| kind | what | unknown text |
|---|---|---|
| byte_bpe | byte-level BPE as in GPT-2 | none: every byte has a token |
| wordpiece | WordPiece as in BERT | words with unseen characters become <|unk|> |
| unigram | unigram language model as in SentencePiece | unseen characters become <|unk|> |
| word | whole words and punctuation | words out of the vocabulary become <|unk|> |

Only byte_bpe (and unigram without unknown characters) gives the text back to the byte, so bits per byte is exact for it alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from planner.errors import InputError
from planner.files import parse_json, read_text, write_text
from planner.registry import unknown_name

__all__ = ["KINDS", "SPECIAL_TOKENS", "Tokenizer", "TokenizerInfo", "tokenizer_info", "train_tokenizer"]

SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|unk|>", "<|mask|>")
"""They are tokens 0 to 3 of every tokenizer trained here."""
END_OF_TEXT, PAD, UNKNOWN, MASK = SPECIAL_TOKENS
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
"""What other people's tokenizers call the end of a text."""
MAX_TOKENIZER_BYTES = 64 << 20
MAX_VOCAB_SIZE = 1 << 20


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back. Made by `train_tokenizer` or `Tokenizer.load`.

    Special tokens written out in a text are encoded as that text, so no document can smuggle in an end of text.
    """

    engine: Engine = field(repr=False)
    text: str = field(repr=False)
    """The content of tokenizer.json."""
    vocab_size: int
    """One more than the largest id: the rows that an embedding needs."""
    end_of_text_id: int
    pad_id: int | None
    unknown_id: int | None
    mask_id: int | None

    @classmethod
    def from_text(cls, text: str, where: str = "") -> Tokenizer:
        """The tokenizer that a tokenizer.json describes; nothing is fetched.

        Raises:
            InputError: not a tokenizer, or one without a token for the end of a text.
        """
        rule, fix = "must be a tokenizer.json of the `tokenizers` package", "make one with `reftrain tokenizer train`"
        parse_json(text, where)
        try:
            engine = Engine.from_str(text)
        except BaseException as error:  # the Rust side raises bare Exception, and PanicException, which is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise InputError.single("tokenizer", text[:40], f"{rule} ({str(error)[:120]})", fix, where) from None
        engine.no_padding()
        engine.no_truncation()
        engine.encode_special_tokens = True
        ids = engine.get_vocab(with_added_tokens=True)
        end_id = next((ids[name] for name in END_NAMES if name in ids), None)
        if end_id is None:
            raise InputError.single("tokenizer", sorted(ids)[:5], f"must have a token for the end of a text: {', '.join(END_NAMES)}", fix, where)
        vocab_size = max(ids.values()) + 1
        if vocab_size > 2 * MAX_VOCAB_SIZE:
            raise InputError.single("tokenizer", vocab_size, f"token ids must be below {2 * MAX_VOCAB_SIZE:,}", fix, where)
        return cls(engine, text, vocab_size, end_id, ids.get(PAD), ids.get(UNKNOWN), ids.get(MASK))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """The tokenizer in a tokenizer.json, or in a folder that holds one."""
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        return cls.from_text(read_text(path, MAX_TOKENIZER_BYTES), str(path))

    def save(self, path: str | Path) -> None:
        """Writes tokenizer.json, whole or not at all."""
        write_text(path, self.text)

    @property
    def sha256(self) -> str:
        """Of the file's bytes; token shards name the tokenizer that made them by it."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def kind(self) -> str:
        """The model inside: BPE, WordPiece, Unigram or WordLevel."""
        return type(self.engine.model).__name__

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, no special ones added."""
        return list(self.engine.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each, on all cores that RAYON_NUM_THREADS allows."""
        return [list(e.ids) for e in self.engine.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        return str(self.engine.decode(list(ids), skip_special_tokens=skip_special_tokens))


def train_tokenizer(
    texts: Iterable[str], kind: str = "byte_bpe", vocab_size: int = 4096, lower_case: bool = False, show_progress: bool = False
) -> Tokenizer:
    """A tokenizer learned from `texts`.

    The same texts give the same file, but for unigram: its trainer adds floating-point numbers in the order of a hash map, so
    that scores differ in the third decimal from run to run (the pieces were the same in every run seen).

    Args:
        texts: documents; read once.
        kind: one of `KINDS`.
        vocab_size: special tokens included; fewer when the texts do not have that many pieces.
        lower_case: text is lower-cased before it is encoded, now and whenever the tokenizer is used.
    Raises:
        InputError: unknown kind, or a vocabulary too small for the special tokens and single bytes.

    Example:
        >>> tokenizer = train_tokenizer(["the cat sat on the mat"] * 3, vocab_size=280)
        >>> tokenizer.decode(tokenizer.encode("the cat"))
        'the cat'
    """
    if kind not in KINDS:
        raise unknown_name("kind", kind, list(KINDS))
    smallest = len(SPECIAL_TOKENS) + (256 if kind == "byte_bpe" else 1)
    if not smallest <= vocab_size <= MAX_VOCAB_SIZE:
        raise InputError.single(
            "vocab_size", vocab_size, f"must be between {smallest} and {MAX_VOCAB_SIZE:,} for {kind}", "4096 to 8192 suit a few MB of text"
        )
    return Tokenizer.from_text(KINDS[kind](_pieces(texts), vocab_size, normalizers.Lowercase() if lower_case else None, show_progress))


def _pieces(texts: Iterable[str], limit: int = 1 << 20) -> Iterator[str]:
    """Long texts cut, since the trainer holds several copies of each; a cut may split one word in a million characters."""
    for text in texts:
        for start in range(0, len(text), limit):
            yield text[start : start + limit]


def _byte_bpe(texts: Iterator[str], vocab_size: int, normalizer: Any, show_progress: bool) -> str:
    engine = Engine(models.BPE())
    engine.normalizer = normalizer
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=show_progress, min_frequency=2
    )
    engine.train_from_iterator(texts, trainer=trainer)
    return str(engine.to_str(pretty=True))


def _wordpiece(texts: Iterator[str], vocab_size: int, normalizer: Any, show_progress: bool) -> str:
    """The trainer numbers continuing characters (`##e`) in the order of a hash map, and ties between merges go by number.

    Given to it as special tokens they get fixed numbers, and so the result is the same every time; the finished
    vocabulary then goes into an engine in which they are not special.
    """
    kept = list(texts)
    counts = _character_counts(kept, normalizer)
    characters = sorted(sorted(counts, key=lambda c: (-counts[c], c))[: max(vocab_size // 4, 1)])
    fixed = [*SPECIAL_TOKENS, *(f"##{c}" for c in characters)]
    trained = _wordpiece_engine({}, normalizer)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=fixed,
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        show_progress=show_progress,
        min_frequency=2,
    )
    trained.train_from_iterator(kept, trainer=trainer)
    engine = _wordpiece_engine(trained.get_vocab(with_added_tokens=True), normalizer)
    engine.add_special_tokens(list(SPECIAL_TOKENS))
    return str(engine.to_str(pretty=True))


def _wordpiece_engine(vocab: dict[str, int], normalizer: Any) -> Engine:
    engine = Engine(models.WordPiece(vocab, unk_token=UNKNOWN, max_input_chars_per_word=100))
    engine.normalizer = normalizer
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece(prefix="##")
    return engine


def _character_counts(texts: list[str], normalizer: Any) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text) if normalizer else text)
    return Counter({c: n for c, n in counts.items() if not c.isspace()})


def _unigram(texts: Iterator[str], vocab_size: int, normalizer: Any, show_progress: bool) -> str:
    engine = Engine(models.Unigram())
    engine.normalizer = normalizer
    # Special tokens are pieces of this model, and its best-scored ones: a text that spells one out must be cut within it.
    engine.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Split("<|", "isolated")])
    engine.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), unk_token=UNKNOWN, show_progress=show_progress)
    engine.train_from_iterator(texts, trainer=trainer)
    return str(engine.to_str(pretty=True))


def _word(texts: Iterator[str], vocab_size: int, normalizer: Any, show_progress: bool) -> str:
    engine = Engine(models.WordLevel(unk_token=UNKNOWN))
    engine.normalizer = normalizer
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=show_progress)
    engine.train_from_iterator(texts, trainer=trainer)
    return str(engine.to_str(pretty=True))


KINDS: dict[str, Callable[[Iterator[str], int, Any, bool], str]] = {
    "byte_bpe": _byte_bpe,
    "wordpiece": _wordpiece,
    "unigram": _unigram,
    "word": _word,
}
"""Name -> (texts, vocab_size, normalizer, show_progress) -> tokenizer.json."""


@dataclass(frozen=True)
class TokenizerInfo:
    """How a tokenizer does on a text."""

    kind: str
    vocab_size: int
    sha256: str
    num_tokens: int
    text_bytes: int
    bytes_per_token: float
    unknown_fraction: float
    """Share of tokens that are <|unk|>."""
    used_fraction: float
    """Share of the vocabulary that occurs."""


def tokenizer_info(tokenizer: Tokenizer, texts: Iterable[str]) -> TokenizerInfo:
    """Measures `tokenizer` on `texts`.

    Example:
        >>> tokenizer = train_tokenizer(["ab ab"], vocab_size=260)
        >>> tokenizer_info(tokenizer, ["abab"]).bytes_per_token
        1.0
    """
    num_tokens = text_bytes = num_unknown = 0
    used: set[int] = set()
    for text in texts:
        ids = tokenizer.encode(text)
        num_tokens += len(ids)
        text_bytes += len(text.encode())
        num_unknown += ids.count(tokenizer.unknown_id) if tokenizer.unknown_id is not None else 0
        used.update(ids)
    if not num_tokens:
        raise InputError.single("text", None, "must not be empty", "give a text to measure on")
    size = tokenizer.vocab_size
    share = num_unknown / num_tokens
    return TokenizerInfo(tokenizer.kind, size, tokenizer.sha256, num_tokens, text_bytes, text_bytes / num_tokens, share, len(used) / size)
