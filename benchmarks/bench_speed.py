"""How long the planner takes, as whole processes. Run: python benchmarks/bench_speed.py. Layouts per second: bench_search.py.

Prints medians; ratios between machines differ less than seconds do, so a bare `python -c pass` stands beside the processes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

ESTIMATE = ("estimate", "--model", "llama-3.1-8b", "--accelerator", "h100-80gb-sxm", "--num-devices", "64", "--tokens", "1e12")
COMPLETE = (
    *ESTIMATE, "--dp-replicate", "1", "--dp-shard", "64", "--tp", "1", "--cp", "1", "--pp", "1", "--num-virtual-stages", "1", "--schedule", "1f1b",
    "--ep", "1", "--zero-stage", "3", "--sequence-parallel", "false", "--micro-batch-size", "1",
)  # fmt: skip


def median_s(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of `run`, after one run that warms caches."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def process(*arguments: str) -> Callable[[], object]:
    """A whole Python process."""
    return lambda: subprocess.run([sys.executable, *arguments], check=False, capture_output=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    for name, run in (
        ("python -c pass", process("-c", "pass")),
        ("planner --help", process("-m", "planner", "--help")),
        ("planner estimate, layout searched", process("-m", "planner", *ESTIMATE)),
        ("planner estimate, layout given", process("-m", "planner", *COMPLETE)),
    ):
        print(f"{name:36s} {median_s(run, options.repeats):8.3f} s")


if __name__ == "__main__":
    main()
