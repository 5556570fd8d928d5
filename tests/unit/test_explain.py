"""Every number of a plan can be explained, and what the explanation says adds up and evaluates to it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from planner.errors import InputError
from planner.estimate import estimate
from planner.explain import MAIN_KEYS, Explanation, Trace, explain, explain_in, numeric_keys
from planner.files import DATA_DIR, read_yaml, to_yaml
from planner.plan import build_request
from planner.report.explain_text import render_explanation

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
GEMMA = {
    "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8, "head_dim": 256,
    "num_key_value_heads": 4, "vocab_size": 256000, "max_position_embeddings": 8192, "sliding_window": 4096,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}


def _request(
    model: dict[str, Any], accelerator: str, num_devices: int, layout: dict[str, Any], price: str | None = "2.5 USD/h", **workload: Any
) -> Any:
    cluster = {"accelerator": accelerator, "num_devices": num_devices} | ({"price": price} if price else {})
    return {"model": model, "cluster": cluster, "layout": layout, "workload": {"tokens": 1e12, "seq_len": 4096, "global_batch_size": 128, **workload}}


REQUESTS = {
    "dense, TP and PP": _request(
        LLAMA, "h100-80gb-sxm", 64, {"tp": 8, "pp": 4, "dp_shard": 2, "zero_stage": 1, "sequence_parallel": True, "micro_batch_size": 1},
        recompute="selective",
    ),
    "FSDP, full recompute": _request(LLAMA, "h100-80gb-sxm", 64, {"dp_shard": 64, "zero_stage": 3}, recompute="full"),
    "HSDP, ZeRO-2, CP, fp8": _request(LLAMA, "h100-80gb-sxm", 64, {"dp_replicate": 4, "dp_shard": 8, "cp": 2, "zero_stage": 2}, precision="fp8"),
    "MoE, EP and TP": _request(MIXTRAL, "h100-80gb-sxm", 64, {"dp_shard": 32, "tp": 2, "ep": 8, "zero_stage": 1, "sequence_parallel": True}),
    "MoE, LoRA, no price": _request(MIXTRAL, "h100-80gb-sxm", 64, {"dp_shard": 64, "ep": 8, "zero_stage": 3}, None, job="lora"),
    "single device, unfused": _request(GPT2, "a100-80gb-sxm", 1, {}, attention_kernel="unfused", seq_len=1024, optimizer="adafactor"),
    "gradients made anew, one microbatch": {
        **_request(GPT2, "a100-80gb-sxm", 1, {"micro_batch_size": 4}, seq_len=1024, global_batch_size=4), "stack": "torch-eager",
    },
    "TPU, does not fit": _request(LLAMA, "tpu-v4", 8, {"dp_shard": 1, "tp": 8, "zero_stage": 0}),
    "two kinds of block, unfused, selective": _request(
        GEMMA, "h100-80gb-sxm", 16, {"tp": 2, "dp_shard": 8, "zero_stage": 2}, attention_kernel="unfused", recompute="selective", seq_len=8192
    ),
    "DualPipe": _request(
        LLAMA, "h100-80gb-sxm", 64, {"tp": 2, "pp": 4, "dp_shard": 8, "zero_stage": 1, "schedule": "dualpipe", "num_virtual_stages": 2}
    ),
}  # fmt: skip
ARITHMETIC = {"max": max, "min": min, "ceil": math.ceil, "exp": math.exp, "expm1": math.expm1, "sqrt": math.sqrt, "__builtins__": {}}


@pytest.fixture(scope="module", params=list(REQUESTS))
def trace(request: pytest.FixtureRequest) -> Trace:
    return Trace.of(build_request(REQUESTS[request.param]))


def _check(found: Explanation, key: str) -> None:
    """The formula with the values put in evaluates to the number, and the terms add up to it."""
    assert found.key == key
    assert found.value is not None
    assert found.source
    result = eval(found.substituted, ARITHMETIC)  # arithmetic that we wrote
    assert result == pytest.approx(found.value, rel=1e-9, abs=1e-18), f"{key}: {found.formula} = {found.substituted}"
    if found.terms:
        assert sum(term.value for term in found.terms) == pytest.approx(found.value, rel=1e-9)
        assert sum(term.share_fraction for term in found.terms) == pytest.approx(1.0, rel=1e-9)
    names = set(re.findall(r"[A-Za-z_]\w*", found.formula)) - set(ARITHMETIC)
    assert names <= {i.name for i in found.inputs}, f"{key}: the formula uses names that no input gives"


def test_every_number_is_explained(trace: Trace) -> None:
    """Leaf by leaf: the explanation's value is the plan's, to the last bit."""
    assert trace.plain == estimate(trace.request).to_dict()
    for key in numeric_keys(trace.plain):
        found = explain_in(trace, key)
        assert found.value == trace.at(key), key
        _check(found, key)


def test_every_child_is_explained(trace: Trace) -> None:
    """Down to ops, passes and collectives; and children that are terms agree with their parents."""
    todo, seen = list(numeric_keys(trace.plain)), set()
    while todo:
        key = todo.pop()
        found = explain_in(trace, key)
        _check(found, key)
        terms = {term.name: term.value for term in found.terms}
        below = {child.removeprefix(f"{key}."): child for child in found.children if child.startswith(f"{key}.")}
        is_counted = "num_runs" in found.formula  # children are one run, terms are all of them
        for name in terms.keys() & below.keys() if not is_counted else ():
            assert explain_in(trace, below[name]).value == pytest.approx(terms[name], rel=1e-9), below[name]
        todo += [child for child in found.children if child not in seen]
        seen.update(found.children)
    assert any(key.count(".") > 4 for key in seen)


def test_a_stack_measured_op_by_op_is_explained(tmp_path: Path) -> None:
    """Curves in place of rooflines, with casts, sums of gradients and host time."""
    curve = {"sizes": [1e3, 1e6, 1e9], "seconds": [1e-5, 2e-4, 0.3]}
    sizes = [64.0, 1024.0, 65536.0]
    grid = {"m": sizes, "n": sizes, "k": sizes, "seconds": [(m * n * k / 1e13) ** 0.9 + 1e-5 for m in sizes for n in sizes for k in sizes]}
    phases = ("forward", "backward_input", "backward_weight")
    kinds = ("layernorm", "activation", "residual", "embedding", "loss")
    measured = {
        "source": "made up for this test", "date": "2026-11-23", "op_overhead_s": 1e-6, "step_overhead_s": 1e-3,
        "matmul": {f"{phase}/bf16": grid for phase in phases},
        "attention": {f"{phase}/bf16/64": curve for phase in ("forward", "backward")},
        "ops": {f"{kind}/{phase}/bf16": curve for kind in kinds for phase in phases[:2]}
        | dict.fromkeys(("cast/forward", "cast/backward", "accumulate", "optimizer/adamw"), curve),
    }  # fmt: skip
    stack = tmp_path / "mine.yaml"
    stack.write_text(to_yaml(read_yaml(DATA_DIR / "stacks" / "reftrain.yaml") | {"name": "mine", "measured": {"a100-80gb-sxm": measured}}))
    request = _request(GPT2, "a100-80gb-sxm", 1, {"micro_batch_size": 4}, seq_len=1024, global_batch_size=8) | {"stack": str(stack)}
    trace = Trace.of(build_request(request))
    test_every_number_is_explained(trace)
    test_every_child_is_explained(trace)
    assert trace.plan.time.step_s.value > estimate(request | {"stack": "reftrain"}).time.step_s.value, "the curves are slower, and are used"


def test_links_measured_by_size_of_message_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collective's curve in place of its bandwidth, over the share that the stack reaches; many small messages cost many calls."""
    device = read_yaml(DATA_DIR / "hardware_catalog.yaml")["a100-80gb-sxm"] | {"aliases": []}
    curves = {f"{name}/2": {"sizes": [1e3, 1e6], "seconds": [1e-3, 2e-3]} for name in ("all_reduce", "all_gather", "reduce_scatter")}
    device["scale_up"] = device["scale_up"] | {"curves": curves}
    (tmp_path / "catalog.yaml").write_text(to_yaml({"accelerators": {"mine": device}}))
    monkeypatch.setenv("LLM_PLANNER_HOME", str(tmp_path))
    made_up = {"evidence": "assumed", "source": "made up for this test"}
    slower = {"coefficients": {"scale_up": {"value": 0.8, **made_up}, "sync": {"value": 2e-5, **made_up}}}
    stack = tmp_path / "slower.yaml"
    stack.write_text(to_yaml(read_yaml(DATA_DIR / "stacks" / "reftrain.yaml") | slower))
    request = _request(LLAMA, "mine", 2, {"tp": 2, "micro_batch_size": 1}, seq_len=1024) | {"stack": str(stack)}
    trace = Trace.of(build_request(request))
    test_every_number_is_explained(trace)
    test_every_child_is_explained(trace)
    loss = explain_in(trace, "time.breakdown_s.tensor_parallel.head.loss.forward.all_gather")
    assert loss.value == pytest.approx(4 * curves_at(2 * 12.0 * 256))
    whole = explain_in(trace, "time.breakdown_s.tensor_parallel.head.loss.forward")
    assert whole.value == pytest.approx((loss.value / 0.8 + 4 * 2e-5) * 0.9), "four calls wait once each; a tenth overlaps"


def curves_at(num_bytes: float) -> float:
    """The made-up curve between its two points, by hand: a straight line in the logarithms."""
    return 1e-3 * float(2.0 ** (math.log(num_bytes / 1e3) / math.log(1e3)))


def test_explanations_are_plain_data_and_readable(trace: Trace) -> None:
    for key in (None, *MAIN_KEYS[:12], "memory.breakdown_bytes.weights.block"):
        if key is not None and key.endswith(".block") and "block" not in {p.name for p in trace.graph.parts}:
            continue
        if key is not None and key.startswith("loss") and trace.plan.loss is None:
            continue
        found = explain_in(trace, key)
        assert json.loads(json.dumps(asdict(found), allow_nan=False))["key"] == found.key
        for width in (40, 80, 120):
            text = render_explanation(found, width)
            assert max(map(len, text.splitlines())) <= max(width, 60)
            assert text.isprintable() or {c for c in text if not c.isprintable()} == {"\n"}


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("time", "time.step_s.value"), ("memory", "memory.peak_bytes.value"), ("cost", "cost.usd.value"), ("usd", "cost.usd.value"),
        ("mfu", "time.mfu"), ("loss", "loss.nats_per_token.value"), ("perplexity", "loss.perplexity.value"), ("params", "params.total"),
        ("flops", "flops.model_per_token"), ("train_s", "time.train_s.value"), ("weights", "memory.breakdown_bytes.weights"),
        ("memory.stages[1].total_bytes", "memory.stages.1.total_bytes"), ("tokens", "inputs.workload.tokens"), ("time.step_s", "time.step_s.value"),
        ("goodput", "cost.goodput_fraction"), ("memory.fits", "memory.fits"),
    ],
)  # fmt: skip
def test_short_forms(short: str, full: str) -> None:
    found = explain(REQUESTS["dense, TP and PP"], short)
    assert found.key == full


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("memry", "memory"), ("time.mfuu", "time.mfu"), ("time.breakdown_s.matmul.blok", "time.breakdown_s.matmul.block"),
        ("memory.breakdown_bytes.weights.block.attention.qq", "memory.breakdown_bytes.weights.block.attention.q"),
        ("time.breakdown_s.matmul.block.attention.q.forwrd", "time.breakdown_s.matmul.block.attention.q.forward"),
    ],
)  # fmt: skip
def test_wrong_keys_name_the_nearest(key: str, near: str) -> None:
    with pytest.raises(InputError) as caught:
        explain(REQUESTS["dense, TP and PP"], key)
    assert near in caught.value.problems[0].fix


@pytest.mark.parametrize(
    "key", ["", ".", "time.breakdown_s", "memory.stages.9.total_bytes", "params.total.block.nothing", "\x00", "a" * 500, "time..mfu", "-1"]
)
def test_odd_keys_are_input_errors(key: str) -> None:
    with pytest.raises(InputError) as caught:
        explain(REQUESTS["dense, TP and PP"], key)
    assert caught.value.problems[0].fix


def test_numbers_that_a_plan_lacks_say_why() -> None:
    with pytest.raises(InputError, match="no price is known"):
        explain(REQUESTS["MoE, LoRA, no price"], "usd")
    with pytest.raises(InputError, match="no law"):
        explain(REQUESTS["MoE, LoRA, no price"], "loss")


def test_overview_lists_the_main_numbers() -> None:
    found = explain(REQUESTS["dense, TP and PP"])
    assert found.value is None
    assert found.children == MAIN_KEYS
    assert {i.name: i.value for i in found.inputs}["params.total"] == estimate(REQUESTS["dense, TP and PP"]).params.total


def test_matmul_goes_down_to_its_roofline() -> None:
    """One projection by hand: FLOPs 2 m n k on one of 8 devices."""
    found = explain(REQUESTS["dense, TP and PP"], "time.breakdown_s.matmul.block.mlp.up.forward")
    values = {i.name: i.value for i in found.inputs}
    assert values["flops"] == 2 * 4096 * 4096 * 14336 / 8
    assert values["peak_flops_per_s"] == pytest.approx(989.4e12, rel=0.01)
    assert "peak_flops_per_s * best_fraction * shape_fraction" in found.formula
