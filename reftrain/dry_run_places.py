"""In which module the trainer is, in the forward pass and in the backward pass.

Autograd numbers its nodes in the order in which the forward pass makes them. So the numbers at which a module begins and ends
tell, in the backward pass, to which module the node belongs that runs; no hook touches the graph.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import _get_sequence_nr  # type: ignore[attr-defined]
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

__all__ = ["Places"]

LEAF_NODE = 1 << 62
"""Accumulation of gradients has the largest number of all."""


class Places:
    """Follows the modules of one rank's model parts."""

    def __init__(self) -> None:
        self._stack: list[str] = []
        self._numbers: list[int] = []
        self._names: list[str] = []
        self._in_module: dict[int, str] = {}

    def begin_step(self) -> None:
        """Forgets the graphs of earlier steps."""
        self._numbers, self._names = [], []

    @contextmanager
    def follow(self, parts: Sequence[nn.Module]) -> Iterator[None]:
        """Listens to the forward passes of all modules of `parts`."""
        self._in_module = {id(module): name for part in parts for name, module in part.named_modules() if name}
        hooks = (register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def now(self) -> str:
        """The innermost module, or "" outside of all."""
        if self._stack:
            return self._stack[-1]
        node = torch._C._current_autograd_node()
        if node is None:
            return ""
        number = node._sequence_nr()
        place = bisect_right(self._numbers, number) - 1
        return self._names[place] if place >= 0 and number < LEAF_NODE else ""

    def _enter(self, module: nn.Module, _args: Any) -> None:
        name = self._in_module.get(id(module))
        if name is not None:
            self._stack.append(name)
            self._turn()

    def _leave(self, module: nn.Module, _args: Any, _out: Any) -> None:
        name = self._in_module.get(id(module))
        if name is not None and name in self._stack:
            while self._stack.pop() != name:  # modules that an exception ended
                pass
            self._turn()

    def _turn(self) -> None:
        self._numbers.append(_get_sequence_nr())
        self._names.append(self._stack[-1] if self._stack else "")
