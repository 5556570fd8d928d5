"""The loop: what it resumes, what it refuses, and what its log and summary say afterwards."""

import json
import math
import os
import random
import shutil
import signal
from unittest.mock import patch

import pytest
import torch

from planner.errors import InputError
from reftrain.batches import Batches
from reftrain.config import load_run_config
from reftrain.data import TokenDataset
from reftrain.measure import read_metrics
from reftrain.prepare_run import prepare_folder
from reftrain.progress import render_summary
from reftrain.steps import Engine
from reftrain.train import RunOptions, Trainer, train
from tests.reftrain import fault_campaigns as campaigns
from tests.reftrain.fault_worker import Run, poison, raw_records


def run(plan, out, changes=None, resume=False):
    return train(load_run_config(plan, changes), RunOptions(out, resume=resume)).values


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(plan, folder of a finished run of 20 steps, its summary)."""
    folder = tmp_path_factory.mktemp("train")
    torch.set_num_threads(1)
    plan = campaigns.write_plan(folder, steps=20, every=4)
    return plan, folder / "run", run(plan, folder / "run")


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished[1], tmp_path / "copy")


def test_a_run_says_what_it_did(finished):
    _, out, summary = finished
    steps = [r for r in raw_records(out) if r["kind"] == "step"]
    assert [r["position"] for r in steps] == list(range(0, 160, 8))
    assert summary["is_complete"] is True
    assert summary["num_steps"] == len(steps) == 20
    assert summary["final_loss"] == steps[-1]["loss"] < steps[0]["loss"]
    assert summary["step_s"]["count"] == 17
    assert summary["flops_per_step"] > 0 < summary["peak_bytes"]
    assert json.loads((out / "summary.json").read_text()) == summary
    assert "done: 20 steps" in render_summary(summary, out)


def test_resuming_a_finished_run_says_so_and_changes_nothing(finished, copy, capsys):
    plan, _, summary = finished
    before = (copy / "summary.json").read_bytes()
    assert run(plan, copy, resume=True) == summary
    assert "all 20 steps are done" in capsys.readouterr().err
    assert (copy / "summary.json").read_bytes() == before
    assert run(plan, copy, {"num_steps": 23}, resume=True)["num_steps"] == 23
    assert [r["step"] for r in read_metrics(copy / "metrics.jsonl") if r["kind"] == "step"] == list(range(23))


def test_resuming_nothing_starts(finished, tmp_path, capsys):
    plan, _, summary = finished
    assert run(plan, tmp_path / "new", resume=True)["final_loss"] == summary["final_loss"]
    assert "starting from step 0" in capsys.readouterr().err


def test_a_used_folder_is_refused(finished):
    plan, out, _ = finished
    before = sorted((p, p.stat().st_mtime_ns) for p in out.rglob("*") if p.name != ".lock")
    with pytest.raises(InputError, match="holds a run already"):
        run(plan, out)
    assert before == sorted((p, p.stat().st_mtime_ns) for p in out.rglob("*") if p.name != ".lock")


@pytest.mark.parametrize(
    ("keys", "changes", "expected"),
    [
        ({"width": 64}, {}, {"model.hidden_size"}),
        ({"dropout": 0.1}, {}, {"model.hidden_dropout", "model.attention_dropout"}),
        ({"precision": "bf16"}, {}, {"workload.precision"}),
        ({}, {"seed": 1}, {"training.seed"}),
        ({}, {"data": "synthetic"}, {"training.data"}),
    ],
)
def test_another_plan_is_refused_with_what_differs(finished, copy, tmp_path, keys, changes, expected):
    shutil.copytree(finished[0].parent / "text", tmp_path / "text")
    other = campaigns.write_plan(tmp_path, "other", steps=20, **keys)
    with pytest.raises(InputError) as caught:
        run(other, copy, {"data": str(finished[0].parent / "text"), **changes}, resume=True)
    assert expected <= {p.key for p in caught.value.problems}
    assert all(p.key.startswith(tuple(key.split(".")[0] for key in expected)) for p in caught.value.problems)
    assert all("in the run to resume" in p.rule for p in caught.value.problems)


def test_what_may_change_on_resume(finished, copy):
    changes = {"num_steps": 21, "learning_rate": 1e-4, "checkpoint_every_steps": 7, "async_checkpoints": False}
    assert run(finished[0], copy, changes, resume=True)["num_steps"] == 21


def test_the_plan_of_a_run_keeps_what_was_switched_off(finished, tmp_path):
    prepare_folder(load_run_config(finished[0], {"clip_norm": None}), tmp_path, resume=False)
    assert load_run_config(tmp_path / "plan.yaml").training.clip_norm is None


def test_no_whole_checkpoint_left(finished, copy):
    for file in copy.glob("checkpoints/step-*/manifest.json"):
        file.write_bytes(b"{}")
    with pytest.raises(InputError, match="no checkpoint that is whole"):
        run(finished[0], copy, {"num_steps": 25}, resume=True)
    assert len(list(copy.glob("checkpoints/step-*"))) == 3


def test_a_second_run_in_the_same_folder_is_refused(finished, tmp_path):
    plan = finished[0]
    first = Run(plan, tmp_path / "one", "--set", "num_steps=100000")
    assert first.wait_for(lambda window: window["num_steps"] >= 1)
    for more in ([], ["--resume"]):
        second = Run(plan, tmp_path / "one", *more)
        assert second.end() == 2, second.text
        assert "is in use by another run" in second.text
    steps = first.window.get()["num_steps"]
    assert first.wait_for(lambda window: window["num_steps"] > steps)  # undisturbed
    first.signal(signal.SIGTERM)
    assert first.end() == 130, first.text
    third = Run(plan, tmp_path / "one", "--resume", "--set", "num_steps=3")
    assert third.end() == 0, third.text


def test_what_a_run_went_back_behind_does_not_count(finished, copy):
    plan = finished[0]
    (copy / "summary.json").unlink()
    for name in ("step-00000020", "step-00000016"):
        shutil.rmtree(copy / "checkpoints" / name)
    with (copy / "metrics.jsonl").open("a") as log:
        log.write('{"kind": "step", "step": 99, "los')  # the line that a kill cut off
    summary = run(plan, copy, {"num_steps": 14}, resume=True)
    raw = [r["step"] for r in raw_records(copy) if r["kind"] == "step"]
    assert raw == [*range(20), 12, 13]
    records = [r for r in read_metrics(copy / "metrics.jsonl") if r["kind"] == "step"]
    assert [r["step"] for r in records] == list(range(14))
    assert summary["num_steps"] == 14
    assert summary["final_loss"] == records[-1]["loss"]
    assert summary["flops_per_step"] == finished[2]["flops_per_step"]


@pytest.fixture
def spoiled(monkeypatch):
    """The steps whose data begin at positions 200 to 224 have no number for a loss."""
    for owner, name in ((Batches, "microbatches"), (Engine, "forward_backward")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back at the end
    poison("nan", 8 * 25, 8 * 28)


def run_step_by_step(plan, out, monkeypatch):
    """As many processes as steps: each is told to stop after its first. Returns their number."""
    step, num_processes = Trainer._one_step, 1

    def stop_after(trainer):
        step(trainer)
        trainer.stop_signal = signal.SIGTERM

    monkeypatch.setattr(Trainer, "_one_step", stop_after)
    while not run(plan, out, resume=True)["is_complete"]:
        num_processes += 1
        assert num_processes < 60
    return num_processes


@pytest.mark.usefixtures("spoiled")
@pytest.mark.parametrize("keys", [{"dropout": 0.2}, {"precision": "bf16"}], ids=str)
def test_a_run_cut_after_every_step_is_the_run_that_was_not(tmp_path, monkeypatch, keys):
    """Every cut point, among them the ends of eight epochs, the middle of a row of bad steps and the step after a rollback.

    The plan saves just before the rollback, so that both runs go back to the same step: a run that was stopped has more checkpoints.
    """
    run(plan := campaigns.write_plan(tmp_path, max_skipped_steps=3, **keys), tmp_path / "whole")
    num_processes = run_step_by_step(plan, tmp_path / "cut", monkeypatch)
    whole, cut = (raw_records(tmp_path / name) for name in ("whole", "cut"))
    keep = ("step", "position", "loss", "norm", "learning_rate", "skipped")
    steps, again = ([[r.get(k) for k in keep] for r in records if r["kind"] == "step"] for records in (whole, cut))
    assert steps == again
    assert len(steps) == num_processes - 1 > 40
    assert [r["kind"] for r in whole].count("rolled_back") == 1
    assert campaigns.weights_hash(tmp_path / "whole", 40) == campaigns.weights_hash(tmp_path / "cut", 40)


@pytest.mark.usefixtures("spoiled")
def test_a_run_stopped_right_after_a_rollback_does_not_meet_the_bad_samples_again(tmp_path, monkeypatch):
    run_step_by_step(campaigns.write_plan(tmp_path, max_skipped_steps=3, every=1000), tmp_path / "cut", monkeypatch)
    records = raw_records(tmp_path / "cut")
    positions = [r["position"] for r in records if r["kind"] == "step"]
    assert positions == list(range(0, 8 * len(positions), 8))
    assert [r["step"] for r in records if r["kind"] == "rolled_back"] == [27]


def test_a_run_stopped_before_its_first_step_has_a_summary(finished, tmp_path):
    begin = Trainer._start

    def stop_at_once(trainer):
        begin(trainer)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with patch.object(Trainer, "_start", stop_at_once):
        summary = run(finished[0], tmp_path / "none")
    assert signal.getsignal(signal.SIGTERM) == before
    assert (summary["is_complete"], summary["num_steps"], summary["final_loss"]) == (False, 0, None)
    assert "stopped by a signal" in render_summary(summary, tmp_path)
    assert run(finished[0], tmp_path / "none", resume=True)["final_loss"] == finished[2]["final_loss"]


def test_resuming_reads_no_more_data_at_a_later_step(finished, tmp_path):
    """Windows copied from the text by a resumed process: as many as its own steps need, however many came before."""
    copied, real = [], TokenDataset._copy

    def count(dataset, start, row):
        copied.append(start)
        real(dataset, start, row)

    def at_step(step):
        def begin(trainer):
            real_begin(trainer)
            trainer.step, trainer.position = step, step * campaigns.BATCH

        real_begin = Trainer._start
        with patch.object(Trainer, "_start", begin), patch.object(TokenDataset, "_copy", count):
            copied.clear()
            run(finished[0], tmp_path / str(step), {"num_steps": step + 2})
        return len(copied)

    assert at_step(10) == at_step(10_000) == at_step(10_000_000) == 2 * campaigns.BATCH


def test_fp16_gradients_beyond_range_are_no_divergence(tmp_path):
    """The loss scale halves until they fit; only the skipped steps are lost."""
    agree, scales = Engine.agree, []

    def overflowing(engine, loss):
        scales.append(engine.loss_scale)
        mean, norm = agree(engine, loss)
        return mean, math.inf if engine.loss_scale > 2.0**6 else norm

    plan = campaigns.write_plan(tmp_path, precision="fp16", steps=20)
    with patch.object(Engine, "agree", overflowing):
        summary = run(plan, tmp_path / "fp16")
    assert scales[:10] == [2.0**n for n in range(15, 5, -1)]
    assert set(scales[9:]) == {2.0**6}
    assert (summary["num_rollbacks"], summary["is_complete"]) == (0, True)
    assert sum(bool(r.get("skipped")) for r in raw_records(tmp_path / "fp16")) == 9


@pytest.mark.slow
def test_an_error_on_one_rank_ends_the_others(tmp_path):
    """A token beyond the vocabulary that rank 1 reads: no rank waits for ever, nothing is tried again, status 2."""
    plan = campaigns.write_plan(tmp_path, "two", num_devices=2, steps=500)
    shard = tmp_path / "text" / "train" / "00000.bin"
    dataset, bad = TokenDataset.open(tmp_path / "text" / "train"), 9999
    position = next(p for p in range(81, 200, 2) if (dataset.sequences(p, 1, campaigns.SEQ_LEN, 0)[0, 1:-1] > 0).all())  # odd ones are rank 1's
    window = dataset.sequences(position, 1, campaigns.SEQ_LEN, 0)[0]
    del dataset
    data = bytearray(shard.read_bytes())
    offset = next(o for o in range(0, len(data), 2) if data[o : o + 2 * len(window)] == window.astype("<u2").tobytes())
    data[offset + 10 : offset + 12] = bad.to_bytes(2, "little")
    shard.write_bytes(data)
    launcher = campaigns.command("run", plan, "--out", tmp_path / "out")
    text, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 2, text
    assert "beyond its vocabulary" in text
    assert "starting again" not in text


@pytest.mark.slow
def test_a_rank_that_keeps_dying_ends_the_run_with_advice(tmp_path):
    plan = campaigns.write_plan(tmp_path, "two", num_devices=2, steps=100_000)
    out = tmp_path / "out"
    launcher = campaigns.command("run", plan, "--out", out, "--max-restarts", 0)
    while not campaigns.log_steps(out)[1] and launcher.poll() is None:
        pass
    os.kill(campaigns.ranks_of(launcher)[random.Random(1).randrange(2)], signal.SIGKILL)
    text, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 1, text
    assert "was ended by signal 9: giving up; go on with --resume" in text
