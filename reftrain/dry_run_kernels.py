"""Attention and dropout of a GPU, on fake tensors that torch takes for a CPU's.

A CPU has no fused attention with dropout, or with values of another width than the keys (latent attention), and writes all scores out;
a GPU's kernels know both. Where a plan is for a GPU its dry run takes theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from planner.errors import InputError
from planner.hardware import load_catalog
from reftrain.config import RunConfig

__all__ = ["is_for_gpu", "kernels_of_a_gpu"]

on_cpu, dropout_on_cpu = functional.scaled_dot_product_attention, functional.dropout


def is_for_gpu(config: RunConfig) -> bool:
    """Whether the plan's accelerator is one; not where the catalog does not know it."""
    try:
        catalog = load_catalog(Path(config.request.catalog) if config.request.catalog else None)
        return catalog.resolve(config.request.cluster).accelerator.kind == "gpu"
    except InputError:
        return False


@contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """Within it attention is fused wherever a GPU's would be."""
    functional.scaled_dot_product_attention, functional.dropout = _attention, _dropout
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, functional.dropout = on_cpu, dropout_on_cpu


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
    """One kernel that keeps a byte per element; a CPU's keeps a factor of x's format."""
    return torch.native_dropout(input, p, True)[0] if training and p > 0 and not inplace else dropout_on_cpu(input, p, training, inplace)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Shapes: query [B, heads, S, D], key [B, heads, T, D], value [B, heads, T, Dv], mask [S, T] to add; returns [B, heads, S, Dv]."""
    is_plain = dropout_p == 0.0 and value.shape[-1] == query.shape[-1]
    if is_plain or not torch.backends.cuda.mem_efficient_sdp_enabled():  # type: ignore[no-untyped-call]
        return on_cpu(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    bias = None if attn_mask is None else attn_mask.expand(*query.shape[:2], *attn_mask.shape)
    out = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, dropout_p, is_causal, scale=scale)
    return out[0]  # type: ignore[no-any-return]
