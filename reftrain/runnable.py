"""What this trainer, its device and its backend cannot run, although a plan may ask for it: refused before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from planner.errors import InputError, Problem
from planner.layout import Layout
from planner.model_spec import ModelSpec
from planner.workload import Workload
from reftrain.config import RunConfig

__all__ = ["check_runnable", "expert_shards"]

ONE_CHUNK_SCHEDULES = ("gpipe", "1f1b", "zb_h1")
WHOLE_MATRIX_OPTIMIZERS = ("muon", "adafactor")


@dataclass(frozen=True)
class Facts:
    """What a rule may look at."""

    config: RunConfig
    device: torch.device

    @property
    def layout(self) -> Layout:
        """As planned."""
        return self.config.layout

    @property
    def model(self) -> ModelSpec:
        """As planned."""
        return self.config.model

    @property
    def workload(self) -> Workload:
        """As planned."""
        return self.config.workload

    @property
    def is_finetune(self) -> bool:
        """Whether it trains on examples, or adapters."""
        return self.config.has_examples or self.workload.job == "lora"

    @property
    def stage_size(self) -> int:
        """Processes of one pipeline stage."""
        return self.layout.dp * self.layout.cp * self.layout.tp

    @property
    def num_chunks(self) -> int:
        """Parts that the pipeline cuts the model into."""
        return self.layout.pp * self.layout.num_virtual_stages

    @property
    def splits_weights(self) -> bool:
        """Whether any matrix lies in parts on several ranks, or FSDP2 wraps it."""
        layout = self.layout
        return layout.tp > 1 or layout.zero_stage > 0 or (self.stage_size > 1 and layout.cp * layout.pp * layout.ep > 1)


@dataclass(frozen=True)
class Rule:
    """One obstacle: its key, when it stands in the way, and how to tell a person."""

    key: str
    stands: Callable[[Facts], bool]
    text: Callable[[Facts], str]
    fix: str


RULES: tuple[Rule, ...] = (
    Rule(
        "layout.schedule",
        lambda f: f.layout.schedule == "dualpipe" and f.layout.pp > 1,
        lambda f: "torch has no DualPipe schedule",
        "use zb_h1 or 1f1b",
    ),
    Rule(
        "layout.tp",
        lambda f: f.model.mla is None and f.model.num_key_value_heads % f.layout.tp != 0,
        lambda f: f"reftrain does not copy key-value heads: tp must divide num_key_value_heads = {f.model.num_key_value_heads}",
        "use a smaller tp",
    ),
    Rule(
        "layout.tp",
        lambda f: f.model.vocab_size % f.layout.tp != 0,
        lambda f: f"must divide vocab_size = {f.model.vocab_size}",
        "pad vocab_size, or use another tp",
    ),
    Rule(
        "layout.tp",
        lambda f: f.model.moe is not None and f.model.moe.shared_intermediate_size % f.layout.tp != 0,
        lambda f: f"must divide the shared experts' width = {f.model.moe.shared_intermediate_size if f.model.moe else 0}",
        "use a smaller tp",
    ),
    Rule(
        "layout.tp",
        lambda f: f.layout.tp > 1 and f.model.qk_norm == "full",
        lambda f: "a norm over all heads cannot be split over heads",
        "use tp: 1",
    ),
    Rule(
        "layout.tp",
        lambda f: f.layout.tp > 1 and f.model.hidden_dropout > 0,
        lambda f: f"dropout would differ between tp ranks, and the model has {f.model.hidden_dropout:g}",
        "set the model's dropout to 0, or tp: 1",
    ),
    Rule(
        "layout.cp",
        lambda f: f.layout.cp > 1 and not f.model.is_causal,
        lambda f: "an encoder's masked tokens are not even over slices",
        "use cp: 1",
    ),
    Rule(
        "layout.ep",
        lambda f: f.layout.ep > 1 and f.stage_size % (f.layout.ep * expert_shards(f.layout)) != 0,
        lambda f: f"ep times {expert_shards(f.layout)} expert shards must divide the {f.stage_size} ranks of a stage",
        "use an ep that divides dp_shard * cp * tp",
    ),
    Rule(
        "layout.num_virtual_stages",
        lambda f: f.layout.pp > 1 and f.layout.schedule in ONE_CHUNK_SCHEDULES and f.layout.num_virtual_stages > 1,
        lambda f: f"{f.layout.schedule} runs one chunk per rank",
        "use interleaved_1f1b",
    ),
    Rule(
        "layout.num_virtual_stages",
        lambda f: f.layout.pp == 1 and f.layout.num_virtual_stages > 1,
        lambda f: "one rank has nobody to interleave with",
        "use num_virtual_stages: 1",
    ),
    Rule(
        "workload.global_batch_size",
        lambda f: f.layout.pp > 1 and f.layout.schedule != "gpipe" and f.config.num_microbatches < f.layout.pp,
        lambda f: f"{f.layout.schedule} needs at least pp = {f.layout.pp} microbatches, and there are {f.config.num_microbatches}",
        "raise it, or use gpipe",
    ),
    Rule(
        "workload.global_batch_size",
        lambda f: f.layout.pp > 1 and f.layout.schedule == "interleaved_1f1b" and f.config.num_microbatches % f.layout.pp != 0,
        lambda f: f"interleaved_1f1b goes in rounds of pp = {f.layout.pp} microbatches, and there are {f.config.num_microbatches}",
        "make the microbatches a multiple of pp, or use 1f1b",
    ),
    Rule(
        "layout.pp",
        lambda f: f.num_chunks > f.model.num_layers,
        lambda f: f"each of the {f.num_chunks} chunks (pp * num_virtual_stages) needs one of the {f.model.num_layers} layers",
        "use fewer",
    ),
    Rule(
        "workload.recompute",
        lambda f: f.layout.pp > 1 and f.layout.schedule == "zb_h1" and f.workload.recompute != "none",
        lambda f: (
            "zb_h1 goes back through each block twice, and torch then makes it again each time and holds it until the weights have their gradients"
        ),
        "use none, or the schedule 1f1b",
    ),
    Rule(
        "workload.optimizer",
        lambda f: f.workload.optimizer in WHOLE_MATRIX_OPTIMIZERS and f.splits_weights,
        lambda f: f"{f.workload.optimizer} works on whole matrices, and this layout splits them",
        "use adamw, or plain data parallelism with zero_stage: 0",
    ),
    Rule(
        "training.compile",
        # Compiled with the collectives of tensor parallelism inside, blocks gave gradients that were 4% off.
        lambda f: f.config.training.compile and max(f.layout.tp, f.layout.cp, f.layout.ep) > 1,
        lambda f: "compiled blocks must not hold collectives, and tp, cp and ep put some there",
        "set compile: false, or use dp_replicate, dp_shard or pp",
    ),
    Rule(
        "workload.precision",
        lambda f: f.workload.precision == "fp16" and f.layout.pp > 1,
        lambda f: "a scaled loss does not go through torch's schedules",
        "use bf16",
    ),
    Rule(
        "workload.precision",
        lambda f: f.workload.precision == "tf32" and f.device.type != "cuda",
        lambda f: f"a {f.device.type} has no TF32",
        "use fp32",
    ),
    Rule(
        "layout.pp",
        lambda f: f.layout.pp > 1 and f.is_finetune,
        lambda f: "torch's schedules take every microbatch's loss for as much as any other's, and hold frozen weights' places open",
        "use dp_replicate, dp_shard or tp for examples and adapters",
    ),
    Rule(
        "layout.cp",
        lambda f: f.layout.cp > 1 and f.config.has_examples,
        lambda f: "responses are not even over slices of a sequence",
        "use dp_replicate, dp_shard or tp",
    ),
    Rule(
        "training.data",
        lambda f: f.config.has_examples and not f.model.is_causal,
        lambda f: "an encoder fills gaps and writes no responses",
        "use a decoder",
    ),
    Rule(
        "layout.tp",
        lambda f: f.layout.tp > 1 and f.workload.lora_dropout > 0,
        lambda f: f"dropout would differ between tp ranks, and lora_dropout is {f.workload.lora_dropout:g}",
        "set lora_dropout: 0, or tp: 1",
    ),
    Rule(
        "workload.frozen_format",
        lambda f: f.workload.frozen_format != "compute" and f.layout.num_devices > 1 and f.splits_weights,
        lambda f: "weights in four bits are whole ones, and this layout splits them",
        "use one device, or plain data parallelism with zero_stage: 0",
    ),
    Rule(
        "training.compile",
        lambda f: f.config.training.compile and f.workload.job == "lora",
        lambda f: "adapters were never tried with it",
        "set compile: false",
    ),
    Rule(
        "training.patience_evals",
        lambda f: f.config.training.patience_evals is not None and f.config.training.eval_every_steps == 0,
        lambda f: "counts evaluations, and eval_every_steps is 0: there is only the last",
        "set eval_every_steps",
    ),
    Rule(
        "workload.precision",
        lambda f: f.workload.precision == "fp8",
        lambda f: "reftrain has no fp8 matmuls",
        "use bf16",
    ),
)


def expert_shards(layout: Layout) -> int:
    """Ranks over which ZeRO shards each expert: those that share the sharding and hold the same experts."""
    return max(layout.dp_shard * layout.cp * layout.tp // layout.ep, 1)


def check_runnable(config: RunConfig, device: torch.device) -> None:
    """Refuses a layout that this trainer, device or backend cannot run, with the reason, before anything starts.

    Raises:
        InputError: one Problem per obstacle.
    """
    facts = Facts(config, device)
    problems = [Problem(rule.key, _value(config, rule.key), rule.text(facts), rule.fix) for rule in RULES if rule.stands(facts)]
    if problems:
        raise InputError(*problems)


def _value(config: RunConfig, key: str) -> Any:
    part, name = key.split(".")
    return getattr(getattr(config, part), name)
