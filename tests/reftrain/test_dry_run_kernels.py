"""Attention of a plan for a GPU: fused where a CPU's is not, and the CPU's own where the plan is for a CPU."""

from __future__ import annotations

from typing import Any

import pytest

from planner.plan import build_request
from reftrain.config import make_run_config
from reftrain.dry_run import DryRun, dry_run
from tests.reftrain.parity_worker import MODELS

GPT2 = {"model_type": "gpt2", "n_embd": 96, "n_layer": 2, "n_head": 2, "vocab_size": 128, "n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


def run(model: dict[str, Any], accelerator: str, **workload: Any) -> DryRun:
    """Of one sequence of 256 tokens."""
    plan = {
        "model": model, "workload": {"seq_len": 256, "global_batch_size": 1, "precision": "bf16", **workload},
        "cluster": {"accelerator": accelerator, "num_devices": 1}, "layout": {},
    }  # fmt: skip
    return dry_run(make_run_config(build_request(plan)))


def scores(found: DryRun) -> int:
    """Bytes at the peak of tensors that have a number for each pair of tokens."""
    return sum(kind["bytes"] for kind in found.stages[0].largest if list(kind["shape"][-2:]) == [256, 256])


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_dropout_in_a_gpus_attention_costs_only_its_seeds(recompute: str) -> None:
    plain, dropped = (run(GPT2 | {"attn_pdrop": p}, "h100-80gb-sxm", recompute=recompute) for p in (0.0, 0.1))
    assert 0 <= dropped.peak_bytes - plain.peak_bytes <= 2 * 2 * 8
    assert dropped.stages[0].total_flops == plain.stages[0].total_flops


def test_a_cpu_writes_the_scores_out() -> None:
    found = run(GPT2 | {"attn_pdrop": 0.1}, "cpu-local")
    assert scores(found) > 0
    assert scores(run(GPT2 | {"attn_pdrop": 0.1}, "h100-80gb-sxm")) == 0


def test_latent_attention_keeps_no_scores_on_a_gpu_unless_asked_to() -> None:
    latent = MODELS["latent_direct"] | {"v_head_dim": 24}
    assert scores(run(latent, "h100-80gb-sxm")) == 0
    assert scores(run(latent, "cpu-local")) > 0
    assert scores(run(latent, "h100-80gb-sxm", attention_kernel="unfused")) > 0
