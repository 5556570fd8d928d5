"""What every live byte of a simulated rank is for: a category, a module, an op, and when it came and went.

`Ledger` is `LiveMemory` with a memory of its own. A storage has one category for its whole life, the strongest that it ever
deserved (`CATEGORIES`, weakest first): an op's result that turns out to be kept for the backward pass was an activation from
birth, and one that becomes a gradient was a gradient.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import ProcessGroup
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.utils.checkpoint import _recomputation_hook
from torch.utils.hooks import RemovableHandle

from reftrain.dry_run_places import Places
from reftrain.flop_count import FLOPS
from reftrain.live_memory import LiveMemory, held

__all__ = ["CATEGORIES", "Ledger", "Record", "Traffic"]

aten = torch.ops.aten
EXCHANGED = "exchanged"
CATEGORIES = (
    "temporaries", "inputs", EXCHANGED, "recomputed_activations", "activations", "logits", "communication_buffers", "cast_weights",
    "gathered_gradients", "gathered_weights", "gradients", "optimizer", "weights",
)  # fmt: skip
"""Weakest first. Reported as `communication_buffers` too: `exchanged`, what tensor, context, expert and pipeline parallelism send or
receive and nobody keeps."""
STRENGTH = {name: rank for rank, name in enumerate(CATEGORIES)}
IN_BACKWARD = torch._C._current_graph_task_id


@dataclass(slots=True, eq=False)
class Record:
    """One storage."""

    op: str
    module: str
    phase: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int = 0
    category: str = "temporaries"

    def mark(self, category: str) -> None:
        """Gives it `category`, unless it has a stronger one."""
        if STRENGTH[category] > STRENGTH[self.category]:
            self.category = category


@dataclass
class Traffic:
    """What one kind of collective moved over one axis, on this rank and in one step."""

    calls: int = 0
    input_bytes: int = 0
    output_bytes: int = 0


@dataclass
class Step:
    """One optimizer step: what was alive before, and every change since, in order."""

    start: list[tuple[Record, int]] = field(default_factory=list)
    changes: list[tuple[int, Record, int]] = field(default_factory=list)
    """(ops so far, storage, bytes more)."""
    phases: list[tuple[int, str]] = field(default_factory=list)
    """(ops so far, phase that begins)."""
    flops: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Of forward and backward passes, by op."""
    flops_once: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Of the optimizer."""
    traffic: dict[tuple[str, str], Traffic] = field(default_factory=lambda: defaultdict(Traffic))
    traffic_at_forwards: list[dict[tuple[str, str], Traffic]] = field(default_factory=list)
    """What had been moved when each forward pass of a model part began."""


class Ledger(LiveMemory):  # type: ignore[no-untyped-call]
    """Writes down every storage of one simulated rank while it is on.

    Args:
        axes: names of mesh axes by process group name.
        rounding_bytes: an allocator's block size; 1 for none.
    """

    def __init__(self, axes: dict[str, str], rounding_bytes: int = 1) -> None:
        self.records: dict[int, Record] = {}
        self.step = Step()
        self.num_ops = 0
        self.phase = ""
        self.places = Places()
        self._axes = axes
        self._op = "held before"
        self._followed: set[int] = set()
        self._tensor: Tensor | None = None
        super().__init__(rounding_bytes=rounding_bytes)

    # ------------------------------------------------------------ what the trainer's objects say

    def hold(self, tensors: Iterable[tuple[str, Tensor]], category: str) -> None:
        """Tensors that exist: (module, tensor)."""
        for module, tensor in tensors:
            record = self.mark(tensor, category)
            record.module = module

    def mark(self, tensor: Tensor, category: str) -> Record:
        """Says what a tensor's storage is for."""
        record = self._record(tensor)
        record.mark(category)
        return record

    def begin_step(self) -> None:
        """Forgets earlier steps; what is alive stays."""
        self.step = Step(start=[(record, record.num_bytes) for record in self.records.values()])
        self.num_ops = 0
        self.places.begin_step()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Names what happens in its body."""
        self._enter_phase(phase)
        yield
        self._enter_phase("")

    def _enter_phase(self, phase: str) -> None:
        if phase != self.phase:
            self.phase = phase
            self.step.phases.append((self.num_ops, phase))

    @contextmanager
    def listening(self, parts: Sequence[nn.Module]) -> Iterator[None]:
        """Listens to the modules of `parts`, and where FSDP, recomputation and autograd keep tensors beneath the dispatcher."""
        for part in parts:
            for parameter in part.parameters():
                self._follow_gradient(parameter, "gradients")
        hooks = [hook for part in parts for hook in self._follow_forward(part)]
        try:
            with (
                self.places.follow(parts),
                _afterwards(FSDPParam, "init_unsharded_param", self._see_gathered_parameter),
                _afterwards(FSDPParam, "to_accumulated_grad_if_needed", self._see_gathered_gradient),
                _afterwards(_recomputation_hook, "__init__", self._follow_recomputation),
            ):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _follow_gradient(self, parameter: Tensor, category: str) -> None:
        def told(held_by: Tensor) -> None:
            if held_by.grad is not None:
                self.mark(held_by.grad, category)

        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(told)  # type: ignore[no-untyped-call]

    def _follow_forward(self, part: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
        """What a forward pass of `part` leaves behind that has no other use is kept for the backward pass."""
        before: list[set[int]] = []

        def start(*_: Any) -> None:
            before.append(set(self.records))
            self.step.traffic_at_forwards.append({key: replace(moved) for key, moved in self.step.traffic.items()})

        def end(*_: Any) -> None:
            known = before.pop()
            for key, record in self.records.items():
                if key not in known and record.category in ("temporaries", EXCHANGED):
                    record.mark("activations")

        return part.register_forward_pre_hook(start, prepend=True), part.register_forward_hook(end)

    def _see_gathered_parameter(self, parameter: Any) -> None:
        gathered = parameter._unsharded_param
        self.mark(gathered, "gathered_weights")
        if id(gathered) not in self._followed:
            self._followed.add(id(gathered))
            self._follow_gradient(gathered, "gathered_gradients")

    def _see_gathered_gradient(self, parameter: Any) -> None:
        if parameter.unsharded_accumulated_grad is not None:
            self.mark(parameter.unsharded_accumulated_grad, "gathered_gradients")

    def _follow_recomputation(self, hook: Any) -> None:
        pack = hook.pack_hook

        def told(x: Tensor) -> Tensor:
            self.mark(x, "recomputed_activations")
            return pack(x)  # type: ignore[no-any-return]

        hook.pack_hook = told

    # ------------------------------------------------------------ what ops do

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One op: values that fake tensors lack are made up, then storages, FLOPs and bytes on the wire are written down."""
        kwargs = kwargs or {}
        is_fake = bool(args) and isinstance(args[0], FakeTensor)
        if is_fake and func is aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1
        if is_fake and func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # as the real one; the one for fake tensors makes a copy
        if is_fake and func is aten.bincount.default:
            func, args, kwargs = aten.new_zeros.default, (args[0], [kwargs.get("minlength", 0) or args[2]]), {}
        self.num_ops += 1
        if self.phase in ("forward", "backward"):
            self._enter_phase("forward" if IN_BACKWARD() == -1 else "backward")
        self._op = "input"
        self.see_all(args)
        self.see_all(kwargs)
        packet = func._overloadpacket
        self._op = packet.__name__
        out = func(*args, **kwargs)
        self.see_all(out)
        self._look(func, packet, args, kwargs, out)
        return out

    def _look(self, func: Any, packet: Any, args: Any, kwargs: Any, out: Any) -> None:
        if packet in FLOPS:
            is_repeated = self.phase in ("forward", "backward")
            (self.step.flops if is_repeated else self.step.flops_once)[self._op] += FLOPS[packet](*args, **kwargs, out_val=out)
        elif func is aten._to_copy.default:
            source = self.records.get(held(args[0]).untyped_storage()._cdata)
            if source is not None and source.category in ("weights", "gathered_weights") and isinstance(out, Tensor):
                self.mark(out, "cast_weights").module = source.module
        elif func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            self._note_traffic(func, args, out)

    def _note_traffic(self, func: Any, args: Any, out: Any) -> None:
        kind = _kind(func)
        if kind is None or (kind in ("send", "receive") and args[0][0].numel() == 1):  # torch greets a pipeline's neighbours once
            return
        tensors = [[x for x in (arg if isinstance(arg, (list, tuple)) else [arg]) if isinstance(x, Tensor)] for arg in args]
        is_functional = func.namespace != "c10d"
        sent = tensors[0] if is_functional or len(tensors) < 2 or not tensors[1] else tensors[1]
        got = [out] if is_functional else tensors[0]
        traffic = self.step.traffic[kind, self._axes.get(_group_name(args), "other")]
        traffic.calls += 1
        traffic.input_bytes += sum(x.numel() * x.element_size() for x in sent)
        traffic.output_bytes += sum(x.numel() * x.element_size() for x in got)
        is_buffer = kind == "receive" or (kind in ("all_gather", "reduce_scatter") and not is_functional)
        for tensor in (*sent, *got):
            self.mark(tensor, "communication_buffers" if is_buffer else EXCHANGED)

    def see_gathered(self, tensor: Tensor) -> None:
        """See `LiveMemory`."""
        self.mark(tensor, "gathered_weights")

    def see(self, tensor: Tensor) -> int:
        """See `LiveMemory`."""
        self._tensor = tensor
        key = super().see(tensor)
        self._tensor = None  # or it would live on
        return key

    def changed(self, key: int, num_bytes: int) -> None:
        """See `LiveMemory`."""
        super().changed(key, num_bytes)
        record = self.records.get(key)
        if record is None:
            if self._tensor is None:  # an empty storage that nobody spoke of goes
                return
            record = self.records[key] = self._born(self._tensor)
        record.num_bytes += num_bytes
        self.step.changes.append((self.num_ops, record, num_bytes))
        if key not in self._sizes:
            del self.records[key]

    def _born(self, tensor: Tensor) -> Record:
        module = self.places.now()
        record = Record(self._op, module, self.phase, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        if self._op in ("input", "held before"):
            record.category = "inputs"
        elif module.startswith("head") and self.phase == "forward":
            record.category = "logits"
        return record

    def _record(self, tensor: Tensor) -> Record:
        key = self.see(tensor)
        if key not in self.records:  # a storage that FSDP has emptied
            self.records[key] = self._born(tensor)
        return self.records[key]


@contextmanager
def _afterwards(owner: Any, name: str, told: Callable[[Any], None]) -> Iterator[None]:
    """Calls `told(self)` after every call of a class's method."""
    method = getattr(owner, name)

    def run(self: Any, *args: Any) -> Any:
        out = method(self, *args)
        told(self)
        return out

    setattr(owner, name, run)
    try:
        yield
    finally:
        setattr(owner, name, method)


def _kind(func: Any) -> str | None:
    name = func._overloadpacket.__name__.strip("_")
    for kind, words in KINDS.items():
        if any(name.startswith(word) for word in words):
            return kind
    return None


KINDS = {
    "all_gather": ("allgather", "all_gather"),
    "reduce_scatter": ("reduce_scatter",),
    "all_reduce": ("allreduce", "all_reduce"),
    "all_to_all": ("alltoall", "all_to_all"),
    "broadcast": ("broadcast",),
    "send": ("send", "isend"),
    "receive": ("recv", "irecv"),
}
"""Collectives by the names of torch's ops for them."""


def _group_name(args: Any) -> str:
    for arg in reversed(args):
        if isinstance(arg, str) and arg != "sum":
            return arg
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return str(ProcessGroup.unbox(arg).group_name)
    return ""
