"""Naming hardware: a user's own entries, overrides, prices and their age, and a catalog that parses only what is asked for."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from planner import catalog_files, hardware
from planner.errors import InputError, Problem
from planner.files import DATA_DIR, read_yaml, to_yaml
from planner.hardware import Catalog, Cluster, ClusterSpec, Offer, load_catalog
from planner.spec import build

LINK = {
    "name": "Ring 1", "kind": "switch", "bandwidth": "100 GB/s", "peer_bandwidth": "100 GB/s", "domain_size": 4,
    "ring_efficiency_fraction": 0.8, "latency": "2 us", "evidence": "assumed", "source": "our own bench",
}  # fmt: skip
DEVICE = {
    "vendor": "ACME", "name": "A1", "kind": "npu", "form_factor": "OAM", "memory": "64 GiB", "memory_bandwidth": "2 TB/s",
    "dense_flops": {"bf16": "400 TFLOP/s"}, "typical_node_size": 4, "year": 2026, "scale_up": LINK,
    "confidence": "high", "source": "our own bench", "date": "2026-11-01",
}  # fmt: skip
OFFER = {
    "provider": "acme", "instance_type": "box-4", "accelerator": "acme-a1", "devices_per_instance": 4, "region": "cellar", "network": "100 Gbit/s",
    "network_kind": "Ethernet", "usd_per_hour": {"on_demand": 4.0}, "price_date": "2026-11-01", "source": "our own invoice",
}  # fmt: skip


def without(entry: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in keys}


def write(folder: Path, accelerators: Any = None, offers: Any = None) -> Path:
    path = folder / "own.yaml"
    sections = {"accelerators": accelerators, "offers": offers}
    path.write_text(to_yaml({name: entries for name, entries in sections.items() if entries is not None}), encoding="utf-8")
    return path


def problems(call: Any, *args: Any, **named: Any) -> tuple[Problem, ...]:
    with pytest.raises(InputError) as caught:
        call(*args, **named)
    return caught.value.problems


def cluster(catalog: Catalog | None = None, **keys: Any) -> Cluster:
    return (catalog or load_catalog()).resolve(ClusterSpec.model_validate({"num_devices": 16, **keys}))


# --- a user's own file -------------------------------------------------------------------------------------------------------------


def test_own_entries_are_added(tmp_path: Path) -> None:
    catalog = load_catalog(write(tmp_path, {"acme-a1": DEVICE | {"aliases": ["A-One"]}}, {"acme/box-4": OFFER}))
    found = cluster(catalog, accelerator="a-one", offer="acme/box-4")
    assert found.accelerator.memory_bytes == 64 * 2**30
    assert found.accelerator.dense_flops_per_s == {"bf16": 400e12}
    assert (found.node_size, found.scale_up.domain_size, found.usd_per_device_hour) == (4, 4, 1.0)
    assert found.scale_out is not None
    assert found.scale_out.bandwidth_bytes_per_s == 100e9 / 8 / 4
    assert "h100-80gb-sxm" in catalog.accelerators


def test_own_ids_keep_their_case(tmp_path: Path) -> None:
    assert load_catalog(write(tmp_path, {"Acme-A1": DEVICE})).accelerator("Acme-A1").id == "Acme-A1"


def test_a_taken_id_is_refused_unless_it_replaces(tmp_path: Path) -> None:
    both = write(tmp_path, {"b200-sxm": DEVICE}, {"aws/p5.48xlarge": OFFER | {"accelerator": "h100"}})
    found = problems(load_catalog, both)
    assert [p.key for p in found] == ["accelerators.b200-sxm", "offers.aws/p5.48xlarge"]
    assert all("replace: true" in p.fix for p in found)
    replaced = load_catalog(write(tmp_path, {"b200-sxm": DEVICE | {"replace": True}}))
    assert replaced.accelerator("b200").vendor == "ACME"
    assert len(replaced.accelerators) == len(load_catalog().accelerators)


def test_an_alias_that_is_taken_is_refused(tmp_path: Path) -> None:
    for alias, owner in (("h100", "h100-80gb-sxm"), ("b200-sxm", "b200-sxm")):
        (problem,) = problems(load_catalog, write(tmp_path, {"acme-a1": DEVICE | {"aliases": [alias]}}))
        assert (problem.value, problem.rule) == (alias, f"is already the name of {owner}")


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    wrong = without(DEVICE, "vendor") | {
        "memroy": "64 GiB",
        "memory": 64,
        "memory_bandwidth": "2 TB",
        "kind": "gpus",
        "scale_up": LINK | {"latency": "2"},
    }
    found = {p.key: p for p in problems(load_catalog, write(tmp_path, {"acme-a1": wrong}, {"acme/box-4": OFFER | {"regoin": "x"}}))}
    assert set(found) == {
        "acme-a1.vendor", "acme-a1.memroy", "acme-a1.memory", "acme-a1.memory_bandwidth", "acme-a1.kind", "acme-a1.scale_up.latency",
        "acme/box-4.regoin",
    }  # fmt: skip
    assert "memory" in found["acme-a1.memroy"].fix
    assert "region" in found["acme/box-4.regoin"].fix
    assert "unit" in found["acme-a1.memory"].rule
    assert "bytes_per_s" in found["acme-a1.memory_bandwidth"].rule
    assert "gpu" in found["acme-a1.kind"].fix
    assert all(p.where.endswith("own.yaml") and p.fix for p in found.values())


def test_an_offer_of_an_unknown_accelerator_names_the_nearest(tmp_path: Path) -> None:
    (problem,) = problems(load_catalog, write(tmp_path, None, {"acme/box-4": OFFER | {"accelerator": "h100-80gb-smx"}}))
    assert problem.key == "acme/box-4.accelerator"
    assert "h100-80gb-sxm" in problem.fix


@pytest.mark.parametrize("text", ["[1, 2]", "just text", "accelerators: [a]", "acclerators: {}", "accelerators: {x: 3}", "", "accelerators:"])
def test_what_is_no_catalog_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="utf-8")
    assert all(p.rule and p.fix and "own.yaml" in p.where for p in problems(load_catalog, path))


@pytest.mark.parametrize(
    ("entry", "rule"),
    [
        (OFFER | {"usd_per_hour": {"on_demand": 700.0 * 4}}, "below 100 per device"),
        (OFFER | {"usd_per_hour": {"on_demand": 0.0}}, "above 0"),
        (without(OFFER, "price_date"), "a price needs its date"),
        (OFFER | {"price_date": "last week"}, "price_date is"),
        (OFFER | {"price_date": "2026-13"}, "price_date is"),
        (OFFER | {"price_date": "2026-02-30"}, "price_date is"),
    ],
)
def test_implausible_offers_are_refused(tmp_path: Path, entry: dict[str, Any], rule: str) -> None:
    (problem,) = problems(load_catalog, write(tmp_path, {"acme-a1": DEVICE}, {"acme/box-4": entry}))
    assert rule in problem.rule


@pytest.mark.parametrize(
    ("link", "rule"),
    [
        ({"kind": "torus"}, "torus_axes"),
        ({"torus_axes": 2, "torus_shape": [2, 2]}, "torus_axes"),
        ({"kind": "torus", "torus_axes": 2, "torus_shape": [1, 2]}, "torus_shape is the largest slice"),
        ({"bridge_size": 2}, "bridge_size and bridge_bandwidth belong together"),
        ({"allreduce_min_group": 2}, "allreduce_efficiency_fraction and allreduce_min_group belong together"),
        ({"peer_bandwidth": "200 GB/s"}, "peer_bandwidth is part of bandwidth"),
    ],
)
def test_link_keys_come_in_whole_groups(tmp_path: Path, link: dict[str, Any], rule: str) -> None:
    (problem,) = problems(load_catalog, write(tmp_path, {"acme-a1": DEVICE | {"scale_up": LINK | link}}))
    assert rule in problem.rule
    assert problem.key == "acme-a1.scale_up"


# --- names -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["h100", "H100", " h100-80gb-sxm ", "H100-SXM5"])
def test_aliases_in_any_case(name: str) -> None:
    assert load_catalog().accelerator(name).id == "h100-80gb-sxm"


def test_unknown_names_list_the_nearest() -> None:
    (problem,) = problems(cluster, accelerator="h100-80gb-sxn")
    assert (problem.key, problem.value) == ("cluster.accelerator", "h100-80gb-sxn")
    assert "h100-80gb-sxm" in problem.fix
    (problem,) = problems(cluster, accelerator="h100", offer="aws/p5.48xlrge")
    assert "aws/p5.48xlarge" in problem.fix


def test_an_offer_without_region_is_the_first_one_and_says_so() -> None:
    found = cluster(accelerator="a100-40gb", offer="gcp/a2-highgpu-8g")
    assert found.offer is not None
    assert found.offer.id == "gcp/a2-highgpu-8g@us-central1"
    assert any("us-central1" in note for note in found.assumptions)
    named = cluster(accelerator="a100-40gb", offer="gcp/a2-highgpu-8g@europe-west4")
    assert named.offer is not None
    assert named.offer.region == "europe-west4"
    assert not any(note.startswith("region") for note in named.assumptions)


def test_an_offer_of_another_accelerator_is_refused() -> None:
    (problem,) = problems(cluster, accelerator="a100", offer="aws/p5.48xlarge")
    assert problem.key == "cluster.offer"
    assert "h100-80gb-sxm" in problem.fix


# --- prices ------------------------------------------------------------------------------------------------------------------------


def test_price_kinds() -> None:
    name = "gcp/a2-highgpu-8g@us-central1"
    prices = {
        kind: cluster(accelerator="a100-40gb", offer=name, pricing=kind).usd_per_device_hour
        for kind in ("on_demand", "spot", "reserved_1y", "reserved_3y")
    }
    assert prices == {"on_demand": 29.3871 / 8, "spot": 15.4242 / 8, "reserved_1y": 18.5137 / 8, "reserved_3y": 10.2857 / 8}


def test_a_missing_price_kind_names_the_known_ones() -> None:
    (problem,) = problems(cluster, accelerator="h100", offer="aws/p5.48xlarge", pricing="reserved_3y")
    assert problem.key == "cluster.pricing"
    assert "on_demand, spot" in problem.rule
    assert "--price" in problem.fix


def test_a_price_overrides_the_offer() -> None:
    found = cluster(accelerator="h100", offer="aws/p5.48xlarge", pricing="reserved_3y", price="2.10 USD/h")
    assert found.usd_per_device_hour == 2.10
    assert not any("price" in note for note in found.assumptions), "a given price is not stale"
    assert cluster(accelerator="h100", price="2.10 USD/h").usd_per_device_hour == 2.10
    assert cluster(accelerator="h100").usd_per_device_hour is None


@pytest.mark.parametrize("price", [2.1, "2.1", "2.1 EUR/h", "-2 USD/h", "nan USD/h"])
def test_a_price_needs_its_unit(price: Any) -> None:
    with pytest.raises(ValueError, match="price"):
        ClusterSpec.model_validate({"accelerator": "h100", "num_devices": 8, "price": price})


@pytest.mark.parametrize(
    ("dated", "today", "stale"),
    [
        ("2026-07-30", "2026-10-28", False),  # 90 days
        ("2026-07-30", "2026-10-29", True),
        ("2026-07", "2026-09-29", False),  # counts from the first of July
        ("2026-07", "2026-09-30", True),
        ("2026", "2026-01-02", True),  # no telling when
        ("undated", "2026-01-02", True),
    ],
)
def test_prices_older_than_ninety_days_are_stale(dated: str, today: str, stale: bool) -> None:
    offer = Offer.model_validate({"id": "acme/box-4", **OFFER, "price_date": dated})
    assert offer.is_stale(datetime.date.fromisoformat(today)) is stale


def test_a_stale_price_is_flagged_and_a_fresh_one_not(tmp_path: Path) -> None:
    for dated, flagged in (("2024-01-01", True), (datetime.date.today().isoformat(), False)):
        catalog = load_catalog(write(tmp_path, {"acme-a1": DEVICE}, {"acme/box-4": OFFER | {"price_date": dated}}))
        notes = cluster(catalog, accelerator="acme-a1", offer="acme/box-4").assumptions
        assert any(dated in note for note in notes) is flagged


# --- sizes and overrides -----------------------------------------------------------------------------------------------------------


def test_links_end_at_the_node() -> None:
    assert cluster(accelerator="h100").scale_up.domain_size == 8
    assert cluster(accelerator="h100", offer="gcp/a3-highgpu-1g@us-east4").scale_up.domain_size == 1
    assert cluster(accelerator="h100", node_size=4).scale_up.domain_size == 4
    assert cluster(accelerator="l40s", offer="oci/BM.GPU.L40S.4").scale_up.domain_size == 4
    assert cluster(accelerator="rtx4090").scale_up.domain_size == 1
    assert cluster(accelerator="rtx4090", node_size=8).scale_up.domain_size == 8, "a host's PCIe reaches all of its cards"


def test_racks_and_slices_reach_past_the_node() -> None:
    rack = cluster(accelerator="gb200", num_devices=144, offer="oci/BM.GPU.GB200.4")
    assert (rack.node_size, rack.scale_up.domain_size) == (4, 72)
    pod = cluster(accelerator="tpu-v6e", num_devices=256, offer="gcp/tpu-v6e-256")
    assert (pod.node_size, pod.scale_up.domain_size) == (8, 256)


def test_domain_size_override() -> None:
    assert cluster(accelerator="tpu-v4", num_devices=6144, domain_size=3072).scale_up.domain_size == 3072
    assert cluster(accelerator="h100", domain_size=2).scale_up.domain_size == 2
    assert cluster(accelerator="gb200", num_devices=8).scale_up.domain_size == 8, "never more than there are devices"


def test_the_slice_that_was_taken_is_an_assumption() -> None:
    assert any("slices of 512" in note for note in cluster(accelerator="tpu-v5p", num_devices=512, offer="gcp/tpu-v5p-8-derived").assumptions)
    assert any("slices of 256" in note for note in cluster(accelerator="tpu-v6e", num_devices=1024).assumptions)
    assert not any("slices" in note for note in cluster(accelerator="tpu-v5p", num_devices=512, domain_size=64).assumptions)


def test_network_override_is_per_node() -> None:
    found = cluster(accelerator="h100", offer="aws/p5.48xlarge", network="200 GB/s")
    assert found.scale_out is not None
    assert (found.scale_out.bandwidth_bytes_per_s, found.scale_out.source) == (25e9, "given by the user")
    split = cluster(accelerator="h100", offer="aws/p5.48xlarge", node_size=4)
    assert split.scale_out is not None
    assert split.scale_out.bandwidth_bytes_per_s == 50e9, "an offer's network belongs to its own number of devices"


def test_a_reference_network_is_an_assumption_only_where_it_is_used() -> None:
    assert any("InfiniBand NDR" in note for note in cluster(accelerator="h100").assumptions)
    assert not any("network" in note for note in cluster(accelerator="h100", num_devices=8).assumptions)
    assert not any("network" in note for note in cluster(accelerator="h100", offer="aws/p5.48xlarge").assumptions)


def test_doubtful_entries_say_so() -> None:
    assert any("low confidence" in note for note in cluster(accelerator="a10g").assumptions)
    assert not any("confidence" in note for note in cluster(accelerator="a100").assumptions)


def test_a_spec_survives_writing_and_reading() -> None:
    spec = ClusterSpec.model_validate({"accelerator": "h100", "num_devices": 16, "price": "2.10 USD/h", "network": "400 GB/s", "node_size": 8})
    assert ClusterSpec.model_validate(spec.model_dump(by_alias=True)) == spec


# --- reading -----------------------------------------------------------------------------------------------------------------------


def test_only_what_is_asked_for_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    parse = catalog_files.parse_yaml

    def counting(text: str, where: str = "") -> Any:
        parsed.append(text.split(":")[0])
        return parse(text, where)

    monkeypatch.setattr(catalog_files, "parse_yaml", counting)
    catalog = load_catalog()
    assert parsed == []
    cluster(catalog, accelerator="h100", offer="aws/p5.48xlarge")
    cluster(catalog, accelerator="h100", offer="aws/p5.48xlarge")
    assert sorted(parsed) == ["aws/p5.48xlarge", "h100-80gb-sxm"]


@pytest.mark.parametrize(("file", "attribute"), [("hardware_catalog.yaml", "accelerators"), ("offers.yaml", "offers")])
def test_cutting_a_file_finds_what_parsing_it_finds(file: str, attribute: str) -> None:
    whole = read_yaml(DATA_DIR / file)
    assert list(whole) == list(getattr(load_catalog(), attribute))
    aliases = {alias: name for name, entry in whole.items() for alias in entry.get("aliases", [])}
    assert attribute == "offers" or aliases == load_catalog().aliases


def test_prices_stay_dollars_per_instance() -> None:
    assert hardware.STALE_DAYS == 90
    offer = load_catalog().offer("aws/p5.48xlarge")
    assert offer.price_usd_per_device_hour("on_demand") == offer.usd_per_hour["on_demand"] / 8
    assert offer.price_usd_per_device_hour("reserved_3y") is None


def test_the_example_of_the_guide_works(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "adding.md").read_text(encoding="utf-8")
    path = tmp_path / "my.yaml"
    path.write_text(guide.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    catalog = load_catalog(path)
    found = cluster(catalog, accelerator="acme", offer="acme/box-8", num_devices=64)
    assert (found.usd_per_device_hour, found.scale_up.domain_size) == (1.5, 8)
    assert found.scale_out is not None
    assert found.scale_out.bandwidth_bytes_per_s == 25e9
    assert cluster(catalog, accelerator="h100", offer="aws/p5.48xlarge").usd_per_device_hour == 3.9


@pytest.mark.parametrize(
    "prices", [{"on_demand": 10.0, "spot": 10.0}, {"on_demand": 10.0, "reserved_1y": 11.0}, {"reserved_1y": 8.0, "reserved_3y": 8.0}]
)
def test_a_discount_that_is_none_is_refused(prices: dict[str, float]) -> None:
    values = {
        "id": "x/y",
        "provider": "x",
        "instance_type": "y",
        "accelerator": "h100-80gb-sxm",
        "devices_per_instance": 8,
        "source": "test",
        "price_date": "2026-11-01",
    }
    with pytest.raises(InputError, match="must be below"):
        build(Offer, {**values, "usd_per_hour": prices}, "offers")
