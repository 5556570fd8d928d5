"""The op vocabulary: what one op of one layer costs on one device, for one microbatch.

In: sizes of the op, a `Shard` (what of the batch this device sees) and `Numerics` (formats and kernels).
Out: an `OpCost`. Parameters, FLOPs, memory and time of everything downstream are sums over these records; there is no
second formula for any of them.

Letters, as in docs/concepts.md: T tokens of the microbatch on this device, H hidden size, F feed-forward width,
A heads, D head width, V vocabulary, t tensor-parallel degree. Arrays: every field of `Shard` may be a number or a
numpy array; costs broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

__all__ = [
    "Attention", "Collective", "Elementwise", "Embedding", "GroupedLinear", "Linear", "Loss", "Norm", "Numerics", "Op",
    "OpCost", "Shard", "Transfer",
]  # fmt: skip

Array = Any
"""A number or a numpy array of them."""
Region = Literal["tp", "local"]
"""`tp`: between the two tensor-parallel collectives, every rank sees all T tokens and 1/t of the features. `local`:
outside; every feature, and with sequence parallelism T/t tokens."""
Producer = Literal["residual", "norm", "matmul", "activation", "attention", "scores", "dropout", "dispatch", "logits"]
"""What made a saved tensor. Selective recompute drops the tensors of some producers."""


@dataclass(frozen=True)
class Shard:
    """What one device sees of one microbatch. Numbers or arrays of one shape [n]."""

    micro_batch_size: Array
    seq_len: int
    tp: Array = 1
    cp: Array = 1
    ep: Array = 1
    sequence_parallel: Array = False

    @property
    def tokens(self) -> Array:
        """T: tokens per microbatch inside the tensor-parallel region."""
        return self.micro_batch_size * (self.seq_len / self.cp)

    @property
    def local_tokens(self) -> Array:
        """Tokens per microbatch outside it: T, or T/t with sequence parallelism."""
        return self.tokens / np.where(self.sequence_parallel, self.tp, 1)

    @property
    def expert_tp(self) -> Array:
        """Tensor-parallel degree of the experts: t while every device holds all of them, else 1 (whole experts)."""
        return np.where(np.asarray(self.ep) > 1, 1, self.tp)

    def region_tokens(self, region: Region) -> Array:
        """Tokens that a device sees in `region`."""
        return self.tokens if region == "tp" else self.local_tokens

    def region_split(self, region: Region) -> Array:
        """By how much the features are split in `region`."""
        return self.tp if region == "tp" else 1


@dataclass(frozen=True)
class Numerics:
    """Formats and kernels of a run: the part of a software stack that changes what is computed and kept."""

    compute_bytes: float = 2
    saved_matmul_bytes: float = 2
    attention_kernel: Literal["flash", "unfused"] = "flash"
    loss_kernel: Literal["fused", "unfused", "chunked"] = "unfused"
    fused_activation: bool = True
    fused_norm: bool = True
    saves_gathered_input: bool = False
    """Keep the all-gathered input of sequence parallelism, instead of gathering it again in the backward pass."""
    lora_rank: int = 0
    """0: every weight is trained."""
    expert_imbalance: float = 1.0
    """Tokens of the busiest expert-parallel rank over the mean."""


@dataclass(frozen=True)
class Transfer:
    """One collective per microbatch. `num_bytes`: the full buffer (gathered, or to be reduced, or exchanged) per device."""

    collective: Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "ring"]
    axis: Literal["tp", "cp", "ep"]
    phase: Literal["forward", "backward"]
    num_bytes: Array


@dataclass(frozen=True)
class OpCost:
    """Cost of one op on one device for one microbatch; every field a number or an array.

    Parameters are those held by this device before ZeRO shards them. FLOPs count a multiply-add as two and are executed
    ones: flash attention skips what a causal mask hides and computes the scores again in the backward pass.
    `model_forward_flops` (attention over all pairs) and `causal_forward_flops` (half of them) are the two conventions for
    model FLOPs; backward is twice forward in both. Bytes are what device memory must move.
    """

    op: Op
    matrix_params: Array = 0.0
    embedding_params: Array = 0.0
    vector_params: Array = 0.0
    tied_params: Array = 0.0
    """Shared with the embedding; a copy exists only where the pipeline parts them."""
    frozen_params: Array = 0.0
    factored_elements: Array = 0.0
    """Rows plus columns of the trained matrices: the state of Adafactor."""
    active_params: Array = 0.0
    """Parameters that one token meets."""
    model_forward_flops: Array = 0.0
    causal_forward_flops: Array = 0.0
    forward_flops: Array = 0.0
    backward_input_flops: Array = 0.0
    backward_weight_flops: Array = 0.0
    forward_bytes: Array = 0.0
    backward_bytes: Array = 0.0
    saved: dict[Producer, Array] = field(default_factory=dict)
    """Bytes kept for the backward pass, by what made them."""
    workspace_bytes: Array = 0.0
    """Alive only while the op runs."""
    gemm: tuple[Array, Array, Array] | None = None
    """(m, n, k) of the forward matmul."""
    num_gemms: Array = 1
    """How many such matmuls run as one kernel: the experts of this device."""
    num_kernels: float = 1
    transfers: tuple[Transfer, ...] = ()

    @property
    def params(self) -> Array:
        """All parameters on this device, trained or not."""
        return self.matrix_params + self.embedding_params + self.vector_params + self.frozen_params

    @property
    def saved_bytes(self) -> Array:
        """All bytes kept for the backward pass."""
        return sum(self.saved.values()) if self.saved else 0.0


class Op(Protocol):
    """One op of a layer. `kind` picks its efficiency curve; `is_expert` its data-parallel group."""

    @property
    def name(self) -> str:
        """Unique within its block."""
        ...

    @property
    def kind(self) -> str:
        """matmul, grouped_matmul, attention, memory or collective."""
        ...

    @property
    def is_expert(self) -> bool:
        """Whether its parameters belong to routed experts."""
        ...

    def cost(self, shard: Shard, numerics: Numerics) -> OpCost:
        """Cost on one device for one microbatch."""
        ...


@dataclass(frozen=True, kw_only=True)
class Linear:
    """y = x W + b.

    Shapes: x [T, in], W [in, out] split by columns or rows over t, y [T, out].
    Formula: forward 2*T*in*out/t; backward the same for dx and again for dW.
    """

    name: str
    in_features: int
    out_features: int
    bias: bool = False
    split: Literal["column", "row", "none"] = "column"
    saves_input: Producer | None = "norm"
    """What made the input; None where another op keeps the same tensor."""
    min_out: int = 0
    """Column split stops at this width (one key-value head); smaller shares are copies."""
    is_tied: bool = False
    has_trained_weight: bool = True
    is_adapted: bool = True
    """Whether LoRA puts an adapter here; where it does not, the weight is frozen."""
    token_fraction: float = 1.0
    category: Literal["matrix", "embedding"] = "matrix"
    kind: str = field(default="matmul", init=False)
    is_expert: bool = field(default=False, init=False)

    def cost(self, shard: Shard, numerics: Numerics) -> OpCost:
        """See `Op.cost`."""
        t = shard.tp
        rows = (shard.local_tokens if self.split == "none" else shard.tokens) * self.token_fraction
        inner = self.in_features / t if self.split == "row" else self.in_features
        outer = np.maximum(self.out_features / t, self.min_out) if self.split == "column" else self.out_features
        weight = inner * outer
        bias = (outer if self.bias else 0) + 0.0 * weight
        flops = 2.0 * rows * weight
        is_frozen = numerics.lora_rank > 0
        adapter = numerics.lora_rank * (inner + outer) if is_frozen and self.is_adapted else 0.0
        adapter_flops = 2.0 * rows * adapter
        saved: dict[Producer, Array] = {}
        if self.saves_input is not None:
            # With sequence parallelism a column-split layer keeps only its slice of the input, unless told otherwise.
            is_gathered = self.split != "column" or numerics.saves_gathered_input
            kept_rows = rows if is_gathered else shard.local_tokens * self.token_fraction
            saved[self.saves_input] = kept_rows * inner * numerics.saved_matmul_bytes
        b = numerics.compute_bytes
        trained = 0.0 if is_frozen or self.is_tied else weight
        is_embedding = self.category == "embedding"
        return OpCost(
            self,
            matrix_params=adapter + (0.0 if is_embedding else trained),
            embedding_params=trained if is_embedding else 0.0,
            vector_params=0.0 if is_frozen else bias,
            tied_params=weight if self.is_tied else 0.0,
            frozen_params=(0.0 if self.is_tied else weight) + bias if is_frozen else 0.0,
            factored_elements=0.0 if is_frozen or is_embedding else inner + outer,
            active_params=weight + bias,
            model_forward_flops=flops + adapter_flops,
            causal_forward_flops=flops + adapter_flops,
            forward_flops=flops + adapter_flops,
            backward_input_flops=flops + adapter_flops,
            backward_weight_flops=adapter_flops if is_frozen else flops,
            forward_bytes=b * (rows * inner + weight + rows * outer),
            backward_bytes=b * (rows * outer + weight + rows * inner) + b * (rows * inner + rows * outer + weight),
            saved=saved,
            gemm=(rows, outer, inner),
        )


@dataclass(frozen=True, kw_only=True)
class GroupedLinear:
    """All experts' linear layers of one device at once.

    Shapes: x [T*k, in] sorted by expert, W [E/ep, in, out], y [T*k, out]; k experts per token, routed evenly up to
    `Numerics.expert_imbalance`. Every rank gets as many rows as it sends, so its rows do not depend on ep.
    """

    name: str
    in_features: int
    out_features: int
    num_experts: int
    num_experts_per_token: int
    bias: bool = False
    split: Literal["column", "row"] = "column"
    saves_input: Producer | None = "dispatch"
    kind: str = field(default="grouped_matmul", init=False)
    is_expert: bool = field(default=True, init=False)

    def cost(self, shard: Shard, numerics: Numerics) -> OpCost:
        """See `Op.cost`."""
        t = shard.expert_tp
        tokens: Array = np.where(np.asarray(shard.ep) > 1, shard.local_tokens, shard.tokens)
        rows = tokens * self.num_experts_per_token * numerics.expert_imbalance
        even_rows = tokens * self.num_experts_per_token
        num_local = self.num_experts / shard.ep
        inner = self.in_features / t if self.split == "row" else self.in_features + 0.0 * t
        outer = self.out_features / t if self.split == "column" else self.out_features + 0.0 * t
        weight = num_local * inner * outer
        bias = num_local * outer if self.bias else 0.0
        per_expert = inner * outer + (outer if self.bias else 0.0)
        flops, even_flops = 2.0 * rows * inner * outer, 2.0 * even_rows * inner * outer
        is_frozen = numerics.lora_rank > 0
        adapter = num_local * numerics.lora_rank * (inner + outer) if is_frozen else 0.0
        adapter_flops = 2.0 * rows * numerics.lora_rank * (inner + outer)
        b = numerics.compute_bytes
        saved: dict[Producer, Array] = {}
        if self.saves_input is not None:
            saved[self.saves_input] = rows * inner * numerics.saved_matmul_bytes
        return OpCost(
            self,
            matrix_params=adapter if is_frozen else weight,
            vector_params=0.0 if is_frozen else bias,
            frozen_params=weight + bias if is_frozen else 0.0,
            factored_elements=0.0 if is_frozen else num_local * (inner + outer),
            active_params=per_expert * self.num_experts_per_token,
            model_forward_flops=even_flops,
            causal_forward_flops=even_flops,
            forward_flops=flops + adapter_flops,
            backward_input_flops=flops + adapter_flops,
            backward_weight_flops=adapter_flops if is_frozen else flops,
            forward_bytes=b * (rows * inner + weight + rows * outer),
            backward_bytes=b * (2 * rows * outer + 2 * weight + 2 * rows * inner),
            saved=saved,
            gemm=(rows / num_local, outer, inner),
            num_gemms=num_local,
        )


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """Rows of a table. Keeps the indices (8 bytes a token); the backward pass scatters into the table's gradient."""

    name: str
    num_embeddings: int
    embedding_dim: int
    is_split: bool = True
    """Over the vocabulary by tp; position tables are not."""
    is_looked_up_per_token: bool = True
    kind: str = field(default="memory", init=False)
    is_expert: bool = field(default=False, init=False)

    def cost(self, shard: Shard, numerics: Numerics) -> OpCost:
        """See `Op.cost`."""
        params = self.num_embeddings / (shard.tp if self.is_split else 1) * self.embedding_dim
        rows = shard.tokens if self.is_looked_up_per_token else self.num_embeddings
        moved = rows * self.embedding_dim * numerics.compute_bytes
        is_frozen = numerics.lora_rank > 0
        return OpCost(
            self,
            embedding_params=0.0 if is_frozen else params,
            frozen_params=params if is_frozen else 0.0,
            active_params=params,
            forward_bytes=2.0 * moved,
            backward_bytes=0.0 if is_frozen else 3.0 * moved,
            saved={"residual": 8.0 * rows} if self.is_looked_up_per_token else {},
        )


@dataclass(frozen=True, kw_only=True)
class Norm:
    """LayerNorm or RMSNorm over `width` features; keeps its input, from which the backward pass starts again.

    Formula: forward reads and writes the tensor; backward reads it, the incoming gradient, and writes one. Without a fused
    kernel RMSNorm runs as five elementwise kernels, about three times the traffic. Left out: mean and rstd (4 bytes
    a row each).
    """

    name: str
    width: int
    num_rows_per_token: float = 1.0
    bias: bool = False
    weight: bool = True
    weight_width: int | None = None
    """Elements of the weight, where they differ from `width`."""
    region: Region = "local"
    saves_input: Producer | None = "residual"
    kind: str = field(default="memory", init=False)
    is_expert: bool = field(default=False, init=False)

    def cost(self, shard: Shard, numerics: Numerics) -> OpCost:
        """See `Op.cost`."""
        elements = shard.region_tokens(self.region) / shard.region_split(self.region) * self.num_rows_per_token * self.width
        moved = elements * numerics.compute_bytes * (1 if numerics.fused_norm else 3)
        params = float((self.weight_width or self.width) * (self.weight + self.bias))
        is_frozen = numerics.lora_rank > 0
        return OpCost(
            self,
            vector_params=0.0 if is_frozen else params,
            frozen_params=params if is_frozen else 0.0,
            active_params=params,
            forward_bytes=2.0 * moved,
            backward_bytes=3.0 * moved,
            saved={self.saves_input: elements * numerics.compute_bytes} if self.saves_input else {},
            num_kernels=1 if numerics.fused_norm else 5,
        )


@dataclass(frozen=True, kw_only=True)
class Elementwise:
    """Any op bound by memory traffic: activation, rotary embedding, residual sum, dropout, routing, permutation.

    `reads`, `writes`: features per token in the forward pass; the backward pass reads `writes + reads` and writes `reads`
    (`backward_reads` overrides). `saves`: features per token kept, by producer, in compute format;
    `saves_bytes`: bytes per token kept in another format (dropout masks).
    """

    name: str
    reads: float
    writes: float
    region: Region = "local"
    saves: tuple[tuple[Producer, float], ...] = ()
    saves_bytes: tuple[tuple[Producer, float], ...] = ()
    params: int = 0
    is_fused_away: bool = False
    """Runs inside a neighbour where the stack fuses activations."""
    tokens_scale: float = 1.0
    kind: str = field(default="memory", init=False)
    is_expert: bool = False

    def cost(self, shard: Shard, numerics: Numerics) -> OpCost:
        """See `Op.cost`."""
        if self.is_expert:
            routed: Array = np.where(np.asarray(shard.ep) > 1, shard.local_tokens, shard.tokens)
            tokens = routed * numerics.expert_imbalance
            rows = tokens * self.tokens_scale / (shard.expert_tp if self.region == "tp" else 1)
        else:
            rows = shard.region_tokens(self.region) * self.tokens_scale / shard.region_split(self.region)
        b = numerics.compute_bytes
        is_fused = self.is_fused_away and numerics.fused_activation
        saved: dict[Producer, Array] = {}
        for producer, width in self.saves:
            saved[producer] = saved.get(producer, 0.0) + rows * width * b
        for producer, num_bytes in self.saves_bytes:
            saved[producer] = saved.get(producer, 0.0) + rows * num_bytes
        is_frozen = numerics.lora_rank > 0
        return OpCost(
            self,
            vector_params=0.0 if is_frozen else float(self.params),
            frozen_params=float(self.params) if is_frozen else 0.0,
            active_params=float(self.params),
            forward_bytes=0.0 * rows if is_fused else b * rows * (self.reads + self.writes),
            backward_bytes=0.0 * rows if is_fused else b * rows * (self.writes + 2 * self.reads),
            saved=saved,
            num_kernels=0 if is_fused else 1,
        )


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
        saved: dict[Producer, Array] = {"matmul": (q + k + v) * b} if self.saves_qkv else {}
        saved["attention"] = out * b
        if is_flash:
            saved["attention"] = saved["attention"] + 4.0 * shard.tokens * heads
            forward_bytes, backward_bytes = b * (q + k + v + out), b * (2 * (q + k + v) + 2 * out)
            workspace = b * (q + k + v) * 1.0  # dq, dk, dv before they are projected back
        else:
            matrix = all_pairs * b
            saved["scores"] = matrix * (2 if self.has_dropout else 1) + (all_pairs if self.has_dropout else 0)
            # scores written and read by the softmax, its output read by the second product; dropout reads and writes again
            forward_bytes = b * (q + k + v + out) + matrix * (6 if self.has_dropout else 4)
            backward_bytes = 2 * b * (q + k + v + out) + matrix * (8 if self.has_dropout else 6)
            workspace = 2 * matrix
        params = float(self.num_sinks + self.num_bias_params)
        return OpCost(
            self,
            vector_params=params,
            active_params=params,
            model_forward_flops=full,
            causal_forward_flops=full * self.pairs_fraction(s),
            forward_flops=full * done,
            backward_input_flops=(2.0 * full + (scores if is_flash else 0.0)) * done,
            forward_bytes=forward_bytes,
            backward_bytes=backward_bytes,
            saved=saved,
            workspace_bytes=workspace,
            num_kernels=1 if is_flash else 5,
            transfers=self._ring(shard, numerics, k + v),
        )

    def _ring(self, shard: Shard, numerics: Numerics, kv_elements: Array) -> tuple[Transfer, ...]:
        """Context parallelism passes keys and values around the ring; backward passes them and their gradients."""
        full = kv_elements * numerics.compute_bytes * np.asarray(shard.cp)
        return (Transfer("ring", "cp", "forward", full), Transfer("ring", "cp", "backward", 2.0 * full))


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Softmax cross-entropy over the vocabulary of this device.

    Formula: bytes kept per logit: unfused 4 (fp32 probabilities) beside the logits themselves in compute format and
    fp32; fused: the logits, overwritten by their gradient; chunked: an eighth of that. `workspace_bytes` is the
    gradient while the backward pass of the head runs.
    """

    name: str
    vocab_size: int
    token_fraction: float = 1.0
    kind: str = field(default="memory", init=False)
    is_expert: bool = field(default=False, init=False)

    def cost(self, shard: Shard, numerics: Numerics) -> OpCost:
        """See `Op.cost`."""
        logits = shard.tokens * self.token_fraction * self.vocab_size / shard.tp
        b = numerics.compute_bytes
        kept, transient, moved = {
            "unfused": (b + 4.0 + 4.0, 4.0 + b, 3 * b + 24.0),
            "fused": (b, 0.0, 3 * b),
            "chunked": (b / 8, 0.0, 3 * b),
        }[numerics.loss_kernel]
        return OpCost(
            self,
            forward_bytes=logits * moved / 2,
            backward_bytes=logits * moved / 2,
            saved={"logits": logits * kept},
            workspace_bytes=logits * transient,
            num_kernels=4 if numerics.loss_kernel == "unfused" else 1,
        )


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Communication inside a layer, written as what happens in the forward pass.

    `enter`: features are about to be split (before a column-split linear): nothing or, with sequence parallelism, an
    all-gather; backward all-reduces or reduce-scatters the gradient, and gathers the input again for the weight
    gradient unless it was kept. `leave`: partial sums are added (after a row-split linear): all-reduce or
    reduce-scatter; backward nothing or an all-gather. `exchange`: tokens travel to their experts or back.
    """

    name: str
    pattern: Literal["enter", "leave", "exchange"]
    width: int
    copies_per_token: float = 1.0
    kind: str = field(default="collective", init=False)
    is_expert: bool = field(default=False, init=False)

    def cost(self, shard: Shard, numerics: Numerics) -> OpCost:
        """See `Op.cost`."""
        b = numerics.compute_bytes
        if self.pattern == "exchange":
            moved = np.where(np.asarray(shard.ep) > 1, shard.local_tokens * self.copies_per_token * self.width * b * numerics.expert_imbalance, 0.0)
            return OpCost(
                self, transfers=(Transfer("all_to_all", "ep", "forward", moved), Transfer("all_to_all", "ep", "backward", moved)), num_kernels=0
            )
        full = shard.tokens * self.width * b * (np.asarray(shard.tp) > 1)
        split: Array = full * np.asarray(shard.sequence_parallel)
        whole = full - split
        again = 0.0 if numerics.saves_gathered_input else split
        if self.pattern == "enter":
            transfers: tuple[Transfer, ...] = (
                Transfer("all_gather", "tp", "forward", split),
                Transfer("all_gather", "tp", "backward", again),
                Transfer("reduce_scatter", "tp", "backward", split),
                Transfer("all_reduce", "tp", "backward", whole),
            )
        else:
            transfers = (
                Transfer("reduce_scatter", "tp", "forward", split),
                Transfer("all_reduce", "tp", "forward", whole),
                Transfer("all_gather", "tp", "backward", split),
            )
        return OpCost(self, transfers=transfers, num_kernels=0)
