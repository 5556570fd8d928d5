"""A plan in Megatron's words, as Megatron-LM's options and Megatron-Bridge's overrides both need them.

Values: True for a switch, else what follows the option. Keys: Megatron-LM's long options without the dashes.
"""

from __future__ import annotations

from typing import Any

from planner.exporters._job import ExportJob
from planner.layout import chunk_sizes
from planner.model_spec import ModelSpec

__all__ = ["cluster_environment", "layout_options", "model_options", "training_options"]

Options = dict[str, Any]
OPTIMIZERS = {"adamw": "adam", "sgd": "sgd", "sgd_momentum": "sgd", "muon": "muon"}
SHARDED_BY_FSDP = {2: "optim_grads", 3: "optim_grads_params"}
BLACKWELL_YEAR = 2024
PRECISIONS: dict[str, Options] = {
    "bf16": {"bf16": True},
    "fp16": {"fp16": True},
    "fp8": {"bf16": True, "fp8-format": "hybrid"},
    "mxfp8": {"bf16": True, "fp8-format": "e4m3", "fp8-recipe": "mxfp8"},
    "nvfp4": {"bf16": True, "fp4-format": "e2m1"},
}
POSITIONS = {"rope": "rope", "learned": "learned_absolute", "none": "none"}


def model_options(job: ExportJob) -> Options:
    """The model's structure; what Megatron's GPT cannot be is refused."""
    model = job.model
    options: Options = {
        "num-layers": job.read("model.num_layers"),
        "hidden-size": job.read("model.hidden_size"),
        "ffn-hidden-size": job.read("model.intermediate_size"),
        "num-attention-heads": job.read("model.num_attention_heads"),
        "kv-channels": job.read("model.head_dim"),
        "max-position-embeddings": max(job.read("model.max_position_embeddings"), int(job.keys["workload.seq_len"])),
        "position-embedding-type": POSITIONS.get(job.read("model.position"), "rope"),
        "normalization": {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[job.read("model.norm")],
        "vocab-size": job.read("model.vocab_size"),
        "make-vocab-size-divisible-by": 1,
        "attention-dropout": job.read("model.attention_dropout"),
        "hidden-dropout": job.read("model.hidden_dropout"),
    }
    if job.read("model.num_key_value_heads") != model.num_attention_heads and model.mla is None:
        options |= {"group-query-attention": True, "num-query-groups": model.num_key_value_heads}
    if not job.read("model.tie_word_embeddings"):
        options["untie-embeddings-and-output-weights"] = True
    if job.number("model.rope_theta") is not None:
        options["rotary-base"] = int(job.keys["model.rope_theta"])
    if job.number("model.norm_eps") is not None:
        options["norm-epsilon"] = job.keys["model.norm_eps"]
    scaling = job.keys.get("model.rope_scaling")
    if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "llama3" and "factor" in scaling:
        job.read("model.rope_scaling")
        options |= {"use-rope-scaling": True, "rope-scaling-factor": float(scaling["factor"])}
    options |= _activation(job, model) | _biases(job, model) | _mixture(job, model) | _latent(job, model)
    if job.read("model.qk_norm") == "head":
        options["qk-layernorm"] = True
    if job.read("model.sliding_window"):
        options["window-size"] = f"{model.sliding_window},0"
        if job.read("model.global_layer_period"):
            options["window-attn-skip-freq"] = model.global_layer_period
    if job.read("model.num_mtp_layers"):
        options["mtp-num-layers"] = model.num_mtp_layers
    odd = [*job.unread_structure(), *(["position"] if model.position not in POSITIONS else []), *(["qk_norm"] if model.qk_norm == "full" else [])]
    if odd:
        job.refuse("model", f"its GPT has no such {', '.join(odd)}", "use another model or target")
    return options


def _activation(job: ExportJob, model: ModelSpec) -> Options:
    pair = (job.read("model.activation"), job.read("model.is_gated"))
    if pair not in (("silu", True), ("gelu", False)):
        job.refuse(
            "model.activation", f"knows SwiGLU and plain GELU, not {'gated ' if model.is_gated else ''}{model.activation}", "use another target"
        )
    return {"swiglu": True} if model.is_gated else {}


def _biases(job: ExportJob, model: ModelSpec) -> Options:
    """Megatron has biases on all linear layers, on none, or on the query, key and value layer alone."""
    found = tuple(job.read(f"model.{name}") for name in ("qkv_bias", "attention_out_bias", "mlp_bias"))
    if model.norm == "layernorm" and not job.read("model.norm_bias"):
        job.drop("model.norm_bias", "Megatron's LayerNorm always has a bias")
    known = {(True, True, True): {}, (False, False, False): {"disable-bias-linear": True}}
    known[True, False, False] = {"disable-bias-linear": True, "add-qkv-bias": True}
    if found not in known:
        job.refuse("model.qkv_bias", f"cannot mix biases like this (qkv, out, mlp: {found})", "use another target")
    return known.get(found, {})


def _mixture(job: ExportJob, model: ModelSpec) -> Options:
    moe = model.moe
    if moe is None:
        return {}
    options: Options = {
        "num-experts": job.read("model.moe.num_experts"),
        "moe-router-topk": job.read("model.moe.num_experts_per_token"),
        "moe-ffn-hidden-size": job.read("model.moe.intermediate_size"),
        "moe-grouped-gemm": True,
        "moe-token-dispatcher-type": "alltoall",
    }
    if job.read("model.moe.shared_intermediate_size"):
        options["moe-shared-expert-intermediate-size"] = moe.shared_intermediate_size
    if job.read("model.moe.has_shared_gate"):
        options["moe-shared-expert-gate"] = True
    if job.read("model.moe.num_dense_layers") or job.read("model.moe.layer_period") > 1:
        options["moe-layer-freq"] = "[" + ",".join(str(int(model.has_moe_at(i))) for i in range(model.num_layers)) + "]"
    if job.keys.get("model.scoring_func") == "sigmoid":
        job.read("model.scoring_func")
        options["moe-router-score-function"] = "sigmoid"
    if job.number("model.routed_scaling_factor") is not None:
        options["moe-router-topk-scaling-factor"] = job.keys["model.routed_scaling_factor"]
    for name in ("router_bias", "expert_bias"):
        if getattr(moe, name):
            job.drop(f"model.moe.{name}", "Megatron's experts and routers have no such bias")
    return options


def _latent(job: ExportJob, model: ModelSpec) -> Options:
    if model.mla is None:
        return {}
    job.read_all("model.mla.")
    low_rank = {"q-lora-rank": model.mla.q_lora_rank} if model.mla.q_lora_rank else {}
    return {
        "multi-latent-attention": True,
        **low_rank,
        "kv-lora-rank": model.mla.kv_lora_rank,
        "qk-head-dim": model.mla.qk_nope_head_dim,
        "qk-pos-emb-head-dim": model.mla.qk_rope_head_dim,
        "v-head-dim": model.mla.v_head_dim,
    }


def layout_options(job: ExportJob) -> Options:
    """Degrees, sharding and batch."""
    layout = job.layout
    options: Options = {
        "tensor-model-parallel-size": job.read("layout.tp"),
        "pipeline-model-parallel-size": job.read("layout.pp"),
        "context-parallel-size": job.read("layout.cp"),
        "expert-model-parallel-size": job.read("layout.ep"),
        "micro-batch-size": job.read("layout.micro_batch_size"),
        "global-batch-size": job.read("workload.global_batch_size"),
        "seq-length": job.read("workload.seq_len"),
    }
    if job.read("layout.sequence_parallel"):
        options["sequence-parallel"] = True
    if job.model.moe is not None:
        options["expert-tensor-parallel-size"] = 1 if layout.ep > 1 else layout.tp
    if layout.pp > 1:
        options |= _pipeline(job)
    for name in ("dp_replicate", "dp_shard"):  # what the world leaves over, and the distributed optimizer's instances
        job.read(f"layout.{name}")
    return options | _sharding(job)


def _pipeline(job: ExportJob) -> Options:
    layout, model = job.layout, job.model
    if job.read("layout.schedule") not in ("1f1b", "interleaved_1f1b"):
        job.refuse("layout.schedule", "runs 1f1b and interleaved_1f1b", "use one of them")
    virtual = job.read("layout.num_virtual_stages")
    num_chunks = layout.pp * virtual
    sizes = chunk_sizes(model.num_layers, num_chunks)
    if len(set(sizes)) == 1 and not model.num_mtp_layers:
        return {"num-virtual-stages-per-pipeline-rank": virtual} if virtual > 1 else {}
    # E embedding, t one decoder layer, m the prediction layers, L the loss; chunks in the order in which tokens pass them.
    chunks = ["t" * size for size in sizes]
    chunks[0], chunks[-1] = "E" + chunks[0], chunks[-1] + "m" * model.num_mtp_layers + "L"
    return {"pipeline-model-parallel-layout": "|".join(chunks)}


def _sharding(job: ExportJob) -> Options:
    """ZeRO 1 is the distributed optimizer, 2 and 3 are Megatron-FSDP; groups of dp_shard ranks where dp_replicate > 1."""
    layout = job.layout
    if layout.dp_shard == 1:
        return {}
    stage = job.read("layout.zero_stage")
    options: Options = {"use-distributed-optimizer": True}
    if layout.dp_replicate > 1:
        options["num-distributed-optimizer-instances"] = layout.dp_replicate
    if stage in SHARDED_BY_FSDP:
        return options | {
            "use-megatron-fsdp": True, "data-parallel-sharding-strategy": SHARDED_BY_FSDP[stage], "ckpt-format": "fsdp_dtensor",
            "no-gradient-accumulation-fusion": True,
        }  # fmt: skip
    return options | {"overlap-grad-reduce": True, "overlap-param-gather": True}


def training_options(job: ExportJob) -> Options:
    """Precision, kernels, recompute, optimizer, rate, length, checkpoints."""
    options = _precision(job) | _recompute(job)
    if job.workload.attention_kernel != "auto":
        options["attention-backend"] = job.read("workload.attention_kernel")
    if job.workload.loss_kernel == "fused":
        job.read("workload.loss_kernel")
        options["cross-entropy-loss-fusion"] = True
    optimizer = job.workload.optimizer
    if optimizer in OPTIMIZERS:
        options["optimizer"] = OPTIMIZERS[job.read("workload.optimizer")]
        if optimizer == "sgd":
            options["sgd-momentum"] = 0.0
        elif optimizer == "sgd_momentum":
            options["sgd-momentum"] = job.number("training.momentum", 0.9)
    else:
        job.drop("workload.optimizer", f"Megatron has {', '.join(OPTIMIZERS)}; its default adam stays")
    options["train-iters"] = job.num_steps
    given = job.training_numbers({
        "learning_rate": "lr", "warmup_steps": "lr-warmup-iters", "weight_decay": "weight-decay", "clip_norm": "clip-grad", "beta1": "adam-beta1",
        "beta2": "adam-beta2", "eps": "adam-eps", "seed": "seed", "checkpoint_every_steps": "save-interval",
    })  # fmt: skip
    options |= given
    fraction = job.number("training.min_lr_fraction")
    if fraction is not None and "lr" in given:
        options["min-lr"] = given["lr"] * fraction
    schedule = job.lr_schedule(("cosine", "wsd", "constant"))
    if schedule is not None:
        options["lr-decay-style"] = "WSD" if schedule == "wsd" else schedule
    if schedule == "wsd":
        options["lr-wsd-decay-iters"] = job.decay_steps()
    if "lr" not in given:
        job.note("the plan has no training.learning_rate, and Megatron has no default: add --lr")
    return options


def _precision(job: ExportJob) -> Options:
    precision = job.read("workload.precision")
    if precision == "tf32":
        job.drop("workload.precision", "is torch's own switch, torch.set_float32_matmul_precision")
    return PRECISIONS.get(precision, {})


def _recompute(job: ExportJob) -> Options:
    recompute = job.read("workload.recompute")
    if recompute == "full":
        return {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}
    return {"recompute-granularity": "selective", "recompute-modules": "core_attn"} if recompute == "selective" else {}


def cluster_environment(job: ExportJob) -> dict[str, str]:
    """Tensor and context parallelism before Blackwell want one connection; FSDP forbids it."""
    is_fsdp = job.layout.dp_shard > 1 and job.layout.zero_stage >= 2
    is_needed = (
        (job.layout.tp > 1 or job.layout.cp > 1) and job.cluster.accelerator.vendor.lower() == "nvidia" and job.cluster.accelerator.year < 2024
    )
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if is_needed and not is_fsdp else {}
