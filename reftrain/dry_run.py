"""The real trainer on fake tensors: peak memory, FLOPs and bytes on the wire of any layout, in one process without hardware.

Nothing is modelled here: the trainer's own objects (`reftrain.steps.Engine` with its model parts, FSDP, pipelines and
optimizers, which have their states from the start) run an optimizer step on tensors that have shapes and no bytes. One rank of
each pipeline stage is simulated; the others of the stage do the same work on shards that are no larger.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from planner.errors import InputError
from reftrain.config import RunConfig
from reftrain.dry_run_kernels import is_for_gpu, kernels_of_a_gpu
from reftrain.dry_run_ledger import Ledger
from reftrain.dry_run_report import LeftOut, StageDryRun, read_step
from reftrain.dry_run_world import adapt_ddp, axis_names, simulated_rank
from reftrain.optim import local_gradients
from reftrain.parallel import Ranks
from reftrain.pipeline import kept_bytes_per_microbatch
from reftrain.runnable import check_runnable
from reftrain.steps import Engine, StepTimes

__all__ = ["DryRun", "dry_run"]

Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class DryRun:
    """What a dry run found, stage by stage."""

    stages: tuple[StageDryRun, ...]
    num_microbatches: int
    num_simulated_microbatches: int
    wall_s: float

    @property
    def peak_bytes(self) -> int:
        """The largest stage's peak."""
        return max(stage.peak_bytes for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "schema_version": 1, "peak_bytes": self.peak_bytes, "num_microbatches": self.num_microbatches,
            "num_simulated_microbatches": self.num_simulated_microbatches, "wall_s": self.wall_s, "stages": [s.to_dict() for s in self.stages],
        }  # fmt: skip


def dry_run(config: RunConfig, *, stages: Sequence[int] | None = None, rounding_bytes: int = 1, all_microbatches: bool = False) -> DryRun:
    """Runs a plan on fake tensors.

    Args:
        stages: pipeline stages to simulate; None: all.
        rounding_bytes: an allocator's block size (CUDA's is 512); 1 for none.
        all_microbatches: also those that change nothing in the peak.

    Raises:
        InputError: a layout that the trainer cannot run, a stage that is not there.
    """
    check_runnable(config, torch.device("cpu"))
    pp = config.layout.pp
    wanted = range(pp) if stages is None else stages
    wrong = [stage for stage in wanted if not 0 <= stage < pp]
    if wrong or not wanted:
        raise InputError.single("stages", list(wanted), f"must name pipeline stages from 0 to {pp - 1}", "leave it out for all of them")
    start = time.perf_counter()
    count = config.num_microbatches if all_microbatches else _microbatches_that_matter(config)
    found = tuple(_simulate(config, stage, count, rounding_bytes) for stage in wanted)
    return DryRun(found, config.num_microbatches, count, time.perf_counter() - start)


def _microbatches_that_matter(config: RunConfig) -> int:
    """How many microbatches show the peak, and what those left out would move.

    Without a pipeline the first begins without gradients and the last synchronizes them; those between are alike, but that FSDP
    gathers some weights once more in the second. A pipeline fills within pp microbatches and repeats itself after that, an
    interleaved one within 2 pp; GPipe keeps all of them.
    """
    layout, count = config.layout, config.num_microbatches
    if layout.pp == 1:
        return min(count, 4)
    if layout.schedule == "gpipe":
        return count
    return min(count, (3 if layout.schedule == "interleaved_1f1b" else 2) * layout.pp)


def _simulate(config: RunConfig, stage: int, count: int, rounding_bytes: int, num_steps: int | None = None) -> StageDryRun:
    start, layout = time.perf_counter(), config.layout
    shorter = replace(config, global_batch_size=count * layout.dp * layout.micro_batch_size)
    with simulated_rank(layout, stage * (layout.num_devices // layout.pp)) as ranks, ExitStack() as stack:
        if is_for_gpu(config):
            stack.enter_context(kernels_of_a_gpu())
        engine = Engine(shorter, ranks)
        engine.narrow()
        ledger = Ledger(axis_names(ranks), rounding_bytes)
        for part in engine.parts:
            if isinstance(part, DistributedDataParallel):
                adapt_ddp(part)
        stack.enter_context(ledger)
        stack.enter_context(ledger.listening(engine.models))
        places = {id(weight): name.rpartition(".")[0] for model in engine.models for name, weight in model.named_parameters()}
        ledger.hold(_named_weights(engine), "weights")
        microbatches, others = _batch(config, ranks, count), _batch(config, ranks, config.num_microbatches - count)
        ledger.hold((("", tensor) for pair in (*microbatches, *others) for tensor in pair), "inputs")
        ledger.hold(_tables(engine), "inputs")
        kept = {
            category: torch.empty(len(others) * num_bytes, dtype=torch.uint8)
            for category, num_bytes in kept_bytes_per_microbatch(config, engine.models).items()
        }
        for category, tensor in kept.items():
            ledger.hold([("", tensor)], category)
        engine._start_optimizers()
        ledger.hold(_named_states(engine, places), "optimizer")
        # DDP makes its buckets anew after the first step.
        for step in range(num_steps or (2 if ranks.uses_ddp else 1)):
            ledger.begin_step()
            _one_step(engine, ledger, microbatches, others, places, step)
        period = layout.pp if layout.schedule == "interleaved_1f1b" else 1
        left_out = LeftOut(count, config.num_microbatches - count, period, len(engine.parts))
        return read_step(ledger.step, stage, ranks.rank, time.perf_counter() - start, left_out)


def _one_step(engine: Engine, ledger: Ledger, microbatches: Pairs, others: Pairs, places: dict[int, str], step: int) -> None:
    """As the trainer's loop does it; a pipeline joins all its microbatches first, those left out too."""
    with ledger.during("forward"):
        joined = [torch.cat(tensors) for tensors in zip(*others, strict=True)] if engine.pipeline is not None else []
        loss = engine.forward_backward(microbatches, StepTimes())
        del joined
    for weight, grad in local_gradients(engine.parts):
        ledger.mark(grad, "gradients").module = places[id(weight)]
    with ledger.during("clip"):
        _, norm = engine.agree(loss)
    with ledger.during("optimizer"):
        engine.update(step, norm)
    ledger.hold(_named_states(engine, places), "optimizer")


def _named_states(engine: Engine, places: dict[int, str]) -> Iterator[tuple[str, Tensor]]:
    for optimizer in engine.optimizers:
        for weight, state in optimizer.state.items():
            yield from ((places[id(weight)], value) for value in state.values() if isinstance(value, Tensor))


def _named_weights(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    for model in engine.models:
        yield from ((name.rpartition(".")[0], parameter) for name, parameter in model.named_parameters())
        yield from ((name.rpartition(".")[0], buffer) for name, buffer in model.named_buffers())


def _tables(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    for model in engine.models:
        yield from (("positions", value) for value in vars(model.positions).values() if isinstance(value, Tensor))


def _batch(config: RunConfig, ranks: Ranks, count: int) -> Pairs:
    shape = (config.layout.micro_batch_size, config.seq_len // config.layout.cp)
    return [
        (torch.zeros(shape, dtype=torch.int64, device=ranks.device), torch.zeros(shape, dtype=torch.int64, device=ranks.device)) for _ in range(count)
    ]
