"""Links of every shipped accelerator: one direction, per device, never above the wire; each trap of the sources by name."""

from __future__ import annotations

import math

import pytest

from planner.collectives import collective_s, make_group
from planner.hardware import Accelerator, ClusterSpec, load_catalog
from planner.units import parse

CATALOG = load_catalog()
IDS = list(CATALOG.accelerators)
NO_SWITCH = {"rtx4090", "rtx5090", "l4", "l40s", "rtxpro6000-blackwell", "rtx6000ada", "t4", "a10", "a10g"}


def get(name: str) -> Accelerator:
    return CATALOG.accelerator(name)


@pytest.mark.parametrize(
    ("name", "one_way", "duplex"),
    [("v100-32gb-sxm2", 150, 300), ("a100-80gb-sxm", 300, 600), ("h100-80gb-sxm", 450, 900), ("h200-141gb-sxm", 450, 900),
     ("h800-80gb-sxm", 200, 400),
     ("b200-sxm", 900, 1800), ("gb200-nvl72", 900, 1800), ("mi300x", 448, 896), ("mi355x", 535.5, 1071), ("trainium1", 192, 384),
     ("trainium2", 512, 1024), ("trainium3", 1280, 2560), ("tpu-v5e", 180, 400), ("tpu-v5p", 540, 1200), ("tpu-v7x", 600, 1200)],
)  # fmt: skip
def test_trap_duplex_rates_are_halved(name: str, one_way: float, duplex: float) -> None:
    assert get(name).scale_up.bandwidth_bytes_per_s == pytest.approx(one_way * 1e9)
    assert get(name).scale_up.bandwidth_bytes_per_s <= duplex * 1e9 / 2


def busbw(name: str, collective: str, num_ranks: int) -> float:
    """Bus bandwidth of a huge message within one domain, as nccl-tests defines it."""
    device = get(name)
    cluster = CATALOG.resolve(ClusterSpec(accelerator=name, num_devices=num_ranks, node_size=min(num_ranks, device.typical_node_size)))
    num_bytes = 1e13
    rounds = 2 if collective == "all_reduce" else 1
    seconds = float(collective_s(collective, num_bytes, make_group(num_ranks, 1, cluster), cluster))
    return num_bytes * rounds * (num_ranks - 1) / num_ranks / seconds


def test_trap_switch_reduction_speeds_all_reduce_only() -> None:
    """H200: all-reduce reads 480 GB/s, above the wire's 450; all-gather and reduce-scatter stay on the ring at 361 to 363."""
    assert busbw("h200", "all_reduce", 8) == pytest.approx(480e9, rel=0.01)
    for collective in ("all_gather", "reduce_scatter"):
        assert busbw("h200", collective, 8) == pytest.approx(362e9, rel=0.02)
    assert busbw("a100", "all_reduce", 8) == pytest.approx(235e9, rel=0.01)
    assert 741e9 < busbw("b200", "all_reduce", 8) < 846e9
    assert busbw("b200", "all_gather", 8) == pytest.approx(682e9, rel=0.01)


@pytest.mark.parametrize(("name", "num_ranks", "measured"), [("h200", 4, 363), ("h200", 5, 414), ("h200", 6, 436), ("h200", 7, 460), ("b200", 5, 678),
                                                             ("b200", 7, 811), ("mi300x", 2, 47.7), ("mi300x", 8, 312.9)])  # fmt: skip
def test_measured_bus_bandwidth(name: str, num_ranks: int, measured: float) -> None:
    assert busbw(name, "all_reduce", num_ranks) == pytest.approx(measured * 1e9, rel=0.08)


@pytest.mark.parametrize("name", IDS)
def test_ring_never_above_the_wire(name: str) -> None:
    """A partial mesh (V100, MI250X) has fewer links than pairs."""
    link = get(name).scale_up
    wire = max(link.bandwidth_bytes_per_s, link.bridge_bandwidth_bytes_per_s or 0)
    for num_ranks in (2, 4, 8, 16, 64):
        if num_ranks <= link.domain_size:
            assert 0 < busbw(name, "all_gather", num_ranks) <= 0.9 * wire


def test_trap_switch_reduction_has_a_threshold() -> None:
    """Five of eight on Hopper, six on Blackwell: a group of four gets ring speed. None before Hopper, none on AMD."""
    found = {name: get(name).scale_up.allreduce_min_group for name in IDS}
    assert {found[n] for n in ("h100-80gb-sxm", "h200-141gb-sxm")} == {5}
    assert {found[n] for n in ("b200-sxm", "b300-sxm")} == {6}
    assert all(found[n] is None for n in IDS if n.startswith(("v100", "a100", "mi", "gaudi", "tpu", "trainium", "rtx")))


@pytest.mark.parametrize(("name", "peer"), [("mi300x", 64), ("mi325x", 64), ("mi350x", 76.5), ("mi355x", 76.5), ("gaudi2", 37.5), ("gaudi3", 75)])
def test_trap_mesh_pairs_share_one_link(name: str, peer: float) -> None:
    link = get(name).scale_up
    assert link.kind == "mesh"
    assert link.peer_bandwidth_bytes_per_s == pytest.approx(peer * 1e9)
    assert link.bandwidth_bytes_per_s == pytest.approx(7 * peer * 1e9)


def test_trap_v100_mesh_is_not_a_switch() -> None:
    assert get("v100-32gb-sxm2").scale_up.peer_bandwidth_bytes_per_s == pytest.approx(50e9)


def test_trap_multi_node_busbw_is_not_the_card_rate() -> None:
    """381.8 GB/s of bus bandwidth on 4 x 8 B200 is 37 GB/s per card of 50."""
    network = get("b200").scale_out
    assert network is not None
    assert network.bandwidth_bytes_per_s == 50e9
    assert network.bandwidth_bytes_per_s * network.ring_efficiency_fraction == pytest.approx(381.8e9 * 3 / 31, rel=0.02)


@pytest.mark.parametrize(("name", "per_device"), [("a100", 25), ("h100", 50), ("h200", 50), ("b200", 50), ("b300", 100), ("gb200", 50),
                                                             ("trn1", 6.25),
                                                  ("trn2", 25), ("gaudi2", 37.5), ("gaudi3", 75), ("tpu-v4", 6.25), ("tpu-v5e", 3.125)])  # fmt: skip
def test_trap_network_is_per_device(name: str, per_device: float) -> None:
    network = get(name).scale_out
    assert network is not None
    assert network.bandwidth_bytes_per_s == pytest.approx(per_device * 1e9)


def test_trap_decimal_and_binary_bytes() -> None:
    assert parse("3200 Gbps", "bytes_per_s") == 400e9
    assert parse("80 GiB", "bytes") / parse("80 GB", "bytes") == pytest.approx(1.0737, abs=1e-4)


@pytest.mark.parametrize("name", sorted(NO_SWITCH))
def test_trap_pcie_cards_have_no_nvlink(name: str) -> None:
    link = get(name).scale_up
    assert link.kind == "pcie"
    assert link.bridge_size is None
    assert link.bandwidth_bytes_per_s <= 63e9


@pytest.mark.parametrize("name", ["rtx4090", "rtx5090"])
def test_trap_geforce_stages_through_host_memory(name: str) -> None:
    assert get(name).scale_up.ring_efficiency_fraction <= 0.3


@pytest.mark.parametrize("name", ["a100-40gb-pcie", "a100-80gb-pcie", "h100-80gb-pcie", "h100-94gb-nvl", "a30", "a40", "rtx3090"])
def test_trap_bridges_join_pairs_only(name: str) -> None:
    """The bridge's rate holds between two cards; a ring of four passes PCIe."""
    link = get(name).scale_up
    assert link.kind == "pcie"
    assert link.bridge_size == 2
    assert link.bandwidth_bytes_per_s <= 63e9


def test_trap_trainium2_neighbours() -> None:
    """1.28 TB/s is duplex and counts the links between instances."""
    link = get("trainium2").scale_up
    assert link.peer_bandwidth_bytes_per_s == 128e9
    assert link.bandwidth_bytes_per_s == 4 * 128e9
    assert link.domain_size == 16


@pytest.mark.parametrize("name", [n for n in IDS if n.startswith("tpu")])
def test_trap_tpu_rates_are_sums_over_links(name: str) -> None:
    """Per chip and direction: two links per torus axis."""
    link = get(name).scale_up
    assert link.bandwidth_bytes_per_s == pytest.approx(2 * link.torus_axes * link.peer_bandwidth_bytes_per_s)
    assert link.domain_size <= math.prod(link.torus_shape)
    assert link.wraparound_min_axis == (16 if name in ("tpu-v5e", "tpu-v6e") else 4)


@pytest.mark.parametrize(("name", "shape"), [("tpu-v3", (32, 32)), ("tpu-v4", (16, 16, 16)), ("tpu-v5e", (16, 16)), ("tpu-v5p", (16, 20, 28)),
                                             ("tpu-v6e", (16, 16))])  # fmt: skip
def test_largest_slices(name: str, shape: tuple[int, ...]) -> None:
    link = get(name).scale_up
    assert link.torus_shape == shape
    assert link.domain_size == math.prod(shape)
