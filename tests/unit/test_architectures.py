"""Families: published configuration files read as they are, wrong ones refused in HF's words, blocks that differ where they should."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from planner.architectures import ARCHITECTURES, load_model, model_ops, preset_names, preset_record
from planner.attention_op import Attention
from planner.errors import InputError
from planner.graph import count_params
from planner.model_spec import ModelSpec

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 100, "max_position_embeddings": 128,
}  # fmt: skip


def problems(config: object) -> str:
    with pytest.raises(InputError) as caught:
        load_model(config)  # type: ignore[arg-type]
    return str(caught.value)


def attempt(config: object) -> ModelSpec | str:
    """The model, or why it was refused."""
    try:
        return load_model(config)  # type: ignore[arg-type]
    except InputError as error:
        return str(error)


def same_but_name(left: ModelSpec, right: ModelSpec) -> bool:
    untold = {"name": "", "assumptions": ()}
    return left.model_copy(update=untold) == right.model_copy(update=untold)


# The keys that decide something, as the files on the hub spell them, and what surrounds them that could be mistaken.
PUBLISHED: dict[str, dict[str, Any]] = {
    "bloom-560m": {
        "model_type": "bloom", "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16, "n_inner": None, "vocab_size": 250880,
        "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "hidden_dropout": 0.0, "attention_dropout": 0.0, "offset_alibi": 100,
        "pretraining_tp": 1, "skip_bias_add": True, "seq_length": 2048,
    },
    "gemma-3-12b": {
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "image_token_index": 262144, "mm_tokens_per_image": 256,
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 3840, "intermediate_size": 15360, "num_attention_heads": 16, "num_hidden_layers": 48,
            "num_key_value_heads": 8, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16},
    },
    "gemma-3-4b": {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
    },
    "qwen2-7b": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 131072, "max_window_layers": 28, "sliding_window": 131072,
        "use_sliding_window": False, "attention_dropout": 0.0, "tie_word_embeddings": False, "rope_theta": 1000000.0,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36, "num_attention_heads": 32,
        "num_hidden_layers": 36, "num_key_value_heads": 8, "rope_scaling": None, "sliding_window": None, "use_sliding_window": False,
        "tie_word_embeddings": False, "vocab_size": 151936,
    },
    "llama-3.1-8b": {
        "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rope_scaling": {"factor": 8.0, "rope_type": "llama3"}, "tie_word_embeddings": False,
        "vocab_size": 128256, "torch_dtype": "bfloat16",
    },
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
        "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "attention_bias": True, "experts_per_token": 4, "head_dim": 64, "hidden_size": 2880, "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072, "num_attention_heads": 64,
        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32, "sliding_window": 128,
        "swiglu_limit": 7.0, "tie_word_embeddings": False, "vocab_size": 201088,
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2", "attention_bias": False, "aux_loss_alpha": 0.001, "first_k_dense_replace": 1, "hidden_size": 2048,
        "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 1408, "moe_layer_freq": 1,
        "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "num_attention_heads": 16, "num_experts_per_tok": 6,
        "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "tie_word_embeddings": False, "topk_group": 1, "v_head_dim": 128, "vocab_size": 102400,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_file_reads_as_the_preset(name: str, tmp_path: Path) -> None:
    file = tmp_path / name / "config.json"
    file.parent.mkdir()
    file.write_text(json.dumps(PUBLISHED[name]))
    spec = load_model(str(file))
    assert spec.name == name
    assert same_but_name(spec, load_model(name))
    assert count_params(spec)["total"] == preset_record(name)["params"]


def test_what_is_left_out_is_said() -> None:
    assert "vision" in load_model(PUBLISHED["gemma-3-12b"]).assumptions[0]
    assert "prediction" in load_model(preset_record("deepseek-v3")["config"] | {"num_nextn_predict_layers": 1}).assumptions[0]
    assert load_model("llama-3.1-8b").assumptions == ()


def test_released_mpt_has_alibi_though_its_file_asks_for_learned_positions() -> None:
    """config.json of mosaicml/mpt-7b: learned_pos_emb true beside alibi true."""
    released = {
        "model_type": "mpt", "d_model": 4096, "n_heads": 32, "n_layers": 32, "expansion_ratio": 4, "max_seq_len": 2048, "vocab_size": 50432,
        "no_bias": True, "learned_pos_emb": True, "attn_config": {"alibi": True, "attn_impl": "torch", "attn_pdrop": 0, "qk_ln": False},
    }  # fmt: skip
    spec = load_model(released)
    assert spec.position == "alibi"
    assert count_params(spec)["total"] == 6_649_286_656, "the count of mosaicml/mpt-7b"


def test_prediction_layer_of_deepseek_v3_comes_on_top_of_the_published_671b() -> None:
    """arXiv:2412.19437 section 4.2 and its repository: 671B, and 14B of the prediction module with its copies of embedding and head."""
    config = preset_record("deepseek-v3")["config"]
    main = load_model(config)
    more = load_model(config | {"num_nextn_predict_layers": 1})
    extra = count_params(more)["total"] - count_params(main)["total"]
    copies = 2 * main.vocab_size * main.hidden_size
    assert extra + copies == pytest.approx(14e9, rel=0.05)
    assert len(model_ops(more).layers) == 62


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("llama-3.1-8b", {0: 32}),
        ("mistral-7b", {4096: 32}),
        ("gemma-2-2b", {4096: 13, 0: 13}),
        ("gemma-3-27b", {1024: 52, 0: 10}),
        ("gpt-oss-120b", {128: 18, 0: 18}),
    ],
)
def test_windows_by_layer(name: str, windows: dict[int, int]) -> None:
    listed = model_ops(load_model(name))
    found: dict[int, int] = {}
    for layer in listed.layers:
        window = next(op.window for op in listed.blocks[layer][1] if isinstance(op, Attention))
        found[window] = found.get(window, 0) + 1
    assert found == windows


def test_first_layer_of_two_slides_and_the_second_is_global() -> None:
    spec = load_model("gemma-2-2b")
    assert [spec.window_at(layer) for layer in range(4)] == [4096, 0, 4096, 0]


def test_layer_types_decide() -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    spec = load_model(LLAMA | {"model_type": "mistral", "sliding_window": 8, "layer_types": kinds})
    assert [spec.window_at(layer) for layer in range(4)] == [8, 8, 0, 8]
    spec = load_model(LLAMA | {"model_type": "mistral", "sliding_window": 8, "layer_types": ["full_attention"] * 4})
    assert spec.sliding_window == 0
    assert "layer_types" in problems(LLAMA | {"model_type": "mistral", "sliding_window": 8, "layer_types": kinds[:3]})
    assert "layer_types" in problems(LLAMA | {"model_type": "mistral", "sliding_window": 8, "layer_types": ["full_attention", *kinds[:3]]})
    assert "layer_types" in problems(LLAMA | {"model_type": "mistral", "sliding_window": 8, "layer_types": ["linear_attention"] * 4})


@pytest.mark.parametrize("name", preset_names())
def test_ops_and_blocks_are_told_apart_by_name(name: str) -> None:
    listed = model_ops(load_model(name))
    for part in (listed.embedding, listed.head, *(ops for _, ops in listed.blocks)):
        names = [op.name for op in part]
        assert len(set(names)) == len(names)
    assert len({block for block, _ in listed.blocks}) == len(listed.blocks)
    assert set(listed.layers) == set(range(len(listed.blocks)))


def one_of_each_family() -> dict[str, dict[str, Any]]:
    configs: dict[str, dict[str, Any]] = {}
    for name in preset_names():
        config = preset_record(name)["config"]
        configs.setdefault(config["model_type"], config)
    return configs


NONSENSE: list[Any] = [
    0, -1, 1, 3, 7, 10**9, 10**13, -(10**400), 10**400, 1e308, math.nan, math.inf, 1.5, True, False, "abc", "4096", "", [], [1], ["a"], {},
    {"a": 1}, b"x",
]  # fmt: skip


@pytest.mark.parametrize("model_type", sorted(one_of_each_family()))
def test_nonsense_in_any_key_is_refused_in_its_name_or_counts(model_type: str) -> None:
    config = one_of_each_family()[model_type]
    for key in config:
        refused = 0
        for value in NONSENSE:
            found = attempt(config | {key: value})
            if isinstance(found, str):
                refused += 1
                assert key in found
            else:
                counts = count_params(found)
                assert all(0 < count < math.inf for count in counts.values())
                assert counts["active"] <= counts["total"]
        assert refused > 5, key


@pytest.mark.parametrize("model_type", sorted(one_of_each_family()))
def test_a_key_left_out_is_named_or_has_a_default(model_type: str) -> None:
    config = one_of_each_family()[model_type]
    refused = {key: found for key in config if isinstance(found := attempt({k: v for k, v in config.items() if k != key}), str)}
    assert all(key in message for key, message in refused.items())
    assert len(refused) >= 4
    assert {"model_type", "vocab_size"} <= set(refused)


@pytest.mark.parametrize("model_type", sorted(one_of_each_family()))
def test_a_misspelt_key_is_not_defaulted_in_silence(model_type: str) -> None:
    config = one_of_each_family()[model_type]
    for key in config:
        if len(key) < 6 or key == "model_type":
            continue
        typo = key[:-1]
        message = problems({(typo if k == key else k): v for k, v in config.items()})
        assert key in message
        assert typo in message or "is required" in message


def test_all_mistakes_at_once() -> None:
    message = problems(LLAMA | {"hidden_size": 0, "vocab_size": "many", "num_key_value_heads": 3, "tie_word_embeddings": 1})
    for key in ("hidden_size", "vocab_size", "num_key_value_heads", "tie_word_embeddings"):
        assert f"model.{key} = " in message


@pytest.mark.parametrize(("wrong", "right"), [("lama", "llama"), ("gpt-neox", "gpt_neox"), ("Qwen3", "qwen3"), ("deepseek_v4", "deepseek_v3")])
def test_unknown_model_type_names_the_nearest_first_and_then_all(wrong: str, right: str) -> None:
    message = problems(LLAMA | {"model_type": wrong})
    assert message.index(right) < message.index("known:")
    for family in ARCHITECTURES:
        assert family in message


@pytest.mark.parametrize("wrong", [None, 7, [], {"a": 1}, "", "x" * 1000, True])
def test_model_type_of_another_kind(wrong: object) -> None:
    assert "model_type" in problems(LLAMA | {"model_type": wrong})


def test_impossible_combinations_name_hf_keys() -> None:
    assert "num_attention_heads" in problems(LLAMA | {"num_attention_heads": 5, "num_key_value_heads": 5})
    assert "num_key_value_heads = 3" in problems(LLAMA | {"num_key_value_heads": 3})
    mixtral = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 5}
    assert "num_experts_per_tok = 5" in problems(mixtral)
    assert "num_local_experts = 4" in problems(mixtral)
    falcon = {"model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    assert "num_kv_heads = 3" in problems(falcon | {"new_decoder_architecture": True, "num_kv_heads": 3})
    assert "text_config" in problems({"model_type": "gemma3", "hidden_size": 64})
    assert "moe_layer_freq" in problems(preset_record("deepseek-v2")["config"] | {"moe_layer_freq": 2})
    assert "mlp_only_layers" in problems(preset_record("qwen3-30b-a3b")["config"] | {"mlp_only_layers": [5]})
