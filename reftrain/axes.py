"""Axes: the ranks with which one rank of the model shares work, and the collectives that lead in and out of that sharing.

Tensor parallelism as Megatron-LM draws it (arXiv:1909.08053, 2205.05198): `enter` before column-split layers, `leave` after
row-split ones. Both work on plain tensors by torch's functional collectives: DTensor's dispatch costs more host time per op
than the small matmuls here take, so DTensor only describes parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

__all__ = ["SINGLE", "Axes", "all_gather", "all_reduce", "gather_sequence", "local", "reduce_scatter"]

SEQUENCE_DIM = 1
# torch 2.13 renamed them, and warns at the old names
_gather_single = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
_scatter_single = getattr(collectives, "reduce_scatter_single", None) or collectives.reduce_scatter_tensor


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0], ctx.group), None


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grads[0], ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather(grads[0], ctx.group), None


def _done(result: Tensor) -> Tensor:
    """The collective's result itself, not torch's promise of it: it is needed at once, and a promise slows every op down."""
    return result.wait() if isinstance(result, collectives.AsyncCollectiveTensor) else result


def all_reduce(x: Tensor, group: Any) -> Tensor:
    """The sum over the ranks; any shape."""
    return _done(collectives.all_reduce(x.contiguous(), "sum", group))


def all_gather(x: Tensor, group: Any) -> Tensor:
    """The ranks' slices of dim 1 one after the other: [B, S/t, ...] -> [B, S, ...]."""
    return _done(_gather_single(x.contiguous(), SEQUENCE_DIM, group))


def reduce_scatter(x: Tensor, group: Any) -> Tensor:
    """This rank's slice of the sum along dim 1: [B, S, ...] -> [B, S/t, ...]."""
    return _done(_scatter_single(x.contiguous(), "sum", SEQUENCE_DIM, group))


def gather_sequence(x: Tensor, group: Any) -> Tensor:
    """All ranks' slices of dim 1, in rank order; the backward pass sums and scatters the gradients."""
    return _Gather.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


def local(parameter: Tensor) -> Tensor:
    """This rank's shard of a parameter, with gradients flowing back into it; a plain tensor is itself."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@dataclass(frozen=True)
class Axes:
    """What one rank needs to know of the others while it computes."""

    tp_mesh: DeviceMesh | None = None
    sequence_parallel: bool = False
    cp_mesh: DeviceMesh | None = None
    ep_mesh: DeviceMesh | None = None

    @property
    def tp_group(self) -> dist.ProcessGroup | None:
        """Ranks that split each layer."""
        return None if self.tp_mesh is None else self.tp_mesh.get_group()

    @property
    def cp_group(self) -> dist.ProcessGroup | None:
        """Ranks that split each sequence."""
        return None if self.cp_mesh is None else self.cp_mesh.get_group()

    @property
    def ep_group(self) -> dist.ProcessGroup | None:
        """Ranks that split the experts."""
        return None if self.ep_mesh is None else self.ep_mesh.get_group()

    @property
    def tp(self) -> int:
        """Ranks that split each layer."""
        return 1 if self.tp_mesh is None else self.tp_mesh.size()

    def enter(self, x: Tensor) -> Tensor:
        """Into a split region: [B, S/t or S, H] -> [B, S, H]; backward sums the ranks' gradients."""
        if self.tp_mesh is None:
            return x
        return (_Gather if self.sequence_parallel else _SumBackward).apply(x, self.tp_group)  # type: ignore[no-any-return, no-untyped-call]

    def leave(self, x: Tensor) -> Tensor:
        """Out of a split region: the ranks' partial results summed, [B, S, H] -> [B, S/t or S, H]."""
        if self.tp_mesh is None:
            return x
        return (_Scatter if self.sequence_parallel else _SumForward).apply(x, self.tp_group)  # type: ignore[no-any-return, no-untyped-call]

    def whole(self, parameter: Tensor) -> Tensor:
        """A parameter that every tp rank holds in full, used between split regions.

        With sequence parallelism each rank uses it on its own slice of the tokens, so its gradient is summed over the ranks.
        """
        held = local(parameter)
        if self.tp_mesh is None or not self.sequence_parallel:
            return held
        return _SumBackward.apply(held, self.tp_group)  # type: ignore[no-any-return, no-untyped-call]

    def split_whole(self, parameter: Tensor) -> Tensor:
        """A parameter that every tp rank holds in full, used inside a split region on its own heads: gradients are summed."""
        held = local(parameter)
        return held if self.tp_mesh is None else _SumBackward.apply(held, self.tp_group)  # type: ignore[no-untyped-call]


SINGLE = Axes()
