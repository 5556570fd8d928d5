"""The model: exactly the parameters that the planner counts, kernels against plain torch, recomputation, positions, initialization, refusals."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from planner.architectures import load_model
from planner.errors import InputError
from planner.graph import count_params
from reftrain.attention import cp_positions
from reftrain.config import Kernels, ModelDetails
from reftrain.kernels import IGNORED, linear_cross_entropy, rms_norm, rotate
from reftrain.model import Transformer, check_supported, initialize, parameter_count
from reftrain.runnable import check_runnable
from tests.crosscheck.test_params_random import FAMILIES, configurations
from tests.reftrain.parity_worker import MODELS, Case

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted(path.stem for path in (ROOT / "data" / "models").glob("*.yaml"))
CPU = torch.device("cpu")


def supported(config: Any) -> bool:
    try:
        check_supported(load_model(config))
    except InputError:
        return False
    return True


def built(name: str, kernels: Kernels | None = None, seq_len: int = 32, seed: int = 0) -> Transformer:
    config = MODELS[name]
    model = Transformer(load_model(config), ModelDetails.read(config), kernels)
    initialize(model, seed)
    model.positions.place(seq_len, CPU, torch.float32)
    return model.train()


# ---------------------------------------------------------------- parameters


def test_every_preset_has_the_parameters_that_the_planner_counts() -> None:
    names = [name for name in PRESETS if supported(name)]
    assert len(names) >= 75, "few presets can be trained"
    for name in names:
        spec = load_model(name)
        with torch.device("meta"):
            assert parameter_count(Transformer(spec)) == int(count_params(spec)["total"]), name


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much])
@given(data=st.data())
def test_every_switch_has_the_parameters_that_the_planner_counts(family: str, data: st.DataObject) -> None:
    config = data.draw(configurations(family))
    if not supported(config):
        with pytest.raises(InputError), torch.device("meta"):
            Transformer(load_model(config))
        return
    spec = load_model(config)
    with torch.device("meta"):
        assert parameter_count(Transformer(spec)) == int(count_params(spec)["total"])


@pytest.mark.parametrize("name", MODELS)
def test_stages_together_are_the_model(name: str) -> None:
    """Names and values do not depend on where the pipeline cuts."""
    spec, details = load_model(MODELS[name]), ModelDetails.read(MODELS[name])
    whole = dict(built(name).named_parameters())
    found: dict[str, Tensor] = {}
    for layers, is_first, is_last in ((range(1), True, False), (range(1, 3), False, False), (range(3, 4), False, True)):
        part = Transformer(spec, details, layers=layers, is_first=is_first, is_last=is_last)
        initialize(part, 0)
        for key, value in part.named_parameters():
            key = key.replace("tied.weight", "embeddings.token.weight")
            assert torch.equal(found.setdefault(key, value), value)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[key], whole[key]) for key in whole)


def test_initialization_follows_from_seed_and_name() -> None:
    first, again, other = (dict(built("llama", seed=seed).named_parameters()) for seed in (0, 0, 1))
    name = "blocks.2.mlp.down.weight"
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first[name], other[name])
    assert float(first[name].detach().std()) == pytest.approx(0.1 / math.sqrt(8), rel=0.1)
    assert float(first["blocks.2.mlp.up.weight"].detach().std()) == pytest.approx(0.1, rel=0.1)
    assert torch.equal(first["blocks.2.mlp_norm.weight"], torch.ones(32))


# ---------------------------------------------------------------- kernels


def test_rms_norm_is_what_plain_torch_computes() -> None:
    x, weight = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True), torch.randn(16, dtype=torch.float64, requires_grad=True)
    plain = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), plain)
    assert torch.autograd.gradcheck(lambda y, w: rms_norm(y, w, 1e-5), (x, weight))


def test_rms_norm_sums_half_precision_in_fp32() -> None:
    x, weight = torch.full((1, 4096), 30.0, dtype=torch.float16), torch.ones(4096, dtype=torch.float16)
    assert torch.equal(rms_norm(x, weight, 1e-5), torch.ones_like(x)), "the sum of squares is beyond fp16"


def test_rotation_is_a_rotation() -> None:
    x = torch.randn(2, 6, 3, 8, dtype=torch.float64, requires_grad=True)
    angles = torch.outer(torch.arange(6, dtype=torch.float64), torch.rand(4, dtype=torch.float64)).unsqueeze(1)
    cos, sin = angles.cos(), angles.sin()
    turned = rotate(x, cos, sin)
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(turned, torch.cat([pairs.real, pairs.imag], -1))
    torch.testing.assert_close(rotate(turned, cos, -sin), x)
    assert torch.autograd.gradcheck(lambda y: rotate(y, cos, sin), (x,))


@pytest.mark.parametrize("num_chunks", [1, 3, 8, 50])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_ignored", [0, 5, 17])
def test_fused_loss_is_plain_cross_entropy(num_chunks: int, has_bias: bool, num_ignored: int) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(17, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    bias = torch.randn(11, requires_grad=True) if has_bias else None
    targets = torch.randint(0, 11, (17,))
    targets[torch.randperm(17)[:num_ignored]] = IGNORED
    wanted = [x for x in (hidden, weight, bias) if x is not None]
    ours = linear_cross_entropy(hidden, weight, bias, targets, num_chunks=num_chunks)
    logits = functional.linear(hidden, weight, bias)
    plain = functional.cross_entropy(logits, targets, reduction="sum") / max(17 - num_ignored, 1)
    torch.testing.assert_close(ours, plain)
    for found, expected in zip(torch.autograd.grad(3 * ours, wanted), torch.autograd.grad(3 * plain, wanted), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_fused_loss_has_the_gradients_of_its_values() -> None:
    torch.manual_seed(1)
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 4), (5, 4), (5,)))
    targets = torch.tensor([0, 4, IGNORED, 2, 2, IGNORED, 1])
    inputs = (hidden, weight, bias)

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, b, targets, num_chunks=3)

    # torch's gradcheck goes back twice through one graph, for which this kernel keeps nothing.
    found = torch.autograd.grad(loss(*inputs), inputs)
    directions = [torch.randn_like(x) for x in inputs]
    ahead, behind = (loss(*(x.detach() + step * d for x, d in zip(inputs, directions, strict=True))) for step in (1e-5, -1e-5))
    along = sum((g * d).sum() for g, d in zip(found, directions, strict=True))
    torch.testing.assert_close(along, (ahead - behind) / 2e-5, rtol=1e-8, atol=1e-9)


def test_fused_loss_without_gradients_keeps_none() -> None:
    hidden, weight, targets = torch.randn(8, 4, requires_grad=True), torch.randn(5, 4), torch.randint(0, 5, (8,))
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, None, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, functional.cross_entropy(hidden @ weight.t(), targets))


@pytest.mark.parametrize("loss", ["chunked", "fused", "unfused"])
@pytest.mark.parametrize("attention", ["flash", "unfused"])
def test_kernels_change_nothing_but_cost(loss: Any, attention: Any) -> None:
    tokens, targets = torch.randint(0, 64, (2, 32)), torch.randint(0, 64, (2, 32))
    plain, other = built("windowed"), built("windowed", Kernels(attention, loss))
    for model in (plain, other):
        model(tokens, targets).backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


# ---------------------------------------------------------------- recomputation


def kept_bytes(model: Transformer, tokens: Tensor, targets: Tensor) -> tuple[int, float, list[Tensor]]:
    """(bytes that the forward pass keeps for the backward pass, loss, gradients)."""
    held: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(tokens, targets)
        total = sum(held.values())
    loss.backward()
    return total, float(loss.detach()), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["llama", "latent", "gpt2"])
def test_recomputation_gives_the_same_gradients(name: str) -> None:
    tokens, targets = torch.randint(0, 64, (2, 32)), torch.randint(0, 64, (2, 32))
    models = {policy: built(name, Kernels(recompute=policy)) for policy in ("none", "selective", "full")}  # type: ignore[arg-type]
    found = {policy: kept_bytes(model, tokens, targets) for policy, model in models.items()}
    for policy in ("selective", "full"):
        assert found[policy][1] == found["none"][1]
        assert all(torch.equal(a, b) for a, b in zip(found[policy][2], found["none"][2], strict=True)), policy
    for plain, again in zip(models["none"].routers(), models["full"].routers(), strict=True):
        assert torch.equal(plain.load, again.load), "tokens are counted once"
    assert found["full"][0] < found["none"][0] / 2


# ---------------------------------------------------------------- positions


@given(cp=st.integers(1, 8), per_slice=st.integers(1, 9))
def test_context_parallel_ranks_share_positions_and_causal_work_evenly(cp: int, per_slice: int) -> None:
    seq_len = 2 * cp * per_slice
    shares = [cp_positions(seq_len, cp, rank) for rank in range(cp)]
    assert sorted(torch.cat(shares).tolist()) == list(range(seq_len))
    assert {len(share) for share in shares} == {seq_len // cp}
    assert len({int((share + 1).sum()) for share in shares}) == 1, "each query sees its position + 1 keys"
    assert all(bool((share.diff() > 0).all()) for share in shares)


def test_a_window_hides_what_is_far() -> None:
    """The last token's logits do not depend on tokens beyond num_layers * (window - 1) before it, and do on the next one."""
    model, reach = built("windowed").eval(), 4 * 9
    model.positions.place(48, CPU, torch.float32)
    tokens = torch.randint(0, 64, (1, 48))
    far, near = tokens.clone(), tokens.clone()
    far[0, 47 - reach - 1] += 1
    near[0, 47 - reach] += 1
    with torch.no_grad():
        last, last_far, last_near = (model.logits(x % 64)[0, -1] for x in (tokens, far, near))
    assert torch.equal(last, last_far)
    assert not torch.equal(last, last_near)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "bert"])
def test_a_decoder_does_not_see_the_future(name: str) -> None:
    model = built(name).eval()
    tokens = torch.randint(0, 64, (1, 32))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 64
    with torch.no_grad():
        before, after = model.logits(tokens), model.logits(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before[:, 20:], after[:, 20:])


# ---------------------------------------------------------------- mixtures


def test_routers_move_towards_idle_experts_once_per_step() -> None:
    model = built("mixtral")
    router = next(iter(model.routers()))
    router.load.copy_(torch.tensor([10.0, 0.0, 5.0, 5.0]))
    router.rebalance(0.5, None)
    assert router.bias.tolist() == [-0.5, 0.5, 0.0, 0.0]
    assert router.load.tolist() == [0.0] * 4
    tokens = torch.randint(0, 64, (2, 32))
    model(tokens, tokens)
    assert float(router.load.sum()) == 2 * 32 * 2
    model.eval()
    model(tokens, tokens)
    assert float(router.load.sum()) == 2 * 32 * 2, "evaluation does not count"


def test_no_token_is_dropped() -> None:
    """A mixture whose experts are all the same is that one feed-forward layer, whatever the router chooses."""
    mixture = built("mixtral").blocks["0"].mlp
    for weights in (mixture.experts.up, mixture.experts.gate, mixture.experts.down):
        weights.data[1:] = weights.data[:1]
    x = torch.randn(2, 32, 32)
    up, gate, down = (weights.data[0] for weights in (mixture.experts.up, mixture.experts.gate, mixture.experts.down))
    torch.testing.assert_close(mixture(x), (functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t(), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64}, "encoder-decoder"),
        ({"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}, "alibi"),
        ({**MODELS["llama"], "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2}, "sinks"),
        ({**MODELS["llama"], "model_type": "gemma2", "head_dim": 8}, "Gemma"),
    ],
)
def test_a_model_that_it_cannot_build_is_refused(config: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError) as caught:
        check_supported(load_model(config))
    assert word in str(caught.value)
    assert all(p.key == "model" and p.value and p.rule and p.fix for p in caught.value.problems)


REFUSED = [
    (Case("llama", {"pp": 2, "schedule": "1f1b", "num_virtual_stages": 2}), "layout.num_virtual_stages"),
    (Case("llama", {"num_virtual_stages": 2}), "layout.num_virtual_stages"),
    (Case("gqa", {"tp": 4}), "layout.tp"),
    (Case("bert", {"cp": 2}), "layout.cp"),
    (Case("llama", {"pp": 2, "micro_batch_size": 8}), "workload.global_batch_size"),
    (Case("llama", {"pp": 2, "schedule": "zb_h1"}, {"recompute": "selective"}), "workload.recompute"),
    (Case("llama", {"pp": 2}, {"precision": "fp16"}), "workload.precision"),
    (Case("llama", {}, {"precision": "fp8"}), "workload.precision"),
    (Case("llama", {}, {"precision": "tf32"}), "workload.precision"),
    (Case("llama", {"tp": 2}, {}, {"compile": True}), "training.compile"),
    (Case("llama", {"tp": 2}, {"optimizer": "muon"}), "workload.optimizer"),
    (Case("llama", {"dp_shard": 2, "zero_stage": 3}, {"optimizer": "adafactor"}), "workload.optimizer"),
]


@pytest.mark.parametrize(("case", "key"), REFUSED, ids=[case.name for case, _ in REFUSED])
def test_a_layout_that_it_cannot_run_is_refused(case: Case, key: str) -> None:
    with pytest.raises(InputError) as caught:
        check_runnable(case.config(), CPU)
    assert [p.key for p in caught.value.problems] == [key]
    assert all(p.value is not None and p.rule and p.fix for p in caught.value.problems)


def test_all_obstacles_are_named_at_once() -> None:
    config = Case("llama", {"pp": 2, "micro_batch_size": 8}, {"precision": "fp16", "optimizer": "muon"}).config()
    with pytest.raises(InputError) as caught:
        check_runnable(dataclasses.replace(config), CPU)
    assert {p.key for p in caught.value.problems} == {"workload.global_batch_size", "workload.precision"}
