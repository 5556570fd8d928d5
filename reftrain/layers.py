"""Layers that know how their parameters are split: linear, norm, embedding, feed-forward.

Parameters are stored in fp32 and cast to the activations' format where they are used; gradients therefore accumulate in fp32.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from planner.model_spec import ModelSpec
from reftrain.axes import SINGLE, Axes, local
from reftrain.config import ModelDetails
from reftrain.kernels import rms_norm
from reftrain.recompute import not_kept

__all__ = ["FeedForward", "LayerNorm", "Linear", "RmsNorm", "TokenEmbedding", "activate", "make_norm"]

Split = Literal["column", "row", "none", "inside"]


class Linear(nn.Module):
    """y = x W^T + b, its weight split over tensor-parallel ranks by columns, by rows, or not at all.

    Shapes: x [..., in], weight [out, in]; column: out/t here; row: in/t here and y summed over the ranks; none: whole,
    between split regions; inside: whole, within one.
    """

    axes: Axes = SINGLE
    split: Split = "none"
    weight: nn.Parameter

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.adapter: nn.Module | None = None
        """LoRA's addition, see `reftrain.lora`."""
        self.narrow: nn.Module | None = None
        """The weight in four bits, in place of the other one."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        # An adapter goes first: then a block that is made again for its backward pass can stop before its last large matmul.
        start = None if self.adapter is None else self.adapter(x, self.split)
        if self.narrow is not None:
            return _sum(_sum(self.narrow(x), start), None if self.bias is None else self.bias.to(x.dtype))
        if self.split in ("none", "inside"):
            hold = self.axes.whole if self.split == "none" else self.axes.split_whole
            weight, bias = hold(self.weight), None if self.bias is None else hold(self.bias)
            return _linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), start)
        weight = local(self.weight).to(x.dtype)
        if self.split == "column":
            return _linear(x, weight, None if self.bias is None else local(self.bias).to(x.dtype), start)
        with not_kept():
            share = _linear(x, weight, None, start)
        y = self.axes.leave(share)
        return y if self.bias is None else y + self.axes.whole(self.bias).to(y.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor | None) -> Tensor:
    """x W^T + b + start, the last added within the matmul."""
    if start is None:
        return functional.linear(x, weight, bias)
    return _sum(torch.addmm(start.flatten(0, -2), x.flatten(0, -2), weight.t()).view_as(start), bias)


def _sum(x: Tensor, other: Tensor | None) -> Tensor:
    return x if other is None else x + other


class RmsNorm(nn.Module):
    """x / rms(x) * weight."""

    axes: Axes = SINGLE
    is_inside: bool = False
    """Whether it runs on this rank's heads inside a split region (QK-norm)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [..., width] -> [..., width]."""
        held = self.axes.split_whole(self.weight) if self.is_inside else self.axes.whole(self.weight)
        return rms_norm(x, held.to(x.dtype), self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias."""

    axes: Axes = SINGLE
    is_inside: bool = False

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [..., width] -> [..., width]."""
        hold = self.axes.split_whole if self.is_inside else self.axes.whole
        bias = None if self.bias is None else hold(self.bias).to(x.dtype)
        return functional.layer_norm(x, (x.shape[-1],), hold(self.weight).to(x.dtype), bias, self.eps)


def make_norm(spec: ModelSpec, details: ModelDetails, width: int, *, bias: bool | None = None) -> RmsNorm | LayerNorm:
    """The norm that the model uses, over `width` features."""
    if spec.norm == "rmsnorm":
        return RmsNorm(width, details.norm_eps)
    return LayerNorm(width, details.norm_eps, spec.norm_bias if bias is None else bias)


class TokenEmbedding(nn.Module):
    """Rows of a table, split over the vocabulary under tensor parallelism: each rank looks up its own rows, the rest are zero.

    Shapes: tokens [B, S] -> [B, S, H] (or [B, S/t, H] with sequence parallelism).
    """

    axes: Axes = SINGLE

    def __init__(self, num_embeddings: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, width))

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Looked up in fp32 or the gathered format, then cast."""
        table = local(self.weight)
        if self.axes.tp_mesh is None:
            return functional.embedding(tokens, table).to(dtype)
        mine = tokens - table.shape[0] * self.axes.tp_mesh.get_local_rank()
        is_mine = (mine >= 0) & (mine < table.shape[0])
        rows = functional.embedding(torch.where(is_mine, mine, 0), table) * is_mine.unsqueeze(-1)
        return self.axes.leave(rows.to(dtype))


def activate(x: Tensor, kind: str, is_tanh_gelu: bool) -> Tensor:
    """The feed-forward layer's nonlinearity."""
    if kind == "gelu":
        return functional.gelu(x, approximate="tanh" if is_tanh_gelu else "none")
    return functional.silu(x) if kind == "silu" else functional.relu(x)


class FeedForward(nn.Module):
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))).

    Shapes: x [..., H] -> [..., H]; inside F/t.
    """

    axes: Axes = SINGLE

    def __init__(self, spec: ModelSpec, details: ModelDetails, width: int | None = None) -> None:
        super().__init__()
        h, f = spec.hidden_size, width or spec.intermediate_size
        self.up = Linear(h, f, spec.mlp_bias)
        self.gate = Linear(h, f, spec.mlp_bias) if spec.is_gated else None
        self.down = Linear(f, h, spec.mlp_bias)
        self.kind, self.is_tanh_gelu = spec.activation, details.is_tanh_gelu
        self.ends_block = False
        """Whether its result is only added to the residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        """Before the residual is added."""
        x = self.axes.enter(x)
        if self.gate is None:
            inner = activate(self.up(x), self.kind, self.is_tanh_gelu)
        else:
            inner = activate(self.gate(x), self.kind, self.is_tanh_gelu) * self.up(x)
        with not_kept() if self.ends_block else nullcontext():
            return self.down(inner)  # type: ignore[no-any-return]
