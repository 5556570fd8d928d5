"""The model that a `ModelSpec` describes, with exactly the parameters that the planner counts.

Decoders (GPT-2, Llama, Qwen, Mistral, NeoX styles), mixtures of experts, latent attention, and BERT-style encoders. One class
serves them all: what differs are switches of the spec. Built whole, or as one stage of a pipeline.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional

from planner.errors import InputError, Problem
from planner.loss_op import loss_chunks
from planner.model_spec import ModelSpec
from reftrain.attention import Attention, LatentAttention, Positions
from reftrain.axes import SINGLE, Axes, local
from reftrain.config import Kernels, ModelDetails
from reftrain.kernels import linear_cross_entropy
from reftrain.layers import FeedForward, LayerNorm, Linear, RmsNorm, TokenEmbedding, activate, make_norm
from reftrain.moe import Mixture
from reftrain.recompute import recompute

__all__ = ["Block", "Transformer", "check_supported", "fill", "initialize", "parameter_count"]


def check_supported(spec: ModelSpec) -> None:
    """Refuses a model that the trainer cannot build, before anything starts.

    Raises:
        InputError: one Problem per feature that is missing here.
    """
    missing = (
        (spec.num_encoder_layers > 0, "an encoder-decoder", "a decoder or a BERT-style encoder"),
        (spec.position not in ("learned", "rope", "none"), f"{spec.position} positions", "learned or rotary positions"),
        (spec.num_mtp_layers > 0, "multi-token prediction", "num_nextn_predict_layers: 0"),
        (spec.has_attention_sinks, "attention sinks", "a model without them"),
        (spec.moe is not None and spec.moe.expert_bias, "biases in experts", "a model without them"),
        (spec.num_unused_positions > 0, "unused rows in the position table", "another model"),
        (spec.family in ("gemma", "gemma2", "gemma3", "gemma3_text"), "Gemma's scaled embeddings and soft caps", "a Llama-style model"),
    )
    problems = [Problem("model", spec.name, f"reftrain does not train {what}", f"use {instead}") for holds, what, instead in missing if holds]
    if problems:
        raise InputError(*problems)


class Embeddings(nn.Module):
    """Token, position and token-type embeddings, with BERT's norm."""

    axes: Axes = SINGLE

    def __init__(self, spec: ModelSpec, details: ModelDetails) -> None:
        super().__init__()
        h = spec.hidden_size
        self.token = TokenEmbedding(spec.vocab_size, h)
        self.position = nn.Parameter(torch.empty(spec.max_position_embeddings, h)) if spec.position == "learned" else None
        self.kind = nn.Parameter(torch.empty(spec.num_token_types, h)) if spec.num_token_types else None
        self.norm = make_norm(spec, details, h) if spec.has_embedding_norm else None
        self.dropout = spec.hidden_dropout

    def forward(self, tokens: Tensor, positions: Positions, dtype: torch.dtype) -> Tensor:
        """Shapes: tokens [B, S] -> [B, S or S/t, H]."""
        x = self.token(tokens, dtype)
        if self.position is not None:
            rows = self.axes.whole(self.position)[self._mine(positions.positions[..., : tokens.shape[1]])]
            x = x + rows.to(dtype)
        if self.kind is not None:  # one segment: every token is of kind 0
            x = x + self.axes.whole(self.kind)[0].to(dtype)
        x = x if self.norm is None else self.norm(x)
        return functional.dropout(x, self.dropout, self.training) if self.dropout else x

    def _mine(self, positions: Tensor) -> Tensor:
        """With sequence parallelism each tp rank embeds its own slice."""
        if not self.axes.sequence_parallel or self.axes.tp_mesh is None:
            return positions
        return positions.chunk(self.axes.tp, dim=-1)[self.axes.tp_mesh.get_local_rank()]


class Block(nn.Module):
    """Attention and feed-forward layer around the residual stream: pre-norm, post-norm (BERT) or in parallel (NeoX, Falcon)."""

    def __init__(self, spec: ModelSpec, details: ModelDetails, kernels: Kernels, layer: int) -> None:
        super().__init__()
        h, unfused = spec.hidden_size, kernels.attention == "unfused"
        self.attention_norm = make_norm(spec, details, h)
        self.attention = LatentAttention(spec, details, spec.mla, unfused) if spec.mla else Attention(spec, details, layer, unfused)
        self.mlp_norm = make_norm(spec, details, h) if spec.num_block_norms > 1 else None
        is_mixture = spec.moe is not None and spec.has_moe_at(layer)
        self.mlp = Mixture(spec, details, spec.moe) if is_mixture and spec.moe else FeedForward(spec, details)
        self.policy = kernels.recompute
        self.is_parallel, self.is_post_norm, self.dropout = spec.is_parallel_block, spec.family == "bert", spec.hidden_dropout
        last = self.mlp.shared if isinstance(self.mlp, Mixture) and self.mlp.shared_gate is None else self.mlp
        if isinstance(last, FeedForward):
            last.ends_block = not self.is_post_norm

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training) if self.dropout else x

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """Shapes: [B, S, H] -> [B, S, H]."""
        return recompute(self.policy, self._compute, x, positions)

    def _compute(self, x: Tensor, positions: Positions) -> Tensor:
        if self.is_post_norm:
            x = self.attention_norm(x + self._drop(self.attention(x, positions)))
            return self.mlp_norm(x + self._drop(self.mlp(x)))  # type: ignore[no-any-return, misc]
        normed = self.attention_norm(x)
        if self.is_parallel:
            other = normed if self.mlp_norm is None else self.mlp_norm(x)
            return x + self._drop(self.attention(normed, positions) + self.mlp(other))
        x = x + self._drop(self.attention(normed, positions))
        return x + self._drop(self.mlp(self.mlp_norm(x)))  # type: ignore[misc]


class Head(nn.Module):
    """Final norm (or BERT's transform), output projection, and the loss fused with it."""

    axes: Axes = SINGLE

    def __init__(self, spec: ModelSpec, details: ModelDetails, kernels: Kernels) -> None:
        super().__init__()
        h = spec.hidden_size
        self.transform = Linear(h, h, bias=True) if spec.family == "bert" else None
        self.norm = make_norm(spec, details, h) if spec.has_final_norm or spec.family == "bert" else None
        self.weight: nn.Parameter | None = None if spec.tie_word_embeddings else nn.Parameter(torch.empty(spec.vocab_size, h))
        self.bias = nn.Parameter(torch.empty(spec.vocab_size)) if spec.head_bias else None
        self.kind, self.is_tanh_gelu = spec.activation, details.is_tanh_gelu
        self.loss_kernel = kernels.loss

    def _normed(self, x: Tensor) -> Tensor:
        if self.transform is not None:
            x = activate(self.transform(x), self.kind, self.is_tanh_gelu)
        x = x if self.norm is None else self.norm(x)
        return self.axes.enter(x)

    def logits(self, x: Tensor, tied: Tensor | None) -> Tensor:
        """Shapes: [B, S, H] -> [B, S, V/t]."""
        x = self._normed(x)
        return functional.linear(x, *self._projection(x.dtype, tied))

    def _projection(self, dtype: torch.dtype, tied: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight = self.weight if self.weight is not None else tied
        if weight is None:
            raise RuntimeError("a tied head needs the embedding's table")
        return local(weight).to(dtype), None if self.bias is None else local(self.bias).to(dtype)

    def forward(self, x: Tensor, targets: Tensor, tied: Tensor | None) -> Tensor:
        """Mean loss in nats of [B, S, H] against targets [B, S] (-100: not counted)."""
        x = self._normed(x).flatten(0, 1)
        weight, bias = self._projection(x.dtype, tied)
        if self.loss_kernel == "unfused" and self.axes.tp_mesh is None:
            return functional.cross_entropy(functional.linear(x, weight, bias).float(), targets.flatten())
        num_chunks = int(loss_chunks(len(x))) if self.loss_kernel == "chunked" else 1
        return linear_cross_entropy(x, weight, bias, targets.flatten(), num_chunks=num_chunks, group=self.axes.tp_group)


class Transformer(nn.Module):
    """The whole model, or the blocks of one pipeline stage with the embedding if it is the first and the head if it is the last.

    Shapes: tokens [B, S] (later stages: hidden [B, S, H]) and targets [B, S] -> the mean loss in nats, [1], because pipelines
    join what their microbatches return (earlier stages: hidden).
    Parameters keep their names whatever the stage: `blocks.7.attention.q.weight`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        details: ModelDetails | None = None,
        kernels: Kernels | None = None,
        *,
        layers: range | None = None,
        is_first: bool = True,
        is_last: bool = True,
    ) -> None:
        super().__init__()
        check_supported(spec)
        details, kernels = details or ModelDetails(), kernels or Kernels()
        self.spec, self.details, self.kernels = spec, details, kernels
        self.dtype = torch.float32
        self.positions = Positions(spec, details)
        self.embeddings = Embeddings(spec, details) if is_first else None
        layers = range(spec.num_layers) if layers is None else layers
        self.blocks = nn.ModuleDict({str(layer): Block(spec, details, kernels, layer) for layer in layers})
        self.head = Head(spec, details, kernels) if is_last else None
        self.tied: TokenEmbedding | None = None
        if self.head is not None and spec.tie_word_embeddings and self.embeddings is None:
            # A pipeline parts the tied head from the embedding: the last stage has a copy, kept equal by summed gradients.
            self.tied = TokenEmbedding(spec.vocab_size, spec.hidden_size)

    def hidden(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        """Embedding (on the first stage) and blocks; tokens of a document, numbered [B, S], see each other alone."""
        positions = self.positions if documents is None else self.positions.within(documents)
        if self.embeddings is not None:
            x = self.embeddings(x, positions, self.dtype)
        for block in self.blocks.values():
            x = block(x, positions)
        return x

    def _tied_table(self) -> Tensor | None:
        if not self.spec.tie_word_embeddings:
            return None
        return self.tied.weight if self.tied is not None else self.embeddings.token.weight  # type: ignore[union-attr]

    def logits(self, tokens: Tensor) -> Tensor:
        """Shapes: [B, S] -> [B, S, V]."""
        if self.head is None:
            raise RuntimeError("only the last stage has logits")
        return self.head.logits(self.hidden(tokens), self._tied_table())

    def forward(self, x: Tensor, targets: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """See the class."""
        x = self.hidden(x, documents)
        if self.head is None or targets is None:
            return x
        return torch.stack((self.head(x, targets, self._tied_table()),))

    def set_axes(self, axes: Axes) -> None:
        """Tells every layer with whom it shares its work."""
        module: Any
        for module in self.modules():
            if hasattr(type(module), "axes"):
                module.axes = axes

    def routers(self) -> Iterator[Any]:
        """The routers of its mixtures."""
        return (m.router for m in self.modules() if isinstance(m, Mixture))


@torch.no_grad()
def fill(parameter: Tensor, whole: Tensor) -> None:
    """Copies a whole tensor into a parameter, of which each rank keeps its part."""
    if isinstance(parameter, DTensor):
        parameter.copy_(distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None))
    else:
        parameter.copy_(whole)


def parameter_count(model: nn.Module) -> int:
    """Numbers that training changes, each once."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Fills parameters from (seed, name) alone, so that every layout starts from the same weights.

    Normal(0, initializer_range), the projections into the residual stream divided by sqrt(2 * num_layers) (Radford et al. 2019);
    norms 1, biases 0. A split parameter is made whole, one at a time, and each rank keeps its part.
    """
    norms = {id(p) for m in model.modules() if isinstance(m, (RmsNorm, LayerNorm)) for p in [m.weight]}
    for name, parameter in model.named_parameters():
        name = name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "").replace("tied.weight", "embeddings.token.weight")
        whole = torch.empty(parameter.shape, dtype=torch.float32)
        if id(parameter) in norms:
            whole.fill_(1.0)
        elif name.endswith(("bias", "adapter.b")):
            whole.zero_()
        else:
            generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big"))
            is_residual = name.endswith(("attention.out.weight", "down.weight", "experts.down"))
            std = model.details.initializer_range / (math.sqrt(2 * model.spec.num_layers) if is_residual else 1.0)
            if name.endswith("adapter.a"):  # as wide as the uniform distribution of the LoRA authors' code
                std = 1 / math.sqrt(3 * parameter.shape[1])
            whole.normal_(0.0, std, generator=generator)
        fill(parameter, whole)
    for router in model.routers():
        router.bias.zero_()
        router.load.zero_()
