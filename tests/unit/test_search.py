"""The search over layouts, hardware and offers: true optima, limits kept, counts that add up, and its command."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from planner import build_request, estimate, load_plan
from planner.cli import app
from planner.errors import InputError
from planner.hardware_options import Hardware, list_sites
from planner.layout_space import layout_space
from planner.plan import Plan, Request
from planner.points import Limits
from planner.resolve import resolve
from planner.search import Wanted, search
from planner.units import DAY_S

SMALL = {"model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
         "intermediate_size": 2816, "vocab_size": 32000, "max_position_embeddings": 4096}  # fmt: skip
SPARSE = {**SMALL, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def request(**changes: Any) -> Request:
    cluster = {"accelerator": "h100-80gb-sxm", "num_devices": 8, **changes.pop("cluster", {})}
    workload = {"seq_len": 2048, "global_batch_size": 16, "tokens": 1e10, "recompute": "none", **changes.pop("workload", {})}
    return build_request({"model": SMALL, "workload": workload, "cluster": cluster, **changes})


def every_plan(asked: Request, recomputes: tuple[str, ...] = ("none",)) -> list[Plan]:
    """Every layout of the space, each by `estimate`."""
    found = []
    for recompute in recomputes:
        own = asked.model_copy(update={"workload": asked.workload.model_copy(update={"recompute": recompute})})
        grids = layout_space(resolve(own), asked.layout).grids
        layouts = [grid.layout(index) for grid in grids for index in np.flatnonzero(grid.legal).tolist()]
        found += [estimate({**own.model_dump(by_alias=True, exclude_none=True), "layout": layout.model_dump()}) for layout in layouts]
    return found


PLACES = [
    ("megatron-core", "h100-80gb-sxm"),
    ("torchtitan", "a100-80gb-sxm"),
    ("maxtext", "tpu-v4"),
    ("deepspeed", "l40s"),
    ("reftrain", "h100-80gb-sxm"),
]
CUTS = [(2, {}), (4, {"micro_batch_size": 1, "ep": 1}), (8, {"micro_batch_size": 2, "tp": 1, "zero_stage": 3, "ep": 1})]
SPACES = [
    {
        "model": model,
        "stack": stack,
        "cluster": {"num_devices": devices, "accelerator": accelerator},
        "layout": {"cp": 1, "dp_replicate": 1, "sequence_parallel": False, **layout},
    }
    for model, (stack, accelerator), (devices, layout) in product((SMALL, SPARSE), PLACES, CUTS)
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_the_true_optimum_to_the_last_digit(space: dict[str, Any]) -> None:
    """30 spaces, each enumerated by `estimate`."""
    asked = request(**space)
    plans = [plan for plan in every_plan(asked) if plan.fits]
    found = search(asked, wanted=Wanted(top=1))
    assert found.counts.fits == len(plans)
    assert found.plans[0].time.step_s.value == min(plan.time.step_s.value for plan in plans)
    again = estimate(found.plans[0].to_request())
    assert (again.time, again.memory, again.cost) == (found.plans[0].time, found.plans[0].memory, found.plans[0].cost)


def test_open_policies_are_searched_and_given_ones_kept() -> None:
    asked = request(cluster={"num_devices": 2}, layout={"cp": 1, "dp_replicate": 1})
    opened = asked.model_copy(
        update={"workload": type(asked.workload)(**{k: v for k, v in asked.workload.model_dump(exclude_unset=True).items() if k != "recompute"})}
    )
    best = min((plan for plan in every_plan(asked, ("none", "selective", "full")) if plan.fits), key=lambda plan: plan.time.step_s.value)
    found = search(opened, wanted=Wanted(top=1))
    assert found.plans[0].time.step_s.value == best.time.step_s.value
    only = search(asked, wanted=Wanted(top=3, recomputes=["full"]))
    assert {plan.inputs["workload"]["recompute"] for plan in only.plans} == {"full"}


def test_counts_add_up() -> None:
    found = search(request(model=SPARSE))
    counts = found.counts
    refused = sum(count for reason, count in found.rejects.items() if reason != "memory")
    assert counts.enumerated == counts.legal + refused
    assert counts.legal == counts.priced == counts.fits + found.rejects.get("memory", 0)


PRICED = Hardware(accelerators=["h100-80gb-sxm", "a100-80gb-sxm"], offers=["any"], device_counts=[8, 16, 32])


@pytest.fixture(scope="module")
def priced() -> Any:
    return search(request(workload={"tokens": 1e12}), PRICED, Wanted(objective="cost", top=4, pareto=True))


def test_the_cheapest_is_the_cheapest_of_each_size_and_offer(priced: Any) -> None:
    sites, _ = list_sites(request(), PRICED)
    every: list[tuple[float, float]] = []
    for site in sites:
        for rentals in site.rentals.values():
            asked = request(workload={"tokens": 1e12}).model_copy(update={"cluster": rentals[0].spec})
            fastest = search(asked, wanted=Wanted(top=1)).plans[0]
            for rental in rentals:
                plan = estimate({**fastest.inputs, "cluster": rental.spec.model_dump(by_alias=True, exclude_none=True)})
                assert plan.cost.usd is not None
                every.append((plan.cost.usd.value, plan.time.train_s.value))
    assert priced.plans[0].cost.usd.value == min(every)[0]
    front = [(point.cost.usd, point.cost.train_s) for point in priced.pareto]
    for usd, train_s in every:  # nothing beats the front, and all of the front is there
        assert any(a <= usd * (1 + 1e-12) and b <= train_s * (1 + 1e-12) for a, b in front)
    for mine, other in product(front, front):
        assert mine == other or not (other[0] <= mine[0] and other[1] <= mine[1])
    assert [point.cost.train_s for point in priced.pareto] == sorted(point.cost.train_s for point in priced.pareto)


@pytest.mark.parametrize("objective", ["time", "cost", "devices", "energy"])
def test_limits_are_kept_by_every_objective(priced: Any, objective: Any) -> None:
    usd, days = priced.plans[0].cost.usd.value * 2, priced.pareto[-1].cost.train_s / DAY_S * 0.9
    found = search(request(workload={"tokens": 1e12}), PRICED, Wanted(objective=objective, limits=Limits(usd, days, 32), top=4))
    assert found.plans
    for plan in found.plans:
        assert plan.cost.usd is not None
        assert plan.cost.usd.value <= usd
        assert plan.time.train_s.value <= days * DAY_S
        assert plan.inputs["cluster"]["num_devices"] <= 32
    keys = {"time": "train_s", "cost": "usd", "energy": "energy_kwh"}
    values = [
        plan.inputs["cluster"]["num_devices"] if objective == "devices" else getattr(plan.time if objective == "time" else plan.cost, keys[objective])
        for plan in found.plans
    ]
    values = [getattr(value, "value", value) for value in values]
    assert values == sorted(values)


def test_what_no_plan_keeps_is_answered_by_the_least_that_would(priced: Any) -> None:
    cheapest = priced.plans[0].cost.usd.value
    found = search(request(workload={"tokens": 1e12}), PRICED, Wanted(limits=Limits(usd=cheapest * 0.5)))
    assert not found.plans
    assert found.rejects["budget"] > 0
    assert found.remedies[0].plan.cost.usd is not None
    assert found.remedies[0].plan.cost.usd.value == cheapest


def test_what_nothing_holds_gets_changes_that_fit() -> None:
    found = search(request(model="llama-3.1-70b", workload={"global_batch_size": 512}, layout={"tp": 1, "pp": 1}))
    assert not found.plans
    assert found.remedies
    assert all(remedy.plan.fits for remedy in found.remedies)


@pytest.mark.parametrize(
    ("hardware", "wanted", "words"),
    [
        (Hardware(accelerators=["h1000"]), Wanted(), "h1000"),
        (Hardware(offers=["aws/nothing*"]), Wanted(), "--offer"),
        (Hardware(offers=["any"], providers=["acme"]), Wanted(), "--provider"),
        (Hardware(offers=["any"], regions=["moon-1"]), Wanted(), "--region"),
        (Hardware(), Wanted(objective="cost"), "needs prices"),
        (Hardware(), Wanted(pareto=True), "needs prices"),
        (Hardware(), Wanted(objective="speed"), "--objective"),  # type: ignore[arg-type]
        (Hardware(), Wanted(limits=Limits(num_devices=4)), "--max-devices"),
        (Hardware(), Wanted(limits=Limits(num_days=0)), "--max-days"),
    ],
)
def test_wrong_input_names_the_option(hardware: Hardware, wanted: Wanted, words: str) -> None:
    with pytest.raises(InputError, match=words.replace("*", r"\*")):
        search(request(), hardware, wanted)


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "plan.yaml"
    base = ["search", "--model", "llama-3.1-8b", "--tokens", "100B", "--global-batch-size", "64", "--accelerator", "h100,a100-80gb-sxm"]
    result = CliRunner().invoke(app, [*base, "--num-devices", "8..16", "--offer", "any", "--pareto", "--top", "2", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found) >= {"counts", "elapsed_s", "rejects", "results", "pareto"}
    assert set(found["counts"]) >= {"enumerated", "legal", "priced", "fits"}
    assert [row["rank"] for row in found["results"]] == [1, 2]
    assert {"rank", "layout", "time", "cost", "memory", "why"} <= set(found["results"][0])
    plan = estimate(load_plan(out))
    assert plan.time.step_s.value == found["results"][0]["time"]["step_s"]["value"]
    text = CliRunner().invoke(app, [*base, "--num-devices", "8", "--top", "1"])
    assert text.exit_code == 0
    assert "legal layouts priced" in text.stdout
    assert CliRunner().invoke(app, [*base, "--num-devices", "8", "--offer", "any", "--budget", "1"]).exit_code == 3
    for wrong in (["--num-devices", "16..8"], ["--num-devices", "8", "--top", "0"], ["--num-devices", "x"]):
        with pytest.raises(InputError):
            CliRunner().invoke(app, [*base, *wrong], standalone_mode=False, catch_exceptions=False)
