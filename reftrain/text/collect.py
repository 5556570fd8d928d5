"""Documents out of files and folders: txt, md, jsonl, parquet, HTML, MediaWiki dumps, and .gz, .bz2 and .zip of these.

Files are untrusted: nothing is executed, fetched or written; entities are not expanded; sizes are capped.
"""

from __future__ import annotations

import bz2
import gzip
import io
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import ftfy

from planner.errors import InputError, MissingPieceError, Problem
from reftrain.text.documents import Document
from reftrain.text.jsonl import parse_lines
from reftrain.text.markup import html_text, mediawiki_pages

__all__ = ["READERS", "SUFFIXES", "collect", "list_files"]

MAX_DOCUMENT_BYTES = 256 << 20
"""Of one text or HTML file, unpacked; jsonl, parquet and dumps may be of any size, since they are read in parts."""
TEXT_KEYS = ("text", "content", "body")
Reader = Callable[[IO[bytes], str], Iterator[tuple[str, str]]]
"""(open file, its name) -> (id within the file, text) of each document."""


def _whole(file: IO[bytes], name: str) -> bytes:
    data = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise InputError.single("file", name, f"a document has at most {MAX_DOCUMENT_BYTES:,} bytes", "split it, or write jsonl", name)
    return data


def decode(data: bytes) -> str:
    """Text of unknown encoding: by its mark, else UTF-8, else what ftfy guesses (Latin-1, Windows-1252, Mac Roman).

    Example:
        >>> decode("naïve".encode("utf-16")), decode("naïve".encode("latin-1"))
        ('naïve', 'naïve')
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return str(ftfy.guess_bytes(data)[0])


def _read_text(file: IO[bytes], name: str) -> Iterator[tuple[str, str]]:
    data = _whole(file, name)
    if data[:4096].count(0) > 0 and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError.single("file", name, "must be text; it holds zero bytes", "remove it or convert it", name)
    yield "", decode(data)


def _read_html(file: IO[bytes], name: str) -> Iterator[tuple[str, str]]:
    yield "", html_text(_whole(file, name))


def _text_of(row: dict[str, Any], name: str, number: int) -> str:
    key = next((k for k in TEXT_KEYS if isinstance(row.get(k), str)), None)
    if key is None:
        raise InputError.single(
            "text", sorted(map(str, row))[:8], f"an object needs one of {', '.join(TEXT_KEYS)}, as text", "rename the key", f"{name}:{number}"
        )
    return str(row[key])


def _read_jsonl(file: IO[bytes], name: str) -> Iterator[tuple[str, str]]:
    for number, row in enumerate(parse_lines(file, name), 1):
        yield str(row.get("id", number)), _text_of(row, name, number)


def _read_parquet(file: IO[bytes], name: str) -> Iterator[tuple[str, str]]:
    try:
        import pyarrow  # type: ignore[import-not-found, unused-ignore]
        import pyarrow.parquet as parquet  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise MissingPieceError(f"{name}: reading parquet needs pyarrow; install it with: pip install pyarrow") from None
    try:
        table = parquet.ParquetFile(file)
        column = next((k for k in TEXT_KEYS if k in table.schema_arrow.names), None)
        if column is None:
            raise InputError.single(
                "text", table.schema_arrow.names[:8], f"a table needs one of the columns {', '.join(TEXT_KEYS)}", "rename it", name
            )
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            for text in batch.column(0).to_pylist():
                number += 1
                if isinstance(text, str):
                    yield str(number), text
    except pyarrow.ArrowException as error:
        raise InputError.single("file", name, f"must be a whole parquet file ({str(error)[:80]})", "copy it again", name) from None


READERS: dict[str, Reader] = {
    ".txt": _read_text, ".text": _read_text, ".md": _read_text, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".parquet": _read_parquet,
    ".html": _read_html, ".htm": _read_html, ".xhtml": _read_html, ".xml": mediawiki_pages,
}  # fmt: skip
"""End of a file's name -> how its documents are read."""
_PACKED: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    ".gz": lambda file: cast(IO[bytes], gzip.GzipFile(fileobj=file)),
    ".bz2": lambda file: cast(IO[bytes], bz2.BZ2File(file)),
}
SUFFIXES = (*READERS, *_PACKED, ".zip")


def list_files(paths: Iterable[str | Path]) -> list[Path]:
    """The readable files among `paths` and below those that are folders, sorted, each once; hidden ones are left out.

    Raises:
        InputError: a path that is missing, of an unknown kind, or a folder without any file to read; all at once.
    """
    found: dict[Path, None] = {}
    problems: list[Problem] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if _known(p.name) and p.is_file() and not _hidden(p.relative_to(path))]
            if not inside:
                problems.append(Problem("path", str(path), "the folder must hold files to read", f"files ending in {', '.join(SUFFIXES)}"))
            found.update(dict.fromkeys(inside))
        elif not path.is_file():
            problems.append(Problem("path", str(path), "must be a file or a folder", "check the path"))
        elif not _known(path.name):
            problems.append(Problem("path", str(path), "must be of a known kind", f"files ending in {', '.join(SUFFIXES)}"))
        else:
            found[path] = None
    if problems:
        raise InputError(*problems)
    return list(found)


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _known(name: str) -> bool:
    """Whether the name ends in a kind, packed or not; `a.tar.gz` does not."""
    path = PurePosixPath(name.lower())
    inner = path.with_suffix("").suffix if path.suffix in _PACKED else path.suffix
    return inner in READERS or path.suffix == ".zip"


def collect(files: Iterable[Path], problems: list[Problem], done: Callable[[Path], None] = lambda _: None) -> Iterator[Document]:
    """The documents of `files`, in order.

    Args:
        problems: what was wrong with a file is appended here, and the rest of that file is left out.
        done: called after each file.
    """
    for path in files:
        try:
            with open(path, "rb") as file:
                yield from _documents(cast(IO[bytes], file), str(path), path.name)
        except InputError as error:
            problems += error.problems
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # the last: an encrypted zip
            reason = str(getattr(error, "strerror", None) or error)[:100]
            problems.append(Problem("file", str(path), f"must be a whole, readable file ({reason})", "copy or download it again, or remove it"))
        done(path)


def _documents(file: IO[bytes], name: str, label: str) -> Iterator[Document]:
    """The documents of an open file whose kind its name tells; archives are opened one level deep."""
    suffix = PurePosixPath(name.lower()).suffix
    if suffix == ".zip":
        with zipfile.ZipFile(file) as archive:
            for member in sorted(archive.infolist(), key=lambda m: m.filename):
                inner = PurePosixPath(member.filename)
                if not member.is_dir() and _known(inner.name) and inner.suffix.lower() != ".zip" and not _hidden(Path(inner)):
                    with archive.open(member) as unpacked:
                        yield from _documents(unpacked, f"{name}/{member.filename}", f"{label}/{member.filename}")
    elif suffix in _PACKED:
        with _PACKED[suffix](file) as unpacked:
            buffered = cast(IO[bytes], io.BufferedReader(cast(io.RawIOBase, unpacked)))
            yield from _documents(buffered, name[: -len(suffix)], label)
    else:
        for inner_id, text in READERS[suffix](file, name):
            yield Document(f"{label}:{inner_id}" if inner_id else label, text)
