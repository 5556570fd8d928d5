"""Closed forms of the papers, written down independently, against the op list: parameters, FLOPs, activations, ZeRO states."""

from __future__ import annotations

from typing import Any

import pytest

from planner.architectures import load_model
from planner.backward import kept_bytes
from planner.estimate import estimate
from planner.graph import StepGraph, build_step_graph, count_params, model_flops_per_token
from planner.layout import Layout
from planner.op_cost import Numerics
from planner.plan import build_request
from planner.resolve import resolve
from planner.stack import load_stack

EXACT = 1e-12
GPTS = [
    (2304, 24, 24, 51200, 2048),
    (6144, 48, 64, 51200, 2048),
    (12288, 96, 96, 51200, 2048),
    (25600, 128, 160, 51200, 2048),
    (1024, 24, 16, 50304, 1024),
]
"""hidden, layers, heads, vocabulary, positions; the first four from arXiv:2104.04473 and 2205.05198."""


def gpt(hidden: int, layers: int, heads: int, vocab: int, positions: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_embd": hidden, "n_layer": layers, "n_head": heads, "vocab_size": vocab, "n_positions": positions}


def graph_of(model: dict[str, Any], stack: str, micro: int, tp: int, sp: bool, recompute: str, seq_len: int) -> StepGraph:
    layout = {"tp": tp, "sequence_parallel": sp, "micro_batch_size": micro}
    request = {
        "model": model, "stack": stack, "layout": layout, "cluster": {"accelerator": "a100-80gb-sxm", "num_devices": tp},
        "workload": {"seq_len": seq_len, "global_batch_size": micro, "tokens": 1e9, "precision": "fp16", "recompute": recompute},
    }  # fmt: skip
    job = resolve(build_request(request))
    return build_step_graph(job.model, job.workload, Layout(**layout), job.numerics, job.precision, seq_len=seq_len, global_batch_size=micro)


@pytest.mark.parametrize(("h", "l", "a", "v", "s"), GPTS)
def test_parameters_follow_narayanan_equation_2(h: int, l: int, a: int, v: int, s: int) -> None:  # noqa: E741
    paper = 12 * l * h**2 + 13 * l * h + (v + s) * h
    final_norm = 2 * h  # which the paper leaves out
    assert count_params(load_model(gpt(h, l, a, v, s)))["total"] == paper + final_norm


@pytest.mark.parametrize(("h", "l", "a", "v", "s"), GPTS)
def test_flops_follow_narayanan_equation_3(h: int, l: int, a: int, v: int, s: int) -> None:  # noqa: E741
    """With full recompute 96 B s l h^2 (1 + s/6h + V/16lh); without it three quarters of the blocks and the same head."""
    graph = graph_of(gpt(h, l, a, v, s), "megatron-2021", 1, 1, False, "full", s)
    model = model_flops_per_token(graph.model, s, Numerics())
    blocks, head = 96 * l * h**2 * (1 + s / (6 * h)), 6 * h * v
    assert model["full"] == pytest.approx(0.75 * blocks + head, rel=EXACT)
    assert blocks + head == pytest.approx(96 * l * h**2 * (1 + s / (6 * h) + v / (16 * l * h)), rel=EXACT)
    plan = estimate(
        {
            "model": gpt(h, l, a, v, s), "stack": "megatron-2021", "layout": Layout().model_dump(),
            "cluster": {"accelerator": "a100", "num_devices": 1},
            "workload": {"seq_len": s, "global_batch_size": 1, "tokens": 1e9, "precision": "fp16", "recompute": "full"},
        }
    )  # fmt: skip
    assert plan.flops.hardware_per_token == pytest.approx(blocks + head, rel=EXACT)


LLAMAS = [(4096, 32, 32, 8, 14336, 128256, 8192), (16384, 126, 128, 8, 53248, 128256, 8192), (2048, 16, 32, 32, 5632, 32000, 512)]


@pytest.mark.parametrize(("h", "l", "a", "kv", "f", "v", "s"), LLAMAS)
def test_flops_of_llama_are_6n_and_12lhs(h: int, l: int, a: int, kv: int, f: int, v: int, s: int) -> None:  # noqa: E741
    """6 per matmul weight, plus 12 L H S with all pairs or half of it with the causal ones (arXiv:2204.02311, appendix B)."""
    model = load_model(
        {
            "model_type": "llama", "hidden_size": h, "num_hidden_layers": l, "num_attention_heads": a, "num_key_value_heads": kv,
            "intermediate_size": f, "vocab_size": v, "max_position_embeddings": s,
        }
    )  # fmt: skip
    matmul_weights = l * (2 * h * h + 2 * h * (h // a) * kv + 3 * h * f) + h * v
    norms_and_table = l * 2 * h + h + v * h
    assert count_params(model)["total"] == matmul_weights + norms_and_table
    flops = model_flops_per_token(model, s, Numerics())
    assert flops["full"] == pytest.approx(6 * matmul_weights + 12 * l * h * s, rel=EXACT)
    assert flops["causal"] == pytest.approx(6 * matmul_weights + 6 * l * h * s, rel=EXACT)


def layer_bytes(tp: int, sp: bool, recompute: str, micro: int = 4, shape: tuple[int, int, int, int, int] = GPTS[1]) -> float:
    graph = graph_of(gpt(*shape), "megatron-2021", micro, tp, sp, recompute, shape[4])
    block = next(part for part in graph.parts if part.is_block)
    return float(kept_bytes(block, graph, load_stack("megatron-2021"))[0])


@pytest.mark.parametrize("shape", GPTS)
@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("t", [1, 2, 8])
def test_activations_follow_korthikanti(shape: tuple[int, int, int, int, int], micro: int, t: int) -> None:
    """arXiv:2205.05198 table 2, bytes per layer: every combination of tensor and sequence parallelism and recompute."""
    h, _, a, _, s = shape
    sbh = s * micro * h
    scores = 5 * a * s / h

    def ours(sp: bool, recompute: str) -> float:
        return layer_bytes(t, sp and t > 1, recompute, micro, shape)

    assert ours(False, "none") == pytest.approx(sbh * (10 + 24 / t + scores / t), rel=EXACT)
    assert ours(False, "selective") == pytest.approx(sbh * (10 + 24 / t), rel=EXACT)
    assert ours(False, "full") == pytest.approx(2 * sbh, rel=EXACT)
    assert ours(True, "none") == pytest.approx(sbh / t * (34 + scores), rel=EXACT)
    assert ours(True, "selective") == pytest.approx(34 * sbh / t, rel=EXACT)
    if t == 1:
        assert ours(False, "none") == pytest.approx(sbh * (34 + scores), rel=EXACT)


@pytest.mark.parametrize("ranks", [2, 64, 1024])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_states_follow_zero(ranks: int, stage: int) -> None:
    """arXiv:1910.02054, figure 1: 2 + 2 + 12 bytes per parameter, of which each stage divides one more by the ranks."""
    layout = {"dp_replicate": ranks} if stage == 0 else {"dp_shard": ranks}
    plan = estimate(
        {
            "model": gpt(*GPTS[0]), "stack": "deepspeed", "cluster": {"accelerator": "a100", "num_devices": ranks},
            "workload": {"seq_len": 1024, "global_batch_size": ranks, "tokens": 1e9, "precision": "fp16", "optimizer": "adamw"},
            "layout": Layout(zero_stage=stage, **layout).model_dump(),
        }
    )  # fmt: skip
    psi = plan.params.total
    weights, gradients, optimizer = (each / (ranks if stage >= at else 1) for each, at in ((2 * psi, 3), (2 * psi, 2), (12 * psi, 1)))
    parts = plan.memory.breakdown_bytes
    assert parts["weights"] == pytest.approx(weights, rel=EXACT)
    assert parts["gradients"] == pytest.approx(gradients, rel=EXACT)
    assert parts["optimizer"] == pytest.approx(optimizer, rel=EXACT)
