"""Attention as one op: softmax(Q K^T) V between the projections, flash or unfused, causal, windowed, over a ring.

Letters as in docs/concepts.md: S tokens per sequence, A heads, D head width, t and c tensor- and context-parallel degrees.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from planner.op_cost import Array, Numerics, OpCost, Producer, Shard, Transfer

__all__ = ["Attention"]


@dataclass(frozen=True, kw_only=True)
class Attention:
    """softmax(Q K^T) V over the heads of one device; the projections are ops of their own.

    Shapes: Q [A/t, S/cp, D], K and V [max(Akv/t, 1), S, D], out [A/t, S/cp, Dv] per sequence.
    Formula: forward 2*S*S*(D + Dv)*A per sequence over all pairs; backward twice that, and flash computes the scores
    (2*S*S*D*A) once more. A flash kernel skips masked blocks: causal does half, a window w at most S*w - w*w/2 of the
    S*S/2 pairs. The unfused kernel computes and stores all pairs: per head and pair the softmax output (compute format)
    and, with dropout, a mask byte and the dropped output (arXiv:2205.05198 eq. 1: 5*a*s*s*b). Left out: softmax FLOPs,
    under 1% at D = 128.
    """

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    is_causal: bool = True
    window: int = 0
    has_dropout: bool = False
    num_sinks: int = 0
    num_bias_params: int = 0
    """Relative position tables that live here (T5)."""
    saves_qkv: bool = True
    joined_key_dim: int = 0
    """Of each key, what all heads share and is joined to them (latent attention)."""
    has_normed_keys: bool = False
    """Queries and keys come from norms of their own, not from matmuls."""
    kind: str = field(default="attention", init=False)
    is_expert: bool = field(default=False, init=False)

    def pairs_fraction(self, seq_len: int) -> float:
        """Share of the S*S pairs that the mask leaves."""
        if self.window and self.window < seq_len:
            width = self.window / seq_len
            return width - width * width / 2 if self.is_causal else min(2 * width - width * width, 1.0)
        return 0.5 if self.is_causal else 1.0

    def cost(self, shard: Shard, numerics: Numerics) -> OpCost:
        """See `Op.cost`."""
        s, b = shard.seq_len, numerics.compute_bytes
        heads = self.num_heads / shard.tp
        kv_heads = np.maximum(self.num_kv_heads / shard.tp, 1)
        all_pairs = shard.tokens * s * heads
        full = 2.0 * all_pairs * (self.head_dim + self.v_head_dim)
        scores = 2.0 * all_pairs * self.head_dim
        is_flash = numerics.attention_kernel == "flash"
        done = self.pairs_fraction(s) if is_flash else 1.0
        q, k, v, out = (
            shard.tokens * w for w in (heads * self.head_dim, kv_heads * self.head_dim, kv_heads * self.v_head_dim, heads * self.v_head_dim)
        )
        width = shard.cp if numerics.gathers_keys else 1
        saved: dict[Producer, Array] = {}
        if self.saves_qkv:
            held = (k + v) * (np.maximum(self.num_heads / self.num_kv_heads, 1) if numerics.repeats_keys else 1)
            before = q + k if numerics.keeps_fused_projection else 0.0
            # Selective recompute norms queries and keys again, and gathers again what was gathered.
            normed = q + k if self.has_normed_keys else shard.tokens * heads * self.joined_key_dim
            saved = {"matmul": (q + held + before - normed) * b, "norm": (normed + held * (width - 1)) * b}
        saved["attention"] = out * b
        if is_flash:
            saved["attention"] = saved["attention"] + 4.0 * shard.tokens * heads
            forward_bytes, backward_bytes = b * (q + k + v + out), b * (2 * (q + k + v) + 2 * out)
            workspace = 0.0 * out
        else:
            matrix = all_pairs * b
            saved["scores"] = matrix * (2 if self.has_dropout else 1) + (all_pairs if self.has_dropout else 0)
            # scores written and read by the softmax, its output read by the second product; dropout reads and writes again
            forward_bytes = b * (q + k + v + out) + matrix * (6 if self.has_dropout else 4)
            backward_bytes = 2 * b * (q + k + v + out) + matrix * (8 if self.has_dropout else 6)
            workspace = 2 * matrix
        params = float(self.num_sinks + self.num_bias_params)
        is_frozen = numerics.lora_rank > 0
        return OpCost(
            self,
            vector_params=0.0 if is_frozen else params,
            frozen_params=params if is_frozen else 0.0,
            active_params=params,
            model_forward_flops=full,
            causal_forward_flops=full * self.pairs_fraction(s),
            forward_flops=full * done,
            backward_input_flops=(2.0 * full + (scores if is_flash else 0.0)) * done,
            forward_bytes=forward_bytes,
            backward_bytes=backward_bytes,
            saved=saved,
            workspace_bytes=workspace,
            mask_bytes=self._mask_bytes(shard, numerics),
            grad_output_bytes=out * b,
            grad_input_bytes=b * (q + (k + v) * width),
            num_kernels=1 if is_flash else 5,
            transfers=self._exchange(shard, numerics, k + v),
        )

    def _mask_bytes(self, shard: Shard, numerics: Numerics) -> Array:
        """S/cp rows of S, in compute format."""
        is_windowed = 0 < self.window < shard.seq_len
        is_needed = is_windowed | ((np.asarray(shard.cp) > 1) & self.is_causal)
        return np.where(is_needed & numerics.writes_masks, shard.seq_len / shard.cp * shard.seq_len * numerics.compute_bytes, 0.0)

    def _exchange(self, shard: Shard, numerics: Numerics, kv_elements: Array) -> tuple[Transfer, ...]:
        """Context parallelism passes keys and values around the ring, and backward them and their gradients; or gathers and scatters them."""
        full = kv_elements * numerics.compute_bytes * np.asarray(shard.cp) * (np.asarray(shard.cp) > 1)
        if numerics.gathers_keys:
            return (Transfer("all_gather", "cp", "forward", full, 2), Transfer("reduce_scatter", "cp", "backward", full, 2))
        return (Transfer("ring", "cp", "forward", full), Transfer("ring", "cp", "backward", 2.0 * full))
