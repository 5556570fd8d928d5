"""How far the fit of step times carries: whole sources left out, a generation of accelerators left out, and how long a fit takes.

    python benchmarks/bench_time_fit.py speed          # seconds of one fit of all stacks to the whole table
    python benchmarks/bench_time_fit.py sources        # each source predicted by a fit and nearby runs without it
    python benchmarks/bench_time_fit.py generations    # fitted on A100, used on H100; fitted on H100, used on Blackwell
    python benchmarks/bench_time_fit.py five           # a source left out, then calibrated with five of its own runs

Groups left out in five folds, the milder question, are what `planner calibrate --every-stack` prints.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time

import numpy as np

from planner.cases import Measured, read_row
from planner.errors import InputError
from planner.files import DATA_DIR
from planner.fitting import NAMES, Level, Limits, fit_cases, make_batches, predict_s
from planner.measurements import read_rows
from planner.stack_fits import cross_validate, fit_stacks, levels_of

GENERATIONS = {"A100": ("a100", "a800"), "H100": ("h100", "h200", "h800", "gh200"), "Blackwell": ("b200", "b300", "gb200", "gb300")}
CALIBRATED, NUM_DRAWS = ("xlstm-llama", "vtrain-multi", "maxtext-readme", "tpu-recipes", "llm-foundry"), 5
"""Sources that carry over worst, and one that carries over well."""
STEPS: list[Measured] = []


def read_steps() -> list[Measured]:
    """Every row of the shipped table that can be expressed."""
    found = []
    for row in read_rows(DATA_DIR / "measurements" / "steps.csv.gz"):
        try:
            step = read_row(row)
        except InputError:
            continue
        found += [step] if step is not None else []
    return found


def told(name: str, errors: np.ndarray, held: np.ndarray) -> str:
    """One line of the table."""
    median, tail = np.median(np.abs(errors)), np.quantile(np.abs(errors), 0.9)
    return f"{name:<36}{len(errors):>6}{median:>9.1%}{tail:>9.1%}{np.median(errors):>+9.1%}{np.mean(held):>9.0%}"


def say(line: str) -> None:
    """To standard output, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def left_out(source: str) -> tuple[np.ndarray, np.ndarray]:
    """(errors, whether the 80% interval holds) of a source, predicted without it."""
    folds = np.array([0 if step.source == source else -1 for step in STEPS])
    return judged(STEPS, folds)


def judged(steps: list[Measured], folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the steps of fold 0; those of fold -1 are always known."""
    predicted_s, spread = cross_validate(steps, folds)
    own = folds == 0
    measured_s = np.array([step.step_s for step in steps])[own]
    ratio = predicted_s[own] / measured_s
    return ratio - 1, np.abs(np.log(ratio)) <= 1.2816 * spread[own]


def sources() -> None:
    """Each source left out."""
    names = sorted({step.source for step in STEPS})
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(left_out, names, chunksize=1)
    for name, (errors, held) in zip(names, found, strict=True):
        say(told(name, errors, held))
    errors, held = (np.concatenate(values) for values in zip(*found, strict=True))
    say(told("all", errors, held))
    say(f"middle one of {len(names)} sources: {np.median([np.median(np.abs(own)) for own, _ in found]):.1%}")


def generations() -> None:
    """A generation of accelerators left out."""
    for known, new in (("A100", "H100"), ("H100", "Blackwell")):
        steps = [step for step in STEPS if step.job.cluster.accelerator.id.startswith(GENERATIONS[known] + GENERATIONS[new])]
        folds = np.array([0 if step.job.cluster.accelerator.id.startswith(GENERATIONS[new]) else -1 for step in steps])
        say(told(f"fitted on {known}, used on {new}", *judged(steps, folds)))


def five() -> None:
    """Some sources left out; then five of their runs calibrate, and the others judge."""
    batches, measured_s = make_batches([step.work for step in STEPS]), np.array([step.step_s for step in STEPS])
    weight, limits, numbers = np.array([step.weight_factor for step in STEPS]), Limits.physical(), np.random.default_rng(0)
    for source in CALIBRATED:
        rows = np.flatnonzero([step.source == source for step in STEPS])
        without = fit_cases(batches, measured_s, np.where(np.isin(np.arange(len(STEPS)), rows), 0.0, weight), levels_of(STEPS))
        own, start = make_batches([STEPS[i].work for i in rows]), without.theta[rows]
        before = np.median(np.abs(predict_s(own, start, limits) / measured_s[rows] - 1))
        after = []
        for _ in range(NUM_DRAWS):
            picked = np.isin(np.arange(len(rows)), numbers.permutation(len(rows))[:5])
            fit = fit_cases(own, measured_s[rows], picked.astype(float), [Level("stack", ("all",) * len(rows), NAMES)], start, limits)
            after.append(np.median(np.abs(predict_s(own, fit.theta, limits) / measured_s[rows] - 1)[~picked]))
        say(f"{source:<36}{len(rows):>6}{before:>9.1%} before, {np.median(after):.1%} after ({min(after):.1%} to {max(after):.1%})")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "sources", "generations", "five"))
    what = parser.parse_args().what
    start = time.perf_counter()
    STEPS.extend(read_steps())
    say(f"{len(STEPS)} steps read in {time.perf_counter() - start:.1f} s")
    say(f"{'':<36}{'runs':>6}{'median':>9}{'p90':>9}{'bias':>9}{'holds':>9}" if what != "speed" else "")
    if what == "speed":
        start = time.perf_counter()
        fits = fit_stacks(STEPS, num_folds=0)
        say(f"{len(fits.fit.added)} unknowns fitted in {time.perf_counter() - start:.1f} s")
    else:
        {"sources": sources, "generations": generations, "five": five}[what]()


if __name__ == "__main__":
    main()
