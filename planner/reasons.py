"""Why a plan is good, and what speaks against it, in a few plain statements: each one a number of the plan."""

from __future__ import annotations

from planner.plan import COMMUNICATION_PARTS, Plan

__all__ = ["reasons_of"]

TELLING_FRACTION = 0.03
"""Of a step: smaller shares are not worth a word."""
WORDS = {
    "pipeline_transfer_and_bubble": "pipeline bubble",
    "tensor_parallel": "tensor-parallel communication",
    "context_parallel": "context-parallel communication",
    "expert_parallel": "expert-parallel communication",
    "fsdp": "FSDP communication",
    "data_parallel": "data-parallel communication",
    "recompute": "recomputation",
    "host": "waiting for the host",
    "optimizer": "optimizer",
    "stragglers": "stragglers",
}


def reasons_of(plan: Plan, best: Plan) -> list[str]:
    """What the step spends beside its matmuls, how full the memory is, and how far the plan is from the best one."""
    step_s, parts = plan.time.step_s.value, plan.time.breakdown_s
    exposed = sum(parts[name] for name in COMMUNICATION_PARTS) / step_s
    found = [f"MFU {plan.time.mfu:.1%}; {exposed:.1%} of the step waits for other devices"]
    spent = sorted(((parts[name] / step_s, words) for name, words in WORDS.items() if parts[name] / step_s >= TELLING_FRACTION), reverse=True)
    if spent:
        found.append("beside computing: " + ", ".join(f"{words} {share:.1%}" for share, words in spent[:3]))
    memory = plan.memory
    left = 1 - memory.peak_bytes.value / memory.usable_bytes
    if memory.peak_bytes.high > memory.usable_bytes:
        found.append(f"tight: {left:.1%} of the memory is free, less than its prediction may be off by")
    else:
        found.append(f"{left:.1%} of the memory is free")
    if plan is not best:
        slower = plan.time.train_s.value / best.time.train_s.value - 1
        found.append(f"{abs(slower):.1%} {'slower' if slower > 0 else 'faster'} than plan 1")
        if plan.cost.usd is not None and best.cost.usd is not None:
            dearer = plan.cost.usd.value / best.cost.usd.value - 1
            found.append(f"{abs(dearer):.1%} {'dearer' if dearer > 0 else 'cheaper'} than plan 1")
    return found
