"""Pipeline schedules: the order of microbatches on each stage, and what that order costs.

One file per schedule registers one `Schedule`. Everything is pure and takes arrays: `pp` and `num_virtual_stages` are
ints (callers group layouts by them), `num_microbatches` is an int or an array [...], and whatever differs between stages
has the stage axis last, [..., pp].

The times are longest paths through the graph of dependencies, in closed form: a path walks into one stage (the one that
paces the step), stays on it for all microbatches, and walks out; the makespan is the longest over the stages. An
event-driven simulator (`planner.schedules._simulate`) runs the very action lists of `timeline` and is what the closed forms
are tested against.

Leaves out: interference of transfers with compute (a transfer delays only who waits for it), and contention of transfers
with one another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.errors import InputError, Problem
from planner.registry import Registry
from planner.schedules._stages import Stages

__all__ = ["SCHEDULES", "Action", "Schedule", "Stages", "check_schedule"]

FloatArray = NDArray[np.float64]
StageNumbers = NDArray[np.int64] | None


class Action(NamedTuple):
    """One piece of work of one pipeline stage."""

    stage: int
    """Pipeline rank, 0 .. pp - 1."""
    kind: Literal["F", "B", "W"]
    """F forward; B backward, for the inputs only where the list has a W for the same microbatch and chunk; W for the weights."""
    microbatch: int
    chunk: int
    """Which of the rank's model chunks, 0 .. num_virtual_stages - 1."""
    paired: bool = False
    """Runs together with the next action of the stage: both start when both inputs are there, and both results leave at the end."""


class Schedule(ABC):
    """A pipeline schedule."""

    name: str
    """As in `layout.schedule`."""
    needs_virtual_stages: bool = False
    """Whether num_virtual_stages must be 2 or more."""
    usual_virtual_stages: tuple[int, ...] = (1,)
    """The num_virtual_stages that a search tries."""
    first_holds_most: bool = True
    """Whether no stage holds more microbatches than those before it."""
    splits_backward: bool = False
    """Whether gradients of the weights are made apart from those of the inputs."""
    looks_at_ends: bool = True
    """Whether `longest_path_s` holds for runs of stages, or needs each stage by itself."""
    parameter_copies: int = 1
    """How often the pipeline as a whole stores the model. The model is cut into pp * num_virtual_stages / parameter_copies slices."""

    @abstractmethod
    def problems(self, pp: int, num_virtual_stages: int, num_microbatches: int) -> list[tuple[str, str]]:
        """(rule, fix) for every rule that the combination breaks; empty when it is legal."""

    def legal(self, pp: int, num_virtual_stages: int, num_microbatches: ArrayLike) -> NDArray[np.bool_]:
        """Where the combination is legal, [...] as num_microbatches. The same rules as `problems`; here of one chunk per stage."""
        return np.full(np.shape(num_microbatches), num_virtual_stages == 1)

    @abstractmethod
    def in_flight(self, pp: int, num_virtual_stages: int, num_microbatches: ArrayLike, stage: StageNumbers = None) -> FloatArray:
        """Peak activations held per stage, [..., pp], in units of one microbatch through all layers of that stage.

        Args:
            stage: numbers of the stages asked about, [stages]; None: all of them.
        """

    def head_in_flight(self, pp: int, num_virtual_stages: int, num_microbatches: ArrayLike, stage: StageNumbers = None) -> FloatArray:
        """The same of the model's last part, [..., pp]: as the stage's, unless its chunk's forward pass is followed by its backward pass."""
        return self.in_flight(pp, num_virtual_stages, num_microbatches, stage)

    def makespan_s(
        self, forward_s: ArrayLike, backward_input_s: ArrayLike, backward_weight_s: ArrayLike, p2p_s: ArrayLike,
        pp: int, num_virtual_stages: int, num_microbatches: ArrayLike,
    ) -> FloatArray:  # fmt: skip
        """Seconds from the first forward to the last backward of one step, [...].

        Args:
            forward_s: one microbatch through all layers of the stage (all chunks together), [..., pp].
            backward_input_s: gradient of the inputs, likewise, recompute included.
            backward_weight_s: gradient of the weights, likewise.
            p2p_s: one activation, or one gradient of it, from a stage to its neighbour, [...].
            pp, num_virtual_stages: one pipeline structure.
            num_microbatches: per step and pipeline, [...].
        """
        f, bi, bw = stage_arrays(pp, forward_s, backward_input_s, backward_weight_s)
        return self.longest_path_s(f, bi, bw, p2p_s, Stages.each(pp), num_virtual_stages, num_microbatches)

    @abstractmethod
    def longest_path_s(
        self, f: FloatArray, bi: FloatArray, bw: FloatArray, p2p_s: ArrayLike, stages: Stages, num_virtual_stages: int, num_microbatches: ArrayLike,
    ) -> FloatArray:  # fmt: skip
        """`makespan_s` of stages in runs: forward, backward for inputs and for weights per run, [..., runs]."""

    @abstractmethod
    def timeline(self, pp: int, num_virtual_stages: int, num_microbatches: int) -> list[list[Action]]:
        """What each stage does, in order: pp lists."""

    def waiting(self, pp: int, num_virtual_stages: int, num_microbatches: ArrayLike, stage: StageNumbers = None) -> FloatArray:
        """Of those in flight, the microbatches whose gradients of the inputs are made and of the weights not, [..., pp]."""
        return np.zeros(len(stage_numbers(pp, stage)))

    def position(self, stage: int, chunk: int, pp: int) -> int:
        """Which slice of the model, 0 .. pp * num_virtual_stages / parameter_copies - 1, a chunk of a stage is."""
        return chunk * pp + stage

    def resident(self, per_stage: ArrayLike) -> FloatArray:
        """What a device holds of something that the model's slices hold: `per_stage` itself, or with the slices' second copies. [..., pp]."""
        return np.asarray(per_stage, dtype=float)

    def busy_s(self, forward_s: ArrayLike, backward_input_s: ArrayLike, backward_weight_s: ArrayLike, num_microbatches: ArrayLike) -> FloatArray:
        """Seconds of work of each stage in one step, [..., pp]; the makespan is at least the largest."""
        whole = np.asarray(forward_s, float) + np.asarray(backward_input_s, float) + np.asarray(backward_weight_s, float)
        return np.asarray(np.asarray(num_microbatches)[..., None] * self.resident(whole) / self.parameter_copies)

    def bubble_s(
        self, forward_s: ArrayLike, backward_input_s: ArrayLike, backward_weight_s: ArrayLike, p2p_s: ArrayLike,
        pp: int, num_virtual_stages: int, num_microbatches: ArrayLike,
    ) -> FloatArray:  # fmt: skip
        """Seconds that the busiest stage waits in one step, [...]: makespan less the work of that stage. Never negative."""
        makespan = self.makespan_s(forward_s, backward_input_s, backward_weight_s, p2p_s, pp, num_virtual_stages, num_microbatches)
        return np.asarray(makespan - self.busy_s(forward_s, backward_input_s, backward_weight_s, num_microbatches).max(axis=-1))


SCHEDULES: Registry[Schedule] = Registry("layout.schedule", "planner.schedules")


def check_schedule(schedule: str, pp: int, num_virtual_stages: int, num_microbatches: int) -> None:
    """Refuses a pipeline that the schedule cannot run.

    Raises:
        InputError: unknown schedule, or one Problem per broken rule.
    """
    found = SCHEDULES[schedule].problems(pp, num_virtual_stages, num_microbatches)
    if found:
        given = f"{schedule}, pp {pp}, num_virtual_stages {num_virtual_stages}, {num_microbatches} microbatches"
        raise InputError(*(Problem("layout.schedule", given, rule, fix) for rule, fix in found))


def stage_numbers(pp: int, stage: StageNumbers) -> NDArray[np.int64]:
    """`stage` itself, or all."""
    return np.arange(pp) if stage is None else stage


def stage_arrays(pp: int, *per_stage: ArrayLike) -> list[FloatArray]:
    """Each as floats [..., pp]; a number means that all stages are alike."""
    arrays = [np.asarray(x, dtype=float) for x in per_stage]
    return [x if x.ndim and x.shape[-1] == pp else np.broadcast_to(x, (pp,)) if x.ndim == 0 else _bad_axis(x, pp) for x in arrays]


def _bad_axis(x: FloatArray, pp: int) -> Any:
    raise ValueError(f"the last axis must be the {pp} stages, and the shape is {x.shape}")


def only_one_chunk(name: str, num_virtual_stages: int) -> list[tuple[str, str]]:
    """The rule of the schedules that know no virtual stages."""
    if num_virtual_stages == 1:
        return []
    rule = f"{name} runs one model chunk per stage, and num_virtual_stages = {num_virtual_stages}"
    return [(rule, "set num_virtual_stages: 1, or schedule: interleaved_1f1b")]


def use_microbatches(count: int, otherwise: str) -> str:
    """The fix for a number of microbatches that a schedule cannot run."""
    return f"use {count} microbatches (global_batch_size / (dp * micro_batch_size)), or schedule: {otherwise}"
