"""Layout: how the work is split over devices.

World size = dp_replicate * dp_shard * tp * cp * pp. `ep` is no factor of it: experts are spread over the devices of one
pipeline stage (dp, cp and tp together), as Megatron-Core and torchtitan do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from planner.errors import InputError, Problem
from planner.model_spec import ModelSpec
from planner.spec import PositiveInt, Spec
from planner.units import format_count

__all__ = ["Layout", "LayoutArrays", "PartialLayout", "check_layout"]

ScheduleName = Literal["gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "dualpipe"]


class Layout(Spec):
    """A complete layout of one plan."""

    dp_replicate: PositiveInt = 1
    """Copies of the sharded model (HSDP), or plain data parallelism when dp_shard is 1."""
    dp_shard: PositiveInt = 1
    """Data-parallel ranks over which ZeRO shards."""
    tp: PositiveInt = 1
    cp: PositiveInt = 1
    pp: PositiveInt = 1
    num_virtual_stages: PositiveInt = 1
    """Model chunks per pipeline rank."""
    schedule: ScheduleName = "1f1b"
    ep: PositiveInt = 1
    zero_stage: Literal[0, 1, 2, 3] = 0
    sequence_parallel: bool = False
    micro_batch_size: PositiveInt = 1

    @property
    def num_devices(self) -> int:
        """Devices that this layout occupies."""
        return self.dp_replicate * self.dp_shard * self.tp * self.cp * self.pp

    @property
    def dp(self) -> int:
        """Data-parallel ranks in all."""
        return self.dp_replicate * self.dp_shard


class PartialLayout(Spec):
    """A layout of which some keys are left for the search to fill in."""

    dp_replicate: PositiveInt | None = None
    dp_shard: PositiveInt | None = None
    tp: PositiveInt | None = None
    cp: PositiveInt | None = None
    pp: PositiveInt | None = None
    num_virtual_stages: PositiveInt | None = None
    schedule: ScheduleName | None = None
    ep: PositiveInt | None = None
    zero_stage: Literal[0, 1, 2, 3] | None = None
    sequence_parallel: bool | None = None
    micro_batch_size: PositiveInt | None = None

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to fill in."""
        return all(getattr(self, name) is not None for name in type(self).model_fields)

    def complete(self, **defaults: Any) -> Layout:
        """A Layout of the keys given here, then `defaults`, then the plain ones of Layout."""
        return Layout(**(defaults | {k: v for k, v in self.model_dump().items() if v is not None}))


@dataclass(frozen=True)
class LayoutArrays:
    """Many layouts that share one pipeline structure; the other degrees are arrays of one shape [n] (or numbers).

    The cost functions read layouts by attribute only, so a `Layout` and a `LayoutArrays` go the same way.
    """

    dp_replicate: Any
    dp_shard: Any
    tp: Any
    cp: Any
    ep: Any
    zero_stage: Any
    sequence_parallel: Any
    micro_batch_size: Any
    pp: int = 1
    num_virtual_stages: int = 1
    schedule: str = "1f1b"

    @property
    def dp(self) -> Any:
        """Data-parallel ranks in all, [n]."""
        return self.dp_replicate * self.dp_shard

    def take(self, index: Any) -> LayoutArrays:
        """The layouts at `index`."""
        names = ("dp_replicate", "dp_shard", "tp", "cp", "ep", "zero_stage", "sequence_parallel", "micro_batch_size")
        return LayoutArrays(
            **{name: np.asarray(getattr(self, name))[index] for name in names},
            pp=self.pp, num_virtual_stages=self.num_virtual_stages, schedule=self.schedule,
        )  # fmt: skip


def _divisors(number: int) -> str:
    found = [d for d in range(1, min(number, 4096) + 1) if number % d == 0]
    return ", ".join(str(d) for d in found[:16]) + (", ..." if len(found) > 16 else "")


def check_layout(layout: Layout, model: ModelSpec, num_devices: int, seq_len: int, global_batch_size: int) -> None:
    """Every rule of arithmetic that a layout must keep; memory is not one of them.

    Raises:
        InputError: one Problem per broken rule, each with the legal values.
    """
    problems: list[Problem] = []

    def rule(holds: bool, key: str, text: str, fix: str) -> None:
        if not holds:
            problems.append(Problem(f"layout.{key}", getattr(layout, key), text, fix))

    world, heads, moe = layout.num_devices, model.num_attention_heads, model.moe
    if world != num_devices:
        product = f"dp_replicate*dp_shard*tp*cp*pp = {layout.dp_replicate}*{layout.dp_shard}*{layout.tp}*{layout.cp}*{layout.pp} = {world}"
        fix = f"use cluster.num_devices: {world}, or degrees whose product is {num_devices}"
        problems.append(Problem("layout", product, f"the product must equal cluster.num_devices = {num_devices}", fix))
    rule(heads % layout.tp == 0, "tp", f"must divide num_attention_heads = {heads}", f"use one of {_divisors(heads)}")
    kv_heads = model.num_key_value_heads
    rule(layout.tp <= kv_heads or layout.tp % kv_heads == 0, "tp", f"must divide, or be a multiple of, num_key_value_heads = {kv_heads}", f"use one of {_divisors(kv_heads)}")
    rule(layout.tp >= kv_heads or kv_heads % layout.tp == 0, "tp", f"must divide num_key_value_heads = {kv_heads}", f"use one of {_divisors(kv_heads)}")
    rule(model.intermediate_size % layout.tp == 0, "tp", f"must divide intermediate_size = {model.intermediate_size}", "use a smaller power of two")
    rule(layout.pp * layout.num_virtual_stages <= model.num_layers, "pp", f"pp * num_virtual_stages = {layout.pp * layout.num_virtual_stages} must not exceed num_layers = {model.num_layers}", f"use pp of at most {max(model.num_layers // layout.num_virtual_stages, 1)}")
    rule(seq_len % (2 * layout.cp if layout.cp > 1 else 1) == 0, "cp", f"2*cp must divide seq_len = {seq_len} (each rank holds two slices, so that causal work is even)", "use a power of two")
    rule(not layout.sequence_parallel or (seq_len // layout.cp) % layout.tp == 0, "sequence_parallel", f"tp = {layout.tp} must divide seq_len / cp = {seq_len / layout.cp:g}", "change seq_len or tp")
    rule(not layout.sequence_parallel or layout.tp > 1, "sequence_parallel", "splits the sequence over the tp ranks, and tp = 1", "set sequence_parallel: false or tp: 2")
    rule(layout.zero_stage > 0 or layout.dp_shard == 1, "zero_stage", f"stage 0 shards nothing, but dp_shard = {layout.dp_shard}", f"use zero_stage: 1, 2 or 3, or dp_replicate: {layout.dp} with dp_shard: 1")
    per_round = layout.dp * layout.micro_batch_size
    rule(global_batch_size % per_round == 0, "micro_batch_size", f"global_batch_size = {global_batch_size} must be a multiple of dp * micro_batch_size = {layout.dp} * {layout.micro_batch_size} = {per_round}", f"use global_batch_size {max(global_batch_size // per_round, 1) * per_round} or {-(-global_batch_size // per_round) * per_round}")
    if moe is None:
        rule(layout.ep == 1, "ep", f"{model.name} has no experts", "set ep: 1")
    else:
        stage_world = layout.dp * layout.cp * layout.tp
        rule(moe.num_experts % layout.ep == 0, "ep", f"must divide num_experts = {moe.num_experts}", f"use one of {_divisors(moe.num_experts)}")
        rule(stage_world % layout.ep == 0, "ep", f"must divide dp*cp*tp = {stage_world}, the devices of one pipeline stage", f"use one of {_divisors(stage_world)}")
        rule(layout.ep == 1 or layout.tp == 1 or layout.sequence_parallel, "ep", "with tp > 1 every tp rank must route its own tokens", "set sequence_parallel: true")
        rule(layout.ep > 1 or moe.intermediate_size % layout.tp == 0, "tp", f"must divide the experts' intermediate_size = {moe.intermediate_size} when ep = 1", "use a smaller tp, or ep > 1")
    if problems:
        raise InputError(*_without_repeats(problems))


def _without_repeats(problems: list[Problem]) -> list[Problem]:
    """One problem per (key, rule): the two head rules overlap."""
    seen: dict[tuple[str, str], Problem] = {}
    for problem in problems:
        seen.setdefault((problem.key, problem.rule), problem)
    return list(seen.values())


def describe_layout(layout: Layout) -> str:
    """One line: the degrees that differ from 1, then ZeRO and the micro-batch."""
    degrees = [f"{name}{format_count(getattr(layout, name))}" for name in ("dp_replicate", "dp_shard", "tp", "cp", "pp", "ep") if getattr(layout, name) > 1]
    extra = [f"zero{layout.zero_stage}", f"micro-batch {layout.micro_batch_size}"]
    if layout.sequence_parallel:
        extra.insert(0, "sp")
    if layout.pp > 1:
        extra.append(f"{layout.schedule}" + (f" x{layout.num_virtual_stages}" if layout.num_virtual_stages > 1 else ""))
    return " ".join([*degrees, *extra]) if degrees else " ".join(["one device", *extra])
