"""What several families read in the same way."""

from __future__ import annotations

from typing import Any

from planner.architectures._config import Config

__all__ = ["ACTIVATIONS", "decoder_fields", "qwen_windows", "window_fields"]

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu", "gelu_fast": "gelu", "gelu_pytorch_tanh": "gelu",
    "gelu_python": "gelu", "quick_gelu": "gelu", "relu": "relu",
}  # fmt: skip


def decoder_fields(
    config: Config,
    *,
    act_key: str = "hidden_act",
    act: str = "silu",
    max_positions: int = 2048,
    kv_heads: int | None = None,
    head_dim: int | None = None,
) -> dict[str, Any]:
    """Sizes of a decoder in the words of Llama's configuration, which most families took over.

    Args:
        max_positions, kv_heads, head_dim: what transformers' class takes where the key is left out; None: as many key-value
            heads as heads, and heads that share hidden_size.
    """
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    width = config.size("head_dim", head_dim or 0, 0)
    return {
        "hidden_size": hidden,
        "num_layers": config.layers("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": config.size("num_key_value_heads", kv_heads or heads),
        "head_dim": width or config.heads("hidden_size", "num_attention_heads", hidden, heads),
        "intermediate_size": config.size("intermediate_size"),
        "vocab_size": config.size("vocab_size"),
        "max_position_embeddings": config.size("max_position_embeddings", max_positions),
        "activation": config.text(act_key, act, ACTIVATIONS),
        "attention_dropout": config.fraction("attention_dropout"),
    }


def window_fields(config: Config, num_layers: int, *, default: int = 0, period: int = 0) -> dict[str, Any]:
    """Which layers see a sliding window, and how wide it is.

    `layer_types` decides where it is given. A `sliding_window` of null means none, one left out the default.

    Args:
        default: window where the key is left out.
        period: every so many layers one is global; 0: none is.
    """
    window = config.size("sliding_window", 0 if config.is_null("sliding_window") else default, 0)
    kinds = config.names("layer_types", ("full_attention", "sliding_attention"))
    if kinds is not None:
        config.rule(len(kinds) == num_layers, "layer_types", f"must name each of the {num_layers} layers", "add or remove entries, or leave it out")
        if "sliding_attention" not in kinds:
            return {"sliding_window": 0, "global_layer_period": 0}
        config.rule(window > 0, "sliding_window", "must be given when layer_types names sliding_attention", "add sliding_window")
        period = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
        is_regular = all((kind == "full_attention") == (period > 0 and (i + 1) % period == 0) for i, kind in enumerate(kinds))
        config.rule(is_regular, "layer_types", "must repeat: every n-th layer full_attention, the others sliding_attention", "leave it out")
    return {"sliding_window": window, "global_layer_period": period}


def qwen_windows(config: Config, num_layers: int) -> dict[str, Any]:
    """Qwen's windows: none unless `use_sliding_window`, and then in the layers from `max_window_layers` on."""
    if not config.flag("use_sliding_window", False):
        for key in ("sliding_window", "layer_types", "max_window_layers"):
            config.get(key)
        return {}
    first = config.size("max_window_layers", 28, 0)
    config.rule(first == 0 or first >= num_layers, "max_window_layers", "must be 0 or at least num_hidden_layers", "write 0: a window in every layer")
    windows = window_fields(config, num_layers, default=4096)
    return {} if first >= num_layers else windows
