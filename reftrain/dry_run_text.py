"""A dry run as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from planner.units import GIB
from reftrain.dry_run import DryRun
from reftrain.dry_run_report import StageDryRun

__all__ = ["render"]

NUM_ROWS = 12


def render(found: DryRun) -> str:
    """What a person reads: each stage's peak by category, module and tensor, then FLOPs and traffic."""
    which = f"largest of {len(found.stages)} stages" if len(found.stages) > 1 else "one stage"
    how = f"{found.num_simulated_microbatches} of {found.num_microbatches} microbatches simulated in {found.wall_s:.1f} s"
    lines = [f"peak {_size(found.peak_bytes)} ({which}), {how}"]
    for stage in found.stages:
        lines += ["", *_stage(stage)]
    return "\n".join(lines) + "\n"


def _stage(stage: StageDryRun) -> list[str]:
    where = f"in {stage.peak_phase}, {_size(stage.between_steps_bytes)} between steps"
    lines = [f"stage {stage.stage} (rank {stage.rank}): peak {_size(stage.peak_bytes)} {where}"]
    lines += _table("at the peak", [(name, _size(size)) for name, size in stage.breakdown_bytes.items() if size])
    lines += _table("by module", [(name, _size(sum(sizes.values()))) for name, sizes in list(stage.modules_bytes.items())[:NUM_ROWS]])
    tensors = [
        (f"{t['count']} x {t['dtype']}{t['shape']} {t['module']} {t['op']} ({t['category']})", _size(t["bytes"])) for t in stage.largest[:NUM_ROWS]
    ]
    lines += _table("largest tensors", tensors)
    lines += _table("FLOPs of a step", [(op, f"{count:.4g}") for op, count in sorted(stage.flops.items(), key=lambda pair: -pair[1])])
    moved = [
        (f"{t['calls']} {t['collective']} over {t['axis']}", f"{_size(t['input_bytes'])} in, {_size(t['output_bytes'])} out") for t in stage.traffic
    ]
    return lines + _table("traffic of a step", moved)


def _table(title: str, rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {title}", *(f"    {name:<{width}}  {value}" for name, value in rows)] if rows else []


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.3f} GiB" if num_bytes >= GIB / 100 else f"{num_bytes:,} bytes"
