"""Accelerators, links, offers and clusters: the strict reader of `data/hardware_catalog.yaml` and `data/offers.yaml`.

Every rate is dense, per device and per direction. Text with units in the files becomes SI numbers here, once, and only for
the entries that are asked for (see `catalog_files`).
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, field_serializer, model_validator

from planner.catalog_files import Entries, add_entries, read_aliases, read_entries
from planner.curves import Curve
from planner.errors import InputError, Problem, nearest
from planner.files import DATA_DIR, user_dir
from planner.registry import unknown_name
from planner.spec import Bytes, BytesPerSecond, FlopsPerSecond, NonNegativeInt, PositiveInt, Seconds, Spec, UsdPerHour, Watts, build

__all__ = ["Accelerator", "Catalog", "Cluster", "ClusterSpec", "Link", "Offer", "Pricing", "load_catalog"]

Pricing = Literal["on_demand", "spot", "reserved_1y", "reserved_3y"]
STALE_DAYS = 90
SEE_CATALOG = " (see planner catalog accelerators)"
PRICE_DATE = re.compile(r"(\d{4})(?:-(\d{2})(?:-(\d{2}))?)?")


class Link(Spec):
    """How devices reach each other. Rates per device, one direction."""

    model_config = ConfigDict(**Spec.model_config, populate_by_name=True)

    name: str
    kind: Literal["switch", "mesh", "torus", "pcie"]
    bandwidth_bytes_per_s: BytesPerSecond = Field(alias="bandwidth")
    """All links of one device together."""
    peer_bandwidth_bytes_per_s: BytesPerSecond = Field(alias="peer_bandwidth")
    """Between two devices."""
    bridge_size: PositiveInt | None = None
    """Devices that a bridge joins beside a slower `bandwidth_bytes_per_s`."""
    bridge_bandwidth_bytes_per_s: BytesPerSecond | None = Field(default=None, alias="bridge_bandwidth")
    domain_size: PositiveInt
    """Devices that reach each other at these rates."""
    torus_axes: NonNegativeInt = 0
    torus_shape: tuple[PositiveInt, ...] = Field(default=(), strict=False)
    """Largest slice."""
    wraparound_min_axis: PositiveInt = 4
    """Shorter axes have no wrap-around link, so rings take twice as long."""
    ring_efficiency_fraction: float = Field(gt=0, le=1)
    """Bus bandwidth of large ring collectives over `bandwidth_bytes_per_s`."""
    allreduce_efficiency_fraction: float | None = Field(default=None, gt=0, le=1)
    """Bytes of the buffer reduced per second over `bandwidth_bytes_per_s`, where the switch adds (NVLink SHARP)."""
    allreduce_min_group: PositiveInt | None = None
    """Ranks from which the switch adds."""
    latency_s: Seconds = Field(alias="latency")
    """Per ring step."""
    curves: dict[str, Curve] = Field(default_factory=dict)
    """`all_reduce/2`: seconds by bytes of the full buffer, measured for a group of 2; preferred to the other fields."""
    evidence: Literal["measured", "assumed"]
    source: str = Field(min_length=4)

    @model_validator(mode="after")
    def _groups_are_whole(self) -> Link:
        if (self.kind == "torus") != (len(self.torus_shape) > 0 and self.torus_axes == len(self.torus_shape)):
            raise ValueError("a torus, and only a torus, has torus_axes and a torus_shape of as many numbers; give both or neither")
        if math.prod(self.torus_shape or [self.domain_size]) < self.domain_size:
            raise ValueError("torus_shape is the largest slice, and domain_size is larger; correct one of them")
        if self.peer_bandwidth_bytes_per_s > self.bandwidth_bytes_per_s:
            raise ValueError("peer_bandwidth is part of bandwidth, and larger than it here; correct one of them")
        if (self.bridge_size is None) != (self.bridge_bandwidth_bytes_per_s is None):
            raise ValueError("bridge_size and bridge_bandwidth belong together; give both or neither")
        if (self.allreduce_efficiency_fraction is None) != (self.allreduce_min_group is None):
            raise ValueError("allreduce_efficiency_fraction and allreduce_min_group belong together; give both or neither")
        return self


class Accelerator(Spec):
    """One device as the framework sees it: a GPU, one die of an MI250X, a TPU chip, a Trainium chip."""

    id: str
    vendor: str
    name: str
    kind: Literal["gpu", "tpu", "npu", "cpu"]
    form_factor: str
    aliases: tuple[str, ...] = Field(default=(), strict=False)
    memory_bytes: Bytes = Field(alias="memory")
    """As reported by the runtime."""
    memory_bandwidth_bytes_per_s: BytesPerSecond = Field(alias="memory_bandwidth")
    dense_flops_per_s: dict[str, FlopsPerSecond] = Field(alias="dense_flops")
    """Per precision, with fp32 accumulation, without sparsity."""
    num_compute_units: PositiveInt | None = None
    l2_cache_bytes: Bytes | None = Field(default=None, alias="l2_cache")
    power_watts: Watts | None = Field(default=None, alias="power")
    typical_node_size: PositiveInt
    year: int = Field(ge=2015, le=2035)
    scale_up: Link
    scale_out: Link | None = None
    """Network between nodes of the vendor's reference design."""
    matmul_max_fraction: dict[str, float] = Field(default_factory=dict)
    """Best measured matmul rate over the dense peak, per precision."""
    sustained_matmul_fraction: float = Field(default=1.0, gt=0, le=1)
    """What power limits leave of that rate with all devices of a node busy."""
    stack: str | None = None
    """The stack under which it was measured, taken where a plan names none."""
    variants: dict[str, str] = Field(default_factory=dict)
    """Number of devices on the machine -> the entry that describes one of them: processes that share a CPU's cores."""
    confidence: str
    source: str = Field(min_length=4)
    date: str
    notes: str = ""


class Offer(Spec):
    """One instance type in one region, with dated prices per instance-hour."""

    id: str
    provider: str
    instance_type: str
    accelerator: str
    devices_per_instance: PositiveInt
    node_size: PositiveInt | None = None
    """Devices per host, where that is not `devices_per_instance`: a TPU slice, one device sold out of a larger node."""
    region: str | None = None
    network_bytes_per_s: BytesPerSecond | None = Field(default=None, alias="network")
    """Accelerator network per instance, one direction."""
    network_kind: str = ""
    usd_per_hour: dict[Pricing, float] = Field(default_factory=dict)
    price_date: str | None = None
    """YYYY-MM-DD, YYYY-MM, YYYY or undated."""
    source: str = Field(min_length=4)
    notes: str = ""

    @model_validator(mode="after")
    def _prices_are_plausible(self) -> Offer:
        if any(not 0 < price < 100 * self.devices_per_instance for price in self.usd_per_hour.values()):
            raise ValueError("prices are dollars per instance-hour, above 0 and below 100 per device; correct usd_per_hour")
        if self.usd_per_hour and self.price_date is None:
            raise ValueError("a price needs its date; add price_date")
        if self.price_date not in (None, "undated") and _parse_date(self.price_date or "") is None:
            raise ValueError("price_date is YYYY-MM-DD, YYYY-MM, YYYY or undated; write it so")
        for dearer, cheaper in (("on_demand", "spot"), ("on_demand", "reserved_1y"), ("reserved_1y", "reserved_3y")):
            prices = {str(kind): price for kind, price in self.usd_per_hour.items()}
            if dearer in prices and cheaper in prices and prices[cheaper] >= prices[dearer]:
                raise ValueError(f"{cheaper} must be below {dearer}: an equal price means that none is published; leave {cheaper} out")
        return self

    def price_usd_per_device_hour(self, pricing: Pricing) -> float | None:
        """Dollars per device-hour; None where the provider publishes none."""
        price = self.usd_per_hour.get(pricing)
        return None if price is None else price / self.devices_per_instance

    def is_stale(self, today: datetime.date, days: int = STALE_DAYS) -> bool:
        """Whether the price is older than `days`, or its date too vague to tell.

        A month without a day counts as its first day; a year alone, or no date, counts as stale.
        """
        dated = _parse_date(self.price_date or "")
        return dated is None or len(self.price_date or "") < len("2026-01") or (today - dated).days > days


def _parse_date(text: str) -> datetime.date | None:
    """`2026-07-30`, `2026-07` or `2026`; None for anything else."""
    match = PRICE_DATE.fullmatch(text)
    try:
        return datetime.date(int(match[1]), int(match[2] or 1), int(match[3] or 1)) if match else None
    except ValueError:
        return None


class ClusterSpec(Spec):
    """The hardware a user names."""

    accelerator: str
    num_devices: PositiveInt
    offer: str | None = None
    pricing: Pricing = "on_demand"
    price_usd_per_hour: UsdPerHour | None = Field(default=None, alias="price")
    """Per device, e.g. "2.10 USD/h", instead of the offer's."""
    node_size: PositiveInt | None = None
    network_bytes_per_s: BytesPerSecond | None = Field(default=None, alias="network")
    """Per node and direction, e.g. "400 GB/s"."""
    domain_size: PositiveInt | None = None
    """Devices per scale-up domain: a TPU slice, an NVLink domain."""

    @field_serializer("price_usd_per_hour")
    def _price_with_unit(self, value: float | None) -> str | None:
        return None if value is None else f"{value!r} USD/h"

    @field_serializer("network_bytes_per_s")
    def _network_with_unit(self, value: float | None) -> str | None:
        return None if value is None else f"{value!r} B/s"


@dataclass(frozen=True)
class Cluster:
    """Hardware with every name looked up."""

    accelerator: Accelerator
    num_devices: int
    node_size: int
    scale_up: Link
    scale_out: Link | None
    offer: Offer | None
    pricing: Pricing
    usd_per_device_hour: float | None
    assumptions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Catalog:
    """All accelerators and offers that can be named."""

    accelerators: Mapping[str, Accelerator]
    offers: Mapping[str, Offer]
    aliases: Mapping[str, str]

    def accelerator(self, name: str) -> Accelerator:
        """An accelerator by id or alias, in any case.

        Raises:
            InputError: unknown name; the nearest ones are named.
        """
        key = name.strip()
        if key not in self.accelerators:
            key = self.aliases.get(key.lower(), key.lower())
        if key not in self.accelerators:
            by_alias = [self.aliases[alias] for alias in nearest(name, self.aliases, 2)]
            close = dict.fromkeys([*by_alias, *nearest(name, self.accelerators)])
            if not close:
                raise unknown_name("cluster.accelerator", name, list(self.accelerators), SEE_CATALOG)
            rule = f"must be one of {len(self.accelerators)} known names, or an alias of one"
            raise InputError.single("cluster.accelerator", name, rule, f"did you mean {', '.join(close)}?{SEE_CATALOG}")
        return self.accelerators[key]

    def offer(self, name: str) -> Offer:
        """An offer by id; without a region the first one of that instance type.

        Raises:
            InputError: unknown name.
        """
        if name in self.offers:
            return self.offers[name]
        for known in self.offers:
            if known.split("@")[0] == name:
                return self.offers[known]
        raise unknown_name("cluster.offer", name, list(self.offers), " (see planner catalog offers)")

    def _variant(self, device: Accelerator, num_devices: int) -> Accelerator:
        """The entry for so many devices of a machine that they share; the device itself where they share nothing."""
        if not device.variants:
            return device
        if str(num_devices) not in device.variants:
            known = ", ".join(device.variants)
            raise InputError.single(
                "cluster.num_devices",
                num_devices,
                f"{device.id} was measured with {known} process{'' if known == '1' else 'es'}",
                f"measure it: python -m reftrain bench-device --processes {','.join(map(str, sorted({num_devices, *map(int, device.variants)})))}",
            )
        return self.accelerator(device.variants[str(num_devices)])

    def resolve(self, spec: ClusterSpec) -> Cluster:
        """The cluster a user named, with what was guessed about it.

        Raises:
            InputError: unknown names, an offer of another accelerator or without the price asked for.
        """
        device = self._variant(self.accelerator(spec.accelerator), spec.num_devices)
        offer = self.offer(spec.offer) if spec.offer is not None else None
        if offer is not None and self.accelerator(offer.accelerator).id != device.id:
            fix = f"use accelerator {offer.accelerator}, or another offer"
            raise InputError.single("cluster.offer", spec.offer, f"holds {offer.accelerator}, and cluster.accelerator is {device.id}", fix)
        notes: list[str] = []
        if not device.confidence.startswith("high"):
            notes.append(f"catalog values of {device.id} are of {device.confidence} confidence: see planner catalog accelerators {device.id}")
        if offer is not None and offer.id != spec.offer:
            notes.append(f"region of {spec.offer}: {offer.region or 'not stated'}, the first one in the catalog; name another as {offer.id}")
        per_node = (offer.node_size or offer.devices_per_instance) if offer else min(device.typical_node_size, spec.num_devices)
        node_size = spec.node_size or per_node
        domain = min(spec.domain_size or _domain_size(device, node_size), spec.num_devices)
        if device.scale_up.kind == "torus" and spec.domain_size is None and spec.num_devices > node_size:
            notes.append(f"slices of {domain} devices: the largest that {device.id} and the number of devices allow; domain_size names another")
        scale_out = _scale_out(spec, device, offer, node_size, domain, notes)
        scale_up = device.scale_up.model_copy(update={"domain_size": domain})
        return Cluster(device, spec.num_devices, node_size, scale_up, scale_out, offer, spec.pricing, _price(spec, offer, notes), tuple(notes))


def _domain_size(device: Accelerator, node_size: int) -> int:
    """Devices on one scale-up fabric: at most a node's, unless the fabric joins nodes (NVL72 racks, TPU slices)."""
    link = device.scale_up
    if link.kind == "pcie":
        return node_size
    return link.domain_size if link.domain_size > device.typical_node_size else min(link.domain_size, node_size)


def _scale_out(spec: ClusterSpec, device: Accelerator, offer: Offer | None, node_size: int, domain: int, notes: list[str]) -> Link | None:
    """The network between nodes: the user's, the offer's, or the vendor's reference design."""
    reference = device.scale_out
    if spec.network_bytes_per_s is not None:
        name, source, rate = "as given", "given by the user", spec.network_bytes_per_s / node_size
    elif offer is not None and offer.network_bytes_per_s is not None:
        name, source, rate = f"{offer.network_kind} of {offer.id}", offer.source, offer.network_bytes_per_s / offer.devices_per_instance
    else:
        if reference is not None and spec.num_devices > domain:
            notes.append(f"network between nodes: {reference.name}, {reference.bandwidth_bytes_per_s / 1e9:g} GB/s per device (reference design)")
        return reference
    shared = {
        "ring_efficiency_fraction": reference.ring_efficiency_fraction if reference else 0.8,
        "latency": f"{reference.latency_s if reference else 1e-5!r} s",
    }
    per_device = {"bandwidth": f"{rate!r} B/s", "peer_bandwidth": f"{rate!r} B/s", "domain_size": 1}
    return build(Link, {"name": name, "kind": "switch", **per_device, **shared, "evidence": "assumed", "source": source}, "cluster.network")


def _price(spec: ClusterSpec, offer: Offer | None, notes: list[str]) -> float | None:
    if spec.price_usd_per_hour is not None:
        return spec.price_usd_per_hour
    if offer is None:
        return None
    price = offer.price_usd_per_device_hour(spec.pricing)
    if price is None:
        known = ", ".join(offer.usd_per_hour) or "none"
        raise InputError.single("cluster.pricing", spec.pricing, f"{offer.id} has no such price (known: {known})", "use a known one, or give --price")
    if offer.is_stale(datetime.date.today()):
        notes.append(f"price of {offer.id} dates from {offer.price_date}: older than {STALE_DAYS} days or undated, check it")
    return price


def load_catalog(extra: Path | None = None) -> Catalog:
    """The shipped catalog, with this machine's entries (`reftrain bench-device`) and those of `extra` added.

    Args:
        extra: a YAML file with `accelerators:` and `offers:`, each a mapping of entries; one with an id that is already taken needs
            `replace: true`.
    Raises:
        InputError: unreadable file, or an id that is taken.
    """
    accelerators = read_entries(DATA_DIR / "hardware_catalog.yaml")
    offers = read_entries(DATA_DIR / "offers.yaml")
    aliases = read_aliases(accelerators)
    machine = user_dir() / "catalog.yaml"
    if machine.is_file():
        add_entries(machine, accelerators, offers)
    own = add_entries(extra, accelerators, offers) if extra is not None else {}
    if own or machine.is_file():
        aliases |= read_aliases(accelerators)  # an entry that replaces another keeps its aliases
    catalog = Catalog(Entries(accelerators, Accelerator), Entries(offers, Offer), aliases)
    if extra is not None:
        _check_own(catalog, own, str(extra))
    return catalog


def _check_own(catalog: Catalog, own: dict[str, list[str]], where: str) -> None:
    """Parses a user's entries at once, so that a mistake in any of them is named before it is needed."""
    problems: list[Problem] = []
    for section, names in own.items():
        entries = catalog.accelerators if section == "accelerators" else catalog.offers
        for name in names:
            try:
                entry = entries[name]
                if isinstance(entry, Offer):
                    catalog.accelerator(entry.accelerator)
            except InputError as error:
                problems += [replace(p, key=f"{name}.accelerator" if p.key == "cluster.accelerator" else p.key, where=where) for p in error.problems]
    if problems:
        raise InputError(*problems)
