"""The loss as one op: softmax cross-entropy over a vocabulary that may be split, in the kernels that stacks have for it.

Letters, as in docs/concepts.md: T tokens of the microbatch on this device, V vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from planner.op_cost import Array, Numerics, OpCost, Shard, Transfer

__all__ = ["Loss", "loss_chunks"]

MOST_LOSS_CHUNKS, LEAST_CHUNK_ROWS = 8, 256


def loss_chunks(rows: Array) -> Array:
    """Parts in which a chunked loss computes logits and their gradient: 8, or fewer where each would have under 256 rows.

    Each part reads and adds to the gradient of the whole head, which costs more than small parts save.

    Example:
        >>> [int(loss_chunks(rows)) for rows in (100, 512, 8192)]
        [1, 2, 8]
    """
    return np.clip(np.floor_divide(rows, LEAST_CHUNK_ROWS), 1, MOST_LOSS_CHUNKS)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Softmax cross-entropy over the vocabulary of this device.

    Formula: bytes kept per logit: unfused 4 (fp32 probabilities) beside the logits themselves in compute format and
    fp32; vocab_parallel 4: probabilities that took the place of an fp32 copy and will give it to their gradient (Megatron-Core,
    VocabParallelCrossEntropy); compiled: the same beside another fp32 copy, for compiled kernels write to tensors of their own (its
    cross_entropy_loss_fusion); fused: the logits, overwritten by their gradient; chunked: none, as the head has its gradients already.
    `workspace_bytes` is the gradient while the backward pass of the head runs, or one chunk of logits in fp32 and compute format.
    Classes split over t ranks: each token's largest logit, sum of exponentials and target logit, in fp32, summed one after the other
    (Megatron-LM, arXiv:1909.08053 section 3) or, chunked, gathered at once.
    """

    name: str
    vocab_size: int
    token_fraction: float = 1.0
    kind: str = field(default="memory", init=False)
    is_expert: bool = field(default=False, init=False)

    def cost(self, shard: Shard, numerics: Numerics) -> OpCost:
        """See `Op.cost`."""
        rows = shard.tokens * self.token_fraction
        logits = rows * self.vocab_size / shard.tp
        b = numerics.compute_bytes
        kept, transient, moved = {
            "unfused": (b + 4.0 + 4.0, 4.0 + b, 3 * b + 24.0),
            "vocab_parallel": (4.0, b, 2 * b + 16.0),
            "compiled": (4.0, b + 4.0, 2 * b + 16.0),
            "fused": (b, 0.0, 3 * b),
            "chunked": (0.0, (4.0 + b * (b < 4)) / loss_chunks(rows), 3 * b),
        }[numerics.loss_kernel]
        return OpCost(
            self,
            forward_bytes=logits * moved / 2,
            backward_bytes=logits * moved / 2,
            saved={"logits": logits * kept} if numerics.loss_kernel != "chunked" else {},
            workspace_bytes=logits * transient,
            transfers=(self._exchange(shard, numerics),),
            num_kernels=4 if numerics.loss_kernel in ("unfused", "vocab_parallel") else 3 if numerics.loss_kernel == "compiled" else 1,
        )

    def _exchange(self, shard: Shard, numerics: Numerics) -> Transfer:
        num_bytes = 3 * 4.0 * shard.tokens * self.token_fraction * (np.asarray(shard.tp) > 1)
        if numerics.loss_kernel == "chunked":
            return Transfer("all_gather", "tp", "forward", shard.tp * num_bytes, loss_chunks(shard.tokens * self.token_fraction))
        return Transfer("all_reduce", "tp", "forward", num_bytes, 3)
