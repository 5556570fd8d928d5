"""What every export keeps: known versions only, nothing dropped in silence, scripts that bash reads, files that are whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planner import InputError, estimate
from planner.exporters import EXPORTERS, export_plan, split_target
from planner.files import parse_yaml
from planner.plan import Plan, build_request

REQUEST: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "workload": {"seq_len": 8192, "global_batch_size": 64, "tokens": 1e9, "precision": "bf16", "recompute": "full"},
    "cluster": {"accelerator": "h100-80gb-sxm", "num_devices": 16},
    "layout": {"dp_shard": 8, "tp": 2, "zero_stage": 3, "sequence_parallel": True},
    "training": {"learning_rate": 3e-4, "num_steps": 20, "data": "synthetic"},
}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return estimate(REQUEST)


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "planner", *argv], capture_output=True, text=True)


def test_versions_are_known_or_refused() -> None:
    assert split_target("slurm")[1] == split_target("slurm", "25.05")[1] == split_target("slurm@25.05")[1]
    for wrong in ("slurm@1", "slrum"):
        with pytest.raises(InputError) as caught:
            split_target(wrong)
        assert "22.05" in str(caught.value) or "slurm" in caught.value.problems[0].fix
    with pytest.raises(InputError, match="once"):
        split_target("slurm@22.05", "25.05")


@pytest.mark.parametrize("name", list(EXPORTERS))
def test_every_target_names_versions_and_itself(name: str) -> None:
    exporter = EXPORTERS[name]
    assert exporter.name == name
    assert exporter.versions
    assert exporter.summary


def test_the_plan_that_reftrain_gets_is_the_same_request(plan: Plan) -> None:
    found = export_plan(plan, "reftrain")
    again = build_request(parse_yaml(found.files["plan.yaml"]))
    assert again.model_copy(update={"prediction": None, "provenance": None}) == plan.to_request()
    assert not found.not_exported


def test_paths_of_this_machine_do_not_go_along(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "vocab_size": 512,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    request = REQUEST | {"model": str(tmp_path / "config.json"), "training": {"data": str(tmp_path / "data")}}
    found = export_plan(build_request(request), "slurm")
    assert str(tmp_path) not in json.dumps(found.files)
    assert parse_yaml(found.files["plan.yaml"])["model"]["hidden_size"] == 256
    assert {p.name for p in found.placeholders} == {"DATA_DIR", "RUN_DIR", "ACCOUNT", "PARTITION"}


@pytest.mark.parametrize("launcher", [name for name, e in EXPORTERS.items() if e.kind == "launcher"])
def test_nodes_and_processes_cover_the_devices(plan: Plan, launcher: str) -> None:
    words = "".join(export_plan(plan, launcher).files.values()).replace('"', " ").replace("'", " ").replace(":", " ").split()
    assert any(words[i].lower().replace("-", "").endswith(("nodes", "completions")) and words[i + 1] == "2" for i in range(len(words) - 1)) or any(
        word.endswith("nodes=2") for word in words
    )


@pytest.mark.parametrize("target", ["slurm", "torchrun"])
def test_scripts_are_bash(plan: Plan, target: str, tmp_path: Path) -> None:
    for name, text in export_plan(plan, target).files.items():
        if text.startswith("#!"):
            (tmp_path / name).write_text(text)
            done = subprocess.run(["bash", "-n", str(tmp_path / name)], capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, "")


def test_a_script_with_open_placeholders_stops(plan: Plan, tmp_path: Path) -> None:
    single = estimate(REQUEST | {"cluster": {"accelerator": "h100", "num_devices": 8}, "layout": {"dp_shard": 8, "zero_stage": 3}})
    (tmp_path / "torchrun").write_text('#!/bin/sh\necho STARTED "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    for fills, status in (({}, 2), ({"RUN_DIR": "/shared/my run"}, 0)):
        (tmp_path / "run.sh").write_text(export_plan(single, "torchrun", fills=fills).files["run.sh"])
        done = subprocess.run(["bash", str(tmp_path / "run.sh")], capture_output=True, text=True, env=environment)
        assert done.returncode == status, done.stderr
    assert "--out /shared/my run --resume" in done.stdout


def test_fills_are_checked(plan: Plan) -> None:
    with pytest.raises(InputError, match="has no such placeholder"):
        export_plan(plan, "slurm", fills={"IMAGE": "x"})
    for wrong in ("a b", "a\n#SBATCH --wrap=id", "$(id)", ""):
        with pytest.raises(InputError):
            export_plan(plan, "slurm", fills={"ACCOUNT": wrong})


def test_launchers_start_trainers_only(plan: Plan) -> None:
    with pytest.raises(InputError) as caught:
        export_plan(plan, "slurm", trainer="slurm")
    assert caught.value.problems[0].key == "--trainer"


@pytest.mark.parametrize(
    ("target", "written"), [("megatron-lm", "--sgd-momentum 0.0"), ("litgpt", "momentum: 0.0"), ("deepspeed", '"momentum": 0.0')]
)
def test_a_momentum_of_zero_is_not_an_absent_one(target: str, written: str) -> None:
    node = REQUEST | {"cluster": {"accelerator": "h100-80gb-sxm", "num_devices": 8}, "layout": {"dp_shard": 8, "zero_stage": 3}}
    plan = estimate(node | {"workload": {**REQUEST["workload"], "optimizer": "sgd_momentum"}, "training": {"momentum": 0.0}})
    assert any(written in text for text in export_plan(plan, target).files.values())


def test_a_beta_of_zero_is_not_an_absent_one() -> None:
    recipe = export_plan(estimate(REQUEST | {"training": {"beta1": 0.0}}), "torchtitan").files["plan_recipe.py"]
    assert "betas=(0.0, 0.95)" in recipe


def test_nodes_must_be_whole() -> None:
    odd = estimate(REQUEST | {"cluster": {"accelerator": "h100", "num_devices": 12}, "layout": {"dp_replicate": 1, "pp": 3, "tp": 4}})
    with pytest.raises(InputError, match="whole nodes"):
        export_plan(odd, "slurm")


def test_command_line(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(json.dumps(REQUEST))
    path, out = str(tmp_path / "plan.yaml"), tmp_path / "job"
    found = json.loads(run("export", path, "--to", "slurm", "--json", "--out", str(out)).stdout)
    assert found["target"] == "slurm"
    assert {p.name: p.read_text() for p in out.iterdir()} == found["files"]
    assert run("export", path, "--to", "slurm", "--out", str(out)).returncode == 0  # the same files again
    (out / "run.sbatch").write_text("mine")
    refused = run("export", path, "--to", "slurm", "--out", str(out))
    assert (refused.returncode, (out / "run.sbatch").read_text()) == (2, "mine")
    assert run("export", path, "--to", "slurm", "--out", str(out), "--force").returncode == 0
    assert run("export", path, "--to", "slurm@3").returncode == 2
    assert [row["target"] for row in json.loads(run("export", "--list", "--json").stdout)["targets"]] == list(EXPORTERS)


def test_a_plan_that_does_not_fit_is_written_and_said(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(json.dumps({"model": "llama-3.1-405b", "cluster": {"accelerator": "h100", "num_devices": 8}}))
    done = run("export", str(tmp_path / "plan.yaml"), "--to", "reftrain")
    assert done.returncode == 3
    assert "does not fit" in done.stderr
