"""The timeline of a step: it ends when the plan says, nothing overlaps on one stream, and stages do what they are said to do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from planner import estimate
from planner.cli import app, run_app
from planner.plan import build_request
from planner.step_trace import STREAMS, trace_step

LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "accumulation": ("llama-3.2-1b", {"dp_shard": 8, "zero_stage": 3}),
    "1f1b": ("llama-3.1-8b", {"dp_shard": 2, "pp": 4, "num_virtual_stages": 1, "schedule": "1f1b", "zero_stage": 1}),
    "interleaved": ("llama-3.1-8b", {"dp_shard": 2, "pp": 4, "num_virtual_stages": 2, "schedule": "interleaved_1f1b", "zero_stage": 1}),
    "zero bubble": ("llama-3.1-8b", {"dp_shard": 2, "pp": 4, "schedule": "zb_h1", "zero_stage": 1}),
    "dualpipe": ("llama-3.1-8b", {"dp_shard": 2, "pp": 4, "num_virtual_stages": 2, "schedule": "dualpipe", "zero_stage": 1}),
    "experts": ("qwen3-30b-a3b", {"dp_shard": 8, "ep": 8, "zero_stage": 1}),
    "tensor and context": ("llama-3.1-8b", {"dp_shard": 2, "tp": 2, "cp": 2, "zero_stage": 1, "sequence_parallel": True}),
}


def request(name: str) -> dict[str, Any]:
    model, layout = LAYOUTS[name]
    return {
        "model": model, "workload": {"seq_len": 4096, "global_batch_size": 32, "tokens": 1e9, "recompute": "full"},
        "cluster": {"accelerator": "h100-80gb-sxm", "num_devices": 8}, "stack": "nemo", "layout": {"micro_batch_size": 1, **layout},
    }  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_last_slice_ends_with_the_step(name: str) -> None:
    plan, found = estimate(request(name)), trace_step(build_request(request(name)))
    ends = [event["ts"] + event["dur"] for event in found.events if event["ph"] == "X"]
    assert max(ends) / 1e6 == pytest.approx(plan.time.step_s.value, rel=1e-9)
    assert found.step_s == pytest.approx(plan.time.step_s.value, rel=1e-9)
    assert 0.95 < found.metadata["closed_form_over_simulation"] < 1.05


@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_overlaps_on_one_stream_but_what_is_inside(name: str) -> None:
    events = [event for event in trace_step(build_request(request(name))).events if event["ph"] == "X"]
    slack = 1e-6 * max(event["ts"] + event["dur"] for event in events)
    for key in {(event["pid"], event["tid"]) for event in events if STREAMS[event["tid"]] != "pipeline"}:
        own = sorted(((e["ts"], e["ts"] + e["dur"]) for e in events if (e["pid"], e["tid"]) == key), key=lambda span: (span[0], -span[1]))
        open_ends: list[float] = []
        for start, end in own:
            while open_ends and open_ends[-1] <= start + slack:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1] + slack, (name, key)
            open_ends.append(end)


def test_a_stage_is_busy_or_waits() -> None:
    found = trace_step(build_request(request("1f1b")))
    parts = found.plan.time.breakdown_s
    after = sum(parts[name] for name in ("data_parallel", "stragglers", "optimizer", "step_overhead")) * found.metadata["correction_factor"]
    for stage in found.stages:
        assert stage.busy_s + stage.bubble_s + after == pytest.approx(found.step_s, rel=1e-9)
        assert 0 <= stage.exposed_communication_s < stage.busy_s


def test_every_microbatch_goes_through_every_stage_and_arrows_pair_up() -> None:
    found = trace_step(build_request(request("1f1b")))
    for stage in range(4):
        for way in ("forward", "backward"):
            named = {event["name"] for event in found.events if event["pid"] == stage and event["ph"] == "X" and event["tid"] == 0}
            assert {f"{way} {i}" for i in range(16)} <= named
    starts, ends = ([event["id"] for event in found.events if event["ph"] == way] for way in "sf")
    assert sorted(starts) == sorted(ends)
    assert len(starts) == 2 * 3 * 16


def test_the_inside_of_a_pass_adds_up_to_it() -> None:
    found = trace_step(build_request(request("tensor and context")))
    compute = [event for event in found.events if event["ph"] == "X" and event["pid"] == 0 and event["tid"] == 0]
    whole = next(event for event in compute if event["name"] == "forward 0")
    inside = [e for e in compute if e is not whole and whole["ts"] <= e["ts"] < whole["ts"] + whole["dur"] * (1 - 1e-9)]
    assert sum(event["dur"] for event in inside) == pytest.approx(whole["dur"], rel=1e-9)
    assert {"matmul", "attention", "tensor_parallel"} <= {event["name"] for event in inside}


def test_the_command_writes_what_perfetto_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plan, out = tmp_path / "plan.yaml", tmp_path / "step.json"
    plan.write_text(estimate(request("1f1b")).to_yaml())
    monkeypatch.setattr(sys, "argv", ["planner", "trace", str(plan), "--out", str(out), "--json"])
    assert run_app(app, "planner") == 0
    summary, written = json.loads(capsys.readouterr().out), json.loads(out.read_text())
    assert set(written) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert all({"ph", "pid", "tid"} <= set(event) for event in written["traceEvents"])
    assert len(written["traceEvents"]) == summary["num_events"]
    assert {event["args"]["name"] for event in written["traceEvents"] if event["name"] == "process_name"} == {f"stage {i}" for i in range(4)}
    monkeypatch.setattr(sys, "argv", ["planner", "trace", str(plan), "--out", str(tmp_path / "no" / "where.json")])
    assert run_app(app, "planner") == 2


def test_a_large_run_is_written_whole_passes_only() -> None:
    large = request("1f1b")
    large["workload"]["global_batch_size"] = 8192
    found = trace_step(build_request(large))
    assert not found.metadata["parts_of_passes_shown"]
    assert len(found.events) < 100_000
