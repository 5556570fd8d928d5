"""Micro-batch tuning: the ladder never starts what cannot fit, and the run that follows has the losses of the plan."""

import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from planner.errors import InfeasibleError, InputError, PlannerError
from planner.estimate import estimate
from planner.plan import load_plan
from reftrain import trials, tune
from reftrain.cli import app
from reftrain.config import load_run_config
from reftrain.train import RunOptions, train
from reftrain.trials import Child, predict
from reftrain.tune import Measured, climb, ladder, measure_steps, render_tuning
from tests.reftrain import fault_campaigns as campaigns
from tests.reftrain.fault_worker import raw_records, root

SIZES = [1, 2, 4, 8, 16, 32]


def machine(taken, step_s, told=None):
    """`measure` of a machine on which size n takes `taken(n)` bytes and `step_s(n)` seconds."""

    def measure(size):
        if told is not None:
            told.append(size)
        step = {"median": step_s(size), "p10": step_s(size), "p90": step_s(size), "count": 7}
        return Measured(taken(size) // 2, taken(size), step, 1 / step_s(size))

    return measure


def verdicts(tuning):
    return {rung.micro_batch_size: rung.verdict for rung in tuning.rungs}


@given(
    fixed=st.integers(0, 10**9), per_sample=st.integers(1, 10**8), usable=st.integers(0, 3 * 10**9),
    speeds=st.lists(st.floats(0.1, 10.0), min_size=6, max_size=6), skew=st.floats(0.2, 1.5) | st.none(),
)  # fmt: skip
def test_nothing_is_started_that_cannot_fit(fixed, per_sample, usable, speeds, skew):
    """Memory is a line in the size on every device; the prediction is off by `skew`, or there is none."""

    def taken(size):
        return fixed + per_sample * size

    def predicted(size):
        return None if skew is None else skew * taken(size)

    told = []
    found = climb(SIZES, lambda size: "", predicted, machine(taken, lambda size: speeds[SIZES.index(size)], told), lambda: usable)
    assert all(skew is None or predicted(size) <= usable for size in told)
    # With two sizes behind it the line is known to the byte; the first has nothing behind it, the second only what was predicted.
    assert all(taken(size) <= usable for size in told[2:])
    if skew is None:
        assert all(taken(size) <= usable for size in told[1:])
    assert told == SIZES[: len(told)]
    assert [rung.micro_batch_size for rung in found.rungs] == SIZES
    assert all(rung.reason for rung in found.rungs if rung.measured is None)
    if told:
        times = speeds[: len(told)]
        assert found.fastest == told[times.index(min(times))]
        assert found.largest == told[-1]


@given(st.lists(st.floats(0.1, 10.0), min_size=6, max_size=6))
def test_two_slower_sizes_in_a_row_end_the_ladder(speeds):
    told = []
    climb(SIZES, lambda size: "", lambda size: 1.0, machine(lambda size: 1, lambda size: speeds[SIZES.index(size)], told), lambda: 100.0)
    best, row, expected = math.inf, 0, []
    for size, speed in zip(SIZES, speeds, strict=True):
        expected.append(size)
        row = row + 1 if speed > best else 0
        best = min(best, speed)
        if row == 2:
            break
    assert told == expected


def test_running_out_of_memory_ends_the_ladder_and_a_rule_does_not():
    fine = machine(lambda size: size, lambda size: 1 / size)
    out = climb(SIZES, lambda size: "", lambda size: None, lambda size: fine(size) if size < 8 else "out of memory: CUDA", lambda: 1e9)
    assert verdicts(out) == {1: "fits", 2: "fits", 4: "fits", 8: "too big", 16: "not tried", 32: "not tried"}
    assert (out.fastest, out.largest) == (4, 4)
    text = render_tuning(out)
    assert "too big: out of memory: CUDA" in text
    assert "fits (fastest, largest)" in text
    ruled = climb(SIZES, lambda size: "rounds of pp" if size in (2, 32) else "", lambda size: None, fine, lambda: 1e9)
    assert verdicts(ruled) == {1: "fits", 2: "not tried", 4: "fits", 8: "fits", 16: "fits", 32: "not tried"}
    assert "rounds of pp" in render_tuning(ruled)


def test_sizes_divide_the_share_of_a_rank(tmp_path):
    plan = json.loads(campaigns.write_plan(tmp_path, num_devices=2).read_text())
    for batch, expected in ((8, [1, 2, 4]), (24, [1, 2, 4]), (2, [1]), (6, [1])):
        plan["workload"]["global_batch_size"] = batch
        plan["layout"]["micro_batch_size"] = 1
        (tmp_path / "p.yaml").write_text(json.dumps(plan))
        assert ladder(load_run_config(tmp_path / "p.yaml")) == expected


def test_available_memory_is_the_containers_where_that_is_less(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert tune.available_bytes(tmp_path, tmp_path) == 5000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert tune.available_bytes(tmp_path, tmp_path) == 5000 * 1024
    (tmp_path / "memory.max").write_text("3000\n")
    assert tune.available_bytes(tmp_path, tmp_path) == 2000
    (tmp_path / "memory.current").write_text("4000\n")
    assert tune.available_bytes(tmp_path, tmp_path) == 0
    assert tune.available_bytes(tmp_path / "none", tmp_path / "none") > 2**28


def test_what_a_process_took_grows_with_what_it_takes():
    before = tune.process_bytes(torch.device("cpu"))
    block = torch.ones(2**26)
    assert tune.process_bytes(torch.device("cpu")) >= min(before + 2**26, before * 2)
    del block


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """(plan with a prediction, folder of the tuned run, what it printed): two sizes, 1 and 2."""
    folder = tmp_path_factory.mktemp("tune")
    path = campaigns.write_plan(folder, steps=10)
    plan = json.loads(path.read_text())
    plan["workload"] |= {"global_batch_size": 2}
    plan["layout"] |= {"micro_batch_size": 1}
    plan |= predict(plan)
    path.write_text(json.dumps(plan))
    done = CliRunner().invoke(app, ["run", str(path), "--out", str(folder / "run"), "--tune-micro-batch", "--profile"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return path, folder / "run", done.stdout


def test_the_fastest_size_runs_and_losses_stay(tuned, tmp_path):
    plan, out, said = tuned
    report = json.loads((out / "tune" / "report.json").read_text())
    assert [rung["micro_batch_size"] for rung in report["rungs"]] == [1, 2]
    fits = {rung["micro_batch_size"]: rung["measured"] for rung in report["rungs"]}
    assert report["fastest"] == min(fits, key=lambda size: fits[size]["step_s"]["median"])
    assert all(taken["step_s"]["count"] == tune.NUM_TIMED_STEPS and taken["peak_bytes"] < taken["process_bytes"] for taken in fits.values())
    assert f"runs with micro-batch {report['fastest']}, the fastest; the largest that fits is 2" in said
    ran = load_plan(out / "plan.yaml")
    assert ran.layout.micro_batch_size == report["fastest"]
    assert ran.prediction["time"]["num_microbatches"] == 2 // report["fastest"]
    assert [path.parent for path in out.rglob("traces")] == [out]
    found = [r["loss"] for r in raw_records(out) if r["kind"] == "step"]
    for size in (1, 2):
        changed = json.loads(plan.read_text())
        changed["layout"]["micro_batch_size"] = size
        (tmp_path / f"{size}.yaml").write_text(json.dumps(changed))
        summary = train(load_run_config(tmp_path / f"{size}.yaml"), RunOptions(tmp_path / str(size))).values
        assert fits[size]["peak_bytes"] == pytest.approx(summary["peak_bytes"], rel=1e-3)
        losses = [r["loss"] for r in raw_records(tmp_path / str(size)) if r["kind"] == "step"]
        assert found == pytest.approx(losses, rel=1e-5)
        assert len(found) == len(losses) == 10


def test_a_tuned_run_goes_on_with_its_size_and_is_not_tuned_again(tuned, monkeypatch):
    plan, out, _ = tuned
    monkeypatch.setattr(Child, "run", lambda *arguments: pytest.fail("measured again"))
    again = CliRunner().invoke(app, ["run", str(plan), "--out", str(out), "--tune-micro-batch", "--resume", "--steps", "12"], catch_exceptions=False)
    assert again.exit_code == 0, again.output
    assert len({r["step"] for r in raw_records(out) if r["kind"] == "step"}) == 12
    with pytest.raises(InputError, match="holds a run already"):
        CliRunner().invoke(app, ["run", str(plan), "--out", str(out), "--tune-micro-batch"], catch_exceptions=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(InputError, match="without torchrun"):
        CliRunner().invoke(app, ["run", str(plan), "--out", str(out.parent / "new"), "--tune-micro-batch"], catch_exceptions=False)


def test_what_is_predicted_not_to_fit_is_never_started(tuned, monkeypatch, tmp_path):
    plan, _, _ = tuned
    started = []
    monkeypatch.setattr(Child, "run", lambda self, arguments, *more: started.append(arguments))
    peak = estimate(load_plan(plan)).memory.peak_bytes.value
    monkeypatch.setattr(tune, "available_bytes", lambda: peak / tune.USABLE_FRACTION - 1)
    with pytest.raises(InfeasibleError, match="predicted to need"):
        tune.tune_micro_batch(load_run_config(plan), tmp_path / "out", lambda text: None)
    assert not started


def test_a_process_that_the_system_kills_was_too_big(tuned, monkeypatch, tmp_path):
    plan, _, _ = tuned
    killed = tmp_path / "killed.sh"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(trials.sys, "executable", str(killed))
    with pytest.raises(InfeasibleError, match="the system ended a process"):
        tune.tune_micro_batch(load_run_config(plan), tmp_path / "out", lambda text: None)
    killed.write_text("#!/bin/sh\necho error: no such luck >&2\nexit 2\n")
    with pytest.raises(PlannerError, match="no such luck"):
        tune.tune_micro_batch(load_run_config(plan), tmp_path / "out", lambda text: None)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError("std::bad_alloc")])
def test_out_of_memory_leaves_a_mark(tuned, monkeypatch, tmp_path, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(tune.Probe, "_one_step", fail)
    with pytest.raises(InfeasibleError, match="out of memory"):
        measure_steps(load_run_config(tuned[0]), tmp_path)
    assert str(error) in (tmp_path / tune.MARK).read_text()


def test_other_errors_are_no_lack_of_memory(tuned, monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(tune.Probe, "_one_step", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        measure_steps(load_run_config(tuned[0]), tmp_path)
    assert not (tmp_path / tune.MARK).exists()


def test_a_real_allocation_that_fails(tmp_path):
    """Logits of 33 GB in a process that may have 12 of address space."""
    plan = json.loads(campaigns.write_plan(tmp_path).read_text())
    plan["model"] |= {"vocab_size": 500_000}
    plan["workload"] |= {"seq_len": 64, "global_batch_size": 256, "loss_kernel": "unfused"}
    plan["layout"]["micro_batch_size"] = 256
    plan["training"]["data"] = "synthetic"
    (tmp_path / "large.yaml").write_text(json.dumps(plan))
    command = f"ulimit -v 12000000; exec {sys.executable} -m reftrain measure-steps {tmp_path}/large.yaml --out {tmp_path}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=root(), check=False)
    assert done.returncode == 3, done.stderr
    assert "out of memory" in done.stderr
    assert "can't allocate memory" in (tmp_path / tune.MARK).read_text()


@pytest.mark.slow
def test_two_processes(tmp_path):
    plan = campaigns.write_plan(tmp_path, steps=6, num_devices=2)
    command = [sys.executable, "-m", "reftrain", "run", str(plan), "--out", str(tmp_path / "run"), "--tune-micro-batch", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root(), check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_devices"] == 2
    report = json.loads((tmp_path / "run" / "tune" / "report.json").read_text())
    assert [rung["verdict"] for rung in report["rungs"]] == ["fits"] * 3
    assert load_plan(tmp_path / "run" / "plan.yaml").layout.micro_batch_size == report["fastest"]
