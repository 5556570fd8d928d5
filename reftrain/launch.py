"""Starting the processes of a layout on this machine, when torchrun has not been asked to."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import torch

from planner.errors import InputError

__all__ = ["is_worker", "launch"]


def is_worker() -> bool:
    """Whether torchrun (or a launcher like it) started this process."""
    return "WORLD_SIZE" in os.environ


def launch(arguments: Sequence[str], num_processes: int) -> int:
    """Runs `python -m reftrain ARGUMENTS` once per device under torchrun on this machine; returns its exit status.

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
    threads = str(max(cores // num_processes, 1))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes), "-m", "reftrain", *arguments]
    return subprocess.run(command, env={"OMP_NUM_THREADS": threads, **os.environ}, check=False).returncode
