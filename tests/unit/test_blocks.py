"""What one block keeps for its backward pass, term by term by hand; parameters that live in unusual places."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from planner.architectures import load_model, model_ops
from planner.op_cost import Numerics, Op, Shard

SEQ_LEN = 64
SHARD = Shard(1, SEQ_LEN)
FLASH = Numerics(attention_kernel="flash")


def saved_bytes_per_token(ops: tuple[Op, ...]) -> float:
    return float(sum(sum(op.cost(SHARD, FLASH).saved.values()) for op in ops)) / SEQ_LEN


def block(name: str, index: int = -1) -> tuple[Op, ...]:
    return model_ops(load_model(name)).blocks[index][1]


def test_mixture_block_of_deepseek_v3_by_hand() -> None:
    """arXiv:2412.19437, section 4.2: 128 heads of 128 + 64, latents of 1536 and 512, 8 of 256 experts of 2048 and one for all."""
    h, heads, experts, width = 7168, 128, 8, 2048
    latent_attention = (
        h  # input of the norm
        + h  # its output, read by both projections down
        + 2 * 1536  # query latent before and after its norm
        + 2 * 512  # key-value latent before and after its norm
        + heads * (192 + 192 + 128)  # Q, K and V of all heads
        + heads * 128  # what the heads return
    )
    mixture = (
        h  # input of the norm
        + h  # its output, read by router and shared expert
        + experts * h  # a copy for each expert
        + experts * 2 * width  # gate and up
        + experts * width  # their product
        + experts * h  # what the experts return, weighted after that
        + 3 * width  # gate, up and product of the shared expert
    )
    softmax_sums = 4 * heads
    assert saved_bytes_per_token(block("deepseek-v3")) == 2 * (latent_attention + mixture) + softmax_sums


def test_shared_expert_behind_a_gate_keeps_what_the_gate_scales() -> None:
    """Qwen1.5-MoE-A2.7B: 4 of 60 experts of 1408, one of 5632 for all, 16 heads of 128."""
    h, experts, width, shared = 2048, 4, 1408, 5632
    attention = 2 * h + 3 * h + h
    mixture = 2 * h + 2 * experts * h + 3 * experts * width + 3 * shared + h
    assert saved_bytes_per_token(block("qwen1.5-moe-a2.7b")) == 2 * (attention + mixture) + 4 * 16


@pytest.mark.parametrize(("name", "per_layer"), [("gpt-oss-20b", 64), ("t5-small", 32 * 8)])
def test_sinks_and_relative_positions_are_trained_but_not_under_lora(name: str, per_layer: int) -> None:
    core = next(op for op in block(name, 0) if op.kind == "attention")
    trained, frozen = core.cost(SHARD, FLASH), core.cost(SHARD, Numerics(lora_rank=8))
    assert (trained.vector_params, trained.frozen_params) == (per_layer, 0)
    assert (frozen.vector_params, frozen.frozen_params) == (0, per_layer)
    assert trained.params == frozen.params == trained.active_params == per_layer


def test_code_named_in_a_configuration_is_never_imported(tmp_path: Path) -> None:
    """`auto_map` tells transformers which module of the model's repository to run; here it is text like any other key."""
    (tmp_path / "modeling_trap.py").write_text("raise SystemExit('imported')\n")
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 101,
        "auto_map": {"AutoConfig": "modeling_trap.Config", "AutoModelForCausalLM": "modeling_trap.Model"}, "architectures": ["modeling_trap.Model"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = set(sys.modules)
    assert load_model(str(tmp_path / "config.json")).hidden_size == 64
    assert not any("trap" in name or name.startswith(("torch", "transformers")) for name in set(sys.modules) - before)
