"""Megatron-LM's options, out of a launch script or a file that holds nothing else. The script is read, never run.

Options whose value is a shell variable are not understood; give them as numbers.
"""

from __future__ import annotations

import shlex
from typing import Any

from planner.errors import InputError, Problem
from planner.exporters._megatron import OPTIMIZERS, PRECISIONS, SHARDED_BY_FSDP
from planner.importers import IMPORTERS, Found, Given, Importer, quotient, real, whole

TRAINING = {
    "lr": "learning_rate", "lr-warmup-iters": "warmup_steps", "weight-decay": "weight_decay", "clip-grad": "clip_norm", "adam-beta1": "beta1",
    "adam-beta2": "beta2", "adam-eps": "eps", "seed": "seed", "save-interval": "checkpoint_every_steps",
}  # fmt: skip
SIZES = {
    "num-layers": "num_hidden_layers", "hidden-size": "hidden_size", "num-attention-heads": "num_attention_heads",
    "ffn-hidden-size": "intermediate_size", "vocab-size": "vocab_size", "max-position-embeddings": "max_position_embeddings",
    "kv-channels": "head_dim", "num-query-groups": "num_key_value_heads",
}  # fmt: skip
USED = {
    *TRAINING, *SIZES, "tensor-model-parallel-size", "pipeline-model-parallel-size", "context-parallel-size", "expert-model-parallel-size",
    "micro-batch-size", "global-batch-size", "seq-length", "sequence-parallel", "num-virtual-stages-per-pipeline-rank",
    "num-layers-per-virtual-pipeline-stage", "pipeline-model-parallel-layout", "use-distributed-optimizer", "use-megatron-fsdp", "use-torch-fsdp2",
    "data-parallel-sharding-strategy", "num-distributed-optimizer-instances", "bf16", "fp16", "fp8-format", "fp8-recipe", "fp4-format",
    "recompute-granularity", "optimizer", "train-iters", "sgd-momentum", "swiglu", "normalization", "position-embedding-type",
    "disable-bias-linear", "add-qkv-bias", "qk-layernorm", "untie-embeddings-and-output-weights", "group-query-attention", "num-experts",
    "moe-router-topk", "moe-ffn-hidden-size", "attention-dropout", "hidden-dropout", "rotary-base", "norm-epsilon",
}  # fmt: skip
QUIET = {
    "make-vocab-size-divisible-by", "data-path", "tokenizer-type", "tokenizer-model", "save", "load", "overlap-grad-reduce", "overlap-param-gather",
    "ckpt-format", "no-gradient-accumulation-fusion", "expert-tensor-parallel-size", "moe-grouped-gemm", "moe-token-dispatcher-type",
    "recompute-modules", "recompute-method", "recompute-num-layers",
}  # fmt: skip
"""Options that follow from others, or that say nothing about cost."""


class Megatron(Importer):
    """A bash array, a launch script, or a plain list of options."""

    name = "megatron"
    versions = ("0.19.2",)
    summary = "Megatron-LM options in a script"

    def read(self, text: str, where: str, given: Given) -> Found:
        """The plan's words for the options."""
        options = read_options(text, where)
        found = Found(stack="megatron-core")
        found.ignored = [f"--{name}" for name in options if name not in USED and name not in QUIET]
        if given.model is None:
            found.model = _model(options, where)
        _layout(options, found, given, where)
        _workload(options, found, where)
        return found


def read_options(text: str, where: str = "") -> dict[str, Any]:
    """Option -> its value, True for a switch; the last one wins, as in argparse.

    Example:
        >>> read_options("ARGS=(\\n  --bf16 # mixed\\n  --num-layers 4\\n)")
        {'bf16': True, 'num-layers': '4'}
    """
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise InputError.single("script", text[:60], f"must be words that a shell can read ({error})", "correct the file", where) from None
    options: dict[str, Any] = {}
    name = ""
    for word in (part for text in words for part in (text.split("=", 1) if text.startswith("--") else [text])):
        if word.startswith("--") and len(word) > 2:
            name = word[2:]
            options[name] = True
        else:
            if name and word not in (")", ";"):
                options[name] = word
            name = ""
    return options


def _model(options: dict[str, Any], where: str) -> dict[str, Any]:
    """The config.json that the options amount to."""
    for name in ("multi-latent-attention", "moe-shared-expert-intermediate-size", "moe-layer-freq", "window-size", "mtp-num-layers"):
        if name in options:
            raise InputError(Problem(f"--{name}", options[name], "the model's options are not understood", "name the model with --model", where))
    missing = [name for name in ("num-layers", "hidden-size", "num-attention-heads", "vocab-size") if name not in options]
    if missing:
        fix = "add it as a number, or name the model with --model"
        raise InputError(*(Problem(f"--{name}", None, "is needed to know the model", fix, where) for name in missing))
    sizes = {own: whole(options, name, 0, where) for name, own in SIZES.items() if name in options}
    heads, is_plain = sizes["num_attention_heads"], "swiglu" not in options
    sizes.setdefault("head_dim", sizes["hidden_size"] // heads)
    sizes.setdefault("num_key_value_heads", heads)
    sizes.setdefault("intermediate_size", 4 * sizes["hidden_size"])
    sizes.setdefault("max_position_embeddings", whole(options, "seq-length", 4096, where))
    tied = "untie-embeddings-and-output-weights" not in options
    if is_plain and str(options.get("position-embedding-type", "learned_absolute")) == "learned_absolute":
        return {
            "model_type": "gpt2", "n_embd": sizes["hidden_size"], "n_layer": sizes["num_hidden_layers"], "n_head": heads, "tie_word_embeddings": tied,
            "n_inner": sizes["intermediate_size"], "vocab_size": sizes["vocab_size"], "n_positions": sizes["max_position_embeddings"],
            "attn_pdrop": real(options, "attention-dropout", 0.1, where), "resid_pdrop": real(options, "hidden-dropout", 0.1, where),
        }  # fmt: skip
    if is_plain or options.get("normalization") != "RMSNorm":
        raise InputError(Problem("--swiglu", None, "neither a Llama nor a GPT: the model is not understood", "name it with --model", where))
    config: dict[str, Any] = {"model_type": "llama", **sizes, "tie_word_embeddings": tied}
    if "num-experts" in options:
        config |= {"model_type": "mixtral", "num_local_experts": whole(options, "num-experts", 1, where)}
        config["num_experts_per_tok"] = whole(options, "moe-router-topk", 2, where)
        config["intermediate_size"] = whole(options, "moe-ffn-hidden-size", sizes["intermediate_size"], where)
    elif "qk-layernorm" in options:
        config["model_type"] = "qwen3"
    elif "add-qkv-bias" in options:
        config["model_type"] = "qwen2"
    elif "disable-bias-linear" not in options:
        config |= {"attention_bias": True, "mlp_bias": True}
    for name, own in (("rotary-base", "rope_theta"), ("norm-epsilon", "rms_norm_eps")):
        if name in options:
            config[own] = real(options, name, 0.0, where)
    return config


def _layout(options: dict[str, Any], found: Found, given: Given, where: str) -> None:
    names = {"tp": "tensor", "pp": "pipeline", "ep": "expert"}
    layout: dict[str, Any] = {own: whole(options, f"{name}-model-parallel-size", 1, where) for own, name in names.items()}
    layout["cp"] = whole(options, "context-parallel-size", 1, where)
    if given.num_devices is None:
        raise InputError(Problem("--num-devices", None, "Megatron takes it from torchrun", "add it", where))
    dp = quotient(given.num_devices, layout["tp"] * layout["pp"] * layout["cp"], "--num-devices", where)
    stage = 1 if "use-distributed-optimizer" in options else 0
    if "use-megatron-fsdp" in options or "use-torch-fsdp2" in options:
        strategies = {name: number for number, name in SHARDED_BY_FSDP.items()} | {"optim": 1, "no_shard": 0}
        stage = strategies.get(str(options.get("data-parallel-sharding-strategy", "optim_grads_params")), 3)
    copies = whole(options, "num-distributed-optimizer-instances", 1, where) if stage else dp
    found.num_devices = given.num_devices
    layout |= {
        "dp_replicate": copies,
        "dp_shard": quotient(dp, copies, "--num-distributed-optimizer-instances", where),
        "zero_stage": stage if stage and dp > copies else 0,
        "sequence_parallel": "sequence-parallel" in options,
        "micro_batch_size": whole(options, "micro-batch-size", 1, where),
    }
    if layout["pp"] > 1:
        virtual = _virtual_stages(options, layout["pp"], where)
        layout |= {"num_virtual_stages": virtual, "schedule": "interleaved_1f1b" if virtual > 1 else "1f1b"}
    found.layout = layout


def _virtual_stages(options: dict[str, Any], pp: int, where: str) -> int:
    if "pipeline-model-parallel-layout" in options:
        return quotient(str(options["pipeline-model-parallel-layout"]).count("|") + 1, pp, "--pipeline-model-parallel-layout", where)
    if "num-layers-per-virtual-pipeline-stage" in options:
        chunk = whole(options, "num-layers-per-virtual-pipeline-stage", 1, where)
        return quotient(whole(options, "num-layers", 1, where), pp * chunk, "--num-layers", where)
    return whole(options, "num-virtual-stages-per-pipeline-rank", 1, where)


def _workload(options: dict[str, Any], found: Found, where: str) -> None:
    layout = found.layout
    per_round = layout["dp_replicate"] * layout["dp_shard"] * layout["micro_batch_size"]
    batch = whole(options, "global-batch-size", per_round, where)
    found.workload = {"global_batch_size": batch, "precision": _precision(options)}
    granularity = options.get("recompute-granularity")
    found.workload["recompute"] = granularity if granularity in ("full", "selective") else "none"
    if "seq-length" in options:
        found.workload["seq_len"] = whole(options, "seq-length", 1, where)
    if "train-iters" in options:
        steps = whole(options, "train-iters", 1, where)
        found.training["num_steps"] = steps
        found.workload["tokens"] = float(steps * batch * found.workload.get("seq_len", 1)) if "seq-length" in options else None
    kinds = {theirs: own for own, theirs in OPTIMIZERS.items()} | {"sgd": "sgd_momentum"}
    kind = kinds.get(str(options.get("optimizer", "adam")), "adamw")
    found.workload["optimizer"] = "sgd" if kind == "sgd_momentum" and options.get("sgd-momentum") in ("0", "0.0") else kind
    for name, own in TRAINING.items():
        value = options.get(name)
        if isinstance(value, str):
            try:
                found.training[own] = int(value) if value.isdigit() else float(value)
            except ValueError:
                found.ignored.append(f"--{name} {value[:40]}")


def _precision(options: dict[str, Any]) -> str:
    """The plan's precision whose options are all there; the narrowest wins."""
    for name in ("nvfp4", "mxfp8", "fp8", "fp16", "bf16"):
        wanted = PRECISIONS[name] if name != "fp8" else {"fp8-format": None}
        if all(key in options and (value in (True, None) or options[key] == value) for key, value in wanted.items()):
            return name
    return "fp32"


IMPORTERS.register("megatron")(Megatron())
