"""The architecture of a published run, in the words of its family's config.json."""

from __future__ import annotations

import re
from typing import Any

from planner.errors import InputError
from planner.measurements import Measurement

__all__ = ["inferred_of_model", "model_of", "refuse"]

GELU_DROPOUT = 0.1
"""Megatron-LM's default for attention and hidden states; NeMo's recipes train without."""
SERIAL_BLOCK = {"use_parallel_residual": False, "attention_bias": False}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt": ("gpt2", {}), "gpt2": ("gpt2", {}), "gopher": ("gpt2", {}),
    "mpt": ("mpt", {"learned_pos_emb": True, "no_bias": False}),
    "opt": ("opt", {}), "bloom": ("bloom", {}),
    "llama": ("llama", {}), "maxtext": ("gpt_neox", SERIAL_BLOCK), "gemma-like": ("llama", {}), "palm": ("palm", {}),
    "qwen2": ("qwen2", {}), "qwen3": ("qwen3", {}), "qwen3-moe": ("qwen3_moe", {}), "qwen2-moe": ("qwen2_moe", {}),
    "gemma": ("gemma", {}), "gemma2": ("gemma2", {}), "gemma3": ("gemma3_text", {}),
    "gpt-neox": ("gpt_neox", {}), "phi": ("gpt_neox", {}), "falcon": ("falcon", {}),
    "nemotron": ("gpt_neox", SERIAL_BLOCK), "gpt2-modern": ("gpt_neox", SERIAL_BLOCK), "gpt2-rope": ("gpt_neox", SERIAL_BLOCK),
    "gpt-grouped": ("gpt_neox", SERIAL_BLOCK),
    "mixtral-moe": ("mixtral", {}), "grok-moe": ("mixtral", {}), "llama4-moe": ("qwen2_moe", {}),
    "gpt-oss-moe": ("gpt_oss", {}), "deepseek-moe": ("deepseek_v3", {}), "gpt-moe": ("mixtral", {}), "gpt-moe-shared": ("qwen2_moe", {}),
}  # fmt: skip
"""arch_family -> (model_type, keys). Stand-ins with the same matmuls: Nemotron and modern GPT-2 as a serial GPT-NeoX, Grok as
Mixtral, Llama 4 as Qwen's mixture with a shared expert, Gopher as GPT, GPT with fewer key-value heads as a serial GPT-NeoX, Megatron's GPT
with experts as Mixtral, as Qwen's mixture (a shared expert, dense layers) or as DeepSeek (latent attention)."""
STAND_INS = ("gopher", "maxtext", "gemma-like", "nemotron", "gpt2-modern", "gpt2-rope", "phi", "grok-moe", "llama4-moe", "gpt-moe")
NOTED = {
    "moe_ffn_hidden": r"moe ffn (\d+)", "shared_ffn_hidden": r"shared expert (\d+)", "num_dense_layers": r"moe layer freq \(\[0\]\*(\d+)",
    "head_dim": r"kv-channels (\d+)", "mtp_layers": r"mtp layers (\d+)", "q_lora_rank": r"q-lora-rank=(\d+)",
    "kv_lora_rank": r"kv-lora-rank=(\d+)", "qk_nope_head_dim": r"qk-head-dim=(\d+)", "qk_rope_head_dim": r"qk-pos-emb-head-dim=(\d+)",
    "v_head_dim": r"v-head-dim=(\d+)",
}  # fmt: skip
"""Column -> how notes say it where the column is blank, in the words of Megatron-LM's options."""
NAMED_PARAMS = re.compile(r"\b(\d+(?:\.\d+)?)b\b")


def refuse(row: Measurement, column: str, rule: str) -> InputError:
    """Why a row cannot be expressed."""
    return InputError.single(column, row.values.get(column), rule, "leave the row out", f"row {row.id}")


def _with_noted(row: Measurement) -> Measurement:
    """A GPT or Mixtral with experts, with blank columns filled from its notes, under the name of its stand-in."""
    found = {column: match[1] for column, pattern in NOTED.items() if not row.text(column) and (match := re.search(pattern, row.text("notes")))}
    if row.text("arch_family") != "gpt-moe" and not (row.text("arch_family") == "mixtral-moe" and found):
        return row
    values = row.values | found
    needs_shared = values.get("shared_ffn_hidden", "0") != "0" or values.get("num_dense_layers", "0") != "0"
    family = "deepseek-moe" if values.get("kv_lora_rank") else "gpt-moe-shared" if needs_shared else "gpt-moe"
    return Measurement(values | {"arch_family": family, "gated": "false" if "no glu" in row.text("notes") else "true"})


def _layers_of(row: Measurement) -> int | None:
    """Blocks of a GPT of which width and size are known: what embeddings leave of its parameters, over 12 h^2.

    Of the numbers near to it the one that pipeline stages share evenly, with or without embedding and head as two blocks more.
    """
    named, width = NAMED_PARAMS.search(row.text("model")), row.number("ffn_hidden")
    if row.text("arch_family") not in ("gpt", "gpt2") or row.number("vocab") is None or not (named or row.number("params_total")):
        return None
    hidden, pp = row.count("hidden_size"), row.count("pp", 1)
    params = row.number("params_total") or float(named[1] if named else 0) * 1e9
    near = (params - row.count("vocab") * hidden) / (4 * hidden**2 + 2 * hidden * (width or 4 * hidden))
    even = [n for n in range(1, int(2 * near) + 2 * pp) if n % pp == 0 or (n + 2) % pp == 0]
    return min(even, key=lambda n: abs(n - near)) if near >= 1 else None


USUAL_HEAD_DIM = 128


def _heads_of(row: Measurement) -> int | None:
    """Heads of a GPT whose notes leave them out: those whose width is nearest to the usual one, shared evenly by tensor-parallel ranks."""
    if row.text("arch_family") not in ("gpt", "gpt2"):
        return None
    hidden, tp = row.count("hidden_size"), row.count("tp", 1)
    even = [n for n in range(tp, hidden + 1, tp) if hidden % n == 0]
    return min(even, key=lambda n: abs(hidden / n - USUAL_HEAD_DIM)) if even else None


def inferred_of_model(row: Measurement) -> list[str]:
    """What of the architecture was not published, in words, for a row that can be expressed."""
    said, family = [], row.text("arch_family")
    if not row.text("num_layers"):
        said.append(f"num_layers {_layers_of(row)}: from the parameters in the model's name, its width and pipeline stages")
    if not row.text("num_heads"):
        said.append(f"num_heads {_heads_of(row)}: heads about {USUAL_HEAD_DIM} wide")
    if not row.text("vocab"):
        said.append(f"vocab {_vocab_of(row)}: what the published parameters leave over")
    if not row.text("ffn_hidden"):
        said.append("ffn_hidden: four times hidden_size")
    is_grouped = family in ("gpt", "gpt2") and row.text("num_kv_heads") not in ("", row.text("num_heads"))
    if family in STAND_INS or is_grouped:
        stand_in = "gpt-grouped" if is_grouped else _with_noted(row).text("arch_family")
        said.append(f"architecture {family}: {FAMILIES[stand_in][0]}, with equal matmuls")
    return said


def model_of(row: Measurement, has_dropout: bool) -> dict[str, Any]:
    """The architecture in the words of its family's config.json."""
    row = _with_noted(row)
    family = row.text("arch_family")
    if family not in FAMILIES:
        raise refuse(row, "arch_family", "is no architecture that the planner knows" if family else "was not published")
    model_type, extra = FAMILIES[family]
    if family == "maxtext" and _is_gated(row):
        model_type, extra = FAMILIES["llama"]
    hidden, layers = row.count("hidden_size"), row.count("num_layers", _layers_of(row))
    heads = row.count("num_heads", _heads_of(row))
    width, kv_heads = row.count("ffn_hidden", 4 * hidden), row.count("num_kv_heads", heads)
    common: dict[str, Any] = {"model_type": model_type, "vocab_size": row.count("vocab", _vocab_of(row)), **extra}
    if row.text("tied_embeddings") in ("true", "false"):
        common["tie_word_embeddings"] = row.text("tied_embeddings") == "true"
    positions = row.count("seq_len")
    dropout = GELU_DROPOUT if has_dropout else 0.0
    dropped = {"attention_dropout": dropout, "hidden_dropout": dropout}
    if model_type == "gpt2" and kv_heads != heads:
        model_type, serial = FAMILIES["gpt-grouped"]
        common |= {**serial, "model_type": model_type, **dropped}
    if model_type == "gpt2":
        return common | {
            "n_embd": hidden, "n_layer": layers, "n_head": heads, "n_inner": width, "n_positions": positions,
            "attn_pdrop": dropout, "resid_pdrop": dropout,
        }  # fmt: skip
    if model_type == "mpt":
        ratio = {} if width == 4 * hidden else {"expansion_ratio": width // hidden}
        return common | ratio | {"d_model": hidden, "n_layers": layers, "n_heads": heads, "max_seq_len": positions}
    if model_type == "bloom":
        return common | {"hidden_size": hidden, "n_layer": layers, "n_head": heads, "seq_length": positions}
    sizes: dict[str, Any] = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": positions}
    if model_type == "falcon":
        return (
            common
            | sizes
            | {"ffn_hidden_size": width, "num_kv_heads": kv_heads, "multi_query": kv_heads == 1, "new_decoder_architecture": kv_heads > 1}
        )
    if model_type == "opt":
        return common | sizes | {"ffn_dim": width}
    sizes |= {"num_key_value_heads": kv_heads, "intermediate_size": width}
    if row.text("gated"):
        sizes |= dropped
    if row.number("head_dim"):
        sizes["head_dim"] = row.count("head_dim")
    return common | sizes | (_experts(row, model_type, width) if row.number("num_experts") else {})


def _vocab_of(row: Measurement) -> int | None:
    """Words of a Llama-like model whose parameters were published without them: what its blocks leave over, to the next 1024."""
    total, is_tied = row.number("params_total"), row.text("tied_embeddings") == "true"
    if total is None or row.number("num_experts") or row.text("arch_family") != "llama":
        return None
    hidden, layers, heads = row.count("hidden_size"), row.count("num_layers"), row.count("num_heads")
    attention = 2 * hidden * row.count("head_dim", hidden // heads) * (heads + row.count("num_kv_heads", heads))
    left = total - layers * (attention + 3 * hidden * row.count("ffn_hidden", 4 * hidden))
    return round(left / (hidden * (1 if is_tied else 2)) / 1024) * 1024 if left > 0 else None


def _is_gated(row: Measurement) -> bool:
    """Whether the published parameter count is nearer to three matrices per feed-forward layer than to two.

    MaxText's `base.yml` changed from ReLU to a gated layer between the runs of its README.
    """
    hidden, layers, width, total = row.count("hidden_size"), row.count("num_layers"), row.count("ffn_hidden"), row.number("params_total")
    head_dim = row.count("head_dim", hidden // row.count("num_heads"))
    attention = 2 * hidden * head_dim * (row.count("num_heads") + row.count("num_kv_heads", row.count("num_heads")))
    plain = layers * (attention + 2 * hidden * width) + row.count("vocab") * hidden
    return total is not None and total - plain > layers * hidden * width / 2


def _experts(row: Measurement, model_type: str, width: int) -> dict[str, Any]:
    experts, per_token = row.count("num_experts"), row.count("top_k")
    inner = row.count("moe_ffn_hidden", width)
    gated = {"is_gated": False} if row.text("gated") == "false" else {}
    shared = 0 if row.text("shared_ffn_hidden") in ("", "0") else row.count("shared_ffn_hidden")
    dense = 0 if row.text("num_dense_layers") in ("", "0") else row.count("num_dense_layers")
    if model_type in ("mixtral", "gpt_oss"):
        return {"num_local_experts": experts, "num_experts_per_tok": per_token, "intermediate_size": inner} | gated
    if model_type == "deepseek_v3":
        return {
            "n_routed_experts": experts, "num_experts_per_tok": per_token, "moe_intermediate_size": inner, "n_shared_experts": shared // inner,
            "first_k_dense_replace": dense, "q_lora_rank": row.count("q_lora_rank", 0), "kv_lora_rank": row.count("kv_lora_rank"),
            **{name: row.count(name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
            **({"num_nextn_predict_layers": row.count("mtp_layers")} if row.text("mtp_layers") else {}),
        }  # fmt: skip
    mixture: dict[str, Any] = {
        "num_experts": experts, "num_experts_per_tok": per_token, "moe_intermediate_size": inner, "mlp_only_layers": list(range(dense)),
        "decoder_sparse_step": row.count("moe_every", 1),
    }  # fmt: skip
    if model_type == "qwen2_moe":
        mixture |= {"shared_expert_intermediate_size": shared or inner, "qkv_bias": False}
    return mixture | gated
