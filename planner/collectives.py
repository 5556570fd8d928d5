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
LONG_STEP_FACTOR = 3.3
"""Step latency of long messages (protocol Simple) over that of short ones (LL128, in the catalog).

NVIDIA/nccl src/graph/tuning.cc @5067397: 14 over 4 us on the network, 3.4 over 1.9 on NVLink; 8 x H200 all-reduce of 16 MiB to
1 GiB, stas00/ml-engineering network/README.md @744d01e: 60 us over 14 steps more than short ones.
"""
LONG_MESSAGE_BYTES = 8.0 * 2**20
"""Where half of that is reached; same measurement."""


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


def _ring_bytes_per_s(ranks: Array, cluster: Cluster) -> Array:
    """Bus bandwidth of a ring over `ranks` of one domain."""
    link = cluster.scale_up
    full = link.bandwidth_bytes_per_s * link.ring_efficiency_fraction
    if link.kind == "torus":
        axes, along = _torus_axes(ranks, cluster)
        has_cube = link.domain_size >= link.wraparound_min_axis**link.torus_axes
        wraps = np.where((along >= link.wraparound_min_axis) & has_cube, 1.0, 0.5)
        return full * axes / link.torus_axes * wraps
    if link.kind == "mesh":  # a group uses the links between its own members only
        return np.minimum(full, link.peer_bandwidth_bytes_per_s * link.ring_efficiency_fraction * np.maximum(ranks - 1, 1))
    if link.bridge_size is not None and link.bridge_bandwidth_bytes_per_s is not None:
        return np.where(ranks <= link.bridge_size, link.bridge_bandwidth_bytes_per_s * link.ring_efficiency_fraction, full)
    return full


def _torus_axes(ranks: Array, cluster: Cluster) -> tuple[Array, Array]:
    """How many axes of the slice a group spans, and its length along each; slices are as near to cubes as powers of two allow."""
    link = cluster.scale_up
    side = min(link.torus_shape[0], 2.0 ** np.ceil(np.log2(max(link.domain_size, 2)) / link.torus_axes - 1e-9))
    axes = np.clip(np.ceil(np.log2(np.maximum(ranks, 2)) / np.log2(side) - 1e-9), 1, link.torus_axes)
    return axes, np.minimum(ranks, side)


def _inside_pace(collective: str, group: Group, cluster: Cluster) -> tuple[Array, Array]:
    """(traffic ratio, bytes per second) within a domain; where the switch adds, every device sends the buffer once."""
    link, ranks = cluster.scale_up, group.per_domain
    ratio = (2.0 if collective == "all_reduce" else 1.0) * (ranks - 1) / ranks
    rate = _ring_bytes_per_s(ranks, cluster)
    if collective != "all_reduce" or link.allreduce_efficiency_fraction is None or link.allreduce_min_group is None:
        return ratio, rate
    in_switch = link.bandwidth_bytes_per_s * link.allreduce_efficiency_fraction
    adds = (ranks >= link.allreduce_min_group) & (1 / in_switch < ratio / rate)
    return np.where(adds, 1.0, ratio), np.where(adds, in_switch, rate)


def _scale_out_bytes_per_s(cluster: Cluster) -> float:
    """Achieved rate of one device's share of the node's network."""
    if cluster.scale_out is None:
        return 1e-30
    return cluster.scale_out.bandwidth_bytes_per_s * cluster.scale_out.ring_efficiency_fraction


def _latency_s(collective: str, num_bytes: Array, group: Group, cluster: Cluster) -> Array:
    """Launch and steps: of a ring, or for all-reduce of a tree where that is shorter; long messages take slower steps."""
    inside, between = cluster.scale_up.latency_s, cluster.scale_out.latency_s if cluster.scale_out is not None else 0.0
    n, m, k = group.size, group.per_domain, group.num_domains
    slower = 1 + (LONG_STEP_FACTOR - 1) * num_bytes / (num_bytes + LONG_MESSAGE_BYTES)
    if cluster.scale_up.kind == "torus":  # rings run both ways round each axis at once, and the hardware has one protocol
        axes, along = _torus_axes(m, cluster)
        steps = np.where(m > 1, axes * along / 2 * inside, 0.0) + (k - 1) * between * slower
    else:
        steps = ((n - k) * inside + (k - 1) * between) * slower
        if collective == "all_reduce":
            steps = np.minimum(steps, ((m - 1) * inside + np.log2(np.maximum(k, 1)) * between) * slower)
    rounds = 2.0 if collective == "all_reduce" else 1.0
    return np.where(n > 1, BASE_LATENCY_S + rounds * steps, 0.0)


@dataclass(frozen=True)
class Pace:
    """seconds = num_bytes * traffic_ratio / bytes_per_s + latency_s; numbers or arrays."""

    traffic_ratio: Array
    """Bytes that pass the slowest link, over the bytes of the buffer."""
    bytes_per_s: Array
    latency_s: Array


def pace(collective: str, num_bytes: Array, group: Group, cluster: Cluster) -> Pace:
    """What a collective of this size costs per byte and per call.

    Formula: the slower of two parts, which are pipelined: within domains of m ranks, rounds * (m-1)/m of the buffer at the ring's
    rate; between the k domains, rounds * (k-1)/k / m of it, as every device sends its m-th part through its own share of the
    network; rounds is 2 for all-reduce and 1 otherwise. All-to-all and ring passing move each byte once: the part that stays inside
    the domain at the scale-up rate, the rest at the network rate, at the same time. Left out: congestion, and NCCL's changes of
    protocol. Against the measured all-reduces: within 10% from 1 GiB (two nodes: 14%); 16 to 256 MiB take up to 1.4 times as long
    within a node (A100), 1.3 to 2.5 times across two to four nodes.

    Args:
        collective: all_gather, reduce_scatter, all_reduce, all_to_all, ring or p2p.
        num_bytes: the full buffer; for p2p the message. Only the latency depends on it.
        group: the ranks.
        cluster: their links.

    Source: NVIDIA/nccl-tests doc/PERFORMANCE.md @a0b82b2; NVIDIA/nccl src/graph/tuning.cc @5067397; measured tables in
    stas00/ml-engineering network/README.md @744d01e and aws-samples/awsome-distributed-training @7217859.
    """
    n, m, k = group.size, group.per_domain, group.num_domains
    inside, outside = _ring_bytes_per_s(m, cluster), _scale_out_bytes_per_s(cluster)
    latency = _latency_s(collective, num_bytes, group, cluster)
    if collective == "p2p":
        hop = cluster.scale_up.peer_bandwidth_bytes_per_s * cluster.scale_up.ring_efficiency_fraction
        return Pace(1.0, np.where(k > 1, outside, hop), latency)
    if collective == "ring":
        return Pace((n - 1) / n, np.where(k > 1, np.minimum(inside, outside), inside), latency)
    if collective == "all_to_all":
        stays, leaves = (m - 1) / n, (n - m) / n
    else:
        stays, inside = _inside_pace(collective, group, cluster)
        leaves = (2.0 if collective == "all_reduce" else 1.0) * (k - 1) / k / m
    is_inside = stays / inside >= leaves / outside
    return Pace(np.where(is_inside, stays, leaves), np.where(is_inside, inside, outside), latency)


def collective_s(collective: str, num_bytes: Array, group: Group, cluster: Cluster) -> Array:
    """Seconds of one collective; 0 for groups of one, and for empty messages.

    Args:
        collective: see `pace`.
        num_bytes: the full buffer; for p2p the message.
        group: the ranks.
        cluster: their links.
    """
    found = pace(collective, num_bytes, group, cluster)
    seconds = num_bytes * found.traffic_ratio / found.bytes_per_s + found.latency_s
    for key, curve in cluster.scale_up.curves.items():
        measured, _, size = key.partition("/")
        if measured == collective:
            seconds = np.where((group.size == int(size)) & (group.num_domains == 1), curve.at(num_bytes), seconds)
    return np.where((group.size > 1) & (np.asarray(num_bytes) > 0), seconds, 0.0)
