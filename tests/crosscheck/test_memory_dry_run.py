"""The planner's memory against the real trainer's on fake tensors: every byte of a dry run, stage by stage."""

from __future__ import annotations

from typing import Any

import pytest

from planner.estimate import estimate
from planner.plan import build_request
from planner.stack import load_stack

pytest.importorskip("torch", reason="needs torch: pip install -e '.[dev,reftrain]'")

SEQ_LEN = 1024
MODEL = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 8192, "max_position_embeddings": SEQ_LEN,
}  # fmt: skip


def request(layout: dict[str, Any], num_devices: int, batch: int, is_tied: bool = False, **workload: Any) -> Any:
    return build_request({
        "model": {**MODEL, "tie_word_embeddings": is_tied}, "stack": "reftrain",
        "cluster": {"accelerator": "h100", "num_devices": num_devices}, "layout": layout,
        "workload": {"seq_len": SEQ_LEN, "global_batch_size": batch, "tokens": 1e9, **workload},
    })  # fmt: skip


CASES = {
    "bf16, four microbatches": ({}, 1, 4, {}),
    "bf16, one microbatch": ({}, 1, 1, {}),
    "fp32": ({}, 1, 4, {"precision": "fp32"}),
    "full recompute": ({}, 1, 4, {"recompute": "full"}),
    "selective recompute": ({}, 1, 4, {"recompute": "selective"}),
    "tp 4, sequence parallel": ({"tp": 4, "sequence_parallel": True}, 4, 4, {}),
    "ZeRO-2 over 8": ({"dp_shard": 8, "zero_stage": 2}, 8, 16, {}),
    "ZeRO-3 over 8": ({"dp_shard": 8, "zero_stage": 3}, 8, 8, {}),
    "LoRA": ({}, 1, 4, {"job": "lora"}),
    "LoRA, queries and values": ({}, 1, 4, {"job": "lora", "lora_targets": "query_value"}),
    "LoRA, NF4, full recompute": ({}, 1, 4, {"job": "lora", "frozen_format": "nf4", "recompute": "full"}),
    "LoRA, tied table": ({}, 1, 4, {"job": "lora", "recompute": "full"}),
    "pp 2": ({"pp": 2, "schedule": "1f1b"}, 2, 8, {}),
}
"""Layout, devices, global batch, workload."""


@pytest.mark.parametrize("name", CASES)
def test_every_stage_holds_what_the_planner_says(name: str) -> None:
    from reftrain.config import make_run_config
    from reftrain.dry_run import dry_run

    layout, num_devices, batch, workload = CASES[name]
    asked = request({**layout, "micro_batch_size": 1}, num_devices, batch, "tied" in name, **workload)
    plan, stack = estimate(asked), load_stack("reftrain")
    for stage in dry_run(make_run_config(asked)).stages:
        parts = plan.memory.stages[stage.stage].breakdown_bytes
        # A dry run has no runtime, no allocator and no communication library.
        ours = sum(parts.values()) - parts["context"] - parts["allocator_slack"] - stack.collective_buffers * (num_devices > 1)
        assert ours == pytest.approx(stage.peak_bytes, rel=0.02), f"stage {stage.stage}: {parts} against {stage.breakdown_bytes}"
