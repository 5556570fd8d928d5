"""Which steps of a process are looked at closely, and how; none of them is timed.

The second step counts FLOPs and live bytes. With several processes the third counts collectives and the next two are profiled for the time
of communication that nothing hides. With `--profile` a few more become a trace. All others carry a handful of clock reads and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from reftrain.communication import CollectiveCounter, exposed_s, in_flight_s
from reftrain.measure import INSTRUMENTED_STEP, WARMUP_STEPS, Instruments
from reftrain.parallel import Ranks
from reftrain.steps import Engine, StepTimes
from reftrain.trace import Tracer, make_profiler, read_spans

__all__ = ["Looks"]

COUNTED_STEP = 2
"""The first one without what DDP does once: it parts its gradients anew in the second step."""
PROFILED_STEPS = (3, 4)


class Looks:
    """Looks at steps, numbered from 0 in each process.

    Args:
        num_traced: steps for `--profile`; 0 for none.
    """

    def __init__(self, ranks: Ranks, engine: Engine, out: Path, num_traced: int) -> None:
        self.ranks = ranks
        self.instruments = Instruments()
        self.collectives = CollectiveCounter()
        self._profiled: list[dict[str, Any]] = []
        first = max(PROFILED_STEPS) + 1 if ranks.world_size > 1 else WARMUP_STEPS
        self._traced = range(first, first + num_traced)
        compiled = engine.config.training.compile  # hooks would have the blocks compiled again
        blocks = [] if compiled else [(f"block {name}", block) for model in engine.models for name, block in model.blocks.items()]
        self._tracer = Tracer(out / "traces", ranks, blocks)

    def is_timed(self, number: int) -> bool:
        """Whether a step is past warm-up and nothing looks at it."""
        return number >= self._traced.start and number not in self._traced

    @contextmanager
    def step(self, number: int) -> Iterator[StepTimes]:
        """Around a whole step."""
        if number not in self._traced:
            yield StepTimes()
            return
        with self._tracer.step(number) as times:
            yield times

    @contextmanager
    def work(self, number: int, tensors: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
        """Around all of a step but its data; `tensors` gives those alive before."""
        if number == INSTRUMENTED_STEP:
            with self.instruments.watch(list(tensors()), self.ranks.device):
                yield
        elif self.ranks.world_size > 1 and number == COUNTED_STEP:
            with self.collectives:
                yield
        elif self.ranks.world_size > 1 and number in PROFILED_STEPS:
            with make_profiler(self.ranks.device) as profiler:
                start = time.perf_counter()
                yield
                step_s = time.perf_counter() - start
            spans = read_spans(profiler)
            self._profiled.append({"step_s": step_s, "exposed_s": exposed_s(spans, self.ranks.device), "in_flight_s": in_flight_s(spans)})
        else:
            yield

    def records(self, number: int) -> list[dict[str, Any]]:
        """What is known after a step and was not before it: lines of the log, over all ranks. Every rank calls it."""
        if number == INSTRUMENTED_STEP:
            found = self.instruments
            mine = {"peak_bytes": found.peak_bytes, "state_bytes": found.state_bytes, "flops": found.total_flops,
                    "attention_flops": found.attention_flops}  # fmt: skip
            return [{"kind": "measured", "per_rank": self._gather(mine)}]
        if self.ranks.world_size > 1 and number == max(PROFILED_STEPS):
            return [{"kind": "communication", "per_rank": self._gather(self._communication())}]
        return self.finish() if self._traced and number == self._traced[-1] else []

    def finish(self) -> list[dict[str, Any]]:
        """Saves the trace if one has begun; also for a run that ends in the middle of it."""
        if not self._tracer.is_running:
            return []
        self._tracer.save()
        return [{"kind": "traced", "num_steps": self._tracer.num_steps}]

    def _communication(self) -> dict[str, Any]:
        """Means over the profiled steps, with the counts of the step before them."""
        num = len(self._profiled)

        def mean(value: Callable[[dict[str, Any]], float]) -> float:
            return sum(map(value, self._profiled)) / num

        return {
            "step_s": mean(lambda found: found["step_s"]),
            "exposed_s": mean(lambda found: found["exposed_s"]),
            "collectives": {
                kind: {**count, "in_flight_s": mean(lambda found, kind=kind: found["in_flight_s"].get(kind, 0.0))}  # type: ignore[misc]
                for kind, count in self.collectives.found.items()
            },
        }

    def _gather(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        if self.ranks.world_size == 1:
            return [mine]
        every: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(every, mine)
        return every
