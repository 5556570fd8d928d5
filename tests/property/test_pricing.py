"""One formula for one layout and for a million; rules likewise; and better hardware is never slower."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.errors import InputError
from planner.estimate import estimate
from planner.graph import build_step_graph
from planner.hardware import Cluster
from planner.layout import Layout, LayoutArrays, PartialLayout
from planner.layout_rules import Facts, check_layout, legal_layouts
from planner.layout_space import COLUMNS, layout_space
from planner.plan import build_request
from planner.pricing import LayoutTable, price_layouts
from planner.resolve import Job, resolve
from planner.schedules import SCHEDULES
from planner.timing import estimate_time
from tests.strategies import layouts, models, requests

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])


def job_of(request: dict[str, Any]) -> Job:
    return resolve(build_request(request))


def step_s(job: Job, layout: Layout, cluster: Cluster) -> float:
    graph = build_step_graph(
        job.model, job.workload, layout, job.numerics, job.precision, seq_len=job.seq_len, global_batch_size=job.global_batch_size
    )
    return float(estimate_time(graph, cluster, replace(job, cluster=cluster).efficiency).step_s)


@quick
@given(requests(dp_replicate=1, cp=1, schedule="1f1b", num_virtual_stages=1), st.data())
def test_arrays_give_the_very_numbers_of_one_layout(request: dict[str, Any], data: st.DataObject) -> None:
    """Every legal layout of the job at once, then some of them alone: equal to the last digit."""
    job = job_of(request)
    table = layout_space(job, PartialLayout())
    prices = price_layouts(job, table)
    for index in data.draw(st.lists(st.integers(0, len(table) - 1), min_size=1, max_size=4, unique=True)):
        plan = estimate(request | {"layout": table.row(index).model_dump()})
        assert prices.step_s[index] == plan.time.step_s.value
        assert prices.peak_bytes[index] == plan.memory.peak_bytes.value
        assert bool(prices.fits[index]) == plan.fits


@quick
@given(st.data())
def test_every_schedule_and_degree_prices_alike_in_arrays(data: st.DataObject) -> None:
    """Random layouts of one model and one world, of all schedules, as rows of one table."""
    request = data.draw(requests())
    job = job_of(request)
    own = Layout(**request["layout"])
    rows = [own]
    for micro in (1, 2, 4):
        other = own.model_copy(update={"micro_batch_size": micro})
        if job.global_batch_size % (other.dp * micro) == 0:
            count = job.global_batch_size // (other.dp * micro)
            if SCHEDULES[other.schedule].legal(other.pp, other.num_virtual_stages, np.array([count]))[0]:
                rows.append(other)
    table = LayoutTable({name: np.array([getattr(row, name) for row in rows]) for name in COLUMNS})
    prices = price_layouts(job, table)
    for index, row in enumerate(rows):
        plan = estimate(request | {"layout": row.model_dump()})
        assert prices.step_s[index] == plan.time.step_s.value
        assert prices.peak_bytes[index] == plan.memory.peak_bytes.value


@quick
@given(st.data())
def test_filtering_many_layouts_agrees_with_checking_each(data: st.DataObject) -> None:
    model = data.draw(models())
    drawn = [Layout(**data.draw(layouts(model))) for _ in range(8)]
    structure = (drawn[0].pp, drawn[0].num_virtual_stages, drawn[0].schedule)
    job = job_of(
        {
            "model": model,
            "workload": {"seq_len": data.draw(st.sampled_from((96, 256, 1000))), "global_batch_size": data.draw(st.sampled_from((8, 24, 64)))},
            "cluster": {"accelerator": "h100-80gb-sxm", "num_devices": data.draw(st.sampled_from([row.num_devices for row in drawn]))},
        }
    )  # fmt: skip
    drawn = [row.model_copy(update={"pp": structure[0], "num_virtual_stages": structure[1], "schedule": structure[2]}) for row in drawn]
    names = [name for name in COLUMNS if name not in ("pp", "num_virtual_stages", "schedule")]
    arrays = LayoutArrays(
        **{name: np.array([getattr(row, name) for row in drawn]) for name in names},
        pp=structure[0], num_virtual_stages=structure[1], schedule=structure[2],
    )  # fmt: skip
    legal, refused = legal_layouts(arrays, job.facts)
    assert legal.tolist() == [keeps_rules(row, job.facts) for row in drawn]
    assert sum(refused.values()) == np.count_nonzero(~legal)


def keeps_rules(layout: Layout, facts: Facts) -> bool:
    try:
        check_layout(layout, facts)
    except InputError:
        return False
    return True


@pytest.mark.parametrize("better", ["scale_up", "scale_out", "latency", "memory", "peak"])
def test_better_hardware_is_never_slower(better: str) -> None:
    @quick
    @given(requests(), st.floats(1.01, 10))
    def check(request: dict[str, Any], factor: float) -> None:
        job = job_of(request)
        layout = Layout(**request["layout"])
        # A faster kernel hides less of FSDP's traffic. What shows is booked with the gradients of the inputs, which these two schedules
        # cannot move off the critical path as they do with those of the weights: up to 2.3% in 1500 random plans.
        is_split = better == "peak" and layout.zero_stage >= 2 and layout.schedule in ("zb_h1", "dualpipe")
        slack = 0.05 if is_split else 1e-9
        assert step_s(job, layout, improved(job.cluster, better, factor)) <= step_s(job, layout, job.cluster) * (1 + slack)

    check()


def improved(cluster: Cluster, what: str, factor: float) -> Cluster:
    device = cluster.accelerator
    if what == "memory":
        return replace(cluster, accelerator=device.model_copy(update={"memory_bandwidth_bytes_per_s": device.memory_bandwidth_bytes_per_s * factor}))
    if what == "peak":
        rates = {name: rate * factor for name, rate in device.dense_flops_per_s.items()}
        return replace(cluster, accelerator=device.model_copy(update={"dense_flops_per_s": rates}))
    names = ("latency_s",) if what == "latency" else ("bandwidth_bytes_per_s", "peer_bandwidth_bytes_per_s")
    changes = {}
    for tier in ("scale_up", "scale_out") if what == "latency" else (what,):
        link = getattr(cluster, tier)
        if link is not None:
            scaled = {name: getattr(link, name) * (1 / factor if what == "latency" else factor) for name in names}
            changes[tier] = link.model_copy(update=scaled)
    return replace(cluster, **changes)
