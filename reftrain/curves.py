"""A run's curves for TensorBoard: `tensorboard --logdir RUN_DIR`.

In: the records of `metrics.jsonl`. Out: event files under `tensorboard/`, one per process that the run has had. The horizontal axis is the number
of steps done, so that the held-out loss after 100 steps stands above the training loss of the hundredth.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

__all__ = ["Curves", "curve_points"]

FLUSH_EVERY_S = 5.0
STEP_TAGS = {
    "loss": "loss/train", "tokens_per_s": "speed/tokens_per_s", "step_s": "speed/step_s", "mfu": "speed/mfu",
    "learning_rate": "optimizer/learning_rate", "norm": "optimizer/gradient_norm",
}  # fmt: skip
EVAL_TAGS = {"loss": "loss/held_out", "bits_per_byte": "loss/held_out_bits_per_byte"}


def curve_points(record: dict[str, Any]) -> tuple[int, dict[str, float]]:
    """(steps done, value by curve) of a record; no values where it has no place in a curve.

    Example:
        >>> curve_points({"kind": "step", "step": 9, "loss": 2.5, "phases_s": {"data": 0.1}})
        (10, {'loss/train': 2.5, 'phases_s/data': 0.1})
    """
    if record["kind"] == "step":
        values = {tag: record[key] for key, tag in STEP_TAGS.items() if key in record}
        return record["step"] + 1, values | {f"phases_s/{phase}": seconds for phase, seconds in record.get("phases_s", {}).items()}
    if record["kind"] == "eval":
        return record["step"], {tag: record[key] for key, tag in EVAL_TAGS.items() if key in record}
    return record.get("step", 0), {}


class Curves:
    """Appends to the curves; `tensorboard` is imported here, once a run begins.

    Its record writer is called directly, without torch's `SummaryWriter`: one event per step holds all curves, no thread competes with the steps,
    and a full disk is an error of the call that meets it.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        self._event, self._session, self._summary = Event, SessionLog, Summary
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"events.out.tfevents.{time.time_ns()}").open("wb")  # read in the order of names
        self._writer = RecordWriter(self._file)
        self._flushed_s = 0.0
        self._add(0, file_version="brain.Event:2")

    def write(self, record: dict[str, Any]) -> None:
        """Adds a record. One that says that the run has gone back takes what came after that step off the curves."""
        if record["kind"] in ("resumed", "rolled_back"):
            self._add(record["step"] + 1, session_log=self._session(status=self._session.START))
            return
        step, values = curve_points(record)
        if values:
            points = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
            self._add(step, summary=self._summary(value=points))

    def _add(self, step: int, **content: Any) -> None:
        now = time.time()
        self._writer.write(self._event(wall_time=now, step=step, **content).SerializeToString())
        if now - self._flushed_s > FLUSH_EVERY_S:
            self.flush()
            self._flushed_s = now

    def flush(self) -> None:
        """Hands everything to the system."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
