"""From sample positions to this rank's microbatches. Stateless: what a step reads follows from the position of its first sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from planner.errors import InputError
from reftrain.attention import cp_positions
from reftrain.config import RunConfig
from reftrain.data import SyntheticDataset, TokenDataset
from reftrain.example_batches import ExampleBatches, open_examples
from reftrain.kernels import IGNORED
from reftrain.parallel import Ranks

__all__ = ["Batches", "open_batches"]

NUM_SPECIAL = 4
"""Ids below this are special tokens of our tokenizers; the last of them is the mask."""
MASK_ID = 3


@dataclass(frozen=True)
class Batches:
    """Where a run's samples come from."""

    config: RunConfig
    ranks: Ranks
    train: Any
    valid: TokenDataset | None

    def microbatches(self, position: int) -> list[tuple[Tensor, Tensor]]:
        """(tokens, targets), each [micro_batch_size, S/cp], of the step whose first sample is `position`.

        Sample `position + (j * dp + r) * micro_batch_size + i` is row i of microbatch j on data-parallel rank r, so that every
        layout with the same micro_batch_size sums the same microbatches.
        """
        layout, size = self.config.layout, self.config.layout.micro_batch_size
        found = []
        for j in range(self.config.num_microbatches):
            first = position + (j * layout.dp + self.ranks.dp_rank) * size
            windows = self.train.sequences(first, size, self.config.seq_len, self.config.training.seed)
            found.append(self._to_device(*self._targets(windows, first)))
        return found

    def weights(self, position: int) -> None:
        """All microbatches count the same."""

    def facts(self) -> dict[str, Any]:
        """Nothing that the data's own report does not say."""
        return {}

    def _targets(self, windows: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Next tokens for a decoder; for an encoder a fixed number of masked tokens per sample."""
        if self.config.model.is_causal:
            return windows[:, :-1], windows[:, 1:]
        tokens = windows[:, :-1].copy()
        targets = np.full_like(tokens, IGNORED)
        num_masked = max(round(self.config.training.mask_fraction * tokens.shape[1]), 1)
        for row in range(len(tokens)):
            seed = hashlib.sha256(f"mask/{self.config.training.seed}/{first + row}".encode()).digest()
            chosen = np.random.Generator(np.random.Philox(int.from_bytes(seed[:8], "big"))).permutation(tokens.shape[1])[:num_masked]
            targets[row, chosen] = tokens[row, chosen]
            tokens[row, chosen] = MASK_ID
        return tokens, targets

    def _to_device(self, tokens: np.ndarray, targets: np.ndarray) -> tuple[Tensor, Tensor]:
        pair = torch.from_numpy(np.ascontiguousarray(tokens)), torch.from_numpy(np.ascontiguousarray(targets))
        cp_mesh = self.ranks.axes.cp_mesh
        if cp_mesh is not None:
            mine = cp_positions(self.config.seq_len, cp_mesh.size(), cp_mesh.get_local_rank())
            pair = pair[0][:, mine], pair[1][:, mine]
        return pair[0].to(self.ranks.device, non_blocking=True), pair[1].to(self.ranks.device, non_blocking=True)

    def validation(self) -> Iterator[tuple[list[tuple[Tensor, Tensor]], None]]:
        """Lists of microbatches over held-out text, the same on every rank of a data-parallel replica; each token once, up to eval_tokens.

        Beside each their weights, which are all the same.
        """
        config = self.config
        if self.valid is None:
            return
        size, layout = config.layout.micro_batch_size, config.layout
        per_list = config.num_microbatches if layout.pp > 1 else 1
        rows = size * layout.dp * per_list
        count = min(max(config.training.eval_tokens // (rows * config.seq_len), 1), self.valid.num_sequences(config.seq_len) // rows)
        for i in range(count):
            found = []
            for j in range(per_list):
                first = i * rows + (j * layout.dp + self.ranks.dp_rank) * size
                windows = self.valid.sequences(first, size, config.seq_len, 0, shuffle=False)
                found.append(self._to_device(*self._targets(windows, first)))
            yield found, None


def open_batches(config: RunConfig, ranks: Ranks, data: str) -> Batches | ExampleBatches:
    """The samples of `data`: `synthetic`, a folder that `reftrain data prepare` wrote, or a file of examples.

    Raises:
        InputError: no such data, damaged, or with more distinct tokens than the model has.
    """
    if config.has_examples and data == config.training.data:
        return open_examples(config, ranks)
    if data == "synthetic":
        source = SyntheticDataset(config.model.vocab_size, config.training.seed)
        return Batches(config, ranks, source, None)
    train = TokenDataset.open(f"{data}/train")
    held_out = TokenDataset.open(f"{data}/valid") if Path(data, "valid").exists() else None
    for part in (train, held_out):
        if part is not None and part.vocab_size > config.model.vocab_size:
            raise InputError.single(
                "training.data", str(part.folder), f"has {part.vocab_size} distinct tokens, and the model's vocab_size is {config.model.vocab_size}",
                f"prepare it with --vocab-size {config.model.vocab_size}, or use a model with at least {part.vocab_size}",
            )  # fmt: skip
    train.num_sequences(config.seq_len)  # refuses a text shorter than one sample
    is_too_short = held_out is None or held_out.num_tokens <= config.seq_len
    return Batches(config, ranks, train, None if is_too_short else held_out)
