"""Checkpoints that are whole or absent: atomic, durable, hashed, resharded on load, and never a pickle.

torch.distributed.checkpoint (DCP) plans who saves which piece and which pieces a rank needs on load, so that a checkpoint of one
layout loads into any other. Its own files are not used, because three of them run pickles when loaded: `.metadata`, every value that
is no tensor (`torch.load(weights_only=False)`) and the zip of each tensor; a hash does not help where the attacker writes the hash too.
Instead its planners are given JSON for values, and its storage interface is implemented here over safetensors and JSON.

The order of a save, which is what makes it atomic: write everything into `.step-N.tmp-ID`, fsync files and folder, ONE rename, fsync of the parent.
A folder named `step-N` is therefore complete; whether it is still intact the SHA-256 manifest says.

A save in the background is not DCP's `async_save`: that plans and gathers in its thread over the training's own process group, beside the
training's own messages, refuses a group without a CPU backend, and fails where warnings are errors. Here planning (small, collective) and the
copy of the pieces that this rank is to write happen at once; writing and hashing follow in a thread, whose few messages go over a gloo group
of the store's own.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from planner.errors import InputError, Problem
from planner.files import sync_folder
from reftrain.checkpoint_files import (
    MANIFEST,
    FileRecord,
    Manifest,
    damage,
    decode,
    encode,
    json_bytes,
    parse_bytes,
    read_manifest,
    write_file,
)
from reftrain.checkpoint_pieces import LAYOUT, JsonLoadPlanner, JsonSavePlanner, PieceCollector, PieceReader, cause_of, unfit

__all__ = ["CheckpointStore"]

EXTRA, LOCK = "extra.json", ".lock"
_FOLDER = re.compile(r"step-([0-9]{8,})|\.step-([0-9]{8,})\.(tmp|old|drop)-[0-9a-f]+")
T = TypeVar("T")


class CheckpointStore:
    """The checkpoints of one run, in one folder that every process sees; one store per folder and process.

    In a job of several processes every method is collective: call it on all ranks, with the same arguments. Rank 0 writes the manifest.

    Args:
        folder: made if absent.
        keep: how many checkpoints stay; the oldest beyond go after each save.
        on_problem: called with each damaged file that `newest` meets, and with each cleanup that failed.
        on_stage: called with the name of each stage of a save when it is done.

    Example:
        >>> import tempfile
        >>> store = CheckpointStore(tempfile.mkdtemp())
        >>> store.save(100, {"weight": torch.ones(2, 2)}, {"loss": 2.5})
        >>> state = {"weight": torch.zeros(2, 2)}
        >>> store.load(store.newest(), state), state["weight"].sum().item()
        ({'loss': 2.5}, 4.0)
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int = 3,
        *,
        on_problem: Callable[[Problem], None] | None = None,
        on_stage: Callable[[str], None] | None = None,
    ) -> None:
        if keep < 1:
            raise InputError.single("keep", keep, "at least one checkpoint must stay", "keep: 3")
        self.folder = Path(folder)
        self.keep = keep
        self.pinned: int | None = None
        """A step whose checkpoint stays, however old."""
        self.problems: list[Problem] = []
        self._on_problem = on_problem or (lambda problem: None)
        self._on_stage = on_stage or (lambda stage: None)
        self._distributed = dist.is_available() and dist.is_initialized()
        self._rank = dist.get_rank() if self._distributed else 0
        self._world_size = dist.get_world_size() if self._distributed else 1
        self._group = dist.new_group(backend="gloo") if self._distributed else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._buffers: dict[str, torch.Tensor] = {}
        self._timeline_step: int | None = None

    # ---------------------------------------------------------------- saving

    def save(self, step: int, state: dict[str, Any], extra: dict[str, Any], *, block: bool = True) -> None:
        """Saves a state as checkpoint `step`; when it returns (or `wait` does, for `block=False`) no crash can lose it.

        Args:
            step: above every checkpoint in the folder, or above the one last loaded, whose successors are then replaced.
            state: nested dict of tensors, DTensors and plain values, as `get_state_dict` gives it.
            extra: numbers, text, lists, tuples and dicts; this rank's own.
            block: False: only copy the pieces to host memory (kept for the next save), then write in the background.

        Raises:
            InputError: disk full, not writable, a step out of order, or another process is saving here; older checkpoints are intact.
        """
        self.wait()
        extra_json = encode(extra)
        writer = PieceCollector(None if block else self._buffers)
        with _quiet():
            try:
                dcp_save(state, storage_writer=writer, planner=JsonSavePlanner(), process_group=self._group, no_dist=not self._distributed)
            except CheckpointException as error:
                raise RuntimeError(cause_of(error)) from error
        self._on_stage("copied")
        if block:
            self._write(step, writer, extra_json)
        else:
            self._pending = self._thread.submit(self._write, step, writer, extra_json)

    def wait(self) -> None:
        """Waits for the save in the background, if any; do it before the process group is destroyed.

        Raises:
            InputError: what went wrong with it.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, writer: PieceCollector, extra: Any) -> None:
        """From pieces in memory to `step-N` on the disk."""
        shares = self._each(lambda: (writer.num_bytes, extra, uuid.uuid4().hex[:12]))
        num_bytes = sum(size for size, _, _ in shares)
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{final.name}.tmp-{shares[0][2]}"
        with self._lock(num_bytes) as refusal:
            try:
                self._each(lambda: self._prepare(step, temporary, refusal), num_bytes, first_only=True)
                self._on_stage("folder")
                records = self._each(lambda: writer.write(temporary, self._rank), num_bytes)
                self._on_stage("tensors")
                extras = [share[1] for share in shares]
                self._each(lambda: self._seal(step, temporary, writer.layout, extras, records), num_bytes, first_only=True)
                self._each(lambda: self._publish(temporary, final), num_bytes, first_only=True)
            except BaseException:
                if self._rank == 0 and not refusal:
                    self._discard(temporary)
                raise
            if self._rank == 0:  # the checkpoint stands; nothing from here on makes the save fail
                self._drop(step)
                self._on_stage("dropped")
        self._timeline_step = step

    def _prepare(self, step: int, temporary: Path, refusal: InputError | None) -> None:
        if refusal:
            raise refusal
        for path in self._named("tmp", "drop"):  # the lock is ours, so their writers are dead
            self._discard(path)
        for path in self._named("old"):  # a writer that died between the two renames of `_publish`
            if not (self.folder / path.name[1:].split(".")[0]).exists():
                os.rename(path, self.folder / path.name[1:].split(".")[0])
        newer = [s for s, _ in self._complete() if s > step and (self._timeline_step is None or s <= self._timeline_step)]
        if newer:
            rule = f"must be above the newest checkpoint of the folder, {newer[0]}"
            raise InputError.single("checkpoint.step", step, rule, "resume from it, or save into another folder", str(self.folder))
        os.mkdir(temporary)

    def _seal(self, step: int, temporary: Path, layout: Any, extras: list[Any], records: list[FileRecord | None]) -> None:
        files = [r for r in records if r is not None]
        files.append(write_file(temporary / LAYOUT, [json_bytes(layout)]))
        files.append(write_file(temporary / EXTRA, [json_bytes({"ranks": extras})]))
        self._on_stage("layout")
        write_file(temporary / MANIFEST, [Manifest(step, self._world_size, tuple(files)).to_bytes()])
        self._on_stage("manifest")
        sync_folder(temporary)
        self._on_stage("synced")

    def _publish(self, temporary: Path, final: Path) -> None:
        if final.exists():  # the same step again, after a rollback: the old one stays readable under its second name until the new one stands
            os.rename(final, self.folder / f".{final.name}.old-{uuid.uuid4().hex[:12]}")
            self._on_stage("replaced")
        os.rename(temporary, final)
        self._on_stage("renamed")
        sync_folder(self.folder)
        self._on_stage("durable")

    def _drop(self, step: int) -> None:
        """Deletes what is beyond `keep`, a future that was rolled back, and leftovers; a failure is reported, never raised."""
        complete = self._complete()
        older = [path for s, path in complete if s <= step]
        spare = [path for path in older[self.keep :] if self.pinned is None or path.name != f"step-{self.pinned:08d}"]
        for path in spare + [path for s, path in complete if s > step] + self._named("old"):
            self._discard(path)

    def _discard(self, path: Path) -> None:
        """Deletes a folder, which first gets a name that is no checkpoint's; a failure is reported, and the next save tries again."""
        away = self.folder / f".{path.name.lstrip('.').split('.')[0]}.drop-{uuid.uuid4().hex[:12]}"
        try:
            os.rename(path, away)
            shutil.rmtree(away)
        except FileNotFoundError:
            pass
        except OSError as error:
            rule = f"could not be deleted ({error.strerror})"
            self._report(Problem("checkpoint", str(path), rule, "mend the disk; the next save tries again", str(path)))

    @contextmanager
    def _lock(self, num_bytes: int) -> Iterator[InputError | None]:
        """Rank 0 holds the folder against other writers; yields why it cannot. The system frees the lock when the process dies, however it dies."""
        if self._rank != 0:
            yield None
            return
        handle, refusal = None, None
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True)
                sync_folder(self.folder.parent)
            handle = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # by process, not by handle: a forked data worker cannot keep it
        except BlockingIOError:
            rule = "must have one writer at a time; another process is saving here"
            refusal = InputError.single("checkpoint", str(self.folder), rule, "end the other process, or save into another folder")
        except OSError as error:
            refusal = _disk_problem(self.folder, error, num_bytes)
        try:
            yield refusal
        finally:
            if handle is not None:
                os.close(handle)

    # --------------------------------------------------------------- loading

    def newest(self) -> Path | None:
        """The newest checkpoint all of whose files verify; None if there is none. Damaged ones are reported and passed over.

        Raises:
            InputError: the folder cannot be listed, or a save in the background has failed.
        """
        self.wait()
        for _, path in self._each(self._complete, first_only=True)[0]:
            problems = self.verify(path)
            if not problems:
                return path
            for problem in problems:
                self._report(problem)
        return None

    def verify(self, path: str | Path) -> list[Problem]:
        """What is wrong with the files of a checkpoint; each rank hashes its share. Files that the manifest does not name are never read."""
        folder = Path(path)

        def check() -> list[Problem]:
            try:
                files = read_manifest(folder).files
            except InputError as error:
                return list(error.problems)
            names = {f.name for f in files}
            absent = [
                Problem("checkpoint", str(folder / n), "must be in the manifest", "use an older checkpoint")
                for n in (LAYOUT, EXTRA)
                if n not in names
            ]
            return absent + [problem for f in files[self._rank :: self._world_size] if (problem := damage(folder, f))]

        return list(dict.fromkeys(problem for problems in self._each(check) for problem in problems))

    def load(self, path: str | Path, state: dict[str, Any]) -> dict[str, Any]:
        """Verifies a checkpoint and loads it in place, whatever layout it was saved from; later saves continue from its step.

        Args:
            path: of a checkpoint, as `newest` gives it.
            state: as for `save`; its tensors are overwritten, its plain values replaced. It may be a part of what was saved.

        Returns:
            The `extra` that this rank saved; that of rank 0 if the number of processes has changed.

        Raises:
            InputError: damaged, no checkpoint, or it lacks something that `state` has, or has it in another shape (then `state` may be half loaded).
        """
        self.wait()
        folder = Path(path)
        if problems := self.verify(folder):
            raise InputError(*problems)
        reader = PieceReader(folder)
        self._each(lambda: reader.open(read_manifest(folder)))
        extra, step = self._each(lambda: self._read_extra(folder))[self._rank]
        try:
            with _quiet():
                dcp_load(state, storage_reader=reader, planner=JsonLoadPlanner(), process_group=self._group, no_dist=not self._distributed)
        except CheckpointException as error:
            raise unfit(folder, cause_of(error)) from None
        self._timeline_step = step
        return extra

    def read_extra(self, path: str | Path) -> dict[str, Any]:
        """The `extra` of a checkpoint alone.

        Raises:
            InputError: it has none that can be read.
        """
        return self._each(lambda: self._read_extra(Path(path)))[self._rank][0]

    def _read_extra(self, folder: Path) -> tuple[dict[str, Any], int]:
        """This rank's `extra`, and the step."""
        try:
            extras = parse_bytes(folder / EXTRA)["ranks"]
            return dict(decode(extras[self._rank if len(extras) == self._world_size else 0])), read_manifest(folder).step
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise unfit(folder, f"{EXTRA}: {type(error).__name__}: {error}") from None

    # --------------------------------------------------------------- helpers

    def _complete(self) -> list[tuple[int, Path]]:
        """Steps and folders of all checkpoints, newest first; one that is being replaced counts until its successor stands."""
        found: dict[int, Path] = {}
        for path in (*self._named("old"), *self._named("")):
            match = _FOLDER.fullmatch(path.name)
            if match:
                found[int(match[1] or match[2])] = path
        return sorted(found.items(), reverse=True)

    def _named(self, *kinds: str) -> list[Path]:
        """The folders of some kinds (tmp, old, drop; empty: finished), by name."""
        try:
            names = sorted(os.listdir(self.folder))
        except FileNotFoundError:
            return []
        matches = [m for m in map(_FOLDER.fullmatch, names) if m]
        return [self.folder / m[0] for m in matches if (m[3] or "") in kinds]

    def _report(self, problem: Problem) -> None:
        self.problems.append(problem)
        self._on_problem(problem)

    def _each(self, action: Callable[[], T], num_bytes: int = 0, *, first_only: bool = False) -> list[T]:
        """Runs an action on every rank (or on rank 0 alone) and gives every rank all results; if it failed anywhere, it fails everywhere."""
        outcome = _Outcome()
        error: Exception | None = None
        if self._rank == 0 or not first_only:
            try:
                outcome.result = action()
            except OSError as disk:
                outcome.problems = _disk_problem(self.folder, disk, num_bytes).problems
            except InputError as wrong:
                outcome.problems = wrong.problems
            except Exception as bug:
                error, outcome.bug = bug, f"rank {self._rank}: {type(bug).__name__}: {bug}"
        outcomes = [outcome]
        if self._distributed:
            outcomes = [_Outcome() for _ in range(self._world_size)]
            dist.all_gather_object(outcomes, outcome, group=self._group)
        if error is not None:
            raise error
        if bugs := [o.bug for o in outcomes if o.bug]:
            raise RuntimeError("; ".join(bugs))
        if problems := [p for o in outcomes for p in o.problems]:
            raise InputError(*problems)
        return [o.result for o in outcomes[: 1 if first_only else None]]


@dataclass
class _Outcome:
    """What became of an action on one rank."""

    result: Any = None
    problems: tuple[Problem, ...] = ()
    bug: str = ""


def _disk_problem(folder: Path, error: OSError, num_bytes: int) -> InputError:
    needed = f", {num_bytes:,} bytes are needed" if num_bytes else ""
    rule = f"must be a folder that can be read and written ({error.strerror}{needed})"
    path = str(error.filename or folder)
    return InputError.single("checkpoint", path, rule, "free space or mend the disk; older checkpoints are intact", str(folder))


@contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns whenever there is one process; that is no fault."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
