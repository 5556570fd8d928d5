"""The hardware that a search may choose from: accelerators, offers and numbers of devices, with what each of them costs.

In: a request and a `Hardware`. Out: `Rental`s, what one may rent; and `Site`s, rentals on which every layout takes the same time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from planner.errors import InputError
from planner.hardware import Catalog, Cluster, ClusterSpec, Offer, Pricing, load_catalog
from planner.plan import Request
from planner.registry import unknown_name

__all__ = ["Hardware", "Rental", "Site", "list_sites"]

ANY = "any"


@dataclass(frozen=True)
class Hardware:
    """Where to look; empty lists leave what the request says."""

    accelerators: Sequence[str] = ()
    """Names, patterns, or `any`."""
    device_counts: Sequence[int] = ()
    offers: Sequence[str] = ()
    """Ids, patterns like `aws/*`, or `any`; empty: no cloud, but for the request's own."""
    providers: Sequence[str] = ()
    regions: Sequence[str] = ()
    pricing: Sequence[Pricing] = ()

    @property
    def rents(self) -> bool:
        """Whether offers are looked at."""
        return bool(self.offers or self.providers or self.regions)


@dataclass(frozen=True)
class Rental:
    """Devices of one kind, and what they cost."""

    spec: ClusterSpec
    cluster: Cluster


@dataclass(frozen=True, eq=False)
class Site:
    """Rentals with the same device, nodes and links: one cluster for each number of devices, and all the prices that it is let for."""

    rentals: dict[int, list[Rental]] = field(default_factory=dict)

    @property
    def device_counts(self) -> list[int]:
        """Numbers of devices."""
        return sorted(self.rentals)

    @property
    def first(self) -> Rental:
        """Any of them."""
        return self.rentals[self.device_counts[0]][0]


def list_sites(request: Request, hardware: Hardware) -> tuple[list[Site], list[str]]:
    """(the sites, why some of the hardware named is none).

    Raises:
        InputError: a name or pattern that nothing has.
    """
    catalog = load_catalog(Path(request.catalog) if request.catalog else None)
    counts = hardware.device_counts or [request.cluster.num_devices]
    sites: dict[object, Site] = {}
    refused: list[str] = []
    for spec in _specs(catalog, request.cluster, hardware):
        for count in counts:
            own = spec.model_copy(update={"num_devices": count})
            try:
                cluster = catalog.resolve(own)
            except InputError as error:
                refused.append(f"{spec.offer or spec.accelerator}, {count} devices: {error.problems[0].rule}")
                continue
            links = [None if link is None else link.model_dump(exclude={"name", "source"}) for link in (cluster.scale_up, cluster.scale_out)]
            key = (cluster.accelerator.id, cluster.node_size, *links)
            sites.setdefault(repr(key), Site()).rentals.setdefault(count, []).append(Rental(own, cluster))
    return list(sites.values()), refused


def _specs(catalog: Catalog, base: ClusterSpec, hardware: Hardware) -> Iterator[ClusterSpec]:
    """One for each accelerator, or for each of its offers and price kinds."""
    accelerators = _accelerators(catalog, hardware.accelerators or [base.accelerator])
    if not hardware.rents:
        for name in accelerators:
            is_own = catalog.accelerator(base.accelerator).id == name
            yield base if is_own else ClusterSpec(accelerator=name, num_devices=base.num_devices, pricing=base.pricing)
        return
    offers = [offer for offer in _offers(catalog, hardware) if catalog.accelerator(offer.accelerator).id in accelerators]
    if not offers:
        raise InputError.single(
            "--offer", ", ".join([*hardware.offers, *hardware.providers, *hardware.regions]), f"no such offer holds {', '.join(accelerators[:4])}",
            "see planner catalog offers, or leave the provider and region out",
        )  # fmt: skip
    for offer in offers:
        for pricing in hardware.pricing or [base.pricing]:
            if pricing in offer.usd_per_hour:
                yield ClusterSpec(accelerator=offer.accelerator, num_devices=base.num_devices, offer=offer.id, pricing=pricing)


def _accelerators(catalog: Catalog, names: Sequence[str]) -> list[str]:
    """Ids of the accelerators that are meant, each once; machines that were measured here (CPUs) are never among `any`."""
    found: dict[str, None] = {}
    for name in names:
        if name == ANY or "*" in name:
            pattern = "*" if name == ANY else name
            matching = [each for each in catalog.accelerators if fnmatch(each, pattern) and catalog.accelerators[each].kind != "cpu"]
            if not matching:
                raise unknown_name("--accelerator", name, list(catalog.accelerators), " (see planner catalog accelerators)")
            found |= dict.fromkeys(matching)
        else:
            found[catalog.accelerator(name).id] = None
    return list(found)


def _offers(catalog: Catalog, hardware: Hardware) -> Iterator[Offer]:
    """Offers that match a pattern, a provider and a region each, where any are given."""
    known = [catalog.offers[name] for name in catalog.offers]
    for key, values, have in (
        ("--provider", hardware.providers, {offer.provider for offer in known}),
        ("--region", hardware.regions, {offer.region for offer in known if offer.region}),
    ):
        for value in values:
            if value not in have:
                raise unknown_name(key, value, sorted(have), " (see planner catalog offers)")
    patterns = hardware.offers or [ANY]
    for pattern in patterns:
        if pattern != ANY and not any(_matches(offer, pattern) for offer in known):
            raise unknown_name("--offer", pattern, [offer.id for offer in known], " (see planner catalog offers)")
    for offer in known:
        if not any(pattern == ANY or _matches(offer, pattern) for pattern in patterns):
            continue
        if (not hardware.providers or offer.provider in hardware.providers) and (not hardware.regions or offer.region in hardware.regions):
            yield offer


def _matches(offer: Offer, pattern: str) -> bool:
    return fnmatch(offer.id, pattern) or offer.id.split("@")[0] == pattern
