"""How long the planner takes: whole processes, and layouts priced per second. Run: python benchmarks/bench_speed.py.

Prints medians; ratios between machines differ less than seconds do, so a bare `python -c pass` stands beside the processes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from planner.layout import PartialLayout
from planner.layout_space import layout_space
from planner.plan import build_request
from planner.pricing import LayoutTable, price_layouts
from planner.resolve import Job, resolve

ESTIMATE = ("estimate", "--model", "llama-3.1-8b", "--accelerator", "h100-80gb-sxm", "--num-devices", "64", "--tokens", "1e12")
COMPLETE = (
    *ESTIMATE, "--dp-replicate", "1", "--dp-shard", "64", "--tp", "1", "--cp", "1", "--pp", "1", "--num-virtual-stages", "1", "--schedule", "1f1b",
    "--ep", "1", "--zero-stage", "3", "--sequence-parallel", "false", "--micro-batch-size", "1",
)  # fmt: skip
SEARCH = {
    "model": "llama-3.1-405b",
    "workload": {"seq_len": 8192, "global_batch_size": 2048, "tokens": 15e12},
    "cluster": {"accelerator": "h100-80gb-sxm", "num_devices": 16384},
    "stack": "torchtitan",
}


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


def many_layouts(count: int) -> tuple[Job, LayoutTable, int]:
    """`count` layouts of Llama 3.1 405B on 16384 devices, and how many of them differ."""
    job = resolve(build_request(SEARCH))
    table = layout_space(job, PartialLayout())
    return job, table.take(np.resize(np.arange(len(table)), count)), len(table)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layouts", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    for name, run in (
        ("python -c pass", process("-c", "pass")),
        ("planner --help", process("-m", "planner", "--help")),
        ("planner estimate, layout searched", process("-m", "planner", *ESTIMATE)),
        ("planner estimate, layout given", process("-m", "planner", *COMPLETE)),
    ):
        print(f"{name:36s} {median_s(run, options.repeats):8.3f} s")
    job, table, distinct = many_layouts(options.layouts)
    seconds = median_s(lambda: price_layouts(job, table), options.repeats)
    groups = len(table.groups())
    print(
        f"{'price_layouts':36s} {seconds:8.3f} s  {len(table):,} layouts ({distinct:,} distinct, {groups} pipelines): {len(table) / seconds:,.0f}/s"
    )


if __name__ == "__main__":
    main()
