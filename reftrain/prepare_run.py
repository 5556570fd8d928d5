"""What must stand before a run starts: its folder, held by this run alone, with the plan in it, and its token shards."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from planner.errors import InputError, Problem
from planner.files import to_yaml, write_text
from planner.plan import spec_to_plain
from reftrain.config import RunConfig, load_run_config
from reftrain.example_batches import remember_examples
from reftrain.parallel import Ranks

__all__ = ["check_folder", "hold_folder", "on_first_rank", "prepare_data", "prepare_folder"]

LARGEST_VOCAB = 4096
"""Of the tokenizer trained for the shipped corpus; its 14 MB hold too few words for more."""
SAME_WORKLOAD = ("seq_len", "global_batch_size", "optimizer", "precision", "job", "lora_rank", "lora_targets", "lora_dropout", "frozen_format")
SAME_TRAINING = ("data", "seed", "mask_fraction", "valid_data", "valid_fraction", "packing", "lora_alpha", "init_from")
"""With the model, what a checkpoint and its place in the data mean; the layout, rates and the length of the run may change."""
T = TypeVar("T")


def check_folder(config: RunConfig, out: Path, resume: bool) -> None:
    """Refuses a folder that this run must not write to.

    Raises:
        InputError: it holds a run already, or on `resume` the run of another plan.
    """
    file = out / "plan.yaml"
    if not file.exists():
        return
    if not resume:
        raise InputError.single("--out", str(out), "holds a run already", "use --resume to go on with it, or another folder")
    old, new = (_identity(c) for c in (load_run_config(file), config))
    fix = "resume with the plan that started the run (RUN_DIR/plan.yaml), or choose another --out"
    problems = [Problem(k, new.get(k), f"is {old.get(k)!r} in the run to resume", fix, str(file)) for k in {**old, **new} if old.get(k) != new.get(k)]
    if problems:
        raise InputError(*problems)


def _identity(config: RunConfig) -> dict[str, Any]:
    """The keys that a run keeps for life."""
    found = {f"model.{k}": v for k, v in {**spec_to_plain(config.model), **asdict(config.details)}.items() if k != "name"}
    found |= {f"workload.{k}": getattr(config.workload, k) for k in SAME_WORKLOAD}
    return found | {f"training.{k}": getattr(config.training, k) for k in SAME_TRAINING}


def prepare_folder(config: RunConfig, out: Path, resume: bool) -> None:
    """Writes `plan.yaml` into the run's folder: the request as it was, with what the trainer filled in.

    Raises:
        InputError: see `check_folder`; or the folder cannot be written.
    """
    check_folder(config, out, resume)
    write_text(out / "plan.yaml", to_yaml(config.plan))


def prepare_data(config: RunConfig, out: Path) -> str:
    """The folder of token shards (or `synthetic`, or a file of examples). The shipped corpus is tokenized once, into the run's folder.

    Raises:
        InputError: a job that needs weights to start from and has none, data that cannot be read or has changed.
    """
    data, job = config.training.data, config.workload.job
    if job != "pretrain" and config.training.init_from is None and data != "synthetic":
        rule = f"job: {job} needs weights to start from, and training.init_from names none"
        fix = "python -m reftrain finetune PLAN.yaml --from RUN_DIR --data FILE.jsonl; or data: synthetic, to measure alone"
        raise InputError.single("workload.job", job, rule, fix)
    if config.has_examples:
        remember_examples(config, out)
    if data != "corpus":
        return data
    folder = out / "data"
    if not (folder / "train" / "index.json").is_file():
        from reftrain.text.prepare import PrepareOptions, prepare

        sys.stderr.write("preparing the shipped corpus, once for this run\n")
        prepare(PrepareOptions(folder, vocab_size=min(config.model.vocab_size, LARGEST_VOCAB)))
    return str(folder)


@contextmanager
def hold_folder(out: Path, ranks: Ranks) -> Iterator[None]:
    """Makes the folder, and keeps every other run out of it while the body runs. The system lets go of it when the process dies, however it dies.

    Raises:
        InputError: the folder cannot be made, or another run holds it.
    """
    handles: list[int] = []

    def take() -> None:
        try:
            (out / "checkpoints").mkdir(parents=True, exist_ok=True)
            handles.append(os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644))
            fcntl.lockf(handles[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError.single("--out", str(out), "is in use by another run", "wait for it, stop it, or choose another folder") from None
        except OSError as error:
            raise InputError.single("--out", str(out), f"cannot be made ({error.strerror})", "choose another folder") from None

    try:
        on_first_rank(ranks, take)
        yield
    finally:
        for handle in handles:
            os.close(handle)


def on_first_rank(ranks: Ranks, action: Callable[[], T]) -> T:
    """Runs it on rank 0 alone; every rank gets its result, or its InputError."""
    outcome: list[Any] = [None, ()]
    if ranks.is_first:
        try:
            outcome[0] = action()
        except InputError as error:
            outcome[1] = error.problems
    if ranks.world_size > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1]:
        raise InputError(*outcome[1])
    return outcome[0]  # type: ignore[no-any-return]
