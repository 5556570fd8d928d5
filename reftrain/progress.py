"""A run as a person sees it: a line that moves on a terminal, a line now and then elsewhere, a few lines at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from planner.report._numbers import with_unit
from planner.units import format_duration, format_si
from reftrain.config import RunConfig

__all__ = ["make_progress", "render_summary"]

LINE_EVERY_S = 10.0
SILENT = ("measured", "communication", "diverged")
"""Records for the log alone; an error that ends a run is told once, at the end."""


def make_progress(config: RunConfig, *, is_quiet: bool = False) -> tuple[Callable[[dict[str, Any]], None], Callable[[], None]]:
    """(called with each record, called at the end); both write to standard error only."""
    if not sys.stderr.isatty() or is_quiet:
        return _lines(config), lambda: None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=Console(stderr=True)
    )
    task = bar.add_task("train", total=config.num_steps, note="")
    bar.start()

    def show(record: dict[str, Any]) -> None:
        text = _describe(record)
        if record["kind"] == "step":
            bar.update(task, completed=record["step"] + 1, note=text)
        elif record["kind"] not in SILENT:
            bar.console.print(text)

    return show, bar.stop


def _lines(config: RunConfig) -> Callable[[dict[str, Any]], None]:
    last = [0.0]

    def show(record: dict[str, Any]) -> None:
        if record["kind"] in SILENT:
            return
        is_end = record["kind"] != "step" or record["step"] + 1 == config.num_steps
        if is_end or record.get("skipped") or time.monotonic() - last[0] > LINE_EVERY_S:
            last[0] = time.monotonic()
            sys.stderr.write(_describe(record) + "\n")

    return show


def _describe(record: dict[str, Any]) -> str:
    kind = record["kind"]
    if kind == "step":
        skipped = "  SKIPPED" if record.get("skipped") else ""
        return f"step {record['step']}  loss {record['loss']:.4f}  {record['tokens_per_s']:,.0f} tokens/s{skipped}"
    if kind == "eval":
        bits = f", {record['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in record else ""
        return f"step {record['step']}  held-out loss {record['loss']:.4f}{bits}"
    if kind == "examples":
        return "; ".join(_describe_examples(name, record[key]) for name, key in (("examples", "train"), ("held out", "valid")) if key in record)
    return f"step {record.get('step')}  {kind.replace('_', ' ')}"


def _describe_examples(name: str, facts: dict[str, Any]) -> str:
    left_out = f", {facts['too_long']:,} too long" if facts["too_long"] else ""
    return f"{name}: {facts['examples']:,} in {facts['sequences']:,} sequences, {facts['filled_fraction']:.0%} filled{left_out}"


def render_summary(values: dict[str, Any], folder: Path) -> str:
    """The end of a run in a few lines."""
    state = "done" if values["is_complete"] else "stopped by a signal; go on with --resume"
    loss = f", loss {values['final_loss']:.4f}" if values.get("final_loss") is not None else ""
    skipped = f", {values['num_skipped']} skipped, {values['num_rollbacks']} rollbacks" if values.get("num_skipped") else ""
    lines = [f"{state}: {values['num_steps']} steps{loss}{skipped}"]
    if "step_s" in values:
        step = values["step_s"]
        lines.append(
            f"step {format_duration(step['median'])} (median of {step['count']}; 80% between {format_duration(step['p10'])} and "
            f"{format_duration(step['p90'])}), {values['tokens_per_s']:,.0f} tokens/s"
        )
    if "peak_bytes" in values:
        lines.append(f"peak memory {with_unit(values['peak_bytes'], 'bytes')} per device, {format_si(values['flops_per_step'], 'FLOP')} per step")
    if "mfu" in values:
        use = values["utilization"]
        lines[-1] += f", MFU {values['mfu']:.1%} of {format_si(use['peak_flops_per_s'], 'FLOP/s')} ({use['accelerator']})"
    if "communication" in values:
        lines.append(_describe_communication(values["communication"]))
    if "eval" in values:
        lines.append(_describe({"kind": "eval", **values["eval"]}))
    if "traces" in values:
        lines.append(f"traces of {values['traces']['num_steps']} steps: {folder / 'traces'}    open them at https://ui.perfetto.dev")
    return "\n".join([*lines, f"measured: {folder / 'summary.json'}    against the prediction: python -m reftrain compare {folder}"]) + "\n"


def _describe_communication(found: dict[str, Any]) -> str:
    kinds = [f"{kind} {count['calls']:,} x, {format_si(count['bytes'], 'B')}" for kind, count in found["collectives"].items()]
    share = f"{found['step_fraction']:.0%} of a step ({format_duration(found['exposed_s'])}, waiting for other ranks included)"
    return f"communication that nothing hides {share}: {'; '.join(kinds)}"
