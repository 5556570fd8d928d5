"""The planner's memory against the trainer's dry run, over generated layouts. Run: python benchmarks/bench_memory.py --cache tune.jsonl.

Layouts are drawn by `random.Random(seed)` and kept if the planner's rules and the trainer take them; nobody chooses. Each dry run is
written to the cache, so that `--judge-only` compares a changed planner with all of them in seconds. What a dry run cannot have (CUDA
context, buffers of the communication library, slack of the allocator) is switched off in the planner: both sides are bytes of tensors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from memory_cases import Case, generate
from rich.console import Console
from rich.table import Table

from planner.files import to_json
from planner.layout import describe_layout
from planner.memory import MemoryBreakdown, estimate_memory
from planner.plan import build_request
from planner.resolve import resolve

TUNE_SEED, TEST_SEED = 4, 20_261_123
COUNTS = {"tune": 200, "test": 100}

GROUPS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("weights", ("weights",), ("weights",)),
    ("optimizer", ("optimizer",), ("optimizer",)),
    ("gradients", ("gradients",), ("gradients",)),
    ("activations", ("activations", "recompute_workspace"), ("activations", "recomputed_activations")),
    ("logits", ("logits",), ("logits",)),
    ("cast weights", ("cast_weights",), ("cast_weights",)),
    ("gathered and sent", ("gathered_weights", "communication_buffers"), ("gathered_weights", "gathered_gradients", "communication_buffers")),
    ("temporaries", ("temporaries",), ("temporaries",)),
    ("inputs", (), ("inputs",)),
)
"""(name, the planner's parts, the dry run's categories). The planner's workspace of a recomputed block holds casts too, which the
dry run tells apart; FSDP's flat buffers are communication buffers there and part of the gathered weights here."""

# ------------------------------------------------------------ dry runs


def fill(cases: Sequence[Case], path: Path, split: str, budget_s: float, num_jobs: int = 1) -> None:
    """Runs what the cache lacks, or another version of the trainer failed at: cheapest first, one line each."""
    known = {row["key"] for row in _read(path) if row["stages"] or row["trainer"] == _trainer_hash()}
    missing = sorted((case for case in cases if case.key not in known), key=lambda case: case.num_block_passes)
    path.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(num_jobs) as pool:
        for number, found in enumerate(as_completed(pool.submit(_run, case, budget_s) for case in missing), 1):
            row = {"split": split, **found.result()}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            sys.stderr.write(f"{number}/{len(missing)} {row['wall_s']:.0f} s  {_describe(row)}  {row.get('error', '')}\n")


def _run(case: Case, budget_s: float) -> dict[str, Any]:
    """The dry run of a case; with half of its layers where it takes too long."""
    start, shown = time.perf_counter(), case
    while True:
        row = {"key": case.key, "family": case.family, "name": case.name, "plan": shown.plan, "note": shown.note, "trainer": _trainer_hash()}
        found = _in_a_process(shown, budget_s)
        if found is None:
            step = shown.plan["layout"]["pp"] * shown.plan["layout"]["num_virtual_stages"]
            depth = max(shown.num_layers // 2 // step * step, shown.smallest_depth)
            if depth < shown.num_layers:
                shown = shown.with_layers(depth)
                continue
            found = {"error": f"takes more than {budget_s:g} s", "stages": []}
        return {**row, **found, "wall_s": time.perf_counter() - start}


def _in_a_process(case: Case, budget_s: float) -> dict[str, Any] | None:
    """The stages of a dry run, or its error; None: it took longer. Torch cannot be interrupted in its own process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["memory_cases", "reftrain.dry_run"])
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_simulate, args=(case, sender), daemon=True)
    child.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(budget_s) else None
    except EOFError:
        return {"error": "its process died", "stages": []}
    finally:
        child.kill()
        child.join()


def _simulate(case: Case, sender: Connection) -> None:
    from reftrain.config import make_run_config
    from reftrain.dry_run import dry_run

    wanted = ("stage", "peak_bytes", "peak_phase", "breakdown_bytes", "highest_bytes", "phase_peak_bytes", "between_steps_bytes", "largest")
    try:
        found = dry_run(make_run_config(build_request(case.plan)), stages=case.stages)
    except Exception as error:  # whatever it is, the other cases go on and the table says so
        sender.send({"error": f"{type(error).__name__}: {error}"[:300], "stages": []})
    else:
        sender.send({"stages": [{key: stage.to_dict()[key] for key in wanted} for stage in found.stages]})


@cache
def _trainer_hash() -> str:
    """Of the modules that a dry run loads, as this process has them: rows of another trainer may be out of date."""
    import reftrain.dry_run  # noqa: F401

    files = sorted(str(module.__file__) for name, module in sys.modules.items() if name.startswith("reftrain."))
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:12]


def _read(path: Path) -> list[dict[str, Any]]:
    """The newest row of each case, without a last line that is still being written."""
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return list({row["key"]: row for row in rows}.values())


# ------------------------------------------------------------ judging


def judge(row: dict[str, Any]) -> dict[str, Any]:
    """The planner's bytes against one dry run's, stage by stage; differences are fractions of the dry run's peak."""
    memory = _planned(row["plan"])
    total = np.asarray(memory.total_bytes)
    stages = [_judge_stage(memory, found) for found in row["stages"]]
    planned, measured = max(float(total[s["stage"]]) for s in stages), max(s["dry_run_bytes"] for s in stages)
    fullest = max(stages, key=lambda s: s["dry_run_bytes"])
    return {
        "key": row["key"], "family": row["family"], "name": row["name"], "case": _describe(row), "recompute": row["plan"]["workload"]["recompute"],
        "parallelism": _parallelism(row["plan"]["layout"]), "planned_bytes": planned, "dry_run_bytes": measured,
        "error_fraction": planned / measured - 1, "fullest_stage": fullest["stage"], "differences": fullest["differences"], "stages": stages,
    }  # fmt: skip


def _planned(plan: dict[str, Any]) -> MemoryBreakdown:
    request = build_request(plan)
    job, layout = resolve(request), request.layout.complete()
    bare = {"context": 0.0, "collective_buffers": 0.0, "allocator_slack_fraction": 0.0}
    graph = job.graph(layout)
    return estimate_memory(graph, job.stack.model_copy(update=bare), job.cluster)


def _judge_stage(memory: MemoryBreakdown, found: dict[str, Any]) -> dict[str, Any]:
    stage, peak = found["stage"], found["peak_bytes"]
    parts = {name: float(np.asarray(getattr(memory, name))[stage]) for name in memory.PARTS}
    pairs = {name: (sum(parts.pop(p, 0.0) for p in ours), sum(found["breakdown_bytes"][c] for c in theirs)) for name, ours, theirs in GROUPS}
    pairs["other"] = (sum(parts.values()), 0)
    planned = sum(ours for ours, _ in pairs.values())
    return {
        "stage": stage, "planned_bytes": planned, "dry_run_bytes": peak, "error_fraction": planned / peak - 1, "phase": found["peak_phase"],
        "planned": {name: ours for name, (ours, _) in pairs.items()}, "dry_run": {name: theirs for name, (_, theirs) in pairs.items()},
        "differences": {name: (ours - theirs) / peak for name, (ours, theirs) in pairs.items()},
    }  # fmt: skip


def _parallelism(layout: dict[str, Any]) -> list[str]:
    found = [axis for axis in ("tp", "cp", "ep") if layout[axis] > 1]
    found += [f"zero {layout['zero_stage']}"] if layout["dp_shard"] > 1 else ["ddp"] if layout["dp_replicate"] > 1 else []
    found += ["hsdp"] if layout["dp_shard"] > 1 and layout["dp_replicate"] > 1 else []
    return [*found, *([f"pp {layout['schedule']}"] if layout["pp"] > 1 else [])] or ["one device" if layout["tp"] == 1 else "tp"]


def _describe(row: dict[str, Any]) -> str:
    plan = row["plan"]
    work, layout = plan["workload"], build_request(plan).layout.complete()
    count = work["global_batch_size"] // (layout.dp * layout.micro_batch_size)
    text = f"{row['family']} {row['name']} {work['precision']} {work['recompute']} seq {work['seq_len']} x{count} {describe_layout(layout)}"
    return text + (f" ({row['note']})" if row["note"] else "")


def _spread(errors: Sequence[float]) -> dict[str, float]:
    sizes = np.abs(errors)
    return {"count": len(sizes), "median": statistics.median(sizes), "p90": float(np.quantile(sizes, 0.9)), "worst": float(sizes.max())}


def summarize(judged: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Absolute errors: of all, by kind of case, by stage, and by category as fractions of the stage's peak."""
    groups: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for case in judged:
        groups["peak of a case"]["all"].append(case["error_fraction"])
        groups["by family"][case["family"]].append(case["error_fraction"])
        groups["by recompute"][case["recompute"]].append(case["error_fraction"])
        for kind in case["parallelism"]:
            groups["by parallelism"][kind].append(case["error_fraction"])
        for stage in case["stages"]:
            groups["peak of a stage"]["all"].append(stage["error_fraction"])
            for name, difference in stage["differences"].items():
                groups["category over its stage's peak"][name].append(difference)
    return {title: {name: _spread(errors) for name, errors in kinds.items()} for title, kinds in groups.items()}


def _print(judged: Sequence[dict[str, Any]], num_worst: int) -> None:
    table = Table("", "", "cases", "median", "p90", "worst")
    for title, kinds in summarize(judged).items():
        for number, (name, found) in enumerate(sorted(kinds.items(), key=lambda pair: -pair[1]["p90"])):
            errors = (f"{found[key]:.2%}" for key in ("median", "p90", "worst"))
            table.add_row("" if number else title, name, f"{found['count']}", *errors)
    console = Console(width=int(os.environ.get("COLUMNS", 170)))
    console.print(table)
    worst = Table("key", "case", "dry run", "error", "largest differences, of the peak")
    for case in sorted(judged, key=lambda case: -abs(case["error_fraction"]))[:num_worst]:
        largest = sorted(case["differences"].items(), key=lambda pair: -abs(pair[1]))[:4]
        text = ", ".join(f"{name} {difference:+.1%}" for name, difference in largest if abs(difference) >= 0.0005)
        size = f"{case['dry_run_bytes'] / 1e9:.3g} GB"
        worst.add_row(case["key"][:6], case["case"], size, f"{case['error_fraction']:+.2%}", f"stage {case['fullest_stage']}: {text}")
    console.print(worst)


def main() -> None:
    """Runs what the cache lacks, then prints errors as a table, or as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, metavar="FILE.jsonl", help="dry runs, one a line")
    parser.add_argument("--split", choices=tuple(COUNTS), default="tune", help="test has a seed of its own and is for reporting alone")
    parser.add_argument("--seed", type=int, default=TUNE_SEED, help="of the tune split")
    parser.add_argument("--count", type=int, help="layouts to draw")
    parser.add_argument("--budget-s", type=float, default=120.0, help="a dry run that takes longer is run with fewer layers")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="dry runs at once")
    parser.add_argument("--judge-only", action="store_true", help="no new dry runs")
    parser.add_argument("--worst", type=int, default=15, help="cases to show")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not args.judge_only:
        seed = TEST_SEED if args.split == "test" else args.seed
        fill(generate(seed, args.count or COUNTS[args.split]), args.cache, args.split, args.budget_s, args.jobs)
    rows = _read(args.cache)
    failed = [row for row in rows if not row["stages"]]
    judged = [judge(row) for row in rows if row["stages"]]
    for row in failed:
        sys.stderr.write(f"no dry run: {_describe(row)}: {row['error']}\n")
    if len({row["trainer"] for row in rows}) > 1:
        sys.stderr.write("the cache holds dry runs of different versions of the trainer\n")
    if args.json:
        sys.stdout.write(to_json({"schema_version": 1, "summary": summarize(judged), "cases": judged, "failed": failed}))
    elif judged:
        _print(judged, args.worst)


if __name__ == "__main__":
    main()
