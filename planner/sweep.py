"""The product of some options' values, each combination estimated, as a CSV that a kill at any moment leaves whole.

In: a request and options with values. Out: rows of a file; what is in it already is not done again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from planner.errors import InputError
from planner.files import read_text, to_json, write_text
from planner.layout import describe_layout
from planner.plan import Plan, Request
from planner.sensitivity import check_option, estimate_changed

__all__ = ["OUTPUTS", "sweep"]

LARGEST_FILE_BYTES = 1 << 30
OUTPUTS: dict[str, Callable[[Plan], Any]] = {
    "fits": lambda plan: plan.fits,
    "peak_bytes": lambda plan: plan.memory.peak_bytes.value,
    "step_s": lambda plan: plan.time.step_s.value,
    "step_low_s": lambda plan: plan.time.step_s.low,
    "step_high_s": lambda plan: plan.time.step_s.high,
    "tokens_per_s": lambda plan: plan.time.tokens_per_s,
    "mfu": lambda plan: plan.time.mfu,
    "train_s": lambda plan: plan.time.train_s.value,
    "usd": lambda plan: None if plan.cost.usd is None else plan.cost.usd.value,
    "energy_kwh": lambda plan: plan.cost.energy_kwh,
    "loss_nats_per_token": lambda plan: None if plan.loss is None else plan.loss.nats_per_token.value,
    "layout": lambda plan: describe_layout(plan.layout),
}
"""Column -> where it is in a plan; empty where it is not known."""


def sweep(
    request: Request, vary: Mapping[str, Sequence[str]], out: str | Path, *, resume: bool = False, progress: Callable[[int, int], None] | None = None
) -> int:
    """Estimates every combination and adds its row to `out` at once; returns how many rows were added.

    Args:
        vary: option -> values as on the command line; the last one varies fastest.
        resume: go on with a file of the same sweep.

    Raises:
        InputError: an unknown option, a file that is there already, or one of another sweep.
    """
    for name, values in vary.items():
        check_option(name)
        if not values:
            raise InputError.single("--vary", name, "has no values", f"write --vary {name}=V1,V2")
    base = request.as_given()
    mark = hashlib.sha256(to_json({"base": base, "vary": list(vary)}).encode()).hexdigest()[:12]
    columns = [*vary, *OUTPUTS, "error", "sweep"]
    done = _open(Path(out), columns, list(vary), mark, resume=resume)
    combinations = list(product(*vary.values()))
    added = 0
    with open(out, "a", encoding="utf-8", newline="") as file:
        for place, values in enumerate(combinations):
            if values not in done:
                file.write(_line([*values, *_outputs(base, dict(zip(vary, values, strict=True))), mark]))
                file.flush()
                os.fsync(file.fileno())
                added += 1
            if progress is not None:
                progress(place + 1, len(combinations))
    return added


def _outputs(base: dict[str, Any], changes: dict[str, str]) -> Iterator[Any]:
    """Every output of one combination, and what was wrong with it."""
    try:
        plan, _ = estimate_changed(base, changes)
    except InputError as error:
        yield from ("" for _ in OUTPUTS)
        yield f"{error.problems[0].key}: {error.problems[0].rule}"
        return
    for read in OUTPUTS.values():
        value = read(plan)
        yield "" if value is None else value
    yield ""


def _line(values: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def _open(path: Path, columns: list[str], inputs: list[str], mark: str, *, resume: bool) -> set[tuple[str, ...]]:
    """The combinations that are in the file; a line that was cut off is dropped."""
    if not path.exists():
        write_text(path, _line(columns))
        return set()
    if not resume:
        raise InputError.single("--out", str(path), "is there already", "add --resume to go on with it, or name another file")
    text = read_text(path, LARGEST_FILE_BYTES)
    whole = text[: text.rfind("\n") + 1]
    rows = list(csv.DictReader(io.StringIO(whole)))
    if _line(columns) != whole[: len(_line(columns))] or any(row["sweep"] != mark for row in rows):
        raise InputError.single("--out", str(path), "holds another sweep: other options, or another base", "name another file")
    if whole != text:
        write_text(path, whole)
    return {tuple(row[name] for name in inputs) for row in rows}
