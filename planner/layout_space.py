"""All layouts worth trying for a job, and the best one of them."""

from __future__ import annotations

from itertools import product

import numpy as np

from planner.errors import InputError
from planner.layout import Layout, PartialLayout
from planner.layout_rules import check_layout, legal_layouts
from planner.pricing import LayoutTable, Prices, price_layouts
from planner.resolve import Job
from planner.schedules import SCHEDULES

__all__ = ["complete_layout", "layout_space"]

LONG_SEQ_LEN = 16384
"""Context parallelism is tried from here on."""
MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
COLUMNS = tuple(Layout.model_fields)


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _schedules(given: PartialLayout, pp: int, num_layers: int) -> list[tuple[str, int]]:
    """(schedule, num_virtual_stages) to try for a pipeline of `pp` stages."""
    if given.schedule is not None:
        versions = (given.num_virtual_stages,) if given.num_virtual_stages else SCHEDULES[given.schedule].usual_virtual_stages
        return [(given.schedule, v) for v in versions]
    if given.num_virtual_stages is not None:
        return [("interleaved_1f1b" if given.num_virtual_stages > 1 else "1f1b", given.num_virtual_stages)]
    if pp == 1:
        return [("1f1b", 1)]
    return [("1f1b", 1), *(("interleaved_1f1b", v) for v in (2, 4) if pp * v <= num_layers)]


def layout_space(job: Job, given: PartialLayout) -> LayoutTable:
    """Every legal layout that keeps the given keys.

    Tried: tp within a scale-up domain, cp for long sequences, pp up to the layers, ep over the experts' divisors, replicas per
    scale-up domain count, micro-batches in powers of two, ZeRO as the stack does it.
    """
    world, model = job.cluster.num_devices, job.model
    degrees = _divisors(world)

    def pick(name: str, options: list[int]) -> list[int]:
        value = getattr(given, name)
        return options if value is None else [value]

    in_place = job.stack.weight_storage == "fp32_in_place"
    zero_stages = pick("zero_stage", [1, 3] if in_place else [1])
    experts = _divisors(model.moe.num_experts) if model.moe else [1]
    rows: list[tuple[object, ...]] = []
    for tp, cp, pp in product(
        pick("tp", [d for d in degrees if d <= min(job.cluster.scale_up.domain_size, 64)]),
        pick("cp", [d for d in degrees if d <= 64] if job.seq_len > LONG_SEQ_LEN else [1]),
        pick("pp", [d for d in degrees if d <= model.num_layers]),
    ):
        if world % (tp * cp * pp):
            continue
        dp = world // (tp * cp * pp)
        replicas = pick("dp_replicate", sorted({1, max(dp * tp * cp // job.cluster.scale_up.domain_size, 1)}))
        parallel = [tp > 1] if given.sequence_parallel is None else [given.sequence_parallel]
        for replicate, (schedule, v), ep, zero, sp, micro in product(
            replicas,
            _schedules(given, pp, model.num_layers),
            pick("ep", experts),
            zero_stages,
            parallel,
            pick("micro_batch_size", list(MICRO_BATCH_SIZES)),
        ):
            shard = given.dp_shard or (1 if zero == 0 else max(dp // replicate, 1))
            if given.dp_replicate is None and zero == 0:
                replicate = dp // shard
            rows.append((replicate, shard, tp, cp, pp, v, schedule, ep, zero, sp, micro))
    columns = (
        {name: np.array(column) for name, column in zip(COLUMNS, zip(*rows, strict=True), strict=True)}
        if rows
        else {name: np.array([], int) for name in COLUMNS}
    )
    return _only_legal(job, LayoutTable(columns))


def _only_legal(job: Job, table: LayoutTable) -> LayoutTable:
    keep = np.zeros(len(table), bool)
    for rows, layouts in table.groups() if len(table) else []:
        legal, _ = legal_layouts(layouts, job.facts)
        schedule = SCHEDULES[layouts.schedule]
        microbatches = job.global_batch_size // np.maximum(layouts.dp * layouts.micro_batch_size, 1)
        legal[legal] = schedule.legal(layouts.pp, layouts.num_virtual_stages, np.maximum(microbatches[legal], 1))
        keep[rows] = legal
    return table.take(keep)


def complete_layout(job: Job, given: PartialLayout) -> tuple[Layout, list[str]]:
    """The layout itself when complete; else the fastest one that fits, or the smallest one when none does.

    Raises:
        InputError: no layout keeps the given keys and the rules.
    """
    if given.is_complete:
        return given.complete(), []
    table = layout_space(job, given)
    if not len(table):
        raise _no_layout(job, given)
    prices = price_layouts(job, table)
    is_safe = prices.peak_bytes * job.stack.memory_interval.high <= job.cluster.accelerator.memory_bytes
    among = f"of {len(table):,} legal ones"
    if is_safe.any():
        best, found = _fastest(prices, is_safe), f"layout: the fastest {among} that fits even at the upper bound of its memory"
    elif prices.fits.any():
        best, found = _fastest(prices, prices.fits), f"layout: the fastest {among} that fits; none fits at the upper bound of its memory"
    else:
        best, found = int(np.argmin(prices.peak_bytes)), f"layout: none {among} fits; this one needs least memory"
    return table.row(best), [found]


def _fastest(prices: Prices, allowed: np.ndarray) -> int:
    return int(np.argmin(np.where(allowed, prices.step_s, np.inf)))


def _no_layout(job: Job, given: PartialLayout) -> InputError:
    """Why nothing is left: the rules that a plain layout with the given keys breaks, or else the batch."""
    world = job.cluster.num_devices
    fixed = (given.tp or 1) * (given.cp or 1) * (given.pp or 1)
    layout = given.complete(dp_shard=max(world // (fixed * (given.dp_replicate or 1)), 1), zero_stage=1)
    try:
        check_layout(layout, job.facts)
    except InputError as error:
        return error
    shown = {name: value for name, value in given.model_dump().items() if value is not None}
    return InputError.single(
        "layout",
        shown,
        f"no layout of {world} devices and global_batch_size {job.global_batch_size} keeps these keys",
        "leave more keys open, or change num_devices or global_batch_size",
    )
