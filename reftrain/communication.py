"""What crosses ranks in a step: collectives counted by kind, with their bytes, and the time of them that nothing hides.

In: an early step or two of a run of several processes, none of them timed. Counting looks at every op that reaches torch's dispatcher, whoever
calls it (DDP's reducer, FSDP, DTensor, pipeline stages); timing reads the profiler.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reftrain.trace import Span

__all__ = ["CollectiveCounter", "Exposed", "collective_kind", "communication_facts", "find_exposed"]

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send", "recv", "reduce", "gather", "scatter", "barrier")
NAMESPACES = ("c10d", "_c10d_functional")
WAIT = "_c10d_functional::wait_tensor"
Interval = tuple[float, float]


def collective_kind(name: str) -> str | None:
    """The collective that an op, a backend's event or a kernel performs.

    Example:
        >>> [collective_kind(n) for n in ("c10d::_allgather_base_", "gloo:all_reduce", "ncclDevKernel_ReduceScatter_Sum_f32", "aten::mm")]
        ['all_gather', 'all_reduce', 'reduce_scatter', None]
    """
    if "::" in name and name.split("::")[0] not in NAMESPACES:
        return None
    plain = name.rsplit(":", 1)[-1].removeprefix("ncclDevKernel_").removeprefix("ncclKernel_").replace("_", "").lower()
    return next((kind for kind in KINDS if plain.startswith(kind.replace("_", ""))), None)


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives that this rank takes part in while it is on.

    `found` holds per kind `calls` and `bytes`: the sum of messages, where a message is the larger of what goes in and what comes out
    (the gathered tensor of an all-gather, the whole input of a reduce-scatter), as benchmarks of collectives count it. What a backend's
    algorithm sends for that is not in it: a ring all-reduce over n ranks moves 2 (n-1)/n of the message.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[str, dict[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the op; counts it if it is a collective. What a functional collective calls inside is not seen again."""
        out = func(*args, **(kwargs or {}))
        if func.namespace in NAMESPACES and (kind := collective_kind(func.name())):
            count = self.found.setdefault(kind, {"calls": 0, "bytes": 0})
            count["calls"] += 1
            count["bytes"] += max(sum(t.nbytes for t in tree_leaves(value) if isinstance(t, Tensor)) for value in (*args, out))
        return out


@dataclass(frozen=True)
class Exposed:
    """What communication took of one step of this rank."""

    step_s: float
    exposed_s: float
    """Seconds in which this rank did nothing but communicate; see `find_exposed`."""
    in_flight_s: dict[str, float]
    """Per kind, seconds in which at least one such collective was under way, hidden or not; kinds may overlap each other."""


def find_exposed(spans: Sequence[Span], window: str, device: torch.device) -> Exposed:
    """Times of communication within the span named `window`. No moment counts twice.

    Exposed on a GPU: a collective's kernel was running and no other kernel was. On a CPU: the thread that trains was inside a collective or a
    wait for one, or it ran no op while a transfer was under way that ended before its next op (so that is what the thread was waiting for;
    the waits of DDP and of pipelines leave no event of their own). Ops that a collective runs on its way (copies) are not in it. Waiting for a slower
    rank is, and so is a pipeline's bubble. A profiled step is slower than a plain one, in its ops more than in its transfers: what could hide
    behind ops has more of them to hide behind.
    """
    step = next(s for s in spans if s.name == window and not s.is_on_device)
    # A kernel may end after the call that launched it; nothing else runs then.
    inside = [s for s in spans if s.start_s >= step.start_s and (s.start_s < step.end_s or s.is_on_device) and s.name != window]
    exposed = _exposed_on_gpu(inside) if device.type == "cuda" else _exposed_on_cpu(inside, step)
    return Exposed(step.duration_s, _length(exposed), _in_flight_s(inside))


def _exposed_on_gpu(spans: Sequence[Span]) -> list[Interval]:
    kernels = [s for s in spans if s.is_on_device]
    messages, others = ([s for s in kernels if ("nccl" in s.name.lower()) == is_message] for is_message in (True, False))
    return _without(_union(messages), _union(others))


def _exposed_on_cpu(spans: Sequence[Span], step: Span) -> list[Interval]:
    own = [s for s in spans if s.thread == step.thread and not s.is_async]
    calls = [s for s in own if collective_kind(s.name) or s.name == WAIT]
    ops = _union(s for s in _leaves(own) if s.name.startswith("aten::"))
    transfers = [s for s in spans if s.is_async and collective_kind(s.name)]
    ends = [step.start_s, *sorted(s.end_s for s in transfers)]
    pauses = [(start, ends[bisect_right(ends, end) - 1]) for start, end in _without([(step.start_s, step.end_s)], ops)]
    waits = _common([(start, end) for start, end in pauses if end > start], _union(transfers))
    return _without(_merge([*_intervals(calls), *waits]), ops)


def _in_flight_s(spans: Sequence[Span]) -> dict[str, float]:
    """Each transfer is named by the call that began it, first by first: gloo, for one, performs a reduce-scatter as an all-reduce."""
    calls = sorted((s for s in spans if s.name.startswith("c10d::") and collective_kind(s.name)), key=lambda s: s.start_s)
    transfers = sorted((s for s in spans if (s.is_async or s.is_on_device) and collective_kind(s.name)), key=lambda s: s.start_s)
    named: Iterable[Span] = calls if len(calls) == len(transfers) else transfers
    by_kind: dict[str, list[Span]] = {}
    for name, transfer in zip(named, transfers, strict=True):
        by_kind.setdefault(collective_kind(name.name) or "", []).append(transfer)
    return {kind: _length(_union(found)) for kind, found in by_kind.items()}


def communication_facts(per_rank: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What ranks have found about themselves, as `summary.json` tells it: times as means over ranks, counts of the busiest rank."""
    num = len(per_rank)
    exposed, step = (sum(rank[key] for rank in per_rank) / num for key in ("exposed_s", "step_s"))
    kinds = sorted({kind for rank in per_rank for kind in rank["collectives"]})
    return {
        "exposed_s": exposed, "exposed_s_per_rank": [rank["exposed_s"] for rank in per_rank], "step_s": step, "step_fraction": exposed / step,
        "collectives": {
            kind: {key: max(rank["collectives"].get(kind, {}).get(key, 0) for rank in per_rank) for key in ("calls", "bytes", "in_flight_s")}
            for kind in kinds
        },
    }  # fmt: skip


def _intervals(spans: Iterable[Span]) -> list[Interval]:
    return [(s.start_s, s.end_s) for s in spans]


def _union(*groups: Iterable[Span]) -> list[Interval]:
    return _merge([interval for spans in groups for interval in _intervals(spans)])


def _merge(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint intervals, in order, that cover the same moments."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _without(kept: Sequence[Interval], removed: Sequence[Interval]) -> list[Interval]:
    """Moments of `kept` that are not in `removed`; both disjoint and in order."""
    left: list[Interval] = []
    first = 0
    for start, end in kept:
        while first < len(removed) and removed[first][1] <= start:
            first += 1
        place = first
        while place < len(removed) and removed[place][0] < end:
            if removed[place][0] > start:
                left.append((start, removed[place][0]))
            start = max(start, removed[place][1])
            place += 1
        if start < end:
            left.append((start, end))
    return left


def _common(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """Moments in both."""
    return _without(first, _without(first, second))


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def _leaves(spans: Iterable[Span]) -> list[Span]:
    """Spans that call nothing."""
    leaves: list[Span] = []
    by_thread: dict[int, list[Span]] = {}
    for span in sorted(spans, key=lambda s: (s.start_s, -s.end_s)):
        by_thread.setdefault(span.thread, []).append(span)
    for own in by_thread.values():
        leaves += [span for span, following in zip(own, [*own[1:], None], strict=True) if following is None or following.start_s >= span.end_s]
    return leaves
