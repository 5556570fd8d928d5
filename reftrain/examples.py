"""Examples to fine-tune on: instructions, translations, questions; read strictly, tokenized, and laid out in sequences.

In: a jsonl file (or .jsonl.gz), one object a line. Out: `ExampleRows`, whose targets are the tokens of responses alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.errors import InputError, Problem, nearest
from reftrain.kernels import IGNORED
from reftrain.text.jsonl import read_jsonl
from reftrain.tokenizer import Tokenizer

__all__ = ["FORMATS", "Example", "ExampleRows", "lay_out", "read_examples", "split_off"]

Int64Array = npt.NDArray[np.int64]
MAX_PROBLEMS = 8
OPEN_ROWS = 64
"""Sequences that packing looks at for room; more would fill them little better."""
UNREAD_KEYS = ("id",)


@dataclass(frozen=True)
class Format:
    """One kind of example: its keys, and the text made of them."""

    prompt_key: str
    response_key: str
    prompt: str
    response: str = " {}"
    context: str = ""
    """Of the optional key `context`, before the prompt."""

    @property
    def keys(self) -> tuple[str, ...]:
        """What an object may hold."""
        return (self.prompt_key, self.response_key, *(("context",) if self.context else ()))


FORMATS = (
    Format("prompt", "response", "{}\n", "{}"),
    Format("source", "target", "Source: {}\nTarget:"),
    Format("question", "answer", "Question: {}\nAnswer:", context="Context: {}\n"),
)


@dataclass(frozen=True)
class Example:
    """What the model is given, and what it should say."""

    prompt: str
    response: str


def read_examples(path: str | Path) -> list[Example]:
    """The examples of a file, in its order.

    Raises:
        InputError: an unreadable file, no examples, or the first few that are wrong: an unknown or missing key, a value that is no text or blank.
    """
    found: list[Example] = []
    problems: list[Problem] = []
    for number, values in enumerate(read_jsonl(path), 1):
        wrong = _problems(values, f"{path}, object {number}")
        problems += wrong
        if len(problems) >= MAX_PROBLEMS:
            break
        if not wrong:
            found.append(_example(values))
    if problems:
        raise InputError(*problems[:MAX_PROBLEMS])
    if not found:
        raise InputError.single("--data", str(path), "holds no examples", 'write one object a line, e.g. {"prompt": "...", "response": "..."}')
    return found


def _format(values: dict[str, Any]) -> Format | None:
    return next((form for form in FORMATS if form.prompt_key in values or form.response_key in values), None)


def _problems(values: dict[str, Any], where: str) -> list[Problem]:
    form = _format(values)
    if form is None:
        kinds = " or ".join(f"{f.prompt_key} and {f.response_key}" for f in FORMATS)
        return [Problem("-", sorted(values), f"must have the keys {kinds}", "rename the keys of the file", where)]
    problems = []
    for key in (form.prompt_key, form.response_key, *(("context",) if "context" in values and form.context else ())):
        value = values.get(key)
        if not isinstance(value, str) or not value.strip():
            rule = "is missing" if key not in values else "must be text that is not blank"
            problems.append(Problem(key, value, rule, "mend the object, or leave it out", where))
    for key in values:
        if key not in (*form.keys, *UNREAD_KEYS):
            close = nearest(key, form.keys)
            fix = f"did you mean {close[0]}?" if close else "remove it"
            problems.append(Problem(str(key), values[key], f"is no key of an object with {form.prompt_key} and {form.response_key}", fix, where))
    return problems


def _example(values: dict[str, Any]) -> Example:
    form = _format(values)
    assert form is not None
    context = form.context.format(values["context"]) if values.get("context") else ""
    return Example(context + form.prompt.format(values[form.prompt_key]), form.response.format(values[form.response_key]))


def split_off(examples: Sequence[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """(for training, held out): chosen by a hash of the prompt, so that the same prompt is never in both, whatever else the file holds.

    Example:
        >>> [len(part) for part in split_off([Example(f"{i}", "") for i in range(100)], 0.2)]
        [86, 14]
    """
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        digest = hashlib.sha256(example.prompt.encode()).digest()
        parts[int.from_bytes(digest[:7], "big") < fraction * 2**56].append(example)
    return parts


@dataclass(frozen=True)
class ExampleRows:
    """Examples laid out in sequences; the last row is blank, for batches that are not full.

    Shapes: tokens, targets and documents [rows + 1, seq_len]. A document's tokens see each other alone; its targets are those of its response
    and the end of text behind it, everything else is ignored.
    """

    tokens: Int64Array
    targets: Int64Array
    documents: Int64Array
    is_packed: bool
    text_bytes: int
    """UTF-8 bytes of the responses."""
    num_examples: int
    num_too_long: int
    """Left out: longer than a sequence."""

    @property
    def num_rows(self) -> int:
        """Sequences of an epoch."""
        return len(self.tokens) - 1

    @property
    def targets_in_row(self) -> Int64Array:
        """How many tokens of each row take part in the loss, [rows + 1]."""
        counts: Int64Array = (self.targets != IGNORED).sum(axis=1)
        return counts

    @property
    def num_tokens(self) -> int:
        """Tokens that take part in the loss."""
        return int(self.targets_in_row.sum())

    def facts(self) -> dict[str, Any]:
        """What it holds, for the log."""
        used = int((self.documents >= 0).sum())
        return {
            "examples": self.num_examples, "too_long": self.num_too_long, "sequences": self.num_rows, "target_tokens": self.num_tokens,
            "filled_fraction": used / max(self.num_rows * self.tokens.shape[1], 1),
        }  # fmt: skip


def lay_out(examples: Sequence[Example], tokenizer: Tokenizer, seq_len: int, *, is_packed: bool) -> ExampleRows:
    """Tokens of examples in rows of `seq_len`: end of text, prompt, response, end of text; inputs and targets are one apart.

    Raises:
        InputError: all of them are longer than a sequence.
    """
    end = tokenizer.end_of_text_id
    prompts = tokenizer.encode_batch([example.prompt for example in examples])
    responses = tokenizer.encode_batch([example.response for example in examples])
    streams = [np.array([end, *prompt, *response, end]) for prompt, response in zip(prompts, responses, strict=True)]
    fitting = [i for i, stream in enumerate(streams) if len(stream) - 1 <= seq_len]
    if examples and not fitting:
        shortest = min(len(stream) for stream in streams) - 1
        raise InputError.single("workload.seq_len", seq_len, f"is shorter than every example; the shortest has {shortest} tokens", "raise it")
    rows = _pack([len(streams[i]) - 1 for i in fitting], seq_len) if is_packed else [[n] for n in range(len(fitting))]
    tokens = np.full((len(rows) + 1, seq_len), end, np.int64)
    targets, documents = np.full_like(tokens, IGNORED), np.full_like(tokens, -1)
    for row, members in enumerate(rows):
        start = 0
        for document, n in enumerate(members):
            stream, num_prompt = streams[fitting[n]], len(prompts[fitting[n]])
            stop = start + len(stream) - 1
            tokens[row, start:stop] = stream[:-1]
            targets[row, start + num_prompt : stop] = stream[1 + num_prompt :]
            documents[row, start:stop] = document
            start = stop
    text_bytes = sum(len(examples[i].response.encode()) for i in fitting)
    return ExampleRows(tokens, targets, documents, is_packed, text_bytes, len(fitting), len(examples) - len(fitting))


def _pack(lengths: Iterable[int], seq_len: int) -> list[list[int]]:
    """Which examples share a row: each goes into the first of the open rows that has room for it.

    Example:
        >>> _pack([5, 6, 3, 4, 2], 8)
        [[0, 2], [1, 4], [3]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for number, length in enumerate(lengths):
        first = max(len(rows) - OPEN_ROWS, 0)
        place = next((row for row in range(first, len(rows)) if room[row] >= length), None)
        if place is None:
            rows.append([])
            room.append(seq_len)
            place = len(rows) - 1
        rows[place].append(number)
        room[place] -= length
    return rows
