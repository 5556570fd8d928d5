"""Parameter counts of small random configurations of the dense families against transformers' modules: difference 0.

Every switch that adds or removes a parameter is thrown both ways; presets only know the published combinations.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from planner.architectures import load_model
from planner.graph import count_params

torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[dev,reftrain]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[dev]'")

FLAG = (True, False)
LLAMA_WORDS: dict[str, tuple[Any, ...]] = {
    "num_hidden_layers": (1, 2, 7), "num_key_value_heads": (1, 2, 4), "head_dim": (8, 24), "intermediate_size": (40, 96), "attention_bias": FLAG,
}  # fmt: skip
GPT_WORDS: dict[str, tuple[Any, ...]] = {"num_hidden_layers": (1, 2, 7)}
CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": LLAMA_WORDS | {"mlp_bias": FLAG},
    "gemma": LLAMA_WORDS,
    "gemma2": LLAMA_WORDS,
    "gemma3_text": LLAMA_WORDS,
    "gpt2": {"n_layer": (1, 2), "n_inner": (None, 40), "n_positions": (16, 64)},
    "gpt_neox": GPT_WORDS | {"intermediate_size": (40, 96), "use_parallel_residual": FLAG, "attention_bias": FLAG},
    "opt": GPT_WORDS | {"ffn_dim": (40, 96), "max_position_embeddings": (16, 64), "enable_bias": FLAG, "_remove_final_layer_norm": FLAG},
    "bloom": {"n_layer": (1, 2)},
    "falcon": GPT_WORDS | {
        "bias": FLAG, "alibi": FLAG, "new_decoder_architecture": FLAG, "multi_query": FLAG, "parallel_attn": FLAG, "ffn_hidden_size": (None, 40),
        "num_kv_heads": (1, 2, 4), "num_ln_in_parallel_attn": (1, 2),
    },
}  # fmt: skip


def random_config(model_type: str, rng: random.Random) -> dict[str, Any]:
    """One configuration of the family, with sizes small enough to build in milliseconds."""
    drawn = {key: rng.choice(values) for key, values in CHOICES[model_type].items()}
    hidden = rng.choice((32, 64))
    config = {"model_type": model_type, "vocab_size": 101, "tie_word_embeddings": rng.choice(FLAG)} | drawn
    if model_type in ("gpt2", "bloom"):
        config |= {"n_head": 4, "n_embd" if model_type == "gpt2" else "hidden_size": hidden}
    else:
        config |= {"hidden_size": hidden, "num_attention_heads": 4}
    if model_type == "opt":
        config["word_embed_proj_dim"] = hidden
    if config.get("new_decoder_architecture"):
        config["parallel_attn"] = True  # the class builds a serial one and one with two norms in the old style, but can run neither
    elif model_type == "falcon":
        del config["num_ln_in_parallel_attn"]
    return config


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("model_type", CHOICES)
def test_random_configuration_counts_as_the_real_model(model_type: str, seed: int) -> None:
    config = random_config(model_type, random.Random(f"{model_type} {seed}"))
    values = {key: value for key, value in config.items() if key != "model_type"}
    built = transformers.AutoConfig.for_model(model_type, **values)
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(built)
    assert int(count_params(load_model(config))["total"]) == sum(p.numel() for p in module.parameters()), config
