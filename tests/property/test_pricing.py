"""One formula for one layout and for a million; rules likewise; and better hardware is never slower."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from planner.best_layouts import Counts, Pool, best_first, exact_candidate, scan_space
from planner.errors import InputError
from planner.estimate import estimate
from planner.hardware import Cluster
from planner.layout import Layout, LayoutArrays, PartialLayout
from planner.layout_rules import Facts, check_layout, legal_layouts
from planner.layout_space import layout_space
from planner.plan import build_request
from planner.pricing import price_grids
from planner.resolve import Job, resolve
from planner.timing import estimate_time
from tests.strategies import layouts, models, requests

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])


def job_of(request: dict[str, Any]) -> Job:
    return resolve(build_request(request))


def step_s(job: Job, layout: Layout, cluster: Cluster) -> float:
    graph = job.graph(layout)
    return float(estimate_time(graph, cluster, replace(job, cluster=cluster).efficiency).step_s)


@quick
@given(requests(), st.data())
def test_a_grid_gives_the_numbers_of_one_layout(request: dict[str, Any], data: st.DataObject) -> None:
    """Every legal layout of the job at once, for two sizes, then some of them alone.

    Memory differs by rounding only. So does time, but that pipelines whose stages are alike are looked at on the first and last of them: never
    above the time of all stages, and equal to it where no stage in between has the longest path.
    """
    job = job_of(request)
    world = job.cluster.num_devices
    given = PartialLayout(schedule=request["layout"]["schedule"], zero_stage=request["layout"]["zero_stage"])
    priced = list(price_grids(job, layout_space(job, given, [world]).grids))
    assume(priced)
    for prices in data.draw(st.lists(st.sampled_from(priced), min_size=1, max_size=3)):
        index = int(data.draw(st.sampled_from(np.flatnonzero(prices.grid.legal).tolist())))
        layout = prices.grid.layout(index)
        plan = estimate(request | {"layout": layout.model_dump()})
        assert prices.peak_bytes.flat[index] == pytest.approx(plan.memory.peak_bytes.value, rel=1e-12)
        assert 0.9 * plan.time.step_s.value <= prices.step_s.flat[index] <= plan.time.step_s.value * (1 + 1e-12)
        if layout.pp == 1:
            assert prices.step_s.flat[index] == pytest.approx(plan.time.step_s.value, rel=1e-12)


@quick
@given(requests(), st.data())
def test_sizes_are_priced_together_as_each_alone(request: dict[str, Any], data: st.DataObject) -> None:
    """A grid over several numbers of devices has the very layouts and numbers of the grids over each."""
    request = request | {"cluster": {"accelerator": "h100-80gb-sxm", "num_devices": 8}, "layout": {}}
    job = job_of(request)
    together = {
        (count, str(prices.grid.layout(index))): (prices.step_s.flat[index], prices.peak_bytes.flat[index])
        for prices in price_grids(job, layout_space(job, PartialLayout(cp=1), [8, 16]).grids)
        for index in np.flatnonzero(prices.grid.legal).tolist()
        if (count := prices.grid.layout(index).num_devices) in (8, 16)
    }
    for count in (8, 16):
        alone = list(price_grids(job, layout_space(job, PartialLayout(cp=1), [count]).grids))
        expected = [
            (count, str(prices.grid.layout(index)), prices.step_s.flat[index], prices.peak_bytes.flat[index])
            for prices in alone
            for index in np.flatnonzero(prices.grid.legal).tolist()
        ]
        assert len(expected) == sum(1 for size, _ in together if size == count)
        for size, layout, step_s, peak_bytes in expected:
            assert together[size, layout] == (pytest.approx(step_s, rel=1e-12), pytest.approx(peak_bytes, rel=1e-12))


@quick
@given(requests(families=("llama", "mixtral")))
def test_the_best_layout_is_the_best_of_all(request: dict[str, Any]) -> None:
    """Every layout of a small space by `estimate`, against the one that is found: the same numbers to the last digit."""
    request = request | {"cluster": request["cluster"] | {"num_devices": 4}}
    job, given = job_of(request), PartialLayout(dp_replicate=1, cp=1, micro_batch_size=1, sequence_parallel=False)
    space = layout_space(job, given)
    every = [grid.layout(index) for grid in space.grids for index in np.flatnonzero(grid.legal).tolist()]
    assume(0 < len(every) <= 40)
    times = [plan.time.step_s.value for layout in every if (plan := estimate(request | {"layout": layout.model_dump()})).fits]
    pool, counts = Pool(job), Counts()
    scan_space(job, space, counts, [(job.cluster.accelerator.memory_bytes, pool)])
    found = [each.step_s for each in best_first(pool.candidates(), lambda each: each.step_s, exact_candidate)]
    assert (counts.priced, counts.fits) == (len(every), len(times))
    assert found == sorted(times)


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
    names = [name for name in Layout.model_fields if name not in ("pp", "num_virtual_stages", "schedule")]
    arrays = LayoutArrays(
        **{name: np.array([getattr(row, name) for row in drawn]) for name in names},
        pp=structure[0], num_virtual_stages=structure[1], schedule=structure[2],
    )  # fmt: skip
    legal, refused = legal_layouts(arrays, job.facts, np.ones(len(drawn), bool))
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
        is_kernel = better in ("peak", "memory")
        is_split = is_kernel and layout.schedule in ("zb_h1", "dualpipe")
        # Whether a kernel is bound by compute or by memory is decided at full rates, for the fit's sake, and not under the stack's: where it
        # turns, up to the difference of the two coefficients is lost on that kernel: 0.1% of a step in the plans drawn so far.
        slack = 0.05 if is_split else 1e-2 if is_kernel else 1e-9
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
