"""nanotron: the YAML of run_train.py.

Source: nanotron 0.4, nanotron/config/, checked by its own dataclasses. It trains Llamas under dp, tp and pp, with ZeRO-0 or 1.
"""

from __future__ import annotations

from typing import Any

from planner.exporters import EXPORTERS, Draft, Exporter, ExportJob, Program
from planner.exporters._text import to_plain_yaml

ENGINES = {"1f1b": "1f1b", "gpipe": "afab"}


class Nanotron(Exporter):
    """`nanotron.yaml`."""

    name = "nanotron"
    kind = "trainer"
    versions = ("0.4",)
    summary = "nanotron YAML"
    leftover = "nanotron's configuration has no such key"

    def write(self, job: ExportJob) -> Draft:
        """nanotron.yaml."""
        run_dir = job.placeholder("RUN_DIR", "folder for checkpoints, on storage that all nodes see")
        values: dict[str, Any] = {
            "general": {"project": "planner", "run": job.slug, "seed": int(job.number("training.seed", 0))},
            "parallelism": _parallelism(job),
            "model": _model(job),
            "tokenizer": {"tokenizer_name_or_path": job.placeholder("TOKENIZER", "name or folder of the tokenizer")},
            "tokens": {
                "sequence_length": job.read("workload.seq_len"),
                "train_steps": job.num_steps,
                "micro_batch_size": job.read("layout.micro_batch_size"),
                "batch_accumulation_per_replica": job.num_microbatches,
            },
            "optimizer": _optimizer(job),
            "checkpoints": {"checkpoints_path": run_dir, "checkpoint_interval": int(job.number("training.checkpoint_every_steps", 1000))},
            "data": {"dataset": None, "seed": int(job.keys.get("training.seed") or 0), "num_loading_workers": 1},
        }
        job.read("workload.global_batch_size")
        if job.workload.recompute != "none":
            job.drop("workload.recompute", "nanotron 0.4 recomputes nothing")
        job.check()
        job.note("data.dataset is null, which is nanotron's random data: name a dataset there")
        script = job.placeholder("NANOTRON_DIR", "folder of the nanotron checkout") + "/run_train.py"
        text = job.header() + to_plain_yaml(values)
        how = "torchrun ... run_train.py --config-file nanotron.yaml"
        return Draft({"nanotron.yaml": text}, how, Program((script, "--config-file", "nanotron.yaml"), {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}))


def _parallelism(job: ExportJob) -> dict[str, Any]:
    layout = job.layout
    for name in ("cp", "ep"):
        job.refuse_degree(name, "has dp, tp and pp alone")
    if layout.pp > 1 and job.read("layout.schedule") not in ENGINES:
        job.refuse("layout.schedule", f"runs {' and '.join(ENGINES)}", "use one of them")
    if layout.num_virtual_stages > 1:
        job.refuse("layout.num_virtual_stages", "has one chunk per stage", "use num_virtual_stages: 1")
    if job.read("layout.dp_replicate") > 1 and job.read("layout.dp_shard") > 1:
        job.refuse("layout.dp_replicate", "ZeRO-1 shards over all data-parallel ranks", f"use dp_shard: {layout.dp}, dp_replicate: 1")
    job.read("layout.dp_shard")
    return {
        "dp": layout.dp,
        "pp": job.read("layout.pp"),
        "tp": job.read("layout.tp"),
        "pp_engine": ENGINES.get(layout.schedule, "1f1b"),
        "tp_mode": "REDUCE_SCATTER" if job.read("layout.sequence_parallel") else "ALL_REDUCE",
        "tp_linear_async_communication": layout.sequence_parallel,
    }


def _model(job: ExportJob) -> dict[str, Any]:
    model = job.model
    values: dict[str, Any] = {
        "is_llama_config": True,
        "hidden_act": "silu",
        "hidden_size": job.read("model.hidden_size"),
        "intermediate_size": job.read("model.intermediate_size"),
        "max_position_embeddings": max(job.read("model.max_position_embeddings"), int(job.keys["workload.seq_len"])),
        "num_attention_heads": job.read("model.num_attention_heads"),
        "num_hidden_layers": job.read("model.num_layers"),
        "num_key_value_heads": job.read("model.num_key_value_heads"),
        "tie_word_embeddings": job.read("model.tie_word_embeddings"),
        "vocab_size": job.read("model.vocab_size"),
    }
    if job.number("model.norm_eps") is not None:
        values["rms_norm_eps"] = job.keys["model.norm_eps"]
    is_square = job.read("model.head_dim") * model.num_attention_heads == model.hidden_size
    job.drop_dropout("nanotron's Llama has no dropout")
    odd = [*job.unread_structure(), *([] if is_square else ["head_dim"])]
    if odd:
        job.refuse("model", f"trains Llamas; this one differs in {', '.join(odd)}", "use another target")
    precision = job.read("workload.precision")
    if precision not in ("bf16", "fp32", "fp16"):
        job.drop("workload.precision", "nanotron's model.dtype knows bfloat16, float16 and float32")
    dtype = {"fp32": "float32", "tf32": "float32", "fp16": "float16"}.get(precision, "bfloat16")
    return {"dtype": dtype, "init_method": {"std": 0.02}, "model_config": values, "make_vocab_size_divisible_by": 1, "ddp_bucket_cap_mb": 25}


def _optimizer(job: ExportJob) -> dict[str, Any]:
    stage = job.read("layout.zero_stage") if job.layout.dp_shard > 1 else 0
    if stage > 1:
        job.drop("layout.zero_stage", "nanotron has ZeRO-0 and 1: 1 is written")
    if job.read("workload.optimizer") != "adamw":
        job.drop("workload.optimizer", "nanotron 0.4 has AdamW alone")
    # nanotron wants all of these: what the plan leaves open has reftrain's default.
    rate = job.number("training.learning_rate", 1e-3)
    warmup = int(job.number("training.warmup_steps", 0))
    kind = job.lr_schedule(("cosine", "wsd"))
    scheduler = {
        "learning_rate": rate, "lr_warmup_steps": warmup, "lr_warmup_style": "linear", "lr_decay_style": "linear" if kind == "wsd" else "cosine",
        "min_decay_lr": rate * job.number("training.min_lr_fraction", 0.1),
    }  # fmt: skip
    if kind == "wsd":
        steps = job.decay_steps()
        scheduler |= {"lr_decay_steps": steps, "lr_decay_starting_step": max(job.num_steps - steps, warmup)}
    beta1, beta2 = job.betas() or (0.9, 0.95)
    return {
        "zero_stage": min(stage, 1), "weight_decay": job.number("training.weight_decay", 0.1), "clip_grad": job.number("training.clip_norm", 1.0),
        "accumulate_grad_in_fp32": True, "adam_eps": job.number("training.eps", 1e-8), "adam_beta1": beta1, "adam_beta2": beta2,
        "torch_adam_is_fused": True, "learning_rate_scheduler": scheduler,
    }  # fmt: skip


EXPORTERS.register("nanotron")(Nanotron())
