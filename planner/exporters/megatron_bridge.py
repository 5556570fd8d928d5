"""Megatron-Bridge: overrides of a recipe, as the YAML tree that its training script merges.

Source: Megatron-Bridge 0.6.2, megatron/bridge/training/config.py (read); field names are those of Megatron core's TransformerConfig.
"""

from __future__ import annotations

from typing import Any

from planner.exporters import EXPORTERS, Draft, Exporter, ExportJob
from planner.exporters._megatron import layout_options, model_options, training_options
from planner.exporters._text import to_plain_yaml

MIXED_PRECISION = {
    "bf16": "bf16_mixed", "fp16": "fp16_mixed", "fp8": "bf16_with_fp8_delayed_scaling_mixed", "mxfp8": "bf16_with_mxfp8_mixed",
    "nvfp4": "bf16_with_nvfp4_mixed",
}  # fmt: skip
PLACES = {
    "seq-length": ("model.seq_length", "dataset.seq_length"),
    "expert-tensor-parallel-size": ("model.expert_tensor_parallel_size",),
    "num-virtual-stages-per-pipeline-rank": ("model.virtual_pipeline_model_parallel_size",),
    "max-position-embeddings": (),
    "position-embedding-type": ("model.position_embedding_type",),
    "make-vocab-size-divisible-by": ("model.make_vocab_size_divisible_by",),
    "untie-embeddings-and-output-weights": (),
    "group-query-attention": (),
    "swiglu": (),
    "disable-bias-linear": (),
    "norm-epsilon": ("model.layernorm_epsilon",),
    "mtp-num-layers": ("model.mtp_num_layers",),
    "num-experts": ("model.num_moe_experts",),
    "global-batch-size": ("train.global_batch_size",),
    "micro-batch-size": ("train.micro_batch_size",),
    "train-iters": ("train.train_iters",),
    "use-distributed-optimizer": ("ddp.use_distributed_optimizer", "optimizer.use_distributed_optimizer"),
    "overlap-grad-reduce": ("ddp.overlap_grad_reduce",),
    "overlap-param-gather": ("ddp.overlap_param_gather",),
    "use-megatron-fsdp": ("ddp.use_megatron_fsdp", "dist.use_megatron_fsdp"),
    "data-parallel-sharding-strategy": ("ddp.data_parallel_sharding_strategy",),
    "num-distributed-optimizer-instances": ("ddp.num_distributed_optimizer_instances",),
    "no-gradient-accumulation-fusion": (),
    "ckpt-format": ("checkpoint.ckpt_format",),
    "save-interval": ("checkpoint.save_interval",),
    "lr-decay-style": ("scheduler.lr_decay_style",),
    "lr-warmup-iters": ("scheduler.lr_warmup_iters",),
    "lr-wsd-decay-iters": ("scheduler.lr_wsd_decay_iters",),
    "seed": ("rng.seed",),
    "bf16": (),
    "fp16": (),
    "fp8-format": (),
    "fp8-recipe": (),
    "fp4-format": (),
    **{name: (f"optimizer.{name.replace('-', '_')}",) for name in (
        "optimizer", "lr", "min-lr", "weight-decay", "clip-grad", "adam-beta1", "adam-beta2", "adam-eps", "sgd-momentum")},
}  # fmt: skip
"""Option of Megatron-LM -> places in the tree; what is not here is `model.` with underscores; () is said in another way below."""


def overrides(options: dict[str, Any], job: ExportJob) -> dict[str, Any]:
    """The tree of overrides."""
    tree: dict[str, Any] = {}
    flat = {place: value for name, value in options.items() for place in PLACES.get(name, (f"model.{name.replace('-', '_')}",))}
    flat |= {
        "model.share_embeddings_and_output_weights": "untie-embeddings-and-output-weights" not in options,
        "model.num_query_groups": options.get("num-query-groups", options["num-attention-heads"]),
        "model.gated_linear_unit": "swiglu" in options,
        "model.add_bias_linear": "disable-bias-linear" not in options,
    }
    if job.workload.precision in MIXED_PRECISION:
        tree["mixed_precision"] = MIXED_PRECISION[job.workload.precision]
    if "recompute-modules" in options:
        flat["model.recompute_modules"] = [options["recompute-modules"]]
    for place, value in flat.items():
        section, _, name = place.partition(".")
        tree.setdefault(section, {})[name] = value
    return tree


class MegatronBridge(Exporter):
    """`bridge_overrides.yaml`, for a recipe of the user's choice."""

    name = "megatron-bridge"
    kind = "trainer"
    versions = ("0.6.2",)
    summary = "Megatron-Bridge overrides as YAML"
    leftover = "Megatron-Bridge's ConfigContainer has no such field"

    def write(self, job: ExportJob) -> Draft:
        """bridge_overrides.yaml."""
        options = {**model_options(job), **layout_options(job), **training_options(job)}
        job.check()
        job.drop("model.max_position_embeddings", "model.seq_length alone sizes the positions")
        recipe = job.placeholder("RECIPE", "recipe of the model's family, e.g. llama3_70b_pretrain_config", r"[A-Za-z0-9_]{1,80}")
        tree = overrides(options, job)
        tree["checkpoint"] = {**tree.get("checkpoint", {}), "save": job.placeholder("RUN_DIR", "folder for checkpoints, on shared storage")}
        if "window-size" in options:
            tree["model"]["window_size"] = [job.model.sliding_window, 0]
        text = job.header() + to_plain_yaml(tree)
        return Draft({"bridge_overrides.yaml": text}, f"run_recipe.py --recipe {recipe} --config_file bridge_overrides.yaml")


EXPORTERS.register("megatron-bridge")(MegatronBridge())
