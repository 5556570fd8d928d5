"""Published measurements: rows of a CSV file, and each row as a request.

In: a table with the columns of data/measurements/anchors.csv (blank where nothing was published). Out: `Measurement`s, and
for each a request for `planner.estimate`. A row whose configuration cannot be expressed raises InputError, whose text is
the reason for skipping it.

What a blank means: tp, pp, cp, ep, vpp: 1, unless nothing at all is known of the layout; sequence parallelism: on where
Megatron-Core or NeMo split tensors, off elsewhere; optimizer: AdamW; recompute: none; ZeRO: none, but 1 with Megatron-DeepSpeed and
NeMo; LoRA: the adapters that the framework puts on by default.
"""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.errors import InputError
from planner.files import read_text

__all__ = ["REQUIRED_COLUMNS", "Measurement", "read_rows", "stack_of", "to_request"]

MAX_BYTES = 32 << 20
REQUIRED_COLUMNS = ("id", "source", "framework", "year", "arch_family", "seq_len", "accelerator", "num_devices", "precision", "global_batch_size")

STACKS: tuple[tuple[str, str], ...] = (
    # First match wins; a year in the name applies up to and including it.
    (r"llm-foundry|composer", "llm-foundry"),
    (r"torchtitan", "torchtitan"),
    (r"maxtext|paxml|jax|levanter|xla|neuron", "maxtext"),
    (r"hf trainer|zero|(?<!megatron-)deepspeed|xtuner|colossalai", "deepspeed"),
    (r"megatron-deepspeed", "megatron-deepspeed"),
    (r"megatron-lm|metaseq", "megatron-2021"),
    (r"nemo|megatron-bridge|nvidia|ngc", "nemo"),
    (r"megatron|megascale|hai-llm|meta internal", "megatron-core"),
    (r"reftrain", "reftrain"),
    (r"litgpt", "litgpt"),
    (r"nanotron", "nanotron"),
    (r"", "torch-eager"),
)
LAST_YEAR_OF_UNFUSED_ATTENTION = 2022
"""Megatron's flash attention arrived in 2023; rows of the same name from then on run on Megatron-Core or DeepSpeed."""
UNFUSED_STACKS = {"megatron-2021": "megatron-core", "megatron-deepspeed": "deepspeed"}
"""And what goes by their names since."""
ZERO_1_STACKS = ("megatron-deepspeed", "nemo")
"""BigScience's scripts set ZERO_STAGE=1, NeMo's recipes use_distributed_optimizer."""
GELU_DROPOUT = 0.1
"""Megatron-LM's default for attention and hidden states; NeMo's recipes train without."""
ACCELERATORS = {
    "mi250x-gcd": "mi250x",
    "a100-80gb-sxm (40/80 not stated)": "a100-80gb-sxm",
    "a100-80gb-pcie": "a100-80gb-pcie",
    "tpu-v3": "tpu-v3",
}
"""Words of the tables that are no ids of the catalog."""
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
    "mixtral-moe": ("mixtral", {}), "grok-moe": ("mixtral", {}), "llama4-moe": ("qwen2_moe", {}),
    "gpt-oss-moe": ("gpt_oss", {}), "deepseek-moe": ("deepseek_v3", {}),
}  # fmt: skip
"""arch_family -> (model_type, keys). Stand-ins with the same matmuls: Nemotron and modern GPT-2 as a serial GPT-NeoX, Grok as
Mixtral, Llama 4 as Qwen's mixture with a shared expert, Gopher as GPT."""
OPTIMIZERS: tuple[tuple[str, str], ...] = (
    (r"shampoo|soap", ""), (r"adafactor", "adafactor"), (r"muon", "muon"), (r"8.?bit", "adamw_8bit"), (r"adam|^$", "adamw"), (r"sgd", "sgd"),
)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """One row; `values` are the cells that are not blank."""

    values: dict[str, str]

    @property
    def id(self) -> str:
        """Unique in its file."""
        return self.values.get("id", "")

    def text(self, column: str) -> str:
        """A cell, in lower case; empty where blank."""
        return self.values.get(column, "").strip().lower()

    def number(self, column: str) -> float | None:
        """A positive finite number; None where blank.

        Raises:
            InputError: anything else.
        """
        text = self.values.get(column, "").strip()
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise InputError.single(column, text, "must be a positive number or blank", "correct the row", f"row {self.id}")
        return value

    def count(self, column: str, default: int | None = None) -> int:
        """A whole number; `default` where blank.

        Raises:
            InputError: not a whole number, or blank without a default.
        """
        value = self.number(column)
        if value is None:
            if default is None:
                raise InputError.single(column, None, "was not published", "fill the column in, or leave the row out", f"row {self.id}")
            return default
        if value != int(value):
            raise InputError.single(column, value, "must be a whole number", "correct the row", f"row {self.id}")
        return int(value)


def read_rows(path: str | Path) -> list[Measurement]:
    """The rows of a CSV file of measurements.

    Raises:
        InputError: unreadable file, missing columns, ragged rows, or an id that stands twice.
    """
    where = str(path)
    try:
        table = list(csv.reader(io.StringIO(read_text(path, MAX_BYTES)), strict=True))
    except csv.Error as error:
        raise InputError.single("measurements", where, f"must be a CSV file ({error})", "correct the file", where) from None
    header = table[0] if table else []
    missing = [name for name in REQUIRED_COLUMNS if name not in header]
    if missing:
        raise InputError.single(
            "measurements", header, f"lacks the columns {', '.join(missing)}", "use the columns of data/measurements/anchors.csv", where
        )
    rows = []
    seen: set[str] = set()
    for line, cells in enumerate(table[1:], 2):
        if not cells:
            continue
        if len(cells) != len(header):
            raise InputError.single("measurements", cells[:3], f"has {len(cells)} cells under {len(header)} columns", "correct it", f"{where}:{line}")
        row = Measurement({name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()})
        if not row.id or row.id in seen:
            raise InputError.single("id", row.id, "must be there, once in the file", "give each row an id of its own", f"{where}:{line}")
        seen.add(row.id)
        rows.append(row)
    return rows


def stack_of(row: Measurement) -> str:
    """The software stack of a row: its `stack` column, else from framework and year.

    Example:
        >>> stack_of(Measurement({"framework": "Megatron-LM", "year": "2021"}))
        'megatron-2021'
    """
    if row.text("stack"):
        return row.values["stack"].strip()
    framework = row.text("framework")
    name = next(stack for pattern, stack in STACKS if re.search(pattern, framework))
    if name in UNFUSED_STACKS and row.count("year", 9999) > LAST_YEAR_OF_UNFUSED_ATTENTION:
        return UNFUSED_STACKS[name]
    if name == "torch-eager" and row.text("compile") == "true":
        return "torch-compile"
    return name


def _refuse(row: Measurement, column: str, rule: str) -> InputError:
    return InputError.single(column, row.values.get(column), rule, "leave the row out", f"row {row.id}")


def _model(row: Measurement, stack: str) -> dict[str, Any]:
    """The architecture in the words of its family's config.json."""
    family = row.text("arch_family")
    if family not in FAMILIES:
        raise _refuse(row, "arch_family", "is no architecture that the planner knows" if family else "was not published")
    model_type, extra = FAMILIES[family]
    if family == "maxtext" and _is_gated(row):
        model_type, extra = FAMILIES["llama"]
    hidden, layers, heads = row.count("hidden_size"), row.count("num_layers"), row.count("num_heads")
    width, kv_heads = row.count("ffn_hidden", 4 * hidden), row.count("num_kv_heads", heads)
    common: dict[str, Any] = {"model_type": model_type, "vocab_size": row.count("vocab", _vocab_of(row)), **extra}
    if row.text("tied_embeddings") in ("true", "false"):
        common["tie_word_embeddings"] = row.text("tied_embeddings") == "true"
    positions = row.count("seq_len")
    if model_type == "gpt2":
        if kv_heads != heads:
            raise _refuse(row, "num_kv_heads", "GPT-2's block has as many key-value heads as heads")
        dropout = GELU_DROPOUT if stack in UNFUSED_STACKS or "megatron-lm" in row.text("framework") else 0.0
        return common | {
            "n_embd": hidden, "n_layer": layers, "n_head": heads, "n_inner": width, "n_positions": positions,
            "attn_pdrop": dropout, "resid_pdrop": dropout,
        }  # fmt: skip
    if model_type == "mpt":
        ratio = {} if width == 4 * hidden else {"expansion_ratio": width // hidden}
        return common | ratio | {"d_model": hidden, "n_layers": layers, "n_heads": heads, "max_seq_len": positions}
    if model_type == "bloom":
        return common | {"hidden_size": hidden, "n_layer": layers, "n_head": heads, "seq_length": positions}
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": positions}
    if model_type == "falcon":
        return (
            common
            | sizes
            | {"ffn_hidden_size": width, "num_kv_heads": kv_heads, "multi_query": kv_heads == 1, "new_decoder_architecture": kv_heads > 1}
        )
    if model_type == "opt":
        return common | sizes | {"ffn_dim": width}
    sizes |= {"num_key_value_heads": kv_heads, "intermediate_size": width}
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
    shared = 0 if row.text("shared_ffn_hidden") in ("", "0") else row.count("shared_ffn_hidden")
    dense = 0 if row.text("num_dense_layers") in ("", "0") else row.count("num_dense_layers")
    if model_type in ("mixtral", "gpt_oss"):
        return {"num_local_experts": experts, "num_experts_per_tok": per_token, "intermediate_size": inner}
    if model_type == "deepseek_v3":
        return {
            "n_routed_experts": experts, "num_experts_per_tok": per_token, "moe_intermediate_size": inner, "n_shared_experts": shared // inner,
            "first_k_dense_replace": dense, "q_lora_rank": row.count("q_lora_rank", 0), "kv_lora_rank": row.count("kv_lora_rank"),
            **{name: row.count(name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
        }  # fmt: skip
    mixture: dict[str, Any] = {
        "num_experts": experts, "num_experts_per_tok": per_token, "moe_intermediate_size": inner, "mlp_only_layers": list(range(dense)),
        "decoder_sparse_step": row.count("moe_every", 1),
    }  # fmt: skip
    if model_type == "qwen2_moe":
        mixture |= {"shared_expert_intermediate_size": shared or inner, "qkv_bias": False}
    return mixture


def _workload(row: Measurement) -> dict[str, Any]:
    job = row.text("job") or "pretrain"
    jobs = {"pretrain": "pretrain", "sft": "finetune", "finetune": "finetune", "lora": "lora", "qlora": "lora"}
    if job not in jobs:
        raise _refuse(row, "job", "is no job of the planner")
    optimizer = next((name for pattern, name in OPTIMIZERS if re.search(pattern, row.text("optimizer"))), "")
    if not optimizer:
        raise _refuse(row, "optimizer", "is no optimizer of the planner")
    recompute = next((name for name in ("full", "selective") if row.text("recompute").startswith(name)), "none")
    kernel = row.text("attention_kernel")
    found = "unfused" if "unfused" in kernel else "flash" if any(word in kernel for word in ("flash", "te", "sdpa")) else "auto"
    precision = row.text("precision")
    if not precision:
        raise _refuse(row, "precision", "was not published")
    return _adapters(row, jobs[job]) | {
        "job": jobs[job], "seq_len": _seq_len(row), "global_batch_size": row.count("global_batch_size", _least_batch(row)), "tokens": 1e12,
        "loss_kernel": _loss_kernel(row), "activation_input": row.text("activation_input") or "compute",
        "precision": precision, "optimizer": optimizer, "recompute": recompute, "attention_kernel": found,
    }  # fmt: skip


def _loss_kernel(row: Measurement) -> str:
    """As the row says; Megatron-LM of Megatron-Core fuses the loss where it is told to, the others do what their stack does."""
    if row.text("loss_kernel"):
        return row.text("loss_kernel")
    if "cross-entropy fusion" in row.text("notes"):
        # Transformer Engine's kernel works in place; Megatron-Core's own compiled one writes to tensors of its own.
        return "fused" if "(te" in row.text("framework") else "compiled"
    return "vocab_parallel" if stack_of(row) == "megatron-core" and "megatron-lm" in row.text("framework") else "auto"


def _seq_len(row: Measurement) -> int:
    """As published; for data of many lengths the longest sample, which sets the peak."""
    longest = re.search(r"longest sample (\d+) tokens", row.text("notes"))
    return row.count("seq_len", int(longest[1]) if longest and _is_memory_alone(row) else None)


def _is_memory_alone(row: Measurement) -> bool:
    """Whether the row has a peak and no time."""
    times = (
        "measured_step_s",
        "measured_tokens_per_s_per_device",
        "measured_tflops_per_device",
        "measured_mfu",
        "tokens_per_s_per_device_from_flops",
    )
    return row.number("measured_peak_mem_gib") is not None and not any(row.number(name) for name in times)


def _least_batch(row: Measurement) -> int | None:
    """For a row without a batch: the fewest sequences that fill its pipeline twice, from where on the peak does not grow; None with a time."""
    if not _is_memory_alone(row):
        return None
    ranks = row.count("num_devices") // (row.count("tp", 1) * row.count("pp", 1) * row.count("cp", 1))
    return max(ranks, 1) * row.count("micro_batch_size", 1) * 2 * row.count("pp", 1)


ADAPTERS: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"litgpt", {"lora_rank": 8, "lora_targets": "query_value", "lora_dropout": 0.05}),
    (r"nemo|megatron-bridge|nvidia|ngc", {"lora_rank": 16, "lora_targets": "attention", "lora_dropout": 0.1}),
)
"""What LitGPT's finetune/lora.py and MLPerf's llama2_70b_lora in NeMo put on, where a row does not say."""


def _adapters(row: Measurement, job: str) -> dict[str, Any]:
    if job != "lora":
        return {}
    found = dict(next((keys for pattern, keys in ADAPTERS if re.search(pattern, row.text("framework"))), {}))
    if row.text("lora_targets"):
        found |= {"lora_rank": row.count("lora_rank"), "lora_targets": row.text("lora_targets"), "lora_dropout": row.number("lora_dropout") or 0.0}
    is_quantized = row.text("job") == "qlora"
    quantized = {"frozen_format": "nf4_double" if "nf4-dq" in row.text("notes") else "nf4"} if is_quantized else {}
    return found | quantized


def _layout(row: Measurement, stack: str, workload: dict[str, Any]) -> dict[str, Any]:
    world = row.count("num_devices")
    tp, pp, cp, ep, chunks = (row.count(name, 1) for name in ("tp", "pp", "cp", "ep", "vpp"))
    known = row.number("dp")
    is_plain = world == 1 or row.text("sharding").startswith(("fsdp", "zero-3", "ddp", "none")) or row.text("zero_stage") == "3"
    if row.number("tp") is None and row.number("pp") is None and known != world and not is_plain:
        raise _refuse(row, "tp", "no part of the layout was published")
    if "offload" in row.text("sharding") or row.text("offload") == "true":
        raise _refuse(row, "sharding", "states kept in host memory cannot be expressed")
    if world % (tp * pp * cp):
        raise _refuse(row, "num_devices", f"is no multiple of tp*pp*cp = {tp * pp * cp}")
    dp = world // (tp * pp * cp)
    if known is not None and known not in (dp, dp * cp):
        raise _refuse(row, "dp", f"dp*tp*pp*cp disagrees with num_devices = {world}")
    stage = row.text("zero_stage") or ("1" if stack in ZERO_1_STACKS else "0")
    zero = 0 if stage == "0" else row.count("zero_stage", 1)
    inner = re.search(r"(?:fsdp|group) (\d+)", row.text("sharding"))
    shard = 1 if zero == 0 else min(int(inner[1]), dp) if inner else dp
    batch, accumulated = workload["global_batch_size"], row.number("grad_accum")
    micro = row.count("micro_batch_size", 0) or (int(batch // (dp * accumulated)) if accumulated else 0)
    if not micro:
        raise _refuse(row, "micro_batch_size", "was not published")
    parallel = row.text("sp") == "true" or (not row.text("sp") and stack in ("megatron-core", "nemo"))
    return {
        "dp_replicate": dp // shard, "dp_shard": shard, "tp": tp, "cp": cp, "pp": pp, "ep": ep,
        "num_virtual_stages": chunks if pp > 1 else 1, "schedule": "interleaved_1f1b" if pp > 1 and chunks > 1 else "1f1b",
        "zero_stage": zero, "sequence_parallel": parallel and tp > 1, "micro_batch_size": micro,
    }  # fmt: skip


def to_request(row: Measurement) -> dict[str, Any]:
    """The request that describes a measured run.

    Raises:
        InputError: the configuration was not published in full, or cannot be expressed.
    """
    stack = stack_of(row)
    workload = _workload(row)
    accelerator = row.text("accelerator")
    cluster: dict[str, Any] = {"accelerator": ACCELERATORS.get(accelerator, accelerator), "num_devices": row.count("num_devices")}
    if row.number("domain_size"):
        cluster["domain_size"] = row.count("domain_size")
    return {
        "model": _model(row, stack),
        "workload": workload,
        "cluster": cluster,
        "stack": stack,
        "layout": _layout(row, stack, workload),
    }
