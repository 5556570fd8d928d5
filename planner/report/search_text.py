"""What a search found, as text and as JSON."""

from __future__ import annotations

from typing import Any

from planner.layout import describe_layout
from planner.plan import Plan
from planner.points import Point
from planner.reasons import reasons_of
from planner.report._numbers import wrapped
from planner.search import SearchResult
from planner.units import DAY_S, format_duration, format_gib, format_usd

__all__ = ["render_search", "search_to_dict"]


def search_to_dict(found: SearchResult) -> dict[str, Any]:
    """The object that `search --json` prints; plans in it are those of `estimate --json`."""
    counts = found.counts
    return {
        "schema_version": 1,
        "objective": found.wanted.objective,
        "counts": {"enumerated": counts.enumerated, "legal": counts.legal, "priced": counts.priced, "fits": counts.fits},
        "jobs": {"in_all": found.num_jobs, "cannot_be_better": found.num_pruned},
        "elapsed_s": found.elapsed_s,
        "rejects": found.rejects,
        "results": [{"rank": rank + 1, **_result(plan, found.plans[0])} for rank, plan in enumerate(found.plans)],
        "pareto": [_point(point) for point in found.pareto],
        "remedies": [{"change": remedy.change, **_result(remedy.plan, remedy.plan)} for remedy in found.remedies],
        "notes": list(found.notes),
    }


def _result(plan: Plan, best: Plan) -> dict[str, Any]:
    plain = plan.to_dict()
    return {
        "layout": plain["inputs"]["layout"],
        "cluster": plain["inputs"]["cluster"],
        "workload": plain["inputs"]["workload"],
        "stack": plain["inputs"]["stack"],
        "time": plain["time"],
        "cost": plain["cost"],
        "memory": {name: value for name, value in plain["memory"].items() if name != "stages"},
        "why": reasons_of(plan, best),
    }


def _point(point: Point) -> dict[str, Any]:
    candidate, spec = point.candidate, point.rental.spec
    return {
        "train_s": point.cost.train_s,
        "usd": point.cost.usd,
        "step_s": candidate.step_s,
        "num_devices": candidate.num_devices,
        "accelerator": point.rental.cluster.accelerator.id,
        "offer": spec.offer,
        "pricing": point.rental.cluster.pricing,
        "recompute": candidate.job.workload.recompute,
        "precision": candidate.job.workload.precision,
        "layout": candidate.layout.model_dump(),
    }


def render_search(found: SearchResult, out: str | None, width: int) -> str:
    """The plans, the Pareto front, and what was left out and why."""
    width = max(width, 60)
    blocks = [_looked_at(found, width)]
    blocks += [_plan(rank + 1, plan, found.plans[0], width) for rank, plan in enumerate(found.plans)]
    if found.pareto:
        blocks.append(_front(found.pareto))
    if not found.plans:
        blocks.append(["Nothing that was looked at fits and keeps the limits."])
        if found.remedies:
            blocks.append(["The smallest changes that fit, each one tried:", *(f"  - {remedy.change}" for remedy in found.remedies)])
    if found.notes:
        blocks.append(["Left out", *(line for note in found.notes[:5] for line in wrapped(note, width, "  - ", "    "))])
        if len(found.notes) > 5:
            blocks[-1].append(f"  and {len(found.notes) - 5} more: --json lists them")
    if out is not None and found.plans:
        blocks.append([f"Plan 1 is in {out}: python -m reftrain run {out}, planner explain {out}"])
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _looked_at(found: SearchResult, width: int) -> list[str]:
    counts = found.counts
    text = (
        f"Least {found.wanted.objective}, of {counts.priced:,} legal layouts priced in {found.elapsed_s:.1f} s ({counts.enumerated:,} enumerated); "
        f"{counts.fits:,} fit."
    )
    if found.num_pruned:
        text += f" {found.num_pruned} of {found.num_jobs} machines and policies could not be better even if they never had to wait."
    reasons = ", ".join(f"{name.removeprefix('layout.')} {count:,}" for name, count in found.rejects.items())
    return [*wrapped(text, width), *(wrapped(f"Out: {reasons}.", width) if reasons else [])]


def _plan(rank: int, plan: Plan, best: Plan, width: int) -> list[str]:
    cluster, workload = plan.inputs["cluster"], plan.inputs["workload"]
    where = f" at {cluster['offer']}, {cluster.get('pricing', 'on_demand')}" if cluster.get("offer") else ""
    usd = f", {format_usd(plan.cost.usd.value)}" if plan.cost.usd is not None else ""
    head = (
        f"{cluster['num_devices']:,} x {cluster['accelerator']}{where}: {format_duration(plan.time.train_s.value)}{usd}, "
        f"{plan.time.step_s.value:.3g} s a step, {format_gib(plan.memory.peak_bytes.value)} GiB"
    )
    layout = f"{describe_layout(plan.layout)}, recompute {workload['recompute']}, {workload['precision']}"
    return [
        *wrapped(head, width, f"{rank}  ", "   "),
        *wrapped(layout, width, "   ", "   "),
        *(line for reason in reasons_of(plan, best) for line in wrapped(reason, width, "   - ", "     ")),
    ]


def _front(points: tuple[Point, ...]) -> list[str]:
    lines = ["Cost against time: no other plan is both cheaper and faster", f"  {'days':>8}  {'cost':>12}  {'devices':>7}  hardware"]
    for point in points:
        usd = "-" if point.cost.usd is None else format_usd(point.cost.usd)
        where = point.rental.spec.offer or point.rental.cluster.accelerator.id
        lines.append(f"  {point.cost.train_s / DAY_S:8.2f}  {usd:>12}  {point.num_devices:7,}  {where}, {describe_layout(point.candidate.layout)}")
    return lines
