"""Time of collectives: a latency per step and the bytes over the bandwidth of the slowest tier (alpha-beta).

In: bytes per device and a `Group` (how many ranks, how many of them share a scale-up domain). Out: seconds. Conventions
as in nccl-tests: `num_bytes` is the full buffer (gathered, to be reduced, or exchanged per device), bus bandwidth is
what a ring would need, and every rate is per device and direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.hardware import Cluster

__all__ = ["Group", "Pace", "collective_s", "make_group", "pace"]

Array = Any
BASE_LATENCY_S = 8e-6
"""Launch and synchronisation of one collective; NVIDIA/nccl src/graph/tuning.cc @5067397: 6.6 to 14 us by protocol."""


@dataclass(frozen=True)
class Group:
    """Ranks that communicate: `size` in all, `per_domain` of them in one scale-up domain. Numbers or arrays."""

    size: Array
    per_domain: Array
    num_domains: Array


def make_group(size: Array, stride: Array, cluster: Cluster) -> Group:
    """The group of `size` ranks that lie `stride` ranks apart.

    Ranks are numbered with tp fastest, then cp, dp_shard, dp_replicate and pp slowest.
    """
    size, stride = np.asarray(size, float), np.asarray(stride, float)
    in_domain = np.clip(np.floor(cluster.scale_up.domain_size / stride), 1, size)
    return Group(size, in_domain, np.ceil(size / in_domain))


def _scale_up_bytes_per_s(group: Group, cluster: Cluster, collective: str) -> Array:
    """Bus bandwidth inside a domain."""
    link, ranks = cluster.scale_up, group.per_domain
    full = link.bandwidth_bytes_per_s * link.ring_efficiency_fraction
    if link.kind == "torus":
        side = link.torus_shape[0] if link.torus_shape else 16
        axes = np.clip(np.ceil(np.log2(np.maximum(ranks, 2)) / np.log2(side) - 1e-9), 1, link.torus_axes)
        along = np.where(ranks <= side, ranks, side)
        wraps = np.where(along >= link.wraparound_min_axis, 1.0, 0.5)
        return full * axes / link.torus_axes * wraps
    if link.kind == "mesh":
        return link.peer_bandwidth_bytes_per_s * link.ring_efficiency_fraction * np.maximum(ranks - 1, 1)
    if collective == "all_reduce" and link.allreduce_efficiency_fraction is not None:
        reduced_in_switch = link.bandwidth_bytes_per_s * link.allreduce_efficiency_fraction
        return np.where(ranks >= (link.allreduce_min_group or 2), np.maximum(reduced_in_switch, full), full)
    return full


def _scale_out_bytes_per_s(cluster: Cluster) -> float:
    """Achieved rate of one device's share of the node's network."""
    if cluster.scale_out is None:
        return 1e-30
    return cluster.scale_out.bandwidth_bytes_per_s * cluster.scale_out.ring_efficiency_fraction


def _latency_s(group: Group, cluster: Cluster, num_rounds: float) -> Array:
    """Ring steps: within the domain at the scale-up hop latency, between domains at the network's."""
    between = cluster.scale_out.latency_s if cluster.scale_out is not None else 0.0
    hops = (group.per_domain - 1) * cluster.scale_up.latency_s + (group.num_domains - 1) * between
    return np.where(group.size > 1, BASE_LATENCY_S + num_rounds * hops, 0.0)


@dataclass(frozen=True)
class Pace:
    """seconds = num_bytes * traffic_ratio / bytes_per_s + latency_s; numbers or arrays."""

    traffic_ratio: Array
    """Bytes that pass the slowest link, over the bytes of the buffer."""
    bytes_per_s: Array
    latency_s: Array


def pace(collective: str, group: Group, cluster: Cluster) -> Pace:
    """What a collective costs per byte and per call.

    Formula: traffic rounds * (n-1)/n over the bus bandwidth, rounds 2 for all-reduce and 1 otherwise. Across domains a
    ring leaves each domain through the network cards of all its members, so bus bandwidth is the smaller of the
    scale-up rate and members * network rate. All-to-all and ring passing move each byte once: the part that stays
    inside the domain at the scale-up rate, the rest at the network rate, at the same time.

    Args:
        collective: all_gather, reduce_scatter, all_reduce, all_to_all, ring or p2p.
    Source: NVIDIA/nccl-tests doc/PERFORMANCE.md @a0b82b2; NVIDIA/nccl src/graph/tuning.cc @5067397.
    """
    n = group.size
    inside, outside = _scale_up_bytes_per_s(group, cluster, collective), _scale_out_bytes_per_s(cluster)
    crosses = group.num_domains > 1
    share = np.where(n > 1, (n - 1) / n, 0.0)
    if collective == "p2p":
        hop = cluster.scale_up.peer_bandwidth_bytes_per_s * cluster.scale_up.ring_efficiency_fraction
        return Pace(1.0, np.where(crosses, outside, hop), _latency_s(group, cluster, 1))
    if collective == "all_to_all":
        stays = np.where(n > 1, (group.per_domain - 1) / n, 0.0)
        leaves = np.where(n > 1, (n - group.per_domain) / n, 0.0)
        is_inside = stays / inside >= leaves / outside
        return Pace(np.where(is_inside, stays, leaves), np.where(is_inside, inside, outside), _latency_s(group, cluster, 1))
    if collective == "ring":
        slowest = np.where(crosses, np.minimum(inside, outside), inside)
        return Pace(share, slowest, _latency_s(group, cluster, 1))
    rounds = 2.0 if collective == "all_reduce" else 1.0
    bus = np.where(crosses, np.minimum(_scale_up_bytes_per_s(group, cluster, "ring"), group.per_domain * outside), inside)
    return Pace(rounds * share, bus, _latency_s(group, cluster, rounds))


def collective_s(collective: str, num_bytes: Array, group: Group, cluster: Cluster) -> Array:
    """Seconds of one collective; 0 for groups of one, and for empty messages.

    Args:
        collective: see `pace`.
        num_bytes: the full buffer; for p2p the message.
    """
    found = pace(collective, group, cluster)
    seconds = num_bytes * found.traffic_ratio / found.bytes_per_s + found.latency_s
    return np.where((group.size > 1) & (np.asarray(num_bytes) > 0), seconds, 0.0)
