"""The offers against the mistakes that real price lists make.

| trap of price lists and instance tables                       | test                                                |
|---------------------------------------------------------------|-----------------------------------------------------|
| spot above on-demand, or equal to it for want of data         | test_spot_is_strictly_below_on_demand               |
| price 700.0 as a sentinel, price 0.0 of a host                | test_prices_per_device_are_plausible                |
| host and accelerators priced in separate rows                 | test_host_and_accelerators_are_one_price            |
| committed-use price leaked as on-demand                       | test_committed_use_is_not_on_demand                 |
| 12 devices instead of 8, devices of the name miscounted       | test_device_counts                                  |
| TPU names count cores (v2 to v5p) or chips (v5e, v6e)         | test_tpu_names_count_cores_or_chips                 |
| every shape listed in every region                            | test_flat_price_lists_name_no_region_as_their_own   |
| network speed per card instead of per instance (AWS)          | test_network_is_that_of_the_whole_instance          |
| headline network that includes the host's card (GCP A3)       | test_network_leaves_out_the_host_card               |
| Gbit/s taken for GB/s                                         | test_network_per_device_is_plausible                |
| a part under the name of its sibling (H100 NVL as H100)       | test_accelerators_behind_instance_names             |
| prices without, or with a vague, date                         | test_prices_are_dated_as_exactly_as_the_source      |
"""

import collections
import re

import pytest

from planner.hardware import ClusterSpec, Offer, Pricing, load_catalog

CATALOG = load_catalog()
IDS = list(CATALOG.offers)
PRICED = [name for name in IDS if CATALOG.offers[name].usd_per_hour]
GB_S = 1e9
KINDS: tuple[Pricing, ...] = ("on_demand", "spot", "reserved_1y", "reserved_3y")


def get(name: str) -> Offer:
    return CATALOG.offers[name]


def test_every_trap_of_the_table_has_its_test() -> None:
    named = set(re.findall(r"\| (test_\w+)", __doc__ or ""))
    assert named
    assert named <= set(globals())


@pytest.mark.parametrize("name", IDS)
def test_ids_say_what_they_are(name: str) -> None:
    offer = get(name)
    provider, _, rest = name.partition("/")
    instance, _, region = rest.partition("@")
    assert provider == offer.provider
    assert not region or region == offer.region
    assert re.sub(r"[^a-z0-9]", "", instance.lower()) == re.sub(r"[^a-z0-9]", "", offer.instance_type.lower())
    assert CATALOG.accelerators[offer.accelerator].id == offer.accelerator, "an id, not an alias"
    assert len(offer.source) > 10


def test_every_provider_is_there() -> None:
    assert {"aws", "gcp", "azure", "oci", "lambda", "nebius", "coreweave", "together", "runpod"} <= {get(name).provider for name in IDS}
    assert len(IDS) >= 101


@pytest.mark.parametrize("name", PRICED)
def test_spot_is_strictly_below_on_demand(name: str) -> None:
    prices = get(name).usd_per_hour
    if "on_demand" not in prices:
        return
    assert all(prices[kind] < prices["on_demand"] for kind in KINDS[1:] if kind in prices)
    if "reserved_1y" in prices and "reserved_3y" in prices:
        assert prices["reserved_3y"] < prices["reserved_1y"]
    if "spot" in prices:
        assert prices["spot"] > 0.1 * prices["on_demand"], "a tenth of the list price is a formula, not a market"


@pytest.mark.parametrize("name", PRICED)
def test_prices_per_device_are_plausible(name: str) -> None:
    offer = get(name)
    for kind in offer.usd_per_hour:
        price = offer.price_usd_per_device_hour(kind)
        assert price is not None
        assert 0.1 <= price <= 20


@pytest.mark.parametrize("name", PRICED)
def test_prices_are_dated_as_exactly_as_the_source(name: str) -> None:
    date = get(name).price_date
    assert re.fullmatch(r"20\d\d(-\d\d(-\d\d)?)?|undated", date or "")
    notes = get(name).notes + get(name).source
    if date == "2026-01-31":
        assert "after 2026-01-31" in notes
    if re.fullmatch(r"20\d\d", date or ""):
        assert "no month" in notes or f"({date})" in notes


def test_newer_devices_of_one_provider_cost_more() -> None:
    for provider, names in {
        "aws": ["p4d.24xlarge", "p4de.24xlarge", "p5.48xlarge", "p5en.48xlarge", "p6-b200.48xlarge", "p6-b300.48xlarge"],
        "oci": ["BM.GPU4.8", "BM.GPU.A100-v2.8", "BM.GPU.H100.8", "BM.GPU.B200.8", "BM.GPU.B300.8"],
    }.items():
        prices = [get(f"{provider}/{name}").usd_per_hour["on_demand"] for name in names]
        assert prices == sorted(prices)


def test_sizes_of_one_machine_cost_the_same_per_device() -> None:
    for small, large in (
        ("gcp/a2-ultragpu-1g@us-central1", "gcp/a2-ultragpu-8g@us-central1"), ("gcp/a3-highgpu-1g@us-east4", "gcp/a3-highgpu-8g@us-east4"),
        ("gcp/tpu-v6e-1", "gcp/tpu-v6e-256"), ("gcp/tpu-v5p-8-derived", "gcp/tpu-v5p-12288"), ("aws/p5.4xlarge", "aws/p5.48xlarge"),
    ):  # fmt: skip
        assert get(small).price_usd_per_device_hour("on_demand") == pytest.approx(get(large).price_usd_per_device_hour("on_demand"), rel=0.01)


def test_host_and_accelerators_are_one_price() -> None:
    a100 = get("gcp/a2-ultragpu-8g@us-central1").usd_per_hour
    assert a100["on_demand"] == 40.5504  # the row of accelerators alone: 14.77, below its own spot of 15.71
    assert a100["spot"] < a100["on_demand"]


def test_committed_use_is_not_on_demand() -> None:
    for name, committed, listed in (
        ("gcp/a3-highgpu-8g@us-central1", 8 * 4.20, 8 * 9.80),
        ("gcp/a3-ultragpu-8g@us-central1", 36.60, 74.49),
        ("gcp/a4-highgpu-8g", 64.44, 90.22),
    ):
        price = get(name).usd_per_hour["on_demand"]
        assert price > 1.3 * committed
        assert price >= listed * 0.999


@pytest.mark.parametrize("name", IDS)
def test_device_counts(name: str) -> None:
    offer = get(name)
    assert offer.devices_per_instance in {1, 4, 8, 16} or offer.accelerator.startswith("tpu")
    counted = re.search(r"gpu-(\d+)g$|_(\d+)x_|-(\d+)g$|[ -](\d+)x$|_(\d+)gpu|\.(\d)$", offer.instance_type)
    if counted:
        assert offer.devices_per_instance == int(next(group for group in counted.groups() if group))


def test_azure_nd_h100_has_eight() -> None:
    assert get("azure/ND96isr_H100_v5").devices_per_instance == 8  # 12 in one price list
    assert "spot" not in get("azure/ND96isr_H100_v5").usd_per_hour  # equal to on-demand there
    assert "spot" not in get("azure/NC40ads_H100_v5").usd_per_hour


def test_tpu_names_count_cores_or_chips() -> None:
    for name in IDS:
        offer = get(name)
        counted = re.match(r"tpu-(v\d+\w?)-(\d+)", offer.instance_type)
        if counted:
            per_chip = 1 if counted[1] in {"v5e", "v6e"} else 2
            assert offer.devices_per_instance * per_chip == int(counted[2])
    assert get("gcp/tpu-v5p-12288").devices_per_instance == 6144


def test_a_slice_is_many_hosts() -> None:
    for name in ("gcp/tpu-v6e-256", "gcp/tpu-v5p-12288"):
        assert get(name).node_size == CATALOG.accelerators[get(name).accelerator].typical_node_size


def test_flat_price_lists_name_no_region_as_their_own() -> None:
    assert {get(name).region for name in IDS if get(name).provider == "oci"} == {"all (flat price)"}
    assert all("usd_per_hour" not in get(n).model_fields_set for n in IDS if get(n).region is None and get(n).provider in {"aws", "gcp"})
    per_type = collections.Counter((get(n).provider, get(n).instance_type, get(n).region) for n in IDS)
    assert max(per_type.values()) == 1


def test_network_is_that_of_the_whole_instance() -> None:
    """Gbit/s: p5 is 32 cards of 100, p5en and trn2 16 of 200, p6-b200 8 of 400, p6-b300 16 of 400, p4d 4 of 100."""
    expected = {
        "p4d.24xlarge": 400, "p4de.24xlarge": 400, "p5.48xlarge": 3200, "p5e.48xlarge": 3200, "p5en.48xlarge": 3200, "trn2.48xlarge": 3200,
        "p6-b200.48xlarge": 3200, "p6-b300.48xlarge": 6400, "p6e-gb200.36xlarge": 3200, "trn1.32xlarge": 800, "trn1n.32xlarge": 1600,
    }  # fmt: skip
    assert {name: (get(f"aws/{name}").network_bytes_per_s or 0) / GB_S * 8 for name in expected} == expected


def test_network_leaves_out_the_host_card() -> None:
    """GCP prints 1800 and 1000 Gbit/s for A3 Mega and High; 200 of them are the host's."""
    for name, gbit_s in (("gcp/a3-megagpu-8g@us-east4", 1600), ("gcp/a3-highgpu-8g@us-central1", 800), ("gcp/a3-ultragpu-8g@us-central1", 3200)):
        assert get(name).network_bytes_per_s == gbit_s / 8 * GB_S


@pytest.mark.parametrize("name", [n for n in IDS if CATALOG.offers[n].network_bytes_per_s])
def test_network_per_device_is_plausible(name: str) -> None:
    offer = get(name)
    per_device = (offer.network_bytes_per_s or 0) / offer.devices_per_instance / GB_S
    assert 0.3 <= per_device <= 100
    cards = re.search(r"(\d)x(\d+)$", offer.network_kind)
    if cards:
        assert offer.network_bytes_per_s == int(cards[1]) * int(cards[2]) / 8 * GB_S


def test_accelerators_behind_instance_names() -> None:
    expected = {"azure/NC40ads_H100_v5": "h100-94gb-nvl", "azure/NC24ads_A100_v4": "a100-80gb-pcie", "aws/p4d.24xlarge": "a100-40gb-sxm",
                "aws/p4de.24xlarge": "a100-80gb-sxm", "aws/g5.48xlarge": "a10g", "gcp/a2-ultragpu-8g@us-east4": "a100-80gb-sxm",
                "gcp/a2-highgpu-8g@us-east4": "a100-40gb-sxm", "lambda/gpu_1x_gh200": "gh200-96gb"}  # fmt: skip
    assert {name: get(name).accelerator for name in expected} == expected
    for name in IDS:
        series = re.search(r"(h100|h200|b200|b300|gb200|gb300|mi300x|mi355x|l40s|a100|v100|4090)", re.sub("GB200-NVL72", "gb200", name).lower())
        if series and "p6e" not in name:
            assert series[1] in get(name).accelerator


@pytest.mark.parametrize("name", IDS)
def test_every_offer_makes_a_cluster(name: str) -> None:
    offer = get(name)
    pricing: Pricing = next(iter(offer.usd_per_hour), "on_demand")
    price = None if offer.usd_per_hour else "1 USD/h"
    spec = ClusterSpec.model_validate(
        {"accelerator": offer.accelerator, "num_devices": 2 * offer.devices_per_instance, "offer": name, "pricing": pricing, "price": price}
    )
    cluster = CATALOG.resolve(spec)
    assert cluster.scale_out is not None
    assert cluster.usd_per_device_hour is not None
    if cluster.scale_up.kind != "torus" and cluster.accelerator.form_factor not in {"NVL72", "trn3"}:
        assert cluster.scale_up.domain_size <= cluster.node_size, "links end at the instance"
