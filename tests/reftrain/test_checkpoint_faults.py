"""Checkpoints under fire: processes really killed, disks that fail at every call, files that may not grow. Counts go to the report (--junitxml)."""

import errno
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from planner.errors import InputError
from reftrain.checkpoint import CheckpointStore

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("copied", "folder", "tensors", "layout", "manifest", "synced", "renamed", "durable", "dropped")
"""What a save passes through, in this order; from `renamed` on the new checkpoint counts."""

SERVER = """
# Imports torch once, then forks one saver per line of input: a real process to kill, without its start-up time.
import json, os, signal, sys, time
import torch
from reftrain.checkpoint import CheckpointStore

def state_at(step, num_elements):
    return {"weight": torch.arange(num_elements, dtype=torch.float32) + step, "optimizer": {"step": step, "moment": torch.full((37, 5), float(step))}}

def save_for_ever(order):
    def on_stage(stage):
        if order["kill_at"] == [current, stage]:
            os.kill(os.getpid(), signal.SIGKILL)
        if order["sleep_at"] == [current, stage]:
            os.write(acknowledged, b"asleep\\n")
            time.sleep(60)
    acknowledged = os.open(order["acknowledged"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    store = CheckpointStore(order["folder"], keep=2, on_stage=on_stage)
    for current in order["steps"]:
        store.save(current, state_at(current, order["num_elements"]), {"step": current}, block=order["block"])
        store.wait()
        os.write(acknowledged, b"%d\\n" % current)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        signal.alarm(100)  # should nobody be left to kill it
        try:
            order = json.loads(line)
            order["steps"] = range(order["first"], order["last"] + 1)
            if order["resume"]:
                store = CheckpointStore(order["folder"])
                store.load(store.newest(), {"weight": torch.zeros(order["num_elements"])})
            save_for_ever(order)
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Server:
    """Runs savers, one at a time."""

    def __init__(self):
        self.pid = None
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
        )

    def start(self, folder, first, last, *, block=True, kill_at=None, sleep_at=None, resume=False, num_elements=20_000):
        self.acknowledged = Path(f"{folder}.acknowledged-{first}-{time.monotonic_ns()}")
        order = {"folder": str(folder), "acknowledged": str(self.acknowledged), "first": first, "last": last, "resume": resume}
        order |= {"block": block, "kill_at": kill_at, "sleep_at": sleep_at, "num_elements": num_elements}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.pid = int(self.process.stdout.readline())
        return self.pid

    def lines(self):
        return self.acknowledged.read_text().split() if self.acknowledged.exists() else []

    def steps(self):
        return [int(line) for line in self.lines() if line.isdigit()]

    def status(self):
        """Waits for the saver to end."""
        self.pid = None
        return int(self.process.stdout.readline())

    def wait_for(self, num_lines):
        deadline = time.monotonic() + 60
        while len(self.lines()) < num_lines:
            assert time.monotonic() < deadline, "the saver makes no progress"
            time.sleep(0.001)


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    if server.pid:  # a test failed before it had killed its saver
        os.kill(server.pid, signal.SIGKILL)
    server.process.stdin.close()
    server.process.wait(60)
    server.process.stdout.close()


def state_at(step, num_elements=20_000):
    return {"weight": torch.arange(num_elements, dtype=torch.float32) + step, "optimizer": {"step": step, "moment": torch.full((37, 5), float(step))}}


def blank(num_elements=20_000):
    return {"weight": torch.zeros(num_elements), "optimizer": {"step": None, "moment": torch.zeros(37, 5)}}


def assert_holds(store, step):
    """The newest checkpoint is `step` and has exactly what was saved then."""
    newest, state = store.newest(), blank()
    assert newest is not None
    assert int(newest.name.lstrip(".")[5:13]) == step
    assert store.load(newest, state) == {"step": step}
    expected = state_at(step)
    assert state["optimizer"]["step"] == step
    assert torch.equal(state["weight"], expected["weight"])
    assert torch.equal(state["optimizer"]["moment"], expected["optimizer"]["moment"])


def save(store, step, block=True):
    store.save(step, state_at(step), {"step": step}, block=block)
    store.wait()


def leftovers(folder):
    return sorted(n for n in os.listdir(folder) if n.startswith(".") and n != ".lock")


def newest_step(store):
    path = store.newest()
    return None if path is None else int(path.name.lstrip(".")[5:13])


# ------------------------------------------------------------------------ kill


@pytest.mark.parametrize("num_kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_kill_at_any_instant_loses_nothing_acknowledged(server, tmp_path, record_testsuite_property, num_kills):
    folder, draw = tmp_path / "run", random.Random(num_kills)
    first, num_mid_save, num_unacknowledged = 1, 0, 0
    for kill in range(num_kills):
        pid = server.start(folder, first, 10**6, block=kill % 2 == 0, resume=kill > 0)
        began = time.monotonic()
        server.wait_for(1)
        server.wait_for(2)
        typical_s = (time.monotonic() - began) / 2
        time.sleep(draw.uniform(0, 2 * typical_s))
        os.kill(pid, signal.SIGKILL)
        assert server.status() == signal.SIGKILL
        acknowledged = server.steps()
        assert len(acknowledged) >= 2  # new steps before every kill, or the kill would prove nothing
        store = CheckpointStore(folder)
        found = newest_step(store)
        assert acknowledged[-1] <= found <= acknowledged[-1] + 1
        assert store.problems == []  # not even damaged and passed over
        assert_holds(store, found)
        num_mid_save += bool(leftovers(folder))
        num_unacknowledged += found > acknowledged[-1]
        first = found + 1
    assert num_mid_save > num_kills // 10  # the kills landed inside saves
    record_testsuite_property(
        "kill -9", {"landed": num_kills, "left_a_save_unfinished": num_mid_save, "after_the_rename": num_unacknowledged, "lost": 0}
    )
    store = CheckpointStore(folder, keep=2)
    store.save(first, state_at(first), {"step": first})
    assert leftovers(folder) == []


@pytest.mark.parametrize("block", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_kill_between_stages(server, tmp_path, stage, block):
    folder = tmp_path / "run"
    server.start(folder, 1, 9, kill_at=[3, stage], block=block)
    assert server.status() == signal.SIGKILL
    assert server.steps() == [1, 2]
    store = CheckpointStore(folder, keep=2)
    step = 3 if STAGES.index(stage) >= STAGES.index("renamed") else 2
    assert_holds(store, step)
    assert store.problems == []
    store.save(step + 1, state_at(step + 1), {"step": step + 1})
    assert leftovers(folder) == []
    assert sorted(os.listdir(folder))[1:] == [f"step-{s:08d}" for s in (step, step + 1)]


@pytest.mark.parametrize("stage", ["synced", "replaced", "renamed"])
def test_kill_while_a_step_is_replaced(server, tmp_path, stage):
    folder = tmp_path / "run"
    for step in (1, 2):
        CheckpointStore(folder).save(step, state_at(step), {"step": step})
    server.start(folder, 2, 2, kill_at=[2, stage])
    assert server.status() == signal.SIGKILL
    assert bool([n for n in leftovers(folder) if ".old-" in n]) == (stage != "synced")
    store = CheckpointStore(folder)
    assert_holds(store, 2)
    store.save(3, state_at(3), {"step": 3})
    assert leftovers(folder) == []
    assert sorted(os.listdir(folder))[1:] == [f"step-{s:08d}" for s in (1, 2, 3)]


def test_one_writer_at_a_time(server, tmp_path):
    folder = tmp_path / "run"
    pid = server.start(folder, 1, 2, sleep_at=[2, "tensors"])
    server.wait_for(2)
    store = CheckpointStore(folder)
    with pytest.raises(InputError, match="another process is saving here"):
        store.save(5, state_at(5), {"step": 5})
    assert [n for n in leftovers(folder) if ".tmp-" in n]  # what the other one is writing is not touched
    assert_holds(store, 1)
    os.kill(pid, signal.SIGKILL)
    server.status()
    store.save(5, state_at(5), {"step": 5})  # the lock died with its holder
    assert leftovers(folder) == []


# ----------------------------------------------------------- a disk that fails

CALLS = ("open", "write", "fsync", "rename", "mkdir")
REAL = {name: getattr(os, name) for name in CALLS}


@contextmanager
def failing(monkeypatch, code, first, *, persistent, short=False):
    """The calls from number `first` on (or that one alone) fail; yields the calls made and the number of faults."""
    seen = {"calls": [], "faults": 0}

    def wrap(name):
        def call(*args, **kwargs):
            seen["calls"].append(name)
            number = len(seen["calls"])
            if number == first or (persistent and number > first):
                seen["faults"] += 1
                if short and name == "write" and len(args[1]) > 1:
                    return REAL["write"](args[0], args[1][: len(args[1]) // 2])
                if not short:
                    raise OSError(code, os.strerror(code), str(args[0]) if isinstance(args[0], (str, Path)) else None)
            return REAL[name](*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrap(name))
        yield seen


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_every_call_of_a_save_may_fail(tmp_path, monkeypatch, record_testsuite_property, code, persistent, replace):
    num_survived, kinds = 0, set()
    for n in itertools.count(1):
        folder = tmp_path / str(n)
        store = CheckpointStore(folder, keep=2)
        for step in (1, 2):
            store.save(step, state_at(step), {"step": step})
        step = 2 if replace else 3
        problems = []
        store = CheckpointStore(folder, keep=2, on_problem=problems.append)
        block = n % 2 == 0
        with failing(monkeypatch, code, n, persistent=persistent) as seen:
            try:
                save(store, step, block)
                raised = None
            except InputError as error:
                raised = error
        if not seen["faults"]:
            break
        kinds.add(seen["calls"][n - 1])
        if raised is None:  # only what comes after the checkpoint stands may fail softly, and not in silence
            assert problems or not leftovers(folder)
            assert newest_step(CheckpointStore(folder)) == step
        else:
            assert os.strerror(code) in str(raised)
            assert str(folder) in str(raised)
            assert "bytes are needed" in str(raised)
        after = CheckpointStore(folder, keep=2)
        found = newest_step(after)
        assert found in ({2, step} if raised else {step})
        assert_holds(after, found)
        assert after.problems == []
        after.save(4, state_at(4), {"step": 4})
        assert_holds(after, 4)
        assert leftovers(folder) == []
        num_survived += 1
    assert kinds == set(CALLS)
    assert num_survived >= 15
    record_testsuite_property(f"{errno.errorcode[code]}, persistent={persistent}, replace={replace}", {"landed": n - 1, "survived": num_survived})


def test_what_is_being_deleted_no_longer_looks_like_a_checkpoint(tmp_path, monkeypatch):
    for num_unlinked in range(4):
        folder = tmp_path / str(num_unlinked)
        save(CheckpointStore(folder), 1)
        store, unlink, calls = CheckpointStore(folder, keep=1), os.unlink, itertools.count()

        def fail(*args, num_unlinked=num_unlinked, unlink=unlink, calls=calls, **kwargs):
            if next(calls) >= num_unlinked:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return unlink(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", fail)
            save(store, 2)
        assert [n for n in os.listdir(folder) if n.startswith("step")] == ["step-00000002"]
        assert ["could not be deleted" in p.rule for p in store.problems] == [True]
        save(store, 3)
        assert sorted(os.listdir(folder)) == [".lock", "step-00000003"]


def test_short_writes_are_completed(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    with failing(monkeypatch, 0, 1, persistent=True, short=True) as seen:
        store.save(1, state_at(1), {"step": 1})
    assert seen["calls"].count("write") > 50
    assert_holds(store, 1)


@pytest.mark.parametrize("num_sizes", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_files_that_may_not_grow(tmp_path, num_sizes):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, state_at(1), {"step": 1})
    largest = max(p.stat().st_size for p in store.newest().iterdir())
    for i in range(num_sizes):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, ((largest - 1) * i // (num_sizes - 1), limits[1]))
        try:
            with pytest.raises(InputError, match=r"File too large, 80,740 bytes are needed") as caught:
                save(store, 2 + i, i % 2 == 0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert str(tmp_path) in str(caught.value)
        assert leftovers(tmp_path) == []
        assert_holds(store, 1)
    store.save(99, state_at(99), {"step": 99})
    assert_holds(store, 99)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"):
        CheckpointStore(tmp_path / "run").save(1, state_at(1), {})


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(InputError, match="run"):
        CheckpointStore(tmp_path / "run").save(1, state_at(1), {})
    assert (tmp_path / "run").read_text() == "mine"


def test_nothing_counts_before_it_is_on_the_disk(tmp_path, monkeypatch):
    """A power cut keeps only what was forced out: before the rename every file and the folder, after it the parent."""
    events = []

    def note(name):
        def call(first, *rest, **kwargs):
            result = REAL[name](first, *rest, **kwargs)
            where = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
            wrote = name != "open" or (rest and rest[0] & os.O_CREAT)
            if wrote:
                events.append((name, where))
            return result

        return call

    store = CheckpointStore(tmp_path / "run")
    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, note(name))
        store.save(1, state_at(1), {"step": 1})
    renamed = next(i for i, (name, _) in enumerate(events) if name == "rename")
    temporary = events[renamed][1]
    before, after = events[:renamed], events[renamed:]
    created = [where for name, where in before if name == "open" and where.startswith(temporary)]
    assert len(created) == 4
    for path in created:
        last_write = max(i for i, event in enumerate(before) if event == ("write", path))
        assert ("fsync", path) in before[last_write:], path
    last_created = max(i for i, (name, where) in enumerate(before) if name == "open" and where.startswith(temporary))
    assert ("fsync", temporary) in before[last_created:]
    assert ("fsync", str(tmp_path / "run")) in after
    assert ("fsync", str(tmp_path)) in before  # the new folder itself
