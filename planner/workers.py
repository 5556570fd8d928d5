"""A function over many items in several processes: results in order, and an interruption that ends them all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["map_ordered", "num_cores"]

Item = TypeVar("Item")
Result = TypeVar("Result")
ITEMS_PER_TASK = 16
"""Enough that sending them is cheap, and so few that the processes end at about the same time."""


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_ordered(function: Callable[[Item], Result], items: Sequence[Item], num_processes: int = 1) -> Iterator[Result]:
    """`map`, in several processes where `num_processes` is above 1; results come in the order of the items whatever finishes first.

    Processes are spawned, not forked, which is safe whatever threads there are: `function` must be importable by name.

    Raises:
        KeyboardInterrupt: interrupted; the processes have ended. So they have when the caller stops early or `function` raises.

    Example:
        >>> list(map_ordered(abs, [-3, 2, -1]))
        [3, 2, 1]
    """
    if num_processes <= 1 or len(items) <= ITEMS_PER_TASK:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), _leave_interrupts_to_the_parent)
    others, is_done = multiprocessing.active_children(), False
    try:
        with _children_ignore_interrupts():
            tasks = [pool.submit(_apply, function, items[i : i + ITEMS_PER_TASK]) for i in range(0, len(items), ITEMS_PER_TASK)]
        for task in tasks:
            yield from task.result()
        is_done = True
    finally:
        for child in [] if is_done else multiprocessing.active_children():
            if child not in others:
                child.terminate()
        pool.shutdown(cancel_futures=True)


def _apply(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [function(item) for item in items]


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _children_ignore_interrupts() -> Iterator[None]:
    """A terminal sends Ctrl-C to all processes: those started in here do not hear it even while they still import."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
