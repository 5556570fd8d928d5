"""Plans for the exporters' tests: many that are legal and different, and always the same ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from planner import InputError, estimate
from planner.exporters import Export, export_plan
from planner.plan import Plan
from tests.strategies import is_legal

PRESETS = ("llama-3.1-8b", "llama-3.2-1b", "tinyllama-1.1b", "qwen3-0.6b", "qwen3-30b-a3b", "qwen2-7b", "mixtral-8x7b", "gpt2", "deepseek-v2-lite")
SMALL = {
    "model_type": "llama", "name": "mine", "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 1536, "vocab_size": 32000, "max_position_embeddings": 4096, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
}  # fmt: skip
POWERS = (1, 1, 2, 4)


def random_request(rng: random.Random, presets: tuple[Any, ...] = (*PRESETS, SMALL)) -> dict[str, Any]:
    """A request with every key given; not checked."""
    tp, pp = rng.choice(POWERS), rng.choice((1, 1, 2, 4))
    shard = rng.choice((1, 2, 4, 8))
    schedule = rng.choice(("1f1b", "1f1b", "interleaved_1f1b", "gpipe"))
    layout = {
        "dp_replicate": rng.choice((1, 1, 2)), "dp_shard": shard, "tp": tp, "cp": rng.choice((1, 1, 1, 2)), "pp": pp,
        "schedule": schedule if pp > 1 else "1f1b", "num_virtual_stages": 2 if pp > 1 and schedule == "interleaved_1f1b" else 1,
        "ep": rng.choice((1, 1, 2, 4)), "zero_stage": rng.randint(1, 3) if shard > 1 else 0, "sequence_parallel": tp > 1 and rng.random() < 0.7,
        "micro_batch_size": rng.choice((1, 2)),
    }  # fmt: skip
    world = layout["dp_replicate"] * shard * tp * layout["cp"] * pp
    return {
        "model": rng.choice(presets),
        "workload": {
            "seq_len": rng.choice((512, 1024)), "tokens": 1e9, "precision": rng.choice(("bf16", "bf16", "fp32")),
            "global_batch_size": layout["dp_replicate"] * shard * layout["micro_batch_size"] * rng.choice((1, 4, 8)),
            "optimizer": rng.choice(("adamw", "adamw", "sgd_momentum")), "recompute": rng.choice(("none", "selective", "full")),
        },
        "cluster": {"accelerator": rng.choice(("h100-80gb-sxm", "a100-80gb-sxm")), "num_devices": world, "node_size": min(world, 8)},
        "layout": layout,
        "training": {
            "num_steps": rng.randint(10, 1000), "learning_rate": rng.choice((1e-3, 3e-4, 1e-05)), "warmup_steps": rng.randint(0, 9),
            "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "clip_norm": 1.0, "lr_schedule": rng.choice(("cosine", "wsd")),
            "min_lr_fraction": 0.1, "seed": rng.randint(0, 99), "checkpoint_every_steps": 100, "keep_checkpoints": 3,
        },
    }  # fmt: skip


def random_plans(seed: int = 0, presets: tuple[Any, ...] = (*PRESETS, SMALL), **fixed: Any) -> Iterator[Plan]:
    """Legal plans without end; `fixed`: keys of the layout."""
    rng = random.Random(seed)
    while True:
        request = random_request(rng, presets)
        request["layout"] |= fixed
        if is_legal(request):
            yield estimate(request)


def exports(target: str, count: int, **options: Any) -> list[tuple[Plan, Export]]:
    """The first `count` random plans that a target can run, exported to it."""
    found: list[tuple[Plan, Export]] = []
    fills = options.pop("fills", None)
    for tried, plan in enumerate(random_plans(**options)):
        try:
            found.append((plan, export_plan(plan, target, fills=fills)))
        except InputError:
            assert tried < 200 * count, f"{target} refuses nearly everything"
        if len(found) == count:
            return found
    raise AssertionError
