"""Published measurements: rows of a CSV file.

In: a table with the columns of data/measurements/anchors.csv (blank where nothing was published). Out: `Measurement`s;
`planner.measured_requests` makes requests of them.
"""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path

from planner.errors import InputError
from planner.files import read_text

__all__ = ["REQUIRED_COLUMNS", "Measurement", "read_rows"]

MAX_BYTES = 32 << 20
UNTUNED = ("not performance-tuned", "not credible")
"""Words of notes on rows of which little can be learned."""
REQUIRED_COLUMNS = ("id", "source", "framework", "year", "arch_family", "seq_len", "accelerator", "num_devices", "precision", "global_batch_size")


@dataclass(frozen=True)
class Measurement:
    """One row; `values` are the cells that are not blank."""

    values: dict[str, str]

    @property
    def id(self) -> str:
        """Unique in its file."""
        return self.values.get("id", "")

    def text(self, column: str) -> str:
        """A cell, in lower case; empty where blank."""
        return self.values.get(column, "").strip().lower()

    @property
    def is_consistent(self) -> bool:
        """Whether the row's published figures agree with each other, as far as that was checked, and are of a run that was meant to be fast."""
        flag, notes = self.text("consistency_flag"), self.text("notes")
        return (not flag or flag.startswith(("ok", "unchecked"))) and not any(word in notes for word in UNTUNED)

    @property
    def software_year(self) -> float | None:
        """When the software was released: a release named by year and month, else the middle of the year."""
        release = re.search(r"\b(2\d)\.(0[1-9]|1[0-2])\b", self.text("framework"))
        if release is not None:
            return 2000 + int(release[1]) + int(release[2]) / 12
        year = self.number("year")
        return None if year is None else year + 0.5

    def number(self, column: str) -> float | None:
        """A positive finite number; None where blank.

        Raises:
            InputError: anything else.
        """
        text = self.values.get(column, "").strip()
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise InputError.single(column, text, "must be a positive number or blank", "correct the row", f"row {self.id}")
        return value

    def count(self, column: str, default: int | None = None) -> int:
        """A whole number; `default` where blank.

        Raises:
            InputError: not a whole number, or blank without a default.
        """
        value = self.number(column)
        if value is None:
            if default is None:
                raise InputError.single(column, None, "was not published", "fill the column in, or leave the row out", f"row {self.id}")
            return default
        if value != int(value):
            raise InputError.single(column, value, "must be a whole number", "correct the row", f"row {self.id}")
        return int(value)


def read_rows(path: str | Path) -> list[Measurement]:
    """The rows of a CSV file of measurements.

    Raises:
        InputError: unreadable file, missing columns, ragged rows, or an id that stands twice.
    """
    where = str(path)
    try:
        table = list(csv.reader(io.StringIO(read_text(path, MAX_BYTES)), strict=True))
    except csv.Error as error:
        raise InputError.single("measurements", where, f"must be a CSV file ({error})", "correct the file", where) from None
    header = table[0] if table else []
    missing = [name for name in REQUIRED_COLUMNS if name not in header]
    if missing:
        raise InputError.single(
            "measurements", header, f"lacks the columns {', '.join(missing)}", "use the columns of data/measurements/anchors.csv", where
        )
    rows = []
    seen: set[str] = set()
    for line, cells in enumerate(table[1:], 2):
        if not cells:
            continue
        if len(cells) != len(header):
            raise InputError.single("measurements", cells[:3], f"has {len(cells)} cells under {len(header)} columns", "correct it", f"{where}:{line}")
        row = Measurement({name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()})
        if not row.id or row.id in seen:
            raise InputError.single("id", row.id, "must be there, once in the file", "give each row an id of its own", f"{where}:{line}")
        seen.add(row.id)
        rows.append(row)
    return rows
