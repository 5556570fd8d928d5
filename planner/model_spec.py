"""ModelSpec: one transformer in plain numbers, whatever family it comes from.

Built by `planner.architectures.load_model` from a preset, an HF `config.json` or an inline mapping. The words are those
of HF's config.json; where a family uses other ones (GPT-2's `n_embd`), its file in `architectures/` translates.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from planner.spec import NonNegativeInt, PositiveInt, Spec

__all__ = ["ModelSpec", "Moe", "Mla"]


class Moe(Spec):
    """Mixture of experts: the feed-forward layer of some or all blocks."""

    num_experts: PositiveInt
    num_experts_per_token: PositiveInt
    intermediate_size: PositiveInt
    """Width of one routed expert."""
    shared_intermediate_size: NonNegativeInt = 0
    """Total width of the experts that every token visits."""
    has_shared_gate: bool = False
    """Qwen2-MoE: a sigmoid gate scales the shared expert."""
    router_bias: bool = False
    expert_bias: bool = False
    num_dense_layers: NonNegativeInt = 0
    """The first blocks that keep a dense feed-forward layer."""
    layer_period: PositiveInt = 1
    """Every `layer_period`-th block is a mixture."""


class Mla(Spec):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434)."""

    q_lora_rank: NonNegativeInt
    """0: queries are projected directly."""
    kv_lora_rank: PositiveInt
    qk_nope_head_dim: PositiveInt
    qk_rope_head_dim: PositiveInt
    v_head_dim: PositiveInt


class ModelSpec(Spec):
    """Sizes and switches from which the list of ops follows."""

    name: str
    family: str
    """Key of the architecture that turns this into ops."""
    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    intermediate_size: PositiveInt
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt
    tie_word_embeddings: bool = False
    position: Literal["learned", "rope", "alibi", "relative", "none"] = "rope"
    num_unused_positions: NonNegativeInt = 0
    """Further rows of a learned position table, which no position uses (OPT)."""
    num_position_buckets: NonNegativeInt = 0
    """Rows of a table of relative positions (T5)."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_bias: bool = False
    activation: Literal["silu", "gelu", "relu"] = "silu"
    is_gated: bool = True
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    """`head`: one weight of head_dim shared by all heads; `full`: one over all heads together."""
    is_parallel_block: bool = False
    """Attention and feed-forward read the same normed input (PaLM, GPT-NeoX, Falcon)."""
    num_block_norms: PositiveInt = 2
    has_embedding_norm: bool = False
    has_final_norm: bool = True
    is_causal: bool = True
    sliding_window: NonNegativeInt = 0
    """0: every layer attends to everything."""
    global_layer_period: NonNegativeInt = 0
    """With a sliding window: every so many layers one attends to everything; 0: none does."""
    has_attention_sinks: bool = False
    num_encoder_layers: NonNegativeInt = 0
    """Encoder-decoder models: so many of `num_layers` are the encoder's."""
    num_token_types: NonNegativeInt = 0
    num_mtp_layers: NonNegativeInt = 0
    """Multi-token prediction blocks after the last layer (DeepSeek-V3)."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1)
    moe: Moe | None = None
    mla: Mla | None = None
    assumptions: tuple[str, ...] = ()
    """What the family takes for granted, in words for the user."""

    @property
    def is_moe(self) -> bool:
        """Whether any block routes tokens to experts."""
        return self.moe is not None

    def has_moe_at(self, layer: int) -> bool:
        """Whether block `layer` (from 0) routes tokens to experts."""
        return self.moe is not None and layer >= self.moe.num_dense_layers and (layer + 1) % self.moe.layer_period == 0

    def window_at(self, layer: int) -> int:
        """Sliding window of block `layer` in tokens; 0 where it attends to everything."""
        is_global = self.global_layer_period > 0 and (layer + 1) % self.global_layer_period == 0
        return 0 if is_global else self.sliding_window
