"""How fast reftrain trains, against a plain torch loop over transformers' Llama. Run: python benchmarks/bench_trainer.py.

Each trainer is a process of its own and they take turns, a few steps each in changing order, so that what else the machine does
hits all of them; a ratio is the median over the turns. Same weights, token shards, batches, AdamW and clipping (the losses are compared).

| reftrain | `reftrain.train` as `reftrain run` calls it: data loading, guard, log and all |
|---|---|
| plain | batches ready in memory, LlamaForCausalLM with sdpa attention, cross-entropy, clip_grad_norm_, fused AdamW; autocast for bf16 |
| plain, kept | the same, with the allocator setting that reftrain makes (freed memory stays with the process) |

Overhead: whole steps of the trainer (log, guard, clocks) in turn with bare ones (data, forward and backward, norm, update) of its own engine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch.nn import functional

from planner.plan import build_request
from reftrain.batches import open_batches
from reftrain.config import RunConfig, make_run_config
from reftrain.data import TokenWriter
from reftrain.hf_weights import to_hf
from reftrain.host_memory import keep_freed_memory
from reftrain.measure import Instruments
from reftrain.model import Transformer, initialize, parameter_count
from reftrain.parallel import Ranks
from reftrain.steps import StepTimes
from reftrain.train import RunOptions, Trainer, train

CPU, SEQ_LEN, MANY = torch.device("cpu"), 256, 1_000_000
SIZES = {"1M": (128, 352, 4, 4, 2048, 16), "7M": (256, 704, 8, 8, 4096, 12), "30M": (512, 1408, 8, 8, 8192, 4)}
"""Name -> hidden size, intermediate size, layers, heads, vocabulary, sequences a step."""
ROLES = ("reftrain", "plain", "plain, kept")
WARMUP_STEPS = 4


@dataclass(frozen=True)
class Case:
    """One model on one kind of arithmetic."""

    size: str
    precision: str
    folder: Path

    @property
    def config(self) -> RunConfig:
        """The run, without warm-up or decay of the rate."""
        hidden, inner, layers, heads, vocab, batch = SIZES[self.size]
        model = {
            "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": heads, "vocab_size": vocab, "max_position_embeddings": SEQ_LEN, "tie_word_embeddings": True,
        }  # fmt: skip
        plan = {
            "schema_version": 1, "model": model, "cluster": {"accelerator": "cpu-local", "num_devices": 1}, "layout": {"micro_batch_size": batch},
            "workload": {"seq_len": SEQ_LEN, "global_batch_size": batch, "precision": self.precision},
            "training": {"num_steps": MANY, "warmup_steps": 0, "lr_schedule": "constant", "checkpoint_every_steps": MANY},
        }  # fmt: skip
        return make_run_config(build_request(plan))

    @property
    def data(self) -> str:
        """Token shards, made when first asked for."""
        vocab = SIZES[self.size][4]
        folder = self.folder / f"tokens-{vocab}"
        if not folder.exists():
            ids = np.random.default_rng(0).zipf(1.3, 1 << 19) % (vocab - 4) + 4
            with TokenWriter(folder / "train", vocab_size=vocab, end_of_text_id=0, tokenizer_sha256="0" * 64) as writer:
                writer.add(ids.tolist(), len(ids))
        return str(folder)


@dataclass
class Pacer:
    """Called after every step: tells the parent about the turn that ended, and waits for the next."""

    turns: Connection
    left: int = 1
    start: float = field(default_factory=time.perf_counter)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def __call__(self, record: dict[str, Any]) -> None:
        """Counts steps; ends the process when the parent has seen enough."""
        if record["kind"] == "measured":
            self.peak_bytes = record["per_rank"][0]["peak_bytes"]
        if record["kind"] != "step":
            return
        self.losses.append(record["loss"])
        self.left -= 1
        if self.left:
            return
        self.turns.send(time.perf_counter() - self.start)
        self.left = self.turns.recv()
        if not self.left:
            self.turns.send({"losses": self.losses, "tensor_bytes": self.peak_bytes, "process_bytes": process_peak_bytes()})
            os._exit(0)
        self.start = time.perf_counter()


def process_peak_bytes() -> int:
    """The most memory this process has had (VmHWM)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def run_reftrain(case: Case, pacer: Pacer) -> None:
    """The real thing, to the parent's rhythm."""
    out = case.folder / f"run-{case.size}-{case.precision}"
    train(case.config, RunOptions(out, case.data, device=CPU), pacer)


def run_plain(case: Case, pacer: Pacer) -> None:
    """The loop that a person would write."""
    import transformers

    config, training = case.config, case.config.training
    ours = Transformer(config.model, config.details)
    initialize(ours, training.seed)
    settings = {k: v for k, v in config.model_config.items() if k != "model_type"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, rms_norm_eps=config.details.norm_eps, attn_implementation="sdpa"))
    model.load_state_dict(to_hf(ours.state_dict(), config.model), strict=False)
    model.train()
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (training.beta1, training.beta2)
    optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, betas=betas, eps=training.eps, fused=True)
    source = open_batches(config, Ranks(config.layout, CPU), case.data)
    batches = [source.microbatches(step * config.global_batch_size)[0] for step in range(64)]
    instruments = Instruments()

    def step(tokens: torch.Tensor, targets: torch.Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bf16"):
            logits = model(tokens, use_cache=False).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm or 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    for i in range(MANY):
        states = [value for state in optimizer.state.values() for value in state.values()]
        watch = instruments.watch([*model.parameters(), *states], CPU) if i == 1 else nullcontext()
        with watch:
            loss = step(*batches[i % len(batches)])
        if i == 1:
            pacer({"kind": "measured", "per_rank": [{"peak_bytes": instruments.peak_bytes}]})
        pacer({"kind": "step", "loss": loss})


def run_overhead(case: Case, pacer: Pacer) -> None:
    """Sends (seconds of whole steps, seconds of bare ones), as many of each as asked for, in turn."""
    keep_freed_memory()
    config, ranks = case.config, Ranks(case.config.layout, CPU)
    out = case.folder / f"overhead-{case.size}-{case.precision}"
    out.mkdir()
    trainer = Trainer(config, RunOptions(out, device=CPU), ranks, case.data, lambda record: None)
    trainer._start()
    trainer.store.wait()

    def bare() -> None:
        microbatches = trainer.batches.microbatches(trainer.position)
        _, norm = trainer.engine.agree(trainer.engine.forward_backward(microbatches, StepTimes()))
        trainer.engine.update(trainer.step, norm)

    for _ in range(WARMUP_STEPS):
        trainer._one_step()
    pairs: list[list[float]] = [[], []]
    for i in range(pacer.turns.recv()):
        for which in (0, 1) if i % 2 else (1, 0):
            start = time.perf_counter()
            (trainer._one_step, bare)[which]()
            pairs[which].append(time.perf_counter() - start)
    pacer.turns.send(pairs)


def work(role: str, case: Case, num_threads: int, turns: Connection) -> None:
    """One process."""
    torch.set_num_threads(num_threads)
    if role == "plain, kept":
        keep_freed_memory()
    run: Callable[[Case, Pacer], None] = {"reftrain": run_reftrain, "overhead": run_overhead}.get(role, run_plain)
    run(case, Pacer(turns))


def start(role: str, case: Case, num_threads: int) -> tuple[Any, Connection]:
    """A process and the line to it."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=work, args=(role, case, num_threads, theirs), daemon=True)
    process.start()
    return process, ours


def spread(values: list[float]) -> dict[str, float]:
    """Median and range of the middle half."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def race(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """All roles in turn."""
    lines = {}
    for role in ROLES:
        lines[role] = start(role, case, options.threads)[1]
        lines[role].recv()
    seconds: dict[str, list[float]] = {role: [] for role in ROLES}

    def turn(role: str, num_steps: int) -> float:
        lines[role].send(num_steps)
        return lines[role].recv() / num_steps

    for role in ROLES:
        turn(role, WARMUP_STEPS)
    for block in range(options.blocks):
        for role in ROLES[block % 3 :] + ROLES[: block % 3]:
            seconds[role].append(turn(role, options.block_steps))
    found: dict[str, Any] = {"size": case.size, "precision": case.precision, "parameters": parameter_count(Transformer(case.config.model))}
    for role in ROLES:
        lines[role].send(0)
        report = lines[role].recv()
        tokens_per_s = case.config.tokens_per_step / statistics.median(seconds[role])
        losses = report.pop("losses")
        found[role] = {"step_s": spread(seconds[role]), "tokens_per_s": tokens_per_s, **report, "losses": losses[: WARMUP_STEPS + 1]}
    for role in ROLES[1:]:
        found[role]["ratio"] = spread([theirs / ours for ours, theirs in zip(seconds["reftrain"], seconds[role], strict=True)])
        pairs = zip(found["reftrain"]["losses"], found[role]["losses"], strict=True)
        found[role]["max_loss_difference"] = max(abs(a - b) for a, b in pairs)
    return found


def overhead(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """What log, guard and clocks add to a step, as a share of it."""
    process, line = start("overhead", case, options.threads)
    line.send(options.overhead_steps)
    whole, bare = line.recv()
    process.join()
    shares = [a / b - 1 for a, b in zip(whole, bare, strict=True)]
    medians = statistics.median(whole), statistics.median(bare)
    return {"size": case.size, "precision": case.precision, "whole_s": medians[0], "bare_s": medians[1],
            "overhead_fraction": medians[0] / medians[1] - 1, "pairwise": spread(shares), "num_pairs": len(shares)}  # fmt: skip


def main() -> None:
    """Prints the tables, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--block-steps", type=int, default=2)
    parser.add_argument("--overhead-steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="the smallest size and few steps: does it run?")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.blocks, options.block_steps, options.overhead_steps = ["1M"], 3, 1, 4
    console = Console(stderr=True)
    result: dict[str, Any] = {"torch": torch.__version__, "num_threads": options.threads, "speed": [], "overhead": []}
    if not options.json:
        print(f"{'':8s}{'params':>12s}{'':>18s}{'tokens/s':>10s}{'ms/step':>9s}{'reftrain is':>26s}{'tensors':>10s}{'process':>10s}  loss within")
    with tempfile.TemporaryDirectory() as folder:
        for case in (Case(size, precision, Path(folder)) for size in options.sizes for precision in options.precisions):
            console.print(f"{case.size} {case.precision}")
            speed, measuring = race(case, options), overhead(case, options)
            result["speed"].append(speed)
            result["overhead"].append(measuring)
            if not options.json:
                print(speed_text(speed) + overhead_text(measuring), flush=True)
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")


def speed_text(row: dict[str, Any]) -> str:
    """A line for each role."""
    lines = []
    for role in ROLES:
        it = row[role]
        ratio, megabytes = it.get("ratio"), [it[key] / 1e6 for key in ("tensor_bytes", "process_bytes")]
        ahead = f"{ratio['median']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f}) as fast" if ratio else ""
        head = f"{row['size']:>3s} {row['precision']}{row['parameters']:12,}  {role:16s}"
        speed = f"{it['tokens_per_s']:10,.0f}{1e3 * it['step_s']['median']:9.0f}"
        difference = f"{it['max_loss_difference']:9.1e}" if ratio else ""
        lines.append(f"{head}{speed}{ahead:>26s}{megabytes[0]:7.0f} MB{megabytes[1]:7.0f} MB{difference}\n")
    return "".join(lines)


def overhead_text(row: dict[str, Any]) -> str:
    """One line."""
    pairs = row["pairwise"]
    return (
        f"         overhead of measuring {row['overhead_fraction']:+.2%} of {1e3 * row['bare_s']:.0f} ms (medians of {row['num_pairs']}); "
        f"pairs {pairs['median']:+.2%} ({pairs['low']:+.2%} to {pairs['high']:+.2%})"
    )


if __name__ == "__main__":
    main()
