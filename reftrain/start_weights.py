"""The weights that a run starts from: another run's checkpoint, or a folder in HF's layout, into whatever layout this run has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from planner.errors import InputError
from reftrain.axes import local
from reftrain.checkpoint import CheckpointStore
from reftrain.checkpoint_files import MANIFEST
from reftrain.lora import without_adapters
from reftrain.model import Transformer
from reftrain.optim import local_squared_norm
from reftrain.parallel import Ranks

__all__ = ["best_checkpoint", "check_digest", "load_checkpoint", "load_start", "model_digest"]

DIGEST_TOLERANCE_FRACTION = 1e-6
"""Sums in another order differ by less, other weights by more."""


def load_start(models: Sequence[Transformer], ranks: Ranks, source: str) -> None:
    """Fills the model's own weights, not its adapters.

    Args:
        source: a run's folder (its best checkpoint, or the newest), a checkpoint, or a folder with HF-layout safetensors.

    Raises:
        InputError: no such folder, damaged, or the weights of another model; HF-layout weights on several pipeline stages.
    """
    folder = Path(source)
    if (folder / "checkpoints").is_dir():
        folder = best_checkpoint(folder)
    if (folder / MANIFEST).is_file():
        load_checkpoint(models, folder)
        return
    if ranks.layout.pp > 1:
        rule = "HF-layout weights are not read in parts, as pipeline stages need them"
        raise InputError.single("training.init_from", source, rule, "use pp: 1, or start from a checkpoint")
    from reftrain.hf_weights import load_weights

    load_weights(models[0], folder)


def best_checkpoint(run: Path) -> Path:
    """The checkpoint of a run with the lowest held-out loss where it kept that one, else its newest.

    Raises:
        InputError: it has none that is whole.
    """
    store = CheckpointStore(run / "checkpoints")
    newest = store.newest()
    if newest is None:
        raise InputError.single("training.init_from", str(run), "holds no checkpoint that is whole", "name a run that has saved one")
    step = store.read_extra(newest).get("best", {}).get("step", -1)
    best = store.folder / f"step-{step:08d}"
    return best if best.is_dir() else newest


@torch.no_grad()
def load_checkpoint(models: Sequence[Transformer], folder: Path, *, adapters: bool = False) -> None:
    """Fills the models' own weights from a checkpoint, or their adapters alone.

    Raises:
        InputError: damaged, or of another model.
    """
    store = CheckpointStore(folder.parent)
    for model in models:
        state: dict[str, Any] = {name: tensor for name, tensor in get_model_state_dict(model).items() if without_adapters(name) != adapters}
        # A checkpoint is fp32 and loads in place: into the weights themselves, or through a copy of those that LoRA froze in a narrower format.
        wide = {name: tensor if tensor.dtype == torch.float32 else torch.empty_like(tensor, dtype=torch.float32) for name, tensor in state.items()}
        try:
            store.load(folder, {"model": wide})
        except InputError as error:
            if any("Missing key" in problem.rule for problem in error.problems):
                fix = "start from the weights of this very model; those of a LoRA run after `python -m reftrain export RUN_DIR`"
                raise InputError.single("training.init_from", str(folder), "must hold all of the model's weights", fix) from None
            raise
        for name, tensor in state.items():
            if wide[name] is not tensor:
                tensor.copy_(wide[name])


@torch.no_grad()
def model_digest(models: Sequence[Transformer], ranks: Ranks) -> float:
    """A number that tells frozen weights apart, and does not depend on the layout: the norm of all of them."""
    frozen = (p for model in models for name, p in model.named_parameters() if without_adapters(name))
    square = sum((local_squared_norm([(p, local(p).float())], ranks.stage_size) for p in frozen), torch.zeros((), dtype=torch.float64))
    square = square.to(ranks.device)
    if ranks.world_size > 1:
        dist.all_reduce(square)
    return float(square.sqrt())


def check_digest(now: float | None, saved: float | None, checkpoint: Path) -> None:
    """Refuses adapters that were trained on other weights.

    Raises:
        InputError: the digests differ.
    """
    if now is not None and saved is not None and abs(now / saved - 1) > DIGEST_TOLERANCE_FRACTION:
        rule = "has changed since these adapters were trained on it (another norm of all weights)"
        raise InputError.single("training.init_from", f"norm {now:.9g}", rule, f"put back the weights of norm {saved:.9g}", str(checkpoint))
