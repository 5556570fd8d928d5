"""The command line end to end: outputs, files, exit statuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from planner import estimate, load_plan
from planner.files import DATA_DIR, to_yaml
from planner.measurements import read_rows
from planner.report.plan_text import render_plan

MODEL = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
REQUEST: dict[str, Any] = {
    "model": MODEL,
    "workload": {"seq_len": 8192, "global_batch_size": 512, "tokens": 1e12},
    "cluster": {"accelerator": "h100", "num_devices": 64, "offer": "aws/p5.48xlarge"},
    "stack": "nemo",
}


def planner(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A real process."""
    return subprocess.run([sys.executable, "-m", "planner", *argv], capture_output=True, text=True, check=False, env={**os.environ, **environment})


@pytest.fixture
def request_file(tmp_path: Path) -> str:
    path = tmp_path / "request.yaml"
    path.write_text(to_yaml(REQUEST))
    return str(path)


def test_estimate_prints_the_verdict_first_and_nothing_else(request_file: str) -> None:
    done = planner("estimate", request_file)
    assert (done.returncode, done.stderr) == (0, "")
    words = [line.split()[0] for line in done.stdout.splitlines() if line and not line.startswith(" ")]
    order = ["FITS", "TIME", "COST", "MFU", "LOSS", "ENERGY", "Memory", "Trust", "Assumed"]
    assert [word for word in words if word in order] == order
    assert "\x1b" not in done.stdout
    assert "Next" not in done.stdout, "hints are for terminals"


def test_json_is_one_object_with_the_contract_s_keys(request_file: str) -> None:
    done = planner("estimate", request_file, "--json", NO_COLOR="1", COLUMNS="60")
    assert (done.returncode, done.stderr) == (0, "")
    plan = json.loads(done.stdout)
    assert plan["schema_version"] == 1
    contract = {
        "params": {"total", "active", "embedding"},
        "flops": {"model_per_token", "hardware_per_token", "attention_convention"},
        "memory": {"peak_bytes", "usable_bytes", "fits", "breakdown_bytes", "stages"},
        "time": {"step_s", "tokens_per_s", "tokens_per_s_per_device", "model_flops_per_s_per_device", "mfu", "hfu", "breakdown_s", "train_s"},
        "loss": {"nats_per_token", "perplexity", "law"},
        "cost": {"usd", "device_hours", "goodput_fraction", "energy_kwh", "co2e_kg", "breakdown_usd"},
    }
    for section, keys in contract.items():
        assert keys <= set(plan[section]), section
    assert {"inputs", "violations", "assumptions", "evidence"} <= set(plan)
    for interval in (
        plan["memory"]["peak_bytes"],
        plan["time"]["step_s"],
        plan["time"]["train_s"],
        plan["loss"]["nats_per_token"],
        plan["cost"]["usd"],
    ):
        assert interval["low"] <= interval["value"] <= interval["high"]


def test_a_written_plan_gives_the_same_numbers_again(request_file: str, tmp_path: Path) -> None:
    out = tmp_path / "plan.yaml"
    first = json.loads(planner("estimate", request_file, "--json", "--out", str(out)).stdout)
    again = json.loads(planner("estimate", str(out), "--json").stdout)
    for section in ("inputs", "params", "flops", "memory", "time", "loss", "cost", "violations"):
        assert first[section] == again[section], section
    assert load_plan(out) == load_plan(out)
    second = tmp_path / "again.yaml"
    estimate(load_plan(out)).save(second)
    fields = ("inputs", "memory", "time", "cost")
    assert all(getattr(estimate(load_plan(second)), f) == getattr(estimate(load_plan(out)), f) for f in fields)


def test_json_output_is_accepted_as_input(request_file: str, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    result.write_text(planner("estimate", request_file, "--json").stdout)
    assert planner("estimate", str(result)).stdout.startswith("inline model")


def test_options_change_a_plan(request_file: str) -> None:
    plain, full = (json.loads(planner("estimate", request_file, "--json", *more).stdout) for more in ((), ("--recompute", "full", "--price", "2.5")))
    assert full["inputs"]["workload"]["recompute"] == "full"
    assert full["cost"]["usd_per_device_hour"] == 2.5
    assert plain["inputs"]["workload"]["recompute"] == "none"


def test_exit_statuses(request_file: str) -> None:
    assert planner("estimate", request_file, "--budget", "1e9", "--max-days", "10000").returncode == 0
    poor = planner("estimate", request_file, "--budget", "1000", "--max-days", "1")
    assert poor.returncode == 4
    assert poor.stderr.count("gate broken") == 2
    too_big = planner(
        "estimate", request_file, "--num-devices", "8", "--global-batch-size", "64", "--micro-batch-size", "8", "--tp", "1", "--pp", "1"
    )
    assert too_big.returncode == 3
    assert too_big.stdout.count("DOES NOT FIT") == 1
    assert planner("estimate", request_file, "--tp", "7").returncode == 2


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_lost(width: int) -> None:
    plan = estimate(REQUEST)
    text = render_plan(plan, width)
    assert max(map(len, text.splitlines())) <= width
    shown = {float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\.?\d*", text)}
    total = plan.memory.peak_bytes.value / 2**30
    assert any(abs(n - total) <= 0.06 for n in shown)


def test_parts_shown_add_up_to_the_total() -> None:
    plan = estimate(REQUEST)
    assert sum(plan.memory.breakdown_bytes.values()) == pytest.approx(plan.memory.peak_bytes.value, rel=1e-12)
    assert sum(plan.time.breakdown_s.values()) == pytest.approx(plan.time.step_s.value, rel=1e-12)
    assert plan.cost.usd is not None
    assert sum(plan.cost.breakdown_usd.values()) == pytest.approx(plan.cost.usd.value, rel=1e-12)


def test_days_devices_and_price_agree() -> None:
    plan = estimate(REQUEST)
    assert plan.cost.usd is not None
    assert plan.cost.usd_per_device_hour is not None
    hours = plan.time.train_s.value / 3600 * REQUEST["cluster"]["num_devices"]
    assert plan.cost.device_hours == pytest.approx(hours)
    assert plan.cost.usd.value == pytest.approx(plan.cost.billed_device_hours * plan.cost.usd_per_device_hour)
    assert plan.time.train_s.value * plan.cost.goodput_fraction == pytest.approx(plan.time.step_s.value * plan.time.num_steps)


def test_whole_instances_are_billed() -> None:
    plan = estimate({**REQUEST, "cluster": {**REQUEST["cluster"], "num_devices": 12}, "workload": {**REQUEST["workload"], "global_batch_size": 528}})
    assert plan.cost.billed_device_hours == pytest.approx(plan.cost.device_hours * 16 / 12)


@pytest.mark.parametrize("command", ["estimate", "explain", "compare", "catalog", "validate"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = planner(command, "--help")
    assert done.returncode == 0
    assert f"planner {command}" in done.stdout
    assert "Example" in done.stdout


def test_a_closed_pipe_is_no_fault(request_file: str) -> None:
    shell = f"{sys.executable} -m planner estimate {request_file} --json | head -c 10"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", shell], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "fault" not in done.stderr


@pytest.fixture
def many_measurements(tmp_path: Path) -> str:
    """So many rows that several processes predict them."""
    header, *rows = (DATA_DIR / "measurements" / "anchors.csv").read_text(encoding="utf-8").splitlines()
    path = tmp_path / "many.csv"
    path.write_text("\n".join([header, *(f"{i}-{row}" for i in range(40) for row in rows)]), encoding="utf-8")
    return str(path)


def test_measurements_are_validated_in_their_order(many_measurements: str) -> None:
    done = planner("validate", "--measurements", many_measurements, "--json")
    assert done.returncode == 0
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert [row["id"] for row in found["per_row"]] == [row.id for row in read_rows(many_measurements)]
    assert found["throughput"]["num_rows"] == 1200


@pytest.mark.skipif(sys.platform == "win32", reason="signals of a process group")
@pytest.mark.parametrize("after_s", [1.0, 2.5])
def test_ctrl_c_ends_all_processes_of_a_validation(many_measurements: str, after_s: float) -> None:
    argv = [sys.executable, "-m", "planner", "validate", "--measurements", many_measurements]
    run = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    time.sleep(after_s)
    os.killpg(run.pid, signal.SIGINT)  # a terminal sends it to all processes
    out, said = run.communicate(timeout=60)  # ends when the last one that holds the pipes has ended
    assert run.returncode == 130
    assert out == ""
    assert "Traceback" not in said
