"""What must stand before a run starts: its folder with the plan in it, and its token shards."""

from __future__ import annotations

import json
from pathlib import Path

from planner.errors import InputError
from planner.files import to_yaml, write_text
from planner.plan import spec_to_plain
from reftrain.config import RunConfig

__all__ = ["prepare_data", "prepare_folder"]

LARGEST_VOCAB = 4096
"""Of the tokenizer trained for the shipped corpus; its 14 MB hold too few words for more."""


def prepare_folder(config: RunConfig, out: Path, resume: bool) -> None:
    """Makes the run's folder and writes `plan.yaml` into it: the request as it was, with what the trainer filled in.

    Raises:
        InputError: the folder holds a run already, or cannot be written.
    """
    file = out / "plan.yaml"
    if file.exists() and not resume:
        raise InputError.single("--out", str(out), "holds a run already", "use --resume to go on with it, or another folder")
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError.single("--out", str(out), f"cannot be made ({error.strerror})", "choose another folder") from None
    plan = {**spec_to_plain(config.request), "layout": spec_to_plain(config.layout), "training": spec_to_plain(config.training)}
    write_text(file, to_yaml(json.loads(json.dumps(plan))))


def prepare_data(config: RunConfig, out: Path) -> str:
    """The folder of token shards (or `synthetic`). The shipped corpus is tokenized once, into the run's folder."""
    data = config.training.data
    if data != "corpus":
        return data
    folder = out / "data"
    if not (folder / "train" / "index.json").is_file():
        from reftrain.text.prepare import prepare_corpus

        prepare_corpus(folder, vocab_size=min(config.model.vocab_size, LARGEST_VOCAB))
    return str(folder)
