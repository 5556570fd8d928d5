"""Hypothesis strategies: models, stacks, layouts and whole requests that keep every rule, small enough to price in milliseconds."""

from __future__ import annotations

from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from planner.architectures import load_model
from planner.errors import InputError
from planner.layout import Layout
from planner.layout_rules import Facts, check_layout
from planner.schedules import SCHEDULES, check_schedule

ACCELERATORS = ("h100-80gb-sxm", "a100-80gb-sxm", "mi300x", "tpu-v4", "l40s")
STACKS = ("megatron-2021", "megatron-core", "torchtitan", "torch-eager", "maxtext", "deepspeed", "llm-foundry")
POWERS = (1, 2, 4)


@st.composite
def models(draw: st.DrawFn, families: tuple[str, ...] = ("gpt2", "llama", "mixtral")) -> dict[str, Any]:
    """An HF configuration of a small model whose heads and widths split four ways."""
    family = draw(st.sampled_from(families))
    heads, head_dim, layers = draw(st.sampled_from((4, 8, 16))), draw(st.sampled_from((64, 128))), draw(st.integers(4, 12))
    vocab, tied = 256 * draw(st.integers(4, 400)), draw(st.booleans())
    if family == "gpt2":
        return {
            "model_type": "gpt2", "n_embd": heads * head_dim, "n_layer": layers, "n_head": heads, "vocab_size": vocab, "n_positions": 4096,
            "attn_pdrop": draw(st.sampled_from((0.0, 0.1))), "resid_pdrop": draw(st.sampled_from((0.0, 0.1))), "tie_word_embeddings": tied,
        }  # fmt: skip
    config = {
        "model_type": family, "hidden_size": heads * head_dim, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([k for k in (1, 2, 4, 8) if k <= heads])), "vocab_size": vocab,
        "intermediate_size": 256 * draw(st.integers(1, 32)), "max_position_embeddings": 4096, "tie_word_embeddings": tied,
    }  # fmt: skip
    if family == "mixtral":
        config |= {"num_local_experts": draw(st.sampled_from((4, 8))), "num_experts_per_tok": draw(st.integers(1, 4))}
    return config


@st.composite
def layouts(draw: st.DrawFn, model: dict[str, Any]) -> dict[str, Any]:
    """A layout in which every degree is a small power of two; not checked against the rules."""
    experts = model.get("num_local_experts", 1)
    tp, shard = draw(st.sampled_from(POWERS)), draw(st.sampled_from((1, 2, 4, 8)))
    schedule = draw(st.sampled_from(list(SCHEDULES)))
    return {
        "dp_replicate": draw(st.sampled_from(POWERS)), "dp_shard": shard, "tp": tp, "cp": draw(st.sampled_from((1, 1, 2))),
        "pp": draw(st.sampled_from(POWERS)), "num_virtual_stages": draw(st.sampled_from((1, 2))), "schedule": schedule,
        "ep": draw(st.sampled_from([e for e in (1, 2, 4) if e <= experts])),
        "zero_stage": draw(st.integers(0, 3)) if shard == 1 else draw(st.integers(1, 3)),
        "sequence_parallel": draw(st.booleans()) if tp > 1 else False, "micro_batch_size": draw(st.sampled_from(POWERS)),
    }  # fmt: skip


def is_legal(request: dict[str, Any]) -> bool:
    """Whether the layout keeps every rule, and its schedule too."""
    workload, layout = request["workload"], Layout(**request["layout"])
    facts = Facts(load_model(request["model"]), request["cluster"]["num_devices"], workload["seq_len"], workload["global_batch_size"])
    try:
        check_layout(layout, facts)
        check_schedule(layout.schedule, layout.pp, layout.num_virtual_stages, workload["global_batch_size"] // (layout.dp * layout.micro_batch_size))
    except InputError:
        return False
    return True


def with_layout(request: dict[str, Any], num_microbatches: int | None = None, **changes: Any) -> dict[str, Any]:
    """The same request under a changed layout, with the devices that it needs, and the batch of so many microbatches per pipeline."""
    old, layout = Layout(**request["layout"]), Layout(**(request["layout"] | changes))
    count = num_microbatches or request["workload"]["global_batch_size"] // (old.dp * old.micro_batch_size)
    workload = request["workload"] | {"global_batch_size": count * layout.dp * layout.micro_batch_size}
    return request | {
        "layout": layout.model_dump(), "workload": workload, "cluster": request["cluster"] | {"num_devices": layout.num_devices},
    }  # fmt: skip


@st.composite
def requests(draw: st.DrawFn, families: tuple[str, ...] = ("gpt2", "llama", "mixtral"), **fixed: Any) -> dict[str, Any]:
    """A complete request that keeps every rule. `fixed`: keys of the layout, and `stack`, `recompute` or `accelerator`."""
    model = draw(models(families))
    special = {name: fixed.pop(name) for name in ("stack", "recompute", "accelerator") if name in fixed}
    layout = draw(layouts(model)) | fixed
    if layout["tp"] == 1:
        layout["sequence_parallel"] = False
    count = draw(st.sampled_from((1, 2, 4, 8, 16)))
    complete = Layout(**layout)
    workload = {
        "seq_len": draw(st.sampled_from((256, 512, 1024, 4096))), "global_batch_size": count * complete.dp * complete.micro_batch_size, "tokens": 1e9,
        "precision": "bf16", "optimizer": draw(st.sampled_from(("adamw", "sgd", "sgd_momentum", "adafactor", "adamw_8bit", "muon"))),
        "recompute": special.get("recompute") or draw(st.sampled_from(("none", "selective", "full"))),
        "attention_kernel": draw(st.sampled_from(("auto", "flash", "unfused"))),
    }  # fmt: skip
    request = {
        "model": model, "workload": workload, "layout": layout, "stack": special.get("stack") or draw(st.sampled_from(STACKS)),
        "cluster": {"accelerator": special.get("accelerator") or draw(st.sampled_from(ACCELERATORS)), "num_devices": complete.num_devices},
    }  # fmt: skip
    assume(is_legal(request))
    return request
