"""Which steps of a process are looked at closely, and how; none of them is timed.

The second step counts FLOPs and live bytes. With several processes the third counts collectives and the next two are profiled for the time
of communication that nothing hides. With `--profile` a few more become a trace. All others carry a handful of clock reads and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from reftrain.communication import CollectiveCounter, Exposed, find_exposed
from reftrain.measure import INSTRUMENTED_STEP, WARMUP_STEPS, Instruments
from reftrain.parallel import Ranks
from reftrain.steps import Engine, StepTimes
from reftrain.trace import Tracer, make_profiler, read_spans

__all__ = ["Looks"]

COUNTED_STEP = 2
"""The first one without what DDP does once: it parts its gradients anew in the second step."""
PROFILED_STEPS = (3, 4)
WATCHED = "watched step"


class Looks:
    """Looks at steps, numbered from 0 in each process.

    Args:
        num_traced: steps for `--profile`; 0 for none.
    """

    def __init__(self, ranks: Ranks, engine: Engine, out: Path, num_traced: int) -> None:
        self.ranks = ranks
        self.instruments = Instruments()
        self.collectives = CollectiveCounter()
        self._profiled: list[Exposed] = []
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
                dist.barrier()  # a rank whose profiler starts late would have the others wait inside the step
                with record_function(WATCHED):
                    yield
            self._profiled.append(find_exposed(read_spans(profiler), WATCHED, self.ranks.device))
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

    @contextmanager
    def agreeing(self, number: int) -> Iterator[None]:
        """Around the agreement of ranks on loss and norm, which no phase holds: a span of its own in a trace."""
        if number not in self._traced or self.ranks.world_size == 1:
            yield
            return
        with record_function("communication"):
            yield

    @property
    def has_missed_trace(self) -> bool:
        """Whether a trace was asked for and no step came that far."""
        return len(self._traced) > 0 and self._tracer.num_steps == 0

    def finish(self) -> list[dict[str, Any]]:
        """Saves the trace if one has begun; also for a run that ends in the middle of it."""
        if not self._tracer.is_running:
            return []
        self._tracer.save()
        return [{"kind": "traced", "num_steps": self._tracer.num_steps}]

    def _communication(self) -> dict[str, Any]:
        """The quieter of the profiled steps (what else the machine does only ever adds), with the counts of the step before them."""
        found = min(self._profiled, key=lambda step: step.exposed_s)
        return {
            "step_s": found.step_s,
            "exposed_s": found.exposed_s,
            "collectives": {kind: {**count, "in_flight_s": found.in_flight_s.get(kind, 0.0)} for kind, count in self.collectives.found.items()},
        }

    def _gather(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        if self.ranks.world_size == 1:
            return [mine]
        every: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(every, mine)
        return every
