"""Optimizers: bytes of state per parameter and bytes moved per step."""

from __future__ import annotations

from dataclasses import dataclass

from planner.registry import unknown_name

__all__ = ["OPTIMIZERS", "Optimizer", "get_optimizer"]


@dataclass(frozen=True)
class Optimizer:
    """State per parameter, besides the fp32 master weight.

    `matrix_state_bytes` per parameter of a hidden weight matrix, `other_state_bytes` per parameter of embeddings, output
    head, norms and biases. `is_factored`: matrices keep one row and one column statistic instead (4 bytes each).
    Left out: the matrix products of Muon's five Newton-Schulz steps, about 5 * hidden_size / tokens per step of the model
    FLOPs (1% at 8192 and 4M tokens).
    """

    name: str
    matrix_state_bytes: float
    other_state_bytes: float
    is_factored: bool
    source: str


OPTIMIZERS: dict[str, Optimizer] = {
    o.name: o
    for o in (
        Optimizer("adamw", 8, 8, False, "arXiv:1711.05101: two fp32 moments"),
        Optimizer("sgd", 0, 0, False, "no state"),
        Optimizer("sgd_momentum", 4, 4, False, "one fp32 buffer"),
        Optimizer("adafactor", 0, 4, True, "arXiv:1804.04235 without first moment: row and column second moments; vectors unfactored"),
        Optimizer("adamw_8bit", 2 + 8 / 256, 8, False, "arXiv:2110.02861: two 8-bit moments, one fp32 scale per block of 256; embeddings in fp32"),
        Optimizer("muon", 4, 8, False, "Jordan et al. 2024: one momentum for hidden matrices, 5 Newton-Schulz steps; AdamW for the rest"),
    )
}


def get_optimizer(name: str) -> Optimizer:
    """The optimizer of that name.

    Raises:
        InputError: unknown name.
    """
    if name not in OPTIMIZERS:
        raise unknown_name("workload.optimizer", name, list(OPTIMIZERS))
    return OPTIMIZERS[name]
