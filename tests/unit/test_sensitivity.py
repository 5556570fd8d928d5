"""Tornados, tables and sweeps: every number is that of an estimate, and a killed sweep loses nothing."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from planner import build_request, estimate
from planner.cli import app
from planner.errors import InputError
from planner.options import put_options
from planner.report.sensitivity_text import render_table, render_tornado
from planner.sensitivity import RESULTS, make_table, make_tornado
from planner.sweep import OUTPUTS, sweep

MODEL = {"model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
         "intermediate_size": 2816, "vocab_size": 32000, "max_position_embeddings": 8192}  # fmt: skip
BASE: dict[str, Any] = {
    "model": MODEL,
    "workload": {"seq_len": 2048, "global_batch_size": 64, "tokens": 1e10},
    "cluster": {"accelerator": "h100-80gb-sxm", "num_devices": 8, "price": "2 USD/h"},
    "layout": {"dp_replicate": 1, "dp_shard": 8, "tp": 1, "cp": 1, "pp": 1, "num_virtual_stages": 1, "schedule": "1f1b", "ep": 1, "zero_stage": 1,
               "sequence_parallel": False, "micro_batch_size": 2},
}  # fmt: skip


def test_a_tornado_is_made_of_estimates() -> None:
    found = make_tornado(build_request(BASE))
    plan = estimate(BASE)
    assert plan.cost.usd is not None
    assert (found.result, found.base) == ("cost.usd", plan.cost.usd.value)
    by_name = {each.name: each for each in found.swings}
    assert [each.size for each in found.swings] == sorted((each.size for each in found.swings), reverse=True)
    assert by_name["price"].low.value == pytest.approx(0.8 * found.base)
    assert by_name["tokens"].high.value == pytest.approx(2 * found.base, rel=1e-3)
    assert (by_name["prediction itself"].low.value, by_name["prediction itself"].high.value) == (plan.cost.usd.low, plan.cost.usd.high)
    doubled = estimate({**BASE, "workload": {**BASE["workload"], "seq_len": 4096}})
    assert doubled.cost.usd is not None
    assert by_name["seq_len"].high.value == doubled.cost.usd.value
    assert by_name["num_devices"].high.note == "another layout"


@pytest.mark.parametrize("key", sorted(RESULTS))
def test_every_result_has_a_tornado_and_a_picture(key: str) -> None:
    found = make_tornado(build_request(BASE), key)
    text = render_tornado(found)
    assert all(each.name in text for each in found.swings)
    assert len(found.swings) >= 2


def test_a_table_is_made_of_estimates() -> None:
    asked = build_request(BASE)
    found = make_table(asked, ("micro_batch_size", ["1", "4"]), ("seq_len", ["1024", "2048", "4096"]), "time.step_s")
    for name, row in zip(found.rows[1], found.cells, strict=True):
        for other, cell in zip(found.columns[1], row, strict=True):
            assert cell.value == estimate(put_options(BASE, {"micro_batch_size": name, "seq_len": other})).time.step_s.value
    degrees = make_table(asked, ("tp", ["1", "2", "3"]), ("micro_batch_size", ["1", "2"]), "time.step_s")
    assert [row[0].note for row in degrees.cells[:2]] == ["", "another layout"]
    assert degrees.cells[2][0].value is None
    assert "num_attention_heads" in degrees.cells[2][0].note or "devices" in degrees.cells[2][0].note
    assert "another layout" in render_table(degrees)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--of", "speed"], "--of"),
        (["--vary", "tp=1,2"], "--against"),
        (["--vary", "tp", "--against", "pp=1,2"], "option and its values"),
        (["--vary", "tpp=1", "--against", "pp=1,2"], "tpp"),
        (["--of", "cost.usd"], "not known"),
    ],
)
def test_wrong_input_is_one_clear_error(arguments: list[str], words: str) -> None:
    base = ["sensitivity", "--model", "gpt2", "--accelerator", "h100", "--num-devices", "8"]
    result = CliRunner().invoke(app, [*base, *arguments])
    assert isinstance(result.exception, InputError)
    assert words in str(result.exception)


def test_a_sweep_has_a_row_for_each_combination(tmp_path: Path) -> None:
    out, vary = tmp_path / "sweep.csv", {"num_devices": ["8", "16"], "precision": ["bf16", "fp8", "odd"]}
    assert sweep(build_request({**BASE, "layout": {}}), vary, out) == 6
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [(row["num_devices"], row["precision"]) for row in rows] == [(n, p) for n in vary["num_devices"] for p in vary["precision"]]
    for row in rows:
        if row["precision"] == "odd":
            assert "precision" in row["error"]
            assert row["step_s"] == ""
        else:
            plan = estimate(put_options({**BASE, "layout": {}}, {"num_devices": row["num_devices"], "precision": row["precision"]}))
            assert {name: row[name] for name in OUTPUTS} == {name: str(value) for name, read in OUTPUTS.items() if (value := read(plan)) is not None}
    with pytest.raises(InputError, match="is there already"):
        sweep(build_request(BASE), vary, out)
    with pytest.raises(InputError, match="another sweep"):
        sweep(build_request({**BASE, "layout": {}}), {"num_devices": ["8"]}, out, resume=True)
    with pytest.raises(InputError, match="another sweep"):
        sweep(build_request({**BASE, "workload": {"seq_len": 1024}}), vary, out, resume=True)


def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    """A real process, killed; its last line cut off as a crash of the machine may do."""
    plan, out, whole = tmp_path / "base.json", tmp_path / "sweep.csv", tmp_path / "whole.csv"
    plan.write_text(json.dumps({**BASE, "layout": {}}))
    command = [sys.executable, "-m", "planner", "sweep", str(plan), "--vary", "num_devices=8,16,32", "--vary", "seq_len=512,1024,2048,4096"]
    with subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while (not out.exists() or out.read_text().count("\n") < 4) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    text = out.read_text()
    assert 4 <= text.count("\n") < 13
    out.write_text(text + "32,40")
    done = subprocess.run([*command, "--out", str(out), "--resume", "--json"], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["rows_added"] == 13 - text.count("\n")
    subprocess.run([*command, "--out", str(whole)], check=True, stdout=subprocess.DEVNULL, env=os.environ)
    assert out.read_text() == whole.read_text()


def test_the_commands(tmp_path: Path) -> None:
    base = ["--model", "gpt2", "--accelerator", "h100", "--num-devices", "8", "--price", "2"]
    tornado = CliRunner().invoke(app, ["sensitivity", *base, "--json"])
    assert tornado.exit_code == 0
    assert json.loads(tornado.stdout)["result"] == "cost.usd"
    table = CliRunner().invoke(app, ["sensitivity", *base, "--vary", "num-devices=8,16", "--against", "price=1,2"])
    assert table.exit_code == 0
    assert "num_devices down, price across" in table.stdout
    swept = CliRunner().invoke(app, ["sweep", *base, "--vary", "num-devices=8,16", "--out", str(tmp_path / "a.csv")])
    assert swept.exit_code == 0
    assert "2 rows added" in swept.stdout
