"""Predicted against measured on this machine, before and after calibrating. Run: python benchmarks/bench_predictions.py --out DIR.

Needs `reftrain bench-device --processes 1,2` on a machine that does nothing else. Runs of `FIT` calibrate the stack; runs of `JUDGE`, which
are none of them, judge it before and after. Finished runs in DIR are read again, not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from planner import estimate
from planner.calibration import calibrate
from planner.cases import read_run
from planner.files import to_json
from planner.plan import build_request

NUM_STEPS = 16
DP, TP = {"dp_replicate": 2}, {"tp": 2}


@dataclass(frozen=True)
class Case:
    """One run: a Llama of some width, and how it is trained."""

    name: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    seq_len: int
    micro_batch: int
    batch: int
    precision: str
    layout: dict[str, int]

    def plan(self) -> dict[str, Any]:
        """What the planner takes and the trainer runs."""
        model = {
            "model_type": "llama", "hidden_size": self.hidden, "intermediate_size": self.ffn, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "vocab_size": self.vocab,
            "max_position_embeddings": self.seq_len,
        }  # fmt: skip
        tokens = float(NUM_STEPS * self.seq_len * self.batch)
        return {
            "schema_version": 1, "model": model, "cluster": {"accelerator": "cpu-local", "num_devices": 2 if self.layout else 1},
            "workload": {"seq_len": self.seq_len, "global_batch_size": self.batch, "precision": self.precision, "tokens": tokens},
            "layout": {**self.layout, "micro_batch_size": self.micro_batch},
            "training": {"data": "synthetic", "num_steps": NUM_STEPS, "async_checkpoints": False},
        }  # fmt: skip


JUDGE = (
    Case("1M fp32, 128 x 4", 128, 352, 4, 4, 2, 1024, 128, 4, 8, "fp32", {}),
    Case("1M bf16, 128 x 16", 128, 352, 4, 4, 2, 1024, 128, 16, 16, "bf16", {}),
    Case("5M fp32, 256 x 2", 256, 704, 6, 4, 2, 2048, 256, 2, 4, "fp32", {}),
    Case("5M bf16, 256 x 8", 256, 704, 6, 4, 4, 2048, 256, 8, 8, "bf16", {}),
    Case("5M fp32, 1024 x 1", 256, 704, 6, 4, 4, 2048, 1024, 1, 2, "fp32", {}),
    Case("13M bf16, 512 x 2", 384, 1024, 6, 6, 6, 4096, 512, 2, 4, "bf16", {}),
    Case("25M fp32, 256 x 4", 512, 1408, 6, 8, 4, 4096, 256, 4, 4, "fp32", {}),
    Case("60M bf16, 128 x 4", 640, 1792, 10, 10, 10, 8192, 128, 4, 4, "bf16", {}),
    Case("60M fp32, 256 x 1", 640, 1792, 10, 10, 10, 8192, 256, 1, 2, "fp32", {}),
    Case("5M fp32, 256 x 4, dp 2", 256, 704, 6, 4, 2, 2048, 256, 4, 8, "fp32", DP),
    Case("13M bf16, 256 x 2, dp 2", 384, 1024, 6, 6, 6, 4096, 256, 2, 4, "bf16", DP),
    Case("5M fp32, 256 x 4, tp 2", 256, 704, 6, 4, 2, 2048, 256, 4, 4, "fp32", TP),
    Case("25M bf16, 256 x 4, tp 2", 512, 1408, 6, 8, 4, 4096, 256, 4, 4, "bf16", TP),
    Case("1M fp32, 128 x 8, tp 2", 128, 352, 4, 4, 2, 1024, 128, 8, 8, "fp32", TP),
)
FIT = (
    Case("2M fp32, 256 x 4", 192, 512, 4, 6, 6, 1024, 256, 4, 4, "fp32", {}),
    Case("8M fp32, 512 x 1", 320, 896, 5, 5, 5, 2048, 512, 1, 2, "fp32", {}),
    Case("18M fp32, 128 x 2", 448, 1216, 6, 7, 7, 4096, 128, 2, 4, "fp32", {}),
    Case("3M bf16, 128 x 8", 192, 512, 6, 6, 3, 1024, 128, 8, 8, "bf16", {}),
    Case("9M bf16, 256 x 4", 320, 896, 6, 5, 5, 2048, 256, 4, 8, "bf16", {}),
    Case("35M bf16, 256 x 2", 576, 1536, 7, 9, 9, 6144, 256, 2, 2, "bf16", {}),
    Case("3M fp32, 128 x 8, dp 2", 192, 512, 6, 6, 6, 1024, 128, 8, 16, "fp32", DP),
    Case("9M bf16, 256 x 4, dp 2", 320, 896, 6, 5, 5, 2048, 256, 4, 8, "bf16", DP),
    Case("9M fp32, 128 x 4, tp 2", 320, 896, 6, 10, 10, 2048, 128, 4, 4, "fp32", TP),
    Case("18M bf16, 256 x 2, tp 2", 448, 1216, 6, 14, 14, 4096, 256, 2, 2, "bf16", TP),
)


def main() -> None:
    """Runs what is missing, then prints errors as a table, or as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the runs")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    folders = {case.name: _run(case, args.out) for case in (*FIT, *JUDGE)}
    stack = args.out / "calibrated.yaml"
    calibrate([read_run(folders[case.name]) for case in FIT]).save(stack)
    rows = [_judge(case, folders[case.name], str(stack)) for case in JUDGE]
    medians = {key: statistics.median(abs(row[key]) for row in rows) for key in rows[0] if key.endswith("_error_fraction")}
    sys.stdout.write(to_json({"schema_version": 1, "rows": rows, "median_abs": medians})) if args.json else _print(rows, medians)


def _run(case: Case, out: Path) -> Path:
    """The folder of a finished run of a case."""
    folder = out / "".join(c if c.isalnum() else "-" for c in case.name)
    if not (folder / "summary.json").is_file():
        sys.stderr.write(f"running {case.name}\n")
        plan = out / f"{folder.name}.yaml"
        plan.parent.mkdir(parents=True, exist_ok=True)
        estimate(build_request(case.plan())).save(plan)
        command = [sys.executable, "-m", "reftrain", "run", str(plan), "--out", str(folder), "--json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def _judge(case: Case, folder: Path, stack: str) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    before, after = (estimate(build_request(case.plan() | ({"stack": name} if name else {}))) for name in ("", stack))
    step_s = summary["step_s"]["median"]
    interval = after.time.step_s
    flops = before.flops.counted_per_token * summary["tokens_per_step"]
    return {
        "name": case.name, "step_s": step_s,
        "before_error_fraction": before.time.step_s.value / step_s - 1,
        "after_error_fraction": interval.value / step_s - 1,
        "is_inside": interval.low <= step_s <= interval.high,
        "memory_error_fraction": before.memory.peak_bytes.value / summary["peak_bytes"] - 1,
        "flops_error_fraction": flops / summary["flops_per_step"] - 1,
    }  # fmt: skip


def _print(rows: list[dict[str, Any]], medians: dict[str, float]) -> None:
    table = Table("run (sequence x micro-batch)", "step", "before", "after", "inside", "memory", "FLOPs")
    errors = ("before_error_fraction", "after_error_fraction", "memory_error_fraction", "flops_error_fraction")
    for row in rows:
        before, after, memory, flops = (f"{row[key]:+.1%}" for key in errors)
        table.add_row(row["name"], f"{row['step_s'] * 1e3:.1f} ms", before, after, "yes" if row["is_inside"] else "no", memory, flops)
    before, after, memory, flops = (f"{medians[key]:.1%}" for key in errors)
    table.add_row("median of absolute errors", "", before, after, "", memory, flops, style="bold")
    Console().print(table)


if __name__ == "__main__":
    main()
