"""Seconds per step -> days, dollars, goodput, energy and carbon."""

from __future__ import annotations

import math
from dataclasses import dataclass

from planner.hardware import Cluster
from planner.units import DAY_S, HOUR_S

__all__ = ["CostBreakdown", "Goodput", "estimate_cost", "estimate_goodput"]

FAILURES_PER_1000_NODE_DAYS = 4.0
"""Mature clusters: 2.3 (Meta RSC-2), 3.0 (BLOOM), 3.8 (Llama 3), 6.5 (RSC-1); arXiv:2410.21680, 2407.21783."""
CHECKPOINT_STALL_S = 30.0
"""Time that saving stops training; asynchronous writers stall less. Assumed."""
RESTART_S = 600.0
"""Detection, restart and reload after a failure; MegaScale (arXiv:2402.15627) reports under 10 + 15 minutes. Assumed."""
BOARD_POWER_FRACTION = 0.8
"""Draw over rated board power while training; arXiv:2412.08602 measures 0.76 to 0.82 of a node's rating."""
HOST_WATTS_PER_DEVICE = 240.0
"""CPU, fans, network per device; 1.5 to 2.3 kW of an 8-device HGX node beside its boards."""
POWER_USAGE_EFFECTIVENESS = 1.15
"""AWS fleet 2023; Google 1.10, Microsoft 1.18, industry 1.58."""
GRID_G_PER_KWH = 475.0
"""World average, IEA 2019; regions range from 16 to 832 g CO2e/kWh."""


@dataclass(frozen=True)
class Goodput:
    """Share of wall time that advances training, and the checkpoint interval that maximises it."""

    fraction: float
    checkpoint_interval_s: float
    mean_time_between_failures_s: float


def estimate_goodput(num_nodes: float) -> Goodput:
    """Goodput with failures, checkpoints at Daly's interval, and restarts.

    Formula: tau = sqrt(2 d M) (1 + sqrt(d / 2M) / 3 + d / 18M) - d; fraction = tau / (M e^(R/M) (e^((tau+d)/M) - 1)); M mean time
    between failures of the job, d stall per checkpoint, R restart. Source: Daly 2006, doi:10.1016/j.future.2004.11.016.

    Example:
        >>> round(estimate_goodput(2048).fraction, 3)
        0.875
    """
    m = 1000.0 * DAY_S / (FAILURES_PER_1000_NODE_DAYS * num_nodes)
    d, r = CHECKPOINT_STALL_S, RESTART_S
    tau = math.sqrt(2 * d * m) * (1 + math.sqrt(d / (2 * m)) / 3 + d / (18 * m)) - d if d < 2 * m else m
    exponent = (tau + d) / m
    fraction = 0.0 if exponent + r / m > 700 else tau / (m * math.exp(r / m) * math.expm1(exponent))
    return Goodput(fraction, tau, m)


@dataclass(frozen=True)
class CostBreakdown:
    """What the whole run takes and costs."""

    train_s: float
    """Wall time, goodput included."""
    device_hours: float
    """Of the devices that work."""
    billed_device_hours: float
    """Of whole instances."""
    usd: float | None
    """None where no price is known."""
    idle_device_usd: float | None
    """Part of `usd` paid for devices of the last instance that the layout leaves idle."""
    lost_time_usd: float | None
    """Part of `usd` paid for failures, restarts and checkpoints."""
    energy_kwh: float
    co2e_kg: float


def estimate_cost(step_s: float, num_steps: float, cluster: Cluster, goodput: Goodput) -> CostBreakdown:
    """Time, money, energy and carbon of `num_steps` steps; whole instances are billed."""
    train_s = step_s * num_steps / goodput.fraction if goodput.fraction > 0 else math.inf
    hours = train_s / HOUR_S
    per_instance = cluster.offer.devices_per_instance if cluster.offer is not None else 1
    billed = math.ceil(cluster.num_devices / per_instance) * per_instance
    price = cluster.usd_per_device_hour
    usd = None if price is None else hours * billed * price
    watts = cluster.accelerator.power_watts
    device_watts = (watts or 0.0) * BOARD_POWER_FRACTION + HOST_WATTS_PER_DEVICE
    energy_kwh = hours * cluster.num_devices * device_watts / 1000.0 * POWER_USAGE_EFFECTIVENESS
    return CostBreakdown(
        train_s=train_s,
        device_hours=hours * cluster.num_devices,
        billed_device_hours=hours * billed,
        usd=usd,
        idle_device_usd=None if usd is None else usd * (1 - cluster.num_devices / billed),
        lost_time_usd=None if usd is None else usd * cluster.num_devices / billed * (1 - goodput.fraction),
        energy_kwh=energy_kwh,
        co2e_kg=energy_kwh * GRID_G_PER_KWH / 1000.0,
    )
