"""Where a run writes what happens to it: `metrics.jsonl` and the curves for TensorBoard, on the first rank."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from planner.errors import InputError
from reftrain.curves import Curves
from reftrain.measure import MetricsLog

__all__ = ["RunLog"]


class RunLog:
    """Both, opened together; each method raises InputError where the disk is full."""

    def __init__(self, out: Path) -> None:
        self.metrics = MetricsLog(out / "metrics.jsonl")
        self._curves_folder = out / "tensorboard"
        self._curves = self._open_curves()

    def _open_curves(self) -> Curves | None:
        """None, and a line that says so, where tensorboard is not installed."""
        try:
            with _room_for(self._curves_folder):
                return Curves(self._curves_folder)
        except ImportError:
            sys.stderr.write("no curves for TensorBoard, which is not installed: pip install tensorboard\n")
            return None

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record."""
        with _room_for(self.metrics.path, len(str(record))):
            self.metrics.write(record)
        if self._curves is not None:
            with _room_for(self._curves_folder):
                self._curves.write(record)

    def flush(self) -> None:
        """Hands everything to the system: before a checkpoint, so that a killed run that goes on from it has its curves whole."""
        if self._curves is not None:
            with _room_for(self._curves_folder):
                self._curves.flush()

    def close(self) -> None:
        """Closes the files. Never raises: a full disk has been told of when it was met."""
        for file in (self.metrics, self._curves):
            if file is not None:
                with suppress(OSError):
                    file.close()


@contextmanager
def _room_for(path: Path, num_bytes: int = 0) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        needed = f", {num_bytes:,} bytes are needed" if num_bytes else ""
        rule = f"could not be written ({error.strerror}{needed})"
        raise InputError.single("--out", str(path), rule, "free space, then --resume; the checkpoints are intact") from None
