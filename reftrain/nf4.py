"""NF4: frozen weights in four bits, taken back to the compute format whenever a matmul needs them.

Plain torch, so that it runs on every device; it saves memory, not time. Format of QLoRA (arXiv:2305.14314, section 3 and appendix E): blocks of
64 numbers share an fp32 scale, the largest of them; each number is the nearest of 16 quantiles of a normal distribution. Double quantization
stores the scales themselves in 8 bits, in blocks of 256.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["LEVELS", "NarrowWeight"]

BLOCK, SCALES_BLOCK = 64, 256
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""Appendix E of the paper: zero, and quantiles such that each level is as likely as the next for normally distributed numbers."""


class NarrowWeight(nn.Module):
    """A frozen matrix [out, in] in 4 bits: two codes to a byte, a scale per 64 of them.

    Bytes: out * in * (1/2 + 4/64), or with `is_double` out * in * (1/2 + 1/64 + 4/(64 * 256)), and a mean of the scales.

    Example:
        >>> weight = NarrowWeight(torch.tensor([[1.0, 0.0, -1.0, 0.5]]), is_double=False)
        >>> weight.whole(torch.float32)
        tensor([[ 1.0000,  0.0000, -1.0000,  0.4407]])
    """

    codes: Tensor
    scales: Tensor
    scales_top: Tensor | None
    scales_mean: Tensor | None

    def __init__(self, weight: Tensor, *, is_double: bool) -> None:
        super().__init__()
        self.shape = weight.shape
        flat = weight.detach().float().flatten()
        blocks = functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
        scales = blocks.abs().amax(dim=1)
        levels = torch.tensor(LEVELS, device=weight.device)
        codes = torch.bucketize(blocks / scales.clamp(min=1e-30).unsqueeze(1), (levels[1:] + levels[:-1]) / 2).to(torch.uint8).view(-1, 2)
        # Not in checkpoints: they are made again from the weights that the run started from.
        self.register_buffer("codes", codes[:, 0] << 4 | codes[:, 1], persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("scales_top", None, persistent=False)
        self.register_buffer("scales_mean", None, persistent=False)
        if is_double:
            self._narrow_scales(scales)

    def _narrow_scales(self, scales: Tensor) -> None:
        """8 bits with a sign for what a scale differs from their mean; section 3 subtracts it because scales are positive."""
        self.scales_mean = scales.mean()
        groups = functional.pad(scales - self.scales_mean, (0, -len(scales) % SCALES_BLOCK)).view(-1, SCALES_BLOCK)
        self.scales_top = groups.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
        self.scales = (groups / self.scales_top * 127).round().to(torch.int8).flatten()[: len(scales)].clone()

    def _wide_scales(self) -> Tensor:
        if self.scales_top is None or self.scales_mean is None:
            return self.scales
        groups = functional.pad(self.scales, (0, -len(self.scales) % SCALES_BLOCK)).view(-1, SCALES_BLOCK)
        return (groups.float() / 127 * self.scales_top).flatten()[: len(self.scales)] + self.scales_mean

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The matrix as near as four bits come, [out, in]."""
        levels = torch.tensor(LEVELS, device=self.codes.device, dtype=dtype)
        values = levels[torch.stack((self.codes >> 4, self.codes & 15), dim=1).flatten().int()].view(-1, BLOCK)
        values *= self._wide_scales().to(dtype).unsqueeze(1)
        return values.flatten()[: self.shape.numel()].view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x [..., in] -> [..., out]."""
        return _NarrowLinear.apply(x, self)  # type: ignore[no-any-return, no-untyped-call]


class _NarrowLinear(torch.autograd.Function):
    """Keeps neither the input nor the wide weight for the backward pass, which makes the weight again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NarrowWeight) -> Tensor:
        ctx.weight = weight
        return functional.linear(x, weight.whole(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.weight.whole(grads[0].dtype), None
