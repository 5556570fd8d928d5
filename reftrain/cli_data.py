"""The commands `reftrain data` and `reftrain tokenizer`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from planner.cli import JsonFlag, make_app
from planner.errors import InputError

__all__ = ["data_app", "tokenizer_app"]


data_app = make_app("Text to token shards: collect, clean, remove duplicates, tokenize.")
tokenizer_app = make_app("Train a tokenizer, or measure one.")

Paths = Annotated[
    list[Path] | None,
    typer.Argument(metavar="PATHS", help="Files and folders: txt, md, jsonl, parquet, html, xml dumps; .gz, .bz2, .zip of these."),
]
VocabSize = Annotated[int, typer.Option(metavar="N", help="Tokens in the vocabulary.")]
LowerCase = Annotated[bool, typer.Option("--lower-case", help="Lower-case the text.")]


@data_app.command(epilog="Example: reftrain data prepare books/ --out data-books --vocab-size 8192 --language en --eval quiz.jsonl")
def prepare(
    paths: Paths = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="New or empty folder for the shards.")] = Path("data-tokens"),
    vocab_size: VocabSize = 4096,
    tokenizer: Annotated[
        str, typer.Option(metavar="KIND", help="byte_bpe, wordpiece, unigram or word to train one; or a tokenizer.json to use.")
    ] = "byte_bpe",
    lower_case: LowerCase = False,
    language: Annotated[str | None, typer.Option(metavar="CODE", help="Keep only this language, e.g. en.")] = None,
    min_words: Annotated[int, typer.Option(metavar="N", help="Drop shorter documents.")] = 20,
    max_words: Annotated[int | None, typer.Option(metavar="N", help="Drop longer documents.")] = None,
    quality: Annotated[bool, typer.Option("--quality/--no-quality", help="Apply the rules on symbols, words and repetition.")] = True,
    similarity: Annotated[float, typer.Option(metavar="S", help="Drop near duplicates from this Jaccard similarity; 1 for exact copies only.")] = 0.7,
    evaluation: Annotated[
        list[Path] | None, typer.Option("--eval", metavar="FILE", help="Evaluation items (jsonl) to look for in the training text; repeatable.")
    ] = None,
    valid_fraction: Annotated[float, typer.Option(metavar="F", help="Share of the documents of PATHS for validation.")] = 0.01,
    skip_bad_files: Annotated[bool, typer.Option("--skip-bad-files", help="Leave damaged files out, and list them in the report.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace data that was prepared in DIR before.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Clean text and write it as token shards; without PATHS, the corpus that is shipped with the package."""
    from planner.files import to_json
    from reftrain.text.clean import CleanOptions
    from reftrain.text.prepare import PrepareOptions
    from reftrain.text.prepare import prepare as run

    options = PrepareOptions(
        out=out,
        paths=tuple(paths or ()),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        clean=CleanOptions(min_words, max_words, language, lower_case, quality),
        similarity=similarity if similarity != 1 else None,
        evaluation=tuple(evaluation or ()),
        valid_fraction=valid_fraction,
        skip_bad_files=skip_bad_files,
        force=force,
    )
    with _progress_bar() as progress:
        report = run(options, progress)
    sys.stdout.write(to_json(report) if as_json else _prepared_text(report))


@data_app.command(epilog="Example: reftrain data info data-tokens")
def info(folder: Annotated[Path, typer.Argument(metavar="DIR")], as_json: JsonFlag = False) -> None:
    """What a folder of shards holds; every shard is read and compared with its checksum."""
    from planner.files import to_json
    from reftrain.data import TokenDataset

    splits = [p for name in ("train", "valid", "test") if (p := folder / name).is_dir()] or [folder]
    found = {}
    for path in splits:
        dataset = TokenDataset.open(path, verify=True)
        index = dataset.index
        found[path.name] = {
            **dataset.facts(),
            "dtype": index.dtype,
            "vocab_size": index.vocab_size,
            "tokenizer_sha256": index.tokenizer_sha256,
        }
    sys.stdout.write(to_json({"out": str(folder), "splits": found}) if as_json else _splits_text(found) + "checksums match\n")


@tokenizer_app.command(epilog="Example: reftrain tokenizer train books/ --kind unigram --vocab-size 8192 --out tokenizer.json")
def train(
    paths: Paths = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The file to write.")] = Path("tokenizer.json"),
    kind: Annotated[str, typer.Option(metavar="KIND", help="byte_bpe, wordpiece, unigram or word.")] = "byte_bpe",
    vocab_size: VocabSize = 4096,
    lower_case: LowerCase = False,
    as_json: JsonFlag = False,
) -> None:
    """A tokenizer learned from text as it is; without PATHS, from the training part of the shipped corpus."""
    from reftrain.tokenizer import train_tokenizer

    with _progress_bar() as progress:
        texts = list(_texts(paths, progress))
        progress("training the tokenizer", 0, None)
        tokenizer = train_tokenizer(texts, kind, vocab_size, lower_case)
    tokenizer.save(out)
    _write_info(tokenizer, texts, as_json)


@tokenizer_app.command("info", epilog="Example: reftrain tokenizer info tokenizer.json books/")
def tokenizer_info(
    tokenizer: Annotated[Path, typer.Argument(metavar="tokenizer.json", help="The file, or a folder that holds it.")],
    paths: Paths = None,
    as_json: JsonFlag = False,
) -> None:
    """Bytes per token, unknown words and use of the vocabulary on a text; without PATHS, on the shipped corpus."""
    from reftrain.tokenizer import Tokenizer

    loaded = Tokenizer.load(tokenizer)
    with _progress_bar() as progress:
        texts = list(_texts(paths, progress))
    _write_info(loaded, texts, as_json)


def _texts(paths: list[Path] | None, progress: Callable[[str, int, int | None], None]) -> Iterator[str]:
    """The repaired texts of files, by default of the shipped training text; a damaged file is an error."""
    from planner.errors import Problem
    from reftrain.text.clean import repair
    from reftrain.text.collect import collect, list_files
    from reftrain.text.prepare import corpus_files

    files = list_files(paths) if paths else corpus_files()["train"]
    problems: list[Problem] = []
    for number, path in enumerate(files):
        progress("reading files", number, len(files))
        for document in collect([path], problems):
            yield repair(document.text)[0]
    if problems:
        raise InputError(*problems)


def _write_info(tokenizer: Any, texts: list[str], as_json: bool) -> None:
    from dataclasses import asdict

    from planner.files import to_json
    from planner.units import format_count, format_si
    from reftrain.tokenizer import tokenizer_info as measure

    found = measure(tokenizer, texts)
    text = (
        f"{found.kind}, {found.vocab_size:,} tokens, {found.used_fraction:.1%} of them used\n"
        f"{format_si(found.text_bytes, 'B')} of text in {format_count(found.num_tokens)} tokens: {found.bytes_per_token:.3f} bytes per token, "
        f"{found.unknown_fraction:.2%} unknown\n"
    )
    sys.stdout.write(to_json(asdict(found)) if as_json else text)


def _splits_text(splits: dict[str, Any]) -> str:
    from planner.units import format_count, format_si

    lines = [f"{'split':<8}{'documents':>12}{'text':>12}{'tokens':>12}{'bytes/token':>13}"]
    for name, split in splits.items():
        size, tokens = format_si(split["text_bytes"], "B"), format_count(split["tokens"])
        lines.append(f"{name[:7]:<8}{split['documents']:>12,}{size:>12}{tokens:>12}{split['bytes_per_token']:>13.3f}")
    return "\n".join(lines) + "\n"


def _prepared_text(report: dict[str, Any]) -> str:
    """What was dropped and why, what was found of evaluation items, and what is in the shards."""
    from planner.units import format_si

    lines = []
    for name, step in report["steps"].items():
        lines.append(f"{name:<8}{step['documents_out']:>10,} documents, {format_si(step['bytes_out'], 'B')}")
        lines += [f"{'':8}{-entry['documents']:>10,} {reason}" for reason, entry in step["dropped"].items()]
    lines += [f"skipped {entry['file']}: {entry['rule']}" for entry in report["skipped_files"]]
    for entry in report["contamination"]:
        found, short = f"{entry['flagged']:,} of {entry['items']:,} items", f"{entry['too_short']:,} too short to tell"
        lines.append(f"{entry['file']}: {found} stand in the training text, {short}")
    vocabulary = f"vocabulary {report['tokenizer']['vocab_size']:,} ({report['tokenizer']['kind']})"
    return (
        "\n".join(lines)
        + "\n\n"
        + _splits_text(report["splits"])
        + f"{vocabulary}, in {report['out']}; examples of what was dropped in report.json\n"
    )


@contextmanager
def _progress_bar() -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar per stage on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show
