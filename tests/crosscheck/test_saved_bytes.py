"""Bytes that one more block keeps for the backward pass: our ops against what autograd saves in the real modules, on the meta device."""

from __future__ import annotations

from typing import Any

import pytest

from planner.architectures import load_model, model_ops, preset_record
from planner.op_cost import Numerics, Shard

torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[dev,reftrain]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[dev]'")

BATCH, SEQ_LEN = 2, 256
EAGER = Numerics(attention_kernel="flash", fused_norm=False, fused_activation=False)


def flash(_module: Any, query: Any, key: Any, value: Any, _mask: Any, scaling: float | None = None, **_: Any) -> tuple[Any, None]:
    """torch's flash kernel as an attention function of transformers."""
    out, *_rest = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, scale=scaling)
    return out.transpose(1, 2), None


def saved_bytes(config: dict[str, Any], num_layers: int) -> int:
    """Bytes of all tensors that autograd keeps, each storage once, parameters left out."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("torch_fused", flash)
    values = {**config, "num_hidden_layers": num_layers}
    built = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    kept: dict[int, Any] = {}
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(built, attn_implementation="torch_fused", dtype=torch.bfloat16).train()
        parameters = {p.untyped_storage()._cdata for p in module.parameters()}
        tokens = torch.zeros(BATCH, SEQ_LEN, dtype=torch.long)

        def keep(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                kept[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = module(input_ids=tokens, attention_mask=torch.zeros(BATCH, 1, SEQ_LEN, SEQ_LEN), use_cache=False).logits
    assert logits is not None
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-2-7b", "mistral-7b", "qwen2-7b", "qwen3-8b"])
def test_one_more_block_keeps_what_its_ops_say(name: str) -> None:
    """Left out by us: one fp32 number a row of each norm, and the kernel's random state; under 0.2%."""
    config = preset_record(name)["config"]
    real = saved_bytes(config, 3) - saved_bytes(config, 2)
    (_, ops), *_ = model_ops(load_model(config)).blocks
    ours = sum(float(sum(op.cost(Shard(BATCH, SEQ_LEN), EAGER).saved.values())) for op in ops)
    assert ours == pytest.approx(real, rel=2e-3)


def test_fused_kernels_keep_less() -> None:
    """Llama 3.1 8B, bytes per token and layer over hidden size: 34 fused; two norms 4 more each, silu of the gate 7 more."""
    (_, ops), *_ = model_ops(load_model("llama-3.1-8b")).blocks

    def per_hidden(numerics: Numerics) -> float:
        return sum(float(sum(op.cost(Shard(1, 1), numerics).saved.values())) for op in ops) / 4096

    assert per_hidden(EAGER) - per_hidden(Numerics()) == pytest.approx(2 * 4 + 7)
