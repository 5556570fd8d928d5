"""Sweeps: what a grid may say, how runs are ranked, and what is left of a sweep that was stopped or killed."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from planner.errors import InputError
from reftrain.config import load_run_config
from reftrain.sweep import Row, Sweep, Trial, parse_grid, plan_trials, render_sweep, run_sweep
from reftrain.sweep import _tabulate as tabulate
from reftrain.trials import Child, predict, vary
from tests.reftrain import fault_campaigns as campaigns
from tests.reftrain import fault_worker
from tests.reftrain.fault_worker import raw_records


def forked(self, arguments, log, look=lambda: None):
    """`Child.run` with a process that need not import torch first."""
    process = fault_worker.CONTEXT.Process(target=fault_worker.child, args=(arguments, str(log), log.with_suffix(".window"), {}))
    process.start()
    process.join()
    look()
    return process.exitcode


@pytest.fixture
def quick(monkeypatch):
    started = []
    monkeypatch.setattr(Child, "run", lambda self, arguments, *more: started.append(arguments) or forked(self, arguments, *more))
    return started


def sweep(plan, grid, out, changes=None):
    config = load_run_config(plan, changes)
    return run_sweep(config, plan_trials(config, parse_grid(grid)), out, lambda name, number, step: None)


def test_all_mistakes_of_a_grid_at_once():
    texts = [
        "learning_rte=1",
        "cluster.num_devices=2",
        "seed=",
        "layout.tpp=1",
        "seed=1,1",
        "clip_norm=1",
        "training.clip_norm=2",
        "momentum=[1",
        "nonsense",
    ]
    with pytest.raises(InputError) as caught:
        parse_grid(texts)
    told = [str(problem.value) for problem in caught.value.problems]
    assert told == ["learning_rte", "cluster.num_devices", "seed=", "layout.tpp", "seed=1,1", "training.clip_norm", "momentum=[1", "nonsense"]
    assert "did you mean learning_rate?" in str(caught.value)


def test_points_that_cannot_run_are_refused_before_anything_starts(tmp_path, quick):
    plan = campaigns.write_plan(tmp_path)
    with pytest.raises(InputError) as caught:
        sweep(plan, ["learning_rate=1e-3,-1,99", "layout.micro_batch_size=1,3", "workload.precision=fp32,mxfp8"], tmp_path / "out")
    assert {problem.key for problem in caught.value.problems} == {"training.learning_rate", "layout.micro_batch_size", "workload.precision"}
    assert len({problem.value for problem in caught.value.problems if problem.key == "training.learning_rate"}) == 2
    with pytest.raises(InputError, match="at most 1,000 runs"):
        sweep(plan, [f"seed={','.join(map(str, range(40)))}", f"eval_tokens={','.join(map(str, range(1, 40)))}"], tmp_path / "out")
    assert not quick
    assert not (tmp_path / "out").exists()


def test_the_product_of_the_grid(tmp_path):
    config = load_run_config(campaigns.write_plan(tmp_path))
    trials = plan_trials(config, parse_grid(["clip_norm=null,0.5", "layout.micro_batch_size=1,2", "workload.precision=fp32,bf16"]))
    found = [(t.config.training.clip_norm, t.config.layout.micro_batch_size, t.config.workload.precision) for t in trials]
    assert found == [(c, m, p) for c in (None, 0.5) for m in (1, 2) for p in ("fp32", "bf16")]
    assert len({trial.name for trial in trials}) == 8


def test_a_changed_layout_is_predicted_anew(tmp_path):
    plan = json.loads(campaigns.write_plan(tmp_path).read_text())
    plan |= predict(plan)
    varied = vary(plan, {"layout.micro_batch_size": 8})
    assert varied["prediction"]["time"]["num_microbatches"] == 1 < plan["prediction"]["time"]["num_microbatches"]
    assert vary(plan, {"training.seed": 3})["prediction"] == plan["prediction"]
    unknown = {**plan, "cluster": {"accelerator": "no-such-device", "num_devices": 1}}
    assert "prediction" not in vary(unknown, {"layout.micro_batch_size": 8})


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """(plan, folder, table) of four runs: two that learn, one that diverges, one that cannot start."""
    folder = tmp_path_factory.mktemp("sweep")
    plan = campaigns.write_plan(folder, steps=40, max_skipped_steps=1, max_rollbacks=0)
    campaigns.write_text_data(folder / "held" / "text")
    (folder / "text" / "valid").symlink_to(folder / "held" / "text" / "train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Child, "run", forked)
        found, _ = sweep(plan, ["learning_rate=1e-4,1e-2", "layout.micro_batch_size=2"], folder / "out")
        broken, _ = sweep(plan, ["spike_sigmas=1e-12", "learning_rate=1e-8", f"init_from=null,{folder}/missing"], folder / "out")
    return plan, folder / "out", found, broken


def test_ranked_by_held_out_loss(swept):
    _, out, found, _ = swept
    assert [(row.rank, row.settings["training.learning_rate"], row.status) for row in found.rows] == [(1, 0.01, "done"), (2, 0.0001, "done")]
    assert found.ranked_by == "eval_loss"
    assert found.rows[0].eval_loss < found.rows[1].eval_loss
    for row in found.rows:
        summary = json.loads((out / "runs" / row.name / "summary.json").read_text())
        assert (row.eval_loss, row.peak_bytes, row.tokens_per_s) == (summary["eval"]["loss"], summary["peak_bytes"], summary["tokens_per_s"])
    assert f"* best: {out / 'runs' / found.rows[0].name}" in render_sweep(found)


def test_runs_that_diverge_or_fail_are_shown_and_end_nothing(swept):
    _, out, _, broken = swept
    status = {row.settings["training.init_from"] is None: (row.status, row.error, row.rank) for row in broken.rows}
    assert status[True][0] == "diverged"
    assert "the run diverged at step" in status[True][1]
    assert status[False][0] == "failed"
    assert "missing" in status[False][1]
    assert broken.best is None
    written = json.loads((out / "sweep.json").read_text())
    assert written == broken.to_dict()
    with (out / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["status"], row["training.spike_sigmas"]) for row in rows] == [(row.status, "1e-12") for row in broken.rows]
    assert "diverged" in render_sweep(broken)


def test_what_is_done_is_not_repeated(swept, quick):
    plan, out, found, _ = swept
    again, _ = sweep(plan, ["learning_rate=1e-4,1e-2", "layout.micro_batch_size=2"], out)
    assert again == found
    assert not quick
    sweep(plan, ["spike_sigmas=1e-12", "learning_rate=1e-8", f"init_from=null,{out.parent}/missing"], out)
    assert len(quick) == 1  # what failed is tried again, what diverged is not
    with pytest.raises(InputError, match="another plan"):
        sweep(plan, ["learning_rate=1e-4"], out, {"num_steps": 5})


def test_folders_of_others_are_left_alone(swept, tmp_path):
    plan, _, _, _ = swept
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="something else"):
        sweep(plan, ["seed=1"], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        sweep(plan, ["seed=1"], tmp_path / "file")


def test_ranks_without_held_out_text_and_near_ties(tmp_path):
    done = {"status": "done", "num_steps": 5}
    rows = {
        "slow": {"recent_loss": 2.0, "tokens_per_s": 10.0, "eval": {"loss": 1.0}}, "fast": {"recent_loss": 2.000001, "tokens_per_s": 20.0},
        "nan": {"recent_loss": "nan"}, "best": {"recent_loss": 1.5, "tokens_per_s": 1.0}, "waiting": None,
    }  # fmt: skip
    for name, summary in rows.items():
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        if summary is not None:
            (folder / "summary.json").write_text(json.dumps({"is_complete": True, "num_steps": 5, **summary}))
            (folder / "metrics.jsonl").write_text('{"kind": "step", "step": 4, "loss": 2.0}\n')
    found = tabulate([Trial(name, {"training.seed": i}, {}, None) for i, name in enumerate(rows)], tmp_path, {})
    assert found.ranked_by == "recent_loss"
    assert [(row.name, row.rank) for row in found.rows] == [("best", 1), ("fast", 2), ("slow", 3), ("nan", None), ("waiting", None)]
    assert found.rows[1] == Row("fast", {"training.seed": 1}, recent_loss=2.000001, tokens_per_s=20.0, rank=2, **done)
    assert Sweep(tmp_path, found.rows[3:], "recent_loss").best is None


def start(plan, out, *grid):
    command = [sys.executable, "-m", "reftrain", "sweep", str(plan), "--grid", *grid, "--out", str(out), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=fault_worker.root())


def wait_for_steps(out, count):
    """The log of the first run, once it has so many steps."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for log in out.glob("runs/*/metrics.jsonl"):
            if sum(record["kind"] == "step" for record in raw_records(log.parent)) >= count:
                return log
        time.sleep(0.02)
    raise TimeoutError


def test_stopped_then_killed_then_finished(tmp_path, quick, monkeypatch):
    """SIGTERM, then kill -9 with a run left behind, then to the end: the losses of a run that nobody disturbed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as the reference has: another number of threads adds in another order
    plan = campaigns.write_plan(tmp_path, steps=150, every=10)
    out, grid = tmp_path / "out", ["seed=0,1"]
    stopped = start(plan, out, *grid)
    log = wait_for_steps(out, 8)
    stopped.send_signal(signal.SIGTERM)
    printed = json.loads(stopped.communicate(timeout=60)[0])
    assert stopped.returncode == 130
    assert [row["status"] for row in printed["runs"]] == ["interrupted", "not started"]
    assert printed == json.loads((out / "sweep.json").read_text())
    at = len([r for r in raw_records(log.parent) if r["kind"] == "step"])
    assert 8 <= at < 150

    killed = start(plan, out, *grid)
    wait_for_steps(out, at + 8)
    with open(f"/proc/{killed.pid}/task/{killed.pid}/children") as file:
        (orphan,) = map(int, file.read().split())
    os.kill(orphan, signal.SIGSTOP)
    killed.kill()
    killed.communicate()
    with pytest.raises(InputError, match="a run that a killed sweep left behind"):
        sweep(plan, grid, out)
    os.kill(orphan, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while True:  # the system gives the lock back when it has buried the process
        try:
            found, is_interrupted = sweep(plan, grid, out)
            break
        except InputError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert not is_interrupted
    assert [row.status for row in found.rows] == ["done", "done"]
    assert len(quick) == 2
    assert sum(r["kind"] == "resumed" and r["step"] > 0 for r in raw_records(log.parent)) == 2
    campaigns.assert_equals_reference(log.parent, campaigns.run_reference(plan, tmp_path / "reference"))
