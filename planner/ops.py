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
from typing import Literal

import numpy as np

from planner.loss_op import loss_chunks
from planner.op_cost import Array, Numerics, OpCost, Producer, Region, Shard

__all__ = ["Elementwise", "Embedding", "GroupedLinear", "Linear", "Norm"]


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
    is_chunked: bool = False
    """Runs in eight chunks of its rows where the loss is chunked (the head)."""
    shares_input: bool = False
    """With an op before it: their gradients are added up."""
    enters_again: bool = False
    """Its input is another op's too, but what sequence parallelism gathers of it is its own."""
    is_only_added: bool = False
    """Nothing but a sum needs its result, and it is not its block's last op."""
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
        has_adapter = self.is_adapted and numerics.has_adapter(self.name)
        adapter = numerics.lora_rank * (inner + outer) if has_adapter else 0.0
        adapter_flops = 2.0 * rows * adapter
        saved: dict[Producer, Array] = {}
        is_own_copy = has_adapter and numerics.lora_has_dropout and self.split == "row"
        is_embedding = self.category == "embedding"
        kept_bytes = 0.0 if is_frozen and is_embedding else numerics.input_bytes(is_frozen=is_frozen, has_adapter=has_adapter)
        if kept_bytes and (self.saves_input is not None or is_own_copy):
            # With sequence parallelism a column-split layer keeps only its slice of the input, unless told otherwise.
            is_gathered = self.split != "column" or numerics.saves_gathered_input
            kept_rows = rows if is_gathered else shard.local_tokens * self.token_fraction
            saved[self.saves_input or "matmul"] = kept_rows * inner * kept_bytes
        if self.enters_again and numerics.saves_gathered_input and kept_bytes:
            saved["norm"] = rows * inner * kept_bytes * (np.asarray(shard.sequence_parallel) & (np.asarray(t) > 1))
        b = numerics.compute_bytes
        # What was kept as a slice is gathered once more for the weight gradient.
        is_again = self.split == "column" and not numerics.saves_gathered_input and numerics.lora_rank == 0
        workspace: Array = np.where(shard.sequence_parallel, is_again * rows * inner * b, 0.0) + 0.0 * weight
        trained = 0.0 if is_frozen or self.is_tied else weight
        num_chunks: Array = 1
        if self.is_chunked and numerics.loss_kernel == "chunked":
            num_chunks = loss_chunks(rows)
            # Both gradients are made with the loss: that of the weight in fp32, to which every chunk's product is added.
            saved = {"logits": rows * inner * b + weight * 4.0 * (not is_frozen)}
            workspace = rows / num_chunks * outer * b + weight * b * (not is_frozen) if b < 4 else workspace
        return OpCost(
            self,
            matrix_params=adapter + (0.0 if is_embedding else trained),
            embedding_params=trained if is_embedding else 0.0,
            vector_params=0.0 if is_frozen else bias,
            tied_params=weight if self.is_tied else 0.0,
            frozen_params=(0.0 if self.is_tied else weight) + bias if is_frozen else 0.0,
            frozen_matrix_params=weight if is_frozen and not is_embedding else 0.0,
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
            workspace_bytes=workspace,
            output_bytes=shard.local_tokens * outer * b if self.is_only_added else 0.0,
            grad_output_bytes=rows * outer * b,
            grad_input_bytes=rows * inner * b,
            gemm=(rows / num_chunks, outer, inner),
            num_gemms=num_chunks,
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
    shares_input: bool = False
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
        is_frozen, has_adapter = numerics.lora_rank > 0, numerics.has_adapter(self.name)
        adapter = num_local * numerics.lora_rank * (inner + outer) if has_adapter else 0.0
        adapter_flops = 2.0 * rows * numerics.lora_rank * (inner + outer) * has_adapter
        b = numerics.compute_bytes
        saved: dict[Producer, Array] = {}
        if self.saves_input is not None:
            saved[self.saves_input] = rows * inner * numerics.input_bytes(is_frozen=is_frozen, has_adapter=has_adapter)
        taken, made = rows * outer * b, rows * inner * b
        if numerics.loops_experts:
            # The gradient of all results stays until the last expert is done; those of the inputs are pieces until then.
            is_down = self.split == "row"
            taken, made = (0.0 * taken, made / num_local) if is_down else (taken / num_local + (not self.shares_input) * made, made)
        return OpCost(
            self,
            matrix_params=adapter if is_frozen else weight,
            vector_params=0.0 if is_frozen else bias,
            frozen_params=weight + bias if is_frozen else 0.0,
            frozen_matrix_params=weight if is_frozen else 0.0,
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
            grad_output_bytes=taken,
            grad_input_bytes=made,
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
    kernel RMSNorm runs as five elementwise kernels, about three times the traffic, and keeps a copy of its input in fp32 and
    the normed tensor before the weight (HF's eager modules). Left out: mean and rstd (4 bytes a row each).
    """

    name: str
    width: int
    num_rows_per_token: float = 1.0
    bias: bool = False
    weight: bool = True
    weight_width: int | None = None
    """Elements of the weight, where they differ from `width`."""
    is_rms: bool = True
    """LayerNorm is one kernel in every stack."""
    region: Region = "local"
    saves_input: Producer | None = "residual"
    kind: str = field(default="memory", init=False)
    is_expert: bool = field(default=False, init=False)

    def cost(self, shard: Shard, numerics: Numerics) -> OpCost:
        """See `Op.cost`."""
        elements = shard.region_tokens(self.region) / shard.region_split(self.region) * self.num_rows_per_token * self.width
        is_fused = numerics.fused_norm or not self.is_rms
        moved = elements * numerics.compute_bytes * (1 if is_fused else 3)
        params = float((self.weight_width or self.width) * (self.weight + self.bias))
        is_frozen = numerics.lora_rank > 0
        saved: dict[Producer, Array] = {self.saves_input: elements * numerics.compute_bytes} if self.saves_input else {}
        if not is_fused:
            saved = {self.saves_input or "norm": elements * (4.0 + (0.0 if is_frozen else numerics.compute_bytes))}
        return OpCost(
            self,
            vector_params=0.0 if is_frozen else params,
            frozen_params=params if is_frozen else 0.0,
            active_params=params,
            forward_bytes=2.0 * moved,
            backward_bytes=3.0 * moved,
            saved=saved,
            grad_output_bytes=elements * numerics.compute_bytes,
            grad_input_bytes=elements * numerics.compute_bytes,
            num_kernels=1 if is_fused else 5,
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
    num_between: float = 0.0
    """Features per token between the two kernels that this is where the stack does not fuse activations (silu of the gate)."""
    tokens_scale: float = 1.0
    num_experts: int = 0
    """Of an op between experts' matmuls."""
    is_residual: bool = False
    """x + f(x): its gradient goes on to both as it is."""
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
        at_once = b * rows / (self.num_experts / shard.ep if self.num_experts and numerics.loops_experts else 1)
        kept_bytes = numerics.activation_input_bytes or b if self.name.endswith("activation") else b
        between = 0.0 if numerics.fused_activation else self.num_between
        saved: dict[Producer, Array] = {}
        for producer, width in self.saves:
            saved[producer] = saved.get(producer, 0.0) + rows * width * kept_bytes
        for producer, num_bytes in self.saves_bytes:
            saved[producer] = saved.get(producer, 0.0) + rows * num_bytes
        if between:
            saved["activation"] = saved.get("activation", 0.0) + rows * between * b
        is_frozen = numerics.lora_rank > 0
        return OpCost(
            self,
            vector_params=0.0 if is_frozen else float(self.params),
            frozen_params=float(self.params) if is_frozen else 0.0,
            active_params=float(self.params),
            forward_bytes=b * rows * (self.reads + self.writes + 2 * between),
            backward_bytes=b * rows * (self.writes + 2 * self.reads + 3 * between),
            saved=saved,
            grad_output_bytes=0.0 if self.is_residual else at_once * self.writes,
            grad_input_bytes=0.0 if self.is_residual else at_once * self.reads,
            num_kernels=2 if between else 1,
        )
