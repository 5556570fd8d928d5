"""MaxText: overrides of base.yml, for TPUs and GPUs.

Source: MaxText 0.2.5, maxtext/configs/base.yml and types.py, checked by its own pyconfig. Global batch = per_device_batch_size *
devices * gradient_accumulation_steps.
"""

from __future__ import annotations

import math
from typing import Any

from planner.exporters import EXPORTERS, Draft, Exporter, ExportJob
from planner.exporters._text import to_plain_yaml

BLOCKS = {
    "llama": "llama2", "mistral": "mistral", "mixtral": "mixtral", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3_moe",
    "deepseek_v2": "deepseek", "deepseek_v3": "deepseek",
}  # fmt: skip
QUANTIZATION = {"fp8": "fp8", "mxfp8": "te_mxfp8", "nvfp4": "te_nvfp4"}
OPTIMIZERS = {"adamw": "adamw", "sgd": "sgd", "muon": "muon"}
REMAT = {"none": "minimal_with_context", "selective": "minimal", "full": "full"}


class MaxText(Exporter):
    """`maxtext.yml`."""

    name = "maxtext"
    kind = "trainer"
    versions = ("0.2.5",)
    summary = "MaxText overrides, TPU and GPU"
    leftover = "MaxText's base.yml has no such key"

    def write(self, job: ExportJob) -> Draft:
        """maxtext.yml."""
        kind = job.cluster.accelerator.kind
        if kind not in ("tpu", "gpu"):
            job.refuse("cluster.accelerator", "runs on TPUs and GPUs", "use another target")
        values = {
            "base_config": "base.yml",
            "run_name": job.slug,
            "hardware": "tpu" if kind == "tpu" else "gpu_multiprocess",
            **_model(job),
            **_mesh(job),
            **_batch(job),
            **_training(job),
            "base_output_directory": job.placeholder("RUN_DIR", "folder or bucket for checkpoints and logs"),
            "dataset_type": "synthetic",
        }
        job.check()
        job.note("dataset_type is synthetic: set dataset_type and its paths for real data")
        if "training.data" in job.keys:
            job.drop("training.data", "set dataset_type and its paths")
        return Draft({"maxtext.yml": job.header() + to_plain_yaml(values)}, "python3 -m maxtext.trainers.pre_train.train maxtext.yml")


def _model(job: ExportJob) -> dict[str, Any]:
    model, kind = job.model, str(job.config["model_type"])
    if kind not in BLOCKS:
        job.refuse("model", f"has decoder blocks for {', '.join(BLOCKS)}", "use another target")
    values: dict[str, Any] = {
        "model_name": "default",
        "decoder_block": BLOCKS.get(kind),
        "base_emb_dim": job.read("model.hidden_size"),
        "base_num_query_heads": job.read("model.num_attention_heads"),
        "base_num_kv_heads": job.read("model.num_key_value_heads"),
        "base_mlp_dim": job.read("model.intermediate_size"),
        "base_num_decoder_layers": job.read("model.num_layers"),
        "head_dim": job.read("model.head_dim"),
        "vocab_size": job.read("model.vocab_size"),
        "mlp_activations": ["silu", "linear"],
        "logits_via_embedding": job.read("model.tie_word_embeddings"),
        "max_position_embeddings": job.read("model.max_position_embeddings"),
        "enable_dropout": False,
        "attention_bias": job.read("model.qkv_bias"),
        "use_qk_norm": job.read("model.qk_norm") == "head",
    }
    for name in ("rope_theta", "norm_eps"):
        if job.number(f"model.{name}") is not None:
            values[{"rope_theta": "rope_max_timescale", "norm_eps": "normalization_layer_epsilon"}[name]] = job.keys[f"model.{name}"]
    if job.read("model.sliding_window"):
        values |= {"attention_type": "local_sliding", "sliding_window_size": model.sliding_window}
    if model.moe is not None:
        job.read_all("model.moe.")
        width = model.moe.intermediate_size
        values |= {
            "num_experts": model.moe.num_experts, "num_experts_per_tok": model.moe.num_experts_per_token, "base_moe_mlp_dim": width,
            "shared_experts": model.moe.shared_intermediate_size // width, "first_num_dense_layers": model.moe.num_dense_layers,
        }  # fmt: skip
    if model.mla is not None:
        job.read_all("model.mla.")
        values |= {"attention_type": "mla", **{name: getattr(model.mla, name) for name in type(model.mla).model_fields}}
    if job.read("model.num_mtp_layers"):
        values["mtp_num_layers"] = model.num_mtp_layers
    job.drop_dropout("these decoder blocks are trained without dropout")
    odd = job.unread_structure()
    if odd:
        job.refuse("model", f"this decoder block has no {', '.join(odd)}", "use another target")
    return values


def _mesh(job: ExportJob) -> dict[str, int]:
    """Axes within a slice (ici) and across slices (dcn): inner axes fill the slice first, in the planner's order of ranks."""
    layout = job.layout
    ep = job.read("layout.ep")
    shard = job.read("layout.dp_shard")
    if shard % ep:
        job.refuse("layout.ep", f"its expert axis divides the sharded data ranks, dp_shard = {shard}", "use an ep that divides dp_shard")
    is_zero3 = job.read("layout.zero_stage") >= 2 and shard > 1
    if layout.zero_stage == 2 and shard > 1:
        job.drop("layout.zero_stage", "the fsdp axis shards the parameters too")
    sharded = {"expert": ep, "fsdp" if is_zero3 or ep > 1 else "data": max(shard // ep, 1)}
    tensor = "tensor_sequence" if job.read("layout.sequence_parallel") else "tensor"
    axes = {tensor: job.read("layout.tp"), "context": job.read("layout.cp"), **sharded}
    axes["data"] = axes.get("data", 1) * job.read("layout.dp_replicate")
    axes["pipeline"] = job.read("layout.pp")
    left = job.cluster.scale_up.domain_size if job.cluster.accelerator.kind == "tpu" else job.devices_per_node
    values: dict[str, int] = {}
    dcn: dict[str, int] = {}
    for axis, degree in axes.items():
        inner = math.gcd(left, degree)
        left //= inner
        values[f"ici_{axis}_parallelism"], dcn[f"dcn_{axis}_parallelism"] = inner, degree // inner
    if left > 1:
        job.refuse("layout", f"the degrees leave {left} devices of each slice without work", "use degrees that fill whole slices")
    # base.yml leaves -1 on these two, which would take what another axis should have.
    values = {"ici_fsdp_parallelism": 1, **values}
    dcn = {"dcn_data_parallelism": 1, **dcn}
    if layout.zero_stage == 1 and shard > 1 and ep == 1:
        values["shard_optimizer_over_data"] = True
        if layout.dp_replicate > 1:
            job.drop("layout.dp_replicate", "the optimizer is sharded over all ranks of the data axis")
    return values | dcn | {"num_slices": math.prod(dcn.values())}


def _batch(job: ExportJob) -> dict[str, Any]:
    layout = job.layout
    count = job.num_microbatches
    job.read("workload.global_batch_size")
    values: dict[str, Any] = {"max_target_length": job.read("workload.seq_len"), "steps": job.num_steps}
    per_device = job.read("layout.micro_batch_size") * layout.dp / layout.num_devices
    if layout.pp == 1:
        return values | {"per_device_batch_size": per_device, "gradient_accumulation_steps": count}
    job.drop("layout.schedule", "MaxText has one pipeline of its own: all microbatches forward, then all backward")
    chunks = layout.pp * job.read("layout.num_virtual_stages")
    if job.model.num_layers % chunks:
        job.refuse("layout.pp", f"pp * num_virtual_stages = {chunks} must divide the {job.model.num_layers} layers", "use degrees that do")
    if count % layout.pp:
        job.refuse("layout.pp", f"pp must divide the {count} microbatches", "use a larger global_batch_size")
    return values | {
        "per_device_batch_size": per_device * count,
        "num_pipeline_microbatches": count,
        "num_layers_per_pipeline_stage": job.model.num_layers // chunks,
        "num_pipeline_repeats": layout.num_virtual_stages,
    }


def _training(job: ExportJob) -> dict[str, Any]:
    precision = job.read("workload.precision")
    if precision == "tf32":
        job.drop("workload.precision", "is JAX's own switch, jax_default_matmul_precision")
    values: dict[str, Any] = {
        "dtype": {"fp32": "float32", "tf32": "float32", "fp16": "float16"}.get(precision, "bfloat16"),
        "weight_dtype": "float32",
        "quantization": QUANTIZATION.get(precision, ""),
        "remat_policy": REMAT[job.read("workload.recompute")],
    }
    if job.workload.recompute == "none":
        job.note("remat_policy minimal_with_context keeps all matmuls and the attention: MaxText has no policy that recomputes nothing")
    if job.workload.attention_kernel == "unfused":
        job.read("workload.attention_kernel")
        values["attention"] = "dot_product"
    if job.workload.optimizer in OPTIMIZERS:
        values["opt_type"] = OPTIMIZERS[job.read("workload.optimizer")]
    else:
        job.drop("workload.optimizer", f"opt_type has {', '.join(OPTIMIZERS)}")
    values |= job.training_numbers({
        "learning_rate": "learning_rate", "beta1": "adam_b1", "beta2": "adam_b2", "eps": "adam_eps", "weight_decay": "adam_weight_decay",
        "clip_norm": "gradient_clipping_threshold", "checkpoint_every_steps": "checkpoint_period", "seed": "init_weights_seed",
        "min_lr_fraction": "learning_rate_final_fraction",
    })  # fmt: skip
    warmup = job.number("training.warmup_steps")
    if warmup is not None:
        values["warmup_steps_fraction"] = min(warmup / job.num_steps, 1.0)
    schedule = job.lr_schedule(("cosine", "wsd"))
    if schedule is not None:
        values["lr_schedule_type"] = schedule
    if schedule == "wsd":
        values["wsd_decay_steps_fraction"] = job.decay_fraction()
    return values


EXPORTERS.register("maxtext")(MaxText())
