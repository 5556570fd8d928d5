"""`--profile`: traces that Perfetto reads, of the steps that were asked for and no others, and the table of ops beside them."""

import gzip
import json
import signal
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import InputError
from reftrain import trace
from reftrain.config import load_run_config
from reftrain.measure import read_metrics
from reftrain.progress import render_summary
from reftrain.trace import Span, top_ops
from reftrain.train import RunOptions, Trainer, train
from tests.reftrain import fault_campaigns as campaigns

NUM_STEPS, NUM_TRACED, FIRST = 9, 2, 3


def run(plan, out, **changes):
    torch.set_num_threads(1)
    return train(load_run_config(plan, changes), RunOptions(out)).values


def read_trace(out, rank=0):
    """Complete events of a trace by name: a Chrome trace gives each `ph` X with a start and a duration in microseconds."""
    with gzip.open(out / "traces" / f"rank{rank}.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    found = {}
    for event in events:
        if event.get("ph") == "X":
            found.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    return found


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """(plan, folder, summary) of a run with full recompute, two blocks and four microbatches per step."""
    folder = tmp_path_factory.mktemp("trace")
    plan = campaigns.write_plan(folder, steps=NUM_STEPS)
    values = json.loads(plan.read_text())
    values["workload"]["recompute"] = "full"
    plan.write_text(json.dumps(values))
    return plan, folder / "run", run(plan, folder / "run", profile_steps=NUM_TRACED)


def test_a_trace_holds_the_steps_asked_for(traced):
    _, out, summary = traced
    events = read_trace(out)
    assert {name for name in events if name.startswith("step ")} == {f"step {FIRST + i}" for i in range(NUM_TRACED)}
    num = NUM_TRACED * campaigns.NUM_MICROBATCHES
    assert {name: len(events[name]) for name in ("data", "forward", "backward", "optimizer")} == {
        "data": NUM_TRACED, "forward": num, "backward": num, "optimizer": NUM_TRACED,
    }  # fmt: skip
    assert summary["traces"] == {"num_steps": NUM_TRACED}
    assert "https://ui.perfetto.dev" in render_summary(summary, out)


def test_spans_lie_inside_each_other(traced):
    events = read_trace(traced[1])

    def count_inside(name, *outer):
        return Counter(by for start, end in events[name] for by in outer for a, b in events[by] if a <= start and end <= b)

    num = NUM_TRACED * campaigns.NUM_MICROBATCHES
    for name in ("block 0", "block 1"):
        assert count_inside(name, "forward", "backward") == {"forward": num}
    for name in ("forward", "backward"):
        assert count_inside(name, *(f"step {FIRST + i}" for i in range(NUM_TRACED))).total() == num


def test_traced_steps_are_not_timed_and_change_nothing(traced, tmp_path):
    plan, out, summary = traced
    plain = run(plan, tmp_path / "plain")
    assert (summary["step_s"]["count"], plain["step_s"]["count"]) == (NUM_STEPS - FIRST - NUM_TRACED, NUM_STEPS - FIRST)
    losses = [[r["loss"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "step"] for folder in (out, tmp_path / "plain")]
    assert losses[0] == losses[1]
    assert not (tmp_path / "plain" / "traces").exists()
    assert "traces" not in plain


def test_the_table_of_ops_agrees_with_the_trace(traced):
    out = traced[1]
    table = json.loads((out / "traces" / "summary.json").read_text())
    events = read_trace(out)
    assert table["num_steps"] == NUM_TRACED
    assert table["device_ops"] == []
    assert {"aten::addmm", "aten::mm"} & {op["op"] for op in table["host_ops"]}
    assert sorted(table["host_ops"], key=lambda op: -op["self_s"]) == table["host_ops"]
    for op in table["host_ops"]:
        assert op["calls"] == len(events[op["op"]])
        assert op["total_s"] == pytest.approx(1e-6 * sum(end - start for start, end in events[op["op"]]), abs=1e-6 * op["calls"])
        assert 0 < op["self_s"] <= op["total_s"]
    assert sorted(p.name for p in (out / "traces").iterdir()) == ["rank0.json.gz", "summary.json"]


def test_a_run_stopped_while_it_traces_keeps_what_it_has(traced, tmp_path, monkeypatch):
    step = Trainer._one_step

    def stop_in_the_middle(trainer):
        step(trainer)
        if trainer.step == FIRST + 1:
            trainer.stop_signal = signal.SIGTERM

    monkeypatch.setattr(Trainer, "_one_step", stop_in_the_middle)
    summary = run(traced[0], tmp_path / "run", profile_steps=5)
    assert (summary["is_complete"], summary["traces"]) == (False, {"num_steps": 1})
    assert f"step {FIRST}" in read_trace(tmp_path / "run")


def test_a_run_too_short_to_trace_says_so(traced, tmp_path, capsys):
    assert "traces" not in run(traced[0], tmp_path / "run", profile_steps=2, num_steps=FIRST)
    assert "nothing was traced" in capsys.readouterr().err


def test_a_trace_that_cannot_be_written_is_wrong_input_and_leaves_nothing(traced, tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trace.os, "replace", fail)
    monkeypatch.setattr(trace, "sync_folder", fail)
    tracer = trace.Tracer(tmp_path / "traces", type("One", (), {"device": torch.device("cpu"), "rank": 0, "is_first": True})())
    with tracer.step(0):
        torch.ones(3).sum()
    with pytest.raises(InputError, match="No space left on device"):
        tracer.save()
    assert not list((tmp_path / "traces").iterdir())


def test_every_rank_has_its_trace_and_nothing_else_is_said(tmp_path):
    """Through the command line, on two processes."""
    job = campaigns.command("run", campaigns.write_plan(tmp_path, "two", num_devices=2, steps=8), "--out", tmp_path / "run", "--profile")
    text, _ = job.communicate(timeout=120)
    assert job.returncode == 0, text
    assert "profiler_start" not in text
    for rank in range(2):
        events = read_trace(tmp_path / "run", rank)
        assert {name for name in events if name.startswith("step ")} == {f"step {n}" for n in (5, 6, 7)}
        assert len(events["communication"]) == 3
        assert any(name.startswith("c10d::_reduce_scatter") for name in events)


intervals = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=12)


@given(intervals)
def test_own_time_is_what_a_count_of_moments_says(drawn):
    """Spans made to nest: each is cut to lie inside the one that is open when it starts. A moment belongs to the innermost span."""
    spans, open_until = [], []
    for start, length in sorted(drawn):
        open_until = [end for end in open_until if end > start]
        end = min([start + length, *open_until])
        spans.append(Span(f"op{len(spans)}", start, end))
        open_until.append(end)
    owner = {t: max((s for s in spans if s.start_s <= t < s.end_s), key=spans.index, default=None) for t in range(80)}
    count = Counter(span.name for span in owner.values() if span)
    found = top_ops(spans)
    assert {op["op"]: op["self_s"] for op in found} == {span.name: count[span.name] for span in spans}
    assert sum(op["fraction"] for op in found) == pytest.approx(1.0)
