"""What a training framework allocates beside the model's own tensors: placeholders of gradients, gradients for the step, buckets.

In: StepGraph and StackSpec. Out: bytes per device and stage, [..., pp] or [1].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from planner.graph import StepGraph, over_stages, part_runs
from planner.op_cost import Op
from planner.stack import StackSpec

__all__ = ["frozen_matrix_bytes", "placeholder_bytes", "reduction_bucket_bytes", "step_gradient_bytes"]

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


def reduction_bucket_bytes(graph: StepGraph, stack: StackSpec) -> Array:
    """Copies of gradients on their way through the data-parallel reduction, [..., pp]; none where no rank shares the data.

    Formula: min(bucket params, params of the stage) * bytes of what is reduced, at most 4. DeepSpeed copies gradients into buckets of 5e8
    (`reduce_bucket_size`), flattens each and copies the result back: up to four of them stay in the allocator's cache.
    Source: deepspeedai/DeepSpeed deepspeed/runtime/zero/stage_1_and_2.py, reduce_ipg_grads; deepspeed/runtime/engine.py, allreduce_bucket.
    """
    if not stack.reduction_bucket_params:
        return np.zeros(1)
    trained = over_stages([part.total("params") - part.total("frozen_params") for part in graph.parts], part_runs(graph))
    num_bytes = min(stack.accumulated_gradient_bytes(graph.precision.name), 4.0)
    is_shared = np.asarray(graph.layout.dp * graph.layout.cp)[..., None] > 1
    return np.minimum(trained, stack.reduction_bucket_params) * num_bytes * is_shared


def step_gradient_bytes(graph: StepGraph, stack: StackSpec) -> Array:
    """Bytes per parameter of the optimizer's shard for the gradient that a step works on, a number or [n].

    DeepSpeed accumulates fp16 gradients in fp16; its step makes an fp32 copy, and with ZeRO a flat one in fp16 before. No block that the
    activations leave behind in the allocator's cache is as large as these flat tensors, so they add to what the process has reserved.
    With bf16 the accumulated gradients are fp32 already. BigScience's 56 fp16 runs of 18B to 205B fit 4 + 17.3 / dp bytes per parameter.
    Source: deepspeedai/DeepSpeed deepspeed/runtime/zero/stage_1_and_2.py, step; deepspeed/runtime/fp16/fused_optimizer.py, step.
    """
    if stack.accumulated_gradient_bytes(graph.precision.name) >= 4:
        return 0.0
    has_flat_copy = (np.asarray(graph.layout.zero_stage) > 0) & (stack.step_gradient_bytes > 0)
    return stack.step_gradient_bytes + np.where(has_flat_copy, graph.numerics.compute_bytes, 0.0)


FROZEN_FORMATS = {"nf4": 0.5 + 4 / 64, "nf4_double": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
"""Bytes per element of a frozen matrix: 4 bits with an fp32 scale per block of 64, or the scales in 8 bits with an fp32 one for 256 of them
(arXiv:2305.14314 section 3); 8 bits, scales per row left out."""


def frozen_matrix_bytes(graph: StepGraph, stack: StackSpec) -> float:
    """Bytes per element of a block's matrix that is not trained: the format asked for, else what the stack keeps weights in."""
    if graph.workload.frozen_format != "compute":
        return FROZEN_FORMATS[graph.workload.frozen_format]
    is_narrow = stack.keeps_quantized_weights and graph.precision.is_quantized
    return graph.precision.quantized_weight_bytes if is_narrow else graph.precision.compute_bytes
