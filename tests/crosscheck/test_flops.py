"""FLOPs of our op list against what torch counts on the real modules of transformers, run on small tensors."""

from __future__ import annotations

from typing import Any

import pytest

from planner.architectures import load_model, model_ops
from planner.attention_op import Attention
from planner.op_cost import Numerics, OpCost, Shard

torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[dev,reftrain]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[dev]'")

SEQ_LEN, BATCH = 256, 2
HEADS = {"bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}
LLAMA = {
    "hidden_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 1408,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}
MODELS: list[dict[str, Any]] = [
    {"model_type": "gpt2", "n_embd": 512, "n_layer": 3, "n_head": 8, "vocab_size": 1000, "n_positions": 512},
    {"model_type": "llama", **LLAMA},
    {"model_type": "llama", **LLAMA, "head_dim": 96, "tie_word_embeddings": True},
    {"model_type": "mistral", **LLAMA, "sliding_window": 64},
    {"model_type": "qwen2", **LLAMA},
    {"model_type": "qwen3", **LLAMA, "head_dim": 128},
    {"model_type": "gemma", **LLAMA, "head_dim": 64, "hidden_activation": "gelu"},
    {"model_type": "gemma2", **LLAMA, "head_dim": 64, "hidden_activation": "gelu", "sliding_window": 64},
    {"model_type": "gemma3_text", **LLAMA, "head_dim": 64, "hidden_activation": "gelu", "sliding_window": 64},
    {"model_type": "gpt_neox", "hidden_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8, "intermediate_size": 2048, "vocab_size": 1000},
    {
        "model_type": "opt",
        "hidden_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "ffn_dim": 2048,
        "vocab_size": 1000,
        "word_embed_proj_dim": 512,
        "max_position_embeddings": 512,
    },
    {"model_type": "bloom", "hidden_size": 512, "n_layer": 3, "n_head": 8, "vocab_size": 1000},
    {"model_type": "mpt", "d_model": 512, "n_layers": 3, "n_heads": 8, "vocab_size": 1000, "max_seq_len": 512},
    {"model_type": "falcon", "hidden_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8, "vocab_size": 1000},
    {
        "model_type": "falcon",
        "hidden_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_kv_heads": 4,
        "vocab_size": 1000,
        "new_decoder_architecture": True,
    },
    {"model_type": "bert", "hidden_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8, "intermediate_size": 2048, "vocab_size": 1000},
    {"model_type": "t5", "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 2, "num_heads": 8, "vocab_size": 1000},
    {
        "model_type": "deepseek_v3",
        "hidden_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 1408,
        "vocab_size": 1000,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 48,
        "qk_rope_head_dim": 16,
        "v_head_dim": 40,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "first_k_dense_replace": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    {
        "model_type": "deepseek_v2",
        "hidden_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 1408,
        "vocab_size": 1000,
        "q_lora_rank": None,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 48,
        "qk_rope_head_dim": 16,
        "v_head_dim": 40,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "first_k_dense_replace": 1,
    },
    {"model_type": "mixtral", **LLAMA, "num_local_experts": 8, "num_experts_per_tok": 2},
    {
        "model_type": "qwen2_moe",
        **LLAMA,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 512,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    {"model_type": "qwen3_moe", **LLAMA, "head_dim": 64, "moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2},
    {"model_type": "gpt_oss", **LLAMA, "head_dim": 64, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 64},
]


def counted(config: dict[str, Any], attention: str) -> tuple[float, float]:
    """(forward, backward) FLOPs of one step of the real module, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    values = {key: value for key, value in config.items() if key != "model_type"}
    built = transformers.AutoConfig.for_model(config["model_type"], **values)
    # The grouped matmul of experts is not in torch's counter; the loop over experts is.
    built._experts_implementation = "eager"
    torch.manual_seed(0)
    module = getattr(transformers, HEADS.get(config["model_type"], "AutoModelForCausalLM")).from_config(built, attn_implementation=attention)
    tokens = torch.zeros(BATCH, SEQ_LEN, dtype=torch.long)
    module.train()
    inputs = {"input_ids": tokens} | (
        {"decoder_input_ids": tokens} if config["model_type"] == "t5" else {"use_cache": False} if config["model_type"] != "bert" else {}
    )
    with FlopCounterMode(display=False) as forward:
        logits = module(**inputs).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    return float(forward.get_total_flops()), float(backward.get_total_flops())


def costs(config: dict[str, Any], numerics: Numerics) -> list[OpCost]:
    """Costs of every op of the model for the same batch on one device."""
    listed = model_ops(load_model(config))
    ops = [*listed.embedding, *(op for layer in listed.layers for op in listed.blocks[layer][1]), *listed.head]
    shard = Shard(BATCH, SEQ_LEN)
    return [op.cost(shard, numerics) for op in ops]


@pytest.mark.parametrize(
    "config", MODELS, ids=lambda c: "-".join([c["model_type"], *(k for k in ("head_dim", "new_decoder_architecture") if k in c)])
)
def test_forward_and_backward_equal_the_real_model(config: dict[str, Any]) -> None:
    forward, backward = counted(config, "eager")
    ours = costs(config, Numerics(attention_kernel="unfused"))
    assert sum(c.model_forward_flops for c in ours) == pytest.approx(forward, rel=1e-3)
    assert sum(c.forward_flops for c in ours) == pytest.approx(forward, rel=1e-3)
    assert sum(c.backward_input_flops + c.backward_weight_flops for c in ours) == pytest.approx(backward, rel=1e-3)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 8, 64), (16, 4, 128)])
def test_flash_attention_computes_the_scores_again(heads: int, kv_heads: int, head_dim: int) -> None:
    """torch counts five products in the backward pass of its fused kernel, over all pairs; the causal mask halves what runs."""
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    op = Attention(name="core", num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, v_head_dim=head_dim)
    cost = op.cost(Shard(BATCH, SEQ_LEN), Numerics(attention_kernel="flash"))
    shape = (BATCH, heads, SEQ_LEN, head_dim)
    assert cost.model_forward_flops == sdpa_flop_count(shape, shape, shape)
    assert cost.forward_flops == sdpa_flop_count(shape, shape, shape) / 2
    assert cost.backward_input_flops == sdpa_backward_flop_count(shape, shape, shape, shape) / 2
