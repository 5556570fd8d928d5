"""Parameter counts of every preset against the real modules of transformers, built on the meta device: difference 0."""

from __future__ import annotations

from typing import Any

import pytest

from planner.architectures import ARCHITECTURES, load_model, preset_names, preset_record
from planner.graph import count_params

torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[dev,reftrain]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[dev]'")

NO_CLASS = {"palm"}
"""Families that transformers does not have; checked by hand below."""
HAS_MORE_THAN_ITS_CLASS = {"mpt-1b", "mpt-3b", "mpt-7b", "mpt-13b", "mpt-30b", "mpt-70b"}
"""transformers' MPT knows neither learned positions nor biases; llm-foundry's own counts are compared below."""
LLM_FOUNDRY_COUNTS = {
    ("mpt-1b", 512): 1312804864, ("mpt-1b", 2048): 1315950592, ("mpt-1b", 65536): 1445974016, ("mpt-3b", 512): 2647905280,
    ("mpt-3b", 2048): 2651837440, ("mpt-3b", 65536): 2814366720, ("mpt-7b", 512): 6652567552, ("mpt-7b", 2048): 6658859008,
    ("mpt-7b", 8192): 6684024832, ("mpt-7b", 65536): 6918905856, ("mpt-13b", 512): 12846090240, ("mpt-13b", 2048): 12853954560,
    ("mpt-13b", 32768): 13011240960, ("mpt-30b", 512): 29964204032, ("mpt-30b", 2048): 29975214080, ("mpt-30b", 8192): 30019254272,
    ("mpt-70b", 2048): 64862437376,
}  # fmt: skip
"""(preset, max_seq_len) -> parameters as printed in mosaicml/llm-foundry @4953182, scripts/train/benchmarking/README.md."""
HEADS = {"bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}


def real_params(config: dict[str, Any]) -> int:
    """Parameters of the module that transformers builds from the very same keys; shared ones count once."""
    values = dict(config)
    model_type = values.pop("model_type")
    built = transformers.AutoConfig.for_model(model_type, **values)
    with torch.device("meta"):
        module = getattr(transformers, HEADS.get(model_type, "AutoModelForCausalLM")).from_config(built)
    count = sum(p.numel() for p in module.parameters())
    # transformers 5 ties T5's head whatever the configuration says; the checkpoints of T5 1.1 and Flan hold a head of their own.
    has_own_head = model_type == "t5" and config.get("tie_word_embeddings") is False
    return count + (config["vocab_size"] * config["d_model"] if has_own_head else 0)


@pytest.mark.parametrize("name", preset_names())
def test_preset_has_exactly_the_parameters_of_the_real_model(name: str) -> None:
    config = preset_record(name)["config"]
    if config["model_type"] in NO_CLASS:
        pytest.skip(f"transformers has no {config['model_type']}: see test_palm_by_hand")
    if name in HAS_MORE_THAN_ITS_CLASS:
        pytest.skip("transformers' class has neither its positions nor its biases: see test_mpt_has_the_parameters_that_llm_foundry_printed")
    assert int(count_params(load_model(name))["total"]) == real_params(config)


INNER = {"gemma3"}
"""With vision: read as its text part, which is a family of its own."""


def test_every_family_is_covered_by_a_preset() -> None:
    assert {preset_record(name)["config"]["model_type"] for name in preset_names()} == set(ARCHITECTURES) - INNER


@pytest.mark.parametrize(("name", "h", "layers", "heads"), [("palm-8b", 4096, 32, 16), ("palm-62b", 8192, 64, 32), ("palm-540b", 18432, 118, 48)])
def test_palm_by_hand(name: str, h: int, layers: int, heads: int) -> None:
    """arXiv:2204.02311: multi-query attention with heads of 256, SwiGLU of width 4h, one norm per block, shared embedding."""
    attention = h * heads * 256 * 2 + h * 256 * 2
    block = attention + 3 * h * 4 * h + h
    assert int(count_params(load_model(name))["total"]) == 256000 * h + layers * block + h


@pytest.mark.parametrize(("name", "max_seq_len"), LLM_FOUNDRY_COUNTS)
def test_mpt_has_the_parameters_that_llm_foundry_printed(name: str, max_seq_len: int) -> None:
    """The position table has a row per token, so each sequence length has a count of its own."""
    config = {**preset_record(name)["config"], "max_seq_len": max_seq_len}
    assert int(count_params(load_model(config))["total"]) == LLM_FOUNDRY_COUNTS[name, max_seq_len]


VARIANTS: list[dict[str, Any]] = [
    {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 101,
        "attention_bias": True,
        "mlp_bias": True,
    },
    {"model_type": "mpt", "d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 101, "attn_config": {"alibi": True}},
    {"model_type": "bloom", "n_embed": 64, "n_layer": 2, "num_attention_heads": 4, "vocab_size": 101},
    {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 101, "n_positions": 32, "n_inner": 100},
    {
        "model_type": "falcon",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 101,
        "parallel_attn": False,
        "multi_query": False,
        "bias": True,
        "alibi": True,
    },
    {
        "model_type": "falcon",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "vocab_size": 101,
        "new_decoder_architecture": True,
        "bias": True,
    },
    {
        "model_type": "gpt_neox",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 101,
        "use_parallel_residual": False,
    },
    {
        "model_type": "opt",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 96,
        "vocab_size": 101,
        "max_position_embeddings": 32,
        "word_embed_proj_dim": 64,
        "enable_bias": False,
    },
    {
        "model_type": "qwen2_moe",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 101,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [0, 1],
    },
    {
        "model_type": "qwen3_moe",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 101,
        "tie_word_embeddings": True,
    },
    {
        "model_type": "deepseek_v2",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 101,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    },
    {
        "model_type": "deepseek_v3",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 101,
        "q_lora_rank": 20,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 12,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 2,
        "n_group": 2,
        "topk_group": 1,
    },
    {
        "model_type": "t5",
        "d_model": 64,
        "d_kv": 24,
        "d_ff": 96,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "vocab_size": 101,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    {"model_type": "t5", "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4, "vocab_size": 101},
]


@pytest.mark.parametrize(
    "config",
    VARIANTS,
    ids=lambda c: "-".join(str(v) for k, v in c.items() if k in ("model_type", "n_inner", "parallel_attn", "num_layers", "mlp_only_layers")),
)
def test_unusual_switches_count_as_in_the_real_model(config: dict[str, Any]) -> None:
    assert int(count_params(load_model(config))["total"]) == real_params(config)
