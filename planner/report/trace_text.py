"""A timeline in a few lines: what each stage does with its time."""

from __future__ import annotations

from planner.step_trace import StepTrace

__all__ = ["render_trace"]


def render_trace(found: StepTrace, path: str) -> str:
    """One line per stage, and where to look at the rest."""
    lines = [f"step {found.step_s:.4g} s", f"{'stage':>5}{'busy':>10}{'bubble':>9}{'exposed communication':>24}"]
    shares = [
        tuple(f"{value / found.step_s:.1%}" for value in (stage.busy_s, stage.bubble_s, stage.exposed_communication_s)) for stage in found.stages
    ]
    first = 0
    for number, share in enumerate(shares):
        if number + 1 == len(shares) or shares[number + 1] != share:
            name = str(number) if first == number else f"{first}-{number}"
            lines.append(f"{name:>5}{share[0]:>10}{share[1]:>9}{share[2]:>24}")
            first = number + 1
    ratio = found.metadata["closed_form_over_simulation"]
    if abs(ratio - 1) > 1e-6:
        lines.append(f"the schedule's closed form is {ratio:.4f} times the simulation, by which the timeline is stretched")
    if not found.metadata["parts_of_passes_shown"]:
        lines.append("passes are shown whole: there are too many for their parts")
    lines.append(f"written: {path}    open it at https://ui.perfetto.dev (it stays in your browser)")
    return "\n".join(lines) + "\n"
