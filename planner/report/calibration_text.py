"""A calibration as plain text: what changed, what told it, and errors before, after, and on steps left out."""

from __future__ import annotations

from typing import Any

from planner.calibration import TOLD_SHARE, Calibration
from planner.stack_fits import StackFits

__all__ = ["render_calibration", "render_fits"]

MOST_ROWS = 40
AT_BOUND = "  at its physical bound: look for what else is slow"


def _is_pushed(coefficient: dict[str, Any]) -> bool:
    """Whether a bound holds a coefficient where it did not start."""
    return bool(coefficient["at_bound"] and coefficient["after"] != coefficient["before"])


def render_calibration(found: Calibration, path: str) -> str:
    """One line per run, one per coefficient that the runs constrain, and the medians."""
    shown = found.rows[:MOST_ROWS]
    width = max(len(str(row["run"])) for row in shown)
    lines = [f"{'run'.ljust(width)}  {'measured':>10}  {'before':>8}  {'after':>8}  {'left out':>8}"]
    for row in shown:
        measured = row["measured_step_s"]
        errors = (row[f"{when}_step_s"] / measured - 1 for when in ("before", "after", "left_out"))
        lines.append(f"{str(row['run']).ljust(width)}  {measured * 1e3:8.1f}ms  " + "  ".join(f"{error:+8.1%}" for error in errors))
    if len(found.rows) > len(shown):
        lines.append(f"... and {len(found.rows) - len(shown)} more: --json has all")
    constrained = {
        name: c for name, c in found.coefficients.items() if c["told_share"] >= TOLD_SHARE or (c["at_bound"] and c["after"] != c["before"])
    }
    lines += ["", f"{'coefficient':<26}{'before':>10}{'after':>10}  told by the runs"]
    for name, c in sorted(constrained.items(), key=lambda item: -item[1]["told_share"]):
        told = f"{c['told_share']:.0%}" + (f", most by {', '.join(c['told_by'][:2])}" if c["told_by"] else "")
        lines.append(f"{name:<26}{c['before']:>10.4g}{c['after']:>10.4g}  {told}{AT_BOUND if c['at_bound'] else ''}")
    kept = [name for name in found.coefficients if name not in constrained]
    lines += ["", f"as before, for the runs say little about them: {', '.join(kept) or 'none'}"]
    spans = ", ".join(f"{name} {low:g}" + ("" if low == high else f" to {high:g}") for name, (low, high) in found.ranges.items())
    lines.append(f"the runs span {spans}; outside of that a prediction extrapolates")
    lines.append(
        f"median error of the step time: {found.median_error_before_fraction:.1%} before, {found.median_error_after_fraction:.1%} after, "
        f"{found.median_error_left_out_fraction:.1%} on runs left out of their own fit"
    )
    lines.append(f"written: {path}    use it with --stack {path}")
    return "\n".join(lines) + "\n"


def render_fits(found: StackFits, path: str) -> str:
    """One line per stack: runs, and errors of runs that were left out."""
    values = found.to_dict()
    lines = [f"{'stack':<20}{'runs':>6}{'median':>9}{'p90':>8}  errors of runs left out of the fit with their like"]
    for name, fit in values["stacks"].items():
        if fit is None:
            lines.append(f"{name:<20}{0:>6}{'':>17}  as the other stacks")
        else:
            devices = ", ".join(f"{device} {count}" for device, count in fit["accelerators"].items())
            lines.append(f"{name:<20}{fit['num_runs']:>6}{fit['median_error_fraction']:>9.1%}{fit['p90_error_fraction']:>8.1%}  {devices}")
    lines.append(f"{'all':<20}{values['num_runs']:>6}{values['median_abs_error_fraction']:>9.1%}{values['p90_abs_error_fraction']:>8.1%}")
    held, width = values["interval_coverage_fraction"], values["median_interval_width_fraction"]
    lines.append(f"80% intervals hold for {held:.0%} of runs left out; median width {width:.0%}")
    lines.append(f"written: {path}/stacks, {path}/measurements/evidence.csv.gz")
    return "\n".join(lines) + "\n"
