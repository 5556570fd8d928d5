"""Rows of published measurements as requests.

In: a `Measurement`. Out: a request for `planner.estimate`, and what was inferred. A row whose configuration cannot be expressed raises
InputError, whose text is the reason for skipping it.

What a blank means: tp, pp, cp, ep, vpp: 1, unless nothing at all is known of the layout; sequence parallelism: on where
Megatron-Core or NeMo split tensors, off elsewhere; optimizer: AdamW; recompute: none; ZeRO: none, but 1 with Megatron-DeepSpeed and
NeMo; LoRA: the adapters that the framework puts on by default.
"""

from __future__ import annotations

import re
from typing import Any

from planner.measured_models import model_of, refuse
from planner.measurements import Measurement

__all__ = ["inferred", "stack_of", "to_request"]

STACKS: tuple[tuple[str, str], ...] = (
    # First match wins; a year in the name applies up to and including it.
    (r"llm-foundry|composer", "llm-foundry"),
    (r"torchtitan", "torchtitan"),
    (r"neuron", "neuronx"),
    (r"habana", "optimum-habana"),
    (r"maxtext|paxml|jax|levanter|xla", "maxtext"),
    (r"megatron-deepspeed", "megatron-deepspeed"),
    (r"hf trainer|zero|deepspeed|xtuner|colossalai", "deepspeed"),
    (r"modded-nanogpt|nanochat", "torch-compile"),
    (r"megatron-lm|metaseq", "megatron-2021"),
    (r"nemo|megatron-bridge|nvidia|ngc|rocm|llmboost", "nemo"),
    (r"megatron|megascale|hai-llm|meta internal", "megatron-core"),
    (r"reftrain", "reftrain"),
    (r"litgpt", "litgpt"),
    (r"nanotron", "nanotron"),
    (r"", "torch-eager"),
)
NEMO_CONFIG = re.compile(r"config_\S+_\d+x\d+x\d+xtp\d+pp\d+cp\d+")
"""Name of a configuration file of NeMo's scripts for a cluster: nodes, devices, accumulation, layout. Submissions that say only PyTorch or
ROCm have them too."""
LAST_YEAR_OF_UNFUSED_ATTENTION = 2022
"""Megatron's flash attention arrived in 2023; rows of the same name from then on run on Megatron-Core. Megatron-DeepSpeed's copy of it has to
be asked for."""
SUCCESSORS = {"megatron-2021": "megatron-core"}
"""What goes by their names since."""
GPU_STACKS = {"maxtext": "xla-gpu"}
"""On GPUs another compiler makes the kernels."""
UNFUSED_STACKS = ("megatron-2021", "megatron-deepspeed")
CORES_PER_CHIP = {"trainium1": 2}
"""Where frameworks count cores as ranks; a tensor-parallel group takes both cores of each of its chips."""
FABRIC = re.compile(r"(\d+)x(\d+) gb/s per node")
FABRIC_IN_ALL = re.compile(r"(\d+) gbps node-node")
DEVICES_PER_NODE = re.compile(r"(\d+) gpus/node")
"""Words of notes about the machine."""
ZERO_1_STACKS = ("megatron-deepspeed", "nemo")
"""BigScience's scripts set ZERO_STAGE=1, NeMo's recipes use_distributed_optimizer."""
FULLY_SHARDED_STACKS = ("maxtext", "xla-gpu")
"""MaxText: ici_fsdp_parallelism -1, over all chips that no other axis takes; and no accumulation of gradients."""
FULLY_RECOMPUTED_STACKS = ("maxtext", "xla-gpu")
"""MaxText: remat_policy full."""
ACCELERATORS = {
    "mi250x-gcd": "mi250x",
    "a100-80gb-sxm (40/80 not stated)": "a100-80gb-sxm",
    "a100-80gb-pcie": "a100-80gb-pcie",
    "tpu-v3": "tpu-v3",
}
"""Words of the tables that are no ids of the catalog."""
OPTIMIZERS: tuple[tuple[str, str], ...] = (
    (r"shampoo|soap", ""), (r"adafactor", "adafactor"), (r"muon", "muon"), (r"8.?bit", "adamw_8bit"), (r"adam|^$", "adamw"), (r"sgd", "sgd"),
)  # fmt: skip


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
    if name in SUCCESSORS and row.count("year", 9999) > LAST_YEAR_OF_UNFUSED_ATTENTION:
        return SUCCESSORS[name]
    if name in GPU_STACKS and row.text("accelerator") and not row.text("accelerator").startswith("tpu"):
        return GPU_STACKS[name]
    if name == "torch-eager" and NEMO_CONFIG.search(row.text("notes")):
        return "nemo"
    if name == "torch-eager" and row.text("compile") == "true":
        return "torch-compile"
    return name


def _workload(row: Measurement) -> dict[str, Any]:
    job = row.text("job") or "pretrain"
    jobs = {"pretrain": "pretrain", "sft": "finetune", "finetune": "finetune", "lora": "lora", "qlora": "lora"}
    if job not in jobs:
        raise refuse(row, "job", "is no job of the planner")
    optimizer = next((name for pattern, name in OPTIMIZERS if re.search(pattern, row.text("optimizer"))), "")
    if not optimizer:
        raise refuse(row, "optimizer", "is no optimizer of the planner")
    default = "full" if stack_of(row) in FULLY_RECOMPUTED_STACKS else "none"
    recompute = next((name for name in ("full", "selective", "none") if row.text("recompute").startswith(name)), default)
    kernel = row.text("attention_kernel")
    found = "unfused" if "unfused" in kernel else "flash" if any(word in kernel for word in ("flash", "te", "sdpa")) else "auto"
    precision = row.text("precision")
    if not precision:
        raise refuse(row, "precision", "was not published")
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
    known, cores = row.number("dp"), CORES_PER_CHIP.get(row.text("accelerator"), 1)
    if known is not None and known * tp * pp * cp == world * cores and tp % cores == 0:
        tp //= cores
    is_default = stack in FULLY_SHARDED_STACKS
    is_plain = world == 1 or is_default or row.text("sharding").startswith(("fsdp", "zero-3", "ddp", "none")) or row.text("zero_stage") == "3"
    if row.number("tp") is None and row.number("pp") is None and known != world and not is_plain:
        raise refuse(row, "tp", "no part of the layout was published")
    if "offload" in row.text("sharding") or row.text("offload") == "true":
        raise refuse(row, "sharding", "states kept in host memory cannot be expressed")
    if world % (tp * pp * cp):
        raise refuse(row, "num_devices", f"is no multiple of tp*pp*cp = {tp * pp * cp}")
    dp = world // (tp * pp * cp)
    if known is not None and known not in (dp, dp * cp):
        raise refuse(row, "dp", f"dp*tp*pp*cp disagrees with num_devices = {world}")
    stage = row.text("zero_stage") or ("1" if stack in ZERO_1_STACKS else "3" if is_default and known is None else "0")
    zero = int(stage) if stage in ("0", "1", "2", "3") else row.count("zero_stage")
    inner = re.search(r"(?:fsdp|group) (\d+)", row.text("sharding"))
    shard = 1 if zero == 0 else min(int(inner[1]), dp) if inner else dp
    batch, accumulated = workload["global_batch_size"], row.number("grad_accum")
    micro = row.count("micro_batch_size", 0) or (int(batch // (dp * (accumulated or 1))) if accumulated or is_default else 0)
    if not micro:
        raise refuse(row, "micro_batch_size", "was not published")
    parallel = row.text("sp") == "true" or (not row.text("sp") and stack in ("megatron-core", "nemo"))
    return {
        "dp_replicate": dp // shard, "dp_shard": shard, "tp": tp, "cp": cp, "pp": pp, "ep": ep,
        "num_virtual_stages": chunks if pp > 1 else 1, "schedule": "interleaved_1f1b" if pp > 1 and chunks > 1 else "1f1b",
        "zero_stage": zero, "sequence_parallel": parallel and tp > 1, "micro_batch_size": micro,
    }  # fmt: skip


def _cluster(row: Measurement) -> dict[str, Any]:
    """The machine: the catalog's, or what a row says of its nodes and network."""
    accelerator, notes = row.text("accelerator"), row.text("notes")
    cluster: dict[str, Any] = {"accelerator": ACCELERATORS.get(accelerator, accelerator), "num_devices": row.count("num_devices")}
    if row.number("domain_size"):
        cluster["domain_size"] = row.count("domain_size")
    fabric, in_all, node = FABRIC.search(notes), FABRIC_IN_ALL.search(notes), DEVICES_PER_NODE.search(notes)
    if fabric or in_all:
        gbits = float(fabric[1]) * float(fabric[2]) if fabric else float(in_all[1]) if in_all else 0.0
        cluster["network"] = f"{gbits / 8!r} GB/s"
    if node and cluster["num_devices"] % int(node[1]) == 0:
        cluster["node_size"] = int(node[1])
    return cluster


def inferred(row: Measurement) -> list[str]:
    """What a blank was taken to mean, in words, for a row that can be expressed."""
    request = to_request(row)
    layout, workload = request["layout"], request["workload"]
    guesses = {
        "tp": layout["tp"], "pp": layout["pp"], "cp": layout["cp"], "ep": layout["ep"], "zero_stage": layout["zero_stage"],
        "micro_batch_size": layout["micro_batch_size"], "recompute": workload["recompute"], "optimizer": workload["optimizer"],
        "sp": layout["sequence_parallel"], "global_batch_size": workload["global_batch_size"],
    }  # fmt: skip
    said = [f"{name} {value}: not published; what {request['stack']} does by default" for name, value in guesses.items() if not row.text(name)]
    machine = {name: value for name, value in request["cluster"].items() if name in ("network", "node_size")}
    return said + [f"{name} {value}: from the row's notes" for name, value in machine.items()]


def to_request(row: Measurement) -> dict[str, Any]:
    """The request that describes a measured run.

    Raises:
        InputError: the configuration was not published in full, or cannot be expressed.
    """
    stack = stack_of(row)
    workload = _workload(row)
    return {
        "model": model_of(row, stack in UNFUSED_STACKS or "megatron-lm" in row.text("framework")),
        "workload": workload,
        "cluster": _cluster(row),
        "stack": stack,
        "software_year": row.software_year,
        "layout": _layout(row, stack, workload),
    }
