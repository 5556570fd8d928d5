"""Whole runs under faults: small shares of the campaigns that `python scripts/faults.py` runs in full. Counts go to the report (--junitxml)."""

import json
import random
import signal

import pytest

from reftrain.checkpoint import CheckpointStore
from tests.reftrain import fault_campaigns as campaigns
from tests.reftrain.fault_worker import Run, raw_records

POISON = {"poison": ("nan", 8 * 24, 8 * 27)}
"""Four bad steps in a row, of which three are enough to roll back."""
CASES = {
    "fp32": ({}, {}), "bf16": ({"precision": "bf16"}, {}), "dropout": ({"dropout": 0.1}, {}),
    "blocking": ({"async_checkpoints": False, "every": 1}, {}),
    "rollback": ({"max_skipped_steps": 3}, POISON),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def plain(folder):
    """(plan, what an uninterrupted run of it gives)."""
    plan = campaigns.write_plan(folder)
    return plan, campaigns.run_reference(plan, folder / "reference")


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case in ("bf16", "dropout") else ()) for case in CASES])
def test_kills(folder, case, record_property):
    keys, fault = CASES[case]
    plan = campaigns.write_plan(folder, case, **keys)
    reference = campaigns.run_reference(plan, folder / f"{case}-reference", **fault)
    counts = campaigns.kills(folder, plan, reference, 3, random.Random(case), **fault)
    record_property("counts", dict(counts))
    assert counts["landed"] == counts["survived"] == 3
    assert counts["resumed past step 0"] >= 1


def test_terms(folder, plain, record_property):
    counts = campaigns.terms(folder, *plain, 2, random.Random(1))
    record_property("counts", dict(counts))
    assert counts["survived"] == 2


def test_term_while_a_save_runs(folder, plain):
    plan, reference = plain
    out = folder / "term-while-saving"
    run = Run(plan, out, slow_save_s=0.3)
    assert run.wait_for(lambda window: window["num_steps"] >= 2 and window["saving"])
    assert run.signal(signal.SIGTERM)["saving"]
    assert run.end() == 130, run.text
    last = [r["step"] for r in raw_records(out) if r["kind"] == "step"][-1]
    assert CheckpointStore(out / "checkpoints").newest().name == f"step-{last + 1:08d}"
    again = Run(plan, out, "--resume")
    assert again.end() == 0, again.text
    campaigns.assert_equals_reference(out, reference)


def test_a_second_term_ends_at_once(folder, plain):
    plan, reference = plain
    out = folder / "two-terms"
    run = Run(plan, out, slow_save_s=0.3)
    assert run.wait_for(lambda window: window["num_steps"] >= 2 and window["saving"])
    run.signal(signal.SIGTERM)
    saves = run.window.get()["num_saves"]
    run.process.join(0.1)  # the first one is noted between two bytecodes
    run.signal(signal.SIGTERM)
    assert run.end() == 128 + signal.SIGTERM, run.text
    assert run.window.get()["num_saves"] <= saves + 1
    again = Run(plan, out, "--resume")
    assert again.end() == 0, again.text
    campaigns.assert_equals_reference(out, reference)


def test_disk_full(folder, plain):
    assert campaigns.full_disks(folder, *plain, 2, random.Random(3))["survived"] == 2


def test_bit_flips(folder, plain):
    assert campaigns.bit_flips(folder, *plain, 2, random.Random(4))["survived"] == 2


def test_bad_losses(folder, record_property):
    plan = campaigns.write_plan(folder, "spoiled", steps=100)
    counts = campaigns.bad_losses(folder, plan, 30, random.Random(5))
    record_property("counts", dict(counts))
    assert counts["survived"] == 30


def test_rollback_leaves_the_bad_samples_out(folder):
    plan = campaigns.write_plan(folder, "rolled", max_skipped_steps=3)
    out = folder / "rolled"
    run = Run(plan, out, **POISON)
    assert run.end() == 0, run.text
    records = raw_records(out)
    back = next(i for i, r in enumerate(records) if r["kind"] == "rolled_back")
    assert [r["step"] for r in records[:back] if r.get("skipped")] == [24, 25, 26]
    assert records[back]["step"] in (24, 26 + 1)
    positions = [r["position"] for r in records if r["kind"] == "step"]
    assert positions == list(range(0, 8 * len(positions), 8))
    assert next(r["step"] for r in records[back:] if r["kind"] == "step") == records[back]["step"]
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["num_skipped"], summary["num_rollbacks"], summary["is_complete"]) == (4, 1, True)
    assert campaigns.all_finite(out)


def test_a_run_that_diverges_stops_and_can_be_resumed(folder):
    plan = campaigns.write_plan(folder, "diverging", max_skipped_steps=2, max_rollbacks=2)
    out = folder / "diverging"
    run = Run(plan, out, poison=("inf", 8 * 20, 10**9))
    assert run.end() == 1, run.text
    assert "the run diverged at step" in run.text
    assert "learning_rate" in run.text
    assert "fault of ours" not in run.text
    records = raw_records(out)
    assert [r["kind"] for r in records].count("rolled_back") == 2
    assert records[-1]["kind"] == "diverged"
    assert campaigns.all_finite(out)
    newest = CheckpointStore(out / "checkpoints").newest()
    assert str(newest) in run.text
    again = Run(plan, out, "--resume")
    assert again.end() == 0, again.text
    assert campaigns.all_finite(out)


def test_layouts_change_and_a_rank_dies(folder, plain):
    """One process, then two with FSDP of which one is killed, then one again: losses as if nothing had happened."""
    plan, reference = plain
    out = folder / "layouts"
    first = Run(plan, out)
    assert first.wait_for(lambda window: window["num_steps"] >= 7)
    first.signal(signal.SIGTERM)
    assert first.end() == 130, first.text
    one = campaigns.log_steps(out)[1][-1] + 1
    two = campaigns.write_plan(folder, "layouts-two", num_devices=2, every=2)
    campaigns.kill_ranks(two, out, 1, random.Random(6), "--resume", stop_with=signal.SIGTERM)
    middle = campaigns.log_steps(out)[1][-1] + 1
    assert one < middle < reference.num_steps
    last = Run(plan, out, "--resume")
    assert last.end() == 0, last.text
    records = [r for r in raw_records(out) if r["kind"] == "step"]
    expected = {step: loss for (step, _), loss in reference.losses.items()}
    assert {r["step"] for r in records} == set(expected)
    worst = max(abs(r["loss"] - expected[r["step"]]) / expected[r["step"]] for r in records)
    assert worst < 1e-5


@pytest.mark.slow
def test_rank_kills(folder, record_property):
    counts = campaigns.rank_kills(folder, 2, random.Random(7))
    record_property("counts", dict(counts))
    assert counts["survived"] == 2
