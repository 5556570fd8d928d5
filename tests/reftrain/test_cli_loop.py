"""`reftrain bench-device`: what it refuses, what it writes, and that the planner prices by it."""

import json
import os
import subprocess
import sys

import pytest

from planner import estimate
from planner.cli import app as planner_app
from planner.cli import run_app
from planner.errors import InputError
from planner.files import DATA_DIR, HOME_VARIABLE, read_yaml, to_yaml
from planner.stack import load_stack
from reftrain import bench_device
from reftrain.cli import app

FLOPS_PER_S, STEP_S, OP_S = 2.0e9, 0.25, 1e-5
SIZE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 128}
BATCH, SEQ_LEN = 4, 32


def request(**keys):
    model = {"model_type": "llama", **SIZE, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": SEQ_LEN}
    workload = {"seq_len": SEQ_LEN, "global_batch_size": BATCH, "tokens": 1e6, "precision": "fp32", "recompute": "none"}
    return {"model": model, "workload": workload, "cluster": {"accelerator": "by-hand", "num_devices": 1}, "layout": {"micro_batch_size": 4}, **keys}


def write_home(home):
    """What `bench-device` writes, by hand: a device of 2 GFLOP/s for any matmul, one time for every attention head, and host time per step."""
    source, date = "written by hand for this test", "2026-01-01"
    one = {"value": 1.0, "evidence": "measured", "source": source}
    phases = ("forward", "backward_input", "backward_weight")
    curves = {
        "source": source, "date": date, "num_processes": 1, "step_overhead_s": STEP_S,
        "matmul": {f"{phase}/fp32": {"m": [1.0], "n": [1.0], "k": [1.0], "seconds": [2.0 / FLOPS_PER_S]} for phase in phases},
        "attention": {f"{phase}/fp32/32": {"sizes": [float(SEQ_LEN)], "seconds": [OP_S]} for phase in ("forward", "backward")},
        "ops": {"optimizer/adamw": {"sizes": [1.0], "seconds": [1e-10]}},
    }  # fmt: skip
    rates, none = ("matmul", "attention", "memory", "optimizer"), {**one, "value": 0.0}
    others = ("launch", "block_host", "kernel_gap", "step_overhead", "sync", "straggling")
    coefficients = {**dict.fromkeys(rates, one), **dict.fromkeys(others, none)}
    stack = read_yaml(DATA_DIR / "stacks" / "reftrain.yaml") | {"name": "by-hand", "coefficients": coefficients}
    (home / "stacks").mkdir(parents=True)
    (home / "stacks" / "by-hand.yaml").write_text(to_yaml(stack | {"measured": {"by-hand": curves}}))
    accelerator = {
        "vendor": "this machine", "name": "by hand", "kind": "cpu", "form_factor": "host", "memory": "8 GB", "memory_bandwidth": "10 GB/s",
        "dense_flops": {"fp32": "2 GFLOP/s"}, "typical_node_size": 1, "year": 2026, "stack": "by-hand", "confidence": "high", "source": source,
        "date": date,
        "scale_up": {
            "name": "between processes", "kind": "switch", "bandwidth": "10 GB/s", "peer_bandwidth": "10 GB/s", "domain_size": 1,
            "ring_efficiency_fraction": 1.0, "latency": "50 us", "evidence": "measured", "source": source,
        },
    }  # fmt: skip
    (home / "catalog.yaml").write_text(to_yaml({"accelerators": {"by-hand": accelerator}}))


def test_an_entry_in_the_user_s_folder_is_priced_like_any_other(tmp_path, monkeypatch):
    """Seconds by hand: 6 FLOPs per weight of a matmul and token over the rate; one time per head and sequence and direction; host time per step."""
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    write_home(tmp_path)
    plan = estimate(request())
    assert plan.inputs["stack"] == "by-hand"
    hidden, width, layers, vocab = SIZE.values()
    weights = layers * (4 * hidden * hidden + 3 * hidden * width) + vocab * hidden
    assert plan.time.breakdown_s["matmul"] == pytest.approx(6 * weights * BATCH * SEQ_LEN / FLOPS_PER_S)
    assert plan.time.breakdown_s["attention"] == pytest.approx(2 * OP_S * 2 * BATCH * layers)
    assert plan.time.breakdown_s["step_overhead"] == pytest.approx(STEP_S)
    faster = read_yaml(tmp_path / "stacks" / "by-hand.yaml")
    faster["measured"]["by-hand"]["step_overhead_s"] = 0.0
    (tmp_path / "stacks" / "by-hand.yaml").write_text(to_yaml(faster))
    assert plan.time.step_s.value - estimate(request()).time.step_s.value == pytest.approx(STEP_S)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--precisions", "bf16"], "--precisions"),
        (["--precisions", "fp32,fp99"], "--precisions"),
        (["--processes", "0"], "--processes"),
        (["--processes", "1,two"], "--processes"),
        (["--processes", ""], "--processes"),
        (["--processes", "100000"], "--processes"),
        (["--name", "../escape"], "--name"),
        (["--name", ""], "--name"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(arguments, key, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    monkeypatch.setattr(sys, "argv", ["reftrain", "bench-device", *arguments])
    assert run_app(app, "reftrain") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"error: {key} = " in captured.err
    assert not (tmp_path / "home").exists()


def test_a_number_of_processes_that_was_not_measured_is_refused_with_the_command_that_keeps_the_others(tmp_path, monkeypatch):
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    write_home(tmp_path)
    catalog = read_yaml(tmp_path / "catalog.yaml")
    catalog["accelerators"]["by-hand"]["variants"] = {"1": "by-hand"}
    (tmp_path / "catalog.yaml").write_text(to_yaml(catalog))
    with pytest.raises(InputError) as caught:
        estimate(request(cluster={"accelerator": "by-hand", "num_devices": 2}))
    (problem,) = caught.value.problems
    assert problem.rule == "by-hand was measured with 1 process"
    assert problem.fix.endswith("--processes 1,2")


@pytest.mark.parametrize(("given", "count", "threads"), [(None, 1, None), ("3", 1, "3"), (None, 2, "2"), ("3", 2, "3")])
def test_a_measurement_has_the_threads_of_a_run(given, count, threads, monkeypatch):
    """As `reftrain run`: the user's number of threads; else torch's own for one process, and equal shares of the cores for several."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    seen = {}

    def run(command, *, env, **_):
        seen.update(env)
        return subprocess.CompletedProcess(command, 0, stdout='{"curves": {}}\n')

    monkeypatch.setattr(bench_device.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(bench_device.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench_device.subprocess, "run", run)
    assert bench_device._measure_with(count, ["fp32"], True) == {"curves": {}}
    assert seen.get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize("precisions", ["fp32", "fp32,bf16"])
def test_the_command_that_it_prints_works(precisions, tmp_path, monkeypatch, capsys):
    """Also where bf16, which `estimate` takes by itself, was not measured."""
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    write_home(tmp_path)
    monkeypatch.setattr(bench_device, "bench_device", lambda *_, **__: (tmp_path / "catalog.yaml", tmp_path / "stacks" / "by-hand.yaml"))
    monkeypatch.setattr(sys, "argv", ["reftrain", "bench-device", "--name", "by-hand", "--precisions", precisions])
    assert run_app(app, "reftrain") == 0
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("use it: python -m planner ")
    assert ("--precision fp32" in command) == (precisions == "fp32")
    monkeypatch.setattr(sys, "argv", ["planner", *command.split()])
    assert (run_app(planner_app, "planner") == 0) == (precisions == "fp32")  # the machine by hand knows no bf16


@pytest.mark.slow
def test_this_machine_measured_is_an_accelerator(tmp_path, monkeypatch):
    """A real measurement: both files read back, keep what stood beside them, and price a plan that fits."""
    env = {**os.environ, HOME_VARIABLE: str(tmp_path)}
    write_home(tmp_path)
    command = [sys.executable, "-m", "reftrain", "bench-device", "--quick", "--name", "mine", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["catalog"] == str(tmp_path / "catalog.yaml")
    assert set(read_yaml(tmp_path / "catalog.yaml")["accelerators"]) == {"by-hand", "mine"}
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    assert load_stack("mine").measured["mine"].matmul["forward/fp32"].seconds[0] > 0
    plan = estimate(request(cluster={"accelerator": "mine", "num_devices": 1}))
    assert (plan.inputs["stack"], plan.fits) == ("mine", True)
    assert 0 < plan.time.mfu < 1
    longer = request(cluster={"accelerator": "mine", "num_devices": 1})
    longer["model"]["num_hidden_layers"] = 30
    assert estimate(longer).time.step_s.value > plan.time.step_s.value
