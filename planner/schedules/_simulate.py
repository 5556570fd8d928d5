"""Event-driven executor of action lists: the second, independent way to the makespan and to the activations held."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.schedules import Action, FloatArray, Schedule

__all__ = ["Simulation", "Span", "simulate"]


@dataclass(frozen=True)
class Span:
    """One action and when it ran."""

    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Simulation:
    """A step, played."""

    spans: list[list[Span]]
    """Per stage, in order of time."""
    makespan_s: float
    in_flight: FloatArray
    """Peak activations held per stage, [pp], in microbatches through all layers of the stage: taken by F, freed by W (by B where there is none)."""


def simulate(
    schedule: Schedule, pp: int, num_virtual_stages: int, num_microbatches: int,
    forward_s: Sequence[float], backward_input_s: Sequence[float], backward_weight_s: Sequence[float], p2p_s: float = 0.0,
) -> Simulation:  # fmt: skip
    """Plays `schedule.timeline`: a stage runs its actions in order, each as soon as its input has arrived.

    Args:
        forward_s, backward_input_s, backward_weight_s: seconds per microbatch for all layers of each slice, [pp].
        p2p_s: seconds from the end of an action until its result is at another stage.
    Raises:
        ValueError: the lists wait for each other in a circle.
    """
    timeline = schedule.timeline(pp, num_virtual_stages, num_microbatches)
    per_stage = num_virtual_stages // schedule.parameter_copies
    last = pp * per_stage - 1
    split = {(a.microbatch, a.chunk, a.stage) for order in timeline for a in order if a.kind == "W"}
    ready: dict[tuple[str, int, int], tuple[float, int]] = {}
    spans: list[list[Span]] = [[] for _ in range(pp)]
    clock = [0.0] * pp

    def arrival_s(action: Action) -> float:
        """When the input of `action` is on its stage; infinite if it is not yet made."""
        at = schedule.position(action.stage, action.chunk, pp)
        kind, source = {"F": ("F", at - 1), "B": ("B", at + 1) if at < last else ("F", at), "W": ("B", at)}[action.kind]
        if source < 0:
            return 0.0
        end_s, stage = ready.get((kind, action.microbatch, source), (math.inf, action.stage))
        return end_s + (p2p_s if stage != action.stage else 0.0)

    def cost_s(action: Action) -> float:
        at = schedule.position(action.stage, action.chunk, pp) % pp
        whole = action.kind == "B" and (action.microbatch, action.chunk, action.stage) not in split
        alone = {"F": forward_s, "B": backward_input_s, "W": backward_weight_s}[action.kind][at]
        return (alone + (backward_weight_s[at] if whole else 0.0)) / per_stage

    moved = True
    while moved:
        moved = False
        for s, order in enumerate(timeline):
            while len(spans[s]) < len(order):
                first = len(spans[s])
                block = order[first : first + 1 + order[first].paired]
                start = max(clock[s], *(arrival_s(action) for action in block))
                if start == math.inf:
                    break
                clock[s] = start + sum(cost_s(action) for action in block)
                for action in block:
                    ready[action.kind, action.microbatch, schedule.position(s, action.chunk, pp)] = (clock[s], s)
                    spans[s].append(Span(action, start, clock[s]))
                moved = True
    if any(len(done) < len(order) for done, order in zip(spans, timeline, strict=True)):
        raise ValueError(f"{schedule.name}: the stages wait for each other (pp {pp}, {num_virtual_stages} chunks, {num_microbatches} microbatches)")
    return Simulation(spans, max(clock), _peaks(timeline, split, per_stage))


def _peaks(timeline: list[list[Action]], split: set[tuple[int, int, int]], per_stage: int) -> FloatArray:
    """Largest number of activations held at once by each stage; the order alone decides."""
    peaks = []
    for order in timeline:
        frees = [a.kind == "W" or (a.kind == "B" and (a.microbatch, a.chunk, a.stage) not in split) for a in order]
        held = np.cumsum([(a.kind == "F") - int(free) for a, free in zip(order, frees, strict=True)])
        peaks.append(held.max() / per_stage)
    return np.array(peaks)
