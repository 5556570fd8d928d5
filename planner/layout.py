"""Layout: how the work is split over devices.

World size = dp_replicate * dp_shard * tp * cp * pp. `ep` is no factor of it: experts are spread over the devices of one
pipeline stage (dp, cp and tp together), as Megatron-Core and torchtitan do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from planner.spec import PositiveInt, ScheduleName, Spec, ZeroStage

__all__ = ["Layout", "LayoutArrays", "PartialLayout", "chunk_sizes", "describe_layout"]


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
    zero_stage: ZeroStage = 0
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
    zero_stage: ZeroStage | None = None
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
    dp_in_all: Any = None
    """Their product, where it varies along fewer axes than its factors."""

    @property
    def dp(self) -> Any:
        """Data-parallel ranks in all, [n]."""
        return self.dp_replicate * self.dp_shard if self.dp_in_all is None else self.dp_in_all

    @property
    def num_devices(self) -> Any:
        """Devices that each layout occupies, [n]."""
        return self.dp * self.tp * self.cp * self.pp


def describe_layout(layout: Layout) -> str:
    """One line: the degrees that differ from 1, then ZeRO and the micro-batch."""
    degrees = [f"{name}{getattr(layout, name)}" for name in ("dp_replicate", "dp_shard", "tp", "cp", "pp", "ep") if getattr(layout, name) > 1]
    extra = [f"zero{layout.zero_stage}", f"micro-batch {layout.micro_batch_size}"]
    if layout.sequence_parallel:
        extra.insert(0, "sp")
    if layout.pp > 1:
        extra.append(f"{layout.schedule}" + (f" x{layout.num_virtual_stages}" if layout.num_virtual_stages > 1 else ""))
    return " ".join([*degrees, *extra]) if degrees else " ".join(["one device", *extra])


@lru_cache(maxsize=4096)
def chunk_sizes(num_layers: int, num_chunks: int) -> tuple[int, ...]:
    """Layers per chunk, as even as can be; the last chunk (head) and then the first (embedding) go short first.

    Llama 3 405B: 126 layers in 128 places leave the first and the last one short (arXiv:2407.21783, section 3.3.2).
    """
    sizes = [-(-num_layers // num_chunks)] * num_chunks
    order = [i for pair in zip(range(num_chunks - 1, -1, -1), range(num_chunks), strict=True) for i in pair]
    order = list(dict.fromkeys(order))
    for i in order[: sum(sizes) - num_layers]:
        sizes[i] -= 1
    return tuple(sizes)
