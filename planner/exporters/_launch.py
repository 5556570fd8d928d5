"""What launchers have in common: the trainer that they start, and torchrun's options."""

from __future__ import annotations

from planner.errors import InputError
from planner.exporters._job import Draft, ExportJob, Program

__all__ = ["MAX_RESTARTS", "program_of", "torchrun_words"]

MAX_RESTARTS = 3
"""Of the processes, within one start of the job."""


def program_of(job: ExportJob) -> tuple[Draft, Program]:
    """The trainer's files, and how torchrun starts it.

    Raises:
        InputError: the trainer is not started by torchrun.
    """
    draft = job.write_trainer()
    if draft.program is None:
        raise InputError.single("--trainer", job.trainer, "torchrun cannot start it", f"start it by itself: {draft.how}")
    return draft, draft.program


def torchrun_words(job: ExportJob, endpoint: str | None, run_id: str | None = None) -> list[str]:
    """`torchrun` and its options; `endpoint` HOST:PORT of the first node, None on one node."""
    words = ["torchrun", "--nnodes", str(job.num_nodes), "--nproc-per-node", str(job.devices_per_node), "--max-restarts", str(MAX_RESTARTS)]
    if endpoint is None:
        return [*words, "--standalone"]
    return [*words, "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, *(["--rdzv-id", run_id] if run_id else [])]
