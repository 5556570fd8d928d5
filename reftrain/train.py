"""The training loop, top to bottom: start, resume, step, look, save, stop."""

from __future__ import annotations

import datetime
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from planner.errors import InputError
from planner.files import parse_json, read_text
from reftrain.batches import open_batches
from reftrain.best import Best
from reftrain.checkpoint import CheckpointStore
from reftrain.communication import communication_facts
from reftrain.config import RunConfig
from reftrain.guard import SpikeGuard, TrainingDivergedError
from reftrain.host_memory import keep_freed_memory
from reftrain.looks import Looks
from reftrain.measure import Summary, Utilization, find_utilization, read_metrics, summarize
from reftrain.parallel import Ranks, end_distributed, start_ranks
from reftrain.prepare_run import hold_folder, on_first_rank, prepare_data, prepare_folder
from reftrain.run_log import RunLog
from reftrain.runnable import check_runnable
from reftrain.start_weights import check_digest, load_start, model_digest
from reftrain.steps import Engine, StepTimes

__all__ = ["RunOptions", "train"]

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class RunOptions:
    """Where a run writes and how it starts."""

    out: Path
    data: str | None = None
    """`synthetic`, or a folder with token shards; None: what the plan says."""
    resume: bool = False
    device: torch.device | None = None


def train(config: RunConfig, options: RunOptions, progress: Progress = lambda record: None) -> Summary:
    """Runs a plan to its end (or to SIGTERM), writes `metrics.jsonl`, checkpoints and `summary.json` under `options.out`.

    Raises:
        InputError: a layout that cannot run here, unusable data, a folder that holds another run.
        TrainingDivergedError: bad losses that neither skipping nor rolling back cured; the last good checkpoint stays.
    """
    ranks = start_ranks(config.layout, options.device)
    try:
        set_up(config, ranks.device)
        with hold_folder(options.out, ranks):
            on_first_rank(ranks, lambda: prepare_folder(config, options.out, options.resume))
            data = options.data or on_first_rank(ranks, lambda: prepare_data(config, options.out))
            return Trainer(config, options, ranks, data, progress).run()
    finally:
        end_distributed()


def set_up(config: RunConfig, device: torch.device) -> None:
    """What a process settles before it trains: that it can, tf32 only where the plan says so, and memory kept on a CPU.

    Raises:
        InputError: a layout that cannot run here.
    """
    check_runnable(config, device)
    if device.type == "cpu":
        keep_freed_memory()
    allowed = config.workload.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


class Trainer:
    """State of one run on one rank."""

    def __init__(self, config: RunConfig, options: RunOptions, ranks: Ranks, data: str, progress: Progress) -> None:
        self.config, self.options, self.ranks, self.progress = config, options, ranks, progress
        training = config.training
        self.engine = Engine(config, ranks)
        self.batches = open_batches(config, ranks, data)
        self.best = Best(training.patience_evals)
        self.guard = SpikeGuard(training.spike_sigmas, training.max_skipped_steps, training.max_rollbacks)
        self.store = CheckpointStore(options.out / "checkpoints", training.keep_checkpoints, on_problem=lambda problem: say(f"warning: {problem}"))
        self.looks = Looks(ranks, self.engine, options.out, training.profile_steps)
        self.utilization: Utilization | None = None
        self.step = self.position = self.steps_here = 0
        self.saved_step = -1
        self.stop_signal = 0
        self.log = RunLog(options.out) if ranks.is_first else None

    def run(self) -> Summary:
        """Start or resume, then step by step to the end."""
        with self._listening(), self._saving():
            self._start()
            if finished := self._finished_before():
                return finished
            training = self.config.training
            while not self._is_over() and not self._agree_to_stop():
                self._one_step()
                if training.eval_every_steps and self.step % training.eval_every_steps == 0 and self.step < self.config.num_steps:
                    self._evaluate()
                if self.step % training.checkpoint_every_steps == 0 and self.saved_step != self.step:
                    self._save(block=not training.async_checkpoints)
            if self.saved_step != self.step:
                self._save(block=True)
            self.store.wait()
            if self.step >= self.config.num_steps:
                self._evaluate()
            return self._finish()

    def _is_over(self) -> bool:
        """All steps done, or no hope of a better one."""
        return self.step >= self.config.num_steps or self.best.is_over

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """SIGTERM and SIGINT: finish the step, save, leave. A second one ends at once."""

        def note(number: int, _frame: object) -> None:
            if self.stop_signal:
                os._exit(128 + number)
            self.stop_signal = number

        previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """However the body ends, a save in the background ends first: its messages need the process group. The log is closed."""
        try:
            yield
            self.store.wait()
        except BaseException:
            with suppress(Exception):  # the body's own error is the one to report
                self.store.wait()
            raise
        finally:
            if self.log is not None:
                self.log.close()

    def _agree_to_stop(self) -> bool:
        """Whether any rank was told to stop."""
        if self.ranks.world_size == 1:
            return self.stop_signal != 0
        told = torch.tensor([self.stop_signal], device=self.ranks.device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        self.stop_signal = int(told.item())
        return self.stop_signal != 0

    def _start(self) -> None:
        """From the newest checkpoint where asked to, else from step 0 with fresh or given weights."""
        newest = self.store.newest() if self.options.resume else None
        has_base = self.config.workload.job == "lora" or newest is None
        if self.config.training.init_from and has_base:
            load_start(self.engine.models, self.ranks, self.config.training.init_from)
        self.base_digest = model_digest(self.engine.models, self.ranks) if self.config.workload.job == "lora" else None
        self.engine.narrow()
        if facts := self.batches.facts():
            self._write({"kind": "examples", "step": self.step, **facts})
        if newest is not None:
            self._load(newest)
            self._write({"kind": "resumed", "step": self.step, "checkpoint": newest.name})
            return
        if self.options.resume and self.store.problems:
            rule = "holds no checkpoint that is whole (see the warnings above)"
            raise InputError.single("--resume", str(self.store.folder), rule, "put back a copy of one, or start in another folder")
        if self.options.resume and self.ranks.is_first:
            say(f"no checkpoint in {self.options.out} yet: starting from step 0")
        self._save(block=not self.config.training.async_checkpoints)

    def _finished_before(self) -> Summary | None:
        """The summary of a run that needs nothing more, on every rank."""
        file = self.options.out / "summary.json"

        def read() -> dict[str, Any]:
            if not self._is_over() or not file.is_file():
                return {}
            values = parse_json(read_text(file), str(file))
            return values if isinstance(values, dict) and values.get("is_complete") and values.get("num_steps") == self.step else {}

        values = on_first_rank(self.ranks, read)
        if not values:
            return None
        if self.ranks.is_first:
            say(f"the run is finished: all {self.step} steps are done")
        return Summary(values if self.ranks.is_first else {})

    def _one_step(self) -> None:
        """Data, forward, backward, one decision, update, one line in the log."""
        number, device = self.steps_here, self.ranks.device
        # Random numbers (dropout) follow from the step alone, so that there is no state of theirs to save.
        torch.manual_seed(hash((self.config.training.seed, self.step, self.ranks.rank)) & 0x7FFFFFFF)
        start = time.perf_counter()
        with self.looks.step(number) as times:
            with times.phase("data", device):
                microbatches, weights = self.batches.microbatches(self.position), self.batches.weights(self.position)
            with self.looks.work(number, self._tensors):
                verdict, loss, norm, rate = self._work(microbatches, weights, times)
        step_s = time.perf_counter() - start
        for found in self.looks.records(number):
            self._note(found)
        record = {
            "kind": "step", "step": self.step, "loss": loss, "norm": norm, "learning_rate": rate, "step_s": step_s, "phases_s": times.parts,
            "tokens_per_s": self.config.tokens_per_step / step_s, "position": self.position,
            **({"mfu": self.utilization.mfu(step_s)} if self.utilization else {}),
            "timed": self.looks.is_timed(number) and verdict == "good", **({"skipped": True} if verdict != "good" else {}),
        }  # fmt: skip
        self._write(record)
        self.steps_here += 1
        self.step += 1
        self.position += self.config.global_batch_size
        if verdict == "roll_back":
            self._roll_back()
        elif verdict == "stop":
            self._give_up(loss, norm)

    def _note(self, found: dict[str, Any]) -> None:
        """Writes what a look at a step has found."""
        if found["kind"] == "measured" and self.log is not None:
            self.utilization = find_utilization(self.config, sum(rank["flops"] for rank in found["per_rank"]), self.ranks.device)
        self._write({**found, "step": self.step})

    def _give_up(self, loss: float, norm: float) -> NoReturn:
        self._write({"kind": "diverged", "step": self.step - 1, "loss": loss, "norm": norm, **self._troubles()})
        raise TrainingDivergedError(
            f"error: the run diverged at step {self.step - 1}: loss {loss:g}, gradient norm {norm:g}; {self.guard.num_skipped} steps were "
            f"skipped and {self.guard.recent_rollbacks} rollbacks did not help\n"
            f"  kept {self.store.newest()}, the last good checkpoint\n"
            f"  fix  lower training.learning_rate, lengthen training.warmup_steps, or look at the data of samples up to {self.position - 1}"
        )

    def _troubles(self) -> dict[str, int]:
        return {"num_skipped": self.guard.num_skipped, "num_rollbacks": self.guard.num_rollbacks}

    def _work(self, microbatches: Any, weights: list[float] | None, times: StepTimes) -> tuple[str, float, float, float]:
        loss_here = self.engine.forward_backward(microbatches, times, weights)
        with self.looks.agreeing(self.steps_here):
            loss, norm = self.engine.agree(loss_here)
        # fp16: gradients beyond range with a sound loss mean that the scale is too large; `skip` halves it, and nothing is wrong.
        is_overflow = self.engine.loss_scale > 1 and math.isfinite(loss) and not math.isfinite(norm)
        verdict = "skip" if is_overflow else self.guard.judge(loss, norm)
        if verdict != "good":
            self.engine.skip()
            return verdict, loss, norm, 0.0
        with times.phase("optimizer", self.ranks.device):
            rate = self.engine.update(self.step, norm)
        return verdict, loss, norm, rate

    def _roll_back(self) -> None:
        """Weights and states of the last checkpoint, but the data goes on behind the bad samples."""
        self.store.wait()
        newest = self.store.newest()
        if newest is None:
            raise TrainingDivergedError(f"error: bad losses up to step {self.step - 1}, and no checkpoint to go back to in {self.store.folder}")
        position, counts, scale = self.position, self.guard.state(), self.engine.loss_scale
        self._load(newest)
        self.position = position
        self.saved_step = -1  # what is on disk has the old position: whoever stops now must save
        self.engine.loss_scale = min(scale, self.engine.loss_scale)
        self.guard.load_state({**counts, "losses": list(self.guard.losses), "norms": list(self.guard.norms)})
        self._write({"kind": "rolled_back", "step": self.step, "position": position})

    def _save(self, *, block: bool) -> None:
        extra = {
            "step": self.step, "position": self.position, "guard": self.guard.state(), "loss_scale": self.engine.loss_scale,
            "good_steps": self.engine.good_steps, "model": self.config.model.name, "seed": self.config.training.seed,
            "best": self.best.state(), "base_digest": self.base_digest,
        }  # fmt: skip
        if self.log is not None:
            self.log.flush()
        self.store.save(self.step, self.engine.state(), extra, block=block)
        self.saved_step = self.step

    def _load(self, path: Path) -> None:
        state = self.engine.state()
        extra = self.store.load(path, state)
        self.engine.load_state(state)
        self.step, self.position = extra["step"], extra["position"]
        self.saved_step = self.step
        self.guard.load_state(extra["guard"])
        if "best" in extra:
            self.best.load_state(extra["best"])
            self.store.pinned = self.best.step
        check_digest(self.base_digest, extra.get("base_digest"), path)
        self.engine.loss_scale, self.engine.good_steps = extra["loss_scale"], extra["good_steps"]

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Mean loss over held-out text, as nats per token and, where the text's bytes are known, bits per byte."""
        for model in self.engine.models:
            model.eval()
        losses, valid = [], self.batches.valid
        for microbatches, weights in self.batches.validation():
            if self._agree_to_stop():
                break
            losses.append(self.engine.evaluate(microbatches, weights))
        for model in self.engine.models:
            model.train()
        if losses and valid is not None and not self.stop_signal:
            nats = sum(losses) / len(losses)
            record: dict[str, Any] = {"kind": "eval", "step": self.step, "loss": nats, "num_lists": len(losses)}
            if valid.text_bytes and self.config.model.is_causal:
                record["bits_per_byte"] = nats / math.log(2) * valid.num_tokens / valid.text_bytes
            self._write(record)
            if self.config.keeps_best and self.best.judge(self.step, nats):
                self.store.pinned = self.step
                self._save(block=True)

    def _tensors(self) -> Any:
        """Everything alive between steps: weights, buffers, optimizer states."""
        for part in self.engine.parts:
            yield from part.parameters()
            yield from part.buffers()
        for optimizer in self.engine.optimizers:
            for state in optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, (Tensor, DTensor)))

    def _write(self, record: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(record)
            self.progress(record)

    def _finish(self) -> Summary:
        """Rank 0 writes `summary.json`, over all the processes that this run has had."""
        for found in self.looks.finish():
            self._note(found)
        if self.log is None:
            return Summary()
        if self.looks.has_missed_trace:
            say("warning: nothing was traced: the run ended within its warm-up")
        self.log.close()
        config, records = self.config, read_metrics(self.log.metrics.path)
        facts = {
            "schema_version": 1, "date": datetime.date.today().isoformat(), "device": device_name(self.ranks.device), "torch": torch.__version__,
            "num_threads": torch.get_num_threads(), "num_devices": self.ranks.world_size, "tokens_per_step": config.tokens_per_step,
            "num_steps": self.step, **self._troubles(),
            "is_complete": self._is_over() and not self.stop_signal, "stop_signal": self.stop_signal,
            **({"best": {**self.best.state(), "stopped_early": self.step < config.num_steps}} if self.best.step >= 0 else {}),
        }  # fmt: skip
        newest = {r.get("kind", ""): r for r in records}
        utilization = None
        if "measured" in newest:
            every = newest["measured"]["per_rank"]
            flops = sum(rank["flops"] for rank in every)
            facts |= {
                "per_rank": every, "peak_bytes": max(rank["peak_bytes"] for rank in every), "flops_per_step": flops,
                "attention_flops_per_step": sum(rank["attention_flops"] for rank in every),
            }  # fmt: skip
            utilization = find_utilization(config, flops, self.ranks.device)
        if "communication" in newest:
            facts["communication"] = communication_facts(newest["communication"]["per_rank"])
        if "examples" in newest:
            facts["examples"] = {part: values for part, values in newest["examples"].items() if part in ("train", "valid")}
        if "traced" in newest:
            facts["traces"] = {"num_steps": newest["traced"]["num_steps"]}
        if "eval" in newest:
            facts["eval"] = {k: v for k, v in newest["eval"].items() if k != "kind"}
        summary = summarize(records, facts, utilization)
        summary.save(self.options.out / "summary.json")
        return summary


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else (platform.processor() or platform.machine())


def say(text: str) -> None:
    """A line for a person."""
    sys.stderr.write(text + "\n")
