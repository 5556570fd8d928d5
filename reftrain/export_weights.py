"""The weights of a run for other programs: HF's layout, adapters merged in, the tokenizer beside them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from planner.errors import InputError
from planner.layout import Layout
from reftrain.config import RunConfig, load_run_config
from reftrain.example_batches import beside_weights
from reftrain.hf_weights import save_weights
from reftrain.lora import round_frozen
from reftrain.model import Transformer
from reftrain.parallel import Ranks, build_model_parts, unwrap
from reftrain.start_weights import best_checkpoint, load_checkpoint, load_start

__all__ = ["export_run", "restored_model"]


def restored_model(run: Path) -> tuple[RunConfig, Transformer, Path]:
    """(the run, its model on one process with the weights of its best checkpoint or else its newest, that checkpoint).

    Raises:
        InputError: no run, or no checkpoint that is whole.
    """
    config = load_run_config(run / "plan.yaml")
    config = replace(config, layout=Layout(micro_batch_size=1), training=config.training.model_copy(update={"compile": False}))
    ranks = Ranks(config.layout, torch.device("cpu"))
    model, checkpoint, is_lora = unwrap(build_model_parts(config, ranks)[0]), best_checkpoint(run), config.workload.job == "lora"
    if is_lora and config.training.init_from:
        load_start([model], ranks, config.training.init_from)
    if config.workload.frozen_format != "compute":
        round_frozen(model, config.workload.frozen_format)
    load_checkpoint([model], checkpoint, adapters=is_lora)
    return config, model.eval(), checkpoint


def export_run(run: Path, out: Path) -> Path:
    """Writes model.safetensors, config.json and tokenizer.json; returns the checkpoint that they are.

    Raises:
        InputError: see `restored_model`; a family without HF layout here; a folder that holds weights already.
    """
    if (out / "model.safetensors").exists():
        raise InputError.single("--out", str(out), "holds weights already", "choose another folder")
    config, model, checkpoint = restored_model(run)
    save_weights(model, config.model_config, out, config.adapters.scale)
    tokenizer = next((folder / "tokenizer.json" for folder in beside_weights(run) if (folder / "tokenizer.json").is_file()), None)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, out / "tokenizer.json")
    return checkpoint
