"""Layouts drawn by a seed for `bench_memory.py`: families, sizes, worlds, parallelism, batches, recompute and precision.

A layout is kept if the planner's rules and the trainer take it.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from planner.architectures import load_model, read_model_config
from planner.errors import InputError
from planner.graph import count_params
from planner.plan import build_request
from planner.schedules import check_schedule
from reftrain.config import make_run_config
from reftrain.model import check_supported
from reftrain.runnable import check_runnable

__all__ = ["Case", "generate"]

MAX_STATE_BYTES = 96e9
"""Per device with everything sharded: smaller clusters would hold little but states, which are easy."""
MAX_BLOCK_PASSES = 240
"""Blocks times microbatches times stages of one dry run; deeper models lose layers."""
MAX_TOKENS = 2**17
"""Of one microbatch."""

PRESETS = {
    "llama": ("smollm-135m", "tinyllama-1.1b", "llama-3.2-3b", "mistral-7b", "llama-3.1-8b", "llama-13b", "llama-3.1-70b", "llama-3.1-405b"),
    "gpt2": ("gpt2", "gpt2-medium", "gpt2-xl", "gpt3-6.7b", "gpt3-13b", "megatron-39.1b", "gpt3-175b"),
    "qwen": ("qwen2-0.5b", "qwen3-0.6b", "qwen2-7b", "qwen3-8b", "qwen3-32b", "qwen2.5-72b"),
    "mixture": ("qwen1.5-moe-a2.7b", "qwen3-30b-a3b", "mixtral-8x7b", "mixtral-8x22b", "qwen3-235b-a22b"),
    "deepseek": ("deepseek-v2-lite", "deepseek-v2", "deepseek-v3"),
    "parallel": ("pythia-70m", "pythia-410m", "pythia-1.4b", "pythia-6.9b", "gpt-neox-20b", "falcon-7b", "falcon-40b", "palm-8b", "palm-62b"),
    "bert": ("bert-base", "bert-large"),
}
FAMILIES = ("llama", "llama", "llama", "gpt2", "gpt2", "qwen", "qwen", "mixture", "mixture", "deepseek", "deepseek", "parallel", "bert", "bert")
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
DROPOUTS = {
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
}


@dataclass(frozen=True)
class Case:
    """One plan, and the stages of it that are simulated."""

    family: str
    name: str
    plan: dict[str, Any]
    stages: tuple[int, ...]
    note: str = ""

    @property
    def key(self) -> str:
        """Of the cache."""
        return hashlib.sha256(json.dumps([self.plan, self.stages], sort_keys=True).encode()).hexdigest()[:16]

    @property
    def num_layers(self) -> int:
        """As planned."""
        return int(self.plan["model"][_layer_key(self.plan["model"])])

    @property
    def num_microbatches(self) -> int:
        """Of one data-parallel rank."""
        layout = self.plan["layout"]
        return int(self.plan["workload"]["global_batch_size"] // (layout["dp_replicate"] * layout["dp_shard"] * layout["micro_batch_size"]))

    @property
    def num_block_passes(self) -> float:
        """What its dry run takes, about; those with experts take thrice as long."""
        layout = self.plan["layout"]
        shown = self.num_microbatches if layout["schedule"] == "gpipe" else min(self.num_microbatches, max(3 * layout["pp"], 4))
        return float(self.num_layers / layout["pp"] * shown * len(self.stages) * (3 if self.family in ("mixture", "deepseek") else 1))

    def with_layers(self, num_layers: int) -> Case:
        """The same with a shallower model."""
        model = {**self.plan["model"], _layer_key(self.plan["model"]): num_layers}
        return replace(self, plan={**self.plan, "model": model}, note=f"{num_layers} layers of {self.num_layers}")

    @property
    def smallest_depth(self) -> int:
        """Layers that the pipeline needs, and one mixture among them."""
        layout, dense = self.plan["layout"], int(self.plan["model"].get("first_k_dense_replace", 0))
        return max(int(layout["pp"] * layout["num_virtual_stages"]), dense + 1)


def _layer_key(model: dict[str, Any]) -> str:
    return next(key for key in LAYER_KEYS if key in model)


def generate(seed: int, count: int) -> list[Case]:
    """The first `count` layouts of a seed that can run; a larger count only adds to them."""
    rng, found = random.Random(seed), dict[str, Case]()
    while len(found) < count:
        case = _draw(rng)
        if case is not None and _can_run(case):
            found[case.key] = case
    return list(found.values())


def _can_run(case: Case) -> bool:
    layout = case.plan["layout"]
    try:
        config = make_run_config(build_request(case.plan))
        check_runnable(config, torch.device("cpu"))
        check_supported(config.model)
        check_schedule(layout["schedule"], layout["pp"], layout["num_virtual_stages"], case.num_microbatches)
    except InputError:
        return False
    return True


def _draw(rng: random.Random) -> Case | None:
    """One layout, perhaps one that no rule allows; None: too long a dry run."""
    degrees = _degrees(rng, rng.randrange(11))
    world, pp, tp = int(np.prod(list(degrees.values()))), degrees["pp"], degrees["tp"]
    family = rng.choice(FAMILIES)
    name, model = ("tiny", _tiny(rng, family)) if rng.random() < 0.25 else _preset(rng, family, world)
    if tp > 1 or rng.random() < 0.5:
        model |= dict.fromkeys(DROPOUTS.get(model["model_type"], ()), 0.0)
    if tp > 1 and "vocab_size" in model:
        model["vocab_size"] = -(-model["vocab_size"] // 128) * 128
    recompute, precision = rng.choice(("none", "selective", "full")), rng.choice(("bf16", "bf16", "bf16", "fp32"))
    schedule = rng.choice(("gpipe", "1f1b", "interleaved_1f1b", "zb_h1")) if pp > 1 else "1f1b"
    seq_len, micro_batch = min(2 ** rng.randint(8, 15), _positions(model)), rng.choice((1, 1, 2, 4, 8))
    count = (
        pp * rng.choice((1, 1, 2, 2, 3)) + (rng.choice((0, 0, 1)) if schedule != "interleaved_1f1b" else 0) if pp > 1 else rng.choice((1, 1, 2, 3, 8))
    )
    dp = degrees["dp_replicate"] * degrees["dp_shard"]
    layout: dict[str, Any] = {
        **degrees, "schedule": schedule, "num_virtual_stages": rng.choice((2, 2, 3, 4)) if schedule == "interleaved_1f1b" else 1,
        "sequence_parallel": tp > 1 and rng.random() < 0.6, "micro_batch_size": micro_batch, "ep": 1,
        "zero_stage": rng.choice((1, 2, 3, 3)) if degrees["dp_shard"] > 1 else 0,
    }  # fmt: skip
    if family in ("mixture", "deepseek"):
        layout["ep"] = rng.choice([1, *_expert_degrees(model, world // pp)])
        layout["sequence_parallel"] |= layout["ep"] > 1 and tp > 1
    workload = {"seq_len": seq_len, "global_batch_size": count * dp * micro_batch, "tokens": 1e9, "precision": precision, "recompute": recompute}
    cluster = {"accelerator": "h100-80gb-sxm", "num_devices": world}
    plan = {"schema_version": 1, "model": model, "workload": workload, "cluster": cluster, "stack": "reftrain", "layout": layout}
    stages = {0, pp - 1} | ({rng.randrange(pp)} if rng.random() < 0.4 else set())
    case = Case(family, name, plan, tuple(sorted(stages)))
    if seq_len * micro_batch > MAX_TOKENS:
        return None
    return _not_too_long(case)


def _degrees(rng: random.Random, num_doublings: int) -> dict[str, int]:
    """A world of 2^n devices, or now and then one with a 3 in it, dealt out to the axes."""
    axes = ("dp_replicate", "dp_shard", "dp_shard", "tp", "tp", "cp", "pp", "pp")
    degrees = dict.fromkeys(axes, 1)
    limits = {"tp": 16, "cp": 16, "pp": 32}
    factors = [2] * num_doublings
    if num_doublings >= 2 and rng.random() < 0.15:
        factors = [3, *factors[2:]]
    some = rng.sample(sorted(set(axes)), rng.randint(2, 5))
    for factor in factors:
        axis = rng.choice([name for name in axes if name in some])
        axis = axis if degrees[axis] * factor <= limits.get(axis, 1024) else "dp_shard"
        degrees[axis] *= factor
    return degrees


def _expert_degrees(model: dict[str, Any], stage_size: int) -> list[int]:
    experts = next(model[key] for key in ("num_local_experts", "n_routed_experts", "num_experts") if key in model)
    return [degree for degree in (2**n for n in range(1, 8)) if experts % degree == 0 and stage_size % degree == 0]


def _positions(model: dict[str, Any]) -> int:
    """Where they are learned."""
    return int({"gpt2": model.get("n_positions", 0), "bert": model.get("max_position_embeddings", 0)}.get(model["model_type"], 2**20))


def _not_too_long(case: Case) -> Case | None:
    layout = case.plan["layout"]
    if case.num_block_passes <= MAX_BLOCK_PASSES:
        return case
    step = layout["pp"] * layout["num_virtual_stages"]
    depth = max(int(case.num_layers * MAX_BLOCK_PASSES / case.num_block_passes) // step * step, case.smallest_depth)
    return case.with_layers(depth) if depth < case.num_layers else None


def _preset(rng: random.Random, family: str, world: int) -> tuple[str, dict[str, Any]]:
    """One of those whose states fit into the cluster, or the smallest."""
    fitting = [name for name in PRESETS[family] if _num_params(name) * 16.0 / world <= MAX_STATE_BYTES]
    name = rng.choice(fitting or PRESETS[family][:1])
    return name, dict(read_model_config(name)[0])


@cache
def _num_params(name: str) -> int:
    return int(count_params(load_model(name))["total"])


def _tiny(rng: random.Random, family: str) -> dict[str, Any]:
    """A model of 1 to 150 million parameters with the switches of its family."""
    heads, layers, vocab = rng.choice((4, 8, 12, 16)), rng.randint(2, 12), rng.choice((1024, 8192, 32000))
    hidden = heads * rng.choice((32, 64))
    base: dict[str, Any] = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocab, "max_position_embeddings": 4096,
    }  # fmt: skip
    decoder = base | {"num_key_value_heads": heads // rng.choice((1, 2, 4)), "intermediate_size": rng.choice((2, 3, 4)) * hidden}
    decoder["tie_word_embeddings"] = rng.random() < 0.5
    experts, active = rng.choice((4, 8, 16)), rng.choice((1, 2))
    if family == "gpt2":
        return {"model_type": "gpt2", "n_embd": hidden, "n_layer": layers, "n_head": heads, "vocab_size": vocab, "n_positions": 4096}
    if family == "bert":
        return {**base, "model_type": "bert", "intermediate_size": 4 * hidden, "type_vocab_size": 2}
    if family == "parallel":
        return {**base, "model_type": "gpt_neox", "intermediate_size": 4 * hidden, "tie_word_embeddings": False}
    if family == "mixture":
        return {**decoder, "model_type": "mixtral", "num_local_experts": experts, "num_experts_per_tok": active}
    if family == "deepseek":
        mla = {"q_lora_rank": rng.choice((None, 2 * hidden // 3 // 8 * 8)), "kv_lora_rank": hidden // 4}
        dims = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "num_key_value_heads": heads}
        moe = {
            "n_routed_experts": experts,
            "n_shared_experts": rng.choice((1, 2)),
            "moe_intermediate_size": hidden // 2,
            "num_experts_per_tok": active,
        }
        return {**decoder, **mla, **dims, **moe, "model_type": "deepseek_v2", "first_k_dense_replace": 1, "moe_layer_freq": 1}
    if family == "qwen":
        return {**decoder, "model_type": "qwen3", "head_dim": rng.choice((32, 64))}
    return {**decoder, "model_type": "llama"}
