"""export -> import gives the same layout and recipe, for every pair that has both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planner import InputError, estimate
from planner.exporters import Export
from planner.importers import IMPORTERS, Given, import_config
from planner.plan import Plan
from tests.exporters.plans import exports

PAIRS = {
    "torchtitan": ("torchtitan", "plan_recipe.py"),
    "megatron": ("megatron-lm", "megatron_args.sh"),
    "deepspeed": ("deepspeed", "ds_config.json"),
}


def seen_by(plan: Plan, found: Export) -> tuple[dict[str, Any], set[str]]:
    """The layout, without what means nothing in it, and the keys that the target could not be told."""
    layout = dict(plan.inputs["layout"])
    if layout["dp_shard"] == 1:
        layout["zero_stage"] = 0
    return layout, {n.key for n in found.not_exported}


def test_every_importer_is_tried() -> None:
    assert set(PAIRS) == set(IMPORTERS)


@pytest.mark.parametrize("source", list(PAIRS))
def test_layout_and_recipe_come_back(source: str, tmp_path: Path) -> None:
    target, name = PAIRS[source]
    for plan, found in exports(target, 40, seed=3):
        (tmp_path / name).write_text(found.files[name])
        inputs = plan.inputs
        model = inputs["model"] if source == "deepspeed" else None
        given = Given(inputs["cluster"]["accelerator"], inputs["cluster"]["num_devices"] if source == "megatron" else None, model)
        if source != "deepspeed" and not _has_own_model(found, source):
            given = Given(given.accelerator, given.num_devices, inputs["model"])
        again = import_config(source, tmp_path / name, given).request
        layout, lost = seen_by(plan, found)
        back = again.layout.complete().model_dump()
        assert {k: back[k] for k in layout if f"layout.{k}" not in lost} == {k: v for k, v in layout.items() if f"layout.{k}" not in lost}
        for key in ("global_batch_size", *(["seq_len"] if source != "deepspeed" else []), "precision", "recompute", "optimizer"):
            if f"workload.{key}" not in lost:
                assert getattr(again.workload, key) == inputs["workload"][key], key
        for key, value in (again.training or {}).items():
            assert inputs["training"].get(key, value) == value, key
        assert again.cluster.num_devices == inputs["cluster"]["num_devices"]


def _has_own_model(found: Export, source: str) -> bool:
    text = next(iter(found.files.values()))
    odd = ("multi-latent", "shared-expert", "moe-layer-freq", "add-qkv-bias", "LayerNorm") if source == "megatron" else ("qwen3",)
    return not any(word in text for word in odd)


def test_models_come_back(tmp_path: Path) -> None:
    from planner.architectures import load_model
    from planner.graph import count_params

    tried = 0
    for source in ("torchtitan", "megatron"):
        target, name = PAIRS[source]
        for plan, found in exports(target, 12, seed=5, presets=("llama-3.1-8b", "tinyllama-1.1b", "gpt2", "mixtral-8x7b")):
            (tmp_path / name).write_text(found.files[name])
            again = import_config(source, tmp_path / name, Given("h100", plan.inputs["cluster"]["num_devices"])).request
            assert count_params(load_model(again.model))["total"] == plan.params.total
            tried += 1
    assert tried == 24


HAND_WRITTEN = """#!/bin/bash
# 70B on 64 GPUs
export CUDA_DEVICE_MAX_CONNECTIONS=1
torchrun --nproc_per_node 8 pretrain_gpt.py \\
    --num-layers 80 --hidden-size 8192 --ffn-hidden-size=28672 --num-attention-heads 64 \\
    --group-query-attention --num-query-groups 8 --vocab-size 128256 --swiglu --normalization RMSNorm --disable-bias-linear \\
    --position-embedding-type rope --untie-embeddings-and-output-weights --max-position-embeddings 8192 --seq-length 8192 \\
    --tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 5 \\
    --use-distributed-optimizer --micro-batch-size 1 --global-batch-size 128 --train-iters 1000 --bf16 --lr 1.5e-4 \\
    --fp8-format hybrid --recompute-granularity full --exotic-option 3
"""


def test_a_script_of_a_user(tmp_path: Path) -> None:
    (tmp_path / "train.sh").write_text(HAND_WRITTEN)
    found = import_config("megatron", tmp_path / "train.sh", Given("h100", 64))
    layout = found.request.layout
    assert (layout.tp, layout.pp, layout.num_virtual_stages, layout.dp_shard, layout.schedule) == (8, 4, 4, 2, "interleaved_1f1b")
    assert (found.request.workload.precision, found.request.workload.recompute) == ("fp8", "full")
    assert set(found.ignored) == {"--exotic-option", "--nproc_per_node"}
    plan = estimate(found.request)
    assert plan.params.total == pytest.approx(70.55e9, rel=1e-3)


def test_a_toml_of_torchtitan(tmp_path: Path) -> None:
    (tmp_path / "train.toml").write_text(
        '[model]\nname = "llama3"\nflavor = "70B"\nconverters = ["float8"]\n[training]\nlocal_batch_size = 1\nseq_len = 8192\nsteps = 1000\n'
        "[parallelism]\ndata_parallel_shard_degree = -1\ntensor_parallel_degree = 8\n"
        '[activation_checkpoint]\nmode = "full"\n[optimizer]\nlr = 1.5e-4\n'
    )
    request = import_config("torchtitan", tmp_path / "train.toml", Given("h100", 256)).request
    assert request.model == "llama-3.1-70b"
    assert (request.layout.dp_shard, request.layout.tp, request.layout.zero_stage, request.workload.global_batch_size) == (32, 8, 3, 32)
    assert (request.workload.precision, request.workload.recompute, request.training) == ("fp8", "full", {"num_steps": 1000, "learning_rate": 1.5e-4})


def test_a_recipe_is_never_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(
        f"open({str(canary)!r}, 'w').write('x')\ndef plan():\n    cfg = llama3_8b()\n    cfg.training.steps = __import__('os').getpid()\n"
    )
    found = import_config("torchtitan", tmp_path / "evil.py", Given("h100", 8))
    assert not canary.exists()
    assert found.ignored


@pytest.mark.parametrize(
    ("source", "text", "key"),
    [
        ("deepspeed", "{", "json"),
        ("deepspeed", '{"train_micro_batch_size_per_gpu": 1}', "--num-devices"),
        ("deepspeed", '{"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}', "train_batch_size"),
        ("deepspeed", '{"train_batch_size": true, "train_micro_batch_size_per_gpu": 2}', "train_batch_size"),
        ("megatron", "--num-layers 4 'open", "script"),
        ("megatron", "--num-layers $N --hidden-size 8 --num-attention-heads 1 --vocab-size 9", "num-layers"),
        ("megatron", "--bf16", "--num-layers"),
        ("torchtitan", "def plan(:", "python"),
        ("torchtitan", "cfg = x()\ncfg.parallelism.tensor_parallel_degree = 'two'", "parallelism.tensor_parallel_degree"),
    ],
)  # fmt: skip
def test_bad_files_are_explained(source: str, text: str, key: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(InputError) as caught:
        import_config(source, tmp_path / "file", Given("h100", None, "llama-3.1-8b" if source == "deepspeed" else None))
    assert caught.value.problems[0].key == key


def test_command_line_answers_what_it_would_cost(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(
        '{"train_batch_size": 64, "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": true}, "zero_optimization": {"stage": 3}, "mystery": 1}'
    )
    argv = [sys.executable, "-m", "planner", "import", str(tmp_path / "ds.json"), "--from", "deepspeed", "--model", "llama-3.1-8b"]
    done = subprocess.run(
        [*argv, "--accelerator", "h100", "--num-devices", "32", "--out", str(tmp_path / "plan.yaml")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert "not understood: mystery" in done.stderr
    priced = subprocess.run([sys.executable, "-m", "planner", "estimate", str(tmp_path / "plan.yaml")], capture_output=True, text=True)
    assert "dp_shard 32, zero 3, micro-batch 2" in priced.stdout
    assert subprocess.run(argv, capture_output=True, text=True).returncode == 2
