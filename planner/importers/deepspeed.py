"""DeepSpeed's JSON: batch, ZeRO stage, degrees, precision and optimizer. The model and its sequence length are the script's business."""

from __future__ import annotations

from typing import Any

from planner.errors import InputError, Problem
from planner.exporters.deepspeed import OPTIMIZERS, TOP_LEVEL
from planner.files import parse_json
from planner.importers import IMPORTERS, Found, Given, Importer, quotient, whole

UNDERSTOOD = TOP_LEVEL | {"steps_per_print", "wall_clock_breakdown", "activation_checkpointing", "communication_data_type"}
PARAMS = {"lr": "learning_rate", "eps": "eps", "weight_decay": "weight_decay", "momentum": "momentum"}


class DeepSpeed(Importer):
    """`ds_config.json`; `auto` values of HF's integration count as absent."""

    name = "deepspeed"
    versions = ("0.19.8",)
    summary = "JSON configuration"

    def read(self, text: str, where: str, given: Given) -> Found:
        """The plan's words for the file."""
        config = parse_json(text, where)
        if not isinstance(config, dict):
            raise InputError.single("json", config, "must be one JSON object", "give DeepSpeed's configuration", where)
        found = Found(stack="deepspeed")
        config = {key: value for key, value in config.items() if value not in ("auto", None)}
        found.ignored = [f"{key}: {str(value)[:40]}" for key, value in config.items() if key not in UNDERSTOOD]
        _layout(config, found, given, where)
        half = [name for name in ("bf16", "fp16") if _section(config, name).get("enabled") is True]
        found.workload["precision"] = half[0] if half else "fp32"
        _training(config, found)
        return found


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _layout(config: dict[str, Any], found: Found, given: Given, where: str) -> None:
    tp = whole(_section(config, "tensor_parallel"), "autotp_size", 1, where)
    cp = whole(config, "sequence_parallel_size", 1, where)
    ep = whole(_section(config, "expert_parallel"), "autoep_size", 1, where)
    micro, steps, batch = (whole(config, key, 0, where) for key in (
        "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"))  # fmt: skip
    if given.num_devices is not None:
        dp = quotient(given.num_devices, tp * cp, "--num-devices", where)
    elif micro and batch:
        dp = quotient(batch, micro * max(steps, 1), "train_batch_size", where)
    else:
        raise InputError(Problem("--num-devices", None, "the file does not give the batch sizes from which it follows", "add it", where))
    if not batch:
        batch = max(micro, 1) * max(steps, 1) * dp
    if not micro:
        micro = quotient(batch, max(steps, 1) * dp, "train_batch_size", where)
    if steps and batch != micro * steps * dp:
        rule = f"must be micro-batch {micro} * accumulation {steps} * {dp} data-parallel ranks = {micro * steps * dp}"
        raise InputError.single("train_batch_size", batch, rule, "correct the file, or --num-devices", where)
    stage = whole(_section(config, "zero_optimization"), "stage", 0, where, minimum=0)
    found.num_devices = dp * tp * cp
    found.workload["global_batch_size"] = batch
    found.layout = {
        "dp_replicate": dp if stage == 0 else 1, "dp_shard": 1 if stage == 0 else dp, "tp": tp, "cp": cp, "pp": 1, "ep": ep,
        "zero_stage": min(stage, 3), "sequence_parallel": False, "micro_batch_size": micro,
    }  # fmt: skip


def _training(config: dict[str, Any], found: Found) -> None:
    optimizer = _section(config, "optimizer")
    kinds = {theirs.lower(): own for own, theirs in OPTIMIZERS.items()}
    params = {key: value for key, value in _section(optimizer, "params").items() if isinstance(value, (int, float, list))}
    kind = kinds.get(str(optimizer.get("type", "AdamW")).lower().replace("adam", "adamw").replace("adamww", "adamw"), "adamw")
    if kind.startswith("sgd"):
        kind = "sgd_momentum" if params.get("momentum") else "sgd"
    found.workload["optimizer"] = kind
    own_keys = {theirs: own for theirs, own in PARAMS.items() if (theirs, kind) != ("momentum", "sgd")}
    found.training |= {own: params[theirs] for theirs, own in own_keys.items() if isinstance(params.get(theirs), (int, float))}
    betas = params.get("betas")
    if isinstance(betas, list) and len(betas) == 2:
        found.training |= {"beta1": betas[0], "beta2": betas[1]}
    for key, own in (("gradient_clipping", "clip_norm"), ("seed", "seed")):
        if isinstance(config.get(key), (int, float)):
            found.training[own] = config[key]
    schedule = _section(_section(config, "scheduler"), "params")
    if isinstance(schedule.get("warmup_num_steps"), int):
        found.training["warmup_steps"] = schedule["warmup_num_steps"]
    if isinstance(schedule.get("total_num_steps"), int):
        found.training["num_steps"] = schedule["total_num_steps"]


IMPORTERS.register("deepspeed")(DeepSpeed())
