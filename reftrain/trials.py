"""Trials: a plan with some of its keys changed, run in a process of its own that may fail without harm to this one."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from planner.errors import InputError
from planner.files import parse_yaml
from planner.plan import build_request

__all__ = ["Child", "predict", "rendered", "vary"]

POLL_S = 0.1
TABLE_COLUMNS = 140
"""At least so wide are tables, whatever the terminal: a figure cut off is worse than a line that wraps."""


def vary(plan: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A plan with dotted keys changed. Where workload or layout changes, a prediction is made anew, or left out if none can be made.

    Raises:
        InputError: the planner refuses the changed plan's workload or layout as such.

    Example:
        >>> vary({"model": "gpt2", "training": {"seed": 1}}, {"training.seed": 2})
        {'model': 'gpt2', 'training': {'seed': 2}}
    """
    varied = dict(plan)
    for key, value in changes.items():
        section, _, name = key.partition(".")
        varied[section] = {**(varied.get(section) or {}), name: value}
    if "prediction" in varied and any(key.startswith(("workload.", "layout.")) for key in changes):
        bare = {key: value for key, value in varied.items() if key not in ("prediction", "provenance")}
        varied = {**bare, **predict(bare)}
    return varied


def predict(plan: dict[str, Any]) -> dict[str, Any]:
    """`prediction` and `provenance` of a plan; nothing where the planner cannot price it, e.g. for an accelerator that it does not know.

    Raises:
        InputError: the plan itself is wrong.
    """
    from planner.estimate import estimate

    request = build_request(plan)
    try:
        found = parse_yaml(estimate(request).to_yaml())
    except InputError:
        return {}
    return {key: found[key] for key in ("prediction", "provenance")}


@dataclass
class Child:
    """Runs `python -m reftrain ...`, one after another; a signal to this process is passed on, so that a run can save."""

    stop_signal: int = 0
    held_files: tuple[int, ...] = ()
    """Descriptors that the child shares: locks that must outlive a parent that is killed."""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM, SIGINT and SIGHUP are noted and passed on while the body runs; a second one ends the child at once."""

        def note(number: int, _frame: object) -> None:
            self.stop_signal = number
            if self.process is not None and self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)

        previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def run(self, arguments: Sequence[str], log: Path, look: Callable[[], None] = lambda: None) -> int:
        """The exit status, negative for the signal that ended it. What it says goes to `log`; `look` is called now and then."""
        if self.stop_signal:
            return 130
        with log.open("ab") as file:
            # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "reftrain", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file,
                start_new_session=True, pass_fds=self.held_files,
            )  # fmt: skip
            while True:
                try:
                    return self.process.wait(POLL_S)
                except subprocess.TimeoutExpired:
                    look()


def rendered(table: Table) -> str:
    """A table as plain text."""
    console = Console(width=max(TABLE_COLUMNS, Console().width), no_color=True, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"
