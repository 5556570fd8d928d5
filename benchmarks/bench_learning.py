"""What a 5M-parameter model learns from the shipped corpus, against a word 4-gram model. Run: python benchmarks/bench_learning.py --minutes 60.

Both read exactly the text that `reftrain data prepare` kept and are judged on the same validation bytes, whole books that are not in
the training text: bits per byte, ends of documents included. The model's size, batch and recipe are fixed; `--minutes` decides how many
steps it gets, from the speed of a few steps before the run. A run that was cut goes on when the command is given again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from planner.files import read_yaml, to_json, to_yaml, write_text
from planner.plan import build_request
from reftrain.batches import open_batches
from reftrain.checkpoint import CheckpointStore
from reftrain.config import RunConfig, make_run_config
from reftrain.data import TokenDataset
from reftrain.kernels import IGNORED
from reftrain.measure import read_metrics
from reftrain.model import parameter_count
from reftrain.parallel import Ranks
from reftrain.steps import Engine, StepTimes
from reftrain.text.ngram import WordModel
from reftrain.text.prepare import PrepareOptions, prepare
from reftrain.tokenizer import Tokenizer
from reftrain.train import RunOptions, train

MODEL = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
SEQ_LEN, BATCH, NUM_EVALS, EVAL_TOKENS = 256, 16, 20, 40_960
PROBE_STEPS, PROBE_WARMUP = 12, 4
CPU = torch.device("cpu")


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """The run's plan file, but for the number of steps."""
    return {
        "schema_version": 1, "model": MODEL, "cluster": {"accelerator": "cpu-local", "num_devices": 1},
        "layout": {"micro_batch_size": BATCH},
        "workload": {"seq_len": SEQ_LEN, "global_batch_size": BATCH, "precision": options.precision, "optimizer": options.optimizer},
        "training": {
            "data": str(options.out / "data"), "learning_rate": options.learning_rate, "lr_schedule": options.schedule, "decay_fraction": 0.3,
            "min_lr_fraction": 0.02, "weight_decay": options.weight_decay, "beta2": 0.98, "checkpoint_every_steps": 500,
        },
    }  # fmt: skip


def with_steps(request: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """The plan of a run of `num_steps`, looked at some twenty times."""
    training = {"num_steps": num_steps, "warmup_steps": min(max(num_steps // 20, 1), 200)}
    training |= {"eval_every_steps": max(num_steps // NUM_EVALS, 1), "eval_tokens": EVAL_TOKENS}
    return {**request, "training": {**request["training"], **training}}


def step_s(config: RunConfig, data: str) -> float:
    """Median time of a training step on this machine, now."""
    ranks, times = Ranks(config.layout, CPU), []
    engine, batches = Engine(config, ranks), open_batches(config, ranks, data)
    for step in range(PROBE_STEPS):
        start = time.perf_counter()
        _, norm = engine.agree(engine.forward_backward(batches.microbatches(step * BATCH), StepTimes()))
        engine.update(step, norm)
        times.append(time.perf_counter() - start)
    return statistics.median(times[PROBE_WARMUP:])


def texts(folder: Path, split: str) -> list[str]:
    """The documents of a split, from its tokens; byte-level BPE gives them back to the byte."""
    tokenizer, tokens = Tokenizer.load(folder), stream(folder, split)
    ends = np.flatnonzero(tokens == tokenizer.end_of_text_id)
    found = [tokenizer.decode(tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(ends)]
    assert sum(len(text.encode()) for text in found) == TokenDataset.open(folder / split).text_bytes
    return found


def stream(folder: Path, split: str) -> np.ndarray:
    """All tokens of a split, in order."""
    dataset = TokenDataset.open(folder / split)
    return np.asarray(dataset.sequences(0, 1, dataset.num_tokens - 1, 0, shuffle=False)[0])


@torch.no_grad()
def bits(engine: Engine, tokens: np.ndarray, stride: int) -> float:
    """-log2 of the probability of `tokens` but the first, each given at least SEQ_LEN - stride and less than SEQ_LEN tokens before it."""
    model, total = engine.models[0].eval(), 0.0
    starts = np.arange(0, len(tokens) - 1, stride)
    padded = np.concatenate([np.full(SEQ_LEN - stride, -1), tokens, np.full(SEQ_LEN, -1)])
    for some in np.array_split(starts, math.ceil(len(starts) / BATCH)):
        windows = torch.from_numpy(np.stack([padded[start : start + SEQ_LEN + 1] for start in some]))
        inputs, targets = windows[:, :-1].clamp(min=0), windows[:, 1:].clone()
        targets[:, : SEQ_LEN - stride] = IGNORED
        targets[(targets < 0) | (windows[:, :-1] < 0)] = IGNORED
        total += float(model(inputs, targets)[0].double()) * int((targets != IGNORED).sum())
    return total / math.log(2)


def ngram(data: Path, order: int) -> dict[str, Any]:
    """Bits per byte of the word model."""
    start = time.perf_counter()
    model = WordModel(texts(data, "train"), order)
    found = {split: model.bits(texts(data, split)) / TokenDataset.open(data / split).text_bytes for split in ("valid", "test")}
    seconds = time.perf_counter() - start
    return {"order": order, "num_words": model.num_words, "vocab_size": len(model.vocabulary), "bits_per_byte": found, "seconds": seconds}


def learn(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Trains the model for the time given, or goes on with a run that was cut; judges its last checkpoint."""
    data, run, file = options.out / "data", options.out / "run", options.out / "plan.yaml"
    if not file.exists():
        request = plan(options)
        num_steps = options.steps or max(int(options.minutes * 60 / step_s(make_run_config(build_request(request)), str(data))), 1)
        write_text(file, to_yaml(with_steps(request, num_steps)))
    config = make_run_config(build_request(read_yaml(file)))
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=config.num_steps)

        def show(record: dict[str, Any]) -> None:
            if record["kind"] == "step":
                bar.update(task, completed=record["step"] + 1, description=f"training, loss {record['loss']:.3f}")
            elif record["kind"] == "eval":
                console.print(f"step {record['step']:6d}  about {record['bits_per_byte']:.4f} bits per byte")

        summary = train(config, RunOptions(run, str(data), resume=run.exists(), device=CPU), show).values
    engine = Engine(config, Ranks(config.layout, CPU))
    state = engine.state()
    CheckpointStore(run / "checkpoints", config.training.keep_checkpoints).load(newest(run), state)
    engine.load_state(state)
    records = read_metrics(run / "metrics.jsonl")
    found = {}
    for split in ("valid", "test"):
        tokens, size = stream(data, split), TokenDataset.open(data / split).text_bytes
        found[split] = {"windows": bits(engine, tokens, SEQ_LEN) / size, "overlapping": bits(engine, tokens, SEQ_LEN // 2) / size}
    return {
        "parameters": parameter_count(engine.models[0]), "training": config.training.model_dump(), "num_steps": summary["num_steps"],
        "num_tokens": summary["num_steps"] * config.tokens_per_step, "epochs": summary["num_steps"] * config.tokens_per_step / tokens_in(data),
        "train_minutes": sum(r["step_s"] for r in records if r["kind"] == "step") / 60, "tokens_per_s": summary.get("tokens_per_s"),
        "num_threads": torch.get_num_threads(), "bits_per_byte": found, "curve": curve(records, config),
    }  # fmt: skip


def newest(run: Path) -> Path:
    """The last checkpoint."""
    found = CheckpointStore(run / "checkpoints", 1).newest()
    assert found is not None
    return found


def tokens_in(data: Path) -> int:
    """Tokens of the training text."""
    return TokenDataset.open(data / "train").num_tokens


def curve(records: list[dict[str, Any]], config: RunConfig) -> list[dict[str, float]]:
    """Validation bits per byte (of the first tokens of the text) by tokens and minutes."""
    seconds = np.cumsum([r["step_s"] for r in records if r["kind"] == "step"])
    return [
        {"tokens": r["step"] * config.tokens_per_step, "minutes": seconds[r["step"] - 1] / 60, "bits_per_byte": r["bits_per_byte"]}
        for r in records
        if r["kind"] == "eval"
    ]


def main() -> None:
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="time for training, without the looks at held-out text")
    parser.add_argument("--steps", type=int, help="so many steps instead")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--out", type=Path, default=Path("learning"), help="data, run and result; a cut run there goes on")
    parser.add_argument("--order", type=int, default=4, help="words in an n-gram")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--schedule", choices=("wsd", "cosine"), default="wsd")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    console, data = Console(stderr=True), options.out / "data"
    if not data.exists():
        console.print("preparing the corpus")
        prepare(PrepareOptions(data, vocab_size=MODEL["vocab_size"]))
    corpus = {split: TokenDataset.open(data / split).facts() for split in ("train", "valid", "test")}
    result = {"corpus": corpus, "ngram": ngram(data, options.order), "model": learn(options, console)}
    write_text(options.out / "learning.json", to_json(result))
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    model, words = result["model"], result["ngram"]
    print(f"{'':32s}{'validation':>12s}{'test':>10s}  bits per byte")
    print(
        f"{'text':32s}{corpus['valid']['text_bytes']:12,}{corpus['test']['text_bytes']:10,}  bytes; {corpus['train']['text_bytes']:,} to learn from"
    )
    print(f"{'word ' + str(words['order']) + '-gram, Kneser-Ney':32s}{words['bits_per_byte']['valid']:12.4f}{words['bits_per_byte']['test']:10.4f}")
    for name, how in (("windows", f"model, windows of {SEQ_LEN}"), ("overlapping", f"model, {SEQ_LEN // 2} or more before")):
        print(f"{how:32s}{model['bits_per_byte']['valid'][name]:12.4f}{model['bits_per_byte']['test'][name]:10.4f}")
    print(
        f"{model['parameters']:,} parameters, {model['num_tokens']:,} tokens ({model['epochs']:.2f} epochs) in {model['train_minutes']:.1f} minutes "
        f"on {model['num_threads']} threads"
    )


if __name__ == "__main__":
    main()
