"""One simulated rank in one process: fake process groups, fake tensors, and what of torch does not go with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # gives collectives on fake tensors a result
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining import schedules
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel import distributed as ddp
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from planner.layout import Layout
from reftrain.parallel import Ranks, make_ranks

__all__ = ["adapt_ddp", "axis_names", "simulated_rank"]


@contextmanager
def simulated_rank(layout: Layout, rank: int) -> Iterator[Ranks]:
    """Rank `rank` of the layout's world, whose tensors hold no bytes and whose collectives return at once.

    Raises:
        RuntimeError: this process is already part of a group.
    """
    if dist.is_initialized():
        raise RuntimeError("a dry run needs a process that is not part of a group")
    cpu = torch.device("cpu")
    if layout.num_devices == 1:
        with FakeTensors():
            yield Ranks(layout, cpu)
        return
    dist.init_process_group("fake", rank=rank, world_size=layout.num_devices, store=FakeStore())
    try:
        ranks = make_ranks(layout, cpu, rank)
        with _made_to_fit(), FakeTensors():
            yield ranks
    finally:
        dist.destroy_process_group()


@contextmanager
def _made_to_fit() -> Iterator[None]:
    """DDP does not compare parameters, which have no values, between ranks; messages hold what they send, as real ones do."""
    send = schedules._batch_p2p
    patches: list[tuple[Any, str, Any]] = [
        (ddp, "_verify_param_shape_across_processes", lambda *args: None),
        (ddp, "_sync_module_states", lambda **kwargs: None),
        (schedules, "_batch_p2p", lambda ops, desc=None: [Message(work, [op.tensor for op in ops]) for work in send(ops, desc)]),
    ]
    original = [getattr(module, name) for module, name, _ in patches]
    for module, name, function in patches:
        setattr(module, name, function)
    try:
        yield
    finally:
        for (module, name, _), function in zip(patches, original, strict=True):
            setattr(module, name, function)


@dataclass
class Message:
    """A fake message under way."""

    work: Any
    tensors: list[Tensor]

    def wait(self) -> Any:
        """Waits for it."""
        return self.work.wait()


class FakeTensors(FakeTensorMode):
    """New tensors hold no bytes; real ones (the ranks of a mesh) keep their values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See the class."""
        kwargs = kwargs or {}
        if not types and func is not torch.ops.aten.lift_fresh.default and any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


class FakeReducer:
    """DDP's reducer, without its exchange of the order in which gradients come: buckets stay as they were made."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


def adapt_ddp(part: DistributedDataParallel) -> None:
    """Keeps DDP from reading values."""
    part.register_comm_hook(None, reduce_bucket)
    part.reducer = FakeReducer(part.reducer)  # type: ignore[assignment]


def reduce_bucket(_state: Any, bucket: Any) -> torch.futures.Future[Tensor]:
    """DDP's all-reduce; a fake one has no result that DDP could read."""
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


reduce_bucket.__annotations__.clear()  # DDP compares them with types, and here they are text


def axis_names(ranks: Ranks) -> dict[str, str]:
    """Mesh axis of every process group, by the group's name."""
    if ranks.main is None:
        return {}
    main, expert = ranks.main, ranks.expert
    shard = "dp_shard*cp" if ranks.layout.cp > 1 else "dp_shard"
    # Where two axes have the same ranks they share a group: the later name here is the more telling one.
    groups = [("world", dist.group.WORLD), ("tied", ranks.tied_group), ("tokens", ranks.token_group)]
    if expert is not None:
        groups += [(axis, expert[axis].get_group()) for axis in ("expert_replicate", "expert_shard", "ep")]
    groups += [(name, main[axis].get_group()) for axis, name in (("pp", "pp"), ("replicate", "dp_replicate"), ("shard", shard), ("tp", "tp"))]
    groups += [("cp", ranks.axes.cp_group)]
    return {group.group_name: name for name, group in groups if group is not None and group.size() > 1}
