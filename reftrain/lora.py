"""LoRA: small trained matrices beside frozen ones, which may be stored in four bits; and the way back to plain weights.

In: a `Transformer` as built. Out: the same with adapters on the layers that the plan's `workload.lora_targets` names, everything else frozen.
Source: Hu et al., LoRA, arXiv:2106.09685, section 4.1; Dettmers et al., QLoRA, arXiv:2305.14314, section 3.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from planner.errors import InputError
from planner.op_cost import Numerics
from reftrain.axes import SINGLE, Axes, local
from reftrain.config import AdapterOptions
from reftrain.layers import Linear
from reftrain.model import Transformer
from reftrain.moe import Mixture
from reftrain.nf4 import NarrowWeight
from reftrain.recompute import not_kept

__all__ = ["Adapter", "adapted_layers", "add_adapters", "merged", "narrow_frozen", "round_frozen", "without_adapters"]

NEVER = ("router.gate", "shared_gate")
"""Linear layers of blocks that decide where tokens go; the planner prices none for them either."""


class Adapter(nn.Module):
    """scale * B A dropout(x), to which the layer adds its own product. B starts at zero, so that at first nothing is there.

    Shapes: x [..., in] -> [..., out]; a [rank, in], b [out, rank]. Under tensor parallelism they are split as the layer is: b by rows beside
    columns (out/t), a by columns beside rows (in/t); the other one is whole, and its gradient is summed over the ranks.
    """

    axes: Axes = SINGLE

    def __init__(self, in_features: int, out_features: int, options: AdapterOptions) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(options.rank, in_features))
        self.b = nn.Parameter(torch.empty(out_features, options.rank))
        self.scale, self.dropout = options.scale, options.dropout

    def forward(self, x: Tensor, split: str) -> Tensor:
        """See the class."""
        whole = self.axes.whole if split == "none" else self.axes.split_whole
        a = (local if split == "row" else whole)(self.a).to(x.dtype)
        b = (local if split == "column" else whole)(self.b).to(x.dtype)
        x = functional.dropout(x, self.dropout, self.training) if self.dropout else x
        inner = functional.linear(x, a) * self.scale
        with not_kept():  # a sum needs it, and nothing else
            return functional.linear(inner, b)


def adapted_layers(model: Transformer, targets: Any) -> Iterator[tuple[str, Linear]]:
    """(name, layer) of the linear layers of the blocks that adapters go on, as the planner names and prices them."""
    wanted = Numerics(lora_rank=1, lora_targets=targets)
    for name, module in model.blocks.named_modules():
        if isinstance(module, Linear) and not name.endswith(NEVER) and wanted.has_adapter(name):
            yield name, module


def add_adapters(model: Transformer, options: AdapterOptions, frozen_dtype: torch.dtype) -> None:
    """Freezes every parameter, in `frozen_dtype`, and puts adapters on the targets.

    Raises:
        InputError: no layer of that kind, or experts, whose stacked matrices have no adapters here.
    """
    if options.targets == "all" and any(isinstance(module, Mixture) for module in model.modules()):
        rule = "reftrain has no adapters for experts"
        raise InputError.single("workload.lora_targets", options.targets, rule, "use attention or query_value")
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(parameter.detach().to(frozen_dtype), requires_grad=False))
    found = list(adapted_layers(model, options.targets))
    if model.blocks and not found:
        raise InputError.single("workload.lora_targets", options.targets, "names no layer of this model", "use attention or all")
    for _, layer in found:
        layer.adapter = Adapter(layer.in_features, layer.out_features, options)


def narrow_frozen(model: Transformer, frozen_format: str) -> None:
    """Stores the blocks' frozen matrices in 4 bits, once their values are there; a second call finds nothing to do."""
    for module in _frozen_layers(model):
        if module.narrow is None:
            module.narrow = NarrowWeight(module.weight, is_double=frozen_format == "nf4_double")
            del module.weight


@torch.no_grad()
def round_frozen(model: Transformer, frozen_format: str) -> None:
    """The same values, stored as they were: what adapters were trained on is what they are merged into."""
    for module in _frozen_layers(model):
        module.weight.copy_(NarrowWeight(module.weight, is_double=frozen_format == "nf4_double").whole(module.weight.dtype))


def _frozen_layers(model: Transformer) -> Iterator[Linear]:
    for name, module in model.blocks.named_modules():
        if isinstance(module, Linear) and not name.endswith(NEVER):
            yield module


def without_adapters(name: str) -> bool:
    """Whether a parameter of that name is the model's own."""
    return re.search(r"\.adapter\.[ab]$", name) is None


def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Plain weights from those with adapters: W + scale * B A, in fp32, under the names of a model that never had any.

    Args:
        state: name -> whole tensor, of frozen weights and adapters.
    """
    plain = {name: tensor.float() for name, tensor in state.items() if without_adapters(name)}
    for name in state:
        if name.endswith(".adapter.a"):
            layer = name.removesuffix(".adapter.a")
            product = state[f"{layer}.adapter.b"].float() @ state[name].float()
            plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + scale * product
    return plain
