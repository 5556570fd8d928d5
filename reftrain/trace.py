"""`--profile`: a few steps under torch's profiler, as one trace per rank for ui.perfetto.dev and a table of the ops that took longest.

Out: `traces/rankN.json.gz` (Chrome's trace format) and `traces/summary.json`. Spans carry the names of the phases of a step and of blocks;
collectives appear under their own names (`c10d::`, `gloo:`, `nccl:`). A profiled step is slower than a plain one, by up to a half where ops
are small: compare shares, not seconds.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as Profiler  # noqa: N812 - it is a class

from planner.errors import InputError
from planner.files import sync_folder, to_json, write_text
from reftrain.parallel import Ranks
from reftrain.steps import StepTimes

__all__ = ["Span", "Tracer", "make_profiler", "read_spans", "top_ops"]

NUM_TOP_OPS = 30


def make_profiler(device: torch.device) -> Profiler:
    """A profiler of what the host does, and the GPU where there is one; it keeps quiet."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it tells on standard error when it starts and stops
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    return Profiler(activities=activities)


@dataclass(frozen=True)
class Span:
    """Something that ran for a while, on a thread of the host or on a device; times in seconds of one clock."""

    name: str
    start_s: float
    end_s: float
    thread: int = 0
    is_async: bool = False
    """A transfer in the background: it occupies no thread."""
    is_on_device: bool = False

    @property
    def duration_s(self) -> float:
        """End less start."""
        return self.end_s - self.start_s


def read_spans(profiler: Profiler) -> list[Span]:
    """What a profiler that has stopped has seen, without annotations that it repeats for the device.

    The raw events: torch's own tree of them (`profiler.events()`) takes some 50 µs per op, which is minutes for a large model.
    """
    inner = profiler.profiler
    if inner is None or inner.kineto_results is None:
        return []
    events = inner.kineto_results.events()
    first_ns = min((e.start_ns() for e in events), default=0)  # as seconds since 1970 they would lose their last digits
    return [
        Span(
            e.name(),
            (e.start_ns() - first_ns) * 1e-9,
            (e.end_ns() - first_ns) * 1e-9,
            e.start_thread_id(),
            e.is_async(),
            e.device_type() != DeviceType.CPU,
        )
        for e in events
        if not (e.is_user_annotation() and e.device_type() != DeviceType.CPU)
    ]


def top_ops(spans: Iterable[Span], count: int = NUM_TOP_OPS) -> list[dict[str, Any]]:
    """Ops by the time they took themselves, without what they called; `fraction` is of that time over all ops.

    Example:
        >>> top_ops([Span("outer", 0.0, 4.0), Span("inner", 1.0, 2.0)])[1]
        {'op': 'inner', 'calls': 1, 'total_s': 1.0, 'self_s': 1.0, 'fraction': 0.25}
    """
    calls: dict[str, int] = defaultdict(int)
    total_s: dict[str, float] = defaultdict(float)
    self_s: dict[str, float] = defaultdict(float)
    open_spans: dict[int, list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda s: (s.start_s, -s.end_s)):
        calls[span.name] += 1
        total_s[span.name] += span.duration_s
        self_s[span.name] += span.duration_s
        around = open_spans[span.thread]
        while around and around[-1].end_s <= span.start_s:
            around.pop()
        if around:
            self_s[around[-1].name] -= span.duration_s
        around.append(span)
    whole = sum(self_s.values()) or 1.0
    order = sorted(self_s, key=lambda name: -self_s[name])[:count]
    return [{"op": n, "calls": calls[n], "total_s": total_s[n], "self_s": self_s[n], "fraction": self_s[n] / whole} for n in order]


@dataclass
class TracedTimes(StepTimes):
    """Times of a step whose phases are spans of the trace too."""

    @contextmanager
    def phase(self, name: str, device: torch.device) -> Iterator[None]:
        """See `StepTimes.phase`."""
        with record_function(name), super().phase(name, device):
            yield


@dataclass
class Tracer:
    """Profiles steps of this rank, from the first `step` to `save`."""

    folder: Path
    ranks: Ranks
    blocks: Sequence[tuple[str, nn.Module]] = ()
    """Modules whose forward passes are spans of that name."""
    num_steps: int = 0
    _profiler: Profiler | None = None
    _hooks: list[Any] = field(default_factory=list)
    _inside: list[ExitStack] = field(default_factory=list)

    @contextmanager
    def step(self, number: int) -> Iterator[StepTimes]:
        """One step, as a span; the first one starts the profiler."""
        if self._profiler is None:
            self._profiler = make_profiler(self.ranks.device)
            self._mark_blocks()
            self._profiler.start()
        with record_function(f"step {number}"):
            yield TracedTimes()
        self.num_steps += 1

    def _mark_blocks(self) -> None:
        for name, block in self.blocks:

            def enter(_module: nn.Module, _args: Any, name: str = name) -> None:
                stack = ExitStack()
                stack.enter_context(record_function(name))
                self._inside.append(stack)

            def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
                self._inside.pop().close()

            self._hooks += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]

    @property
    def is_running(self) -> bool:
        """Whether there is something to save."""
        return self._profiler is not None

    def save(self) -> None:
        """Stops and writes this rank's trace, whole or not at all; rank 0 also the table of ops.

        Raises:
            InputError: it cannot be written.
        """
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.stop()
        for hook in self._hooks:
            hook.remove()
        name = f"rank{self.ranks.rank}.json.gz"
        temporary = self.folder / f".{name}"  # torch packs what ends so
        try:
            self.folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(temporary))
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / name)
            sync_folder(self.folder)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            rule = f"could not be written ({error.strerror})"
            raise InputError.single("--profile", str(self.folder / name), rule, "free space, then --resume; the checkpoints are intact") from None
        if self.ranks.is_first:
            spans = read_spans(profiler)
            host, device = ([s for s in spans if s.is_on_device == where and not s.is_async] for where in (False, True))
            table = {"schema_version": 1, "num_steps": self.num_steps, "host_ops": top_ops(host), "device_ops": top_ops(device)}
            write_text(self.folder / "summary.json", to_json(table))
