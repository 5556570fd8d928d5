"""How large a model and how many tokens a budget is best spent on, with the layout that trains it.

In: a budget in dollars, days or FLOPs, and hardware. Out: sizes along the family's shape, each with the tokens that the budget buys at its own
predicted speed, its expected loss, and what serving it costs; the best one marked. Loss is that of `planner.scaling_laws`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.architectures import load_model
from planner.errors import InputError
from planner.estimate import estimate
from planner.plan import Plan, Request, build_request
from planner.scaling_laws import predict_loss
from planner.units import DAY_S

__all__ = ["Advice", "Budget", "Choice", "advise", "llama_like"]

HEAD_DIM = 128
WIDTH_OVER_DEPTH = 128
"""Hidden size over layers of Llama 3 8B (128) and 70B (102): arXiv:2407.21783, table 3."""
SMALLEST_WIDTH, LARGEST_WIDTH, STEP = 512, 24576, 256
CHOICES_AROUND = 3
"""Sizes priced on either side of the best guess."""


@dataclass(frozen=True)
class Budget:
    """Exactly one of them."""

    usd: float | None = None
    num_days: float | None = None
    flops: float | None = None

    def check(self) -> None:
        """Refuses none, several, and nothing.

        Raises:
            InputError: not exactly one budget.
        """
        amounts = (("--budget", self.usd), ("--max-days", self.num_days), ("--flops", self.flops))
        given = {key: value for key, value in amounts if value is not None}
        if len(given) != 1:
            raise InputError.single(
                "budget", ", ".join(given) or None, "advice is for exactly one budget", "give one of --budget, --max-days and --flops"
            )
        for key, value in given.items():
            if not value > 0:
                raise InputError.single(key, value, "must be more than 0", "raise it")


@dataclass(frozen=True)
class Choice:
    """A model and its tokens under the budget."""

    model: dict[str, Any]
    params: float
    tokens: float
    loss: float
    loss_low: float
    loss_high: float
    inference_flops: float
    """Of all the tokens that it will serve."""
    plan: Plan

    @property
    def tokens_per_param(self) -> float:
        """Chinchilla's best is about 20."""
        return self.tokens / self.params


@dataclass(frozen=True)
class Advice:
    """The choices from small to large, and the place of the best one."""

    budget: Budget
    inference_tokens: float
    choices: tuple[Choice, ...]
    best: int
    law: str
    notes: tuple[str, ...]


def llama_like(hidden_size: int, vocab_size: int, max_positions: int) -> dict[str, Any]:
    """A model of Llama 3's shape: heads of 128, one key-value head for 4, 3.5 times the width inside, as deep as it is wide over 128.

    Example:
        >>> llama_like(4096, 128256, 8192)["num_hidden_layers"]
        32
    """
    heads = max(hidden_size // HEAD_DIM, 1)
    return {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "num_hidden_layers": max(round(hidden_size / WIDTH_OVER_DEPTH), 2),
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4 if heads % 4 == 0 else heads,
        "head_dim": HEAD_DIM,
        "intermediate_size": int(3.5 * hidden_size),
        "vocab_size": vocab_size,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": False,
    }


def advise(request: Request, budget: Budget, inference_tokens: float = 0.0, progress: Callable[[int, int], None] | None = None) -> Advice:
    """The size and the tokens with the least expected loss.

    Formula: a size of N parameters gets the tokens D that the budget pays for at its own predicted speed, N's share for inference taken off
    first: money and days by the plan's cost, which is in proportion to D; FLOPs by its FLOPs per token; inference as 2 N per token at the
    training's FLOPs per dollar. Least L(N, D) over sizes. Sizes are those of `llama_like`; widths in steps of 256.

    Args:
        request: hardware and workload; its model gives vocabulary and positions only.
        inference_tokens: that the model will serve in its life.

    Raises:
        InputError: wrong input, no price for a budget in dollars, or no size that fits.

    Source: arXiv:2203.15556 (compute-optimal), arXiv:2401.00448 (with inference).
    """
    budget.check()
    widths = np.arange(SMALLEST_WIDTH, LARGEST_WIDTH + 1, STEP).tolist()
    priced: dict[int, Choice | None] = {}

    def choice(place: int) -> Choice | None:
        if place not in priced:
            priced[place] = _choice(request, widths[place], budget, inference_tokens)
            if progress is not None:
                progress(len(priced), 0)
        return priced[place]

    best = _least(choice, len(widths))
    if best is None:
        raise InputError.single("budget", budget, "pays for no model that fits", "raise the budget, or name more devices with --num-devices")
    around = [
        found
        for place in range(best - CHOICES_AROUND, best + CHOICES_AROUND + 1)
        if 0 <= place < len(widths) and (found := choice(place)) is not None
    ]
    law = around[0].plan.loss
    notes = ["sizes of Llama 3's shape; the loss is an average over data sets: a pilot run of your own shifts it (planner scaling fit)"]
    if inference_tokens:
        notes.append(f"inference: 2 FLOPs per parameter and token for {inference_tokens:.3g} tokens, at the price of the training's FLOPs")
    chosen = min(range(len(around)), key=lambda i: around[i].loss)
    return Advice(budget, inference_tokens, tuple(around), chosen, law.law if law is not None else "", tuple(notes))


def _least(choice: Callable[[int], Choice | None], count: int) -> int | None:
    """Place of the least loss: a coarse look at every 8th size, then every one around the best of them; None where nothing can be had."""
    known = {place: found.loss for place in range(0, count, 8) if (found := choice(place)) is not None}
    for step in (4, 2, 1):
        if not known:
            return None
        best = min(known, key=lambda place: known[place])
        known |= {place: found.loss for place in (best - step, best + step) if 0 <= place < count and (found := choice(place)) is not None}
    return min(known, key=lambda place: known[place])


def _choice(request: Request, width: int, budget: Budget, inference_tokens: float) -> Choice | None:
    """A size with all the tokens that the budget pays for; None where it does not fit or the budget is used up by serving it."""
    base = load_model(request.model)
    model = llama_like(width, base.vocab_size, base.max_position_embeddings)
    values = request.as_given()
    values["model"] = model
    values["workload"] = {**values.get("workload", {}), "tokens": 1e9}
    plan = estimate(build_request(values))
    if not plan.fits:
        return None
    params = float(plan.params.active)
    serving = 2 * params * inference_tokens
    tokens = _tokens(plan, budget, serving)
    if tokens <= 0:
        return None
    values["workload"]["tokens"] = tokens
    whole = estimate(build_request(values))
    found = predict_loss(params, tokens)
    return Choice(model, params, tokens, found.value, found.low, found.high, serving, whole)


def _tokens(plan: Plan, budget: Budget, serving_flops: float) -> float:
    """Tokens that the budget pays for, at what one of them costs in the plan."""
    trained = float(plan.inputs["workload"]["tokens"])
    per_token_flops = plan.flops.model_per_token
    if budget.flops is not None:
        return (budget.flops - serving_flops) / per_token_flops
    if budget.num_days is not None:
        return budget.num_days * DAY_S / (plan.time.train_s.value / trained)
    if plan.cost.usd is None or budget.usd is None:
        raise InputError.single("--budget", budget.usd, "needs a price, and none is known", "name an --offer, or give --price")
    per_token_usd = plan.cost.usd.value / trained
    return (budget.usd - serving_flops / per_token_flops * per_token_usd) / per_token_usd
