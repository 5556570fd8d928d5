"""litgpt: the YAML of `litgpt pretrain --config`.

Source: litgpt 0.5.13, litgpt/pretrain.py, args.py, config.py, checked by its own parser. It runs PyTorch's FSDP with HYBRID_SHARD:
full sharding within a node, replicas across nodes.
"""

from __future__ import annotations

from typing import Any

from planner.exporters import EXPORTERS, Draft, Exporter, ExportJob
from planner.exporters._text import to_plain_yaml

MLPS = {("silu", True): "LLaMAMLP", ("gelu", True): "GemmaMLP", ("gelu", False): "GptNeoxMLP"}
OPTIMIZERS = {"adamw": "torch.optim.AdamW", "sgd": "torch.optim.SGD", "sgd_momentum": "torch.optim.SGD", "adafactor": "torch.optim.Adafactor"}


class LitGpt(Exporter):
    """`pretrain.yaml`."""

    name = "litgpt"
    kind = "trainer"
    versions = ("0.5.13",)
    summary = "litgpt pretrain YAML"
    leftover = "litgpt's pretrain has no such argument"

    def write(self, job: ExportJob) -> Draft:
        """pretrain.yaml."""
        values: dict[str, Any] = {
            "model_name": job.slug,
            "model_config": _model(job),
            "out_dir": job.placeholder("RUN_DIR", "folder for checkpoints, on storage that all nodes see"),
            "precision": _precision(job),
            "resume": "auto",
            "train": _train(job),
            "optimizer": _optimizer(job),
            **_devices(job),
            "tokenizer_dir": job.placeholder("TOKENIZER", "folder of the tokenizer"),
        }
        if job.number("training.seed") is not None:
            values["seed"] = int(job.keys["training.seed"])
        job.check()
        if job.workload.recompute == "full":
            job.drop("workload.recompute", "litgpt checkpoints activations only when its FSDPStrategy is edited")
        return Draft({"pretrain.yaml": job.header() + to_plain_yaml(values)}, "litgpt pretrain --config pretrain.yaml --data ...")


def _model(job: ExportJob) -> dict[str, Any]:
    model = job.model
    mlp = MLPS.get((job.read("model.activation"), job.read("model.is_gated")))
    values: dict[str, Any] = {
        "name": job.slug,
        "block_size": max(job.read("model.max_position_embeddings"), int(job.keys["workload.seq_len"])),
        "n_layer": job.read("model.num_layers"),
        "n_embd": job.read("model.hidden_size"),
        "n_head": job.read("model.num_attention_heads"),
        "head_size": job.read("model.head_dim"),
        "n_query_groups": job.read("model.num_key_value_heads"),
        "vocab_size": job.read("model.vocab_size"),
        "padded_vocab_size": model.vocab_size,
        "intermediate_size": job.read("model.intermediate_size"),
        "norm_class_name": {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[job.read("model.norm")],
        "norm_qk": job.read("model.qk_norm") == "head",
        "parallel_residual": job.read("model.is_parallel_block"),
        "attn_bias": job.read("model.qkv_bias"),
        "bias": job.read("model.mlp_bias"),
        "lm_head_bias": job.read("model.head_bias"),
        "mlp_class_name": mlp,
        "rotary_percentage": 1.0,
        "rope_base": int(job.number("model.rope_theta", 10000)),
    }
    job.read("model.norm_bias")  # what LayerNorm has
    if job.read("model.attention_out_bias") != model.mlp_bias:
        job.refuse("model.attention_out_bias", "has one switch for the biases of attention output and feed-forward", "use another target")
    if mlp is None:
        job.refuse("model.activation", f"knows {', '.join(MLPS.values())}", "use another target")
    if job.number("model.norm_eps") is not None:
        values["norm_eps"] = job.keys["model.norm_eps"]
    if model.moe is not None:
        values |= {
            "mlp_class_name": "LLaMAMoE", "n_expert": job.read("model.moe.num_experts"),
            "n_expert_per_token": job.read("model.moe.num_experts_per_token"), "moe_intermediate_size": job.read("model.moe.intermediate_size"),
        }  # fmt: skip
    if job.read("model.sliding_window"):
        kinds = [int(model.window_at(layer) > 0) for layer in range(model.num_layers)]
        job.read("model.global_layer_period")
        values |= {"sliding_window_size": model.sliding_window, "sliding_window_indices": kinds}
    job.drop_dropout("litgpt's blocks have no dropout")
    job.read("model.tie_word_embeddings")
    odd = [*job.unread_structure(), *(["qk_norm"] if model.qk_norm == "full" else [])]
    if odd:
        job.refuse("model", f"its blocks have no {', '.join(odd)}", "use another target")
    return values


def _precision(job: ExportJob) -> str:
    precision = job.read("workload.precision")
    if precision not in ("bf16", "fp32"):
        job.drop("workload.precision", "pretrain knows bf16-mixed, bf16-true and 32-true")
    return "32-true" if precision in ("fp32", "tf32") else "bf16-mixed"


def _train(job: ExportJob) -> dict[str, Any]:
    values = {
        "global_batch_size": job.read("workload.global_batch_size"),
        "micro_batch_size": job.read("layout.micro_batch_size"),
        "max_seq_length": job.read("workload.seq_len"),
        "max_tokens": job.num_steps * int(job.keys["workload.global_batch_size"]) * int(job.keys["workload.seq_len"]),
        "tie_embeddings": job.model.tie_word_embeddings,
        "max_norm": job.number("training.clip_norm"),
        "lr_warmup_steps": job.number("training.warmup_steps"),
        "save_interval": job.number("training.checkpoint_every_steps"),
    }
    rate, fraction = job.number("training.learning_rate"), job.number("training.min_lr_fraction")
    if rate is not None and fraction is not None:
        values["min_lr"] = rate * fraction
    job.lr_schedule(("cosine",))  # litgpt's only one
    return {name: value for name, value in values.items() if value is not None}


def _optimizer(job: ExportJob) -> dict[str, Any]:
    name = job.workload.optimizer
    if name not in OPTIMIZERS:
        job.drop("workload.optimizer", "is not in torch.optim; AdamW stays")
        name = "adamw"
    else:
        job.read("workload.optimizer")
    arguments: dict[str, Any] = {**job.training_numbers({"learning_rate": "lr", "weight_decay": "weight_decay"})}
    if name == "adamw":
        betas = job.betas()
        arguments |= ({} if betas is None else {"betas": list(betas)}) | job.training_numbers({"eps": "eps"})
    if name == "sgd_momentum":
        arguments["momentum"] = job.number("training.momentum", 0.9)
    return {"class_path": OPTIMIZERS[name], "init_args": arguments}


def _devices(job: ExportJob) -> dict[str, int]:
    layout = job.layout
    for name in ("tp", "cp", "pp", "ep"):
        job.refuse_degree(name, "has data parallelism alone")
    hybrid = (job.num_nodes, job.devices_per_node)
    given = (job.read("layout.dp_replicate"), job.read("layout.dp_shard"))
    if layout.num_devices > 1 and given != hybrid:
        fix = f"use dp_replicate: {hybrid[0]}, dp_shard: {hybrid[1]}"
        job.refuse("layout.dp_shard", f"shards within a node of {hybrid[1]} and replicates over the {hybrid[0]} nodes", fix)
    if job.read("layout.zero_stage") != 3 and layout.dp_shard > 1:
        job.drop("layout.zero_stage", "HYBRID_SHARD is stage 3 within the node")
    return {"devices": job.devices_per_node, "num_nodes": job.num_nodes}


EXPORTERS.register("litgpt")(LitGpt())
