"""DeepSpeed: the JSON configuration, and the model's config.json beside it.

Source: DeepSpeed 0.19.8, runtime/config.py and runtime/zero/config.py, checked by its own DeepSpeedConfig, which takes unknown
keys at the top level in silence: `TOP_LEVEL` is the list of those that it reads.
"""

from __future__ import annotations

from typing import Any

from planner.exporters import EXPORTERS, Draft, Exporter, ExportJob, Program
from planner.exporters._hf import hf_config
from planner.files import to_json

OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD", "sgd_momentum": "SGD", "muon": "Muon"}
TOP_LEVEL = frozenset((
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16", "fp16", "optimizer",
    "scheduler", "zero_optimization", "tensor_parallel", "sequence_parallel_size", "expert_parallel", "seed",
))  # fmt: skip


class DeepSpeed(Exporter):
    """`ds_config.json`: ZeRO over all data-parallel ranks, AutoTP, Ulysses for long sequences."""

    name = "deepspeed"
    kind = "trainer"
    versions = ("0.19.8",)
    summary = "DeepSpeed JSON"
    leftover = "belongs to the training script, not to DeepSpeed's JSON"

    def write(self, job: ExportJob) -> Draft:
        """ds_config.json and config.json."""
        config = {**_batch(job), **_degrees(job), **_precision(job), "zero_optimization": _zero(job), **_optimizer(job)}
        if job.number("training.clip_norm") is not None:
            config["gradient_clipping"] = job.keys["training.clip_norm"]
        if job.number("training.seed") is not None:
            config["seed"] = job.keys["training.seed"]
        job.check()
        if not config.keys() <= TOP_LEVEL:
            raise ValueError(f"keys that DeepSpeed would ignore: {sorted(config.keys() - TOP_LEVEL)}")
        if job.workload.recompute != "none":
            job.drop("workload.recompute", "the model's own code checkpoints: call model.gradient_checkpointing_enable()")
        script = job.placeholder("TRAIN_SCRIPT", "training script that calls deepspeed.initialize")
        files = {"ds_config.json": to_json(config), "config.json": hf_config(job)}
        return Draft(files, "deepspeed TRAIN_SCRIPT --deepspeed_config ds_config.json", Program((script, "--deepspeed_config", "ds_config.json")))


def _batch(job: ExportJob) -> dict[str, Any]:
    """train_batch_size = micro batch * accumulation steps * data-parallel ranks, which DeepSpeed asserts."""
    return {
        "train_batch_size": job.read("workload.global_batch_size"),
        "train_micro_batch_size_per_gpu": job.read("layout.micro_batch_size"),
        "gradient_accumulation_steps": job.num_microbatches,
    }


def _degrees(job: ExportJob) -> dict[str, Any]:
    layout, found = job.layout, dict[str, Any]()
    job.refuse_degree("pp", "pipelines are written in code (PipelineModule)")
    job.read("layout.dp_replicate")
    job.read("layout.dp_shard")
    if layout.dp_replicate > 1 and layout.dp_shard > 1:
        fix = f"use dp_shard: {layout.dp}, dp_replicate: 1"
        job.refuse("layout.dp_replicate", "ZeRO shards over all data-parallel ranks", fix)
    if job.read("layout.tp") > 1:
        found["tensor_parallel"] = {"autotp_size": layout.tp}
    if job.read("layout.cp") > 1:
        found["sequence_parallel_size"] = layout.cp
        job.note("cp is Ulysses here: all-to-all over the heads instead of a ring, and the script must register it")
        if job.model.num_attention_heads % layout.cp:
            job.refuse("layout.cp", f"Ulysses splits the {job.model.num_attention_heads} heads", "use a cp that divides them")
    if job.read("layout.ep") > 1:
        found["expert_parallel"] = {"enabled": True, "autoep_size": layout.ep}
        if layout.tp > 1:
            job.refuse("layout.ep", "AutoEP does not go with AutoTP", "use tp: 1")
    if layout.sequence_parallel:
        job.drop("layout.sequence_parallel", "AutoTP keeps the whole sequence on every rank")
    return found


def _precision(job: ExportJob) -> dict[str, Any]:
    precision = job.read("workload.precision")
    if precision in ("bf16", "fp16"):
        return {precision: {"enabled": True}}
    if precision != "fp32":
        job.drop("workload.precision", "DeepSpeed's JSON knows bf16, fp16 and fp32")
    return {} if precision in ("fp32", "tf32") else {"bf16": {"enabled": True}}


def _zero(job: ExportJob) -> dict[str, Any]:
    stage = job.read("layout.zero_stage") if job.layout.dp_shard > 1 else 0
    if stage == 0:
        return {"stage": 0}
    return {"stage": stage, "overlap_comm": True, "contiguous_gradients": True, "reduce_scatter": True} | (
        {"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {}
    )


def _optimizer(job: ExportJob) -> dict[str, Any]:
    name = job.workload.optimizer
    if name not in OPTIMIZERS:
        job.drop("workload.optimizer", f"DeepSpeed builds {', '.join(OPTIMIZERS)}; the script must pass its own")
        return {}
    job.read("workload.optimizer")
    params: dict[str, Any] = {**job.training_numbers({"learning_rate": "lr", "weight_decay": "weight_decay"})}
    if name.startswith("sgd"):
        params["momentum"] = job.number("training.momentum", 0.9) if name == "sgd_momentum" else 0.0
    elif name == "adamw":
        betas = job.betas()
        params |= job.training_numbers({"eps": "eps"}) | ({} if betas is None else {"betas": list(betas)})
    return {"optimizer": {"type": OPTIMIZERS[name], "params": params}} | _schedule(job)


def _schedule(job: ExportJob) -> dict[str, Any]:
    """WarmupCosineLR, where the plan names the schedule; DeepSpeed has no decay at the end alone (WSD)."""
    if job.lr_schedule(("cosine",)):
        given = job.training_numbers({"warmup_steps": "warmup_num_steps", "min_lr_fraction": "cos_min_ratio"})
        return {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": job.num_steps, **given}}}
    warmup = job.number("training.warmup_steps")
    if warmup is not None and job.number("training.learning_rate") is not None:
        params = {"warmup_num_steps": warmup, "warmup_max_lr": job.keys["training.learning_rate"]}
        return {"scheduler": {"type": "WarmupLR", "params": params}}
    return {}


EXPORTERS.register("deepspeed")(DeepSpeed())
