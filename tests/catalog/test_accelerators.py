"""Every shipped accelerator: plausible, dense, one direction, sourced; and each known trap of the sources, by name."""

from __future__ import annotations

import datetime
import re

import pytest

from planner.hardware import Accelerator, load_catalog
from planner.units import GIB

CATALOG = load_catalog()
IDS = list(CATALOG.accelerators)
EXPECTED = [
    "v100-16gb-sxm2", "v100-32gb-sxm2", "v100-16gb-pcie", "v100-32gb-pcie", "t4", "a10", "a10g", "a30", "a40", "rtx3090", "a100-40gb-sxm",
    "a100-80gb-sxm", "a100-40gb-pcie", "a100-80gb-pcie", "rtx4090", "rtx5090", "rtx6000ada", "l4", "l40s", "h100-80gb-sxm", "h100-80gb-pcie",
    "h100-94gb-nvl", "h800-80gb-sxm", "h20-96gb-sxm", "h200-141gb-sxm", "gh200-96gb", "gh200-144gb", "b100-sxm", "b200-sxm", "b300-sxm",
    "gb200-nvl72", "gb300-nvl72", "rtxpro6000-blackwell", "mi210", "mi250x", "mi300x", "mi325x", "mi350x", "mi355x", "gaudi2", "gaudi3",
    "tpu-v2", "tpu-v3", "tpu-v4", "tpu-v5e", "tpu-v5p", "tpu-v6e", "tpu-v7x", "trainium1", "trainium2", "trainium3",
]  # fmt: skip
PRECISIONS = {"fp64", "fp32", "tf32", "fp16", "bf16", "fp8", "mxfp8", "mxfp6", "mxfp4", "nvfp4", "int8"}
GEFORCE = {"rtx3090", "rtx4090", "rtx5090"}

# Newest year of a period -> the most that any part shipped by then has.
BF16_CEILING = {2018: 130e12, 2021: 400e12, 2023: 1400e12, 2035: 2600e12}
BANDWIDTH_CEILING = {2018: 0.91e12, 2021: 3.3e12, 2023: 5.4e12, 2035: 8.1e12}
MEMORY_CEILING = {2018: 33 * GIB, 2021: 128 * GIB, 2023: 193 * GIB, 2035: 290 * GIB}


def get(name: str) -> Accelerator:
    return CATALOG.accelerator(name)


def peak(name: str, precision: str = "bf16") -> float:
    return get(name).dense_flops_per_s[precision]


def ceiling(table: dict[int, float], year: int) -> float:
    return next(limit for last, limit in table.items() if year <= last)


def test_all_accelerators_are_there() -> None:
    assert len(EXPECTED) == 51
    assert set(EXPECTED) <= set(IDS)


@pytest.mark.parametrize("name", IDS)
class TestEveryEntry:
    def test_magnitudes_fit_the_year(self, name: str) -> None:
        device = get(name)
        assert 15 * GIB < device.memory_bytes < ceiling(MEMORY_CEILING, device.year)
        assert 250e9 < device.memory_bandwidth_bytes_per_s <= ceiling(BANDWIDTH_CEILING, device.year)
        best = max(device.dense_flops_per_s.get(p, 0.0) for p in ("bf16", "fp16"))
        assert best <= ceiling(BF16_CEILING, device.year)
        assert device.power_watts is None or 70 <= device.power_watts <= 1400
        assert 1 <= device.typical_node_size <= 16
        assert 2017 <= device.year <= datetime.date.today().year

    def test_machine_balance(self, name: str) -> None:
        """FLOP per byte of memory traffic: a rate that is ten times off, or a sparse one on slow memory, falls out."""
        device = get(name)
        best = max((device.dense_flops_per_s.get(p, 0.0) for p in ("bf16", "fp16")), default=0.0)
        if best:
            assert 30 < best / device.memory_bandwidth_bytes_per_s < 600

    def test_rates_are_dense(self, name: str) -> None:
        """Halving the width doubles the rate at most; a sparse number in one column would make it four."""
        rates = get(name).dense_flops_per_s
        assert set(rates) <= PRECISIONS
        assert "fp32" in rates or "bf16" in rates
        for wide, narrow, least, most in (("bf16", "fp8", 1, 2), ("fp8", "mxfp8", 1, 1), ("tf32", "bf16", 1, 4), ("fp64", "fp32", 1, 80)):
            if wide in rates and narrow in rates:
                assert 0.99 * least < rates[narrow] / rates[wide] < 1.02 * most, (wide, narrow)
        if "fp16" in rates and "bf16" in rates and name != "gaudi3":
            assert rates["fp16"] == rates["bf16"]
        if "int8" in rates and "bf16" in rates:
            assert 0.99 < rates["int8"] / rates["bf16"] < (4.05 if name in GEFORCE else 2.04)
        for four_bit in ("nvfp4", "mxfp4"):
            if four_bit in rates and "bf16" in rates:
                assert 3.7 < rates[four_bit] / rates["bf16"] < (8.1 if name in GEFORCE else 6.1)

    def test_id_agrees_with_memory(self, name: str) -> None:
        label = re.search(r"-(\d+)gb", name)
        if label:
            gigabytes = float(label[1])
            memory = get(name).memory_bytes
            assert min(abs(memory / 1e9 / gigabytes - 1), abs(memory / GIB / gigabytes - 1)) < 0.05

    def test_id_agrees_with_form(self, name: str) -> None:
        device = get(name)
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert device.id == name
        for part in ("sxm", "pcie"):
            if part in name:
                assert part in device.form_factor.lower()
        kind = "tpu" if name.startswith("tpu") else "npu" if device.vendor in ("Intel", "AWS") else "gpu"
        assert device.kind == kind

    def test_sourced_and_dated(self, name: str) -> None:
        device = get(name)
        assert len(device.source) > 10
        assert datetime.date.fromisoformat(device.date) <= datetime.date.today()
        assert device.confidence.split()[0] in ("high", "medium", "low")
        links = [device.scale_up, device.scale_out]
        assert all(link is None or len(link.source) > 10 for link in links)
        text = device.source + device.notes + "".join(link.source for link in links if link)
        assert not re.search(r"find_string|shared/|/work/|hit id|skypilot trap", text)

    def test_recalled_values_have_low_confidence(self, name: str) -> None:
        device = get(name)
        if "recalled, not re-read" in device.source:
            assert device.confidence.startswith("low")

    def test_matmul_fractions_belong_to_a_rate(self, name: str) -> None:
        """A maximum over shapes is below the peak it is divided by, and needs that peak."""
        device = get(name)
        assert set(device.matmul_max_fraction) <= set(device.dense_flops_per_s)
        assert all(0.4 < fraction < 0.98 for fraction in device.matmul_max_fraction.values())
        assert not device.matmul_max_fraction or "matmul_max_fraction" in device.source

    def test_links_are_whole(self, name: str) -> None:
        device = get(name)
        link, network = device.scale_up, device.scale_out
        assert link.peer_bandwidth_bytes_per_s <= link.bandwidth_bytes_per_s <= 1300e9
        assert (link.kind == "torus") == (name.startswith("tpu"))
        assert 1e-7 < link.latency_s < 2e-5
        assert link.ring_efficiency_fraction <= 0.9
        assert link.allreduce_efficiency_fraction is None or link.kind == "switch"
        if link.evidence == "measured":
            assert re.search(r"\d", link.source)
        if link.bridge_size is not None:
            assert (link.bridge_size, link.kind) == (2, "pcie")
            assert (link.bridge_bandwidth_bytes_per_s or 0) > link.bandwidth_bytes_per_s
        assert network is not None
        assert network.bandwidth_bytes_per_s <= 100e9, "per device, not per node"
        assert 0.7 <= network.ring_efficiency_fraction <= 0.9
        assert network.latency_s >= link.latency_s


def test_names_and_aliases_are_unique() -> None:
    named = [alias.lower() for name in IDS for alias in get(name).aliases]
    assert len(named) == len(set(named))
    assert not set(named) & set(IDS)
    assert all(CATALOG.accelerator(alias.upper()).id == CATALOG.aliases[alias] for alias in named)


@pytest.mark.parametrize(
    ("short", "full"),
    [("h100", "h100-80gb-sxm"), ("a100", "a100-80gb-sxm"), ("h200", "h200-141gb-sxm"), ("b200", "b200-sxm"), ("gb200", "gb200-nvl72"),
     ("trn2", "trainium2"), ("trillium", "tpu-v6e"), ("ironwood", "tpu-v7x"), ("rtx-4090", "rtx4090")],
)  # fmt: skip
def test_what_people_call_them(short: str, full: str) -> None:
    assert get(short).id == full


@pytest.mark.parametrize(
    ("name", "precision", "dense", "headline"),
    [("h100-80gb-sxm", "bf16", 989.4, 1979), ("h100-80gb-sxm", "fp8", 1979, 3958), ("h100-94gb-nvl", "bf16", 835.5, 1671),
     ("h200-141gb-sxm", "bf16", 989.4, 1979), ("h20-96gb-sxm", "bf16", 148, 296), ("b200-sxm", "bf16", 2250, 4500), ("b200-sxm", "fp8", 4500, 9000),
     ("b300-sxm", "bf16", 2250, 3500), ("b300-sxm", "fp8", 4500, 7000), ("a100-80gb-sxm", "bf16", 312, 624), ("l40s", "fp8", 733, 1466),
     ("rtx6000ada", "fp8", 728.5, 1457), ("mi300x", "bf16", 1307.4, 2614.9), ("mi355x", "fp8", 5033.2, 10066), ("trainium2", "fp8", 1299, 2563)],
)  # fmt: skip
def test_trap_sparse_headline(name: str, precision: str, dense: float, headline: float) -> None:
    assert peak(name, precision) == pytest.approx(dense * 1e12)
    assert peak(name, precision) < headline * 1e12


@pytest.mark.parametrize(
    ("name", "precision", "achieved"),
    [("mi355x", "bf16", 1565), ("gb200-nvl72", "bf16", 1822), ("b200-sxm", "bf16", 1745), ("mi300x", "bf16", 668.4), ("mi325x", "bf16", 784.9),
     ("gaudi3", "bf16", 1243), ("gaudi2", "bf16", 418.7), ("h100-80gb-sxm", "bf16", 794.5), ("a100-80gb-sxm", "bf16", 271.2),
     ("h100-80gb-sxm", "fp8", 1402.6),
     ("h200-141gb-sxm", "fp8", 1453.4), ("b300-sxm", "fp8", 3353.3)],
)  # fmt: skip
def test_trap_matmul_fraction_is_over_our_own_peak(name: str, precision: str, achieved: float) -> None:
    """The published table divides MI355X by 2300 and Gaudi3 by 1835 in places."""
    assert get(name).matmul_max_fraction[precision] * peak(name, precision) == pytest.approx(achieved * 1e12, rel=2e-3)


@pytest.mark.parametrize(("name", "half_rate"), [("rtx3090", 71.2), ("rtx4090", 165.2), ("rtx5090", 209.5)])
def test_trap_geforce_half_rate_with_fp32_accumulation(name: str, half_rate: float) -> None:
    assert peak(name) == pytest.approx(half_rate * 1e12)


@pytest.mark.parametrize(("name", "full_rate"), [("a40", 149.7), ("rtx6000ada", 364.2), ("l40s", 362)])
def test_workstation_siblings_run_at_full_rate(name: str, full_rate: float) -> None:
    assert peak(name) == pytest.approx(full_rate * 1e12)


@pytest.mark.parametrize(("name", "units"), [("h100-80gb-sxm", 132), ("h100-80gb-pcie", 114), ("h20-96gb-sxm", 78), ("l4", 58), ("b200-sxm", 148)])
def test_trap_unit_count_is_that_of_the_product(name: str, units: int) -> None:
    assert get(name).num_compute_units == units


def test_trap_mi250x_is_two_devices() -> None:
    die = get("mi250x")
    assert peak("mi250x") == pytest.approx(191.5e12)
    assert die.memory_bytes == 64 * GIB
    assert die.memory_bandwidth_bytes_per_s == pytest.approx(1638.5e9)
    assert die.typical_node_size == 16
    assert die.scale_out is not None
    assert die.scale_out.bandwidth_bytes_per_s == 12.5e9


@pytest.mark.parametrize(("name", "gibibytes"), [("trainium2", 96), ("mi325x", 256), ("b200-sxm", 179.06), ("b300-sxm", 268.59), ("tpu-v6e", 32)])
def test_trap_memory_of_other_catalogs(name: str, gibibytes: float) -> None:
    """Elsewhere 512 GiB (Trainium2), the announced 288 GB (MI325X), one die (Blackwell), or 0 (TPU)."""
    assert get(name).memory_bytes == pytest.approx(gibibytes * GIB)


def test_trap_a100_has_no_fp8_and_v100_no_bf16() -> None:
    assert all("fp8" not in get(n).dense_flops_per_s for n in IDS if n.startswith(("v100", "a100", "t4", "a10", "a30", "a40", "rtx3090", "mi2")))
    assert all("bf16" not in get(n).dense_flops_per_s for n in IDS if n.startswith(("v100", "t4")))


def test_trap_a10g_is_not_an_a10() -> None:
    assert peak("a10g") < 0.6 * peak("a10")


def test_trap_gaudi3_fp16_and_shipped_clock() -> None:
    assert peak("gaudi3") == 1677e12
    assert peak("gaudi3", "fp16") == 459e12


def test_trap_block_scaled_formats_are_not_plain_fp8() -> None:
    rates = get("trainium3").dense_flops_per_s
    assert "fp8" not in rates
    assert rates["mxfp8"] == 2517e12


def test_trap_fp6_runs_at_fp4_rate_on_amd_only() -> None:
    for name in ("mi350x", "mi355x"):
        rates = get(name).dense_flops_per_s
        assert rates["mxfp6"] == rates["mxfp4"]
    assert peak("b200", "mxfp6") == peak("b200", "fp8")


def test_trap_fp64_without_tensor_cores() -> None:
    """34 TFLOP/s, not the tensor core's 67."""
    assert peak("h100", "fp64") == 34e12


@pytest.mark.parametrize(("name", "watts"), [("v100-16gb-sxm2", 300), ("v100-16gb-pcie", 250), ("a100-40gb-pcie", 250), ("a100-80gb-pcie", 300),
                                             ("h100-94gb-nvl", 400), ("l40s", 350), ("mi300x", 750), ("b200-sxm", 1000),
     ("gb200-nvl72", 1200)])  # fmt: skip
def test_trap_power_terms(name: str, watts: float) -> None:
    """Board power by form factor; other tables swap the V100s, merge the A100 PCIe parts, or list 300 W for L40S."""
    assert get(name).power_watts == watts


def test_trap_unverified_rates_stay_absent() -> None:
    """Sources disagree by a factor of two: no tensor rate rather than a guess."""
    assert set(get("rtxpro6000-blackwell").dense_flops_per_s) == {"fp64", "fp32"}
    assert "int8" not in get("b300").dense_flops_per_s
