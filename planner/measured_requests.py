"""Rows of published measurements as requests.

In: a `Measurement`. Out: a request for `planner.estimate`, and what was inferred. A row whose configuration cannot be expressed raises
InputError, whose text is the reason for skipping it.

What a blank means: tp, pp, cp, ep, vpp: 1, unless nothing at all is known of the layout; sequence parallelism: on where
Megatron-Core or NeMo split tensors, off elsewhere; optimizer: AdamW; recompute: none; ZeRO: none, but 1 with Megatron-DeepSpeed and
NeMo, and full with MaxText; LoRA: the adapters that the framework puts on by default. `inferred` lists what was taken for a row.
"""

from __future__ import annotations

import math
import re
from typing import Any

from planner.estimate import estimate
from planner.measured_models import inferred_of_model, model_of, refuse
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
PARTLY_RECOMPUTED_STACKS = ("maxtext", "xla-gpu")
"""MaxText's recipes set a remat_policy between `minimal` and `full`, and mostly do not fit without one."""
FULLY_RECOMPUTED = re.compile(r"ms-swift|xtuner \(")
"""ms-swift: gradient_checkpointing; XTuner's own trainer: activation_checkpointing; both on."""
EXPERT_PARALLEL_STACKS = ("nemo", "megatron-core")
LEAST_HARDWARE_FLOPS_FACTOR = 1.25
"""Of the model's FLOPs per token; a block run forward twice makes them 8/6."""
BATCH_PER_RANK = re.compile(r"batch size per dp (\d+)")
PACKED = '"sequence_packing": "offline"'
"""NeMo and Megatron-Bridge take packed sequences one by one."""
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
    kernel = row.text("attention_kernel")
    found = "unfused" if "unfused" in kernel else "flash" if any(word in kernel for word in ("flash", "te", "sdpa")) else "auto"
    precision = row.text("precision")
    if not precision:
        raise refuse(row, "precision", "was not published")
    return _adapters(row, jobs[job]) | {
        "job": jobs[job], "seq_len": _seq_len(row), "global_batch_size": _global_batch_size(row), "tokens": 1e12,
        "loss_kernel": _loss_kernel(row), "activation_input": row.text("activation_input") or "compute",
        "precision": precision, "optimizer": optimizer, "recompute": _recompute(row), "attention_kernel": found,
    }  # fmt: skip


def _recompute(row: Measurement) -> str:
    """As published; a part of each block as the nearest of none, selective and full."""
    published = row.text("recompute")
    is_full = FULLY_RECOMPUTED.search(row.text("framework")) or _counts_recompute(row)
    default = "full" if is_full else "selective" if stack_of(row) in PARTLY_RECOMPUTED_STACKS else "none"
    return next((name for name in ("full", "selective", "none") if published.startswith(name)), default)


def _counts_recompute(row: Measurement) -> bool:
    """Whether published FLOP/s over tokens/s are those of a model run forward twice, and not said to be the model's alone."""
    counted, model = row.number("implied_flops_per_token"), row.number("model_flops_per_token_6N_attn_full")
    is_model = row.text("flops_definition").startswith("model")
    return not is_model and counted is not None and model is not None and counted > LEAST_HARDWARE_FLOPS_FACTOR * model


def _global_batch_size(row: Measurement) -> int:
    """As published, or for each data-parallel rank."""
    each = BATCH_PER_RANK.search(row.text("notes"))
    return row.count("global_batch_size", int(each[1]) * row.count("dp") if each and row.text("dp") else _least_batch(row))


def _num_devices(row: Measurement) -> int:
    """As published; for a peak alone without sharding over replicas, of which there may be any number, the fewest of the layout."""
    if row.text("num_devices") or not _is_memory_alone(row) or row.text("zero_stage") != "0":
        return row.count("num_devices")
    inner = row.count("tp", 1) * row.count("cp", 1)
    return inner * row.count("pp", 1) * max(row.count("dp", 1), math.ceil(row.count("ep", 1) / inner))


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
    ranks = _num_devices(row) // (row.count("tp", 1) * row.count("pp", 1) * row.count("cp", 1))
    return max(ranks, 1) * row.count("micro_batch_size", 1) * 2 * row.count("pp", 1)


ADAPTERS: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"litgpt", {"lora_rank": 8, "lora_targets": "query_value", "lora_dropout": 0.05}),
    (r"nemo|megatron-bridge|nvidia|ngc", {"lora_rank": 16, "lora_targets": "attention", "lora_dropout": 0.1}),
)
"""What LitGPT's finetune/lora.py and MLPerf's llama2_70b_lora in NeMo put on, where a row does not say."""


def _adapters(row: Measurement, job: str) -> dict[str, Any]:
    if job != "lora":
        return {}
    found = dict(next((keys for pattern, keys in ADAPTERS if re.search(pattern, f"{row.text('framework')} {stack_of(row)}")), {}))
    if row.text("lora_targets"):
        found |= {"lora_rank": row.count("lora_rank"), "lora_targets": row.text("lora_targets"), "lora_dropout": row.number("lora_dropout") or 0.0}
    is_quantized = row.text("job") == "qlora"
    quantized = {"frozen_format": "nf4_double" if "nf4-dq" in row.text("notes") else "nf4"} if is_quantized else {}
    return found | quantized


def _layout(row: Measurement, stack: str, workload: dict[str, Any]) -> dict[str, Any]:
    world = _num_devices(row)
    tp, pp, cp, ep, chunks = (row.count(name, 1) for name in ("tp", "pp", "cp", "ep", "vpp"))
    known, cores = row.number("dp"), CORES_PER_CHIP.get(row.text("accelerator"), 1)
    if known is not None and known * tp * pp * cp == world * cores and tp % cores == 0:
        tp //= cores
    is_default = stack in FULLY_SHARDED_STACKS
    is_plain = world == 1 or is_default or row.text("sharding").startswith(("fsdp", "zero-3", "ddp", "none")) or row.text("zero_stage") == "3"
    if row.number("tp") is None and row.number("pp") is None and known != world and not is_plain:
        raise refuse(row, "tp", "no part of the layout was published")
    if "offload" in row.text("sharding") or row.text("offload") == "true" or "activation offloading" in row.text("notes"):
        raise refuse(row, "sharding", "states or activations kept in host memory cannot be expressed")
    if world % (tp * pp * cp):
        raise refuse(row, "num_devices", f"is no multiple of tp*pp*cp = {tp * pp * cp}")
    dp = world // (tp * pp * cp)
    if known is not None and known not in (dp, dp * cp):
        raise refuse(row, "dp", f"dp*tp*pp*cp disagrees with num_devices = {world}")
    stage = row.text("zero_stage") or ("1" if stack in ZERO_1_STACKS else "3" if is_default and known is None else "0")
    zero = int(stage) if stage in ("0", "1", "2", "3") else row.count("zero_stage")
    inner = re.search(r"(?:fsdp|group) (\d+)", row.text("sharding"))
    shard = 1 if zero == 0 else min(int(inner[1]), dp) if inner else dp
    micro = _micro_batch_size(row, stack, workload["global_batch_size"] / dp, pp)
    parallel = row.text("sp") == "true" or (not row.text("sp") and stack in ("megatron-core", "nemo"))
    return {
        "dp_replicate": dp // shard, "dp_shard": shard, "tp": tp, "cp": cp, "pp": pp, "ep": ep,
        "num_virtual_stages": chunks if pp > 1 else 1, "schedule": "interleaved_1f1b" if pp > 1 and chunks > 1 else "1f1b",
        "zero_stage": zero, "sequence_parallel": parallel and tp > 1, "micro_batch_size": micro,
    }  # fmt: skip


def _micro_batch_size(row: Measurement, stack: str, rank_batch: float, pp: int) -> int:
    """As published, or where it follows from sequences per rank: how many parts they are cut in, or one sequence of packed documents."""
    is_whole = stack in FULLY_SHARDED_STACKS or (pp == 1 and BATCH_PER_RANK.search(row.text("notes")))
    accumulated = row.number("grad_accum") or (1 if is_whole else None)
    default = int(rank_batch // accumulated) if accumulated else 1 if stack == "nemo" and PACKED in row.text("notes") else 0
    found = row.count("micro_batch_size", 0) or default
    if not found:
        raise refuse(row, "micro_batch_size", "was not published")
    return found


def _whole_rounds(row: Measurement, request: dict[str, Any]) -> dict[str, Any]:
    """For a peak alone: an interleaved schedule with its microbatches rounded up to a multiple of the stages; the peak does not grow with them."""
    layout, workload = request["layout"], request["workload"]
    if layout["schedule"] != "interleaved_1f1b" or not _is_memory_alone(row):
        return request
    round_size = layout["dp_replicate"] * layout["dp_shard"] * layout["micro_batch_size"] * layout["pp"]
    batch = math.ceil(workload["global_batch_size"] / round_size) * round_size
    return request | {"workload": workload | {"global_batch_size": batch}}


def _spread_experts(row: Measurement, request: dict[str, Any]) -> dict[str, Any]:
    """Where a table has no column for it: experts on the fewest ranks with which the job fits."""
    layout = request["layout"]
    ranks = layout["dp_replicate"] * layout["dp_shard"] * layout["cp"] * layout["tp"]
    if row.text("ep") or not row.number("num_experts") or request["stack"] not in EXPERT_PARALLEL_STACKS:
        return request
    for ep in (2**i for i in range(ranks.bit_length())):
        if row.count("num_experts") % ep or ranks % ep:
            break
        spread = request | {"layout": layout | {"ep": ep}}
        if estimate(spread).memory.fits:
            return spread
    return request


def _cluster(row: Measurement) -> dict[str, Any]:
    """The machine: the catalog's, or what a row says of its nodes and network."""
    accelerator, notes = row.text("accelerator"), row.text("notes")
    cluster: dict[str, Any] = {"accelerator": ACCELERATORS.get(accelerator, accelerator), "num_devices": _num_devices(row)}
    if row.number("domain_size"):
        cluster["domain_size"] = row.count("domain_size")
    fabric, in_all, node = FABRIC.search(notes), FABRIC_IN_ALL.search(notes), DEVICES_PER_NODE.search(notes)
    if fabric or in_all:
        gbits = float(fabric[1]) * float(fabric[2]) if fabric else float(in_all[1]) if in_all else 0.0
        cluster["network"] = f"{gbits / 8!r} GB/s"
    if node and cluster["num_devices"] % int(node[1]) == 0:
        cluster["node_size"] = int(node[1])
    return cluster


def inferred(row: Measurement, request: dict[str, Any] | None = None) -> tuple[str, ...]:
    """What a blank was taken to mean, in words, for a row that can be expressed.

    Args:
        request: of the row, where it is known already.
    """
    request = to_request(row) if request is None else request
    layout, workload, cluster = request["layout"], request["workload"], request["cluster"]
    guesses = {
        "tp": layout["tp"], "pp": layout["pp"], "cp": layout["cp"], "ep": layout["ep"], "zero_stage": layout["zero_stage"],
        "micro_batch_size": layout["micro_batch_size"], "recompute": workload["recompute"], "optimizer": workload["optimizer"],
        "sp": layout["sequence_parallel"], "global_batch_size": workload["global_batch_size"], "num_devices": cluster["num_devices"],
    }  # fmt: skip
    for name, matters in {"ep": row.number("num_experts"), "sp": layout["tp"] > 1}.items():
        if not matters:
            del guesses[name]
    why = dict.fromkeys(guesses, f"what {request['stack']} does by default") | _why(row)
    said = [f"{name} {value}: not published; {why[name]}" for name, value in guesses.items() if not row.text(name)]
    if "modules=" in row.text("recompute"):
        said.append(f"recompute {workload['recompute']}: published as {row.text('recompute')}, of which it is the nearest")
    if row.number("tp") not in (None, layout["tp"]):
        said.append(f"tp {layout['tp']}: in chips, published in cores as {row.text('tp')}")
    if row.number("global_batch_size") not in (None, workload["global_batch_size"]):
        said.append(f"global_batch_size {workload['global_batch_size']}: published as {row.text('global_batch_size')}; whole rounds of the schedule")
    if "lora_rank" in workload and not row.text("lora_rank"):
        said.append(f"adapters of rank {workload['lora_rank']} on {workload['lora_targets']}: what the framework puts on by default")
    machine = {name: value for name, value in cluster.items() if name in ("network", "node_size")}
    return (*said, *(f"{name} {value}: from the row's notes" for name, value in machine.items()), *inferred_of_model(row))


def _why(row: Measurement) -> dict[str, str]:
    """Where a value comes from that no default gives."""
    found = {"num_devices": "the fewest of the layout, which replicas do not change", "ep": "the fewest ranks with which the job fits"}
    if row.text("ep") or stack_of(row) not in EXPERT_PARALLEL_STACKS:
        del found["ep"]
    if PACKED in row.text("notes"):
        found["micro_batch_size"] = "packed sequences go one by one"
    if row.text("grad_accum"):
        found["micro_batch_size"] = "the batch over ranks and accumulation"
    if BATCH_PER_RANK.search(row.text("notes")):
        found |= dict.fromkeys(("micro_batch_size", "global_batch_size"), "from the batch per rank in the row's notes, not accumulated")
    elif _is_memory_alone(row):
        found["global_batch_size"] = "enough that the peak does not grow with it"
    if _counts_recompute(row):
        found["recompute"] = "published FLOPs per token are a third above the model's"
    return found


def to_request(row: Measurement) -> dict[str, Any]:
    """The request that describes a measured run.

    Raises:
        InputError: the configuration was not published in full, or cannot be expressed.
    """
    stack = stack_of(row)
    workload = _workload(row)
    request = {
        "model": model_of(row, stack in UNFUSED_STACKS or "megatron-lm" in row.text("framework")),
        "workload": workload,
        "cluster": _cluster(row),
        "stack": stack,
        "software_year": row.software_year,
        "layout": _layout(row, stack, workload),
    }
    return _spread_experts(row, _whole_rounds(row, request))
