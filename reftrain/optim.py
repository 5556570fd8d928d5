"""Optimizers from torch, learning-rate schedules as pure functions, and one norm of gradients for every layout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from planner.errors import InputError
from reftrain.config import RunConfig, Training

__all__ = ["learning_rate", "local_gradients", "local_squared_norm", "make_optimizers", "scale_gradients"]

WHOLE_MATRIX = ("muon", "adafactor")
"""Optimizers whose step needs a matrix in one piece."""


def learning_rate(step: int, num_steps: int, warmup_steps: int, training: Training) -> float:
    """Rate of step `step` (from 0): a linear rise, then cosine, or constant with a linear fall at the end (WSD), or constant.

    Source: cosine arXiv:1608.03983; WSD arXiv:2404.06395.

    Example:
        >>> t = Training(learning_rate=1.0, lr_schedule="wsd", decay_fraction=0.5, min_lr_fraction=0.0)
        >>> [learning_rate(step, 8, 2, t) for step in (0, 1, 3, 4, 6)]
        [0.5, 1.0, 1.0, 1.0, 0.5]
    """
    if step < warmup_steps:
        return training.learning_rate * (step + 1) / warmup_steps
    low = training.min_lr_fraction
    if training.lr_schedule == "constant":
        share = 1.0
    elif training.lr_schedule == "cosine":
        done = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
        share = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    else:
        num_decay = max(round(num_steps * training.decay_fraction), 1)
        left = min((num_steps - step) / num_decay, 1.0)
        share = low + (1 - low) * max(left, 0.0)
    return training.learning_rate * share


def _groups(parts: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not; tensors of different meshes cannot go through one fused kernel."""
    groups: dict[tuple[bool, DeviceMesh | None], list[nn.Parameter]] = {}
    for _, parameter in parts:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((parameter.ndim > 1, mesh), []).append(parameter)
    return [{"params": params, "weight_decay": weight_decay if decays else 0.0} for (decays, _), params in groups.items()]


def make_optimizers(parts: Sequence[nn.Module], config: RunConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of this rank's model parts: one each, and with Muon a second one for what is no matrix of a block.

    Raises:
        InputError: Muon or Adafactor on split matrices.
    """
    training, name = config.training, config.workload.optimizer
    named = [[(n, p) for n, p in part.named_parameters() if p.requires_grad] for part in parts]
    if name in WHOLE_MATRIX and any(isinstance(p, DTensor) for part in named for _, p in part):
        rule = f"{name} works on whole matrices, and this layout splits them"
        raise InputError.single("workload.optimizer", name, rule, "use adamw, or plain data parallelism with zero_stage: 0")
    found: list[torch.optim.Optimizer] = []
    for part in named:
        if name == "muon":
            inner = [(n, p) for n, p in part if p.ndim == 2 and "blocks." in n]
            rest = [(n, p) for n, p in part if not (p.ndim == 2 and "blocks." in n)]
            if inner:
                rate, decay, momentum = training.learning_rate, training.weight_decay, training.momentum
                matrices = [p for _, p in inner]
                found.append(torch.optim.Muon(matrices, lr=rate, weight_decay=decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"))
            part = rest
        groups = _groups(part, training.weight_decay)
        if name in ("adamw", "muon"):
            betas = (training.beta1, training.beta2)
            found.append(torch.optim.AdamW(groups, lr=training.learning_rate, betas=betas, eps=training.eps, fused=True))
        elif name == "adafactor":
            found.append(torch.optim.Adafactor(groups, lr=training.learning_rate))
        else:
            sgd_momentum = training.momentum if name == "sgd_momentum" else 0.0
            found.append(torch.optim.SGD(groups, lr=training.learning_rate, momentum=sgd_momentum, foreach=True))
    return found


def local_gradients(parts: Sequence[nn.Module]) -> list[tuple[nn.Parameter, Tensor]]:
    """(parameter, this rank's share of its gradient) for all that have one."""
    pairs = []
    for part in parts:
        for parameter in part.parameters():
            grad = parameter.grad
            if grad is not None:
                pairs.append((parameter, grad.to_local() if isinstance(grad, DTensor) else grad))
    return pairs


def local_squared_norm(pairs: Sequence[tuple[nn.Parameter, Tensor]], stage_size: int, left_out: frozenset[int] = frozenset()) -> Tensor:
    """This rank's part of the squared norm of all gradients, [] fp64; summed over all ranks it is the whole.

    A gradient that several ranks of a stage hold in full is divided by their number.
    Args:
        left_out: ids of parameters that another rank counts (the copy of a parted tied table).
    """
    counted = [(p, g) for p, g in pairs if id(p) not in left_out]
    if not counted:
        return torch.zeros((), dtype=torch.float64)
    norms = torch.stack(torch._foreach_norm([g for _, g in counted])).double()
    shares = torch.tensor([_num_shards(p) / stage_size for p, _ in counted], dtype=torch.float64, device=norms.device)
    return (norms.square() * shares).sum()


def _num_shards(parameter: nn.Parameter) -> int:
    if not isinstance(parameter, DTensor):
        return 1
    sizes = (size for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True) if not placement.is_replicate())
    return math.prod(sizes)


def scale_gradients(pairs: Sequence[tuple[nn.Parameter, Tensor]], factor: float) -> None:
    """Multiplies every gradient in place."""
    if factor != 1.0 and pairs:
        torch._foreach_mul_([grad for _, grad in pairs], factor)
