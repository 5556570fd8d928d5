"""Loss of a trained model from its size and its tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["EPOCH_2024", "LossLaw", "LossPrediction", "predict_loss"]


@dataclass(frozen=True)
class LossLaw:
    """L = E + A / N^alpha + B / D^beta, nats per token; N parameters, D tokens."""

    name: str
    irreducible: float
    size_factor: float
    size_exponent: float
    data_factor: float
    data_exponent: float
    params_range: tuple[float, float]
    tokens_range: tuple[float, float]
    relative_error_fraction: float
    """Half width of the 80% interval, over the loss."""
    source: str


EPOCH_2024 = LossLaw(
    "chinchilla-epoch", 1.8172, 482.01, 0.3478, 2085.43, 0.3658, (4.4e7, 1.6e10), (5e9, 5e11), 0.11,
    "arXiv:2404.10102 (Besiroglu et al. 2024), refit of arXiv:2203.15556 approach 3; interval: published coefficients without a pilot run"
    " miss by 7-9% at the median and 12-13% at p90 over 16 public sets of runs",
)  # fmt: skip


@dataclass(frozen=True)
class LossPrediction:
    """Nats per token with an 80% interval, and what speaks against it."""

    value: float
    low: float
    high: float
    law: LossLaw
    warnings: tuple[str, ...]

    @property
    def perplexity(self) -> tuple[float, float, float]:
        """(value, low, high) of exp(loss)."""
        return math.exp(self.value), math.exp(self.low), math.exp(self.high)


def predict_loss(num_params: float, tokens: float, law: LossLaw = EPOCH_2024) -> LossPrediction:
    """Final loss of a pretraining run on fresh text.

    Args:
        num_params: all parameters that a token meets, embeddings and head included.
    Source: see `LossLaw.source`. Left out: data quality, tokenizer (nats per token are those of a 32k vocabulary), repetition.

    Example:
        >>> round(predict_loss(70e9, 1.4e12).value, 3)
        1.974
    """
    value = law.irreducible + law.size_factor / num_params**law.size_exponent + law.data_factor / tokens**law.data_exponent
    warnings = tuple(
        f"{what} = {got:.3g} lies outside the {low:.2g} to {high:.2g} on which {law.name} was fitted"
        for what, got, (low, high) in (("parameters", num_params, law.params_range), ("tokens", tokens, law.tokens_range))
        if not low <= got <= high
    )
    spread = value * law.relative_error_fraction
    return LossPrediction(value, max(value - spread, law.irreducible), value + spread, law, warnings)
