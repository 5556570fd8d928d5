"""Three ops that eager torch runs in many passes over memory, in few: RMSNorm, rotary positions, projection with loss.

Each is an `autograd.Function` of plain torch ops, so that it runs on every device, under fake tensors and under the FLOP
counter. What each keeps for the backward pass is what the planner's ops say that it keeps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["chunk_loss", "linear_cross_entropy", "rms_norm", "rotate"]

# torch 2.13 renamed it, and warns at the old name
all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
IGNORED = -100
"""A target that takes no part in the loss, as in torch."""


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The format to sum in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        # The length is summed in one pass, without a temporary of squares.
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=_wide(x.dtype))
        inverse = length.square_().div_(rows.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        normed: Tensor = (rows * inverse.to(x.dtype)).mul_(weight)
        return normed.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        rows, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, x.shape[-1])
        inverse = inverse.to(x.dtype)
        normed = rows * inverse
        both = grad * normed
        # d/dx of x / rms: the part along x does not change the output
        along = (both @ weight).unsqueeze_(-1).div_(rows.shape[-1])
        grad_x = (grad * weight).addcmul_(normed, along, value=-1.0).mul_(inverse)
        return grad_x.view_as(x), both.sum(0) if ctx.needs_input_grad[1] else None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dim; keeps x and one fp32 number a row.

    Shapes: x [..., H], weight [H] of x's dtype.
    Source: arXiv:1910.07467, equation 4.
    """
    if x.device.type == "cuda":
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)
    return _RmsNorm.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # Halves are exchanged first: whole rows go through the vector units, half rows of bf16 took twice as long.
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((second, first), dim=-1).mul_(torch.cat((-sin, sin), dim=-1))
    return turned.addcmul_(x, torch.cat((cos, cos), dim=-1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: pairs (i, i + D/2) turned by their angle; keeps nothing of x. The gradient is the turn back.

    Shapes: x [B, S, heads, D], cos and sin [S, 1, D/2] of x's dtype.
    Source: arXiv:2104.09864, equation 34, with the halves laid out as in GPT-NeoX and HF's Llama.
    """
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients chunk by chunk in the forward pass, so that one chunk of logits lives at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, num_chunks: int, group: Any, wants_grad: bool
    ) -> Tensor:
        num_targets = (targets != IGNORED).sum().clamp_(min=1)
        wide = _wide(hidden.dtype)
        total = hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.empty_like(hidden) if wants_grad else None
        is_trained = wants_grad and ctx.needs_input_grad[1]  # LoRA freezes the head
        grad_weight = torch.zeros_like(weight, dtype=wide) if is_trained else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if is_trained and bias is not None else None
        first_class = weight.shape[0] * dist.get_rank(group) if group is not None else 0
        rows = -(-hidden.shape[0] // num_chunks)
        for start in range(0, hidden.shape[0], rows):
            part = hidden[start : start + rows]
            logits = torch.nn.functional.linear(part, weight, bias).to(wide)
            loss, grad = chunk_loss(logits, targets[start : start + rows], first_class, group, wants_grad)
            total += loss
            if grad is None or grad_hidden is None:
                continue
            grad = grad.div_(num_targets).to(hidden.dtype)
            del logits
            torch.mm(grad, weight, out=grad_hidden[start : start + rows])
            if grad_weight is not None and grad.dtype == wide:
                torch.addmm(grad_weight, grad.t(), part, out=grad_weight)
            elif grad_weight is not None:
                grad_weight += grad.t() @ part
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            del grad
        # Saved, not merely held: a pipeline keeps every microbatch's graph to the step's end, and autograd empties it after use.
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.is_scaled = False
        ctx.dtypes = (hidden.dtype, weight.dtype, bias.dtype if bias is not None else None)
        return total / num_targets

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # A zero-bubble pipeline comes here twice, for the input's gradient and for the weight's: scaled once, both find it done.
        saved = ctx.saved_tensors
        if not ctx.is_scaled:
            torch._foreach_mul_([grad.data for grad in saved if grad is not None], grads[0])
            ctx.is_scaled = True
        cast = (None if grad is None else grad.to(dtype) for grad, dtype in zip(saved, ctx.dtypes, strict=True))
        return (*cast, None, None, None, None)


def chunk_loss(logits: Tensor, targets: Tensor, first_class: int, group: Any, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
    """(summed loss, its gradient by the logits, written over them); classes may be split over the ranks of `group`."""
    top = logits.max(dim=-1, keepdim=True).values
    mine = targets - first_class
    is_mine = (mine >= 0) & (mine < logits.shape[-1])
    index = torch.where(is_mine, mine, 0).unsqueeze(-1)
    logits -= top
    wanted = logits.gather(-1, index).squeeze(-1)
    exponentials = logits.exp_()
    sums = exponentials.sum(dim=-1, keepdim=True)
    share = sums.reciprocal()
    if group is not None:
        wanted, sums, share = _over_ranks(top, sums, wanted, targets // logits.shape[-1], group)
    counts = targets != IGNORED
    loss = ((sums.squeeze(-1).log() - wanted) * counts).sum()
    if not wants_grad:
        return loss, None
    grad = exponentials.mul_(share)
    grad.scatter_add_(-1, index, -is_mine.unsqueeze(-1).to(grad.dtype))
    return loss, grad.mul_(counts.unsqueeze(-1))


def _over_ranks(top: Tensor, sums: Tensor, wanted: Tensor, owners: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over classes that lie on several ranks, from one message of three numbers a token.

    Shapes: top, sums [T, 1], wanted and owners (the rank that holds each target) [T]; returns the target's logit over the highest
    of all [T], the sum of all exponentials over the highest [T, 1], and what turns this rank's exponentials into probabilities [T, 1].
    """
    ours = torch.cat([top, sums, wanted.unsqueeze(-1)], dim=-1)
    gathered = ours.new_empty(dist.get_world_size(group) * len(ours), 3)
    all_gather_into(gathered, ours, group=group)
    every = gathered.view(-1, *ours.shape)
    highest = every[..., 0].max(dim=0).values
    factors = (every[..., 0] - highest).exp()
    total = (every[..., 1] * factors).sum(dim=0).unsqueeze(-1)
    theirs = every.gather(0, owners.clamp(0, len(every) - 1).view(1, -1, 1).expand(1, -1, 3)).squeeze(0)
    wanted = theirs[:, 2] + (theirs[:, 0] - highest)
    return wanted, total, (top - highest.unsqueeze(-1)).exp() / total


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, num_chunks: int = 8, group: Any = None) -> Tensor:
    """Mean cross-entropy of `hidden @ weight.T + bias` against `targets`, without ever holding all logits.

    Shapes: hidden [T, H], weight [V/t, H], bias [V/t], targets [T] (-100: no part in the loss); returns a scalar in fp32.
    The gradients are computed with the loss, so no product is done twice: 3 * 2*T*H*V FLOPs in all.
    Args:
        group: ranks over which the classes are split (tensor parallelism); the gradient of `hidden` is then this rank's share.
    """
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, num_chunks, group, wants_grad)  # type: ignore[no-any-return, no-untyped-call]
