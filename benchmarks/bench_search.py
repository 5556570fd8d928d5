"""How fast and how well layouts are searched. Run: python benchmarks/bench_search.py speed|catalog|taste.

speed    every legal layout of Llama 3.1 405B on 16 to 16,384 H100 priced for time, memory and cost, beside `estimate` layout by layout
catalog  one model over every accelerator and offer of the catalog, and the memory that takes
taste    where the layouts that published runs used stand among all that fit
"""

from __future__ import annotations

import argparse
import csv
import io
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.best_layouts import complete_layout, exact_price
from planner.cases import read_row
from planner.economics import estimate_cost, estimate_goodput
from planner.errors import InputError
from planner.estimate import estimate
from planner.files import DATA_DIR, read_text
from planner.hardware import load_catalog
from planner.hardware_options import Hardware
from planner.layout import PartialLayout, describe_layout
from planner.layout_space import layout_space
from planner.measurements import Measurement
from planner.plan import Request, build_request
from planner.pricing import price_grids
from planner.resolve import Job, resolve
from planner.search import Wanted, search
from planner.units import GIB

LLAMA_405B = {
    "model": "llama-3.1-405b",
    "workload": {"seq_len": 8192, "global_batch_size": 2048, "tokens": 15e12, "recompute": "none"},
    "cluster": {"accelerator": "h100-80gb-sxm", "num_devices": 16384, "price": "2.50 USD/h"},
}
SIZES = [2**k for k in range(4, 15)]
RIVALS = "llm-analysis 3,700/s, Calculon 667/s, SimuMax 60/s (their own evaluation per layout, on one core)"
TASTE_SOURCES = ("llama3-paper", "palm-table3", "megatron-lm-a100", "megatron-bridge-perf", "megatron-bridge-cards-perf", "korthikanti-2205.05198")


def jobs_of(request: Request) -> Iterator[Job]:
    """The job under each policy of recomputation."""
    for recompute in ("none", "selective", "full"):
        yield resolve(request.model_copy(update={"workload": request.workload.model_copy(update={"recompute": recompute})}))


def price_all(request: Request, sizes: list[int]) -> tuple[int, float, float]:
    """(legal layouts priced for time, memory and cost, wall seconds, CPU seconds)."""
    wall, cpu, count = time.perf_counter(), time.process_time(), 0
    catalog = load_catalog(None)
    clusters = {n: catalog.resolve(request.cluster.model_copy(update={"num_devices": n})) for n in sizes}
    space = layout_space(next(jobs_of(request)), PartialLayout(), sizes)
    for job in jobs_of(request):
        num_steps = -(-job.tokens // (job.global_batch_size * job.seq_len))
        for prices in price_grids(job, space.grids):
            for n, size in enumerate(prices.grid.num_devices.tolist()):
                cluster = clusters[size]
                estimate_cost(prices.step_s[:, :, n], num_steps, cluster, estimate_goodput(size / cluster.node_size))
            count += int(np.count_nonzero(prices.grid.legal))
    return count, time.perf_counter() - wall, time.process_time() - cpu


def speed() -> None:
    """Prints layouts per second."""
    request = build_request(LLAMA_405B)
    price_all(request, SIZES[:2])
    for sizes in (SIZES[-3:], SIZES[-6:], SIZES):
        count, wall, cpu = price_all(request, sizes)
        print(f"{len(sizes):3} sizes up to 16,384: {count:9,} legal layouts, {wall:.2f} s ({cpu:.2f} s of CPU): {count / cpu:,.0f} layouts/s")
    job = next(jobs_of(request))
    grids = layout_space(job, PartialLayout()).grids
    layouts = [grid.layout(int(index)) for grid in grids[::9] for index in np.flatnonzero(grid.legal)[:3]][:60]
    start = time.process_time()
    for layout in layouts:
        estimate({**LLAMA_405B, "layout": layout.model_dump()})
    one = (time.process_time() - start) / len(layouts)
    print(f"estimate, layout by layout: {1 / one:,.0f}/s; rivals: {RIVALS}")


def over_catalog() -> None:
    """Prints the time of a search over all that the catalog has."""
    request = build_request(
        {
            "model": "llama-3.1-8b",
            "workload": {"seq_len": 8192, "global_batch_size": 512, "tokens": 1e12},
            "cluster": {"accelerator": "h100", "num_devices": 64},
        }
    )
    everywhere = Hardware(accelerators=["any"], offers=["any"])
    for objective, pareto in (("time", False), ("cost", False), ("cost", True)):
        wall, cpu = time.perf_counter(), time.process_time()
        found = search(request, everywhere, Wanted(objective=objective, pareto=pareto, top=1))  # type: ignore[arg-type]
        used = f"{time.perf_counter() - wall:.2f} s ({time.process_time() - cpu:.2f} s of CPU)"
        print(
            f"{objective}{', Pareto front' if pareto else ''}: {used}, {found.num_jobs} machines and policies, {found.num_pruned} not looked at, "
            f"{found.counts.priced:,} layouts priced"
        )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB:.2f} GiB")


def expert(model: str, accelerator: str, num_devices: int, stack: str, workload: dict[str, object], layout: dict[str, object]) -> dict[str, object]:
    """A request with the keys of a layout that were published."""
    cluster = {"accelerator": accelerator, "num_devices": num_devices}
    return {"model": model, "stack": stack, "workload": {"tokens": 1e12, **workload}, "cluster": cluster, "layout": layout}


EXPERTS = {
    "Llama 3.1 405B, 16,384 H100 (arXiv:2407.21783, table 4)": expert(
        "llama-3.1-405b", "h100-80gb-sxm", 16384, "megatron-core", {"seq_len": 8192, "global_batch_size": 2048, "recompute": "none"},
        {"tp": 8, "cp": 1, "pp": 16, "micro_batch_size": 1},
    ),
    "Llama 3.1 405B, 8,192 H100 (same)": expert(
        "llama-3.1-405b", "h100-80gb-sxm", 8192, "megatron-core", {"seq_len": 8192, "global_batch_size": 2048, "recompute": "none"},
        {"tp": 8, "cp": 1, "pp": 16, "micro_batch_size": 1},
    ),
    "Llama 3.1 405B, long context (same)": expert(
        "llama-3.1-405b", "h100-80gb-sxm", 16384, "megatron-core", {"seq_len": 131072, "global_batch_size": 128, "recompute": "none"},
        {"tp": 8, "cp": 16, "pp": 16, "micro_batch_size": 1},
    ),
    "MT-NLG 530B, 2,240 A100 (arXiv:2201.11990, 3.2)": expert(
        "megatron-529.6b", "a100-80gb-sxm", 2240, "megatron-2021", {"seq_len": 2048, "global_batch_size": 1920, "recompute": "full"},
        {"tp": 8, "pp": 35, "micro_batch_size": 1},
    ),
    "PaLM 540B, 6,144 TPU v4 (arXiv:2204.02311, section 4)": expert(
        "palm-540b", "tpu-v4", 6144, "maxtext", {"seq_len": 2048, "global_batch_size": 2048, "recompute": "selective"}, {"tp": 12, "pp": 1, "cp": 1},
    ),
    "DeepSeek-V3, 2,048 H800 (arXiv:2412.19437, 3.2)": expert(
        "deepseek-v3", "h800-80gb-sxm", 2048, "megatron-core",
        {"seq_len": 4096, "global_batch_size": 15360, "recompute": "selective", "precision": "fp8"},
        {"tp": 1, "cp": 1, "pp": 16, "ep": 64, "micro_batch_size": 1},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Standing:
    """Where a published layout stands among all that fit."""

    source: str
    name: str
    share_better: float
    times_best: float
    fits: bool
    best: str


def stand(row: Measurement) -> Standing | None:
    """None where the row does not say its layout, or cannot be expressed."""
    try:
        found = read_row(row)
    except InputError:
        return None
    if found is None or not found.request.layout.is_complete:
        return None
    name = f"{row.text('model')} {row.text('num_devices')} x {row.text('accelerator')}"
    return of_request(name, found.request, row.text("source"))


def of_request(name: str, request: Request, source: str) -> Standing:
    """The layout that a request names, keys that it leaves open as fast as may be, among all layouts that fit under any policy."""
    job = resolve(request)
    layout, _ = complete_layout(job, request.layout)
    own_s, own_bytes = exact_price(job, layout)
    limit = job.cluster.accelerator.memory_bytes
    times: list[np.ndarray] = []
    best: tuple[float, str] = (np.inf, "")
    for policy in jobs_of(request):
        for prices in price_grids(policy, layout_space(policy, PartialLayout()).grids):
            fits = prices.grid.legal & (prices.peak_bytes <= limit)
            times.append(prices.step_s[fits])
            if fits.any():
                index = int(np.argmin(np.where(fits, prices.step_s, np.inf)))
                shown = f"{describe_layout(prices.grid.layout(index))}, recompute {policy.workload.recompute}"
                best = min(best, (float(prices.step_s.flat[index]), shown))
    every = np.concatenate(times) if times else np.array([np.inf])
    own = f"{describe_layout(layout)}, recompute {job.workload.recompute}"
    return Standing(source, f"{name}: {own}", float(np.mean(every < own_s * (1 - 1e-9))), own_s / best[0], own_bytes <= limit, best[1])


def taste(limit: int) -> None:
    """Prints where published layouts stand."""
    table = list(csv.DictReader(io.StringIO(read_text(DATA_DIR / "measurements" / "steps.csv.gz", 64 << 20))))
    for source in TASTE_SOURCES:
        rows = [row for row in table if row["source"] == source]
        chosen = rows[:: max(len(rows) // limit, 1)][:limit]
        standings = (stand(Measurement({name: value for name, value in row.items() if value})) for row in chosen)
        show(source, [each for each in standings if each is not None])
    show("large published runs", [of_request(name, build_request(request), "large published runs") for name, request in EXPERTS.items()])


def show(source: str, found: list[Standing]) -> None:
    """One line for the source, and one for each run."""
    if not found:
        return
    shares = [each.share_better for each in found]
    inside = sum(share <= 0.05 for share in shares)
    print(f"{source}: {inside} of {len(found)} in the top 5%; median {np.median(shares):.1%}, worst {max(shares):.1%}")
    for each in sorted(found, key=lambda own: own.share_better):
        standing = f"{each.share_better:6.1%} better, {each.times_best:.2f} x best{'' if each.fits else ', does not fit'}"
        print(f"  {standing}  {each.name}; best: {each.best}")


def main() -> None:
    """Prints one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "catalog", "taste"))
    parser.add_argument("--rows", type=int, default=12, help="published runs per source")
    options = parser.parse_args()
    if options.what == "taste":
        taste(options.rows)
    elif options.what == "speed":
        speed()
    else:
        over_catalog()


if __name__ == "__main__":
    main()
