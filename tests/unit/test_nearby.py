"""The correction by measured runs: against the textbook's formula, near and far, for one plan and for many layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from planner import estimate
from planner.graph import StepGraph
from planner.hardware import Cluster
from planner.layout import Layout, PartialLayout
from planner.layout_space import layout_space
from planner.nearby import AMPLITUDE, ELSEWHERE, FEATURES, SPREAD_FACTOR, NearbyRuns, features_of, load_nearby, make_nearby, run_noise
from planner.plan import build_request
from planner.pricing import price_grids
from planner.resolve import Job, resolve

REQUEST: dict[str, Any] = {
    "model": "llama-3.1-8b", "workload": {"seq_len": 8192, "global_batch_size": 128, "tokens": 1e12},
    "cluster": {"accelerator": "h100-80gb-sxm", "num_devices": 64}, "stack": "nemo",
    "layout": {"dp_shard": 32, "tp": 2, "zero_stage": 1, "micro_batch_size": 1, "sequence_parallel": True},
}  # fmt: skip


KNOWN = {"left_out_error_fraction": 0.1, "left_out_spread": 0.1, "measured_step_s": 1.0}


def graph_of(job: Job, layout: Layout) -> StepGraph:

    return job.graph(layout)


def planned(**layout: Any) -> tuple[Job, StepGraph, Cluster]:
    request = build_request({**REQUEST, "layout": {**REQUEST["layout"], **layout}})
    job = resolve(request)
    return job, graph_of(job, request.layout.complete()), job.cluster


def runs_at(places: list[np.ndarray], log_ratio: list[float], noise: float = 0.02) -> NearbyRuns:
    rows = [
        {
            "id": f"r{i}", "source": "a test", "model": "m", "accelerator": "h100-80gb-sxm", "num_devices": 8, **KNOWN,
            "log_ratio": ratio, "noise": noise, **dict(zip(FEATURES, place, strict=True)),
        }
        for i, (place, ratio) in enumerate(zip(places, log_ratio, strict=True))
    ]  # fmt: skip
    return make_nearby(rows)


def test_it_is_the_textbooks_posterior() -> None:
    _, graph, cluster = planned()
    here = features_of(graph, cluster, 2025.0)
    numbers = np.random.default_rng(0)
    places = [here + numbers.normal(0, 0.4, len(FEATURES)) for _ in range(12)]
    ratios = numbers.normal(0, 0.1, 12).tolist()
    runs = runs_at(places, ratios)
    mean, spread = runs.log_ratio_at(graph, cluster, 2025.0), runs.spread_at(graph, cluster, 2025.0)
    scaled = runs.places
    point = here / (np.array(places[0]) / scaled[0])

    def kernel(one: np.ndarray, other: np.ndarray) -> float:
        return float(AMPLITUDE**2 * np.exp(-np.sum((one - other) ** 2) / 2))

    covariance = np.array([[kernel(a, b) + 0.02**2 * (i == j) for j, b in enumerate(scaled)] for i, a in enumerate(scaled)])
    towards = np.array([kernel(point, a) for a in scaled])
    assert float(mean) == pytest.approx(towards @ np.linalg.inv(covariance) @ ratios, rel=1e-6)
    variance = SPREAD_FACTOR**2 * (AMPLITUDE**2 - towards @ np.linalg.inv(covariance) @ towards + 0.02**2)
    nearest = min(float(np.sum((point - a) ** 2)) for a in scaled)
    assert float(spread) == pytest.approx(np.sqrt(variance + ELSEWHERE**2 * (1 - np.exp(-nearest / 2))), rel=1e-6)


def test_a_run_at_the_same_place_is_believed_and_a_far_one_is_not() -> None:
    _, graph, cluster = planned()
    here = features_of(graph, cluster, 2025.0)
    same, far = runs_at([here], [0.2]), runs_at([here + 20], [0.2])
    assert float(same.log_ratio_at(graph, cluster, 2025.0)) == pytest.approx(0.2, rel=0.02)
    assert float(far.log_ratio_at(graph, cluster, 2025.0)) == 0
    wide, narrow = (float(runs.spread_at(graph, cluster, 2025.0)) for runs in (far, same))
    assert wide > 5 * narrow
    assert wide == pytest.approx(np.hypot(SPREAD_FACTOR * AMPLITUDE, ELSEWHERE), rel=0.05)


def test_the_spread_grows_with_the_distance() -> None:
    _, graph, cluster = planned()
    here = features_of(graph, cluster, 2025.0)
    spreads = [float(runs_at([here + step * (np.arange(len(FEATURES)) == 0)], [0.1]).spread_at(graph, cluster, 2025.0)) for step in (0, 1, 2, 4)]
    assert spreads == sorted(spreads)


def test_names_are_nothing() -> None:
    """The correction knows runs by where they stand, never by what they are called."""
    _, graph, cluster = planned()
    runs = load_nearby("nemo")
    assert runs is not None
    renamed = replace(runs, runs=tuple(replace(run, id="x", source="y", model="z", accelerator="w") for run in runs.runs))
    assert runs.log_ratio_at(graph, cluster) == renamed.log_ratio_at(graph, cluster)
    assert runs.spread_at(graph, cluster) == renamed.spread_at(graph, cluster)


def test_many_layouts_are_corrected_as_each_alone() -> None:
    job = resolve(build_request({**REQUEST, "layout": {}}))
    grids = layout_space(job, PartialLayout()).grids
    for prices in list(price_grids(job, grids))[::4]:
        index = int(np.flatnonzero(prices.grid.legal)[-1])
        alone = estimate({**REQUEST, "layout": prices.grid.layout(index).model_dump()})
        assert alone.time.breakdown_s["correction"] != 0
        graph = job.graph(prices.grid.layouts)
        correction = np.broadcast_to(nearby_of(job).log_ratio_over(graph, job.cluster), prices.grid.shape).flat[index]
        assert np.log(alone.time.step_s.value / (alone.time.step_s.value - alone.time.breakdown_s["correction"])) == pytest.approx(
            correction, rel=1e-9
        )


def nearby_of(job: Job) -> NearbyRuns:
    assert job.nearby is not None
    return job.nearby


def test_a_run_that_disagrees_with_its_neighbours_is_noise() -> None:
    _, graph, cluster = planned()
    here = features_of(graph, cluster, 2025.0)
    places = np.array([here + 0.05 * i for i in range(8)])
    ratios = np.array([0.05] * 7 + [0.9])
    noise = run_noise(places, ratios, 0.02)
    assert noise[-1] > 5 * noise[:-1].max()
    mean = runs_at(list(places), ratios.tolist()).log_ratio_at(graph, cluster, 2025.0)
    calmed = [
        {"id": str(i), "source": "s", "model": "m", "accelerator": "a", "num_devices": 8, **KNOWN, "log_ratio": r, "noise": n,
         **dict(zip(FEATURES, p, strict=True))}
        for i, (p, r, n) in enumerate(zip(places, ratios, noise, strict=True))
    ]  # fmt: skip
    assert float(make_nearby(calmed).log_ratio_at(graph, cluster, 2025.0)) == pytest.approx(0.05, abs=0.01)
    assert float(mean) > 0.055


def test_evidence_names_the_nearest_published_runs_and_their_errors() -> None:
    plan = estimate(REQUEST)
    named = [entry for entry in plan.evidence if entry.name.startswith("published run")]
    assert len(named) == 5
    assert all(entry.evidence == "measured" and abs(entry.value) < 5 for entry in named)
    away = [float(entry.source.split(";")[1].split()[0]) for entry in named]
    assert away == sorted(away)


def test_an_unknown_stack_has_no_correction(tmp_path: Any) -> None:
    plan = estimate({**REQUEST, "stack": "torchtitan"})
    assert load_nearby("torchtitan") is None
    assert plan.time.breakdown_s["correction"] == 0
