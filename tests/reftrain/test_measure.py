"""What runs measure about themselves: communication by hand and by brute force, curves as TensorBoard reads them, MFU.

As a module it is one rank of the job that counts collectives.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from planner.plan import build_request
from planner.units import format_si
from reftrain.batches import open_batches
from reftrain.communication import communication_facts, find_exposed
from reftrain.config import load_run_config, make_run_config
from reftrain.curves import Curves
from reftrain.looks import COUNTED_STEP, PROFILED_STEPS, Looks
from reftrain.measure import Utilization, find_utilization, read_metrics, summarize
from reftrain.parallel import make_ranks
from reftrain.progress import render_summary
from reftrain.steps import Engine
from reftrain.trace import Span
from reftrain.train import RunOptions, train
from tests.reftrain import fault_campaigns as campaigns
from tests.reftrain.parity_worker import MODELS, ROOT, Case

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYOUTS = {
    "ddp": {"dp_replicate": 2, "micro_batch_size": 2},
    "zero3": {"dp_shard": 2, "zero_stage": 3, "micro_batch_size": 4},
    "tp": {"tp": 2, "micro_batch_size": 2},
    "pp": {"pp": 2, "micro_batch_size": 2},
}

# ----------------------------------------------------------------- collectives, on two processes


@pytest.fixture(scope="module")
def found():
    """What two processes found per layout, as `summary.json` would tell it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "tests.reftrain.test_measure",
            folder,
        ]
        job = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200)
        assert job.returncode == 0, job.stderr[-4000:]
        return {name: json.loads(Path(folder, f"{name}.json").read_text()) for name in LAYOUTS}


def walk(folder):
    """One rank: as many steps of every layout as are looked at."""
    dist.init_process_group("gloo")
    for name, layout in LAYOUTS.items():
        config = Case("llama", layout).config()
        ranks = make_ranks(config.layout, CPU, dist.get_rank())
        engine, batches = Engine(config, ranks), open_batches(config, ranks, "synthetic")
        looks, records = Looks(ranks, engine, Path(folder), 0), []
        for step in range(PROFILED_STEPS[-1] + 1):
            with looks.step(step) as times, looks.work(step, engine.parts[0].parameters):
                engine.update(step, engine.agree(engine.forward_backward(batches.microbatches(8 * step), times))[1])
            records += looks.records(step)
        assert [r["kind"] for r in records] == ["measured", "communication"]
        if ranks.is_first:
            Path(folder, f"{name}.json").write_text(json.dumps(communication_facts(records[1]["per_rank"])))
    dist.destroy_process_group()


SIZES = MODELS["llama"]
BATCH, SEQ_LEN, HIDDEN, LAYERS = 8, 32, SIZES["hidden_size"], SIZES["num_hidden_layers"]
PARAMETERS = 2 * SIZES["vocab_size"] * HIDDEN + HIDDEN + LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * SIZES["intermediate_size"] + 2 * HIDDEN)
AGREEMENT = 16
"""Loss and squared norm, two float64 that all ranks sum once per step."""


def counts(found, kind):
    return tuple(found["collectives"][kind][key] for key in ("calls", "bytes"))


def test_ddp_sums_every_gradient_once(found):
    assert counts(found["ddp"], "all_reduce") == (2, 4 * PARAMETERS + AGREEMENT)
    assert set(found["ddp"]["collectives"]) == {"all_reduce"}


def test_zero3_gathers_weights_twice_and_scatters_gradients_once(found):
    """With one microbatch: groups are the embedding, each block, and the head with its norm."""
    groups = LAYERS + 2
    assert counts(found["zero3"], "all_gather") == (2 * groups, 2 * 4 * PARAMETERS)
    assert counts(found["zero3"], "reduce_scatter") == (groups, 4 * PARAMETERS)
    assert counts(found["zero3"], "all_reduce") == (1, AGREEMENT)


def test_tensor_parallelism_sums_activations(found):
    """Two sums forward and two backward per block (Megatron), one after the embedding and one before the head; messages have b s h values."""
    num, message = BATCH // 2, 4 * 2 * SEQ_LEN * HIDDEN
    sums = num * (4 * LAYERS + 2)
    assert counts(found["tp"], "all_reduce") == (sums + 1, sums * message + AGREEMENT)
    # The loss over split classes: three numbers per token from either rank.
    assert counts(found["tp"], "all_gather")[1] == BATCH * SEQ_LEN * 3 * 4 * 2


def test_a_pipeline_sends_activations_and_their_gradients(found):
    num, message = BATCH // 2, 4 * 2 * SEQ_LEN * HIDDEN
    assert counts(found["pp"], "send") == counts(found["pp"], "recv") == (num, num * message)
    assert counts(found["pp"], "all_reduce") == (1, AGREEMENT)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exposed_time_is_a_part_of_the_step(found, layout):
    values = found[layout]
    assert 0 < values["exposed_s"] < values["step_s"]
    assert values["step_fraction"] == pytest.approx(values["exposed_s"] / values["step_s"])
    assert values["exposed_s"] == pytest.approx(np.mean(values["exposed_s_per_rank"]))
    assert len(values["exposed_s_per_rank"]) == 2
    assert all(kind["in_flight_s"] > 0 for kind in values["collectives"].values())


def test_no_timed_step_is_looked_at():
    assert min(PROFILED_STEPS) > COUNTED_STEP
    one, two = (Case("llama", layout).config() for layout in ({}, {"dp_replicate": 2}))
    for config, first in ((one, 3), (two, 5)):
        ranks = type("Two", (), {"world_size": config.layout.num_devices, "device": CPU, "rank": 0})()
        engine = type("Bare", (), {"config": config, "models": ()})()
        looks = Looks(ranks, engine, Path("nowhere"), 2)
        assert [n for n in range(10) if looks.is_timed(n)] == list(range(first + 2, 10))


# ----------------------------------------------------------------- exposed time, moment by moment

STEP = "step"


def test_waiting_inside_ddp_counts_and_what_backward_hides_does_not():
    spans = [
        Span(STEP, 0, 10), Span("backward", 0, 9), Span("aten::mm", 0, 4), Span("c10d::allreduce_", 1, 1), Span("aten::mm", 4.5, 6),
        Span("gloo:all_reduce", 1, 8, thread=7, is_async=True), Span("aten::add", 8, 9),
    ]  # fmt: skip
    assert find_exposed(spans, STEP, CPU).exposed_s == 2  # from 6 to 8; the pause at 4 saw no transfer end


def test_calls_and_their_waits_count_once_and_their_copies_not():
    spans = [
        Span(STEP, 0, 10), Span("_c10d_functional::all_reduce", 1, 4), Span("aten::clone", 1, 2), Span("c10d::allreduce_", 2, 4),
        Span("gloo:all_reduce", 3, 6, thread=7, is_async=True), Span("_c10d_functional::wait_tensor", 5, 7), Span("aten::mm", 7, 9),
    ]  # fmt: skip
    found = find_exposed(spans, STEP, CPU)
    assert found.exposed_s == 5  # 2 to 7: at 4 to 5 no op runs while the transfer is under way
    assert found.in_flight_s == {"all_reduce": 3}


def test_a_transfer_has_the_name_of_its_call():
    spans = [
        Span(STEP, 0, 9), Span("c10d::_reduce_scatter_base_", 0, 1), Span("c10d::allreduce_", 1, 2),
        Span("gloo:all_reduce", 0, 3, thread=7, is_async=True), Span("gloo:all_reduce", 2, 4, thread=8, is_async=True),
    ]  # fmt: skip
    assert find_exposed(spans, STEP, CPU).in_flight_s == {"reduce_scatter": 3, "all_reduce": 2}


names = st.sampled_from(["ncclDevKernel_AllReduce_Sum_f32_RING_LL", "ncclDevKernel_SendRecv", "sm90_gemm", "elementwise"])
kernels = st.lists(st.tuples(names, st.integers(0, 29), st.integers(1, 10)), max_size=25)


@given(kernels)
def test_exposed_on_a_gpu_is_what_a_count_of_moments_says(drawn):
    spans = [Span(name, start, start + length, thread=i % 3, is_on_device=True) for i, (name, start, length) in enumerate(drawn)]
    busy = np.zeros((2, 40), bool)
    for span in spans:
        busy[int("nccl" in span.name), int(span.start_s) : int(span.end_s)] = True
    assert find_exposed([Span(STEP, 0, 30), *spans], STEP, CUDA).exposed_s == (busy[1] & ~busy[0]).sum()


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), max_size=6))
def test_exposed_on_a_cpu_is_what_a_count_of_moments_says(lengths, flights):
    """Ops and pauses in turn; a pause counts where a transfer is under way, up to the last one that ends in it."""
    spans, pauses, now = [], [], 0
    for i, length in enumerate(lengths):
        if i % 2 == 0:
            spans.append(Span("aten::mm", now, now + length))
        else:
            pauses.append((now, now + length))
        now += length
    if now < 30:
        pauses.append((now, 30)) if not pauses or pauses[-1][1] != now else pauses.__setitem__(-1, (pauses[-1][0], 30))
    spans += [Span("gloo:all_reduce", start, start + length, thread=5, is_async=True) for start, length in flights]
    flying = {t for start, length in flights for t in range(start, start + length)}
    expected = 0
    for start, end in pauses:
        ends = [a + b for a, b in flights if start < a + b <= end]
        expected += sum(t in flying for t in range(start, max(ends, default=start)))
    assert find_exposed([Span(STEP, 0, 30), *spans], STEP, CPU).exposed_s == expected


# ----------------------------------------------------------------- TensorBoard


def read_curves(folder):
    """{tag: {steps done: value}}, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    assert not tags["tensors"]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags["scalars"]}


def expected_curves(records):
    steps = [r for r in records if r["kind"] == "step"]
    curves = {
        tag: {r["step"] + 1: np.float32(r[key]) for r in steps}
        for tag, key in {
            "loss/train": "loss", "speed/tokens_per_s": "tokens_per_s", "speed/step_s": "step_s", "optimizer/learning_rate": "learning_rate",
            "optimizer/gradient_norm": "norm",
        }.items()
    }  # fmt: skip
    curves |= {f"phases_s/{p}": {r["step"] + 1: np.float32(r["phases_s"][p]) for r in steps} for p in ("data", "forward", "backward", "optimizer")}
    for tag, key in {"loss/held_out": "loss", "loss/held_out_bits_per_byte": "bits_per_byte"}.items():
        curves[tag] = {r["step"]: np.float32(r[key]) for r in records if r["kind"] == "eval"}
    return curves


def test_curves_are_the_log(tmp_path):
    """Also after a run went back: it lost two checkpoints, and the steps after them are taken off."""
    torch.set_num_threads(1)
    plan, out = campaigns.write_plan(tmp_path, steps=12, every=4), tmp_path / "run"
    shutil.copytree(tmp_path / "text" / "train", tmp_path / "text" / "valid")
    changes = {"eval_every_steps": 3, "eval_tokens": 64}
    train(load_run_config(plan, changes), RunOptions(out))
    first = expected_curves(read_metrics(out / "metrics.jsonl"))
    assert sorted(first["loss/held_out"]) == [3, 6, 9, 12]
    assert read_curves(out / "tensorboard") == first
    for name in ("step-00000012", "step-00000008"):
        shutil.rmtree(out / "checkpoints" / name)
    train(load_run_config(plan, {**changes, "num_steps": 7}), RunOptions(out, resume=True))
    second = expected_curves(read_metrics(out / "metrics.jsonl"))
    assert sorted(second["loss/train"]) == list(range(1, 8))
    assert sorted(second["loss/held_out"]) == [3, 6, 7]
    assert read_curves(out / "tensorboard") == second
    assert len(list((out / "tensorboard").iterdir())) == 2


def test_a_rollback_within_a_process(tmp_path):
    """The curve of the steps that count, with the held-out loss at the very step that the run went back to."""
    curves, steps = Curves(tmp_path), [*range(6), *range(4, 8)]
    for i, step in enumerate(steps):
        if i == 6:
            curves.write({"kind": "eval", "step": 4, "loss": 1.5})
            curves.write({"kind": "eval", "step": 6, "loss": 9.0})
            curves.write({"kind": "rolled_back", "step": 4})
        curves.write({"kind": "step", "step": step, "loss": float(i), "norm": float("inf")})
    curves.close()
    assert read_curves(tmp_path)["loss/train"] == {1: 0, 2: 1, 3: 2, 4: 3, 5: 6, 6: 7, 7: 8, 8: 9}
    assert read_curves(tmp_path)["loss/held_out"] == {4: 1.5}


def test_a_run_without_tensorboard_says_so(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    summary = train(load_run_config(campaigns.write_plan(tmp_path, steps=2)), RunOptions(tmp_path / "run")).values
    assert summary["is_complete"]
    assert "pip install tensorboard" in capsys.readouterr().err
    assert not (tmp_path / "run" / "tensorboard").exists()


# ----------------------------------------------------------------- MFU and the words of a summary


def config_for(accelerator, **workload):
    plan = {
        "schema_version": 1, "model": MODELS["llama"], "workload": {"seq_len": 32, "global_batch_size": 8, "precision": "bf16", **workload},
        "cluster": {"accelerator": accelerator, "num_devices": 2}, "layout": {"dp_replicate": 2},
        "prediction": {"flops": {"model_per_token": 1e6}},
    }  # fmt: skip
    return make_run_config(build_request(plan))


def test_mfu_is_against_the_dense_peak_of_the_plan():
    found = find_utilization(config_for("h100-80gb-sxm"), 989.4e12, CUDA)
    assert found == Utilization(989.4e12, pytest.approx(2 * 989.4e12, rel=1e-3), "h100-80gb-sxm")
    assert found.mfu(0.5) == pytest.approx(1.0, rel=1e-3)
    assert find_utilization(config_for("h100-80gb-sxm"), 1e12, CPU) is None
    assert find_utilization(config_for("no-such-device"), 1e12, CUDA) is None
    assert find_utilization(config_for("h100-80gb-sxm", recompute="full"), 4e12, CUDA).model_flops == 1e6 * 8 * 32


def test_a_summary_tells_of_communication_and_mfu(tmp_path):
    records = [{"kind": "step", "loss": 2.0, "timed": True, "step_s": 0.5, "phases_s": {"forward": 0.2, "backward": 0.3}}] * 3
    per_rank = [
        {"step_s": 1.0, "exposed_s": exposed, "collectives": {"send": {"calls": calls, "bytes": 1000 * calls, "in_flight_s": 0.1}}}
        for exposed, calls in ((0.1, 3), (0.3, 4))
    ]
    facts = {"tokens_per_step": 256, "communication": communication_facts(per_rank), "is_complete": True}
    values = summarize(records, facts, Utilization(1e12, 4e12, "some-device")).values
    assert values["breakdown_s"] == {"forward": 0.2, "backward": 0.3, "communication": pytest.approx(0.2)}
    assert values["communication"]["collectives"] == {"send": {"calls": 4, "bytes": 4000, "in_flight_s": 0.1}}
    assert values["mfu"] == 0.5
    text = render_summary({**values, "peak_bytes": 1, "flops_per_step": 1e12, "num_steps": 3}, tmp_path)
    assert "20% of a step" in text
    assert f"send 4 x, {format_si(4000, 'B')}" in text
    assert "MFU 50.0% of" in text


if __name__ == "__main__":
    walk(sys.argv[1])
