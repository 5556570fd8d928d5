"""Nothing is dropped in silence: a key of the plan that changes either changes the files, or is listed, or is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from planner import InputError, estimate
from planner.exporters import EXPORTERS, Export, export_plan
from planner.plan import Plan

BASE: dict[str, Any] = {
    "model": {
        "model_type": "llama", "name": "mine", "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 128, "intermediate_size": 4096, "vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False,
        "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "attention_dropout": 0.0,
    },
    "workload": {
        "job": "pretrain", "seq_len": 1024, "global_batch_size": 64, "tokens": 1e9, "precision": "bf16", "optimizer": "adamw", "recompute": "none",
        "attention_kernel": "auto", "loss_kernel": "auto",
    },
    "cluster": {"accelerator": "h100-80gb-sxm", "num_devices": 8, "node_size": 8, "pricing": "on_demand"},
    "stack": "torchtitan",
    "layout": {"dp_shard": 8, "zero_stage": 3, "micro_batch_size": 1},
    "training": {
        "learning_rate": 1e-3, "warmup_steps": 10, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "clip_norm": 1.0, "num_steps": 100,
        "lr_schedule": "cosine", "min_lr_fraction": 0.1, "seed": 1, "checkpoint_every_steps": 50, "keep_checkpoints": 3, "data": "synthetic",
    },
}  # fmt: skip
MIXED = copy.deepcopy(BASE)
"""Another corner: pipeline, tensor parallelism, replicas."""
MIXED["layout"] = {
    "dp_replicate": 2, "dp_shard": 2, "tp": 2, "pp": 2, "schedule": "interleaved_1f1b", "num_virtual_stages": 2, "zero_stage": 2,
    "sequence_parallel": True, "micro_batch_size": 2,
}  # fmt: skip
MIXED["cluster"]["num_devices"] = 16
CHANGES: dict[str, tuple[Any, ...]] = {
    "model.hidden_size": (2048,), "model.num_hidden_layers": (16,), "model.num_attention_heads": (16,), "model.num_key_value_heads": (8,),
    "model.head_dim": (64,), "model.intermediate_size": (2048,), "model.vocab_size": (64000,), "model.max_position_embeddings": (8192,),
    "model.tie_word_embeddings": (True,), "model.rope_theta": (1e4,), "model.rms_norm_eps": (1e-6,), "model.attention_dropout": (0.1,),
    "model.attention_bias": (True,), "model.mlp_bias": (True,), "model.initializer_range": (0.01,),
    "model.rope_scaling": ({"rope_type": "linear", "factor": 2.0},),
    "workload.job": ("finetune",), "workload.seq_len": (2048,), "workload.global_batch_size": (128,),
    "workload.precision": ("fp32", "fp16", "fp8", "tf32"),
    "workload.optimizer": ("sgd", "sgd_momentum", "adafactor", "adamw_8bit", "muon"), "workload.recompute": ("selective", "full"),
    "workload.attention_kernel": ("flash", "unfused"), "workload.loss_kernel": ("fused", "chunked", "unfused"),
    "workload.activation_input": ("fp8",),
    "layout.zero_stage": (1, 2, 3), "layout.micro_batch_size": (4,), "layout.schedule": ("gpipe", "1f1b"), "layout.sequence_parallel": (False,),
    "training.learning_rate": (2e-3,), "training.warmup_steps": (11,), "training.weight_decay": (0.2,), "training.beta1": (0.8,),
    "training.beta2": (0.99,), "training.eps": (1e-6,), "training.clip_norm": (0.5, None), "training.num_steps": (200,),
    "training.lr_schedule": ("wsd", "constant"), "training.min_lr_fraction": (0.2,), "training.seed": (2,), "training.checkpoint_every_steps": (60,),
    "training.keep_checkpoints": (4,), "training.data": ("corpus",), "training.spike_sigmas": (7.0,), "training.momentum": (0.8,),
    "stack": ("megatron-core",),
}  # fmt: skip
SAME_SHAPE = [
    {"dp_replicate": 8, "dp_shard": 1, "zero_stage": 0}, {"tp": 2, "dp_shard": 4}, {"cp": 2, "dp_shard": 4}, {"pp": 2, "dp_shard": 4},
    {"dp_replicate": 2, "dp_shard": 4},
]  # fmt: skip
CASES = [(name, key, value) for name in ("BASE", "MIXED") for key, values in CHANGES.items() for value in values]


def changed(base: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    request = copy.deepcopy(base)
    section, _, name = key.partition(".")
    if name:
        request[section][name] = value
    else:
        request[section] = value
    if key == "layout.schedule" and value != "interleaved_1f1b":
        request["layout"]["num_virtual_stages"] = 1
    return request


def body(found: Export) -> list[str]:
    """The files without their header: every export has its plan's hash there."""
    return ["\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")) for text in found.files.values()]


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan | None]:
    """Each base and each change of it, priced once; None where it is not legal."""
    found: dict[str, Plan | None] = {}
    for name, base in (("BASE", BASE), ("MIXED", MIXED)):
        found[name] = estimate(base)
        for case, key, value in CASES:
            if case == name:
                try:
                    found[f"{name} {key} {value}"] = estimate(changed(base, key, value))
                except InputError:
                    found[f"{name} {key} {value}"] = None
    return found


@pytest.mark.parametrize("target", [name for name, e in EXPORTERS.items() if e.kind != "launcher" and name != "reftrain"])
def test_what_changes_is_seen(target: str, plans: dict[str, Plan | None]) -> None:
    silent, tried = [], 0
    for name in ("BASE", "MIXED"):
        base_plan = plans[name]
        assert base_plan is not None
        try:
            base = export_plan(base_plan, target)
        except InputError:
            continue
        for case, key, value in CASES:
            plan = plans[f"{name} {key} {value}"]
            is_idle = key == "layout.schedule" and plan is not None and plan.layout.pp == 1
            if case != name or plan is None or plan.inputs == base_plan.inputs or is_idle:
                continue
            try:
                found = export_plan(plan, target)
            except InputError:
                continue
            tried += 1
            listed = {n.key for n in found.not_exported} | {n.key for n in base.not_exported}
            own = {"model.num_hidden_layers": "model.num_layers", "model.rms_norm_eps": "model.norm_eps"}.get(key, key)
            if body(found) == body(base) and own not in listed:
                silent.append((name, key, value))
    assert tried > 40
    assert not silent


@pytest.mark.parametrize("target", [name for name, e in EXPORTERS.items() if e.kind != "launcher" and name != "reftrain"])
def test_another_layout_is_another_file_or_refused(target: str) -> None:
    texts = set()
    for layout in [{}, *SAME_SHAPE]:
        request = copy.deepcopy(BASE)
        request["layout"] |= layout
        plan = estimate(request)
        try:
            found = export_plan(plan, target)
        except InputError:
            continue
        texts.add(("\n".join(body(found)), tuple(n.key for n in found.not_exported)))
    assert len(texts) >= 1
    if target != "hf-config":
        assert len({text for text, _ in texts}) == len(texts)
