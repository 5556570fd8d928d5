"""Loss curves of layouts: run by torchrun, one process group walks through many layouts; imported, it starts such jobs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from planner.plan import build_request
from reftrain.batches import open_batches
from reftrain.checkpoint import CheckpointStore
from reftrain.config import RunConfig, make_run_config
from reftrain.parallel import Ranks, make_ranks
from reftrain.runnable import check_runnable
from reftrain.steps import Engine, StepTimes

ROOT = Path(__file__).resolve().parents[2]
AXES = ("dp_replicate", "dp_shard", "tp", "cp", "pp")
Curve = list[tuple[float, float]]

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64,
    "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "gqa": {"model_type": "llama", **SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "windowed": {"model_type": "mistral", **SIZES, "sliding_window": 10},
    "qk_norm": {"model_type": "qwen3", **SIZES, "num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 64, "n_positions": 64,
             "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "initializer_range": 0.1},
    "bert": {"model_type": "bert", **SIZES, "type_vocab_size": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "neox": {"model_type": "gpt_neox", **SIZES},
    "mixtral": {"model_type": "mixtral", **SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "three_experts": {"model_type": "mixtral", **SIZES, "num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen_moe": {"model_type": "qwen2_moe", **SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                 "shared_expert_intermediate_size": 32},
    "latent": {"model_type": "deepseek_v2", **SIZES, **LATENT, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
               "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "latent_direct": {"model_type": "deepseek_v2", **SIZES, **LATENT, "q_lora_rank": None, "n_routed_experts": 4, "num_experts_per_tok": 2,
                      "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 4, "n_group": 1, "topk_group": 1},
}  # fmt: skip
"""Small models of every kind; weights large enough that the loss moves at once."""


@dataclass(frozen=True)
class Case:
    """One curve: a model, its layout, and what else differs from the plain run."""

    model: str
    layout: dict[str, Any] = field(default_factory=dict)
    workload: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    num_steps: int = 20
    save: str = ""
    """Folder for a checkpoint after the last step."""
    load: str = ""
    """Folder of the checkpoint to start from."""

    @property
    def num_processes(self) -> int:
        """Processes that the layout takes."""
        count = 1
        for axis in AXES:
            count *= self.layout.get(axis, 1)
        return count

    @property
    def name(self) -> str:
        """For test reports."""
        given = {**self.layout, **self.workload, **self.training}
        return "-".join([self.model, *(f"{key}={value}" for key, value in given.items())])

    @property
    def alone(self) -> Case:
        """The same on one process."""
        return Case(self.model, {"micro_batch_size": self.layout.get("micro_batch_size", 1)}, self.workload, self.training, self.num_steps)

    def config(self) -> RunConfig:
        """As a plan file would give it."""
        request = {
            "schema_version": 1, "model": MODELS[self.model],
            "workload": {"seq_len": 32, "global_batch_size": 8, "precision": "fp32", **self.workload},
            "cluster": {"accelerator": "cpu-local", "num_devices": self.num_processes},
            "layout": {"micro_batch_size": 1, **self.layout},
            "training": {"num_steps": 20, "warmup_steps": 4, "learning_rate": 3e-3, **self.training},
        }  # fmt: skip
        return make_run_config(build_request(request))


def run(case: Case, ranks: Ranks) -> Curve:
    """(loss, gradient norm) of each step, the same on every rank."""
    config = case.config()
    check_runnable(config, ranks.device)
    engine, batches = Engine(config, ranks), open_batches(config, ranks, "synthetic")
    first, curve = 0, []
    if case.load:
        store, state = CheckpointStore(case.load), engine.state()
        first = store.load(str(store.newest()), state)["step"]
        engine.load_state(state)
    for step in range(first, first + case.num_steps):
        loss, norm = engine.agree(engine.forward_backward(batches.microbatches(step * config.global_batch_size), StepTimes()))
        engine.update(step, norm)
        curve.append((loss, norm))
    if case.save:
        CheckpointStore(case.save).save(first + case.num_steps, engine.state(), {"step": first + case.num_steps})
    return curve


KILLED = re.compile(r"malloc\(\)|free\(\)|corrupted|exitcode *: -(6|11)\b")
MAX_CRASHES = 1


@lru_cache(maxsize=64)
def _alone(text: str) -> Curve:
    case = Case(**json.loads(text))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run(case, Ranks(case.config().layout, torch.device("cpu")))
    finally:
        torch.set_num_threads(threads)


def alone(case: Case) -> Curve:
    """The case's curve on one process, this one."""
    return _alone(json.dumps(asdict(case.alone)))


def together(cases: Sequence[Case], timeout_s: float = 300) -> list[Curve | str]:
    """Each case's curve, or what went wrong; all take the same number of processes and share one torchrun job while nothing does.

    A case whose process was killed by a signal is tried once more: nothing here is native code, and gloo's threads have corrupted the heap
    once in some thousand cases. What an exception ends, or a wrong number, is not.
    """
    found: list[Curve | str] = []
    crashes = 0
    while len(found) < len(cases):
        curves, error = _job(cases[len(found) :], timeout_s)
        found += curves
        if len(found) < len(cases):
            crashes = crashes + 1 if KILLED.search(error) else MAX_CRASHES + 1
            if crashes > MAX_CRASHES:
                found.append(error[:4000])
    return found


def _job(cases: Sequence[Case], timeout_s: float) -> tuple[list[Curve], str]:
    """(curves of the first cases, what ended the job)."""
    (count,) = {case.num_processes for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        plan, out = Path(folder, "cases.json"), Path(folder, "curves.jsonl")
        plan.write_text(json.dumps([asdict(case) for case in cases]))
        out.touch()
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(count),
            "-m",
            "tests.reftrain.parity_worker",
        ]
        with subprocess.Popen(
            [*command, str(plan), str(out)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
            text=True,
        ) as job:  # fmt: skip
            try:
                error = job.communicate(timeout=timeout_s)[1]
            except subprocess.TimeoutExpired:
                job.terminate()  # torchrun passes it on to its workers
                error = f"took more than {timeout_s} s"
        return [json.loads(line) for line in out.read_text().splitlines()], error


def furthest(curve: Curve, reference: Curve) -> float:
    """Largest relative difference of the losses."""
    assert len(curve) == len(reference)
    return max(abs(a - b) / abs(b) for (a, _), (b, _) in zip(curve, reference, strict=True))


def main(plan: str, out: str) -> None:
    """One rank of the job that `together` starts."""
    dist.init_process_group("gloo")
    for values in json.loads(Path(plan).read_text()):
        case = Case(**values)
        try:
            curve = run(case, make_ranks(case.config().layout, torch.device("cpu"), dist.get_rank()))
        except Exception:  # the other ranks wait for this one: end them all
            sys.stderr.write(traceback.format_exc())
            os._exit(1)
        if dist.get_rank() == 0:
            with open(out, "a") as file:
                file.write(json.dumps(curve) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
