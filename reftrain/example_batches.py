"""From examples to this rank's microbatches, with the weight of each: a step's loss is the mean over all its target tokens.

Like `reftrain.batches` it has no state: what a step reads follows from the position of its first sample.
"""

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
from planner.files import read_json, read_yaml, to_json, write_text
from reftrain.config import RunConfig
from reftrain.data import permute
from reftrain.examples import ExampleRows, lay_out, read_examples, split_off
from reftrain.parallel import Ranks
from reftrain.tokenizer import Tokenizer

__all__ = ["ExampleBatches", "beside_weights", "find_tokenizer", "open_examples", "remember_examples"]

FILE = "examples.json"


@dataclass(frozen=True)
class ExampleBatches:
    """Where a fine-tuning run's samples come from; the interface of `reftrain.batches.Batches`."""

    config: RunConfig
    ranks: Ranks
    train: ExampleRows
    valid: ExampleRows | None

    def _rows(self, position: int, count: int) -> np.ndarray:
        """Rows of samples position .. position + count - 1: each epoch is a permutation of all rows."""
        positions = np.arange(position, position + count, dtype=np.int64)
        epochs, rows = positions // self.train.num_rows, positions % self.train.num_rows
        for epoch in np.unique(epochs):
            rows[epochs == epoch] = permute(rows[epochs == epoch], self.train.num_rows, f"{self.config.training.seed}:{epoch}")
        return rows

    def _mine(self, rows: np.ndarray) -> np.ndarray:
        """[microbatches, micro_batch_size] of this data-parallel rank; microbatch j of rank r holds samples (j * dp + r) * size onward."""
        layout = self.config.layout
        return rows.reshape(-1, layout.dp, layout.micro_batch_size)[:, self.ranks.dp_rank]

    def microbatches(self, position: int) -> list[tuple[Tensor, ...]]:
        """(tokens, targets[, documents]), each [micro_batch_size, S], of the step whose first sample is `position`."""
        rows = self._rows(position, self.config.global_batch_size)
        return [self._take(self.train, mine) for mine in self._mine(rows)]

    def weights(self, position: int) -> list[float]:
        """What the mean loss of each microbatch counts, see `_weights`."""
        return self._weights(self.train, self._rows(position, self.config.global_batch_size))

    def _weights(self, source: ExampleRows, rows: np.ndarray, num_targets: int | None = None) -> list[float]:
        """Targets of each microbatch over all targets, times dp: means over data-parallel ranks then are means over targets."""
        counts = source.targets_in_row[rows]
        mine = source.targets_in_row[self._mine(rows)].sum(axis=1)
        return [float(n) * self.config.layout.dp / max(num_targets or int(counts.sum()), 1) for n in mine]

    def _take(self, source: ExampleRows, rows: np.ndarray) -> tuple[Tensor, ...]:
        parts = (source.tokens[rows], source.targets[rows], *((source.documents[rows],) if source.is_packed else ()))
        return tuple(torch.from_numpy(part).to(self.ranks.device, non_blocking=True) for part in parts)

    def validation(self) -> Iterator[tuple[list[tuple[Tensor, ...]], list[float]]]:
        """(microbatches, weights) over the held-out examples, each once, up to eval_tokens; weighted losses' mean is one over all targets."""
        if self.valid is None:
            return
        size = self.config.layout.micro_batch_size * self.config.layout.dp
        num_rows = min(self.valid.num_rows, max(self.config.training.eval_tokens // self.config.seq_len, 1))
        rows = np.full(-(-num_rows // size) * size, self.valid.num_rows)  # filled up with the blank one
        rows[:num_rows] = np.arange(num_rows)
        lists = rows.reshape(-1, size)
        num_targets = int(self.valid.targets_in_row[rows].sum())
        for part in lists:
            weights = [weight * len(lists) for weight in self._weights(self.valid, part, num_targets)]
            yield [self._take(self.valid, mine) for mine in self._mine(part)], weights

    def facts(self) -> dict[str, Any]:
        """What there is, for the log."""
        return {"train": self.train.facts(), **({"valid": self.valid.facts()} if self.valid else {})}


def open_examples(config: RunConfig, ranks: Ranks) -> ExampleBatches:
    """The examples that the plan names, tokenized and laid out.

    Raises:
        InputError: no such file, wrong examples, no tokenizer, or one with more tokens than the model has.
    """
    training, tokenizer = config.training, Tokenizer.load(find_tokenizer(config))
    if tokenizer.vocab_size > config.model.vocab_size:
        rule = f"has {tokenizer.vocab_size} tokens, and the model's vocab_size is {config.model.vocab_size}"
        raise InputError.single("training.tokenizer", str(find_tokenizer(config)), rule, "use the tokenizer that the model was trained with")
    examples = read_examples(training.data)
    held_out = read_examples(training.valid_data) if training.valid_data else []
    if not training.valid_data:
        examples, held_out = split_off(examples, training.valid_fraction)
    if not examples:
        raise InputError.single(
            "training.valid_fraction", training.valid_fraction, "leaves no example to train on", "lower it, or give more examples"
        )
    train, valid = (lay_out(part, tokenizer, config.seq_len, is_packed=training.packing) for part in (examples, held_out))
    return ExampleBatches(config, ranks, train, valid if valid.num_rows else None)


def find_tokenizer(config: RunConfig) -> Path:
    """The tokenizer.json that the plan names, else the one beside the weights that the run starts from.

    Raises:
        InputError: there is none.
    """
    training = config.training
    if training.tokenizer:
        return Path(training.tokenizer)
    for folder in beside_weights(Path(training.init_from)) if training.init_from else ():
        if (folder / "tokenizer.json").is_file():
            return folder / "tokenizer.json"
    rule = f"no tokenizer.json lies beside the weights ({training.init_from or 'and none are named'})"
    raise InputError.single("training.tokenizer", None, rule, "name one: --tokenizer FILE")


def beside_weights(source: Path) -> Iterator[Path]:
    """The folder of weights; of a run, also its data's."""
    yield source
    run = next((folder for folder in (source, *source.parents[:2]) if (folder / "plan.yaml").is_file()), None)
    if run is not None:
        yield run
        yield run / "data"
        plan = read_yaml(run / "plan.yaml")
        training = plan.get("training") if isinstance(plan, dict) else None
        if isinstance(training, dict) and isinstance(training.get("data"), str):
            yield Path(training["data"])


def remember_examples(config: RunConfig, out: Path) -> None:
    """Writes what the run trains on, by its SHA-256, and a copy of its tokenizer; refuses to go on with anything else.

    Raises:
        InputError: a file that cannot be read, or has changed since the run started.
    """
    tokenizer = find_tokenizer(config)
    files = {"data": config.training.data, "tokenizer": str(tokenizer)} | (
        {"valid_data": config.training.valid_data} if config.training.valid_data else {}
    )
    now = {key: _sha256(key, path) for key, path in files.items()}
    if (out / FILE).is_file():
        before = read_json(out / FILE)
        for key, digest in now.items():
            if before.get(key) != digest:
                rule = "is not the file that the run started with (another SHA-256)"
                raise InputError.single(f"training.{key}", files[key], rule, "put it back, or start in another folder", str(out / FILE))
        return
    write_text(out / FILE, to_json(now))
    Tokenizer.load(tokenizer).save(out / "tokenizer.json")


def _sha256(key: str, path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError.single(f"training.{key}", path, f"must be a readable file ({error.strerror})", "check the path") from None
