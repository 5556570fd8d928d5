"""FLOPs of one op by its shapes: torch's own counts, and those of the CPU's attention kernel, which they lack in some places."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

__all__ = ["CPU_FLASH", "FLOPS"]

aten = torch.ops.aten


def _forward_attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)  # type: ignore[no-any-return, no-untyped-call]


def _backward_attention(grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)  # type: ignore[no-any-return, no-untyped-call]


CPU_FLASH = {
    aten._scaled_dot_product_flash_attention_for_cpu: _forward_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_attention,
}
"""The CPU's attention kernel, which torch's counter does not know everywhere. Full attention, not causal, as for the others."""
FLOPS = {**flop_registry, **{op: shape_wrapper(count) for op, count in CPU_FLASH.items()}}  # type: ignore[no-untyped-call]
"""Op -> its FLOPs; call with the op's arguments and `out_val`, its result."""
