"""What finetuning with adapters stores and keeps: formats of the frozen base, inputs of adapters, copies in fp8."""

from typing import Any

import pytest

from planner.errors import InputError
from planner.estimate import estimate
from planner.peaks import memory_timeline
from planner.plan import Plan, Request, build_request

MODEL = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 8, "vocab_size": 1024, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
MATRICES, TABLES, NORMS = 4 * (4 * 1024**2 + 3 * 1024 * 4096), 2 * 1024 * 1024, (2 * 4 + 1) * 1024
TOKENS = 512


def request(accelerator: str = "h100-80gb-sxm", stack: str = "litgpt", **workload: Any) -> Request:
    whole = {"job": "lora", "lora_rank": 8, "seq_len": TOKENS, "global_batch_size": 1, "tokens": 1e6, **workload}
    cluster, layout = {"accelerator": accelerator, "num_devices": 1}, {"micro_batch_size": 1}
    return build_request({"model": MODEL, "workload": whole, "cluster": cluster, "stack": stack, "layout": layout})


def plan(accelerator: str = "h100-80gb-sxm", stack: str = "litgpt", **workload: Any) -> Plan:
    return estimate(request(accelerator, stack, **workload))


def kept(**workload: Any) -> float:
    """By the forward pass, of all ops: at the loss, when none of it is freed yet."""
    instant = next(instant for instant in memory_timeline(request(**workload)).stages[0].instants if instant.name == "loss")
    return instant.breakdown_bytes["activations"]


def adapters(targets: str) -> int:
    each = {"query_value": 2 * 2 * 1024, "attention": 4 * 2 * 1024, "all": 4 * 2 * 1024 + 3 * (1024 + 4096)}
    return 4 * 8 * each[targets]


@pytest.mark.parametrize("targets", ["query_value", "attention", "all"])
@pytest.mark.parametrize(("frozen", "num_bytes"), [("compute", 2.0), ("int8", 1.0), ("nf4", 0.5625), ("nf4_double", 0.5 + 1 / 64 + 1 / 4096)])
def test_stored_bytes_are_the_base_in_its_format_and_the_adapters(targets: str, frozen: str, num_bytes: float) -> None:
    found = plan(lora_targets=targets, frozen_format=frozen).memory.breakdown_bytes
    assert found["weights"] == pytest.approx(MATRICES * num_bytes + 2 * (TABLES + NORMS + adapters(targets)))
    assert found["optimizer"] == pytest.approx(4 * adapters(targets))  # two moments in bf16


def test_an_adapter_keeps_its_input_and_dropout_a_mask() -> None:
    without, some, masked = (
        kept(lora_targets=targets, lora_dropout=dropout) for targets, dropout in (("query_value", 0.0), ("all", 0.0), ("query_value", 0.05))
    )
    # Beyond the normed input of attention: that of the feed-forward layer and of its last matmul; attention's output is kept in any case.
    assert some - without == pytest.approx(4 * TOKENS * (1024 + 4096) * 2)
    assert masked - without == pytest.approx(4 * TOKENS * 1024 * 1)


def test_four_bit_matmuls_keep_their_input_all_the_same() -> None:
    plain, quantized = (kept(lora_targets="query_value", frozen_format=name) for name in ("compute", "nf4"))
    assert quantized - plain == pytest.approx(4 * TOKENS * (1024 + 4096) * 2)


def test_fp8_weights_are_kept_twice_on_hopper_and_once_on_blackwell() -> None:
    hopper, blackwell = (
        plan(name, "nemo", precision="fp8", lora_targets="attention").memory.breakdown_bytes["weights"] for name in ("h100-80gb-sxm", "b200-sxm")
    )
    assert hopper - blackwell == pytest.approx(MATRICES + adapters("attention"))


@pytest.mark.parametrize("key", [{"lora_targets": "attention"}, {"lora_dropout": 0.1}, {"frozen_format": "nf4"}])
def test_words_of_lora_belong_to_lora(key: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="belong to job: lora"):
        plan(**{"job": "pretrain", "lora_rank": None, **key})
