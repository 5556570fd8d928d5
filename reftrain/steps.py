"""One optimizer step: microbatches forward and backward through whatever parallelism there is, one norm, one update.

`Engine` holds the model parts and optimizers of this rank. All ranks see the same loss and norm, from one small all-reduce.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, _init_optim_state, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from reftrain.config import RunConfig
from reftrain.lora import narrow_frozen
from reftrain.optim import learning_rate, local_gradients, local_squared_norm, make_optimizers, scale_gradients
from reftrain.parallel import Ranks, build_model_parts, sum_tied, unwrap
from reftrain.pipeline import make_pipeline

__all__ = ["Engine", "StepTimes"]

OWN_TIED, SHARED_TIED = "tied.weight", "embeddings.token.weight"
FIRST_SCALE, SCALE_GROWTH_STEPS = 2.0**15, 500
"""fp16: the loss is multiplied so that small gradients survive; halved when they overflow, doubled after so many good steps."""


@dataclass
class StepTimes:
    """Seconds of one step by phase, on this rank."""

    parts: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, device: torch.device) -> Iterator[None]:
        """Adds the time of its body to `name`; waits for a GPU to finish it."""
        start = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - start


class Engine:
    """This rank's share of the model and how it is trained."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.parts = build_model_parts(config, ranks)
        self.models = [unwrap(part) for part in self.parts]
        self.optimizers = make_optimizers(self.parts, config)
        self.pipeline = make_pipeline(config, ranks, self.models) if config.layout.pp > 1 else None
        self.loss_scale = FIRST_SCALE if config.workload.precision == "fp16" else 1.0
        self.good_steps = 0
        # Frozen weights are where the run started from, and stay there.
        self._kept = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=config.workload.job == "lora")
        tied = [model.tied.weight for model in self.models if model.tied is not None]
        self._left_out = frozenset(id(weight) for weight in tied)

    def forward_backward(self, microbatches: Sequence[tuple[Tensor, ...]], times: StepTimes, weights: Sequence[float] | None = None) -> Tensor:
        """Accumulates the gradients of the mean loss over `microbatches`; returns that loss (0 off the last pipeline stage).

        Args:
            weights: what each microbatch's mean loss counts, where they have unequal numbers of targets; None: all the same.
        """
        if self.pipeline is not None:
            with times.phase("forward_backward", self.ranks.device):
                loss = self.pipeline(microbatches)
                sum_tied(list(self.models), self.ranks)
            return loss
        total = torch.zeros((), device=self.ranks.device)
        for i, microbatch in enumerate(microbatches):
            weight = 1 / len(microbatches) if weights is None else weights[i]
            is_last = i == len(microbatches) - 1
            with self._synchronized(is_last):
                with times.phase("forward", self.ranks.device):
                    loss = self.parts[0](*microbatch)[0] * weight
                with times.phase("backward", self.ranks.device):
                    (loss * self.loss_scale).backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[tuple[Tensor, ...]], weights: Sequence[float] | None = None) -> float:
        """Mean loss over `microbatches` of all ranks, without gradients; `weights` as for `forward_backward`."""
        if self.pipeline is not None:
            total = self.pipeline(microbatches, is_training=False)
        else:
            losses = torch.stack([self.parts[0](*microbatch)[0] for microbatch in microbatches])
            total = losses.mean() if weights is None else (losses.nan_to_num() * losses.new_tensor(weights)).sum()  # none of no targets
        mean = total.double() / self.ranks.stage_size
        if self.ranks.world_size > 1:
            dist.all_reduce(mean)
        return float(mean)

    def narrow(self) -> None:
        """Stores frozen weights as the plan says, once their values are there."""
        if self.config.workload.frozen_format != "compute":
            for model in self.models:
                narrow_frozen(model, self.config.workload.frozen_format)

    def _synchronized(self, is_last: bool) -> Any:
        """What crosses ranks after each microbatch: ZeRO-2 and 3 scatter gradients every time, the others once per step."""
        part, zero = self.parts[0], self.config.layout.zero_stage
        if isinstance(part, DistributedDataParallel):
            return nullcontext() if is_last else part.no_sync()
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(is_last or zero >= 2)
            part.set_requires_all_reduce(is_last)
            part.set_reshard_after_backward(is_last or zero == 3)
            part.set_is_last_backward(is_last)
        return nullcontext()

    def agree(self, loss: Tensor) -> tuple[float, float]:
        """(mean loss, norm of all gradients without loss scale), the same on every rank."""
        ranks = self.ranks
        pairs = local_gradients(self.parts)
        square = local_squared_norm(pairs, ranks.stage_size, self._left_out)
        both = torch.stack([loss.double() / ranks.stage_size, square.to(loss.device)])
        if ranks.world_size > 1:
            dist.all_reduce(both)
        mean, squared = both.tolist()
        return mean, math.sqrt(squared) / self.loss_scale if squared >= 0 else math.nan

    def update(self, step: int, norm: float) -> float:
        """Clips, steps, clears; returns the learning rate."""
        config = self.config
        rate = learning_rate(step, config.num_steps, config.warmup_steps, config.training)
        clip = config.training.clip_norm
        factor = min(1.0, clip / (norm + 1e-6)) if clip is not None else 1.0
        scale_gradients(local_gradients(self.parts), factor / self.loss_scale)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.clear()
        for model in self.models:
            for router in model.routers():
                router.rebalance(config.training.balance_rate if config.workload.job != "lora" else 0.0, self.ranks.token_group)
        if config.workload.precision == "fp16":
            self.good_steps += 1
            if self.good_steps % SCALE_GROWTH_STEPS == 0:
                self.loss_scale *= 2
        return rate

    def skip(self) -> None:
        """Drops this step's gradients and leaves everything else as it was."""
        self.clear()
        for model in self.models:
            for router in model.routers():
                router.load.zero_()
        if self.config.workload.precision == "fp16":
            self.loss_scale, self.good_steps = max(self.loss_scale / 2, 1.0), 0

    def clear(self) -> None:
        """Drops gradients; DDP's are views of its buckets, and new ones would lie beside these until the last microbatch."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=not self.ranks.uses_ddp)

    def state(self) -> dict[str, Any]:
        """Weights and optimizer states under names that do not depend on the layout."""
        self._start_optimizers()
        model: dict[str, Any] = {}
        optimizer: dict[str, Any] = {}
        for part, own in self._owned():
            weights, states = get_state_dict(part, own, options=self._kept)
            # A tied table that a pipeline parted has one name in both places, and is saved once.
            model |= _renamed(weights, OWN_TIED, SHARED_TIED)
            optimizer |= _renamed(states, OWN_TIED, SHARED_TIED)
        return {"model": model, "optimizer": optimizer}

    def _start_optimizers(self) -> None:
        """Gives optimizers that have not stepped yet the states that a checkpoint wants, as of step 0.

        torch fills them by a step of rate 0, which counts; unless it is taken back, AdamW's first real steps are too short.
        """
        for optimizer in self.optimizers:
            if not optimizer.state:
                _init_optim_state(optimizer)
                for state in optimizer.state.values():
                    if isinstance(state.get("step"), Tensor):
                        state["step"].zero_()

    def _owned(self) -> list[tuple[torch.nn.Module, list[torch.optim.Optimizer]]]:
        """Each part with the optimizers of its parameters."""
        found = []
        for part in self.parts:
            mine = {id(p) for p in part.parameters()}
            found.append((part, [o for o in self.optimizers if id(o.param_groups[0]["params"][0]) in mine]))
        return found

    def load_state(self, state: dict[str, Any]) -> None:
        """Puts back what `state` gave, filled in place by a checkpoint."""
        for part, own in self._owned():
            has_copy = unwrap(part).tied is not None
            mine = {kind: _renamed(values, SHARED_TIED, OWN_TIED) if has_copy else values for kind, values in state.items()}
            set_state_dict(
                part, own, model_state_dict=mine["model"], optim_state_dict=mine["optimizer"],
                options=replace(self._kept, strict=False),
            )  # fmt: skip


def _renamed(values: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {name.replace(old, new): value for name, value in values.items()}
