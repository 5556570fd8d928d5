"""What an op costs and what it is told: `OpCost`, and the `Shard` and `Numerics` from which it follows.

Letters, as in docs/concepts.md: T tokens of the microbatch on this device, t tensor-parallel degree. Every number may be an
array of one shape [n]; costs broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

__all__ = ["Array", "Numerics", "Op", "OpCost", "Producer", "Region", "Shard", "Transfer"]

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
    loss_kernel: Literal["fused", "compiled", "vocab_parallel", "unfused", "chunked"] = "unfused"
    fused_activation: bool = True
    fused_norm: bool = True
    activation_input_bytes: float = 0.0
    """Bytes per element of what an activation function keeps of its input; 0: the compute format."""
    saves_gathered_input: bool = False
    """Keep the all-gathered input of sequence parallelism, instead of gathering it again in the backward pass."""
    writes_masks: bool = False
    """Attention is told by a tensor which keys a query sees, wherever a plain causal kernel would not know: windows, gathered keys."""
    gathers_keys: bool = False
    """Context parallelism gathers keys and values of the whole sequence (arXiv:2407.21783, 3.3.2), instead of passing them around a ring."""
    copies_gathered: bool = False
    """Sequence parallelism's gathers and scatters need a copy in another order of dims, unless there is one sequence."""
    loops_experts: bool = False
    """One expert after the other, not all in one kernel: activations' gradients live for one of them at a time."""
    repeats_keys: bool = False
    """Keys and values are repeated for every query head before attention's kernel, and kept so."""
    keeps_fused_projection: bool = False
    """Attention keeps queries and keys before rotation beside the rotated ones, as parts of the tensor that holds the values."""
    lora_rank: int = 0
    """0: every weight is trained."""
    lora_targets: Literal["all", "attention", "query_value"] = "all"
    """Which linear layers of the blocks have adapters."""
    keeps_frozen_inputs: bool = False
    """Frozen matmuls keep their input all the same (bitsandbytes' 4-bit ones do, whose autograd function asks for the input's gradient alone)."""
    lora_has_dropout: bool = False
    """Adapters see their input through dropout: they keep what is left of it, and a mask."""
    expert_imbalance: float = 1.0
    """Tokens of the busiest expert-parallel rank over the mean."""

    def has_adapter(self, name: str) -> bool:
        """Whether LoRA puts an adapter on the linear layer of that name.

        Example:
            >>> Numerics(lora_rank=8, lora_targets="query_value").has_adapter("attention.k")
            False
        """
        is_target = {"all": True, "attention": "attention" in name, "query_value": name.endswith((".q", ".v"))}
        return self.lora_rank > 0 and is_target[self.lora_targets]

    def input_bytes(self, *, is_frozen: bool, has_adapter: bool) -> float:
        """Bytes per element that a linear layer keeps of its input.

        A frozen weight has no gradient that would need it; its adapter has: the input itself, or after dropout a copy and a byte of mask.
        """
        if not is_frozen:
            return self.saved_matmul_bytes
        kept = self.compute_bytes if self.keeps_frozen_inputs else 0.0
        if has_adapter and self.lora_has_dropout:
            return kept + self.compute_bytes + 1
        return max(kept, self.compute_bytes) if has_adapter else kept


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind per microbatch. `num_bytes`: their full buffers (gathered, to be reduced, exchanged) per device."""

    collective: Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "ring"]
    axis: Literal["tp", "cp", "ep"]
    phase: Literal["forward", "backward"]
    num_bytes: Array
    num_calls: Array = 1
    """Equal messages that carry them."""


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
    frozen_matrix_params: Array = 0.0
    """Those of them that are matrices of blocks, which may be stored in a narrow format."""
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
    output_bytes: Array = 0.0
    """Of a matmul whose result is only added to others: kept by a selective recompute that keeps what matmuls made, and by nothing else."""
    mask_bytes: Array = 0.0
    """What all layers with the same mask hold once."""
    grad_output_bytes: Array = 0.0
    """Gradient that its backward pass takes."""
    grad_input_bytes: Array = 0.0
    """Gradient that it makes of it; 0 where it hands on what it took."""
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
