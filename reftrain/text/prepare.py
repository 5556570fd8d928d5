"""From files to token shards: the whole of `reftrain data prepare`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from planner.errors import InputError, Problem
from planner.files import DATA_DIR, to_json, write_text
from reftrain.data import SHARD_TOKENS, TokenDataset, TokenWriter
from reftrain.text.clean import CleanOptions, clean
from reftrain.text.collect import collect, list_files
from reftrain.text.contamination import EvaluationItems
from reftrain.text.dedupe import deduplicate
from reftrain.text.documents import Document, Ledger
from reftrain.tokenizer import KINDS, Tokenizer, train_tokenizer

__all__ = ["PrepareOptions", "Progress", "corpus_files", "prepare"]

Progress = Callable[[str, int, int | None], None]
"""(stage, done so far, all there is or None when unknown)."""
SPLITS = ("test", "valid", "train")
"""In the order in which they are cleaned: a copy of a validation document in the training text is what goes, not the reverse."""
ENCODE_BATCH = 64


@dataclass(frozen=True)
class PrepareOptions:
    """What `prepare` is asked to do."""

    out: Path
    paths: tuple[Path, ...] = ()
    """Files and folders; none means the shipped corpus with its own splits."""
    tokenizer: str = "byte_bpe"
    """A kind to train, or the path of a tokenizer.json."""
    vocab_size: int = 4096
    clean: CleanOptions = field(default_factory=CleanOptions)
    similarity: float | None = 0.7
    """Jaccard similarity from which documents are near duplicates; None for exact copies only."""
    evaluation: tuple[Path, ...] = ()
    valid_fraction: float = 0.01
    """Share of the documents of `paths` that go to valid, chosen by a hash of their text."""
    shard_tokens: int = SHARD_TOKENS
    skip_bad_files: bool = False
    force: bool = False
    """Replace an output folder that `prepare` made before."""


def prepare(options: PrepareOptions, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Collects, cleans and deduplicates text, checks it against evaluation items, and writes it as token shards.

    The output folder appears whole or not at all: train/, valid/ (and test/) with shards, tokenizer.json, report.json.

    Returns:
        The report: documents and bytes by step with the reasons for what was dropped, contamination, tokenizer, splits.
    Raises:
        InputError: bad options or files, all at once; nothing is written.
    """
    _check(options)
    files = {"": list_files(options.paths)} if options.paths else corpus_files()
    ready = _ready_tokenizer(options)
    items = EvaluationItems(options.evaluation)
    ledger, problems = Ledger("collect", "clean", "dedupe"), list[Problem]()
    with _staging(options) as folder:
        documents = _collected(files, problems, ledger, progress)
        cleaned = clean(documents, options.clean, ledger)
        unique = ledger.count_out("dedupe", deduplicate(_counted_between(cleaned, ledger), ledger, options.similarity))
        texts = _Spool(folder, _with_split(unique, options))
        _refuse(problems, texts, options)
        _look_for_items(items, texts, progress)
        tokenizer = ready or _trained_tokenizer(options, texts, progress)
        datasets = {split: _write_shards(split, texts, tokenizer, folder, options, progress) for split in sorted(texts.counts)}
        tokenizer.save(folder / "tokenizer.json")
        texts.remove()
        report = _report(options, ledger, problems, items, tokenizer, datasets)
        write_text(folder / "report.json", to_json(report))
    return report


def corpus_files() -> dict[str, list[Path]]:
    """The shipped corpus by split."""
    folder = DATA_DIR / "corpus"
    names = {"train": ("books.train", "factbook"), "valid": ("books.valid",), "test": ("books.test",)}
    return {split: [folder / f"{name}.jsonl.gz" for name in names[split]] for split in SPLITS}


def _check(options: PrepareOptions) -> None:
    problems = []
    if not 0 < options.valid_fraction < 1:
        problems.append(Problem("--valid-fraction", options.valid_fraction, "must be between 0 and 1", "use e.g. 0.01"))
    if options.similarity is not None and not 0.2 <= options.similarity <= 1:
        problems.append(Problem("--similarity", options.similarity, "must be between 0.2 and 1", "use e.g. 0.7"))
    language = options.clean.language
    if language is not None and not (len(language) in (2, 3) and language.isascii() and language.islower()):
        problems.append(Problem("--language", language, "must be an ISO 639 code of two or three small letters", "use e.g. en"))
    if options.shard_tokens < 1024:
        problems.append(Problem("--shard-tokens", options.shard_tokens, "must be at least 1024", f"leave it at {SHARD_TOKENS}"))
    out = options.out
    if out.exists() and not out.is_dir():
        problems.append(Problem("--out", str(out), "must be a folder", "name another place"))
    elif out.is_dir() and any(out.iterdir()):
        ours = (out / "report.json").is_file() and (out / "tokenizer.json").is_file()
        if not ours:
            problems.append(Problem("--out", str(out), "must be new or empty; this folder holds other files", "name another folder"))
        elif not options.force:
            problems.append(Problem("--out", str(out), "must be new or empty; data was prepared here before", "name another folder, or add --force"))
    if problems:
        raise InputError(*problems)


@contextlib.contextmanager
def _staging(options: PrepareOptions) -> Iterator[Path]:
    """A hidden folder beside the output that takes its place at the end, or vanishes."""
    out = Path(os.path.abspath(options.out))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise InputError.single("--out", str(options.out), f"must be a place that can be written ({error.strerror})", "name another folder") from None
    try:
        yield folder
        folder.chmod(0o755)
        if out.exists():
            old = folder.with_name(folder.name + ".old")
            os.replace(out, old)
            os.replace(folder, out)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(folder, out)
    except OSError as error:
        raise InputError.single("--out", str(options.out), f"must be a place with room to write ({error.strerror})", "name another folder") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _collected(files: dict[str, list[Path]], problems: list[Problem], ledger: Ledger, progress: Progress) -> Iterator[Document]:
    num_files, done = sum(map(len, files.values())), 0

    def count(_: Path) -> None:
        nonlocal done
        done += 1
        progress("collecting and cleaning files", done, num_files)

    progress("collecting and cleaning files", 0, num_files)
    for split, paths in files.items():
        documents = (replace(document, split=split) for document in collect(paths, problems, count))
        yield from ledger.count_in("clean", ledger.count_out("collect", ledger.count_in("collect", documents)))


def _counted_between(documents: Iterable[Document], ledger: Ledger) -> Iterator[Document]:
    return ledger.count_in("dedupe", ledger.count_out("clean", documents))


def _with_split(documents: Iterable[Document], options: PrepareOptions) -> Iterator[Document]:
    """Documents of the user's own files fall into valid by a hash of their text: the same ones whatever else is there."""
    for document in documents:
        if document.split:
            yield document
        else:
            number = int.from_bytes(blake2b(document.text.encode(), digest_size=8).digest(), "big")
            yield replace(document, split="valid" if number < options.valid_fraction * 2**64 else "train")


class _Spool:
    """Documents on disk by split, to be read more than once without being held in memory."""

    def __init__(self, folder: Path, documents: Iterable[Document]) -> None:
        self._folder = folder
        self.counts: dict[str, int] = {}
        with contextlib.ExitStack() as stack:
            files: dict[str, Any] = {}
            for document in documents:
                if document.split not in files:
                    files[document.split] = stack.enter_context(open(self._path(document.split), "w", encoding="utf-8"))
                files[document.split].write(json.dumps([document.id, document.text]) + "\n")
                self.counts[document.split] = self.counts.get(document.split, 0) + 1

    def _path(self, split: str) -> Path:
        return self._folder / f"{split}.spool"

    def read(self, split: str) -> Iterator[Document]:
        with open(self._path(split), encoding="utf-8") as file:
            for line in file:
                name, text = json.loads(line)
                yield Document(name, text, split)

    def remove(self) -> None:
        for split in self.counts:
            self._path(split).unlink()


def _refuse(problems: list[Problem], texts: _Spool, options: PrepareOptions) -> None:
    """Stops at damaged files unless asked to skip them, and when a split is left without text."""
    if problems and not options.skip_bad_files:
        raise InputError(*(replace(p, fix=f"{p.fix}, or add --skip-bad-files") for p in problems))
    for split in ("train", "valid"):
        if not texts.counts.get(split):
            rest = ", ".join(f"{count} in {name}" for name, count in texts.counts.items()) or "none anywhere"
            fix = (
                "give more text, or a larger --valid-fraction"
                if split == "valid"
                else "give more text, or relax the rules (--min-words, --no-quality)"
            )
            raise InputError.single(split, 0, f"must be left with at least one document after cleaning ({rest})", fix)


def _look_for_items(items: EvaluationItems, texts: _Spool, progress: Progress) -> None:
    if items.files:
        for number, document in enumerate(texts.read("train"), 1):
            items.look_in(document)
            progress("looking for evaluation items", number, texts.counts["train"])


def _ready_tokenizer(options: PrepareOptions) -> Tokenizer | None:
    """The tokenizer of a file; None when one is to be trained."""
    if options.tokenizer in KINDS:
        return None
    if not Path(options.tokenizer).exists() and not options.tokenizer.endswith(".json"):
        raise InputError.single("--tokenizer", options.tokenizer, f"must be one of {', '.join(KINDS)}, or a tokenizer.json", "use byte_bpe")
    return Tokenizer.load(options.tokenizer)


def _trained_tokenizer(options: PrepareOptions, texts: _Spool, progress: Progress) -> Tokenizer:
    """Learned from the training split alone."""
    total = texts.counts["train"]

    def reading() -> Iterator[str]:
        for number, document in enumerate(texts.read("train"), 1):
            progress("training the tokenizer", number, total)
            yield document.text

    return train_tokenizer(reading(), options.tokenizer, options.vocab_size, options.clean.lower_case)


def _write_shards(split: str, texts: _Spool, tokenizer: Tokenizer, folder: Path, options: PrepareOptions, progress: Progress) -> TokenDataset:
    done, total = 0, texts.counts[split]
    documents = texts.read(split)
    with TokenWriter(
        folder / split,
        vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
        tokenizer_sha256=tokenizer.sha256,
        shard_tokens=options.shard_tokens,
    ) as writer:
        while batch := list(islice(documents, ENCODE_BATCH)):
            for document, tokens in zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True):
                writer.add(tokens, document.num_bytes)
            done += len(batch)
            progress(f"tokenizing {split}", done, total)
    return TokenDataset.open(folder / split)


def _report(
    options: PrepareOptions,
    ledger: Ledger,
    problems: list[Problem],
    items: EvaluationItems,
    tokenizer: Tokenizer,
    datasets: dict[str, TokenDataset],
) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "out": str(options.out),
        "sources": [str(path) for path in options.paths] or ["the shipped corpus"],
        "options": {**asdict(options.clean), "similarity": options.similarity, "valid_fraction": options.valid_fraction if options.paths else None},
        "steps": ledger.to_dict(),
        "skipped_files": [{"file": p.where or str(p.value), "rule": p.rule} for p in problems],
        "contamination": items.report(),
        "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256},
        "splits": {split: dataset.facts() for split, dataset in datasets.items()},
    }
