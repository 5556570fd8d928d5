"""Calibration: the fit against a second derivation, the written stack against what the fit promised, and what is refused."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planner import estimate
from planner.calibration import LEAST_RUNS
from planner.cli import app, run_app
from planner.coefficients import TERMS
from planner.files import read_yaml, to_yaml
from planner.plan import build_request
from planner.run_files import read_summary

SIZES = ((1024, 8, 8, 1024), (2048, 4, 4, 2048), (512, 16, 16, 512), (1536, 6, 4, 4096))
NEW = (768, 12, 8, 2048)
"""Hidden size, layers, sequences, length of a run that no fit sees."""


def request(hidden: int, layers: int, batch: int, seq_len: int, *, recompute: str = "none", **layout: Any) -> dict[str, Any]:
    model = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "vocab_size": 8192,
        "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "max_position_embeddings": 4096,
    }  # fmt: skip
    num_devices = int(np.prod([value for key, value in layout.items() if key in ("dp_replicate", "dp_shard", "tp", "pp", "cp")]))
    workload = {"seq_len": seq_len, "global_batch_size": batch, "tokens": 1e9, "recompute": recompute}
    layout = {"micro_batch_size": batch // layout.get("dp_shard", 1) // layout.get("dp_replicate", 1), **layout}
    return {
        "model": model,
        "workload": workload,
        "cluster": {"accelerator": "h100", "num_devices": num_devices},
        "stack": "reftrain",
        "layout": layout,
    }


def complete(values: dict[str, Any]) -> dict[str, Any]:
    """The request with the layout that was chosen for it: another stack might have chosen another."""
    return {**values, "layout": estimate(values).inputs["layout"]}


def write_run(folder: Path, values: dict[str, Any], slower: float = 1.0, step_s: float | None = None) -> str:
    """A finished run whose step took `slower` times as long as predicted, and whose memory was predicted exactly."""
    folder.mkdir(parents=True)
    plan = estimate(build_request(values))
    measured_s = plan.time.step_s.value * slower if step_s is None else step_s
    (folder / "plan.yaml").write_text(plan.to_yaml())
    facts = {"device": "test", "tokens_per_step": 8192, "is_complete": True, "peak_bytes": plan.memory.peak_bytes.value}
    (folder / "summary.json").write_text(json.dumps({**facts, "step_s": {"median": measured_s}, "ours": "and more"}))
    return str(folder)


@pytest.fixture
def calibrate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["planner", "calibrate", *arguments])
        status = run_app(app, "planner")
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_a_ratio_that_all_runs_share_is_found_and_holds_for_a_run_not_fitted(tmp_path: Path, calibrate: Any) -> None:
    runs = [write_run(tmp_path / str(i), request(*size), slower=1.3) for i, size in enumerate(SIZES)]
    out = tmp_path / "mine.yaml"
    status, text, err = calibrate(*runs, "--out", str(out), "--json")
    assert (status, err) == (0, "")
    before = estimate(build_request(request(*NEW))).time.step_s.value
    again = estimate(build_request({**request(*NEW), "stack": str(out)})).time.step_s
    # One ratio r for every kind: the ridge's answer lies between 1 and r, next to r, whatever the kinds are.
    assert again.value / (1.3 * before) == pytest.approx(1, abs=0.02)
    assert again.low < 1.3 * before < again.high
    medians = json.loads(text)["median_abs_error_fraction"]
    assert medians["before"] == pytest.approx(1 - 1 / 1.3)
    assert medians["after"] <= medians["left_out"] < 0.03
    stack = read_yaml(out)
    assert stack["name"] == "mine"
    assert stack["coefficients"]["matmul"]["evidence"] == "fitted"
    assert stack["memory_interval"]["low"] == pytest.approx(0.97), "memory was exact: the least interval"


def test_the_written_stack_predicts_what_the_fit_promised(tmp_path: Path, calibrate: Any) -> None:
    """Also for what is done again, what crosses devices, and kernels that turn from bound by compute to bound by memory."""
    cases = [
        *(request(*size) for size in SIZES),
        *(request(*SIZES[0], recompute=recompute) for recompute in ("selective", "full")),
        request(*SIZES[0], tp=2, recompute="full"),
        request(*SIZES[0], dp_shard=2, zero_stage=3),
        request(*SIZES[0], dp_replicate=2),
        request(*SIZES[0], cp=2),
    ]
    slower = np.random.default_rng(0).uniform(0.8, 1.5, len(cases))
    runs = [write_run(tmp_path / str(i), case, slow) for i, (case, slow) in enumerate(zip(cases, slower, strict=True))]
    out = tmp_path / "fitted.yaml"
    status, text, _ = calibrate(*runs, "--out", str(out), "--json")
    assert status == 0
    found = json.loads(text)
    for case, row in zip(cases, found["rows"], strict=True):
        assert row["before_step_s"] == pytest.approx(estimate(build_request(case)).time.step_s.value, rel=1e-12)
        assert row["after_step_s"] == pytest.approx(estimate({**complete(case), "stack": str(out)}).time.step_s.value, rel=1e-12)
    stack = read_yaml(out)
    for term, c in found["coefficients"].items():
        assert stack["coefficients"][term]["value"] == pytest.approx(c["after"])
        assert TERMS[term].low <= c["after"] <= TERMS[term].high


def test_coefficients_of_single_accelerators_move_too(tmp_path: Path, calibrate: Any) -> None:
    """Where a stack knows an accelerator by itself, its general rate of matmuls says nothing there."""
    known = read_yaml("data/stacks/reftrain.yaml")
    known["devices"] = {"h100-80gb-sxm": {"matmul": {"value": 0.6, "evidence": "assumed", "source": "this test"}}}
    start, out = tmp_path / "known.yaml", tmp_path / "out.yaml"
    start.write_text(to_yaml(known))
    runs = [write_run(tmp_path / str(i), {**request(*size), "stack": str(start)}, slower=1.2) for i, size in enumerate(SIZES)]
    status, text, _ = calibrate(*runs, "--out", str(out), "--json")
    moved = json.loads(text)["coefficients"]["matmul"]
    assert status == 0
    assert moved["before"] == 0.6
    assert moved["after"] < 0.57
    assert read_yaml(out)["devices"]["h100-80gb-sxm"]["matmul"]["value"] == pytest.approx(moved["after"])


def test_runs_of_one_configuration_are_left_out_together(tmp_path: Path, calibrate: Any) -> None:
    """A second run of the same plan must not vouch for the first."""
    runs = [write_run(tmp_path / str(i), request(*size)) for i, size in enumerate(SIZES[:3])]
    longer = request(*SIZES[0])
    longer["workload"]["tokens"] = 2e9
    twins = [write_run(tmp_path / "twin", longer, slower=2.0), write_run(tmp_path / "twin again", request(*SIZES[0]), slower=2.0)]
    alone = calibrate(*runs[1:], twins[0], "--out", str(tmp_path / "a.yaml"), "--json")
    both = calibrate(*runs[1:], *twins, "--out", str(tmp_path / "b.yaml"), "--json")
    left_out = [json.loads(text)["rows"][2]["left_out_step_s"] for _, text, _ in (alone, both)]
    assert left_out[0] == pytest.approx(left_out[1], rel=1e-12)


def test_the_table_names_every_run_and_the_file(tmp_path: Path, calibrate: Any) -> None:
    runs = [write_run(tmp_path / f"run {i}", request(*size), slower=1.25) for i, size in enumerate(SIZES[:3])]
    status, text, _ = calibrate(*runs, "--out", str(tmp_path / "mine.yaml"))
    assert status == 0
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert all(rows[run][-3] == "-20.0%" for run in runs)
    assert "20.0% before" in text
    assert f"--stack {tmp_path / 'mine.yaml'}" in text
    assert "outside of that a prediction extrapolates" in text
    assert "at its physical bound" not in text


def test_a_fit_that_ends_at_its_bounds_says_so(tmp_path: Path, calibrate: Any) -> None:
    runs = [write_run(tmp_path / f"run {i}", request(*size), slower=0.05) for i, size in enumerate(SIZES[:3])]
    _, text, _ = calibrate(*runs, "--out", str(tmp_path / "mine.yaml"))
    assert re.search(r"^matmul .*at its physical bound", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (lambda run: (run / "summary.json").unlink(), "holds no summary.json"),
        (lambda run: (run / "plan.yaml").unlink(), "must be a folder that `reftrain run` wrote"),
        (lambda run: (run / "summary.json").write_text('{"device": "x", '), "must be valid JSON"),
        (lambda run: (run / "summary.json").write_bytes(b"\xff\xfe"), "must be UTF-8"),
        (lambda run: (run / "summary.json").write_text("[]"), "must be a mapping"),
        (lambda run: (run / "plan.yaml").write_text("- 1\n"), "must be a mapping"),
        (lambda run: change(run, step_s=None), "no timed steps"),
        (lambda run: change(run, step_s={"median": 0}), "greater than 0"),
        (lambda run: change(run, step_s={"median": "fast"}), "valid number"),
        (lambda run: change(run, peak_bytes=-1), "greater than 0"),
        (lambda run: shutil.rmtree(run), "must be a folder that `reftrain run` wrote"),
    ],
)
def test_a_run_that_cannot_be_read(tmp_path: Path, calibrate: Any, spoil: Any, rule: str) -> None:
    runs = [write_run(tmp_path / str(i), request(*size)) for i, size in enumerate(SIZES[:3])]
    spoil(tmp_path / "1")
    out = tmp_path / "out.yaml"
    status, text, err = calibrate(*runs, "--out", str(out))
    assert (status, text, out.exists()) == (2, "", False)
    assert rule in err
    assert err.count("error:") == 1
    assert str(tmp_path / "1") in err
    assert "fault of ours" not in err


def change(run: Path, **values: Any) -> None:
    (run / "summary.json").write_text(json.dumps({**json.loads((run / "summary.json").read_text()), **values}))


def test_too_few_runs_and_runs_that_add_nothing(tmp_path: Path, calibrate: Any) -> None:
    runs = [write_run(tmp_path / str(i), request(*size)) for i, size in enumerate(SIZES[:3])]
    twin = write_run(tmp_path / "twin", request(*SIZES[0]))
    for named, rule in (
        ((), "one of run folders and --measurements is needed"),
        (runs[:2], "at least 3 runs"),
        ((*runs, runs[0]), "is named twice"),
        ((*runs, runs[0] + "/"), "is named twice"),
        ((runs[0], runs[1], twin), "3 different configurations, and these 3 runs are of 2"),
    ):
        status, _, err = calibrate(*named, "--out", str(tmp_path / "out.yaml"))
        assert status == 2
        assert rule in err
    other = write_run(tmp_path / "other", {**request(*SIZES[3]), "stack": "torchtitan"})
    status, _, err = calibrate(*runs, other, "--out", str(tmp_path / "out.yaml"))
    assert status == 2
    assert "several stacks" in err
    assert not (tmp_path / "out.yaml").exists()
    assert calibrate(*runs, other, "--stack", "reftrain", "--out", str(tmp_path / "out.yaml"))[0] == 0


def test_a_summary_may_hold_more_than_is_read(tmp_path: Path) -> None:
    write_run(tmp_path / "run", request(*SIZES[0]))
    change(tmp_path / "run", per_rank=[{"flops": 1}])
    assert read_summary(tmp_path / "run").device == "test"


def test_rows_of_a_table_calibrate_too(tmp_path: Path, calibrate: Any) -> None:
    """The shipped table of published peaks has step times as well; its rows of one framework fit a stack."""
    table = tmp_path / "rows.csv"
    with open("data/measurements/anchors.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    kept = [row for row in rows if "llm-foundry" in row["framework"] and row["measured_tokens_per_s_per_device"]][:12]
    assert len(kept) >= LEAST_RUNS
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(kept)
    out = tmp_path / "stack.yaml"
    status, text, err = calibrate("--measurements", str(table), "--out", str(out), "--json")
    found = json.loads(text)
    assert status == 0
    assert f"{len(kept)} rows have a step time" in err
    assert found["median_abs_error_fraction"]["after"] < 0.03
    assert read_yaml(out)["coefficients"]["matmul"]["evidence"] == "fitted"
