"""Exact bytes of live tensors: every storage that an op makes is counted until it is freed.

Works on every device and under fake tensors. What a library takes inside one op (scratch of a matmul) is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveMemory"]


class LiveMemory(TorchDispatchMode):
    """Counts live bytes while it is on; `peak_bytes` is the largest sum seen after any op.

    Args:
        rounding_bytes: an allocator's block size; 1 for none.
    """

    def __init__(self, existing: Iterable[Tensor] = (), rounding_bytes: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = self.peak_bytes = 0
        self._rounding_bytes = rounding_bytes
        self._sizes: dict[int, int] = {}
        for tensor in existing:
            self._see(tensor)
        self.start_bytes = self.live_bytes

    def __enter__(self) -> LiveMemory:
        """FSDP resizes storages beneath the dispatcher; its two functions for that tell us."""
        self._original = (_fsdp_param.alloc_storage, _fsdp_param.free_storage)

        def told(change: Any) -> Any:
            def run(tensor: Tensor) -> None:
                change(tensor)
                self._see(tensor)

            return run

        _fsdp_param.alloc_storage, _fsdp_param.free_storage = (told(change) for change in self._original)
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *args: Any) -> None:
        """See `__enter__`."""
        _fsdp_param.alloc_storage, _fsdp_param.free_storage = self._original
        super().__exit__(*args)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the op, then looks at what it made."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        storage = tensor.untyped_storage()
        key = storage._cdata
        num_bytes = -(-storage.nbytes() // self._rounding_bytes) * self._rounding_bytes
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key)
            self._sizes[key] = 0
        self.live_bytes += num_bytes - self._sizes[key]
        self._sizes[key] = num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key, 0)
