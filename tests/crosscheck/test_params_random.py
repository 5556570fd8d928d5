"""Parameters of random small configurations, every switch of every family, against the modules that transformers builds from the same keys."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.architectures import ARCHITECTURES, load_model
from planner.graph import count_params

torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[dev,reftrain]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[dev]'")

NO_CLASS = {"palm", "gemma3", "mpt"}
"""Not in transformers; read as another family; its class ignores the switches (see test_params.py)."""
HEADS = {"bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}

LLAMA_WORDS = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "hidden": "hidden_size", "ffn": "intermediate_size"}
FLAG = (True, False)
GQA: dict[str, tuple[Any, ...]] = {"tie_word_embeddings": FLAG, "max_position_embeddings": (16, 32)}
MIXTURE: dict[str, tuple[Any, ...]] = {**GQA, "num_experts_per_tok": (1, 2)}
QWEN_MIXTURE: dict[str, tuple[Any, ...]] = {**GQA, "decoder_sparse_step": (1, 2, 3), "mlp_only_layers": ([], [0], [0, 1])}
LATENT: dict[str, tuple[Any, ...]] = {
    "tie_word_embeddings": FLAG, "attention_bias": FLAG, "first_k_dense_replace": (0, 1, 2, 5), "q_lora_rank": (None, 20), "n_shared_experts": (1, 2),
    "v_head_dim": (8, 12),
}  # fmt: skip
LATENT_SIZES = {
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "n_group": 2, "topk_group": 1,
}  # fmt: skip
WIDE: dict[str, tuple[Any, ...]] = {"head_dim": (16, 24), "attention_bias": FLAG}

FAMILIES: dict[str, tuple[dict[str, str], dict[str, Any], dict[str, tuple[Any, ...]]]] = {
    "llama": (LLAMA_WORDS, {}, {**GQA, **WIDE, "mlp_bias": FLAG}),
    "mistral": (LLAMA_WORDS, {}, {**GQA, "head_dim": (16, 24), "sliding_window": (None, 8)}),
    "qwen2": (LLAMA_WORDS, {}, GQA),
    "qwen3": (LLAMA_WORDS, {}, {**GQA, **WIDE}),
    "gemma": (LLAMA_WORDS, {}, {**GQA, **WIDE}),
    "gemma2": (LLAMA_WORDS, {}, {**GQA, **WIDE, "sliding_window": (4, 8)}),
    "gemma3_text": (LLAMA_WORDS, {}, {**GQA, **WIDE, "sliding_window": (4, 8)}),
    "gpt_neox": (LLAMA_WORDS, {}, {"tie_word_embeddings": FLAG, "attention_bias": FLAG, "use_parallel_residual": FLAG}),
    "gpt2": (
        {"layers": "n_layer", "heads": "n_head", "hidden": "n_embd"}, {},
        {"n_positions": (16, 64), "n_inner": (None, 50), "tie_word_embeddings": FLAG},
    ),
    "bloom": ({"layers": "n_layer", "heads": "n_head", "hidden": "hidden_size"}, {}, {"tie_word_embeddings": FLAG}),
    "opt": (
        LLAMA_WORDS | {"ffn": "ffn_dim", "projection": "word_embed_proj_dim"}, {},
        {"enable_bias": FLAG, "tie_word_embeddings": FLAG, "max_position_embeddings": (16, 32), "_remove_final_layer_norm": FLAG},
    ),
    "falcon": (
        {"layers": "num_hidden_layers", "heads": "num_attention_heads", "hidden": "hidden_size"}, {},
        {"num_kv_heads": (1, 2), "multi_query": FLAG, "parallel_attn": FLAG, "new_decoder_architecture": FLAG, "bias": FLAG, "alibi": FLAG,
         "ffn_hidden_size": (50,), "num_ln_in_parallel_attn": (1, 2), "tie_word_embeddings": FLAG},
    ),
    "mixtral": (LLAMA_WORDS, {"num_local_experts": 4}, {**MIXTURE, "head_dim": (16, 24), "sliding_window": (None, 8)}),
    "gpt_oss": (LLAMA_WORDS, {"num_local_experts": 4, "num_experts_per_tok": 2}, {**GQA, **WIDE, "sliding_window": (4, 8)}),
    "qwen2_moe": (
        LLAMA_WORDS, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
        {**QWEN_MIXTURE, "qkv_bias": FLAG},
    ),
    "qwen3_moe": (LLAMA_WORDS, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}, {**QWEN_MIXTURE, **WIDE}),
    "deepseek_v2": (LLAMA_WORDS, LATENT_SIZES, LATENT),
    "deepseek_v3": (LLAMA_WORDS, LATENT_SIZES, LATENT),
    "bert": (LLAMA_WORDS, {}, {"type_vocab_size": (1, 2, 3), "max_position_embeddings": (16, 32)}),
    "t5": (
        {"layers": "num_layers", "heads": "num_heads", "hidden": "d_model", "ffn": "d_ff"}, {"d_kv": 12},
        {"num_decoder_layers": (1, 2, 3), "feed_forward_proj": ("relu", "gated-gelu", "gated-silu"), "relative_attention_num_buckets": (16, 32)},
    ),
}  # fmt: skip
"""model_type -> (its words for the sizes, fixed keys, switches: each left out or one of these)."""


@st.composite
def configurations(draw: st.DrawFn, model_type: str) -> dict[str, Any]:
    """A small configuration; sizes that differ, so that no two of them can be mistaken for one another."""
    words, fixed, switches = FAMILIES[model_type]
    heads, width = draw(st.sampled_from([2, 4, 6])), draw(st.sampled_from([8, 16]))
    sizes = {
        "layers": draw(st.integers(1, 7)),
        "heads": heads,
        "hidden": heads * width,
        "projection": heads * width,
        "ffn": draw(st.integers(33, 64)),
    }
    config = {"model_type": model_type, "vocab_size": 101, **{words[size]: value for size, value in sizes.items() if size in words}, **fixed}
    if model_type.startswith("deepseek"):
        config["num_key_value_heads"] = heads
    elif "intermediate_size" in config and model_type not in ("bert", "gpt_neox"):
        config["num_key_value_heads"] = draw(st.sampled_from([1, 2, heads]))
    for key, values in switches.items():
        value = draw(st.sampled_from(["left out", *values]))
        if value != "left out":
            config[key] = value
    if config.get("new_decoder_architecture"):
        config["parallel_attn"] = True  # the class builds a serial one and one with two norms in the old style, but can run neither
    elif model_type == "falcon":
        config.pop("num_ln_in_parallel_attn", None)
    return config


def real_params(config: dict[str, Any]) -> int:
    """Parameters of the module that transformers builds from the same keys."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    built = transformers.AutoConfig.for_model(config["model_type"], **values)
    with torch.device("meta"):
        module = getattr(transformers, HEADS.get(config["model_type"], "AutoModelForCausalLM")).from_config(built)
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("model_type", FAMILIES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_switch_counts_as_in_the_real_model(model_type: str, data: st.DataObject) -> None:
    config = data.draw(configurations(model_type))
    assert int(count_params(load_model(config))["total"]) == real_params(config)


def test_every_family_has_its_switches_here() -> None:
    assert set(FAMILIES) == set(ARCHITECTURES) - NO_CLASS
