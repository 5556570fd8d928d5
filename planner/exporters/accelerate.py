"""Hugging Face Accelerate with FSDP2, and transformers' TrainingArguments.

Source: accelerate 1.15.0, commands/config/config_args.py, commands/launch.py, parallelism_config.py; transformers 5.23.0,
training_args.py. Checked by their own ClusterConfig, launch parser, ParallelismConfig and HfArgumentParser.
"""

from __future__ import annotations

from typing import Any

from planner.exporters import EXPORTERS, Draft, Exporter, ExportJob
from planner.exporters._hf import hf_config
from planner.exporters._text import to_plain_yaml
from planner.files import to_json

OPTIMIZERS = {"adamw": "adamw_torch", "sgd": "sgd", "adafactor": "adafactor", "adamw_8bit": "adamw_bnb_8bit"}
SCHEDULES = {"cosine": "cosine_with_min_lr", "wsd": "warmup_stable_decay", "constant": "constant_with_warmup"}


class Accelerate(Exporter):
    """`accelerate.yaml` for `accelerate launch`, `training_args.json` for the Trainer, `config.json` of the model."""

    name = "accelerate"
    kind = "trainer"
    versions = ("1.15.0",)
    summary = "HF Accelerate (FSDP2) and Trainer arguments"
    leftover = "neither Accelerate nor transformers' TrainingArguments has such a setting"

    def write(self, job: ExportJob) -> Draft:
        """The three files."""
        cluster = _cluster(job)
        arguments = _arguments(job)
        job.check()
        script = job.placeholder("TRAIN_SCRIPT", "training script that reads training_args.json")
        files = {"accelerate.yaml": job.header() + to_plain_yaml(cluster), "training_args.json": to_json(arguments), "config.json": hf_config(job)}
        return Draft(files, f"on every node: accelerate launch --config_file accelerate.yaml --machine_rank RANK {script} training_args.json")


def _cluster(job: ExportJob) -> dict[str, Any]:
    layout = job.layout
    for name in ("pp", "ep"):
        job.refuse_degree(name, "FSDP2 of Accelerate has no such axis")
    if job.read("layout.sequence_parallel"):
        job.drop("layout.sequence_parallel", "transformers' tensor-parallel plan decides it")
    degrees = {f"parallelism_config_{name}_size": job.read(f"layout.{name}") for name in ("dp_replicate", "dp_shard", "tp", "cp")}
    is_sharded = layout.dp_shard > 1 or layout.cp > 1
    if layout.tp * layout.cp > 1 and layout.dp_replicate > 1 and not is_sharded:
        job.refuse("layout.dp_replicate", "plain replicas cannot be combined with tp", "use dp_shard in their place")
    found: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP" if is_sharded else "MULTI_GPU" if layout.num_devices > 1 else "NO",
        "num_machines": job.num_nodes,
        "num_processes": layout.num_devices,
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": _precision(job),
        "rdzv_backend": "static",
        "use_cpu": False,
    }
    if job.num_nodes > 1:
        found["main_process_ip"] = job.placeholder("HEAD_NODE", "name or address of the first node")
        found["main_process_port"] = 29500
    if is_sharded:
        found["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_reshard_after_forward": job.read("layout.zero_stage") == 3,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_activation_checkpointing": job.read("workload.recompute") == "full",
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            "fsdp_offload_params": False,
            "fsdp_cpu_ram_efficient_loading": True,
        }
        if layout.zero_stage == 1 and layout.dp_shard > 1:
            job.drop("layout.zero_stage", "FSDP shards the gradients too: the nearest is stage 2")
    if layout.num_devices > 1:
        found["parallelism_config"] = degrees
    if job.workload.recompute == "selective":
        job.drop("workload.recompute", "FSDP checkpoints whole layers or nothing")
    return found


def _precision(job: ExportJob) -> str:
    precision = job.read("workload.precision")
    if precision in ("mxfp8", "nvfp4"):
        job.drop("workload.precision", "Accelerate mixes fp16, bf16 and fp8")
    return {"fp32": "no", "tf32": "no", "fp16": "fp16", "fp8": "fp8"}.get(precision, "bf16")


def _arguments(job: ExportJob) -> dict[str, Any]:
    """TrainingArguments; per_device_train_batch_size * accumulation * data-parallel ranks = global_batch_size."""
    job.read("workload.global_batch_size")
    found: dict[str, Any] = {
        "output_dir": job.placeholder("RUN_DIR", "folder for checkpoints, on storage that all nodes see"),
        "per_device_train_batch_size": job.read("layout.micro_batch_size"),
        "gradient_accumulation_steps": job.num_microbatches,
        "max_steps": job.num_steps,
        "bf16": job.workload.precision in ("bf16", "fp8", "mxfp8", "nvfp4"),
        "fp16": job.workload.precision == "fp16",
        "tf32": True if job.workload.precision == "tf32" else None,
        "gradient_checkpointing": job.workload.recompute == "full" and job.layout.dp_shard * job.layout.cp == 1,
    }
    if job.workload.optimizer in OPTIMIZERS:
        found["optim"] = OPTIMIZERS[job.read("workload.optimizer")]
    else:
        job.drop("workload.optimizer", f"TrainingArguments.optim has {', '.join(OPTIMIZERS)}")
    found |= job.training_numbers({
        "learning_rate": "learning_rate", "warmup_steps": "warmup_steps", "weight_decay": "weight_decay", "beta1": "adam_beta1",
        "beta2": "adam_beta2", "eps": "adam_epsilon", "clip_norm": "max_grad_norm", "seed": "seed", "checkpoint_every_steps": "save_steps",
        "keep_checkpoints": "save_total_limit",
    })  # fmt: skip
    kind = job.lr_schedule(SCHEDULES)
    if kind is not None:
        found["lr_scheduler_type"] = SCHEDULES[kind]
        fraction = job.number("training.min_lr_fraction")
        if kind == "cosine":
            found["lr_scheduler_kwargs"] = {"min_lr_rate": 0.0 if fraction is None else fraction}
        elif kind == "wsd":
            found["lr_scheduler_kwargs"] = {"num_decay_steps": job.decay_steps()}
    job.drop("workload.seq_len", "the training script cuts its data to this length")
    return {key: value for key, value in found.items() if value is not None}


EXPORTERS.register("accelerate")(Accelerate())
