"""The accelerator catalog against what its sources say, and against the mistakes that other catalogs make.

Traps that concern the data of accelerators, and the test that springs each:

| source of the trap             | trap                                                                  | test                                      |
|--------------------------------|-----------------------------------------------------------------------|-------------------------------------------|
| networks, duplex               | vendors print NVLink, xGMI and NeuronLink both ways                   | test_links_are_one_way                    |
| networks, SHARP                | all-reduce above the wire rate; gathers stay on the ring              | test_only_all_reduce_gains_from_the_switch|
| networks, NVLS threshold       | the switch adds from 5 (Hopper) or 6 (Blackwell) ranks                | test_switch_adds_from_a_number_of_ranks   |
| networks, point to point       | MI300X pairs get one link of seven                                    | test_a_pair_on_a_mesh_has_one_link        |
| networks, bus bandwidth        | multi-node bus bandwidth is not the network card's rate               | test_measured_bus_bandwidth               |
| networks, Gb and GB            | network cards are named in Gbit/s                                     | test_network_names_agree_with_rates       |
| networks, PCIe cards           | no NVLink; GeForce 40 and 50 without peer-to-peer                     | test_pcie_parts_are_far_below_nvlink      |
| networks, Trainium2            | 1.28 TB/s is duplex and sums two fabrics                              | test_trainium2_counts_neighbours_one_way  |
| networks, TPU                  | ICI is printed both ways and summed over links                        | test_tpu_links_sum_one_way                |
| networks, TPU slices           | small slices have no wrap-around                                      | test_small_slices_do_not_wrap             |
| networks, cube mesh            | V100 pairs share one or two of six links                              | test_v100_is_a_cube_mesh                  |
| networks, Gaudi                | 21 of 24 ports stay inside the node                                   | test_gaudi_ports_inside_and_outside       |
| kernels, peak denominators     | printed shares of peak divide by another peak                         | test_matmul_shares_divide_by_our_own_peak |
| kernels, maximum over shapes   | a share is a maximum and belongs to a measured precision              | test_matmul_shares_divide_by_our_own_peak |
| kernels, GeForce               | fp32 accumulation at half the headline                                | test_geforce_runs_at_half_rate            |
| kernels, compute units         | H100 PCIe, SXM and H20 differ                                         | test_compute_units_per_product            |
| kernels, MI250X                | one module is two devices                                             | test_mi250x_is_one_die                    |
| energy, vendor terms           | boards, modules and dies are rated differently                        | test_board_power                          |
| energy, V100 and A100          | swapped and merged power of SXM and PCIe                              | test_board_power                          |
| price lists, memory 0 or 512   | memory missing, or of the whole instance                              | test_names_agree_with_memory              |
| data sheets, sparse            | rates with sparsity printed as dense                                  | test_rates_are_dense                      |
| data sheets, ratios            | fp8 twice bf16, with named exceptions                                 | test_rates_double_per_halved_format       |
| data sheets, formats           | A100 has no fp8, V100 and T4 no bf16                                  | test_formats_without_hardware_are_absent  |
| data sheets, one die or two    | B200 listed as one die, GB200 and H100 NVL as two boards              | test_one_device_not_a_die_nor_a_pair      |
"""

import math
import re

import pytest

from planner.collectives import collective_s, make_group
from planner.hardware import Accelerator, ClusterSpec, load_catalog
from planner.units import GIB, TERA

CATALOG = load_catalog()
IDS = list(CATALOG.accelerators)
GB_S = 1e9


def get(name: str) -> Accelerator:
    return CATALOG.accelerator(name)


def tera(name: str, rate: str) -> float:
    return get(name).dense_flops_per_s[rate] / TERA


def bus_gb_s(accelerator: str, ranks: int, num_bytes: float, offer: str | None = None, collective: str = "all_reduce") -> float:
    """Bus bandwidth as nccl-tests prints it."""
    cluster = CATALOG.resolve(ClusterSpec(accelerator=accelerator, num_devices=ranks, offer=offer))
    seconds = float(collective_s(collective, num_bytes, make_group(ranks, 1, cluster), cluster))
    rounds = 2 if collective == "all_reduce" else 1
    return num_bytes * rounds * (ranks - 1) / ranks / seconds / GB_S


def test_every_trap_of_the_table_has_its_test() -> None:
    named = set(re.findall(r"\| (test_\w+)", __doc__ or ""))
    assert named
    assert named <= set(globals())


@pytest.mark.parametrize("name", IDS)
def test_plausible_ranges(name: str) -> None:
    device = get(name)
    assert 8 * GIB <= device.memory_bytes <= 300 * GIB
    assert 0.25e12 <= device.memory_bandwidth_bytes_per_s <= 8.1e12
    assert all(0.1 <= rate / TERA <= 16_000 for rate in device.dense_flops_per_s.values())
    assert device.power_watts is None or 50 <= device.power_watts <= 1500
    assert device.num_compute_units is None or 30 <= device.num_compute_units <= 320
    assert 1 <= device.typical_node_size <= 16
    if "bf16" in device.dense_flops_per_s:  # operations per byte of memory traffic: both columns in the same unit and of one device
        assert 30 <= device.dense_flops_per_s["bf16"] / device.memory_bandwidth_bytes_per_s <= 600


@pytest.mark.parametrize("name", IDS)
def test_sourced_dated_and_rated(name: str) -> None:
    device = get(name)
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", device.date)
    assert device.confidence.split()[0] in {"high", "medium", "low"}
    assert len(device.source) > 10
    assert len(device.scale_up.source) > 10
    if "recalled" in device.source:
        assert device.confidence.startswith("low"), "a value nobody read again is not trusted"


def test_ids_and_aliases_are_unique_and_lead_home() -> None:
    assert not set(CATALOG.aliases) & set(IDS)
    for alias, name in CATALOG.aliases.items():
        assert get(alias).id == name
        assert alias in get(name).aliases
    assert sum(len(get(name).aliases) for name in IDS) == len(CATALOG.aliases)


def test_the_whole_market_is_there() -> None:
    assert len(IDS) >= 51
    assert {get(name).vendor for name in IDS} == {"NVIDIA", "AMD", "Intel", "Google", "AWS"}
    assert {f"tpu-{g}" for g in ("v2", "v3", "v4", "v5e", "v5p", "v6e", "v7x")} <= set(IDS)


@pytest.mark.parametrize("name", IDS)
def test_names_agree_with_memory(name: str) -> None:
    """`80gb` has about 80 GB: a label is GiB, or GB less what error correction takes."""
    device = get(name)
    label = re.search(r"-(\d+)gb", name)
    if label:
        assert 0.93 <= device.memory_bytes / GIB / float(label[1]) <= 1.01
    assert get("trainium2").memory_bytes == 96 * GIB
    assert get("mi325x").memory_bytes == 256 * GIB  # 288 was announced, 256 shipped
    assert get("l40s").memory_bytes < 45 * GIB


NVLINK_ONE_WAY = {
    "v100-16gb-sxm2": 150, "a100-80gb-sxm": 300, "h100-80gb-sxm": 450, "h200-141gb-sxm": 450, "h20-96gb-sxm": 450, "h800-80gb-sxm": 200,
    "b200-sxm": 900, "b300-sxm": 900, "gb200-nvl72": 900, "gb300-nvl72": 900, "mi300x": 448, "mi325x": 448, "mi350x": 535.5, "mi355x": 535.5,
    "trainium1": 192, "trainium3": 1280,
}  # fmt: skip


@pytest.mark.parametrize(("name", "gb_per_s"), NVLINK_ONE_WAY.items())
def test_links_are_one_way(name: str, gb_per_s: float) -> None:
    assert get(name).scale_up.bandwidth_bytes_per_s == pytest.approx(gb_per_s * GB_S)


def test_no_link_is_faster_than_the_fastest_published() -> None:
    for name in IDS:
        link = get(name).scale_up
        assert link.peer_bandwidth_bytes_per_s <= link.bandwidth_bytes_per_s <= 1280 * GB_S
        if link.kind == "mesh" and not name.startswith(("v100", "mi250x")):
            assert link.peer_bandwidth_bytes_per_s * (link.domain_size - 1) == pytest.approx(link.bandwidth_bytes_per_s)


def test_domain_sizes() -> None:
    assert get("h100").scale_up.domain_size == get("b200").scale_up.domain_size == get("mi300x").scale_up.domain_size == 8
    assert get("gb200").scale_up.domain_size == get("gb300").scale_up.domain_size == 72
    assert get("gb200").typical_node_size == 4
    assert {n: get(n).scale_up.domain_size for n in ("tpu-v3", "tpu-v4", "tpu-v5e", "tpu-v5p", "tpu-v6e", "tpu-v7x")} == {
        "tpu-v3": 1024, "tpu-v4": 4096, "tpu-v5e": 256, "tpu-v5p": 8960, "tpu-v6e": 256, "tpu-v7x": 9216,
    }  # fmt: skip


def test_only_all_reduce_gains_from_the_switch() -> None:
    """8 x H200, 16 GiB: all-reduce 480 GB/s, all-gather 361.4, reduce-scatter 362.9 of 450."""
    size = 16 * GIB
    assert bus_gb_s("h200", 8, size) == pytest.approx(480.0, rel=0.02)
    assert bus_gb_s("h200", 8, size, collective="all_gather") == pytest.approx(361.4, rel=0.02)
    assert bus_gb_s("h200", 8, size, collective="reduce_scatter") == pytest.approx(362.9, rel=0.02)


SWITCH_STEPS = {
    "h200": {4: 363, 5: 414, 6: 436, 7: 460, 8: 473},
    "b200": {4: 673, 5: 678, 6: 778, 7: 811, 8: 838},
}


@pytest.mark.parametrize(("name", "ranks", "gb_per_s"), [(a, n, b) for a, row in SWITCH_STEPS.items() for n, b in row.items()])
def test_switch_adds_from_a_number_of_ranks(name: str, ranks: int, gb_per_s: float) -> None:
    assert bus_gb_s(name, ranks, 8 * GIB) == pytest.approx(gb_per_s, rel=0.10)


def test_a_pair_on_a_mesh_has_one_link() -> None:
    assert bus_gb_s("mi300x", 2, 4 * GIB) == pytest.approx(47.7, rel=0.05)
    assert bus_gb_s("mi300x", 8, 4 * GIB) == pytest.approx(312.9, rel=0.05)


MEASURED_BUS_BANDWIDTH = [
    ("a100", 8, None, {0.5: 222.7, 1: 229.0, 16: 234.9}, 0.05),
    ("h200", 8, None, {1 / 16: 347, 1 / 8: 402, 1 / 4: 436, 1 / 2: 450, 1: 464, 4: 473, 16: 482}, 0.05),
    ("b200", 8, None, {1 / 8: 568, 1 / 4: 646, 1 / 2: 689, 1: 723, 4: 741, 8: 839, 16: 846}, 0.10),
    ("b200", 32, "aws/p6-b200.48xlarge", {1: 362, 4: 377, 16: 382}, 0.10),
    ("h100", 16, "aws/p5.48xlarge", {4: 466, 16: 487}, 0.10),
    ("a100", 16, "aws/p4de.24xlarge", {1: 76.8, 2: 78.3}, 0.10),
]


@pytest.mark.parametrize(("name", "ranks", "offer", "rows", "tolerance"), MEASURED_BUS_BANDWIDTH)
def test_measured_bus_bandwidth(name: str, ranks: int, offer: str | None, rows: dict[float, float], tolerance: float) -> None:
    """GiB -> GB/s of all-reduce: stas00/ml-engineering @744d01e, aws-samples/awsome-distributed-training @7217859."""
    for gib, gb_per_s in rows.items():
        assert bus_gb_s(name, ranks, gib * GIB, offer) == pytest.approx(gb_per_s, rel=tolerance), f"{gib} GiB"


@pytest.mark.parametrize("name", IDS)
def test_network_names_agree_with_rates(name: str) -> None:
    """`8x400 per node of 8` is 50 GB/s per device: bits are not bytes."""
    device = get(name)
    assert device.scale_out is not None
    rate = device.scale_out.bandwidth_bytes_per_s / GB_S
    found = re.search(r"(\d+)x(\d+)(?:GbE)?(?: ports)? per (?:node|tray) of (\d+)", device.scale_out.name)
    if found:
        assert rate == pytest.approx(int(found[1]) * int(found[2]) / 8 / int(found[3]))
        assert int(found[3]) == device.typical_node_size or name.startswith("v100")
    found = re.search(r"([\d.]+) GB/s per host of (\d+)", device.scale_out.name)
    if found:
        assert rate == pytest.approx(float(found[1]) / int(found[2]))
        assert int(found[2]) == device.typical_node_size
    assert rate <= 100


def test_pcie_parts_are_far_below_nvlink() -> None:
    for name in IDS:
        link = get(name).scale_up
        if get(name).form_factor.startswith("PCIe") and get(name).vendor == "NVIDIA":
            assert link.kind == "pcie"
            assert link.bandwidth_bytes_per_s in {16 * GB_S, 31 * GB_S, 63 * GB_S}
            assert link.domain_size == get(name).typical_node_size
    for name in ("rtx4090", "rtx5090", "l4", "l40s", "rtxpro6000-blackwell"):
        assert get(name).scale_up.bridge_size is None
    assert get("rtx4090").scale_up.ring_efficiency_fraction < 0.5 < get("l40s").scale_up.ring_efficiency_fraction
    assert bus_gb_s("l40s", 8, GIB) < 31
    assert bus_gb_s("a100-80gb-pcie", 2, GIB) > 5 * bus_gb_s("a100-80gb-pcie", 4, GIB)  # the bridge joins pairs


def test_trainium2_counts_neighbours_one_way() -> None:
    link = get("trainium2").scale_up
    assert link.bandwidth_bytes_per_s == 4 * link.peer_bandwidth_bytes_per_s == 512 * GB_S  # 1024 both ways; 256 more leave the node
    assert link.domain_size == 16


TPU_LINKS = {"tpu-v3": (4, 100), "tpu-v4": (6, 45), "tpu-v5e": (4, 45), "tpu-v5p": (6, 90), "tpu-v6e": (4, 90), "tpu-v7x": (6, 100)}


@pytest.mark.parametrize(("name", "num_links", "gb_per_s"), [(n, *row) for n, row in TPU_LINKS.items()])
def test_tpu_links_sum_one_way(name: str, num_links: int, gb_per_s: float) -> None:
    link = get(name).scale_up
    assert link.bandwidth_bytes_per_s == num_links * gb_per_s * GB_S
    assert link.peer_bandwidth_bytes_per_s == gb_per_s * GB_S
    assert 2 * link.torus_axes == num_links
    assert math.prod(link.torus_shape) == link.domain_size


def test_small_slices_do_not_wrap() -> None:
    def all_gather_gb_s(name: str, chips: int, domain: int) -> float:
        cluster = CATALOG.resolve(ClusterSpec(accelerator=name, num_devices=domain, domain_size=domain))
        seconds = float(collective_s("all_gather", 16 * GIB, make_group(chips, 1, cluster), cluster))
        return 16 * GIB * (chips - 1) / chips / seconds / GB_S

    efficiency = get("tpu-v4").scale_up.ring_efficiency_fraction
    assert all_gather_gb_s("tpu-v4", 4, 64) == pytest.approx(2 * 45 * efficiency, rel=0.01)  # one axis of a 4x4x4 cube, both ways round
    assert all_gather_gb_s("tpu-v4", 64, 64) == pytest.approx(6 * 45 * efficiency, rel=0.01)
    assert all_gather_gb_s("tpu-v4", 4, 32) == pytest.approx(45 * efficiency, rel=0.01)
    assert all_gather_gb_s("tpu-v5e", 8, 64) == pytest.approx(45 * efficiency, rel=0.01)  # an axis of 8 of 16
    assert all_gather_gb_s("tpu-v5e", 256, 256) == pytest.approx(4 * 45 * efficiency, rel=0.01)


def test_v100_is_a_cube_mesh() -> None:
    assert 20 <= bus_gb_s("v100", 2, GIB) <= 50
    assert bus_gb_s("v100", 8, GIB) == pytest.approx(6 * 20.0, rel=0.02)  # NCCL counts 20.0 GB/s per link


def test_gaudi_ports_inside_and_outside() -> None:
    for name, port_gb_s in (("gaudi2", 12.5), ("gaudi3", 25.0)):
        link, out = get(name).scale_up, get(name).scale_out
        assert out is not None
        assert (link.bandwidth_bytes_per_s, out.bandwidth_bytes_per_s) == (21 * port_gb_s * GB_S, 3 * port_gb_s * GB_S)


BEST_MATMUL_TFLOP_PER_S = {
    "gaudi2": {"bf16": 418.7, "fp8": 826.5}, "a100-80gb-sxm": {"bf16": 271.2}, "gh200-144gb": {"bf16": 828.6, "fp8": 1535},
    "a100-80gb-pcie": {"bf16": 252.9}, "h100-80gb-sxm": {"bf16": 794.5, "fp8": 1402.6}, "h200-141gb-sxm": {"fp8": 1453.4},
    "b300-sxm": {"bf16": 1769, "fp8": 3353.3}, "b200-sxm": {"bf16": 1745, "fp8": 3432.5}, "gaudi3": {"bf16": 1243, "fp8": 1289.5},
    "gb200-nvl72": {"bf16": 1822, "fp8": 3615.6}, "mi355x": {"bf16": 1565}, "mi325x": {"bf16": 784.9}, "mi300x": {"bf16": 668.4},
}  # fmt: skip


@pytest.mark.parametrize("name", BEST_MATMUL_TFLOP_PER_S)
def test_matmul_shares_divide_by_our_own_peak(name: str) -> None:
    """stas00/ml-engineering @744d01e divides MI355X by 2300 and Gaudi3 by 1835; we divide by the rate of the entry."""
    for rate, measured in BEST_MATMUL_TFLOP_PER_S[name].items():
        assert get(name).matmul_max_fraction[rate] * tera(name, rate) == pytest.approx(measured, rel=0.002)


def test_matmul_shares_are_of_known_rates() -> None:
    for name in IDS:
        device = get(name)
        assert set(device.matmul_max_fraction) <= set(device.dense_flops_per_s), name
        assert all(0.4 < share < 1 for share in device.matmul_max_fraction.values()), name


def test_geforce_runs_at_half_rate() -> None:
    assert tera("rtx3090", "bf16") == pytest.approx(71, rel=0.01)  # headline 142
    assert tera("rtx4090", "bf16") == pytest.approx(165, rel=0.01)  # headline 330
    assert tera("rtx5090", "bf16") == pytest.approx(209.5, rel=0.01)
    for full_rate in ("a40", "rtx6000ada", "l40s"):
        assert tera(full_rate, "bf16") == pytest.approx(4 * tera(full_rate, "fp32"), rel=0.02)
    for half_rate in ("rtx3090", "rtx4090", "rtx5090"):
        assert tera(half_rate, "bf16") == pytest.approx(2 * tera(half_rate, "fp32"), rel=0.01)


def test_compute_units_per_product() -> None:
    expected = {"h100-80gb-sxm": 132, "h100-80gb-pcie": 114, "h20-96gb-sxm": 78, "b200-sxm": 148, "a100-80gb-sxm": 108, "l4": 58, "mi300x": 304}
    assert {name: get(name).num_compute_units for name in expected} == expected


def test_mi250x_is_one_die() -> None:
    device = get("mi250x")
    assert (tera("mi250x", "bf16"), device.memory_bytes, device.typical_node_size) == (191.5, 64 * GIB, 16)
    assert device.memory_bandwidth_bytes_per_s == pytest.approx(1638.5 * GB_S)
    assert device.num_compute_units == 110
    assert device.scale_out is not None
    assert device.scale_out.bandwidth_bytes_per_s == 12.5 * GB_S  # a module's card serves two


BOARD_WATTS = {
    "gb300-nvl72": 1400, "mi355x": 1400, "gb200-nvl72": 1200, "b200-sxm": 1000, "b300-sxm": 1000, "mi325x": 1000, "mi350x": 1000, "gaudi3": 900,
    "mi300x": 750, "h100-80gb-sxm": 700, "h200-141gb-sxm": 700, "gaudi2": 600, "mi250x": 560 / 2, "h100-94gb-nvl": 400, "a100-80gb-sxm": 400,
    "a100-80gb-pcie": 300, "a100-40gb-pcie": 250, "l40s": 350, "v100-16gb-sxm2": 300, "v100-16gb-pcie": 250,
}  # fmt: skip


def test_board_power() -> None:
    assert {name: get(name).power_watts for name in BOARD_WATTS} == BOARD_WATTS
    assert get("tpu-v5p").power_watts is None, "unpublished stays unknown"


def test_rates_are_dense() -> None:
    """Each with the number with sparsity that some page prints in its place."""
    for name, rate, dense, sparse in (
        ("h100", "bf16", 989.4, 1979), ("h100", "fp8", 1979, 3958), ("h200", "bf16", 989.4, 1979), ("a100", "bf16", 312, 624),
        ("b200", "bf16", 2250, 4500), ("b300", "fp8", 4500, 9000), ("gb200", "bf16", 2500, 5000), ("mi300x", "fp8", 2614.9, 5229.8),
        ("mi355x", "fp8", 5033.2, 10066), ("l40s", "fp8", 733, 1466), ("rtx6000ada", "fp8", 728.5, 1457), ("trainium2", "fp8", 1299, 2563),
        ("h100-nvl", "bf16", 835.5, 1671), ("h20", "bf16", 148, 296), ("tpu-v7x", "fp8", 4614, 9228),
    ):  # fmt: skip
        assert tera(name, rate) == pytest.approx(dense, rel=0.001)
        assert tera(name, rate) < 0.6 * sparse


FP8_OVER_BF16 = {"gaudi3": 1.0, "tpu-v5p": 1.0, "tpu-v6e": 1.0, "trainium1": 1.0, "trainium2": 1.95}
"""Exceptions from 2: fp8 emulated, limited by another unit, or at the bf16 rate."""
INT8_OVER_BF16 = {"rtx3090": 4.0, "rtx4090": 4.0, "rtx5090": 4.0, "mi210": 1.0, "mi250x": 1.0, "tpu-v4": 1.0}
"""Exceptions from 2: GeForce halves only what accumulates in fp32; CDNA2 and TPU v4 run int8 at the bf16 rate."""
FP16_OVER_BF16 = {"gaudi3": 459 / 1677}
TF32_OVER_BF16 = {"gaudi3": 459 / 1677, "trainium1": 1.0, "trainium2": 1.0, "trainium3": 1.0}


@pytest.mark.parametrize("name", IDS)
def test_rates_double_per_halved_format(name: str) -> None:
    rates = get(name).dense_flops_per_s
    if "bf16" not in rates:
        return
    expected = {"fp16": (1.0, FP16_OVER_BF16), "tf32": (0.5, TF32_OVER_BF16), "fp8": (2.0, FP8_OVER_BF16), "int8": (2.0, INT8_OVER_BF16)}
    for rate, (usual, exceptions) in expected.items():
        if rate in rates:
            assert rates[rate] / rates["bf16"] == pytest.approx(exceptions.get(name, usual), rel=0.015)
    if "fp8" in rates and "mxfp8" in rates:
        assert rates["fp8"] == rates["mxfp8"]


def test_formats_without_hardware_are_absent() -> None:
    def having(rate: str) -> set[str]:
        return {name for name in IDS if rate in get(name).dense_flops_per_s}

    assert not {n for n in having("fp8") if n.startswith(("a100", "v100", "t4", "a10", "a30", "a40", "rtx3090", "mi2", "tpu-v4"))}
    assert not {n for n in having("bf16") if n.startswith(("v100", "t4"))}
    assert not {n for n in having("tf32") if n.startswith(("v100", "t4", "mi350x", "mi355x", "tpu"))}
    assert {n.split("-")[0].rstrip("x") for n in having("nvfp4")} <= {"b100", "b200", "b300", "gb200", "gb300", "rtx5090"}
    assert having("mxfp4") == {"mi350x", "mi355x", "trainium3"}
    assert "bf16" not in get("rtxpro6000-blackwell").dense_flops_per_s, "its sources differ by a factor of two"
    assert tera("a10g", "bf16") < 0.6 * tera("a10", "bf16")


def test_one_device_not_a_die_nor_a_pair() -> None:
    assert 170 * GIB < get("b200").memory_bytes < 192 * GIB  # one die: 90 GB
    assert get("b200").memory_bandwidth_bytes_per_s == 8e12  # one die: 4.1 TB/s
    assert get("mi300x").memory_bandwidth_bytes_per_s == 5.3e12  # printed doubled elsewhere
    assert 90 * GIB < get("h100-nvl").memory_bytes < 94 * GIB  # a pair: 188 GB
    assert get("gb200").memory_bytes < 200 * GIB  # a superchip: 372 GB
    assert get("v100").memory_bandwidth_bytes_per_s == 0.9e12  # V100S: 1130 GB/s
    assert tera("tpu-v3", "bf16") == 123  # per chip of two cores
