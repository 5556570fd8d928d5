"""What measured runs near to a plan say beyond the formulas: a correction of the step time, and how far to trust it.

In: `data/measurements/evidence.csv.gz`, published runs with what the formulas were off by. Out: for a plan, or arrays of layouts, the expected
log(measured / formulas) and its spread. A Gaussian process: runs that differ little from the plan count much, runs that differ much count
nothing, and where no run is near the correction is nothing and the spread wide. No run is looked up by name.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from planner.files import DATA_DIR, read_text
from planner.graph import StepGraph
from planner.hardware import Cluster
from planner.layout import Layout, LayoutArrays

__all__ = ["FEATURES", "KnownRun", "NearbyRuns", "features_of", "load_nearby", "make_nearby", "run_noise"]

Array = Any
AMPLITUDE = 0.18
"""Standard deviation of log(measured / formulas) over runs, before any is seen."""
SPREAD_FACTOR, ELSEWHERE = 0.85, 0.12
"""Of the spread near known runs, and added far from them: so that 80% intervals hold for at least 80% of runs that were left out with
their like, and for as many as may be of runs of which the whole source was left out."""
SAME_PLACE, SAME_TIME_FRACTION = 1.5, 0.01
"""Within these a measurement is a run that is known already. The place is generous: tables differ in release dates and paddings."""
FAR = 16.0
"""Squared distance beyond which a run is left out: it would count less than exp(-8)."""
UNHEARD = 1e-3
"""Share of the largest weight below which a run is not asked about each layout."""
HEAVY_TAIL = 3.0
"""Degrees of freedom of the scatter around the process: a run that disagrees with all its neighbours counts little (Student's t)."""
TAIL_ROUNDS = 4
BELIEVED = 1.5
"""In units of the amplitude: what a run is off by beyond it counts as its own scatter, and its neighbours are not drawn along."""
LENGTHS: dict[str, float] = {
    "hidden_size": 1.2, "num_layers": 2.0, "seq_len": 1.2, "tp": 1.0, "cp": 1.0, "pp": 2.0, "ep": 1.0, "dp": 2.0, "micro_batch_size": 1.2,
    "num_microbatches": 2.0, "num_virtual_stages": 3.0, "zero_stage": 1.5, "recompute": 1.0, "num_experts": 4.0, "lora": 0.5,
    "matmul_flops_per_s": 0.7, "memory_bytes_per_s": 0.7, "scale_up_bytes_per_s": 1.0, "scale_out_bytes_per_s": 1.0, "domain_size": 3.0,
    "software_year": 0.5,
}  # fmt: skip
"""What counts as one step away, in doublings; recompute none, selective, full are 0, 1, 2; the year in years. Assumed, then halved and
doubled: errors of left-out runs hardly change."""
FEATURES = tuple(LENGTHS)
LAYOUT_FEATURES = (
    "tp", "cp", "pp", "ep", "dp", "micro_batch_size", "num_microbatches", "num_virtual_stages", "zero_stage",
)  # fmt: skip
"""Those that differ between layouts of one job."""
_IS_OF_LAYOUT = np.array([name in LAYOUT_FEATURES for name in FEATURES])
_LENGTHS = np.array(list(LENGTHS.values()))
_RECOMPUTE = {"none": 0.0, "selective": 1.0, "full": 2.0}


@dataclass(frozen=True)
class KnownRun:
    """A measured run that a stack was fitted to."""

    id: str
    source: str
    model: str
    accelerator: str
    num_devices: int
    measured_step_s: float
    left_out_error_fraction: float
    """Predicted over measured step time, less 1, by a fit without this run and its like."""
    left_out_spread: float
    """Of that prediction: standard deviation of log(measured / predicted)."""


@dataclass(frozen=True, eq=False)
class NearbyRuns:
    """The runs of one stack."""

    runs: tuple[KnownRun, ...]
    places: np.ndarray
    """[runs, features], over `LENGTHS`."""
    log_ratio: np.ndarray
    """log(measured / formulas)."""
    noise: np.ndarray
    """Scatter of each run around the process."""
    last_year: float = 0.0
    """Of the newest software measured; what a plan is for that names none."""

    def log_ratio_at(self, graph: StepGraph, cluster: Cluster, software_year: float | None = None) -> Array:
        """Expected log(measured / formulas), a number or [n].

        Formula: with k(x, y) = AMPLITUDE^2 exp(-|x - y|^2 / 2), K the runs' k among themselves plus their noise^2 on the diagonal, and k* theirs
        with the plan: k* K^-1 r, over runs whose distance from the job is under `FAR`.

        Source: Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, section 2.2.
        """
        places, shape = self._flat(graph, cluster, software_year)
        weights, heard = self._heard(places[0])
        # Feature by feature: a matrix product would round differently for one layout and for many.
        squares = np.zeros((len(places), int(heard.sum())))
        for feature in np.flatnonzero(_IS_OF_LAYOUT):
            squares += (places[:, feature, None] - self.places[heard, feature]) ** 2
        return np.sum(np.exp(-squares / 2) * (AMPLITUDE**2 * weights[heard]), axis=1).reshape(shape)

    def log_ratio_over(self, graph: StepGraph, cluster: Cluster, software_year: float | None = None) -> np.ndarray:
        """`log_ratio_at` of a grid of layouts, of a shape that broadcasts to the grid's; equal to it but for rounding, and much faster.

        Formula: every feature x of a layout is a sum of terms along the axes, because it is the logarithm of a product of degrees. In
        exp(-|x - y|^2 / 2) = exp(-|x|^2 / 2) exp(x y) exp(-|y|^2 / 2) the middle factor is then a product over the axes, and the sum over runs
        y a product of matrices.
        """
        places = layout_places(graph)
        shape = np.broadcast_shapes(*(place.shape for place in places))
        weights, heard = self._heard(self._flat(replace(graph, layout=Layout()), cluster, software_year)[0][0])
        if not heard.any():
            return np.zeros(1)
        layout = graph.layout
        stages = np.unique(layout.zero_stage)
        if isinstance(layout, LayoutArrays) and len(stages) > 1:  # few, along an axis that is long
            graphs = [replace(graph, layout=replace(layout, zero_stage=stage)) for stage in stages]
            found = np.concatenate([self.log_ratio_over(one, cluster, software_year) for one in graphs], axis=-1)
            return np.asarray(np.take(found, np.searchsorted(stages, np.ravel(layout.zero_stage)), axis=-1))
        runs = self.places[np.ix_(heard, _IS_OF_LAYOUT)]
        middle = runs.mean(axis=0)  # measured from there, nothing that is raised to a power is large
        runs = runs - middle
        whole, along = np.zeros(1), [np.zeros((length, len(runs))) for length in shape]
        for place, origin, run in zip(places, middle, runs.T, strict=True):
            whole = whole + (place - origin) ** 2
            for axis, terms in enumerate(_terms(place - origin)):
                along[axis] += np.multiply.outer(terms, run)
        first, *others = (np.exp(each) for each in along)
        first = first * (AMPLITUDE**2 * weights[heard] * np.exp(-np.sum(runs**2, axis=1) / 2))
        joined = others[0]
        for each in others[1:]:
            joined = (joined[:, None, :] * each).reshape(-1, len(runs))
        return np.asarray(np.exp(-whole / 2) * (first @ joined.T).reshape(shape))

    def least_log_ratio(self, graph: StepGraph, cluster: Cluster, software_year: float | None = None) -> float:
        """What `log_ratio_over` can never be below, whatever the layout: the sum of its negative terms at their largest."""
        weights, heard = self._heard(self._flat(replace(graph, layout=Layout()), cluster, software_year)[0][0])
        return float(AMPLITUDE**2 * np.minimum(weights[heard], 0.0).sum())

    def _heard(self, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(weights of the runs for a job, which of them are asked); `place`: of the job under any layout, [features].

        Of one job only the layouts differ: what the runs' jobs are apart goes into their weights, once.
        """
        apart = np.sum((self.places[:, ~_IS_OF_LAYOUT] - place[~_IS_OF_LAYOUT]) ** 2, axis=1)
        weights = np.where(apart < FAR, _weights(self) * np.exp(-apart / 2), 0.0)
        return weights, np.abs(weights) > UNHEARD * np.max(np.abs(weights))

    def spread_at(self, graph: StepGraph, cluster: Cluster, software_year: float | None = None) -> Array:
        """Standard deviation of log(measured / predicted), a number or [n].

        Formula: SPREAD_FACTOR^2 (AMPLITUDE^2 - k* K^-1 k*^T + the median noise^2) + ELSEWHERE^2 (1 - exp(-d^2 / 2)), d the distance of the
        nearest run: far from all of them the machine and its operators are unknown too.
        """
        places, shape = self._flat(graph, cluster, software_year)
        near, typical = self._near(places), float(np.median(self.noise))
        told = np.zeros(len(places))
        if near.any():
            towards = _kernel(places, self.places[near])
            told = np.sum((towards @ _factor(self)[:, near].T) ** 2, axis=1)
        squares = np.sum(places**2, axis=1)[:, None] + np.sum(self.places**2, axis=1) - 2 * places @ self.places.T
        elsewhere = ELSEWHERE**2 * (1 - np.exp(-np.maximum(squares.min(axis=1), 0.0) / 2))
        variance = SPREAD_FACTOR**2 * np.maximum(AMPLITUDE**2 - told + typical**2, typical**2)
        return np.sqrt(variance + elsewhere).reshape(shape)

    def _flat(self, graph: StepGraph, cluster: Cluster, software_year: float | None) -> tuple[np.ndarray, tuple[int, ...]]:
        places = features_of(graph, cluster, software_year or self.last_year) / _LENGTHS
        return places.reshape(-1, len(FEATURES)), places.shape[:-1]

    def _near(self, places: np.ndarray) -> np.ndarray:
        """Runs of jobs like this one, whatever their layouts."""
        return np.asarray(np.sum((self.places[:, ~_IS_OF_LAYOUT] - places[0, ~_IS_OF_LAYOUT]) ** 2, axis=1) < FAR)

    def nearest(self, graph: StepGraph, cluster: Cluster, count: int, software_year: float | None = None) -> list[tuple[float, KnownRun]]:
        """(distance in the units of `LENGTHS`, run) of the runs nearest to one plan, nearest first."""
        distances = self._distances(graph, cluster, software_year)
        return [(float(distances[i]), self.runs[i]) for i in np.argsort(distances, kind="stable")[:count].tolist()]

    def same(self, graph: StepGraph, cluster: Cluster, measured_step_s: float, software_year: float | None = None) -> KnownRun | None:
        """The run that a measurement is, whatever it is called: at the same place, with the same time."""
        distances = self._distances(graph, cluster, software_year)
        for i in np.flatnonzero(distances < SAME_PLACE).tolist():
            if math.isclose(self.runs[i].measured_step_s, measured_step_s, rel_tol=SAME_TIME_FRACTION):
                return self.runs[i]
        return None

    def _distances(self, graph: StepGraph, cluster: Cluster, software_year: float | None) -> np.ndarray:
        place = features_of(graph, cluster, software_year or self.last_year) / _LENGTHS
        return np.asarray(np.sqrt(np.sum((self.places - place) ** 2, axis=1)))


def _kernel(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """k between the rows of two tables, [len(one), len(other)]."""
    squares = np.sum(one**2, axis=1)[:, None] + np.sum(other**2, axis=1) - 2 * one @ other.T
    return np.asarray(AMPLITUDE**2 * np.exp(-np.maximum(squares, 0.0) / 2))


@lru_cache(maxsize=64)
def _cholesky(runs: NearbyRuns) -> np.ndarray:
    return np.linalg.cholesky(_kernel(runs.places, runs.places) + np.diag(runs.noise**2))


@lru_cache(maxsize=64)
def _weights(runs: NearbyRuns) -> np.ndarray:
    """K^-1 r."""
    lower = _cholesky(runs)
    return np.asarray(np.linalg.solve(lower.T, np.linalg.solve(lower, runs.log_ratio)))


@lru_cache(maxsize=8)
def _factor(runs: NearbyRuns) -> np.ndarray:
    """F with F^T F = K^-1."""
    return np.asarray(np.linalg.inv(_cholesky(runs)))


def run_noise(places: np.ndarray, log_ratio: np.ndarray, noise: float) -> np.ndarray:
    """Noise of each run, larger where it disagrees with its neighbours: scatter as Student's t, by reweighting."""
    beyond = np.abs(log_ratio) - BELIEVED * AMPLITUDE
    own: np.ndarray = np.maximum(np.full(len(log_ratio), noise), beyond)
    covariance = _kernel(places / _LENGTHS, places / _LENGTHS)
    for _ in range(TAIL_ROUNDS):
        mean = covariance @ np.linalg.solve(covariance + np.diag(own**2), log_ratio)
        own = np.maximum(noise * np.sqrt((HEAVY_TAIL + ((log_ratio - mean) / noise) ** 2) / (HEAVY_TAIL + 1)), beyond)
    return own


def layout_places(graph: StepGraph) -> list[np.ndarray]:
    """The features in which the layouts of a grid differ, over `LENGTHS`; each has all axes of the grid, of length 1 where it is the same."""
    values = {name: getattr(graph.layout, name) for name in LAYOUT_FEATURES if name != "num_microbatches"}
    values["num_microbatches"] = graph.num_microbatches
    num_axes = max(np.ndim(value) for value in values.values())
    places = [
        (np.asarray(values[name], float) if name == "zero_stage" else _doublings(values[name])) / LENGTHS[name] for name in FEATURES if name in values
    ]
    return [place.reshape((1,) * (num_axes - place.ndim) + place.shape) for place in places]


def _terms(place: np.ndarray) -> list[np.ndarray]:
    """The terms along each axis of which an array is the sum."""
    origin = place[(0,) * place.ndim]
    along = [place[tuple(slice(None) if a == axis else 0 for a in range(place.ndim))] for axis in range(place.ndim)]
    return [along[0], *(each - origin for each in along[1:])]


def features_of(graph: StepGraph, cluster: Cluster, software_year: float) -> np.ndarray:
    """Where a plan stands among runs, [features] or [n, features]."""
    layout, device = graph.layout, cluster.accelerator
    model = graph.model
    rate = device.dense_flops_per_s.get(graph.precision.matmul_rate, 1.0)
    values = {
        "hidden_size": _doublings(model.hidden_size), "num_layers": _doublings(model.num_layers), "seq_len": _doublings(graph.seq_len),
        "tp": _doublings(layout.tp), "cp": _doublings(layout.cp), "pp": _doublings(layout.pp), "ep": _doublings(layout.ep),
        "dp": _doublings(layout.dp), "micro_batch_size": _doublings(layout.micro_batch_size),
        "num_microbatches": _doublings(graph.num_microbatches), "num_virtual_stages": _doublings(layout.num_virtual_stages),
        "zero_stage": np.asarray(layout.zero_stage, float), "recompute": _RECOMPUTE[graph.workload.recompute],
        "num_experts": _doublings(1 + (model.moe.num_experts if model.moe else 0)), "lora": float(graph.workload.job == "lora"),
        "matmul_flops_per_s": _doublings(rate), "memory_bytes_per_s": _doublings(device.memory_bandwidth_bytes_per_s),
        "scale_up_bytes_per_s": _doublings(cluster.scale_up.bandwidth_bytes_per_s),
        "scale_out_bytes_per_s": _doublings(cluster.scale_out.bandwidth_bytes_per_s if cluster.scale_out is not None else 1.0),
        "domain_size": _doublings(cluster.scale_up.domain_size), "software_year": software_year,
    }  # fmt: skip
    return np.stack(np.broadcast_arrays(*(np.asarray(values[name], float) for name in FEATURES)), axis=-1)


def _doublings(value: Array) -> Array:
    return np.log2(np.maximum(np.asarray(value, float), 1e-9))


@lru_cache(maxsize=1)
def _rows() -> list[dict[str, str]]:
    path = DATA_DIR / "measurements" / "evidence.csv.gz"
    return list(csv.DictReader(io.StringIO(read_text(path, 32 << 20)))) if path.is_file() else []


@lru_cache(maxsize=64)
def load_nearby(stack: str) -> NearbyRuns | None:
    """The shipped runs of a stack; None where there are none."""
    rows = [row for row in _rows() if row["stack"] == stack]
    return make_nearby(rows) if rows else None


def make_nearby(rows: Sequence[dict[str, Any]]) -> NearbyRuns:
    """Runs from rows of the table."""
    places = np.array([[float(row[name]) for name in FEATURES] for row in rows])
    known = tuple(
        KnownRun(
            row["id"], row["source"], row["model"], row["accelerator"], int(row["num_devices"]), float(row["measured_step_s"]),
            float(row["left_out_error_fraction"]), float(row["left_out_spread"]),
        )
        for row in rows
    )  # fmt: skip
    log_ratio, noise = (np.array([float(row[name]) for row in rows]) for name in ("log_ratio", "noise"))
    return NearbyRuns(known, places / _LENGTHS, log_ratio, noise, float(places[:, FEATURES.index("software_year")].max()))
