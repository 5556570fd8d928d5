"""The dry run against real runs of the trainer (exact live bytes, FLOPs), against itself with nothing left out, and against counts by hand.

Run by torchrun, this file is the real run: one process group walks through many layouts and writes each rank's peak.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from planner.errors import InputError
from planner.files import to_yaml
from planner.graph import count_params
from reftrain.batches import open_batches
from reftrain.cli import app
from reftrain.config import RunConfig
from reftrain.dry_run import DryRun, dry_run
from reftrain.flop_count import CPU_FLASH
from reftrain.live_memory import LiveMemory
from reftrain.parallel import Ranks, make_ranks
from reftrain.steps import Engine, StepTimes
from tests.reftrain.parity_worker import MODELS, ROOT, Case

BF16, FULL, SELECTIVE = {"precision": "bf16"}, {"recompute": "full"}, {"recompute": "selective"}
ZERO_1, ZERO_2, ZERO_3 = ({"dp_shard": 2, "zero_stage": stage} for stage in (1, 2, 3))
TP_SP = {"tp": 2, "sequence_parallel": True}
INTERLEAVED = {"pp": 2, "schedule": "interleaved_1f1b", "num_virtual_stages": 2}
SHORT = {"global_batch_size": 2}
ALONE = [
    Case("llama", {"micro_batch_size": 2}), Case("gqa", workload={**BF16, **FULL, **SHORT}), Case("qk_norm", workload={**BF16, **SELECTIVE, **SHORT}),
    Case("bert", workload={**BF16, **SHORT}), Case("gpt2", workload={**SELECTIVE, **SHORT}),
    Case("windowed", workload={"attention_kernel": "unfused", **SHORT}), Case("neox", workload={**BF16, "loss_kernel": "unfused", **SHORT}),
    Case("latent_direct", workload={**FULL, "global_batch_size": 1}), Case("gqa", workload={"optimizer": "muon"}),
    Case("llama", workload={"optimizer": "sgd_momentum", "loss_kernel": "fused", **SHORT}), Case("gqa", workload={**BF16, "job": "lora", **SHORT}),
    Case("llama", workload={"job": "lora", "lora_targets": "query_value", "frozen_format": "nf4_double", **FULL, **SHORT}),
]  # fmt: skip
MIXTURES = [
    Case("mixtral", workload={**BF16, **SELECTIVE, **SHORT}), Case("qwen_moe", {"micro_batch_size": 2}, SHORT),
    Case("latent", workload={**BF16, **FULL, **SHORT}),
]  # fmt: skip
LONG = {**BF16, "seq_len": 256}
"""Gloo scatters a sum by way of a copy of all of it, which nccl does not make: activations have to be larger than that copy."""
TOGETHER = [
    *(Case("llama", layout, LONG) for layout in ({"dp_replicate": 2}, ZERO_1, ZERO_2, ZERO_3, {"tp": 2}, TP_SP, {"cp": 2}, {"pp": 2}, INTERLEAVED)),
    Case("gqa", {"pp": 2, "schedule": "zb_h1"}), Case("gpt2", {"pp": 2, "schedule": "gpipe"}, FULL), Case("gqa", ZERO_3, {**LONG, **SELECTIVE}),
    Case("gqa", TP_SP, {**BF16, **SELECTIVE}), Case("bert", {"tp": 2}), Case("latent", {**ZERO_3, "ep": 2}, LONG),
    Case("mixtral", {**TP_SP, "ep": 2}, LONG), Case("llama", {"dp_replicate": 2, "dp_shard": 2, "zero_stage": 3}, LONG),
    Case("llama", {**ZERO_3, **TP_SP}, {**LONG, **FULL}), Case("llama", {**ZERO_2, "pp": 2}, LONG), Case("gqa", {**ZERO_3, "cp": 2}, LONG),
    Case("llama", {**TP_SP, "pp": 2}, {**BF16, **FULL}), Case("qwen_moe", {**ZERO_3, **TP_SP, "ep": 4}, LONG),
]  # fmt: skip
LEFT_OUT = 16
"""Samples of a batch that is longer than what the dry run simulates."""


class RealRun:
    """The trainer on this rank, step by step."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config, self.engine, self.batches = config, Engine(config, ranks), open_batches(config, ranks, "synthetic")
        self.engine.narrow()

    def step(self, number: int) -> None:
        """One optimizer step."""
        microbatches = self.batches.microbatches(number * self.config.global_batch_size)
        _, norm = self.engine.agree(self.engine.forward_backward(microbatches, StepTimes()))
        self.engine.update(number, norm)

    def peak_bytes(self) -> int:
        """Largest live bytes of the second step, beside every tensor that the first one left."""
        self.step(0)
        gc.collect()
        with LiveMemory([thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and thing.device.type != "meta"]) as memory:
            self.step(1)
        return memory.peak_bytes

    def flops(self) -> int:
        """Of a step of their own: torch's counter holds tensors back."""
        with FlopCounterMode(display=False, custom_mapping=CPU_FLASH) as counter:
            self.step(2)
        return int(counter.get_total_flops())


def alone(case: Case) -> tuple[int, int]:
    """(peak bytes, FLOPs) of one process."""
    config = case.config()
    run = RealRun(config, Ranks(config.layout, torch.device("cpu")))
    return run.peak_bytes(), run.flops()


def same(a: DryRun, b: DryRun) -> bool:
    """Whether two dry runs found the same peak, FLOPs and traffic."""
    keys = ("peak_bytes", "breakdown_bytes", "flops")
    traffic = [[sorted(map(str, stage.traffic)) for stage in run.stages] for run in (a, b)]
    return traffic[0] == traffic[1] and all(getattr(x, key) == getattr(y, key) for x, y in zip(a.stages, b.stages, strict=True) for key in keys)


# ---------------------------------------------------------------- against real runs


@pytest.mark.parametrize("case", ALONE, ids=lambda case: case.name)
def test_one_process_holds_exactly_what_the_dry_run_says(case: Case) -> None:
    found, (peak, flops) = dry_run(case.config()), alone(case)
    assert found.stages[0].total_flops == flops
    assert abs(found.peak_bytes / peak - 1) < 1e-3, (found.peak_bytes, peak)


@pytest.mark.parametrize("case", MIXTURES, ids=lambda case: case.name)
def test_a_mixture_holds_within_1_percent_what_even_routing_says(case: Case) -> None:
    found, (peak, _) = dry_run(case.config()), alone(case)
    assert abs(found.peak_bytes / peak - 1) < 1e-2, (found.peak_bytes, peak)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.filterwarnings("ignore:.*broadcast_buffers.*:FutureWarning")
def test_processes_hold_what_the_dry_run_says(count: int, tmp_path: Path) -> None:
    cases = [case for case in TOGETHER if case.num_processes == count]
    plan, out = tmp_path / "cases.json", tmp_path / "peaks.jsonl"
    plan.write_text(json.dumps([asdict(case) for case in cases]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m", __name__, str(plan), str(out)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    wrong = []
    for case, line in zip(cases, out.read_text().splitlines(), strict=True):
        peaks, config = json.loads(line), case.config()
        found, stage_size = dry_run(config, all_microbatches=True), count // config.layout.pp
        # Real routers send some ranks more tokens than others: even routing is their mean. Else ranks are equal, but for a message that
        # one of them may still hold while it computes.
        is_even = config.layout.ep == 1
        for stage in found.stages:
            of_stage = peaks[stage.rank : stage.rank + stage_size]
            error = stage.peak_bytes / (statistics.median(of_stage) if is_even else statistics.fmean(of_stage)) - 1
            print(f"{case.name} stage {stage.stage}: {stage.peak_bytes:,} against {of_stage}, {error:+.3%}")  # noqa: T201
            if abs(error) >= (0.01 if is_even else 0.03):
                wrong.append(f"{case.name} stage {stage.stage}: {error:+.2%}")
    assert not wrong, "\n".join(wrong)


# ---------------------------------------------------------------- against itself


@pytest.mark.parametrize("layout", [ZERO_3, {"pp": 2}, INTERLEAVED], ids=str)
def test_microbatches_that_are_left_out_change_nothing(layout: dict[str, Any]) -> None:
    config = Case("gqa", layout, {**BF16, "global_batch_size": LEFT_OUT}).config()
    some, every = dry_run(config, stages=[0]), dry_run(config, stages=[0], all_microbatches=True)
    assert some.num_simulated_microbatches < every.num_simulated_microbatches == config.num_microbatches
    assert same(some, every)


def test_a_second_dry_run_finds_the_same_and_nothing_of_the_first_is_left() -> None:
    config = Case("gqa", {**ZERO_3, "pp": 2}, {"global_batch_size": 4}).config()
    first = dry_run(config, stages=[1])
    gc.collect()
    before = sum(type(thing) is FakeTensor for thing in gc.get_objects())
    assert same(first, dry_run(config, stages=[1]))
    gc.collect()
    assert not dist.is_initialized()
    assert sum(type(thing) is FakeTensor for thing in gc.get_objects()) <= before


def test_the_parts_add_up_to_the_peak() -> None:
    stage = dry_run(Case("latent", {**ZERO_3, **TP_SP, "ep": 2}, {**BF16, **SELECTIVE, "global_batch_size": 2}).config()).stages[0]
    assert sum(stage.breakdown_bytes.values()) == stage.peak_bytes
    assert sum(sum(sizes.values()) for sizes in stage.modules_bytes.values()) == stage.peak_bytes
    assert max(map(sum, zip(*stage.timeline["live_bytes"].values(), strict=True))) == stage.peak_bytes
    assert max(stage.phase_peak_bytes.values()) == stage.peak_bytes
    assert all(stage.breakdown_bytes[name] <= highest for name, highest in stage.highest_bytes.items())
    assert json.loads(json.dumps(stage.to_dict()))["total_flops"] == stage.total_flops


# ---------------------------------------------------------------- against counts by hand


def test_states_and_gathers_of_a_thousand_ranks_are_what_their_number_says() -> None:
    """ZeRO-3 over 256 ranks with 4-way tensor parallelism, one microbatch: sizes that divide evenly."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 1024}
    config = Case("llama", {"dp_shard": 256, "zero_stage": 3, "tp": 4, "sequence_parallel": True}, {**BF16, "global_batch_size": 256}).config()
    config = replace(config, model=config.model.model_copy(update={**sizes, "head_dim": 128}))
    stage = dry_run(config).stages[0]
    total = int(count_params(config.model)["total"])
    vectors = (2 * config.model.num_layers + 1) * 1024  # whole on every tp rank
    matrices = total - vectors
    assert stage.breakdown_bytes["weights"] == 4 * (matrices // 1024 + vectors // 256)
    assert 0 <= stage.breakdown_bytes["optimizer"] - 2 * stage.breakdown_bytes["weights"] <= 4 * 64  # and AdamW's step counts
    moved = {(t["collective"], t["axis"]): t for t in stage.traffic}
    shard = matrices // 1024 + vectors // 256
    ends = 2 * 1024 * 1024 // 1024  # the embedding and the head stay gathered or are gathered once in the last microbatch
    assert 2 * (2 * shard - ends - 1024) <= moved["all_gather", "dp_shard"]["input_bytes"] <= 2 * 2 * shard
    assert moved["reduce_scatter", "dp_shard"]["output_bytes"] == 4 * shard
    assert moved["reduce_scatter", "dp_shard"]["input_bytes"] == 256 * 4 * shard


def test_recomputation_trades_activations_for_work() -> None:
    stages = {
        policy: dry_run(Case("llama", workload={**BF16, **SHORT, "recompute": policy}).config()).stages[0] for policy in ("none", "selective", "full")
    }
    kept = {policy: stage.highest_bytes["activations"] for policy, stage in stages.items()}
    assert kept["none"] > kept["selective"] > kept["full"]
    assert stages["none"].total_flops == stages["selective"].total_flops < stages["full"].total_flops
    # full: each block's input, [1, 32, 32] in bf16, beside what the ends keep
    assert kept["full"] >= 4 * 32 * 32 * 2
    assert stages["none"].highest_bytes["recomputed_activations"] == 0 < stages["full"].highest_bytes["recomputed_activations"]


@pytest.mark.parametrize("layout", [{"dp_shard": 2, "zero_stage": 3, "ep": 2}, {"dp_replicate": 2, "ep": 2}])
def test_experts_of_their_own_shards_are_recomputed_too(layout: dict[str, Any]) -> None:
    none, selective, full = (
        dry_run(Case("mixtral", layout, {**BF16, "seq_len": 256, "recompute": policy}).config()) for policy in ("none", "selective", "full")
    )
    assert full.peak_bytes < selective.peak_bytes < none.peak_bytes


def test_rounding_is_an_allocators() -> None:
    config = Case("llama", workload={"global_batch_size": 1}).config()
    exact, rounded = dry_run(config), dry_run(config, rounding_bytes=512)
    assert all(size % 512 == 0 for size in rounded.stages[0].breakdown_bytes.values())
    assert exact.peak_bytes < rounded.peak_bytes


# ---------------------------------------------------------------- refusals and the command line


def test_stages_that_are_not_there_are_refused() -> None:
    with pytest.raises(InputError, match="pipeline stages from 0 to 1"):
        dry_run(Case("llama", {"pp": 2}).config(), stages=[2])


def test_layouts_that_the_trainer_cannot_run_are_refused() -> None:
    with pytest.raises(InputError, match="zb_h1"):
        dry_run(Case("llama", {"pp": 2, "schedule": "zb_h1"}, SELECTIVE).config())


def test_the_command_prints_text_and_json(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    request = {"schema_version": 1, "model": MODELS["llama"], "workload": {"seq_len": 32, "global_batch_size": 4},
               "cluster": {"accelerator": "h100", "num_devices": 4}, "layout": {**ZERO_3, "pp": 2, "micro_batch_size": 1}}  # fmt: skip
    file.write_text(to_yaml(request))
    text = CliRunner().invoke(app, ["dry-run", str(file)]).stdout
    for part in ("stage 0 (rank 0)", "stage 1 (rank 2)", "reduce_scatter over dp_shard"):
        assert part in text
    values = json.loads(CliRunner().invoke(app, ["dry-run", str(file), "--stage", "1", "--json"]).stdout)
    assert [stage["stage"] for stage in values["stages"]] == [1]
    assert values["peak_bytes"] == sum(values["stages"][0]["breakdown_bytes"].values())


def main(plan: str, out: str) -> None:
    """One rank of the real run."""
    dist.init_process_group("gloo")
    for values in json.loads(Path(plan).read_text()):
        config = Case(**values).config()
        peak = RealRun(config, make_ranks(config.layout, torch.device("cpu"), dist.get_rank())).peak_bytes()
        peaks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(peaks, peak)
        if dist.get_rank() == 0:
            with open(out, "a") as file:
                file.write(json.dumps(peaks) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
