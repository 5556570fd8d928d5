"""The same model as transformers': weights in its layout, its logits, and its losses in a plain training loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from planner.architectures import load_model
from planner.errors import InputError
from planner.plan import build_request
from reftrain.batches import open_batches
from reftrain.config import ModelDetails, make_run_config
from reftrain.hf_weights import from_hf, load_weights, save_weights, to_hf
from reftrain.model import Transformer, initialize
from reftrain.optim import learning_rate
from reftrain.parallel import Ranks
from reftrain.steps import Engine, StepTimes

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[dev]'")

CPU = torch.device("cpu")
SEQ_LEN = 48
SIZES = {
    "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
    "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
STRETCHED = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "llama-3.1": {"model_type": "llama", **SIZES, "rope_theta": 5e5, "rope_scaling": STRETCHED, "tie_word_embeddings": True},
    "llama-linear": {"model_type": "llama", **SIZES, "rope_scaling": {"rope_type": "linear", "factor": 4.0},
                     "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", **SIZES, "sliding_window": 10, "head_dim": 16},
    "qwen2": {"model_type": "qwen2", **SIZES},
    "qwen3": {"model_type": "qwen3", **SIZES, "head_dim": 16, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 96, "n_positions": 128, "attn_pdrop": 0.0,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0, "initializer_range": 0.2},
}  # fmt: skip


def theirs(config: dict[str, Any]) -> Any:
    """A model of transformers with random weights, biases and norms too."""
    torch.manual_seed(0)
    values = json.loads(json.dumps({key: value for key, value in config.items() if key != "model_type"}))
    built = transformers.AutoConfig.for_model(config["model_type"], **values)
    model = transformers.AutoModelForCausalLM.from_config(built, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def ours(config: dict[str, Any]) -> Transformer:
    model = Transformer(load_model(config), ModelDetails.read(config))
    initialize(model, 0)
    model.positions.place(SEQ_LEN, CPU, torch.float32)
    return model


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 96, (2, SEQ_LEN), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_transformers(name: str, tokens: Tensor) -> None:
    peer, model = theirs(MODELS[name]), ours(MODELS[name])
    model.load_state_dict(from_hf(peer.state_dict(), model))
    expected = peer(tokens).logits
    assert float(expected.detach().abs().max()) > 0.5, "logits that could hide a difference"
    torch.testing.assert_close(model.logits(tokens), expected, rtol=1e-4, atol=1e-4)
    targets = tokens.roll(-1, 1)
    model(tokens, targets).backward()
    functional.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    gradients = to_hf({key: p.grad for key, p in model.named_parameters() if p.grad is not None}, model.spec)
    real = dict(peer.named_parameters())
    assert gradients.keys() == real.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, real[key].grad, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_loads_in_transformers_and_back(name: str, tokens: Tensor, tmp_path: Path) -> None:
    model = ours(MODELS[name])
    save_weights(model, MODELS[name], tmp_path)
    peer, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        torch.testing.assert_close(peer.eval()(tokens).logits, model.logits(tokens), rtol=1e-4, atol=1e-4)
    again = ours(MODELS[name])
    for parameter in again.parameters():
        parameter.data.fill_(7.0)
    load_weights(again, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_transformers_saves_in_shards_loads(name: str, tokens: Tensor, tmp_path: Path) -> None:
    peer, model = theirs(MODELS[name]), ours(MODELS[name])
    peer.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    load_weights(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(tokens), peer(tokens).logits, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- refusals


def refused(model: Transformer, folder: Path) -> InputError:
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(InputError) as caught:
        load_weights(model, folder)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "a refusal changes nothing"
    assert all(p.key and p.rule and p.fix for p in caught.value.problems)
    return caught.value


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path) in str(refused(ours(MODELS["llama"]), tmp_path))


def damaged_copies(data: bytes) -> list[bytes]:
    return [
        b"",
        data[:4],
        data[: len(data) // 2],
        data[:-1],
        b"\xff" * 8 + data[8:],
        (1 << 40).to_bytes(8, "little") + data[8:],
        b"not safetensors" * 9,
    ]


@pytest.mark.parametrize("which", range(7))
def test_damaged_files_are_refused_by_name(which: int, tmp_path: Path) -> None:
    model = ours(MODELS["llama"])
    file = save_weights(model, MODELS["llama"], tmp_path)
    file.write_bytes(damaged_copies(file.read_bytes())[which])
    assert str(file) in str(refused(model, tmp_path))


def test_weights_of_another_model_are_refused_tensor_by_tensor(tmp_path: Path) -> None:
    save_weights(ours(MODELS["llama"]), MODELS["llama"], tmp_path)
    wider = str(refused(ours({**MODELS["llama"], "intermediate_size": 96}), tmp_path))
    assert "model.layers.0.mlp.up_proj.weight" in wider
    assert "[96, 32]" in wider
    deeper = str(refused(ours({**MODELS["llama"], "num_hidden_layers": 4}), tmp_path))
    assert "model.layers.3.self_attn.q_proj.weight" in deeper
    assert "is missing" in deeper
    shorter = str(refused(ours({**MODELS["llama"], "num_hidden_layers": 2}), tmp_path))
    assert "model.layers.2" in shorter
    assert "is not part of this model" in shorter


def test_a_shard_that_is_missing_or_lies_elsewhere_is_refused(tmp_path: Path) -> None:
    model = ours(MODELS["llama"])
    index = tmp_path / "model.safetensors.index.json"
    for name in ("gone.safetensors", "../../gone.safetensors", 7):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        refused(model, tmp_path)
    for content in ("{", "[]", '{"weight_map": 3}', "{}"):
        index.write_text(content)
        refused(model, tmp_path)


def test_a_family_without_a_layout_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "gpt_neox", **SIZES}
    with pytest.raises(InputError, match="gpt2"):
        save_weights(ours(config), config, tmp_path)


# ---------------------------------------------------------------- training


def test_it_trains_as_a_plain_loop_over_transformers_does() -> None:
    """Same weights, data, batch, AdamW groups, clipping and rates: the same losses over 20 steps."""
    plan = {
        "schema_version": 1, "model": MODELS["llama"], "workload": {"seq_len": SEQ_LEN, "global_batch_size": 4, "precision": "fp32"},
        "cluster": {"accelerator": "cpu-local", "num_devices": 1}, "layout": {"micro_batch_size": 2},
        "training": {"num_steps": 20, "warmup_steps": 4, "learning_rate": 3e-3},
    }  # fmt: skip
    config = make_run_config(build_request(plan))
    ranks, training = Ranks(config.layout, CPU), config.training
    peer, engine = theirs(MODELS["llama"]).train(), Engine(config, ranks)
    engine.models[0].load_state_dict(from_hf(peer.state_dict(), engine.models[0]))
    matrices, vectors = ([p for p in peer.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, betas=(training.beta1, training.beta2), eps=training.eps)
    batches = open_batches(config, ranks, "synthetic")
    found, expected = [], []
    for step in range(20):
        microbatches = batches.microbatches(step * config.global_batch_size)
        loss, norm = engine.agree(engine.forward_backward(microbatches, StepTimes()))
        engine.update(step, norm)
        found.append(loss)
        total = 0.0
        for tokens, targets in microbatches:
            part = functional.cross_entropy(peer(tokens).logits.flatten(0, 1), targets.flatten()) / len(microbatches)
            part.backward()
            total += part.item()
        expected.append(total)
        torch.nn.utils.clip_grad_norm_(peer.parameters(), training.clip_norm or 1e9)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 20, 4, training)
        optimizer.step()
        optimizer.zero_grad()
    assert expected[-1] < expected[0] - 0.3, "it learns"
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-4
