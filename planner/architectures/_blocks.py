"""Pieces from which the families build their blocks. Each returns a tuple of ops in order of execution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from planner.architectures import ModelOps
from planner.attention_op import Attention
from planner.collective_op import Collective
from planner.loss_op import Loss
from planner.model_spec import Mla, ModelSpec, Moe
from planner.op_cost import Op, Producer
from planner.ops import Elementwise, Embedding, GroupedLinear, Linear, Norm

__all__ = [
    "attention", "block_norm", "decoder", "dropout", "embedding", "feed_forward", "head", "mla_attention", "mixture", "residual",
    "standard_block",
]  # fmt: skip

Ops = tuple[Op, ...]


def embedding(spec: ModelSpec) -> Ops:
    """Token embedding split over the vocabulary, learned positions, token types, norm and dropout."""
    h = spec.hidden_size
    ops: Ops = (
        Embedding(name="embedding", num_embeddings=spec.vocab_size, embedding_dim=h),
        Collective(name="embedding_reduce", pattern="leave", width=h),
    )
    if spec.position == "learned":
        rows = spec.max_position_embeddings + spec.num_unused_positions
        ops += (Embedding(name="position_embedding", num_embeddings=rows, embedding_dim=h, is_split=False, is_looked_up_per_token=False),)
    if spec.num_token_types:
        ops += (
            Embedding(
                name="token_type_embedding", num_embeddings=spec.num_token_types, embedding_dim=h, is_split=False, is_looked_up_per_token=False
            ),
        )
    if spec.has_embedding_norm:
        ops += (block_norm(spec, "embedding_norm"),)
    return ops + dropout(spec, "embedding_dropout")


def block_norm(spec: ModelSpec, name: str, saves_input: Producer | None = "residual") -> Norm:
    """A norm over the hidden size."""
    is_rms = spec.norm == "rmsnorm"
    return Norm(name=name, width=spec.hidden_size, bias=not is_rms and spec.norm_bias, is_rms=is_rms, saves_input=saves_input)


def dropout(spec: ModelSpec, name: str) -> Ops:
    """Dropout on the residual branch: one mask byte per element; nothing when the rate is 0."""
    h = spec.hidden_size
    return (Elementwise(name=name, reads=h, writes=h, saves_bytes=(("dropout", h),)),) if spec.hidden_dropout else ()


def residual(spec: ModelSpec, name: str) -> Ops:
    """x + f(x), which keeps nothing."""
    h = spec.hidden_size
    return (Elementwise(name=name, reads=2 * h, writes=h, is_residual=True),)


def attention(
    spec: ModelSpec,
    window: int = 0,
    *,
    prefix: str = "attention",
    is_causal: bool | None = None,
    input_kept: bool = True,
    num_bias_params: int = 0,
    is_only_added: bool = False,
    normed: Producer = "norm",
) -> Ops:
    """Q, K, V projections, QK-norm, rotary embedding, the kernel and the output projection.

    Args:
        window: sliding window in tokens, 0 for none.
        input_kept: whether the Q projection keeps the normed input; False where a parallel branch does.
        num_bias_params: learned relative positions held by this layer.
        normed: what made its input; "residual" where that is the block's.
        is_only_added: whether its result is added to that of another branch at the block's end.
    """
    h, d = spec.hidden_size, spec.head_dim
    heads, kv_heads = spec.num_attention_heads, spec.num_key_value_heads
    is_rms = spec.norm == "rmsnorm"
    ops: Ops = (
        Linear(name=f"{prefix}.q", in_features=h, out_features=heads * d, bias=spec.qkv_bias, saves_input=normed if input_kept else None),
        Linear(name=f"{prefix}.k", in_features=h, out_features=kv_heads * d, bias=spec.qkv_bias, saves_input=None, min_out=d, shares_input=True),
        Linear(name=f"{prefix}.v", in_features=h, out_features=kv_heads * d, bias=spec.qkv_bias, saves_input=None, min_out=d, shares_input=True),
    )
    if spec.qk_norm == "head":
        ops += (
            Norm(name=f"{prefix}.q_norm", width=d, num_rows_per_token=heads, is_rms=is_rms, region="tp", saves_input="matmul"),
            Norm(name=f"{prefix}.k_norm", width=d, num_rows_per_token=kv_heads, is_rms=is_rms, region="tp", saves_input="matmul"),
        )
    elif spec.qk_norm == "full":
        ops += (
            Norm(name=f"{prefix}.q_norm", width=heads * d, is_rms=is_rms, region="tp", saves_input="matmul"),
            Norm(name=f"{prefix}.k_norm", width=kv_heads * d, is_rms=is_rms, region="tp", saves_input="matmul"),
        )
    if spec.position == "rope":
        width = (heads + kv_heads) * d
        ops += (Elementwise(name=f"{prefix}.rope", reads=width, writes=width, region="tp"),)
    core = Attention(
        name=f"{prefix}.core", num_heads=heads, num_kv_heads=kv_heads, head_dim=d, v_head_dim=d,
        is_causal=spec.is_causal if is_causal is None else is_causal, window=window, has_dropout=spec.attention_dropout > 0,
        num_sinks=heads if spec.has_attention_sinks else 0, num_bias_params=num_bias_params, has_normed_keys=spec.qk_norm != "none",
    )  # fmt: skip
    return (
        *ops,
        core,
        Linear(
            name=f"{prefix}.out",
            in_features=heads * d,
            out_features=h,
            bias=spec.attention_out_bias,
            split="row",
            saves_input=None,
            is_only_added=is_only_added,
        ),
    )


def mla_attention(spec: ModelSpec, mla: Mla) -> Ops:
    """Multi-head latent attention: low-rank queries and keys-values, expanded per head (arXiv:2405.04434, section 2.1)."""
    h, heads = spec.hidden_size, spec.num_attention_heads
    qk = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    if mla.q_lora_rank:
        queries: Ops = (
            Linear(name="attention.q_down", in_features=h, out_features=mla.q_lora_rank, bias=spec.qkv_bias, split="none", saves_input="norm"),
            Norm(name="attention.q_norm", width=mla.q_lora_rank, saves_input="matmul"),
            Linear(name="attention.q_up", in_features=mla.q_lora_rank, out_features=heads * qk, saves_input="norm"),
        )
    else:
        queries = (Linear(name="attention.q", in_features=h, out_features=heads * qk, saves_input="norm"),)
    return (
        *queries,
        Linear(
            name="attention.kv_down",
            in_features=h,
            out_features=mla.kv_lora_rank + mla.qk_rope_head_dim,
            bias=spec.qkv_bias,
            split="none",
            saves_input=None,
            shares_input=True,
        ),
        Norm(name="attention.kv_norm", width=mla.kv_lora_rank, saves_input="matmul"),
        Linear(
            name="attention.kv_up", in_features=mla.kv_lora_rank, out_features=heads * (mla.qk_nope_head_dim + mla.v_head_dim), saves_input="norm"
        ),
        Elementwise(name="attention.rope", reads=2 * heads * mla.qk_rope_head_dim, writes=2 * heads * qk, region="tp"),
        Attention(
            name="attention.core",
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=qk,
            v_head_dim=mla.v_head_dim,
            has_dropout=spec.attention_dropout > 0,
            joined_key_dim=mla.qk_rope_head_dim,
        ),
        Linear(name="attention.out", in_features=heads * mla.v_head_dim, out_features=h, bias=spec.attention_out_bias, split="row", saves_input=None),
    )


def feed_forward(spec: ModelSpec, *, width: int | None = None, prefix: str = "mlp", input_kept: bool = True, enters_again: bool = False) -> Ops:
    """Up (and gate), activation, down."""
    h, f = spec.hidden_size, width or spec.intermediate_size
    kept: Producer | None = "norm" if input_kept else None
    up: Ops = (Linear(name=f"{prefix}.up", in_features=h, out_features=f, bias=spec.mlp_bias, saves_input=kept, enters_again=enters_again),)
    if spec.is_gated:
        up += (Linear(name=f"{prefix}.gate", in_features=h, out_features=f, bias=spec.mlp_bias, saves_input=None, shares_input=True),)
    branches = 2 if spec.is_gated else 1
    act = Elementwise(
        name=f"{prefix}.activation", reads=branches * f, writes=f, region="tp", saves=(("matmul", branches * f),), num_between=f * (branches - 1)
    )
    return (*up, act, Linear(name=f"{prefix}.down", in_features=f, out_features=h, bias=spec.mlp_bias, split="row", saves_input="activation"))


def mixture(spec: ModelSpec, moe: Moe) -> Ops:
    """Router, exchange of tokens, all experts, way back, and the shared expert."""
    h, f, k = spec.hidden_size, moe.intermediate_size, moe.num_experts_per_token

    def experts(name: str, inner: int, outer: int, split: Literal["column", "row"], saves: Producer | None) -> GroupedLinear:
        return GroupedLinear(
            name=f"experts.{name}", in_features=inner, out_features=outer, split=split, saves_input=saves, bias=moe.expert_bias,
            shares_input=name == "gate",
            num_experts=moe.num_experts, num_experts_per_token=k,
        )  # fmt: skip

    branches = 2 if spec.is_gated else 1
    up: Ops = (experts("up", h, f, "column", "dispatch"),)
    if spec.is_gated:
        up += (experts("gate", h, f, "column", None),)
    ops: Ops = (
        Linear(name="router", in_features=h, out_features=moe.num_experts, bias=moe.router_bias, split="none", saves_input="norm", is_adapted=False),
        Elementwise(name="experts.permute", reads=h, writes=k * h, is_expert=True),
        Collective(name="experts.dispatch", pattern="exchange", width=h, copies_per_token=k),
        *up,
        Elementwise(
            name="experts.activation",
            reads=branches * f,
            writes=f,
            region="tp",
            saves=(("matmul", branches * f),),
            num_between=f * (branches - 1),
            tokens_scale=k,
            num_experts=moe.num_experts,
            is_expert=True,
        ),
        experts("down", f, h, "row", "activation"),
        Collective(name="experts.combine", pattern="exchange", width=h, copies_per_token=k),
        Elementwise(name="experts.unpermute", reads=k * h, writes=h, saves=(("matmul", k * h),), is_expert=True),
    )
    if moe.shared_intermediate_size:
        ops += feed_forward(spec, width=moe.shared_intermediate_size, prefix="shared", input_kept=False, enters_again=True)
        if moe.has_shared_gate:
            ops += (
                Linear(name="shared_gate", in_features=h, out_features=1, split="none", saves_input=None, is_adapted=False),
                # the gate's gradient needs what it scales
                Elementwise(name="shared.scale", reads=h, writes=h, saves=(("matmul", h),)),
            )
        ops += residual(spec, "shared.add")
    return ops


def enter(spec: ModelSpec, name: str) -> Ops:
    """Into the tensor-parallel region."""
    return (Collective(name=f"{name}.enter", pattern="enter", width=spec.hidden_size),)


def leave(spec: ModelSpec, name: str) -> Ops:
    """Out of the tensor-parallel region."""
    return (Collective(name=f"{name}.leave", pattern="leave", width=spec.hidden_size),)


def parallel_block(spec: ModelSpec, layer: int) -> Ops:
    """x + attention(norm(x)) + feed-forward(norm(x)): one way into the tensor-parallel region and one out.

    With one norm both branches read the same tensor, and only attention's projection keeps it.
    """
    shared = spec.num_block_norms == 1
    norms: Ops = (block_norm(spec, "norm"),) if shared else (block_norm(spec, "attention_norm"), block_norm(spec, "mlp_norm", None))
    return (
        *norms, *enter(spec, "block"), *attention(spec, spec.window_at(layer), is_only_added=True),
        *feed_forward(spec, input_kept=not shared), *leave(spec, "block"),
        *dropout(spec, "dropout"), *residual(spec, "add"),
    )  # fmt: skip


def standard_block(spec: ModelSpec, layer: int) -> Ops:
    """Pre-norm block: x + attention(norm(x)), then x + feed-forward(norm(x)); either in its MoE or MLA form.

    With `num_block_norms` 4 each branch is normed again before it is added (Gemma 2 and 3).
    """
    after_attention: Ops = (block_norm(spec, "attention_post_norm", "matmul"),) if spec.num_block_norms == 4 else ()
    after_mlp: Ops = (block_norm(spec, "mlp_post_norm", "matmul"),) if spec.num_block_norms == 4 else ()
    inner = mla_attention(spec, spec.mla) if spec.mla else attention(spec, spec.window_at(layer))
    is_mixture = spec.moe is not None and spec.has_moe_at(layer)
    mlp = mixture(spec, spec.moe) if is_mixture and spec.moe else feed_forward(spec)
    return (
        block_norm(spec, "attention_norm"), *enter(spec, "attention"), *inner, *leave(spec, "attention"), *after_attention,
        *dropout(spec, "attention_dropout"), *residual(spec, "attention_add"),
        block_norm(spec, "mlp_norm"), *enter(spec, "mlp"), *mlp, *leave(spec, "mlp"), *after_mlp,
        *dropout(spec, "mlp_dropout"), *residual(spec, "mlp_add"),
    )  # fmt: skip


def head(spec: ModelSpec) -> Ops:
    """Final norm, output projection over the vocabulary, loss."""
    norm: Ops = (block_norm(spec, "final_norm"),) if spec.has_final_norm else ()
    project = Linear(
        name="head", in_features=spec.hidden_size, out_features=spec.vocab_size, bias=spec.head_bias, saves_input="norm",
        is_tied=spec.tie_word_embeddings, is_adapted=False, category="embedding", is_chunked=True,
    )  # fmt: skip
    return (*norm, *enter(spec, "head"), project, Loss(name="loss", vocab_size=spec.vocab_size))


def decoder(spec: ModelSpec, block: Callable[[ModelSpec, int], Ops] | None = None) -> ModelOps:
    """A decoder (or encoder) of `num_layers` blocks; equal blocks share one entry."""
    make = block or (parallel_block if spec.is_parallel_block else standard_block)
    kinds: dict[Ops, int] = {}
    layers = []
    for layer in range(spec.num_layers):
        ops = make(spec, layer)
        layers.append(kinds.setdefault(ops, len(kinds)))
    blocks = tuple((_block_name(ops), ops) for ops in kinds)
    return ModelOps(embedding(spec), blocks, tuple(layers), head(spec))


def _block_name(ops: Ops) -> str:
    names = {op.name for op in ops}
    window = next((op.window for op in ops if isinstance(op, Attention)), 0)
    return ("moe block" if "router" in names else "block") + (f" (window {window})" if window else "")
