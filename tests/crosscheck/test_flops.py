"""FLOPs of our op lists against what torch counts on the real modules of transformers: forward and backward, to the last FLOP.

The modules run on the meta device, which computes nothing, so that published models are checked at their real width. They
are cut to a few layers: every kind of block that a model has is among its first six.
"""

from __future__ import annotations

from typing import Any

import pytest

from planner.architectures import ARCHITECTURES, load_model, model_ops, preset_record
from planner.graph import model_flops_per_token
from planner.op_cost import Numerics, OpCost, Shard

torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[dev,reftrain]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[dev]'")

SEQ_LEN, BATCH = 256, 2
EXACT = 1e-12
NOT_HERE = {"palm", "gemma3"}
"""PaLM has no class in transformers, and is checked by hand below; gemma3 wraps gemma3_text."""
FLAT_MASK = {"opt", "bloom"}
"""Families that take a mask of [batch, seq] only; the others would look into its values, which the meta device does not have."""
HEADS = {"bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}
PRESETS = [
    "gpt2-xl", "llama-3.1-8b", "mistral-7b", "qwen2-7b", "qwen3-8b", "gemma-7b", "gemma-2-9b", "gemma-3-4b", "pythia-6.9b", "opt-6.7b",
    "bloom-7b1", "mpt-7b", "falcon-7b", "falcon-40b", "bert-large", "t5-large", "flan-t5-xl", "mixtral-8x7b", "qwen1.5-moe-a2.7b",
    "qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v2-lite", "deepseek-v2", "deepseek-v3",
]  # fmt: skip
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
MAX_DEPTH = 6
SMALL = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 1408, "vocab_size": 1000}
SMALL_MIXTURE = {"num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
SWITCHES: dict[str, dict[str, Any]] = {
    "heads wider than hidden": {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "head_dim": 96, "attention_bias": True, "mlp_bias": True},
    "window on every layer": {"model_type": "mistral", **SMALL, "num_key_value_heads": 2, "sliding_window": 64},
    "two norms": {"model_type": "gpt_neox", **SMALL, "use_parallel_residual": False},
    "one after the other": {"model_type": "falcon", **SMALL, "num_hidden_layers": 2, "parallel_attn": False, "multi_query": False},
    "every other layer a mixture": {
        "model_type": "qwen2_moe", **SMALL, **SMALL_MIXTURE, "shared_expert_intermediate_size": 512, "decoder_sparse_step": 2,
    },
    "decoder deeper than encoder": {
        "model_type": "t5", "d_model": 512, "d_kv": 48, "d_ff": 1024, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 8, "vocab_size": 1000,
    },
}  # fmt: skip


def preset(name: str) -> dict[str, Any]:
    """Configuration of a preset, its first layers only."""
    config: dict[str, Any] = preset_record(name)["config"]
    return {key: min(value, MAX_DEPTH) if key in DEPTH_KEYS else value for key, value in config.items()}


def counted(config: dict[str, Any], attention: str) -> tuple[float, float]:
    """(forward, backward) FLOPs of one step of the real module, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    values = dict(config)
    model_type = values.pop("model_type")
    built = transformers.AutoConfig.for_model(model_type, **values)
    # Needs no values to route by, and torch counts its matrix products; it does not count grouped ones.
    built._experts_implementation = "batched_mm"
    with torch.device("meta"):
        module = getattr(transformers, HEADS.get(model_type, "AutoModelForCausalLM")).from_config(built, attn_implementation=attention)
        tokens = torch.zeros(BATCH, SEQ_LEN, dtype=torch.long)
        mask = torch.ones_like(tokens) if model_type in FLAT_MASK else torch.zeros(BATCH, 1, SEQ_LEN, SEQ_LEN)
        inputs = {"input_ids": tokens, "attention_mask": mask} | ({"decoder_input_ids": tokens} if model_type == "t5" else {})
        with FlopCounterMode(display=False) as forward:
            logits = module.train()(**inputs).logits
        with FlopCounterMode(display=False) as backward:
            logits.sum().backward()
    return float(forward.get_total_flops()), float(backward.get_total_flops())


def costs(config: dict[str, Any], numerics: Numerics) -> list[OpCost]:
    """Costs of every op of the model for the same batch on one device."""
    listed = model_ops(load_model(config))
    ops = [*listed.embedding, *(op for layer in listed.layers for op in listed.blocks[layer][1]), *listed.head]
    shard = Shard(BATCH, SEQ_LEN)
    return [op.cost(shard, numerics) for op in ops]


def assert_equal_flops(config: dict[str, Any], attention: str) -> None:
    """Products written out one by one (`eager`, and what `sdpa` does on the meta device)."""
    forward, backward = counted(config, attention)
    ours = costs(config, Numerics(attention_kernel="unfused"))
    assert sum(c.model_forward_flops for c in ours) == pytest.approx(forward, rel=EXACT)
    assert sum(c.forward_flops for c in ours) == pytest.approx(forward, rel=EXACT)
    assert sum(c.backward_input_flops + c.backward_weight_flops for c in ours) == pytest.approx(backward, rel=EXACT)


@pytest.mark.parametrize("name", PRESETS)
def test_published_model_runs_exactly_the_flops_of_its_ops(name: str) -> None:
    assert_equal_flops(preset(name), "eager")


@pytest.mark.parametrize("config", SWITCHES.values(), ids=SWITCHES)
def test_unusual_switches_run_exactly_the_flops_of_their_ops(config: dict[str, Any]) -> None:
    assert_equal_flops(config, "eager")


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-0.6b", "bert-base", "t5-small"])
def test_attention_function_of_torch_counts_the_same(name: str) -> None:
    assert_equal_flops(preset(name), "sdpa")


def test_every_family_is_counted() -> None:
    assert {preset_record(name)["config"]["model_type"] for name in PRESETS} | NOT_HERE == set(ARCHITECTURES)


def flash(_module: Any, query: Any, key: Any, value: Any, _mask: Any, scaling: float | None = None, **_: Any) -> tuple[Any, None]:
    """torch's flash kernel as an attention function of transformers; it has shapes, FLOPs and a backward pass on the meta device too."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    out, *_rest = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, scale=scaling)
    return out.transpose(1, 2), None


@pytest.mark.parametrize("name", ["bert-large", "gpt2-xl", "llama-3.1-8b", "qwen3-8b", "t5-large", "gpt-oss-20b"])
def test_flash_attention_computes_the_scores_again(name: str) -> None:
    """torch counts all pairs, five products in the backward pass; we count the pairs that the mask leaves."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("torch_fused", flash)
    config = preset(name)
    forward, backward = counted(config, "torch_fused")
    ours = costs(config, Numerics(attention_kernel="flash"))
    skipped = [c.model_forward_flops / c.forward_flops if c.op.kind == "attention" else 1.0 for c in ours]
    assert sum(c.forward_flops * k for c, k in zip(ours, skipped, strict=True)) == pytest.approx(forward, rel=EXACT)
    assert sum(c.backward_input_flops * k + c.backward_weight_flops for c, k in zip(ours, skipped, strict=True)) == pytest.approx(backward, rel=EXACT)


def test_prediction_layer_of_deepseek_by_hand() -> None:
    """arXiv:2412.19437 section 2.2: [norm(h); norm(embedding)] through one matrix, one more mixture block, and the shared head."""
    config = preset("deepseek-v3")

    def forward(**changes: int) -> float:
        return float(sum(c.model_forward_flops for c in costs({**config, **changes}, Numerics())))

    one_block = forward(num_hidden_layers=MAX_DEPTH + 1) - forward()
    h, tokens = config["hidden_size"], BATCH * SEQ_LEN
    join, head = 2 * tokens * 2 * h * h, 2 * tokens * h * config["vocab_size"]
    assert forward(num_nextn_predict_layers=1) - forward() == pytest.approx(one_block + join + head, rel=EXACT)


@pytest.mark.parametrize("name", ["palm-8b", "palm-62b", "palm-540b"])
def test_palm_by_the_formula_of_its_paper(name: str) -> None:
    """arXiv:2204.02311 appendix B: 6N + 12*L*H*Q*T FLOPs per token; N includes the shared embedding, whose product the head runs."""
    spec, seq_len = load_model(name), 2048
    formula = 6 * preset_record(name)["params"] + 12 * spec.num_layers * spec.num_attention_heads * spec.head_dim * seq_len
    norms = 6 * spec.hidden_size * (spec.num_layers + 1)
    assert model_flops_per_token(spec, seq_len, Numerics())["full"] == pytest.approx(formula - norms, rel=EXACT)
