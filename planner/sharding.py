"""What FSDP holds beyond shards, per parameter: gathered weights, gradients that have not left yet, the buffers in which they leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.arrays import both, pick
from planner.graph import Part, StepGraph
from planner.stack import StackSpec
from planner.states import wraps_weights

__all__ = ["Sharding", "expert_params", "gathered_params"]

Array = Any


@dataclass(frozen=True)
class Sharding:
    """Bytes per parameter that FSDP, or the lack of it, holds beyond shards; [..., 1] each. Source: arXiv:2304.11277; FSDP2 under dry run."""

    gathered: Array
    """ZeRO-3: a part in use."""
    arrived: Array
    """The buffer in which the part that was gathered last arrived."""
    kept: Array
    """Without ZeRO-3, in-place stacks: all weights of the stage in compute format, through the step."""
    unreduced: Array
    """A gradient in compute format, before it leaves."""
    leaving: Array
    """A gradient in the buffer in which it leaves, until the next part's does."""
    leaves_each: Array
    """Whether gradients leave in every microbatch."""
    leaves_before: Array
    """Whether the last part's buffer of one microbatch is still there in the next."""
    summed: Array
    """Whole gradients, summed over microbatches before they leave."""
    made_late: Array
    """A gradient of weights that nobody shares."""
    table_gradient: Array
    """Of the embedding, as it is made."""
    stream_casts: Array
    """Gradients of the residual stream, in fp32 too, while the embedding's is made; in streams of compute format."""

    @staticmethod
    def of(graph: StepGraph, stack: StackSpec) -> Sharding:
        """The rates of a stack under the layout's ZeRO stage."""
        precision, zero = graph.precision, np.asarray(graph.layout.zero_stage)
        compute, in_place = precision.compute_bytes, stack.weight_storage == "fp32_in_place"
        is_sharded, is_wrapped = np.asarray(graph.fsdp_degree) > 1, wraps_weights(graph)
        waits = stack.pipeline_waits and graph.layout.pp > 1
        rates: dict[str, Array]
        if stack.is_one_fsdp_unit:  # everything is gathered at once, and its gradients are made at once
            kept = pick(both(zero == 3, is_sharded), compute * (1 if graph.numerics.lora_rank else 2), 0.0)
            none_of: dict[str, Array] = dict.fromkeys(Sharding.__dataclass_fields__, 0.0)
            rates = none_of | {"kept": kept, "leaves_each": False, "leaves_before": False, "table_gradient": compute, "stream_casts": 1.0}
        else:
            drops = both(zero == 3, both(not waits, is_sharded))
            sends = both(in_place, is_wrapped) | drops
            many = np.asarray(graph.num_microbatches) > 1
            is_summed = both((zero < 2) | waits, both(sends, many))
            is_own = both(in_place, ~is_wrapped)
            rates = {
                "gathered": pick(drops, compute + precision.quantized_weight_bytes, 0.0),
                "arrived": pick(both(sends, is_sharded & (drops | ~many)), compute, 0.0),
                "kept": pick(both(in_place, is_wrapped & ~np.asarray(drops)), compute, 0.0),
                "unreduced": pick(sends, compute, 0.0),
                "leaving": pick(sends, stack.reduce_bytes, 0.0),
                "leaves_each": both(sends, ~np.asarray(is_summed)),
                "leaves_before": both(both(not waits, zero >= 2), both(sends, many)),
                "summed": pick(is_summed, 4.0, 0.0),
                "made_late": pick(is_own, 4.0, 0.0),
                "table_gradient": pick(is_own, 4.0, compute),
                "stream_casts": pick(is_own, 1.0 + 4.0 / compute * precision.needs_master_weights, 1.0),
            }
        return Sharding(**{name: np.asarray(rate)[..., None] for name, rate in rates.items()})


def expert_params(part: Part, graph: StepGraph) -> Array:
    """Of them, those of a unit of its own: experts that expert parallelism has split."""
    experts = part.param_total("matrix_params", is_expert=True) + part.param_total("vector_params", is_expert=True)
    return experts * (np.asarray(graph.layout.ep) > 1)


def gathered_params(part: Part, graph: StepGraph) -> Array:
    """Parameters of one part in full; a parted tied head has its copy."""
    return part.total("params") + (part.total("tied_params") if graph.layout.pp > 1 else 0.0)
