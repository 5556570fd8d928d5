"""Attention: multi-head, grouped-query and latent, causal or not, windowed, over tensor- and context-parallel ranks."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from planner.model_spec import Mla, ModelSpec
from reftrain.axes import SINGLE, Axes, gather_sequence
from reftrain.config import ModelDetails
from reftrain.kernels import rotate
from reftrain.layers import Linear, make_norm

__all__ = ["Attention", "LatentAttention", "Positions", "cp_positions"]

ROWS = 128
"""Of a mask, made at once."""


def cp_positions(seq_len: int, cp: int, rank: int) -> Tensor:
    """Positions of one context-parallel rank: slice r and slice 2*cp-1-r of 2*cp, so that causal work is even.

    Example:
        >>> cp_positions(8, 2, 0).tolist()
        [0, 1, 6, 7]
    """
    slices = torch.arange(seq_len).tensor_split(2 * cp)
    return torch.cat([slices[rank], slices[2 * cp - 1 - rank]])


class Positions(nn.Module):
    """What attention needs to know of positions: rotary tables and the order of gathered keys. Shared by all layers.

    Holds no parameters; `place` sets it up for one sequence length and one context-parallel rank.
    """

    def __init__(self, spec: ModelSpec, details: ModelDetails) -> None:
        super().__init__()
        self.head_dim = spec.mla.qk_rope_head_dim if spec.mla else spec.head_dim
        self.is_rotary, self.details = spec.position == "rope", details
        self.axes = SINGLE
        self.seq_len = 0
        self.documents: Tensor | None = None

    def place(self, seq_len: int, device: torch.device, dtype: torch.dtype, axes: Axes = SINGLE) -> None:
        """Tables for sequences of `seq_len` tokens, of which this rank holds its context-parallel slices."""
        self.axes, self.seq_len, self.dtype = axes, seq_len, dtype
        cp, rank = (1, 0) if axes.cp_mesh is None else (axes.cp_mesh.size(), axes.cp_mesh.get_local_rank())
        mine = cp_positions(seq_len, cp, rank)
        self.positions = mine.to(device)
        self.key_positions = torch.cat([cp_positions(seq_len, cp, r) for r in range(cp)]).to(device)
        if self.is_rotary:
            angles = torch.outer(mine.double(), self.details.inverse_frequencies(self.head_dim)).unsqueeze(1)
            self.cos, self.sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
        self._masks: dict[int, Tensor] = {}

    def within(self, documents: Tensor) -> Positions:
        """The same where sequences hold several documents, numbered [B, S]: none sees another, and each counts its positions from 0.

        Rotary angles stay as they are: attention sees their differences alone.
        """
        found, index = copy(self), torch.arange(documents.shape[1], device=documents.device)
        begins = torch.ones_like(documents, dtype=torch.bool)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        found.documents, found._masks = documents, {}
        found.positions = index - torch.where(begins, index, 0).cummax(dim=1).values
        return found

    def rotate(self, x: Tensor) -> Tensor:
        """Turns [B, S, heads, D] by the positions' angles."""
        return rotate(x, self.cos, self.sin)

    def mask(self, window: int, is_causal: bool) -> Tensor | None:
        """What is added to the scores, [S/cp, S] or with documents [B, 1, S, S]: 0 where a query of this rank sees the key, else -inf.

        None where is_causal says it.

        In the format of the scores: torch would make and keep such a tensor of one of yes and no in every layer.
        """
        is_windowed = 0 < window < self.seq_len
        if not is_windowed and self.documents is None and (self.axes.cp_mesh is None or not is_causal):
            return None
        if window not in self._masks:
            mask = self._make_mask(window if is_windowed else self.seq_len, is_causal)
            self._masks[window] = mask if self.documents is None else _parted(mask, self.documents)
        return self._masks[window]

    def _make_mask(self, window: int, is_causal: bool) -> Tensor:
        """Row by row of a few: distances are eight bytes where the mask has two."""
        queries = self.positions if self.documents is None else self.key_positions  # documents and cp do not go together
        mask = torch.zeros(len(queries), len(self.key_positions), dtype=self.dtype, device=queries.device)
        for start in range(0, len(mask), ROWS):
            distance = queries[start : start + ROWS].unsqueeze(1) - self.key_positions
            mask[start : start + ROWS].masked_fill_((distance >= window) | (distance < (0 if is_causal else 1 - window)), -torch.inf)
        return mask


def _parted(mask: Tensor, documents: Tensor) -> Tensor:
    """A mask [S, S] without sight of other documents, [B, 1, S, S]."""
    is_other = documents.unsqueeze(2) != documents.unsqueeze(1)
    return mask.expand(len(documents), -1, -1).masked_fill(is_other, -torch.inf).unsqueeze(1)


class _Core(nn.Module):
    """softmax(Q K^T) V; keys and values of the whole sequence are gathered over context-parallel ranks (arXiv:2407.21783, 3.3.2)."""

    axes: Axes = SINGLE

    def __init__(self, spec: ModelSpec, window: int, is_unfused: bool) -> None:
        super().__init__()
        self.is_causal, self.window, self.dropout = spec.is_causal, window, spec.attention_dropout
        self.is_unfused = is_unfused

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
        """Shapes: q, k, v [B, S/cp, heads, D]; returns [B, S/cp, heads * Dv]."""
        if self.axes.cp_group is not None:
            k, v = gather_sequence(k, self.axes.cp_group), gather_sequence(v, self.axes.cp_group)
        mask = positions.mask(self.window, self.is_causal)
        heads, kv_heads = q.shape[2], k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        is_causal = self.is_causal and mask is None
        dropout = self.dropout if self.training else 0.0
        if self.is_unfused:
            with sdpa_kernel(SDPBackend.MATH):
                out = functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, enable_gqa=heads != kv_heads)
        else:
            out = functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, enable_gqa=heads != kv_heads)
        return out.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head, multi-query or grouped-query attention with optional QK-norm.

    Shapes: x [B, S, H] -> [B, S, H]; inside, each tensor-parallel rank has heads/t of the heads.
    """

    axes: Axes = SINGLE

    def __init__(self, spec: ModelSpec, details: ModelDetails, layer: int, is_unfused: bool = False) -> None:
        super().__init__()
        h, d, heads, kv_heads = spec.hidden_size, spec.head_dim, spec.num_attention_heads, spec.num_key_value_heads
        self.head_dim = d
        self.q = Linear(h, heads * d, spec.qkv_bias)
        self.k = Linear(h, kv_heads * d, spec.qkv_bias)
        self.v = Linear(h, kv_heads * d, spec.qkv_bias)
        self.out = Linear(heads * d, h, spec.attention_out_bias)
        self.norm_over = spec.qk_norm
        if spec.qk_norm != "none":
            widths = (d, d) if spec.qk_norm == "head" else (heads * d, kv_heads * d)
            self.q_norm, self.k_norm = (make_norm(spec, details, width, bias=False) for width in widths)
        self.core = _Core(spec, spec.window_at(layer), is_unfused)

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """Attention of x to itself, before the residual is added."""
        x = self.axes.enter(x)
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.norm_over == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))
        if self.norm_over == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if positions.is_rotary:
            q, k = positions.rotate(q), positions.rotate(k)
        return self.out(self.core(q, k, v, positions))  # type: ignore[no-any-return]


class LatentAttention(nn.Module):
    """Multi-head latent attention: low-rank queries and keys-values, expanded per head (arXiv:2405.04434, section 2.1).

    Shapes: x [B, S, H] -> [B, S, H].
    """

    axes: Axes = SINGLE

    def __init__(self, spec: ModelSpec, details: ModelDetails, mla: Mla, is_unfused: bool = False) -> None:
        super().__init__()
        h, heads = spec.hidden_size, spec.num_attention_heads
        self.nope, self.rope, self.value = mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim
        self.latent = mla.kv_lora_rank
        qk = self.nope + self.rope
        if mla.q_lora_rank:
            self.q_down = Linear(h, mla.q_lora_rank, spec.qkv_bias)
            self.q_norm = make_norm(spec, details, mla.q_lora_rank)
            self.q_up = Linear(mla.q_lora_rank, heads * qk)
        else:
            self.q = Linear(h, heads * qk)
        self.has_low_rank_queries = mla.q_lora_rank > 0
        self.kv_down = Linear(h, mla.kv_lora_rank + mla.qk_rope_head_dim, spec.qkv_bias)
        self.kv_norm = make_norm(spec, details, mla.kv_lora_rank)
        self.kv_up = Linear(mla.kv_lora_rank, heads * (mla.qk_nope_head_dim + mla.v_head_dim))
        self.out = Linear(heads * mla.v_head_dim, h, spec.attention_out_bias)
        self.core = _Core(spec, 0, is_unfused)

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """Attention of x to itself, before the residual is added."""
        enter = self.axes.enter
        q = self.q_up(enter(self.q_norm(self.q_down(x)))) if self.has_low_rank_queries else self.q(enter(x))
        q = q.unflatten(-1, (-1, self.nope + self.rope))
        latent, shared_key = self.kv_down(x).split([self.latent, self.rope], dim=-1)
        expanded = self.kv_up(enter(self.kv_norm(latent.contiguous()))).unflatten(-1, (-1, self.nope + self.value))
        key, value = expanded.split([self.nope, self.value], dim=-1)
        turned_key = positions.rotate(enter(shared_key).unsqueeze(2)).expand(-1, -1, q.shape[2], -1)
        q = torch.cat([q[..., : self.nope], positions.rotate(q[..., self.nope :])], dim=-1)
        k = torch.cat([key, turned_key], dim=-1)
        # A slice would keep the keys' half alive with it.
        return self.out(self.core(q, k, value.contiguous(), positions))  # type: ignore[no-any-return]
