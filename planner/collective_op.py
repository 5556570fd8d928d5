"""Communication inside a layer as an op of its own: into and out of tensor parallelism, to the experts and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from planner.op_cost import Array, Numerics, OpCost, Shard, Transfer

__all__ = ["Collective"]


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Communication inside a layer, written as what happens in the forward pass.

    `enter`: features are about to be split (before a column-split linear): nothing or, with sequence parallelism, an
    all-gather; backward all-reduces or reduce-scatters the gradient, and gathers the input again for the weight
    gradient unless it was kept. `leave`: partial sums are added (after a row-split linear): all-reduce or
    reduce-scatter; backward nothing or an all-gather. `exchange`: tokens travel to their experts or back.
    """

    name: str
    pattern: Literal["enter", "leave", "exchange"]
    width: int
    copies_per_token: float = 1.0
    kind: str = field(default="collective", init=False)
    is_expert: bool = field(default=False, init=False)

    def cost(self, shard: Shard, numerics: Numerics) -> OpCost:
        """See `Op.cost`."""
        b = numerics.compute_bytes
        if self.pattern == "exchange":
            moved = np.where(np.asarray(shard.ep) > 1, shard.local_tokens * self.copies_per_token * self.width * b * numerics.expert_imbalance, 0.0)
            there_and_back = (Transfer("all_to_all", "ep", "forward", moved), Transfer("all_to_all", "ep", "backward", moved))
            return OpCost(self, transfers=there_and_back, grad_output_bytes=moved, grad_input_bytes=moved, num_kernels=0)
        full = shard.tokens * self.width * b * (np.asarray(shard.tp) > 1)
        split: Array = full * np.asarray(shard.sequence_parallel)
        whole = full - split
        again = 0.0 if numerics.saves_gathered_input else split
        if self.pattern == "enter":
            transfers: tuple[Transfer, ...] = (
                Transfer("all_gather", "tp", "forward", split),
                Transfer("all_gather", "tp", "backward", again),
                Transfer("reduce_scatter", "tp", "backward", split),
                Transfer("all_reduce", "tp", "backward", whole),
            )
        else:
            transfers = (
                Transfer("reduce_scatter", "tp", "forward", split),
                Transfer("all_reduce", "tp", "forward", whole),
                Transfer("all_gather", "tp", "backward", split),
            )
        slice_bytes = split / np.maximum(shard.tp, 1)
        taken, made = (full, whole + slice_bytes) if self.pattern == "enter" else (slice_bytes, split)
        copied = split * (np.asarray(shard.micro_batch_size) > 1) * numerics.copies_gathered
        return OpCost(
            self, transfers=transfers, workspace_bytes=copied, grad_output_bytes=taken, grad_input_bytes=made, num_kernels=0
        )  # fmt: skip
