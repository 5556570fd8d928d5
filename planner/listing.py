"""What can be named in a plan: rows for `planner catalog`, and single entries in full."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from planner.architectures import load_model, preset_names, preset_record
from planner.graph import count_params
from planner.hardware import load_catalog
from planner.stack import load_stack, stack_names
from planner.units import format_count

__all__ = ["KINDS", "entry", "listing"]

KINDS = ("accelerators", "offers", "models", "stacks")


def listing(kind: str, extra: Path | None = None) -> list[dict[str, Any]]:
    """One short row per entry, SI units in the names."""
    if kind == "models":
        return [_model_row(name) for name in preset_names()]
    if kind == "stacks":
        return [{"stack": name, "description": load_stack(name).description} for name in stack_names()]
    catalog = load_catalog(extra)
    if kind == "accelerators":
        return [_accelerator_row(catalog.accelerator(name)) for name in catalog.accelerators]
    today = datetime.date.today()
    return [_offer_row(catalog.offer(name), today) for name in catalog.offers]


def _model_row(name: str) -> dict[str, Any]:
    record = preset_record(name)
    model = load_model(name)
    return {
        "model": name,
        "family": model.family,
        "params": int(count_params(model)["total"]),
        "published_params": str(record["published_params"]),
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
    }


def _accelerator_row(accelerator: Any) -> dict[str, Any]:
    return {
        "accelerator": accelerator.id,
        "memory_bytes": accelerator.memory_bytes,
        "memory_bandwidth_bytes_per_s": accelerator.memory_bandwidth_bytes_per_s,
        "bf16_flops_per_s": accelerator.dense_flops_per_s.get("bf16"),
        "fp8_flops_per_s": accelerator.dense_flops_per_s.get("fp8"),
        "scale_up_bytes_per_s": accelerator.scale_up.bandwidth_bytes_per_s,
        "domain_size": accelerator.scale_up.domain_size,
        "year": accelerator.year,
    }


def _offer_row(offer: Any, today: datetime.date) -> dict[str, Any]:
    prices = {f"{kind}_usd_per_device_hour": offer.price_usd_per_device_hour(kind) for kind in ("on_demand", "spot")}
    return {
        "offer": offer.id,
        "accelerator": offer.accelerator,
        "devices": offer.devices_per_instance,
        "region": offer.region,
        **prices,
        "price_date": offer.price_date,
        "is_stale": bool(offer.usd_per_hour) and offer.is_stale(today),
    }


def entry(kind: str, name: str, extra: Path | None = None) -> dict[str, Any]:
    """Everything known about one entry, sources included.

    Raises:
        InputError: unknown name.
    """
    if kind == "models":
        model = load_model(name)
        counts = count_params(model)
        shape = model.model_dump(exclude_none=True)
        return {
            **shape,
            "params": {k: int(v) for k, v in counts.items()},
            "params_text": format_count(counts["total"]),
            "preset": preset_record(name),
        }
    if kind == "stacks":
        return load_stack(name).model_dump()
    catalog = load_catalog(extra)
    found = catalog.accelerator(name) if kind == "accelerators" else catalog.offer(name)
    return found.model_dump(mode="json", exclude_none=True)
