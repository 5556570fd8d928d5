"""Fine-tuning: what is trained and on what; adapters against the base model; packing against padding; the best checkpoint."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from planner.architectures import model_ops
from planner.cli import run_app
from planner.errors import InputError
from planner.files import read_yaml, to_yaml
from planner.graph import make_numerics, sum_params, whole_model
from planner.plan import build_request
from planner.precision import get_precision
from planner.stack import load_stack
from reftrain.cli import app
from reftrain.config import RunConfig, load_run_config, make_run_config
from reftrain.dry_run import dry_run
from reftrain.example_batches import ExampleBatches, open_examples
from reftrain.examples import Example, lay_out, read_examples, split_off
from reftrain.export_weights import export_run, restored_model
from reftrain.hf_weights import load_weights
from reftrain.kernels import IGNORED, linear_cross_entropy
from reftrain.lora import adapted_layers, merged, round_frozen, without_adapters
from reftrain.model import Transformer
from reftrain.nf4 import LEVELS, NarrowWeight
from reftrain.parallel import Ranks
from reftrain.runnable import check_runnable
from reftrain.start_weights import load_checkpoint, load_start
from reftrain.steps import Engine, StepTimes
from reftrain.tokenizer import Tokenizer, train_tokenizer
from reftrain.train import RunOptions, train
from tests.reftrain.parity_worker import MODELS, Case, alone, furthest, together

CPU = torch.device("cpu")
LORA = {"job": "lora", "lora_rank": 4}
QUESTIONS = [{"question": f"What is {a} plus {b}?", "answer": str(a + b)} for a in range(9) for b in range(9)]
MODEL = {**MODELS["gqa"], "vocab_size": 384, "max_position_embeddings": 96}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions in a file, and a tokenizer."""
    made = tmp_path_factory.mktemp("finetune")
    (made / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n")
    train_tokenizer([json.dumps(q) for q in QUESTIONS], vocab_size=300).save(made / "tokenizer.json")
    return made


def config_of(model: str | dict[str, Any] = "gqa", workload: dict[str, Any] | None = None, layout: Any = None, **training: Any) -> RunConfig:
    request = {
        "schema_version": 1, "model": MODELS[model] if isinstance(model, str) else model,
        "workload": {"seq_len": 48, "global_batch_size": 8, "precision": "fp32", **(workload or {})},
        "cluster": {"accelerator": "cpu-local", "num_devices": math.prod((layout or {}).get(key, 1) for key in ("dp_replicate", "dp_shard", "tp"))},
        "layout": {"micro_batch_size": 2, **(layout or {})},
        "training": {"num_steps": 6, "warmup_steps": 0, "learning_rate": 3e-3, "data": "synthetic", **training},
    }  # fmt: skip
    return make_run_config(build_request(request))


def on_questions(folder: Path, workload: dict[str, Any] | None = None, **training: Any) -> RunConfig:
    return config_of(MODEL, workload, data=str(folder / "questions.jsonl"), tokenizer=str(folder / "tokenizer.json"), **training)


def run_command(arguments: list[str]) -> int:
    with patch.object(sys, "argv", ["reftrain", *arguments]):
        return run_app(app, "reftrain")


def engine_of(config: RunConfig) -> Engine:
    return Engine(config, Ranks(config.layout, CPU))


def shaken(model: Transformer) -> None:
    """Adapters that add something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("adapter.b"):
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))


def tokens_of(config: RunConfig) -> Tensor:
    return torch.randint(0, config.model.vocab_size, (2, config.seq_len), generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("model", ["gqa", "gpt2", "neox", "latent_direct"])
def test_new_adapters_change_nothing_and_merged_ones_are_plain_weights(model: str) -> None:
    base, adapted = (engine_of(config_of(model, workload)).models[0] for workload in ({}, {**LORA, "lora_targets": "attention"}))
    tokens, plain = tokens_of(config_of(model)), {n: p.detach().clone() for n, p in base.named_parameters()}
    torch.testing.assert_close(adapted.logits(tokens), base.logits(tokens), rtol=0, atol=0)
    shaken(adapted)
    state = merged(dict(adapted.state_dict()), scale=2.0)
    assert set(plain) <= set(state), "merging leaves a model's own names"
    base.load_state_dict(state)
    moved = adapted.logits(tokens)
    assert not torch.allclose(moved, adapted.logits(tokens.flip(1)))
    torch.testing.assert_close(base.logits(tokens), moved, rtol=1e-4, atol=1e-4)
    assert any(not torch.equal(p, plain[n]) for n, p in base.named_parameters())


@pytest.mark.parametrize(
    ("targets", "per_block"),
    [("all", ("q", "k", "v", "out", "up", "gate", "down")), ("attention", ("q", "k", "v", "out")), ("query_value", ("q", "v"))],
)
def test_targets_are_those_that_the_planner_counts(targets: str, per_block: tuple[str, ...]) -> None:

    config = config_of("llama", {**LORA, "lora_targets": targets})
    model = engine_of(config).models[0]
    names = [name.split(".")[-1] for name, _ in adapted_layers(model, targets)]
    assert sorted(names) == sorted(per_block * config.model.num_layers)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    numerics = make_numerics(config.workload, load_stack("reftrain"), get_precision("fp32"))
    priced = whole_model(model_ops(config.model), 1, numerics)
    assert trained == sum(n * float(c.params - c.frozen_params) for _, n, c in priced)
    assert sum_params(priced)["total"] == sum(p.numel() for p in model.parameters())


def test_training_adapters_changes_adapters_alone() -> None:
    config = config_of("llama", LORA)
    engine = engine_of(config)
    before = {n: p.detach().clone() for n, p in engine.models[0].named_parameters()}
    for step in range(2):
        tokens = tokens_of(config)
        loss = engine.forward_backward([(tokens, tokens.roll(-1, 1))], StepTimes())
        engine.update(step, engine.agree(loss)[1])
    changed = {n for n, p in engine.models[0].named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if not without_adapters(n)}
    assert set(engine.state()["model"]) == changed, "a checkpoint holds what is trained"


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_gives_adapters_the_same_gradients(recompute: str) -> None:
    grads = []
    for policy in ("none", recompute):
        config = config_of("llama", {**LORA, "recompute": policy})
        engine = engine_of(config)
        shaken(engine.models[0])
        tokens = tokens_of(config)
        engine.forward_backward([(tokens, tokens.roll(-1, 1))], StepTimes())
        grads.append({n: p.grad for n, p in engine.models[0].named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name])


def test_a_frozen_head_passes_the_same_gradient_on() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((12, 8), (20, 8)))
    targets = torch.arange(12)
    found = []
    for is_trained in (True, False):
        hidden, table = x.clone().requires_grad_(), weight.clone().requires_grad_(is_trained)
        linear_cross_entropy(hidden, table, None, targets, num_chunks=3).backward()
        found.append(hidden.grad)
        assert (table.grad is not None) == is_trained
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_dropout_of_adapters_is_for_training() -> None:
    model = engine_of(config_of("llama", {**LORA, "lora_dropout": 0.5})).models[0]
    shaken(model)
    tokens = tokens_of(config_of("llama"))
    assert not torch.equal(model.logits(tokens), model.logits(tokens))
    model.eval()
    assert torch.equal(model.logits(tokens), model.logits(tokens))


# ---------------------------------------------------------------- four bits


def test_nf4_takes_the_nearest_level_of_each_block() -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    whole = NarrowWeight(weight, is_double=False).whole(torch.float32)
    blocks = weight.flatten().view(-1, 64)
    scaled = blocks / blocks.abs().amax(dim=1, keepdim=True)
    nearest = (scaled.unsqueeze(-1) - torch.tensor(LEVELS)).abs().argmin(dim=-1)
    torch.testing.assert_close(whole.flatten().view(-1, 64), torch.tensor(LEVELS)[nearest] * blocks.abs().amax(dim=1, keepdim=True))
    double = NarrowWeight(weight, is_double=True)
    error = [float((w - weight).norm() / weight.norm()) for w in (whole, double.whole(torch.float32))]
    assert error[0] < 0.1
    assert error[1] < 1.1 * error[0]
    assert double.codes.numel() == weight.numel() // 2 < double.scales.numel() * 64
    assert double.scales.dtype == torch.int8


@pytest.mark.parametrize("frozen_format", ["nf4", "nf4_double"])
def test_a_model_in_four_bits_has_the_gradients_of_its_rounded_weights(frozen_format: str) -> None:
    config = config_of("llama", {**LORA, "frozen_format": frozen_format})
    narrow, rounded = engine_of(config), engine_of(config)

    narrow.narrow()
    narrow.narrow()
    round_frozen(rounded.models[0], frozen_format)
    tokens = tokens_of(config)
    losses = []
    for engine in (narrow, rounded):
        shaken(engine.models[0])
        losses.append(engine.forward_backward([(tokens, tokens.roll(-1, 1))], StepTimes()))
    torch.testing.assert_close(losses[0], losses[1])
    expected = {n: p.grad for n, p in rounded.models[0].named_parameters() if p.grad is not None}
    assert len(expected) == 2 * 7 * config.model.num_layers
    for name, parameter in narrow.models[0].named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name])


# ---------------------------------------------------------------- examples


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "a"}', "response = None"),
        ('{"prompt": "a", "response": " "}', "not blank"),
        ('{"question": 1, "answer": "b"}', "must be text"),
        ('{"source": "a", "target": "b", "targget": "c"}', "did you mean target"),
        ('{"text": "a"}', "prompt and response or source and target or question and answer"),
        ('["a"]', "must be a JSON object"),
        ("{", "must be JSON"),
        ("", "holds no examples"),
    ],
)
def test_wrong_examples_are_named(tmp_path: Path, line: str, expected: str) -> None:
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=expected):
        read_examples(tmp_path / "x.jsonl")


def test_the_shipped_examples_can_be_read() -> None:
    data = Path(__file__).resolve().parents[2] / "data" / "finetune"
    questions, pairs = read_examples(data / "questions.jsonl"), read_examples(data / "translation.jsonl")
    assert questions[0] == Example("Question: What is the highest point in Algeria?\nAnswer:", " Tahat")
    assert (len(questions), len(pairs)) == (771, 1000)
    kept, held_out = split_off([*questions, *questions], 0.1)
    assert not {e.prompt for e in kept} & {e.prompt for e in held_out}


def test_rows_hold_every_example_once_and_ask_for_responses_alone(folder: Path) -> None:
    tokenizer, examples = Tokenizer.load(folder), read_examples(folder / "questions.jsonl")
    packed, padded = (lay_out(examples, tokenizer, 48, is_packed=is_packed) for is_packed in (True, False))
    assert padded.num_rows == len(examples) > 1.5 * packed.num_rows
    for rows in (packed, padded):
        said = []
        for row in range(rows.num_rows):
            for document in range(rows.documents[row].max() + 1):
                place = rows.documents[row] == document
                asked = rows.targets[row][place]
                assert (asked[: np.argmax(asked != IGNORED)] == IGNORED).all(), "a prompt, and then its response"
                assert asked[-1] == tokenizer.end_of_text_id == rows.tokens[row][place][0]
                prompt = rows.tokens[row][place][1 : np.argmax(asked != IGNORED) + 1]
                said.append(Example(tokenizer.decode(prompt), tokenizer.decode(asked[asked != IGNORED][:-1])))
        assert sorted(said, key=repr) == sorted(examples, key=repr)
        assert (rows.targets[-1] == IGNORED).all()
    with pytest.raises(InputError, match="shorter than every example"):
        lay_out(examples, tokenizer, 4, is_packed=True)


def batches_of(config: RunConfig, folder: Path, rank: int = 0) -> ExampleBatches:
    tokenizer, examples = Tokenizer.load(folder), read_examples(folder / "questions.jsonl")
    train_rows, valid_rows = (lay_out(part, tokenizer, config.seq_len, is_packed=config.training.packing) for part in (examples[:60], examples[60:]))
    return ExampleBatches(config, Ranks(config.layout, CPU, rank), train_rows, valid_rows)


def test_prompts_have_no_part_in_loss_and_gradients(folder: Path) -> None:
    """Against a loss written out by hand: all responses' tokens of the step count the same, wherever they stand."""
    config = on_questions(folder, packing=False)
    engine, batches = engine_of(config), batches_of(config, folder)
    model, microbatches = engine.models[0], batches.microbatches(0)
    loss = engine.forward_backward(microbatches, StepTimes(), batches.weights(0))
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    engine.clear()
    total, count = torch.zeros(()), 0
    for tokens, targets in microbatches:
        for row, wanted in zip(tokens, targets, strict=True):
            places = [i for i in range(len(row)) if wanted[i] != IGNORED]
            logits = model.logits(row.unsqueeze(0))
            total = total + functional.cross_entropy(logits[0, places], wanted[places], reduction="sum")
            count += len(places)
    (total / count).backward()
    assert len(set(batches.weights(0))) > 1, "microbatches that count differently"
    torch.testing.assert_close(loss, (total / count).detach())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", ["gqa", "gpt2", "windowed"])
@pytest.mark.parametrize("attention_kernel", ["flash", "unfused"])
def test_packed_examples_have_the_losses_that_they_have_alone(folder: Path, model: str, attention_kernel: str) -> None:
    sizes = {"vocab_size": 384, **({"n_positions": 96} if model == "gpt2" else {"max_position_embeddings": 96})}
    losses, grads = [], []
    for packing in (True, False):
        config = config_of({**MODELS[model], **sizes}, {"attention_kernel": attention_kernel}, packing=packing)
        engine, batches = engine_of(config), batches_of(config, folder)
        every = list(batches.validation())
        losses.append(sum(engine.evaluate(microbatches, weights) for microbatches, weights in every) / len(every))
        for microbatches, weights in every:
            engine.forward_backward(microbatches, StepTimes(), [weight / len(every) for weight in weights])
        grads.append(torch.cat([p.grad.flatten() for p in engine.models[0].parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-5)


def test_ranks_share_a_step_and_weigh_it_as_one_does(folder: Path) -> None:
    one = batches_of(on_questions(folder), folder)
    config = replace(one.config, layout=one.config.layout.model_copy(update={"dp_replicate": 2}))
    two = [batches_of(config, folder, rank) for rank in range(2)]

    def weighed(batches: ExampleBatches, position: int) -> list[tuple[list[int], float]]:
        pairs = zip(batches.microbatches(position), batches.weights(position), strict=True)
        return sorted((tokens.flatten().tolist(), weight) for (tokens, *_), weight in pairs)

    for position in (0, 8, 72):
        expected = weighed(one, position)
        found = sorted((tokens, weight / 2) for rank in two for tokens, weight in weighed(rank, position))
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
        assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])
        assert sum(weight for _, weight in expected) == pytest.approx(1)
    epoch = [tuple(row.tolist()) for p in range(0, one.train.num_rows - 7, 8) for tokens, *_ in one.microbatches(p) for row in tokens]
    assert len(set(epoch)) == len(epoch), "no row comes twice in an epoch"


# ---------------------------------------------------------------- runs


def test_two_processes_train_adapters_as_one() -> None:
    layouts: list[dict[str, Any]] = [
        {"dp_replicate": 2}, {"dp_shard": 2, "zero_stage": 3}, {"tp": 2, "sequence_parallel": True}, {"dp_shard": 2, "zero_stage": 1},
    ]  # fmt: skip
    found = [Case("gqa", layout, LORA, num_steps=3) for layout in layouts]
    found += [Case("gqa", {"dp_shard": 2, "zero_stage": 3}, {**LORA, "precision": "bf16"}, num_steps=3)]
    found += [Case("latent_direct", {"tp": 2}, {**LORA, "lora_targets": "attention"}, num_steps=3)]
    for case, curve in zip(found, together(found), strict=True):
        assert not isinstance(curve, str), curve
        assert furthest(curve, alone(case)) < (1e-2 if "precision" in case.workload else 1e-5), case.name
        norms = [abs(a / b - 1) for (_, a), (_, b) in zip(curve, alone(case), strict=True)]
        assert max(norms) < (0.2 if "precision" in case.workload else 1e-4), (case.name, norms)


@pytest.mark.parametrize("frozen_format", ["compute", "nf4_double"])
def test_a_dry_run_counts_the_bytes_of_adapters_and_frozen_weights(frozen_format: str) -> None:
    config = config_of("llama", {**LORA, "frozen_format": frozen_format})
    states = dry_run(config).stages[0].breakdown_bytes
    model = engine_of(config).models[0]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert states["optimizer"] == pytest.approx(2 * 4 * trained, rel=0.01)
    if frozen_format == "compute":
        assert states["weights"] == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("workload", "layout", "training", "key"),
    [
        (LORA, {"pp": 2}, {}, "layout.pp"),
        ({**LORA, "lora_dropout": 0.1}, {"tp": 2}, {}, "layout.tp"),
        ({**LORA, "frozen_format": "nf4"}, {"dp_shard": 2, "zero_stage": 3}, {}, "workload.frozen_format"),
        ({}, {"cp": 2}, {"data": "x.jsonl"}, "layout.cp"),
        ({}, {}, {"patience_evals": 2}, "training.patience_evals"),
        (LORA, {}, {"compile": True}, "training.compile"),
    ],
)
def test_what_cannot_run_is_refused(workload: dict[str, Any], layout: dict[str, Any], training: dict[str, Any], key: str) -> None:
    case = Case("llama", layout, workload, training)
    with pytest.raises(InputError) as caught:
        check_runnable(case.config(), CPU)
    assert [p.key for p in caught.value.problems] == [key]


def test_experts_and_int8_are_refused() -> None:
    with pytest.raises(InputError, match="no adapters for experts"):
        engine_of(config_of("mixtral", LORA))
    with pytest.raises(InputError, match="nf4"):
        config_of("llama", {**LORA, "frozen_format": "int8"})


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    """A run whose weights others start from."""
    train(on_questions(folder, packing=True, eval_every_steps=3), RunOptions(folder / "base"))
    return folder / "base"


def test_the_best_checkpoint_stays_and_patience_ends_the_run(folder: Path, base: Path) -> None:
    config = on_questions(
        folder, {"job": "finetune"}, init_from=str(base), num_steps=60, learning_rate=0.05, eval_every_steps=4, patience_evals=3, keep_checkpoints=1,
        checkpoint_every_steps=5, spike_sigmas=1e6, lr_schedule="constant",
    )  # fmt: skip
    out = folder / "stopped"
    summary = train(config, RunOptions(out)).values
    evaluated = {r["step"]: r["loss"] for r in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "eval"}
    best = min(evaluated, key=lambda step: evaluated[step])
    assert summary["is_complete"]
    assert summary["best"] == {"step": best, "loss": evaluated[best], "num_worse": 3, "stopped_early": True}
    assert summary["num_steps"] == best + 12 < 60
    kept = sorted(int(p.name[5:]) for p in (out / "checkpoints").glob("step-*"))
    assert kept == [best, summary["num_steps"]]
    assert train(config, RunOptions(out, resume=True)).values["num_steps"] == summary["num_steps"]
    restored, model, checkpoint = restored_model(out)
    engine = engine_of(restored)
    engine.models[0].load_state_dict(model.state_dict())
    held_out = open_examples(restored, engine.ranks).validation()
    losses = [engine.evaluate(microbatches, weights) for microbatches, weights in held_out]
    assert sum(losses) / len(losses) == pytest.approx(evaluated[best], rel=1e-5)
    assert checkpoint.name == f"step-{best:08d}"


def test_adapters_resume_to_the_bit_on_their_base_alone(folder: Path, base: Path, tmp_path: Path) -> None:
    own = tmp_path / "base"

    shutil.copytree(base, own)
    config = on_questions(
        folder, {**LORA, "lora_dropout": 0.1}, init_from=str(own), num_steps=6, lr_schedule="constant", checkpoint_every_steps=3, eval_every_steps=2,
        keep_checkpoints=9,
    )  # fmt: skip
    whole = train(config, RunOptions(tmp_path / "whole")).values
    train(replace(config, num_steps=3), RunOptions(tmp_path / "parted"))
    parted = train(config, RunOptions(tmp_path / "parted", resume=True)).values
    assert parted["final_loss"] == whole["final_loss"]
    assert parted["eval"] == whole["eval"]
    names = set(json.loads((tmp_path / "whole/checkpoints/step-00000006/layout.json").read_text())["tensors"])
    assert all("adapter" in name for name in names)
    train(replace(on_questions(folder, num_steps=8), num_steps=8), RunOptions(own, resume=True))
    with pytest.raises(InputError, match="has changed since these adapters were trained"):
        train(replace(config, num_steps=8), RunOptions(tmp_path / "parted", resume=True))


def test_a_run_of_adapters_becomes_plain_weights(folder: Path, base: Path, tmp_path: Path) -> None:
    config = on_questions(folder, {**LORA, "frozen_format": "nf4"}, init_from=str(base), num_steps=4, learning_rate=0.03)
    train(config, RunOptions(tmp_path / "run"))
    assert run_command(["export", str(tmp_path / "run"), "--out", str(tmp_path / "w")]) == 0
    plain = engine_of(on_questions(folder)).models[0]
    load_weights(plain, tmp_path / "w")
    trained = engine_of(config)

    load_start(trained.models, trained.ranks, str(base))
    trained.narrow()
    load_checkpoint(trained.models, tmp_path / "run/checkpoints/step-00000004", adapters=True)
    tokens = tokens_of(config)
    torch.testing.assert_close(plain.logits(tokens), trained.models[0].logits(tokens), rtol=1e-4, atol=1e-4)
    start = engine_of(on_questions(folder)).models[0]
    load_start([start], trained.ranks, str(base))
    assert not torch.allclose(start.logits(tokens), plain.logits(tokens), atol=1e-2)
    with pytest.raises(InputError, match="holds weights already"):
        export_run(tmp_path / "run", tmp_path / "w")
    assert (tmp_path / "w" / "tokenizer.json").is_file()
    with pytest.raises(InputError, match="all of the model's weights"):
        load_start([start], trained.ranks, str(tmp_path / "run"))


def test_the_command_plans_runs_and_goes_on(folder: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, data = tmp_path / "run", str(folder / "questions.jsonl")
    arguments = ["finetune", "--from", str(base), "--data", data, "--out", str(out), "--rank", "2", "--epochs", "2"]
    assert run_command([*arguments, "--tokenizer", str(folder / "tokenizer.json")]) == 0
    said = capsys.readouterr()
    plan = read_yaml(out / "plan.yaml")
    rows = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["train"]["sequences"]
    assert plan["workload"]["job"] == "lora"
    assert plan["training"]["num_steps"] == math.ceil(2 * rows / 8)
    assert plan["workload"]["tokens"] == plan["training"]["num_steps"] * 8 * 48
    assert "chosen: job lora" in said.err
    assert "held-out loss" in said.out
    assert run_command(arguments) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert run_command([*arguments, "--resume", "--tokenizer", str(folder / "tokenizer.json")]) == 0
    assert "the run is finished" in capsys.readouterr().err
    assert run_command(["finetune", "--out", str(out), "--resume"]) == 0
    assert "the run is finished" in capsys.readouterr().err
    (folder / "questions.jsonl").rename(folder / "moved.jsonl")
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS[1:])))
    try:
        assert run_command(["run", str(out / "plan.yaml"), "--out", str(out), "--resume", "--steps", "9"]) == 2
        assert "another SHA-256" in capsys.readouterr().err
    finally:
        (folder / "moved.jsonl").replace(folder / "questions.jsonl")


def test_a_plan_alone_carries_its_prediction(folder: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = {"model": MODEL, "cluster": {"accelerator": "h100", "num_devices": 2}, "layout": {"dp_replicate": 2, "micro_batch_size": 2}}
    plan |= {"workload": {**LORA, "seq_len": 48, "global_batch_size": 8}, "stack": "reftrain"}
    (tmp_path / "lora.yaml").write_text(to_yaml(plan))
    words = ["finetune", str(tmp_path / "lora.yaml"), "--from", str(base), "--data", str(folder / "questions.jsonl"), "--plan-only", "--steps", "5"]
    assert run_command([*words, "--tokenizer", str(folder / "tokenizer.json"), "--out", str(tmp_path / "run")]) == 0
    made = load_run_config(tmp_path / "run" / "finetune.yaml")
    assert made.request.prediction is not None
    assert made.request.prediction["memory"]["peak_bytes"]["value"] > 0
    assert (made.num_steps, made.workload.lora_rank, made.training.init_from) == (5, 4, str(base))
    assert "chosen: job" not in capsys.readouterr().err, "the plan says it"
    with patch.dict(os.environ, {"WORLD_SIZE": "2"}):
        assert run_command(words) == 2
    assert "--plan-only, without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "x.jsonl"], "names no run"),
        (["--from", "{base}", "--data", "x.jsonl", "--job", "qlora"], "is lora or finetune"),
        (["--from", "{base}", "--data", "synthetic"], "file of examples"),
        (["--from", "{base}", "--data", "nothere.jsonl"], "nothere.jsonl"),
        (["--from", "{base}", "--data", "{data}", "--set", "speed=1"], "speed"),
    ],
)
def test_wrong_words_on_the_command_line(folder: Path, base: Path, tmp_path: Path, capsys: Any, arguments: list[str], expected: str) -> None:
    words = [text.format(base=base, data=folder / "questions.jsonl") for text in arguments]
    assert run_command(["finetune", *words, "--out", str(tmp_path / "run")]) == 2
    assert expected in capsys.readouterr().err


def test_run_points_to_finetune_when_a_job_has_nothing_to_start_from(tmp_path: Path) -> None:
    for job in ("finetune", "lora"):
        with pytest.raises(InputError, match=r"reftrain finetune PLAN\.yaml --from"):
            train(config_of("llama", {"job": job}, data="corpus"), RunOptions(tmp_path / job))
