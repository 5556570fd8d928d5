"""The whole loop in a few minutes on a laptop: measure the machine, plan, run, compare, calibrate, plan again.

Every step is a command that a user could type, printed before it runs; the page at the end puts them side by side.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from planner.errors import InputError, PlannerError
from planner.files import HOME_VARIABLE, to_json, to_yaml, write_text
from reftrain.compare import compare_run
from reftrain.compare_report import render_page

__all__ = ["demo"]

NAME = "cpu-local"
SIZES = {"small": (96, 3, 3, 2), "wide": (224, 2, 7, 4), "long": (128, 4, 4, 4), "deep": (160, 6, 5, 4)}
"""Name -> hidden size, layers, heads of 32, sequences per step."""
JUDGE = "deep"
"""The run that no fit sees."""
STEPS, JUDGE_STEPS, VOCAB_SIZE, SEQ_LEN = 24, 60, 2048, 128


def _plan(name: str) -> dict[str, Any]:
    hidden, layers, heads, batch = SIZES[name]
    model = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": 8 * hidden // 3 // 32 * 32, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": VOCAB_SIZE, "max_position_embeddings": SEQ_LEN,
    }  # fmt: skip
    steps = JUDGE_STEPS if name == JUDGE else STEPS
    return {
        "schema_version": 1, "model": model, "cluster": {"accelerator": NAME, "num_devices": 1}, "layout": {"micro_batch_size": batch},
        "workload": {"seq_len": SEQ_LEN, "global_batch_size": batch, "tokens": float(steps * batch * SEQ_LEN), "precision": "fp32"},
        "training": {"learning_rate": 3e-3, "num_steps": steps},
    }  # fmt: skip


def demo(out: Path, say: Callable[[str], None]) -> Path:
    """Runs the loop into `out`; returns the page's path.

    Raises:
        InputError: `out` holds something already.
        PlannerError: a command failed; its own message is above.
    """
    if out.exists() and any(out.iterdir()):
        raise InputError.single("--out", str(out), "holds something already", "choose a folder that does not exist")
    (out / "plans").mkdir(parents=True)
    run = _runner(out, say)
    say("1. measure this machine")
    run("reftrain", "bench-device", "--quick", "--name", NAME)
    say("2. tokenize the shipped corpus")
    run("reftrain", "data", "prepare", "--out", "data", "--vocab-size", str(VOCAB_SIZE))
    say("3. plan, run and compare four models")
    for name in SIZES:
        write_text(out / "plans" / f"{name}.request.yaml", to_yaml(_plan(name)))
        run("planner", "estimate", f"plans/{name}.request.yaml", "--out", f"plans/{name}.yaml")
        run("reftrain", "run", f"plans/{name}.yaml", "--out", f"runs/{name}", "--data", "data")
        run("reftrain", "compare", f"runs/{name}", may_end_with=(0, 5), is_shown=True)
    say(f"4. calibrate on all of them but `{JUDGE}`, and plan that one again")
    run("planner", "calibrate", *(f"runs/{name}" for name in SIZES if name != JUDGE), "--out", "calibrated.yaml", is_shown=True)
    again = run("planner", "estimate", f"plans/{JUDGE}.request.yaml", "--stack", "calibrated.yaml", "--json")
    return _write_page(out, json.loads(again), say)


def _runner(out: Path, say: Callable[[str], None]) -> Callable[..., str]:
    """Runs a command in `out`, with this machine's measurements kept there too."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, HOME_VARIABLE: str(out.resolve() / "machine"), "PYTHONPATH": path}

    def run(module: str, *arguments: str, may_end_with: tuple[int, ...] = (0,), is_shown: bool = False) -> str:
        say(f"   $ python -m {module} {' '.join(arguments)}")
        done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=out, env=env, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode not in may_end_with:
            raise PlannerError(f"the command above ended with status {done.returncode}; what it wrote is in {out}")
        if is_shown:
            say("\n".join("     " + line for line in done.stdout.splitlines()))
        return done.stdout

    return run


def _write_page(out: Path, again: dict[str, Any], say: Callable[[str], None]) -> Path:
    comparisons = {name: compare_run(out / "runs" / name) for name in SIZES}
    step = next(metric for metric in comparisons[JUDGE].metrics if metric.name == "step time")
    before, after = step.error_fraction, again["time"]["step_s"]["value"] / step.measured - 1
    say(f"5. `{JUDGE}`, which no fit saw: step time {before:+.1%} before calibration, {after:+.1%} after")
    write_text(out / "demo.json", to_json({"judge": JUDGE, "error_fraction_before": before, "error_fraction_after": after}))
    page, title = out / "demo.html", f"Four runs against their plans ({JUDGE}: {before:+.1%} before calibration, {after:+.1%} after)"
    write_text(page, render_page(list(comparisons.values()), title))
    say(f"   page: {page}")
    return page
