"""A calibration as plain text: what changed, and errors before, after, and on runs left out."""

from __future__ import annotations

from planner.calibration import LEAST_FACTOR, MOST_FACTOR, Calibration

__all__ = ["render_calibration"]

AT_BOUNDS = ": as far as a fit goes; measure the machine again, with as many threads and nothing beside it"


def render_calibration(found: Calibration, path: str) -> str:
    """One line per run, the factors, and the medians."""
    width = max(len(str(row["run"])) for row in found.rows)
    lines = [f"{'run'.ljust(width)}  {'measured':>10}  {'before':>8}  {'after':>8}  {'left out':>8}"]
    for row in found.rows:
        measured = row["measured_step_s"]
        errors = (row[f"{when}_step_s"] / measured - 1 for when in ("before", "after", "left_out"))
        lines.append(f"{str(row['run']).ljust(width)}  {measured * 1e3:8.1f}ms  " + "  ".join(f"{error:+8.1%}" for error in errors))
    lines.append("")
    for kind, factor in found.factors.items():
        note = "" if LEAST_FACTOR < factor < MOST_FACTOR else AT_BOUNDS
        lines.append(f"{kind} takes {factor:.2f} times as long as predicted before{note}")
    lines.append(
        f"median error of the step time: {found.median_error_before_fraction:.1%} before, {found.median_error_after_fraction:.1%} after, "
        f"{found.median_error_left_out_fraction:.1%} on runs left out of their own fit"
    )
    lines.append(f"written: {path}    use it with --stack {path}")
    return "\n".join(lines) + "\n"
