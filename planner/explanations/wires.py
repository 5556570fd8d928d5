"""Messages on their links: bytes over bandwidth, what a stack makes of it, and what nothing hides."""

from __future__ import annotations

from collections.abc import Sequence

from planner.collectives import pace
from planner.explanations._base import Explanation, Input, Trace, explained, look_up
from planner.step_work import GroupTransfer, Wire

__all__ = ["coefficient", "explain_collective", "exposed_formula", "on_the_wire"]


def coefficient(trace: Trace, term: str, name: str | None = None) -> Input:
    """A coefficient of the stack as an input of a formula."""
    found = trace.job.stack.coefficient(term, trace.job.cluster.accelerator.id)
    return Input(name or term, found.value, f"{found.evidence}: {found.source}")


def on_the_wire(trace: Trace, found: Wire, prefix: str = "") -> tuple[str, list[Input]]:
    """Seconds of some messages under the stack: formula and inputs."""
    inputs = [
        Input(f"{prefix}scale_up_s", float(found.scale_up_s), "messages inside a scale-up domain, at the links' own rates"),
        Input(f"{prefix}scale_out_s", float(found.scale_out_s), "messages across domains, at the links' own rates"),
        Input(f"{prefix}waits", float(found.waits), "calls times log2 of the ranks"),
        *(coefficient(trace, term) for term in ("scale_up", "scale_out", "sync")),
    ]
    return f"{prefix}scale_up_s / scale_up + {prefix}scale_out_s / scale_out + {prefix}waits * sync", inputs


def exposed_formula(traffic: str, compute: str) -> str:
    """The formula of `timing.exposed`."""
    return f"max({traffic} - overlap * {compute}, (1 - overlap) * {traffic}) + contention * min(overlap * {compute}, overlap * {traffic})"


def explain_collective(trace: Trace, key: str, name: str, transfers: Sequence[GroupTransfer]) -> Explanation:
    """One collective: bytes over bandwidth, and latency."""
    named = {t.collective: t for t in transfers} | {f"{t.axis}_{t.collective}": t for t in transfers}
    found = named[look_up(key, name, list(named))[0]]
    cluster, group = trace.job.cluster, found.group
    cost = pace(found.collective, found.num_bytes / found.num_calls, group, cluster)
    value = float(found.seconds(cluster))
    size, domains = float(group.size), float(group.num_domains)
    ranks = f"{size:g} ranks of axis {found.axis}, {float(group.per_domain):g} per scale-up domain"
    link = cluster.scale_up if domains <= 1 or cluster.scale_out is None else cluster.scale_out
    num_bytes = float(found.num_bytes) / found.num_calls
    inputs = [
        Input("num_calls", float(found.num_calls), "equal messages, one after the other"),
        Input("num_bytes", num_bytes, f"{found.collective}: the full buffer of one per device"),
    ]
    curve = link.curves.get(f"{found.collective}/{size:g}") if domains <= 1 else None
    if curve is not None:
        inputs.append(Input("curve_s", float(curve.at(num_bytes)), f"{ranks}: measured at num_bytes, {link.source}"))
    else:
        inputs += [
            Input("traffic_ratio", float(cost.traffic_ratio), f"{found.collective} over {ranks}"),
            Input("bytes_per_s", float(cost.bytes_per_s), f"{link.name}, bus bandwidth: {link.source}"),
            Input("latency_s", float(cost.latency_s), f"{ranks}"),
        ]
    each = "num_bytes * traffic_ratio / bytes_per_s + latency_s" if curve is None else "curve_s"
    formula = f"num_calls * ({each})" if value else "0"
    return explained(key, value, formula, inputs, source="planner/collectives.py pace: NVIDIA/nccl-tests doc/PERFORMANCE.md @a0b82b2")
