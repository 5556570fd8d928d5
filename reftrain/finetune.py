"""A fine-tuning run as a plan: from another plan, or from the run whose weights it starts with; then `reftrain.train` runs it as any other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from planner.errors import InputError
from planner.files import read_yaml
from planner.plan import build_request, load_plan, spec_to_plain
from reftrain.config import RunConfig, make_run_config
from reftrain.example_batches import open_examples
from reftrain.parallel import Ranks
from reftrain.trials import predict

__all__ = ["Choices", "plan_finetune"]

OWN_KEYS = ("data", "num_steps", "warmup_steps", "init_from", "eval_every_steps", "profile_steps", "tokenizer", "patience_evals")
"""Keys under `training:` that belong to the run whose weights are taken."""
EVALUATIONS = 10
"""Of a run whose plan does not say how often."""
FULL_RATE_FRACTION = 0.1
"""All weights move in smaller steps than they were trained with; adapters start from nothing and take the same."""


@dataclass(frozen=True)
class Choices:
    """What the command line says."""

    plan: Path | None
    start: Path | None
    """A run's folder, a checkpoint or HF-layout weights; None: what the plan says."""
    job: Literal["finetune", "lora"] | None = None
    lora_rank: int | None = None
    epochs: float = 3.0
    training: dict[str, Any] | None = None
    """Keys under `training:`."""


def plan_finetune(choices: Choices) -> tuple[dict[str, Any], list[str]]:
    """(the plan to run, with a prediction where the planner can make one; what was chosen for want of a word about it).

    Raises:
        InputError: neither a plan nor a run to start from, no examples, no tokenizer, or keys that do not go together.
    """
    plan, is_own = _base(choices)
    workload, training = dict(plan.get("workload") or {}), dict(plan.get("training") or {})
    said = []
    if choices.job or workload.get("job") not in ("finetune", "lora"):
        workload["job"] = choices.job or "lora"
        said += [] if choices.job else ["job lora"]
    if choices.lora_rank is not None:
        workload["lora_rank"] = choices.lora_rank
    if not is_own:
        training = {key: value for key, value in training.items() if key not in OWN_KEYS}
        if workload["job"] == "finetune" and "learning_rate" in training:
            training["learning_rate"] *= FULL_RATE_FRACTION
        said.append(f"learning_rate {training.get('learning_rate', 'default')}, from the run's own")
    if choices.start is not None:
        training["init_from"] = str(choices.start)
    training |= choices.training or {}
    plan = {key: value for key, value in plan.items() if key not in ("prediction", "provenance")} | {"workload": workload, "training": training}
    config = make_run_config(build_request(plan))
    if not config.has_examples:
        rule, fix = "must be a file of examples, .jsonl or .jsonl.gz", "name one with --data; `python -m reftrain run` goes on with running text"
        raise InputError.single("--data", training.get("data"), rule, fix)
    said += _set_length(config, workload, training, choices.epochs)
    return {**plan, **predict(plan)}, said


def _base(choices: Choices) -> tuple[dict[str, Any], bool]:
    """(the plan that is changed, whether it is about this job)."""
    if choices.plan is not None:
        return spec_to_plain(load_plan(choices.plan)), True
    file = None if choices.start is None else choices.start / "plan.yaml"
    if file is None or not file.is_file():
        rule = "names no run with a plan.yaml, and there is no PLAN.yaml either: nothing says which model this is"
        raise InputError.single("--from", str(choices.start), rule, "write a plan: python -m planner estimate --model ... --out PLAN.yaml")
    plan = read_yaml(file)
    build_request(plan, str(file))
    return plan, False


def _set_length(config: RunConfig, workload: dict[str, Any], training: dict[str, Any], epochs: float) -> list[str]:
    """Steps from epochs over the examples, and evaluations, where nothing says how many; the plan's tokens follow."""
    said = []
    if not training.get("num_steps"):
        rows = open_examples(config, Ranks(config.layout, torch.device("cpu"))).train.num_rows
        training["num_steps"] = max(math.ceil(epochs * rows / config.global_batch_size), 1)
        said.append(f"{training['num_steps']} steps: {epochs:g} epochs over {rows} sequences")
    if not training.get("eval_every_steps"):
        training["eval_every_steps"] = max(training["num_steps"] // EVALUATIONS, 1)
        said.append(f"eval_every_steps {training['eval_every_steps']}")
    workload["tokens"] = float(training["num_steps"] * config.tokens_per_step)
    return said
