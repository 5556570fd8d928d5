"""What a training framework allocates beside the model's own tensors: placeholders of gradients.

In: StepGraph and StackSpec. Out: bytes per device and stage, [..., pp] or [1].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from planner.graph import StepGraph
from planner.op_cost import Op
from planner.stack import StackSpec

__all__ = ["placeholder_bytes"]

Array = Any


def placeholder_bytes(graph: StepGraph, stack: StackSpec) -> Array:
    """Gradients in name only: one tensor in compute format for each shape of trained matrix on the stage, [..., pp].

    A matmul that adds its weight gradient to the fp32 buffer itself still owes autograd a tensor of the weight's shape. Transformer Engine
    makes one for each shape and keeps it (`get_dummy_wgrad`, release 2.3; experts too since 2.10), and so does Megatron-Core's own output layer.
    Formula: sum over distinct matrices of a stage, one expert for all of its kind, * compute_bytes. Queries, keys and values are one matrix
    there, as are up and gate; so their sizes add up. Left out: two matrices of one shape share a tensor.
    Source: NVIDIA/TransformerEngine transformer_engine/pytorch/module/base.py; NVIDIA/Megatron-LM megatron/core/tensor_parallel/layers.py.
    """
    if not stack.keeps_placeholder_gradients or graph.numerics.lora_rank or not graph.precision.needs_master_weights:
        return np.zeros(1)
    sizes: dict[Op, Array] = {}
    found: dict[Op, np.ndarray] = {}
    for part in graph.parts:
        for cost in part.costs:
            if cost.gemm is None:
                continue
            sizes[cost.op] = cost.gemm[1] * cost.gemm[2]
            found[cost.op] = found.get(cost.op, False) | (part.counts > 0)
    total = sum(np.multiply.outer(np.asarray(size, float), found[op]) for op, size in sizes.items())
    return np.asarray(total) * graph.numerics.compute_bytes
