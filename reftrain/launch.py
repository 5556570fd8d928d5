"""Starting the processes of a layout on this machine, when torchrun has not been asked to, and again when one dies."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch

from planner.errors import InputError

__all__ = ["MAX_RESTARTS", "is_restarted", "is_worker", "launch"]

MAX_RESTARTS = 3
FINAL = frozenset({2, 3, 4, 5, 6, 130})
"""Exit statuses that another try would only repeat; a signal or status 1 may be the machine's fault."""
GRACE_S = 60
"""For saving a checkpoint after SIGTERM, before SIGKILL."""


def is_worker() -> bool:
    """Whether torchrun (or a launcher like it) started this process."""
    return "WORLD_SIZE" in os.environ


def is_restarted() -> bool:
    """Whether torchrun started this process in place of one that died: then it goes on from the newest checkpoint."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launch(arguments: Sequence[str], out: Path, num_processes: int, max_restarts: int = MAX_RESTARTS) -> int:
    """Runs `python -m reftrain ARGUMENTS` once per device, as torchrun would on this machine; returns the exit status of the run.

    When a process dies, all are started again with `--resume`, up to `max_restarts` times; not after an error that would come again.

    Raises:
        InputError: more processes than this machine has devices (cores, without a GPU).
    """
    cores = os.cpu_count() or 1
    available = torch.cuda.device_count() if torch.cuda.is_available() else max(cores, 8)
    if num_processes > available:
        raise InputError.single(
            "layout", num_processes, f"wants {num_processes} processes, and this machine has {available} devices",
            "start it on every node: torchrun --nnodes N --nproc-per-node DEVICES --rdzv-endpoint HOST:PORT -m reftrain run PLAN.yaml --out DIR",
        )  # fmt: skip
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores // num_processes, 1)))
    for num_left in range(max_restarts, -1, -1):
        status, cause = _run_once(arguments, num_processes)
        if not cause or status in FINAL or _has_diverged(out):
            return status
        advice = f"starting again from the newest checkpoint, {num_left} more tries" if num_left else "giving up; go on with --resume"
        sys.stderr.write(f"{cause}: {advice}\n")
        arguments = [*arguments, *([] if "--resume" in arguments else ["--resume"])]
    return 1


def _run_once(arguments: Sequence[str], num_processes: int) -> tuple[int, str]:
    """(exit status, what happened to the first process that failed; empty if none did)."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=num_processes, run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, monitor_interval=0.1, shutdown_timeout=GRACE_S,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "reftrain", *arguments)
    except SignalException:
        return 130, ""
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        died = f"was ended by signal {-failure.exitcode}" if failure.exitcode < 0 else f"ended with status {failure.exitcode}"
        return (failure.exitcode if failure.exitcode > 0 else 1), f"rank {rank} (process {failure.pid}) {died}"
    return 0, ""


def _has_diverged(out: Path) -> bool:
    """Whether the run's last word is that it diverged, which another try would repeat."""
    try:
        return '"kind": "diverged"' in (out / "metrics.jsonl").read_text().splitlines()[-1]
    except (OSError, IndexError):
        return False
