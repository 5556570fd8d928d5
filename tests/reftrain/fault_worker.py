"""A run of the real command line in a process of its own, forked from a server that has torch imported, with a window on where it is.

The window is a small file mapped by both sides, so what the run wrote last is seen even when it was killed in the same microsecond.
"""

import json
import mmap
import multiprocessing
import os
import resource
import signal
import struct
import sys
import time
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "reftrain.cli", "reftrain.train", "torch.distributed.checkpoint.state_dict", "torch.utils.flop_counter"])
FIELDS = ("microbatch", "saving", "updating", "num_steps", "num_saves")


class Window:
    """Five counters in a mapped file."""

    def __init__(self, path):
        if not path.exists():
            path.write_bytes(bytes(8 * len(FIELDS)))
        with open(path, "r+b") as file:
            self.map = mmap.mmap(file.fileno(), 0)

    def put(self, name, value):
        struct.pack_into("<q", self.map, 8 * FIELDS.index(name), value)

    def get(self):
        return dict(zip(FIELDS, struct.unpack_from(f"<{len(FIELDS)}q", self.map), strict=True))


def watch(window, slow_save_s=0.0):
    """Makes the trainer of this process tell where it is. Nothing that it computes changes."""
    from reftrain.checkpoint import CheckpointStore
    from reftrain.measure import MetricsLog
    from reftrain.model import Transformer
    from reftrain.steps import Engine

    def wrap(owner, name, before, after):
        real = getattr(owner, name)

        def wrapper(self, *args, **kwargs):
            before(*args)
            try:
                return real(self, *args, **kwargs)
            finally:
                after(*args)

        setattr(owner, name, wrapper)

    def count(name):
        window.put(name, window.get()[name] + 1)

    wrap(Transformer, "forward", lambda *a: count("microbatch"), lambda *a: None)
    wrap(Engine, "forward_backward", lambda *a: window.put("microbatch", 0), lambda *a: window.put("microbatch", 0))
    wrap(Engine, "update", lambda *a: window.put("updating", 1), lambda *a: window.put("updating", 0))
    wrap(
        CheckpointStore,
        "_write",
        lambda *a: (window.put("saving", 1), time.sleep(slow_save_s)),
        lambda *a: (window.put("saving", 0), count("num_saves")),
    )
    wrap(MetricsLog, "write", lambda record: None, lambda record: count("num_steps") if record["kind"] == "step" else None)


def poison(kind, first, last):
    """Spoils the real loss and gradients of the steps whose data begin at positions first .. last, before the trainer looks at them."""
    import torch

    from reftrain.batches import Batches
    from reftrain.steps import Engine

    factor = {"nan": float("nan"), "inf": float("inf"), "100x": 100.0}[kind]
    real_batches, real_work, at = Batches.microbatches, Engine.forward_backward, [0]

    def microbatches(self, position):
        at[0] = position
        return real_batches(self, position)

    def forward_backward(self, *args):
        loss = real_work(self, *args)
        if first <= at[0] <= last:
            with torch.no_grad():
                for part in self.parts:
                    for parameter in part.parameters():
                        parameter.grad.mul_(factor)
            return loss * factor
        return loss

    Batches.microbatches, Engine.forward_backward = microbatches, forward_backward


def child(arguments, output, window_path, options):
    """The forked process: `python -m reftrain ARGUMENTS`."""
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    signal.alarm(100)  # should nobody be left to end it
    import torch

    from reftrain.cli import main

    torch.set_num_threads(1)
    watch(Window(window_path), options.get("slow_save_s", 0.0))
    if "poison" in options:
        poison(*options["poison"])
    if "max_file_bytes" in options:
        resource.setrlimit(resource.RLIMIT_FSIZE, (options["max_file_bytes"], options["max_file_bytes"]))
    sys.argv = ["reftrain", *arguments]
    main()


class Run:
    """One process of a run."""

    number = 0

    def __init__(self, plan, out, *more, **options):
        Run.number += 1
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.output = out, out.with_name(f"{out.name}.{Run.number}.txt")
        window_path = out.with_name(f"{out.name}.{Run.number}.window")
        self.window = Window(window_path)
        arguments = ["run", str(plan), "--out", str(out), *more]
        self.process = CONTEXT.Process(target=child, args=(arguments, str(self.output), window_path, options))
        self.process.start()

    @property
    def text(self):
        return self.output.read_text()

    def wait_for(self, condition, timeout_s=60.0):
        """Until `condition(window)`; False when the process ended before."""
        end = time.monotonic() + timeout_s
        while not condition(self.window.get()):
            if not self.process.is_alive():
                return condition(self.window.get())
            if time.monotonic() > end:
                self.signal(signal.SIGKILL)
                raise TimeoutError(self.text)
            time.sleep(0.0005)
        return True

    def signal(self, number):
        """Sends a signal; returns where the process was when it was sent."""
        where, self.signalled = self.window.get(), time.monotonic()
        if self.process.exitcode is None:
            os.kill(self.process.pid, number)
        return where

    def end(self, timeout_s=60.0):
        """The exit status, after `took_s` since the signal; negative for the signal that ended it."""
        self.process.join(timeout_s)
        self.took_s = time.monotonic() - getattr(self, "signalled", 0.0)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(self.text)
        return self.process.exitcode


def raw_records(out):
    """Every whole line of the log, in the order written."""
    lines = (out / "metrics.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def root():
    return Path(__file__).resolve().parents[2]
