"""What a block keeps for its backward pass: everything, matmul outputs and attention, or its input alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

__all__ = ["not_kept", "recompute"]

# FSDP inside a block (of its experts) names what it does for the profiler, and does less of it, or more, when the block is made again.
SAC_IGNORED_OPS |= {torch.ops.profiler._record_function_enter_new.default, torch.ops.profiler._record_function_exit._RecordFunction}

aten = torch.ops.aten
KEPT = {
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.linear.default,
    aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default, aten._scaled_dot_product_cudnn_attention.default,
    torch.ops._c10d_functional.all_reduce.default, torch.ops._c10d_functional.reduce_scatter_tensor.default,
}  # fmt: skip
"""Outputs that selective recompute keeps: what is slow to make again. Norms, activations and products with gates are not, and what
was gathered is gathered again, being as many times larger as there are ranks."""


_is_kept = True


@contextmanager
def not_kept() -> Iterator[None]:
    """Around a matmul whose output nothing in the backward pass needs: a block's last one, or a share of a sum that is kept."""
    global _is_kept
    before, _is_kept = _is_kept, False
    try:
        yield
    finally:
        _is_kept = before


def _policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT and _is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def recompute(policy: str, function: Callable[..., Tensor], *args: Any) -> Tensor:
    """`function(*args)`, keeping what `policy` (none, selective, full) says.

    Recomputation stops as soon as every tensor that the backward pass wants is there again.
    """
    if policy == "none" or not torch.is_grad_enabled():
        return function(*args)
    if policy == "full":
        return checkpoint(function, *args, use_reentrant=False)  # type: ignore[no-any-return]
    return checkpoint(function, *args, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _policy))  # type: ignore[no-any-return]
