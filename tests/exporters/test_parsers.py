"""The targets' own parsers read what is exported, for 40 generated plans each. A target whose package is missing is skipped.

Run them with `pytest -m slow tests/exporters/test_parsers.py`, after `pip install` of any of: torchtitan, deepspeed, accelerate, litgpt,
skypilot, jsonschema, megatron-core, maxtext, nanotron.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from planner.plan import Plan
from tests.exporters.plans import SMALL, exports

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
NUM_PLANS = 40


def needs(*modules: str) -> Any:
    """The first of these modules, or a skip that names what is missing."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"{name} cannot be imported: {error}")
    return sys.modules[modules[0]]


def filled(text: str) -> str:
    return re.sub(r"<([A-Z_]+)>", r"\1", text)


def test_torchtitan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("torchtitan.config.manager")
    from torchtitan.config.manager import ConfigManager
    from torchtitan.distributed.parallel_dims import ParallelDims

    monkeypatch.syspath_prepend(str(tmp_path))
    for i, (plan, found) in enumerate(exports("torchtitan", NUM_PLANS)):
        (tmp_path / f"recipe_{i}.py").write_text(found.files["plan_recipe.py"])
        importlib.invalidate_caches()
        config = ConfigManager().parse_args(["--module", f"recipe_{i}", "--config", "plan"])
        dims, layout = ParallelDims.from_config(config.parallelism, plan.layout.num_devices), plan.layout
        assert (dims.dp_replicate, dims.dp_shard, dims.cp, dims.tp, dims.pp, dims.ep) == (
            layout.dp_replicate, layout.dp_shard, layout.cp, layout.tp, layout.pp, layout.ep)  # fmt: skip
        training = config.training
        accumulation = training.global_batch_size // (training.local_batch_size * layout.dp)
        assert accumulation * training.local_batch_size * layout.dp == plan.inputs["workload"]["global_batch_size"]
        parts = config.parallelism.module_fqns_per_model_part
        if layout.pp > 1:
            names = [name for part in parts for name in part]
            assert names == ["tok_embeddings", *(f"layers.{n}" for n in range(len(config.model_spec.model.layers))), "norm", "lm_head"]
            assert len(parts) == layout.pp * layout.num_virtual_stages


def test_torchtitan_builds_the_model_that_was_priced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("torchtitan.config.manager")
    import torch
    from torchtitan.config.manager import ConfigManager

    monkeypatch.syspath_prepend(str(tmp_path))
    (plan, found), *_ = exports("torchtitan", 1, presets=(SMALL,))
    (tmp_path / "recipe_small.py").write_text(found.files["plan_recipe.py"])
    config = ConfigManager().parse_args(["--module", "recipe_small", "--config", "plan"])
    with torch.device("meta"):
        model = config.model_spec.model.build()
    assert sum(p.numel() for p in model.parameters()) == plan.params.total


def test_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("megatron.training.arguments")
    import torch
    from megatron.training.arguments import parse_args, validate_args

    from planner.importers.megatron import read_options

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(major=9, minor=0))
    for plan, found in exports("megatron-lm", NUM_PLANS):
        monkeypatch.setenv("WORLD_SIZE", str(plan.layout.num_devices))
        monkeypatch.setenv("RANK", "0")
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
        text = filled(found.files["megatron_args.sh"])
        for name, value in re.findall(r"^export (\w+)=(\w+)$", text, re.MULTILINE):
            monkeypatch.setenv(name, value)
        options = read_options(text)
        words = [w for name, value in options.items() for w in ([f"--{name}"] if value is True else [f"--{name}", value])]
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *words])
        arguments = validate_args(parse_args()) or parse_args()
        layout = plan.layout
        assert arguments.tensor_model_parallel_size == layout.tp
        assert arguments.data_parallel_size == layout.dp
        assert arguments.num_layers == read_layers(plan)
        if layout.num_virtual_stages > 1:
            assert arguments.virtual_pipeline_model_parallel_size == layout.num_virtual_stages


def read_layers(plan: Plan) -> int:
    from planner.architectures import load_model

    return load_model(plan.inputs["model"]).num_layers


def test_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = needs("deepspeed.runtime.config")
    monkeypatch.setattr(module.dist, "get_rank", lambda *_: 0)
    from deepspeed.runtime.config import DeepSpeedConfig

    class Grid:
        """What DeepSpeedConfig asks a mesh for: the data-parallel size."""

        def __init__(self, size: int) -> None:
            self.size = size

        def get_data_parallel_world_size(self) -> int:
            return self.size

    for plan, found in exports("deepspeed", NUM_PLANS):
        config = DeepSpeedConfig(json.loads(found.files["ds_config.json"]), mpu=Grid(plan.layout.dp))
        assert config.train_batch_size == plan.inputs["workload"]["global_batch_size"]
        assert config.gradient_accumulation_steps * plan.layout.dp * plan.layout.micro_batch_size == config.train_batch_size
        assert config.zero_optimization_stage == (plan.layout.zero_stage if plan.layout.dp_shard > 1 else 0)


def test_accelerate(tmp_path: Path) -> None:
    needs("accelerate.commands.launch")
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import ParallelismConfig
    from transformers import AutoConfig, HfArgumentParser, TrainingArguments

    for plan, found in exports(
        "accelerate", NUM_PLANS, fills={"HEAD_NODE": "10.0.0.1", "RUN_DIR": str(tmp_path / "run"), "TRAIN_SCRIPT": "train.py"}
    ):
        for name, text in found.files.items():
            (tmp_path / name).write_text(text)
        config = ClusterConfig.from_yaml_file(str(tmp_path / "accelerate.yaml"))
        assert config.num_processes == plan.layout.num_devices
        arguments = launch_command_parser().parse_args(["--config_file", str(tmp_path / "accelerate.yaml"), "train.py"])
        with contextlib.suppress(SystemExit):
            arguments, *_ = _validate_launch_command(arguments)
        sizes = {name.removeprefix("parallelism_config_"): size for name, size in config.parallelism_config.items()}
        if sizes:
            assert ParallelismConfig(**sizes).total_size == plan.layout.num_devices
        values = json.loads(found.files["training_args.json"])
        if values.pop("bf16") or values.pop("fp16", False):
            values["use_cpu"] = True  # half precision is checked against a device
        (trained,) = HfArgumentParser(TrainingArguments).parse_dict({k: v for k, v in values.items() if k not in ("tf32", "fp16")})
        assert trained.max_steps == plan.inputs["training"]["num_steps"]
        AutoConfig.from_pretrained(str(tmp_path / "config.json"))


def test_litgpt(tmp_path: Path) -> None:
    needs("litgpt.pretrain", "jsonargparse")
    from jsonargparse import ArgumentParser
    from litgpt.pretrain import setup

    plans = exports("litgpt", NUM_PLANS, tp=1, cp=1, pp=1, ep=1, sequence_parallel=False, schedule="1f1b", num_virtual_stages=1)
    for plan, found in plans:
        (tmp_path / "pretrain.yaml").write_text(filled(found.files["pretrain.yaml"]))
        parser = ArgumentParser()
        parser.add_function_arguments(setup, fail_untyped=False)
        values = parser.parse_path(str(tmp_path / "pretrain.yaml"))
        config = parser.instantiate_classes(values).model_config
        assert config.n_layer == read_layers(plan)
        assert values.train.global_batch_size == plan.inputs["workload"]["global_batch_size"]


def test_nanotron() -> None:
    needs("nanotron.config")
    from nanotron.config import Config, get_config_from_dict

    for plan, found in exports("nanotron", NUM_PLANS, cp=1, ep=1, presets=("llama-3.1-8b", "tinyllama-1.1b", "llama-3.2-1b", SMALL)):
        config = get_config_from_dict(yaml.safe_load(filled(found.files["nanotron.yaml"])), config_class=Config)
        assert config.parallelism.dp * config.parallelism.tp * config.parallelism.pp == plan.layout.num_devices
        assert config.global_batch_size == plan.inputs["workload"]["global_batch_size"]


def test_skypilot() -> None:
    needs("sky.utils.schemas", "jsonschema")
    import jsonschema
    from sky.utils import schemas

    for _, found in exports("skypilot", NUM_PLANS):
        task = yaml.safe_load(filled(found.files["task.yaml"]))
        jsonschema.validate(task, schemas.get_task_schema())
        jsonschema.validate(task["resources"], schemas.get_resources_schema())


def test_maxtext_knows_every_key() -> None:
    base = needs("maxtext.configs.pyconfig")
    known = yaml.safe_load((Path(str(base.__file__)).parent / "base.yml").read_text())
    for plan, found in exports("maxtext", NUM_PLANS):
        values = yaml.safe_load(found.files["maxtext.yml"])
        assert set(values) <= {*known, "base_config"}, set(values) - set(known)
        product = 1
        for name, value in values.items():
            product *= value if name.startswith(("ici_", "dcn_")) else 1
        assert product == plan.layout.num_devices
        batch = values["per_device_batch_size"] * plan.layout.num_devices * values.get("gradient_accumulation_steps", 1)
        assert batch == plan.inputs["workload"]["global_batch_size"]


def test_hf_config_builds_the_model_that_was_priced(tmp_path: Path) -> None:
    needs("transformers", "torch")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    seen = set()
    for plan, found in exports("hf-config", NUM_PLANS):
        (tmp_path / "config.json").write_text(found.files["config.json"])
        config = AutoConfig.from_pretrained(str(tmp_path))
        if str(plan.inputs["model"]) in seen:
            continue
        seen.add(str(plan.inputs["model"]))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in model.parameters()) == plan.params.total, plan.inputs["model"]
    assert len(seen) >= 5


def test_bash_reads_every_script(tmp_path: Path) -> None:
    for target, name in (("torchrun", "run.sh"), ("slurm", "run.sbatch"), ("megatron-lm", "megatron_args.sh")):
        for _, found in exports(target, NUM_PLANS):
            (tmp_path / name).write_text(found.files[name])
            assert subprocess.run(["bash", "-n", str(tmp_path / name)], capture_output=True).returncode == 0
