"""Exact bytes of live tensors: every storage that an op takes or makes is counted until it is freed.

Works on every device and under fake tensors. What a library takes inside one op (scratch of a matmul) is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Self

from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["LiveMemory", "held"]


def held(tensor: Tensor) -> Tensor:
    """The tensor whose storage a wrapper (a DTensor, a promise of a collective's result) stands for."""
    if isinstance(tensor, DTensor):
        tensor = tensor._local_tensor
    return tensor.elem if isinstance(tensor, AsyncCollectiveTensor) else tensor


class LiveMemory(TorchDispatchMode):
    """Counts live bytes while it is on; `peak_bytes` is the largest sum seen around any op.

    Args:
        rounding_bytes: an allocator's block size; 1 for none.
    """

    def __init__(self, existing: Iterable[Tensor] = (), rounding_bytes: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = self.peak_bytes = 0
        self._rounding_bytes = rounding_bytes
        self._sizes: dict[int, int] = {}
        for tensor in existing:
            self.see(tensor)
        self.start_bytes = self.live_bytes

    def __enter__(self) -> Self:
        """FSDP resizes storages beneath the dispatcher; its two functions for that tell us."""
        self._original = (_fsdp_param.alloc_storage, _fsdp_param.free_storage)

        def told(change: Any) -> Any:
            def run(tensor: Tensor) -> None:
                change(tensor)
                self.see_gathered(tensor)

            return run

        _fsdp_param.alloc_storage, _fsdp_param.free_storage = (told(change) for change in self._original)
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *args: Any) -> None:
        """See `__enter__`."""
        _fsdp_param.alloc_storage, _fsdp_param.free_storage = self._original
        super().__exit__(*args)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Looks at what the op takes (it may have been there before), runs it, and looks at what it made."""
        kwargs = kwargs or {}
        self.see_all(args)
        self.see_all(kwargs)
        out = func(*args, **kwargs)
        self.see_all(out)
        return out

    def see_all(self, values: Any) -> None:
        """Sees every tensor in nested lists, tuples and dicts."""
        if isinstance(values, Tensor):
            self.see(values)
        elif isinstance(values, (list, tuple)):
            for value in values:
                self.see_all(value)
        elif isinstance(values, dict):
            for value in values.values():
                self.see_all(value)

    def see_gathered(self, tensor: Tensor) -> None:
        """Sees a parameter that FSDP has gathered or dropped."""
        self.see(tensor)

    def see(self, tensor: Tensor) -> int:
        """Counts a tensor's storage, with its present size, until it is freed; returns the storage's key."""
        storage = held(tensor).untyped_storage()
        key: int = storage._cdata
        num_bytes = -(-storage.nbytes() // self._rounding_bytes) * self._rounding_bytes
        before = self._sizes.get(key)
        if before is None:
            weakref.finalize(storage, self._forget, key)
            before = self._sizes[key] = 0
        if num_bytes != before:
            self._sizes[key] = num_bytes
            self.changed(key, num_bytes - before)
        return key

    def changed(self, key: int, num_bytes: int) -> None:
        """A storage has grown by `num_bytes`, or shrunk."""
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int) -> None:
        self.changed(key, -self._sizes.pop(key, 0))
