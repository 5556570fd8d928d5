"""Every layout trains as one process does: losses and gradient norms, step by step; and a checkpoint of one layout goes on in any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from reftrain.checkpoint import CheckpointStore
from reftrain.parallel import Ranks
from reftrain.steps import Engine
from tests.reftrain.parity_worker import Case, alone, furthest, run, together

FP32_TOLERANCE, BF16_TOLERANCE = 1e-5, 1e-2
Layout = dict[str, Any]

ZERO_1, ZERO_2, ZERO_3 = ({"dp_shard": 2, "zero_stage": stage} for stage in (1, 2, 3))
DDP, TP, TP_SP, CP = {"dp_replicate": 2}, {"tp": 2}, {"tp": 2, "sequence_parallel": True}, {"cp": 2}
PIPELINES = [{"pp": 2, "schedule": schedule} for schedule in ("gpipe", "1f1b", "zb_h1")]
PIPELINES.append({"pp": 2, "schedule": "interleaved_1f1b", "num_virtual_stages": 2})
HSDP = {"dp_replicate": 2, "dp_shard": 2, "zero_stage": 3}
TWO = [DDP, ZERO_1, ZERO_2, ZERO_3, TP, TP_SP, CP, *PIPELINES]
FOUR = [
    HSDP, {"dp_replicate": 2, **TP}, {**ZERO_3, **TP_SP}, {**ZERO_1, **CP}, {**ZERO_3, **CP}, {**ZERO_2, "pp": 2}, {**ZERO_3, "pp": 2}, {**TP, **CP},
    {**TP_SP, **CP}, {**TP, "pp": 2}, {**TP_SP, "pp": 2, "schedule": "zb_h1"}, {**CP, "pp": 2},
    {"pp": 4}, {"tp": 4}, {"cp": 4}, {"dp_shard": 4, "zero_stage": 3},
]  # fmt: skip
EIGHT = [
    {**ZERO_3, **TP_SP, "pp": 2}, {**ZERO_2, **CP, "pp": 2}, {**TP_SP, **CP, "pp": 2}, {**ZERO_3, **TP_SP, **CP}, {**HSDP, **TP_SP},
    {**ZERO_2, **TP, "pp": 2, "schedule": "interleaved_1f1b", "num_virtual_stages": 2},
]  # fmt: skip
EXPERTS = [{**ZERO_3, "ep": 2}, {**ZERO_1, "ep": 2}, {**DDP, "ep": 2}, {**CP, "ep": 2}, {**TP_SP, "ep": 2}]
EXPERTS_4 = [
    {"dp_shard": 4, "zero_stage": 3, "ep": 2}, {"dp_shard": 4, "zero_stage": 3, "ep": 4}, {**HSDP, "ep": 2},
    {**ZERO_3, **TP_SP, "ep": 4}, {**ZERO_3, **TP_SP, "ep": 2},
    {**ZERO_2, "pp": 2, "ep": 2}, {**ZERO_3, **CP, "ep": 2}, {**ZERO_3, **CP, "ep": 4}, {**TP_SP, "pp": 2, "ep": 2},
]  # fmt: skip
DENSE = ("gqa", "windowed", "qk_norm", "gpt2", "neox", "latent_direct")
MIXTURES = ("mixtral", "qwen_moe", "latent")


def cases(models: tuple[str, ...], layouts: list[Layout], num_steps: int, **changes: Any) -> list[Case]:
    return [Case(model, layout, num_steps=num_steps, **changes) for model in models for layout in layouts]


def check(found: list[Case], tolerance: float = FP32_TOLERANCE, norm_tolerance: float | None = None) -> None:
    """All cases take the same number of processes. Norms see wrongly scaled gradients, which AdamW's losses do not."""
    wrong = []
    for case, curve in zip(found, together(found, timeout_s=60 + 30 * len(found)), strict=True):
        if isinstance(curve, str):
            wrong.append(f"{case.name}: {curve}")
            continue
        reference = alone(case)
        loss = furthest(curve, reference)
        norm = max(abs(a / b - 1) for (_, a), (_, b) in zip(curve, reference, strict=True))
        print(f"{case.name}: loss {loss:.1e}, norm {norm:.1e}, {reference[0][0]:.3f} -> {reference[-1][0]:.3f}")  # noqa: T201
        if not (loss < tolerance and norm < (norm_tolerance or 10 * tolerance)):
            wrong.append(f"{case.name}: loss {loss:.1e}, norm {norm:.1e}")
    assert not wrong, "\n".join(wrong)


def test_two_processes_train_as_one() -> None:
    few = 3
    plain = cases(("llama",), [ZERO_1, TP_SP, PIPELINES[3]], few)
    check(
        [*plain, *cases(("gpt2",), [DDP, PIPELINES[1]], few), *cases(("bert",), [TP], few), *cases(("latent",), [EXPERTS[0], CP], few),
         *cases(("qwen_moe",), [EXPERTS[4]], few)]
    )  # fmt: skip


def test_four_processes_train_as_one() -> None:
    """With fewer experts than ranks FSDP parts each expert."""
    dense, latent = cases(("llama",), [{**ZERO_3, **TP_SP}], 3), cases(("latent",), [{**ZERO_2, "pp": 2, "ep": 2}], 3)
    dense += cases(("llama",), [{**ZERO_3, "pp": 2, "schedule": "zb_h1"}], 3)
    check([*dense, *latent, *cases(("three_experts",), [{"dp_shard": 4, "zero_stage": 3}, {**ZERO_3, **TP}], 3)])


@pytest.mark.slow
@pytest.mark.parametrize("layouts", [TWO, FOUR, EIGHT], ids=["2", "4", "8"])
def test_every_layout_trains_as_one_process_over_20_steps(layouts: list[Layout]) -> None:
    check(cases(("llama",), layouts, 20))


@pytest.mark.slow
@pytest.mark.parametrize("model", [*DENSE, *MIXTURES])
def test_every_kind_of_model_in_every_layout_of_two(model: str) -> None:
    check(cases((model,), TWO, 8))


@pytest.mark.slow
def test_an_encoder_in_every_layout_that_it_may_have() -> None:
    check(cases(("bert",), [layout for layout in TWO if "cp" not in layout], 8))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", "gqa"])
def test_tied_tables_in_every_layout_of_four(model: str) -> None:
    check(cases((model,), FOUR, 8))


@pytest.mark.slow
@pytest.mark.parametrize("model", MIXTURES)
@pytest.mark.parametrize("layouts", [EXPERTS, EXPERTS_4], ids=["2", "4"])
def test_experts_in_every_layout(model: str, layouts: list[Layout]) -> None:
    """From a seed at which no token likes two experts as well as fp32 can tell: another order of sums would send it elsewhere."""
    check(cases((model,), layouts, 8, training={"seed": 7}))


@pytest.mark.slow
def test_half_precision_in_every_layout_of_two() -> None:
    check(cases(("llama",), TWO, 20, workload={"precision": "bf16"}), BF16_TOLERANCE, 0.2)
    check(cases(("llama",), [DDP, ZERO_3, TP_SP, CP], 20, workload={"precision": "fp16"}), BF16_TOLERANCE, 0.2)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["selective", "full"])
def test_recomputation_in_every_layout_of_two(policy: str) -> None:
    layouts = [layout for layout in TWO if layout.get("schedule") != "zb_h1"]
    check([*cases(("llama",), layouts, 4, workload={"recompute": policy}), *cases(("latent",), EXPERTS, 4, workload={"recompute": policy})])


@pytest.mark.slow
def test_every_optimizer() -> None:
    plain = [
        case
        for name in ("sgd", "sgd_momentum")
        for case in cases(("llama",), [DDP, ZERO_3, TP_SP, CP, PIPELINES[1]], 8, workload={"optimizer": name})
    ]
    whole = [case for name in ("muon", "adafactor") for case in cases(("llama",), [DDP, PIPELINES[1]], 8, workload={"optimizer": name})]
    check(plain)
    check(whole, 1e-4, 1e-3)  # Muon's Newton-Schulz iteration in bf16 enlarges the last bits


@pytest.mark.slow
def test_compiled_blocks_change_nothing() -> None:
    plain, compiled = (alone(Case("llama", training={"compile": on}, num_steps=4)) for on in (False, True))
    assert furthest(compiled, plain) < FP32_TOLERANCE


def stored(folder: Path, case: Case) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, by name."""
    engine = Engine(case.alone.config(), Ranks(case.alone.config().layout, torch.device("cpu")))
    state, store = engine.state(), CheckpointStore(folder)
    store.load(str(store.newest()), state)
    return {f"{kind}.{name}": value for kind, values in state.items() for name, value in values.items() if isinstance(value, torch.Tensor)}


def check_moves(model: str, source: Layout, targets: list[Layout], folder: Path, **changes: Any) -> None:
    """A checkpoint of `source` goes on in each of `targets`: same bits after loading and saving again, same losses afterwards."""
    first = Case(model, source, num_steps=4, save=str(folder / "first"), **changes)
    if first.num_processes == 1:
        run(first, Ranks(first.config().layout, torch.device("cpu")))
    else:
        assert not isinstance(together([first])[0], str)
    before = stored(folder / "first", first)
    expected = alone(Case(model, num_steps=8, **changes))[4:]
    again = [Case(model, t, num_steps=0, load=str(folder / "first"), save=str(folder / f"again-{i}"), **changes) for i, t in enumerate(targets)]
    on = [Case(model, t, num_steps=4, load=str(folder / "first"), **changes) for t in targets]
    for case in [*again, *on]:
        assert case.num_processes == again[0].num_processes
    curves = together([*again, *on])
    for i, case in enumerate(on):
        assert not isinstance(curves[i], str), f"{case.name}: {curves[i]}"
        after = stored(folder / f"again-{i}", case)
        assert before.keys() == after.keys()
        assert [name for name in before if not torch.equal(before[name], after[name])] == [], case.name
        curve = curves[len(on) + i]
        assert not isinstance(curve, str), f"{case.name}: {curve}"
        assert furthest(curve, expected) < FP32_TOLERANCE, case.name


def test_a_checkpoint_of_one_process_goes_on_in_other_layouts(tmp_path: Path) -> None:
    check_moves("gpt2", {}, [PIPELINES[3], ZERO_3], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "source", "targets"),
    [
        ("gpt2", PIPELINES[1], [*TWO, ZERO_3]),
        ("gqa", TP_SP, TWO),
        ("latent", EXPERTS[0], [*EXPERTS, TP, PIPELINES[1]]),
        ("mixtral", PIPELINES[0], EXPERTS),
        ("llama", {**ZERO_3, **TP_SP}, TWO),
        ("qwen_moe", {}, EXPERTS_4),
        ("three_experts", {}, [ZERO_3, ZERO_1, TP]),
        ("bert", TP, [PIPELINES[1], ZERO_3]),
    ],
)
def test_a_checkpoint_goes_on_in_every_layout(model: str, source: Layout, targets: list[Layout], tmp_path: Path) -> None:
    check_moves(model, source, targets, tmp_path)


def test_saving_at_the_start_changes_nothing() -> None:
    """torch fills empty optimizer states by a step, which must not count as one."""
    case = Case("llama", num_steps=4)
    config = case.config()
    engine = Engine(config, Ranks(config.layout, torch.device("cpu")))
    engine.state()
    assert all(float(state["step"]) == 0 for optimizer in engine.optimizers for state in optimizer.state.values())
