"""JSON Lines, plain or gzip, one object at a time, from files that may be damaged."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from planner.errors import InputError

__all__ = ["MAX_LINE_BYTES", "parse_lines", "read_jsonl"]

MAX_LINE_BYTES = 256 << 20


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl or .jsonl.gz file.

    Raises:
        InputError: unreadable, cut off, or a line that is no JSON object; the line is named.
    """
    try:
        with gzip.open(path, "rb") if str(path).endswith(".gz") else open(path, "rb") as file:
            yield from parse_lines(file, str(path))  # type: ignore[arg-type]
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError.single("file", str(path), f"must be a whole, readable file ({reason})", "copy or download it again") from None


def parse_lines(file: IO[bytes], where: str) -> Iterator[dict[str, Any]]:
    """One object per line; empty lines are skipped."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        place = f"{where}:{number}"
        if len(line) > MAX_LINE_BYTES:
            raise InputError.single("line", number, f"at most {MAX_LINE_BYTES:,} bytes", "split the document", place)
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested too deep
            raise InputError.single("line", line[:60], f"must be JSON ({str(error)[:80]})", "mend or remove the line", place) from None
        if not isinstance(value, dict):
            raise InputError.single("line", line[:60], "must be a JSON object", 'write {"text": "..."}', place)
        yield value
