"""A ladder of small runs for a scaling law: which sizes, how many tokens, which batch and rate, from this machine's speed and a time budget.

Protocol: 3 sizes x 3 token counts, each with a schedule of its own that ends at zero; batch by compute; the rate by trials at two widths; two
more seeds of the middle run show the noise. Sources stand beside each number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from planner.errors import InfeasibleError
from reftrain.config import make_run_config
from reftrain.model import Transformer, parameter_count

__all__ = ["Ladder", "Rung", "Shape", "plan_ladder", "plan_of", "rate_at", "shapes"]

SEQ_LEN, HEAD_DIM = 128, 16
WIDTHS = range(32, 529, 16)
FEWEST_PER_PARAM = 8.0
MOST_PER_PARAM = (20.0, 30.0, 50.0)
"""Tokens, of which the time decides; within the 5 to 100 in which laws are fitted. Hoffmann et al. (arXiv:2203.15556) have their optimum at 20."""
SIZE_FACTOR = 2.0
"""From one size to the next; with the tokens, compute spans 16 * 2.5 = 40-fold or more."""
LEAST_STEPS = 400
"""Pilots of fewer steps wreck a fit: the warm-up is too much of them."""
WARMUP_FRACTION = 0.05
MOST_EPOCHS = 4.0
"""Repeated text is nearly as good as new up to here (Muennighoff et al., arXiv:2305.16264)."""
BUDGET_FRACTION = 0.85
"""Of the time is planned; what the machine does besides takes the rest."""
RATES = (1.5e-3, 4e-3, 1e-2)
NUM_RATED = 2
"""Sizes whose shortest run is made once for each rate."""
NUM_SEEDS = 3
EVAL_SPEEDUP = 3.0
"""A forward pass is a third of a step."""
START_S = 5.0
"""A process starts, imports and writes its checkpoints, whatever it trains: 4 to 8 s on a busy machine (2026-11-24)."""


@dataclass(frozen=True)
class Shape:
    """A model of the family that all runs share: Llama style, tied table."""

    hidden_size: int
    vocab_size: int

    @property
    def config(self) -> dict[str, Any]:
        """As HF's config.json."""
        h = self.hidden_size
        return {
            "model_type": "llama", "hidden_size": h, "intermediate_size": round(8 * h / 3 / 16) * 16, "num_hidden_layers": max(round(h / 32), 2),
            "num_attention_heads": h // HEAD_DIM, "num_key_value_heads": h // HEAD_DIM, "vocab_size": self.vocab_size,
            "max_position_embeddings": SEQ_LEN, "tie_word_embeddings": True,
        }  # fmt: skip

    @property
    def params(self) -> int:
        """All of them, the tied table once."""
        from planner.architectures import load_model

        with torch.device("meta"):
            return parameter_count(Transformer(load_model(self.config)))


@dataclass(frozen=True)
class Rung:
    """One run."""

    name: str
    hidden_size: int
    params: int
    steps: int
    batch: int
    """Sequences of `SEQ_LEN` tokens."""
    predicted_s: float
    seed: int = 0
    learning_rate: float | None = None
    """None: by `rate_at`, once the trials are over."""
    is_trial: bool = False
    """One of several rates of the same run, of which the best counts."""

    @property
    def tokens(self) -> int:
        """Trained on, repeats included."""
        return self.steps * self.batch * SEQ_LEN


@dataclass(frozen=True)
class Ladder:
    """All runs, cheapest first, and what they were planned from."""

    rungs: tuple[Rung, ...]
    vocab_size: int
    unique_tokens: int
    eval_tokens: int

    @property
    def predicted_s(self) -> float:
        """Of all runs."""
        return sum(rung.predicted_s for rung in self.rungs)


def shapes(vocab_size: int) -> list[Shape]:
    """The family, smallest first."""
    return [Shape(width, vocab_size) for width in WIDTHS]


def batch_tokens(flops: float) -> float:
    """Tokens of a batch near the critical one. Formula: 0.29 * C^0.327, fitted by DeepSeek LLM (arXiv:2401.02954, section 3.1).

    Example:
        >>> round(batch_tokens(1e13))
        5169
    """
    return float(0.29 * flops**0.327)


def _rung(shape: Shape, params: int, tokens: float, tokens_per_s: float, eval_tokens: int) -> Rung:
    """A run of about `tokens`, whose batch leaves it enough steps."""
    wanted = batch_tokens(6.0 * params * tokens) / SEQ_LEN
    batch = max(min(2 ** round(math.log2(max(wanted, 1.0))), int(tokens / (LEAST_STEPS * SEQ_LEN))), 1)
    steps = max(math.ceil(tokens / (batch * SEQ_LEN)), LEAST_STEPS)
    rung = Rung(f"n{params}-d{steps * batch * SEQ_LEN}", shape.hidden_size, params, steps, batch, 0.0)
    return replace(rung, predicted_s=START_S + (rung.tokens + eval_tokens / EVAL_SPEEDUP) / tokens_per_s)


def _grid(
    first: int, most: float, family: Sequence[tuple[Shape, int]], speed: Callable[[int], float], limits: tuple[int, int]
) -> list[list[Rung]] | None:
    """[size][tokens] of runs whose smallest model is `first`, up to `most` tokens a parameter; None where family or text end before."""
    unique_tokens, eval_tokens = limits
    rows = []
    for power in range(3):
        shape, params = min(family, key=lambda each: abs(math.log(each[1] / (family[first][1] * SIZE_FACTOR**power))))
        if params * most > MOST_EPOCHS * unique_tokens:
            return None
        ratios = (FEWEST_PER_PARAM, math.sqrt(FEWEST_PER_PARAM * most), most)
        rows.append([_rung(shape, params, params * ratio, speed(params), eval_tokens) for ratio in ratios])
    return rows if len({row[0].params for row in rows}) == len(rows) else None


def _all_runs(rows: Sequence[Sequence[Rung]]) -> tuple[Rung, ...]:
    """The grid with trials of rates and seeds, in the order in which they are to run: trials, then by cost."""
    trials = [
        replace(row[0], name=f"{row[0].name}-lr{rate:g}", learning_rate=rate, is_trial=True) for row in rows[:NUM_RATED] for rate in RATES
    ]  # fmt: skip
    others = [rung for number, row in enumerate(rows) for rung in (row[1:] if number < NUM_RATED else row)]
    others += [replace(rows[1][1], name=f"{rows[1][1].name}-seed{seed}", seed=seed) for seed in range(1, NUM_SEEDS)]
    return (*sorted(trials, key=lambda rung: rung.predicted_s), *sorted(others, key=lambda rung: rung.predicted_s))


def plan_ladder(budget_s: float, vocab_size: int, unique_tokens: int, eval_tokens: int, speed: Callable[[int], float]) -> Ladder:
    """The largest ladder that the time allows.

    Args:
        speed: tokens per second of training, by parameters.

    Raises:
        InfeasibleError: not even the smallest one fits.
    """
    family = [(shape, shape.params) for shape in shapes(vocab_size)]
    grids = (_grid(first, most, family, speed, (unique_tokens, eval_tokens)) for first in range(len(family)) for most in MOST_PER_PARAM)
    ladders = [Ladder(_all_runs(rows), vocab_size, unique_tokens, eval_tokens) for rows in grids if rows is not None]
    least_s = min((ladder.predicted_s for ladder in ladders), default=math.inf)
    affordable = [ladder for ladder in ladders if ladder.predicted_s <= BUDGET_FRACTION * budget_s]
    best = max(affordable, key=lambda ladder: ladder.predicted_s, default=None)
    if best is None:
        takes = f"the smallest one takes {least_s / BUDGET_FRACTION / 60:.1f} minutes on this machine"
        reason = takes if least_s < math.inf else f"{unique_tokens:,} tokens of text are too few"
        fix = "raise --minutes, or give more text with --data"
        raise InfeasibleError(f"error: no ladder fits into the {budget_s / 60:.1f} minutes that are left: {reason}\n  fix  {fix}")
    return best


def rate_at(hidden_size: int, best: Sequence[tuple[int, float]]) -> float:
    """Learning rate of a width from the best ones of others: a power law through two of them, kept within the rates that were tried.

    Example:
        >>> rate_at(64, [(16, 4e-3), (32, 2e-3)])
        0.0015
    """
    (narrow, low), (wide, high) = best[0], best[-1]
    if narrow == wide:
        return low
    slope = math.log(high / low) / math.log(wide / narrow)
    return float(min(max(high * (hidden_size / wide) ** slope, min(RATES)), max(RATES)))


def plan_of(rung: Rung, ladder: Ladder, data: str, learning_rate: float) -> dict[str, Any]:
    """The plan file of a run."""
    plan = {
        "schema_version": 1, "model": Shape(rung.hidden_size, ladder.vocab_size).config,
        "workload": {"seq_len": SEQ_LEN, "global_batch_size": rung.batch, "tokens": float(rung.tokens), "precision": "fp32"},
        "cluster": {"accelerator": "cpu-local", "num_devices": 1}, "layout": {"micro_batch_size": _micro_batch(rung.batch)},
        "training": {
            "data": data, "num_steps": rung.steps, "warmup_steps": round(WARMUP_FRACTION * rung.steps), "learning_rate": learning_rate,
            "min_lr_fraction": 0.0, "seed": rung.seed, "eval_tokens": ladder.eval_tokens, "checkpoint_every_steps": max(rung.steps // 4, 1),
            "keep_checkpoints": 1,
        },
    }  # fmt: skip
    make_run_config(_request(plan))
    return plan


def _micro_batch(batch: int) -> int:
    """The largest divisor up to 16."""
    return next(size for size in range(16, 0, -1) if batch % size == 0)


def _request(plan: dict[str, Any]) -> Any:
    from planner.plan import build_request

    return build_request(plan)
