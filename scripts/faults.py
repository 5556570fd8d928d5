"""Breaks whole training runs in every way a machine does, and prints how many faults landed and how many runs survived them.

    python scripts/faults.py --kills 200 --sigterms 50 --rank-kills 20 --bad-losses 30 --disks 50 --flips 50

A fault counts as landed when the run had done a new step and that fault ended it (or was met by it); as survived when, after the last
resume, the losses of all steps and the SHA-256 of weights and optimizer states were those of a run that nobody disturbed. Anything else
ends the campaign with a traceback. The seed is printed; the same seed sends the same faults, at the instants that the machine's timing gives.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.reftrain import fault_campaigns as campaigns

MODELS = {
    "fp32": {}, "bf16": {"precision": "bf16"}, "dropout": {"dropout": 0.1}, "checkpoint every step": {"every": 1},
    "blocking saves": {"async_checkpoints": False, "every": 2}, "rollback": {"steps": 60},
}  # fmt: skip
POISON = {"rollback": {"poison": ("nan", 8 * 24, 8 * 29)}}
COLUMNS = ("landed", "survived", "mid-accumulation", "while saving", "resumed past step 0", "rounds", "slowest in ms")


def shares(count: int, number: int) -> list[int]:
    """`count` in `number` parts that differ by one at most."""
    return [count // number + (i < count % number) for i in range(number)]


def main() -> None:
    """Runs the campaigns asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, default in {"kills": 200, "sigterms": 50, "rank-kills": 20, "bad-losses": 30, "disks": 50, "flips": 50}.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    numbers, folder = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="faults-"))
    print(f"seed {options.seed}, runs in {folder}")
    print(f"{'fault':<44}" + "".join(f"{name:>20}" for name in COLUMNS) + f"{'seconds':>10}", flush=True)

    def show(name: str, counts: collections.Counter[str], began: float) -> None:
        print(f"{name:<44}" + "".join(f"{counts.get(c, '-'):>20}" for c in COLUMNS) + f"{time.monotonic() - began:>10.0f}", flush=True)

    for i, (name, keys) in enumerate(MODELS.items()):
        plan, fault = campaigns.write_plan(folder, name.replace(" ", "-"), **keys), POISON.get(name, {})
        reference = campaigns.run_reference(plan, folder / f"{plan.stem}-reference", **fault)
        began, part = time.monotonic(), shares(options.kills, len(MODELS))[i]
        if part:
            show(f"kill -9, {name}", campaigns.kills(folder, plan, reference, part, numbers, **fault), began)
        # Not where samples are bad: the checkpoint that SIGTERM leaves is one more to roll back to, so that the run may rightly take another course.
        began, part = time.monotonic(), 0 if fault else shares(options.sigterms, len(MODELS) - len(POISON))[i]
        if part:
            show(f"SIGTERM, {name}", campaigns.terms(folder, plan, reference, part, numbers), began)
        if name == "fp32":
            for label, run, count in (("disk full", campaigns.full_disks, options.disks), ("bit flip", campaigns.bit_flips, options.flips)):
                began = time.monotonic()
                if count:
                    show(label, run(folder, plan, reference, count, numbers), began)
    began = time.monotonic()
    if options.bad_losses:
        plan = campaigns.write_plan(folder, "spoiled", steps=4 * options.bad_losses + 20)
        show("NaN, Inf or 100x in loss and gradients", campaigns.bad_losses(folder, plan, options.bad_losses, numbers), began)
    began = time.monotonic()
    if options.rank_kills:
        show("kill -9 of one rank of two", campaigns.rank_kills(folder, options.rank_kills, numbers), began)


if __name__ == "__main__":
    main()
