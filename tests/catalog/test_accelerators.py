"""Accelerators as a whole: all of them are there, fit their year, and agree with their names and each other."""

from __future__ import annotations

import datetime
import re

import pytest

from planner.collectives import collective_s, make_group
from planner.errors import InputError
from planner.hardware import Accelerator, ClusterSpec, load_catalog
from planner.units import GIB

CATALOG = load_catalog()
IDS = list(CATALOG.accelerators)
EXPECTED = [
    "v100-16gb-sxm2", "v100-32gb-sxm2", "v100-16gb-pcie", "v100-32gb-pcie", "t4", "a10", "a10g", "a30", "a40", "rtx3090", "a100-40gb-sxm",
    "a100-80gb-sxm", "a100-40gb-pcie", "a100-80gb-pcie", "rtx4090", "rtx5090", "rtx6000ada", "l4", "l40s", "h100-80gb-sxm", "h100-80gb-pcie",
    "h100-94gb-nvl", "h800-80gb-sxm", "h20-96gb-sxm", "h200-141gb-sxm", "gh200-96gb", "gh200-144gb", "b100-sxm", "b200-sxm", "b300-sxm",
    "gb200-nvl72", "gb300-nvl72", "rtxpro6000-blackwell", "mi210", "mi250x", "mi300x", "mi325x", "mi350x", "mi355x", "gaudi2", "gaudi3",
    "tpu-v2", "tpu-v3", "tpu-v4", "tpu-v5e", "tpu-v5p", "tpu-v6e", "tpu-v7x", "trainium1", "trainium2", "trainium3", "a800-80gb-sxm",
    "h200-141gb-nvl", "h100-96gb-sxm-500w",
]  # fmt: skip
PRECISIONS = {"fp64", "fp32", "tf32", "fp16", "bf16", "fp8", "mxfp8", "mxfp6", "mxfp4", "nvfp4", "int8"}

# Last year of a period -> the most that any part shipped by then has.
RATE_CEILING = {2018: 130e12, 2021: 400e12, 2023: 1400e12, 2035: 2600e12}
BANDWIDTH_CEILING = {2018: 0.91e12, 2021: 3.3e12, 2023: 5.4e12, 2035: 8.1e12}
MEMORY_CEILING = {2018: 33 * GIB, 2021: 128 * GIB, 2023: 193 * GIB, 2035: 290 * GIB}


def get(name: str) -> Accelerator:
    return CATALOG.accelerator(name)


def peak(name: str, precision: str) -> float:
    return get(name).dense_flops_per_s[precision]


def ceiling(table: dict[int, float], year: int) -> float:
    return next(limit for last, limit in table.items() if year <= last)


def test_all_accelerators_are_there() -> None:
    assert len(EXPECTED) == 54
    assert set(EXPECTED) <= set(IDS)


@pytest.mark.parametrize("name", IDS)
class TestEveryEntry:
    def test_magnitudes_fit_the_year(self, name: str) -> None:
        """A rate with sparsity, or of two devices, is ahead of its time."""
        device = get(name)
        assert device.memory_bytes < ceiling(MEMORY_CEILING, device.year)
        assert device.memory_bandwidth_bytes_per_s <= ceiling(BANDWIDTH_CEILING, device.year)
        assert max(device.dense_flops_per_s.get(p, 0.0) for p in ("bf16", "fp16")) <= ceiling(RATE_CEILING, device.year)
        assert 2017 <= device.year <= datetime.date.today().year

    def test_four_bit_and_wide_rates(self, name: str) -> None:
        rates = get(name).dense_flops_per_s
        assert set(rates) <= PRECISIONS
        if {"fp64", "fp32"} <= set(rates):
            assert rates["fp64"] <= rates["fp32"]
        if {"fp32", "bf16"} <= set(rates):
            assert 1.99 < rates["bf16"] / rates["fp32"] < 32
        for four_bit in ("nvfp4", "mxfp4"):
            if {four_bit, "bf16"} <= set(rates):
                assert 3.7 < rates[four_bit] / rates["bf16"] < (8.1 if name == "rtx5090" else 6.1)

    def test_id_agrees_with_form(self, name: str) -> None:
        device = get(name)
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert device.id == name
        for part in ("sxm", "pcie"):
            if part in name:
                assert part in device.form_factor.lower()
        assert device.kind == ("tpu" if name.startswith("tpu") else "npu" if device.vendor in ("Intel", "AWS") else "gpu")
        assert (device.scale_up.kind == "torus") == (device.kind == "tpu")

    def test_dates_and_sources_can_be_checked(self, name: str) -> None:
        device = get(name)
        assert datetime.date.fromisoformat(device.date) <= datetime.date.today()
        assert not device.matmul_max_fraction or "matmul_max_fraction" in device.source
        assert device.scale_up.evidence == "assumed" or re.search(r"\d.* of \d", device.scale_up.source), "a measurement names its figures"
        assert device.scale_up.allreduce_efficiency_fraction is None or device.scale_up.kind == "switch"

    def test_network_between_nodes(self, name: str) -> None:
        link, network = get(name).scale_up, get(name).scale_out
        assert network is not None
        assert 0.7 <= network.ring_efficiency_fraction <= 0.9, "0.74 to 0.84 of the wire was measured"
        assert network.latency_s >= link.latency_s > 0

    def test_ring_never_above_the_wire(self, name: str) -> None:
        """A partial mesh (V100, MI250X) has fewer links than pairs."""
        link = get(name).scale_up
        wire = max(link.bandwidth_bytes_per_s, link.bridge_bandwidth_bytes_per_s or 0)
        for ranks in (2, 4, 8, 16, 64):
            if ranks <= link.domain_size:
                cluster = CATALOG.resolve(ClusterSpec(accelerator=name, num_devices=ranks))
                seconds = float(collective_s("all_gather", 1e12, make_group(ranks, 1, cluster), cluster))
                assert 0 < 1e12 * (ranks - 1) / ranks / seconds <= 0.9 * wire


@pytest.mark.parametrize(
    ("short", "full"),
    [("h100", "h100-80gb-sxm"), ("a100", "a100-80gb-sxm"), ("h200", "h200-141gb-sxm"), ("b200", "b200-sxm"), ("gb200", "gb200-nvl72"),
     ("trn2", "trainium2"), ("trillium", "tpu-v6e"), ("ironwood", "tpu-v7x"), ("rtx-4090", "rtx4090")],
)  # fmt: skip
def test_what_people_call_them(short: str, full: str) -> None:
    assert get(short).id == full


@pytest.mark.parametrize(
    ("name", "candidates"),
    [("a100-pcie", ["a100-40gb-pcie", "a100-80gb-pcie"]), ("v100-sxm2", ["v100-16gb-sxm2", "v100-32gb-sxm2"]), ("gh200-141gb", ["gh200-144gb"])],
)
def test_ambiguous_names_list_the_candidates(name: str, candidates: list[str]) -> None:
    with pytest.raises(InputError) as stop:
        get(name)
    (problem,) = stop.value.problems
    assert all(candidate in problem.fix for candidate in candidates)


def test_trap_block_scaled_formats_are_not_plain_fp8() -> None:
    assert "fp8" not in get("trainium3").dense_flops_per_s
    assert peak("trainium3", "mxfp8") == 2517e12


def test_trap_fp6_runs_at_fp4_rate_on_amd_only() -> None:
    for name in ("mi350x", "mi355x"):
        assert peak(name, "mxfp6") == peak(name, "mxfp4")
    assert peak("b200", "mxfp6") == peak("b200", "fp8")


def test_trap_fp64_without_tensor_cores() -> None:
    """34 TFLOP/s, not the tensor core's 67."""
    assert peak("h100", "fp64") == 34e12


def test_trap_gaudi3_at_its_shipped_clock() -> None:
    """1835 needs a clock that was not shipped."""
    assert peak("gaudi3", "bf16") == 1677e12


def test_trap_contradicted_int8_stays_absent() -> None:
    assert all("int8" not in get(name).dense_flops_per_s for name in ("b300", "gb300"))


def test_trap_switch_reduction_has_a_threshold() -> None:
    """Five of eight on Hopper, six on Blackwell; at four B200 switch and ring are equally fast, so only the number itself shows it."""
    found = {name: get(name).scale_up.allreduce_min_group for name in IDS}
    assert {found[name] for name in ("h100-80gb-sxm", "h200-141gb-sxm", "h20-96gb-sxm")} == {5}
    assert {found[name] for name in ("b200-sxm", "b300-sxm", "gb200-nvl72", "gb300-nvl72")} == {6}
    assert all(found[name] is None for name in IDS if name.startswith(("v100", "a100", "mi", "gaudi", "tpu", "trainium", "rtx")))
