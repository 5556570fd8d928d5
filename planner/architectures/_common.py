"""What several families read in the same way."""

from __future__ import annotations

from typing import Any

from planner.architectures._config import Config

__all__ = ["ACTIVATIONS", "decoder_fields"]

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu", "gelu_fast": "gelu", "gelu_pytorch_tanh": "gelu",
    "gelu_python": "gelu", "relu": "relu",
}  # fmt: skip


def decoder_fields(config: Config, *, act_key: str = "hidden_act", act: str = "silu") -> dict[str, Any]:
    """Sizes of a decoder in the words of Llama's configuration, which most families took over."""
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    return {
        "hidden_size": hidden,
        "num_layers": config.size("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": config.size("num_key_value_heads", heads),
        "head_dim": config.size("head_dim", 0, 0) or config.heads("hidden_size", "num_attention_heads", hidden, heads),
        "intermediate_size": config.size("intermediate_size"),
        "vocab_size": config.size("vocab_size"),
        "max_position_embeddings": config.size("max_position_embeddings", 2048),
        "activation": config.text(act_key, act, ACTIVATIONS),
        "attention_dropout": config.fraction("attention_dropout"),
    }
