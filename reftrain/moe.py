"""Mixture of experts: top-k routing without dropped tokens, shared experts, balancing without an auxiliary loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.nn import functional

from planner.model_spec import ModelSpec, Moe
from reftrain.axes import SINGLE, Axes, local
from reftrain.config import ModelDetails
from reftrain.layers import FeedForward, Linear, activate

__all__ = ["Experts", "Mixture", "Router"]


def row_counts(counts: Tensor, num_rows: int) -> list[int]:
    """How many rows each expert (or rank) gets. Fake tensors have no values: they stand for `num_rows` spread evenly."""
    if isinstance(counts, FakeTensor):
        return [len(part) for part in np.array_split(range(num_rows), len(counts))]
    return counts.tolist()


class _Permute(torch.autograd.Function):
    """Rows in the order given, or back from it. Keeps the order alone: torch's own ops keep what they move too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, is_back: bool) -> Tensor:
        ctx.save_for_backward(order)
        ctx.is_back = is_back
        return _permuted(x, order, is_back)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return _permuted(grads[0], order, not ctx.is_back), None, None


def _permuted(x: Tensor, order: Tensor, is_back: bool) -> Tensor:
    return torch.empty_like(x).index_copy_(0, order, x) if is_back else x.index_select(0, order)


def permute(x: Tensor, order: Tensor, *, is_back: bool = False) -> Tensor:
    """Shapes: x [T, H], order [T] -> [T, H]: row i is x[order[i]]; `is_back`: row order[i] is x[i]."""
    return _Permute.apply(x, order, is_back)  # type: ignore[no-any-return, no-untyped-call]


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, places: Tensor, num_places: int) -> Tensor:
        ctx.save_for_backward(x, weights, places)
        return x.new_zeros(num_places, x.shape[1]).index_add_(0, places, x * weights.unsqueeze(-1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weights, places = ctx.saved_tensors
        grad = grads[0].index_select(0, places)
        by_weights = torch.linalg.vecdot(grad, x)
        return grad.mul_(weights.unsqueeze(-1)), by_weights, None, None


def weighted_sum(x: Tensor, weights: Tensor, places: Tensor, num_places: int) -> Tensor:
    """Rows times their weights, added up by place; keeps the rows and not the products.

    Shapes: x [T*k, H], weights and places [T*k] -> [num_places, H].
    """
    return _WeightedSum.apply(x, weights, places, num_places)  # type: ignore[no-any-return, no-untyped-call]


class Router(nn.Module):
    """Chooses k experts for every token, and how much each counts.

    A bias that no gradient trains is added to the scores while choosing; after each step it moves by `rate` towards the
    experts that got too few tokens (arXiv:2408.15664). So balance needs no auxiliary loss, and does not depend on the layout.
    """

    axes: Axes = SINGLE
    bias: Tensor
    load: Tensor

    def __init__(self, spec: ModelSpec, details: ModelDetails, moe: Moe) -> None:
        super().__init__()
        self.gate = Linear(spec.hidden_size, moe.num_experts, moe.router_bias)
        self.num_chosen, self.details = moe.num_experts_per_token, details
        self.register_buffer("bias", torch.zeros(moe.num_experts))
        self.register_buffer("load", torch.zeros(moe.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shapes: x [T, H] -> (weights [T, k], experts [T, k])."""
        logits = self.gate(x).float()
        scores = logits.sigmoid() if self.details.router_scores == "sigmoid" else logits.softmax(dim=-1)
        chosen = (scores.detach() + self.bias).topk(self.num_chosen, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if self.details.router_normalizes:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if self.training and torch._C._current_graph_task_id() == -1:  # once: not again where a backward pass recomputes
            self.load += torch.bincount(chosen.flatten(), minlength=self.load.numel())
        return (weights * self.details.router_scale).to(x.dtype), chosen

    @torch.no_grad()
    def rebalance(self, rate: float, group: dist.ProcessGroup | None) -> None:
        """Moves the bias after a step; `group` holds the ranks that saw other tokens."""
        if group is not None:
            dist.all_reduce(self.load, group=group)
        self.bias += rate * torch.sign(self.load.mean() - self.load)
        self.load.zero_()


class Experts(nn.Module):
    """The feed-forward layers of this rank's experts, on tokens sorted by expert.

    Shapes: weights [E/ep, F/t, H] and [E/ep, H, F/t]; x [T, H] with `counts` rows per expert -> [T, H].
    """

    def __init__(self, spec: ModelSpec, details: ModelDetails, moe: Moe) -> None:
        super().__init__()
        e, h, f = moe.num_experts, spec.hidden_size, moe.intermediate_size
        self.up = nn.Parameter(torch.empty(e, f, h))
        self.gate = nn.Parameter(torch.empty(e, f, h)) if spec.is_gated else None
        self.down = nn.Parameter(torch.empty(e, h, f))
        self.kind, self.is_tanh_gelu = spec.activation, details.is_tanh_gelu

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """Each expert's rows through its own layer."""
        # Unbound, not indexed: each index would make a gradient of the size of all experts.
        up, down = local(self.up).to(x.dtype).unbind(), local(self.down).to(x.dtype).unbind()
        gate = None if self.gate is None else local(self.gate).to(x.dtype).unbind()
        out = []
        for i, rows in enumerate(torch.split(x, counts)):
            inner = functional.linear(rows, up[i])
            inner = (
                activate(inner, self.kind, self.is_tanh_gelu)
                if gate is None
                else activate(functional.linear(rows, gate[i]), self.kind, self.is_tanh_gelu) * inner
            )
            out.append(functional.linear(inner, down[i]))
        return torch.cat(out)


class Mixture(nn.Module):
    """Router, exchange of tokens, experts, way back, and the experts that every token visits.

    Without expert parallelism the experts' width is split over tensor-parallel ranks; with it each rank holds whole experts
    and tokens travel to them.
    """

    axes: Axes = SINGLE

    def __init__(self, spec: ModelSpec, details: ModelDetails, moe: Moe) -> None:
        super().__init__()
        self.router = Router(spec, details, moe)
        self.experts = Experts(spec, details, moe)
        self.shared = FeedForward(spec, details, moe.shared_intermediate_size) if moe.shared_intermediate_size else None
        self.shared_gate = Linear(spec.hidden_size, 1) if moe.has_shared_gate else None
        self.num_experts = moe.num_experts

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [B, S, H] -> [B, S, H], before the residual is added."""
        inside = x if self.axes.ep_mesh is not None else self.axes.enter(x)
        tokens = inside.flatten(0, 1)
        weights, chosen = self.router(tokens)
        order = chosen.flatten().argsort(stable=True)
        source = order // chosen.shape[1]
        counts = torch.bincount(chosen.flatten(), minlength=self.num_experts)
        rows = tokens.index_select(0, source)
        through = self._exchange(rows, counts) if self.axes.ep_mesh is not None else self.experts(rows, row_counts(counts, len(source)))
        out = weighted_sum(through, weights.flatten()[order], source, len(tokens)).view_as(inside)
        if self.axes.ep_mesh is None:
            out = self.axes.leave(out)
        if self.shared is None:
            return out
        shared = self.shared(x)
        return out.add(shared if self.shared_gate is None else shared * self.shared_gate(x).sigmoid())

    def _exchange(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows sorted by expert go to the ranks that hold their experts, and come back in the same order."""
        if self.axes.ep_mesh is None:
            raise RuntimeError("experts are not split")
        group, ep = self.axes.ep_mesh.get_group(), self.axes.ep_mesh.size()
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=group)
        sent, received = counts.view(ep, -1), arriving.view(ep, -1)
        to_send, to_receive = row_counts(sent.sum(1), len(rows)), row_counts(received.sum(1), len(rows))
        there = all_to_all_single_autograd(rows, to_receive, to_send, group)
        # They arrive by rank, then expert; experts want them by expert.
        expert = torch.arange(received.shape[1], device=rows.device).repeat(ep).repeat_interleave(received.flatten(), output_size=len(there))
        order = expert.argsort(stable=True)
        done = self.experts(permute(there, order), row_counts(received.sum(0), len(there)))
        return all_to_all_single_autograd(permute(done, order, is_back=True), to_send, to_receive, group)
