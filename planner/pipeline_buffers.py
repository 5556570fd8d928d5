"""What a pipeline stage holds of the activations and gradients that it receives and sends."""

from __future__ import annotations

from typing import Any

import numpy as np

from planner.graph import StepGraph
from planner.stack import StackSpec

__all__ = ["Messages", "stage_axis"]

Array = Any


def stage_axis(value: Array) -> Array:
    """Adds the stage axis to a number or an array [n]."""
    return np.asarray(value, float)[..., None]


class Messages:
    """What a pipeline stage holds of the activations and gradients that it receives and sends, [..., pp]; see `StackSpec`."""

    def __init__(self, graph: StepGraph, stack: StackSpec, in_flight: Array, waiting: Array, stages: np.ndarray) -> None:
        layout, count = graph.layout, np.asarray(graph.num_microbatches, float)[..., None]
        pp, chunks = layout.pp, layout.num_virtual_stages
        is_kept = stack.pipeline_keeps_outputs and pp > 1
        size = stage_axis(graph.stream_bytes)
        message = size * is_kept
        sent, received = np.full(pp, float(chunks)), np.full(pp, float(chunks))
        sent[-1], received[0] = chunks - 1.0, chunks - 1.0
        sent, received = sent[stages], received[stages]
        waits = layout.schedule in stack.pipeline_waits_for_sends
        gradients = received * np.maximum(count - (in_flight - waiting), 0.0) if waits else 0.0
        self.buffers = message * ((sent + received) * count + gradients)
        is_held = (stack.pipeline_keeps_outputs or stack.pipeline_buffers_outputs) and pp > 1
        self.outputs = size * is_held * sent * (count if waits else in_flight)
        self.inputs = message * received * in_flight
        self.arriving = message * np.minimum(sent, 1.0)
