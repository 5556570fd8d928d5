"""Input records: strict, all mistakes at once, nearest names; registries."""

from __future__ import annotations

from typing import Literal

import pytest

from planner.errors import InputError, Problem, nearest, shorten
from planner.registry import Registry, unknown_name
from planner.spec import Bytes, Count, PositiveInt, Spec, build


class Inner(Spec):
    size: PositiveInt


class Sample(Spec):
    name: str
    memory_bytes: Bytes
    tokens: Count = 1.0
    mode: Literal["fast", "slow"] = "fast"
    inner: Inner | None = None


GOOD = {"name": "x", "memory_bytes": "80 GB"}


def problems(values: object) -> list[Problem]:
    with pytest.raises(InputError) as caught:
        build(Sample, values, "sample", "f.yaml")
    return list(caught.value.problems)


def test_all_mistakes_at_once_with_key_value_rule_fix_and_place() -> None:
    found = problems({"name": 3, "memory_bytes": 80, "tokens": -1, "mode": "fsat", "inner": {"size": 0}, "nmae": 1})
    assert {p.key for p in found} == {"sample.name", "sample.memory_bytes", "sample.tokens", "sample.mode", "sample.inner.size", "sample.nmae"}
    assert all(p.rule and p.fix and p.where == "f.yaml" for p in found)
    by_key = {p.key: p for p in found}
    assert "did you mean name" in by_key["sample.nmae"].fix
    assert "did you mean fast" in by_key["sample.mode"].fix


@pytest.mark.parametrize("size", [True, "8", 1.5, float("nan"), float("inf"), -1, 0, 10**400, 2**63, None, []])
def test_a_size_is_a_positive_whole_number(size: object) -> None:
    assert problems({**GOOD, "inner": {"size": size}})[0].key == "sample.inner.size"


def test_whole_floats_count_as_whole_numbers() -> None:
    assert build(Sample, {**GOOD, "inner": {"size": 4e3}}, "s").inner == Inner(size=4000)


@pytest.mark.parametrize("values", [None, [], "text", 3])
def test_not_a_mapping(values: object) -> None:
    assert "mapping" in problems(values)[0].rule


def test_records_are_frozen() -> None:
    sample = build(Sample, GOOD, "s")
    with pytest.raises(Exception, match="frozen"):
        sample.name = "y"  # type: ignore[misc]


def test_missing_keys_are_named() -> None:
    assert {p.key for p in problems({})} == {"sample.name", "sample.memory_bytes"}


def test_nearest_ignores_case_and_hostile_names() -> None:
    assert nearest("H100-SMX", ["h100-sxm", "tpu-v4"]) == ("h100-sxm",)
    assert nearest("x" * 10_000, ["h100"]) == ()
    assert nearest(None, ["h100"]) == ()


def test_values_are_shown_on_one_short_line() -> None:
    class Rude:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    assert len(shorten("x" * 1000)) <= 80
    assert "\n" not in shorten("a\nb\x1b[31m")
    assert "\x1b" not in shorten("\x1b[31m")
    assert "RuntimeError" in shorten(Rude())


def test_a_problem_keeps_its_first_place_and_gains_prefixes() -> None:
    problem = Problem("tp", 3, "rule", "fix").at("a.yaml:1").at("b.yaml").under("layout")
    assert (problem.where, problem.key) == ("a.yaml:1", "layout.tp")


def test_registry_refuses_duplicates_and_names_the_nearest() -> None:
    registry: Registry[int] = Registry("layout.schedule")
    registry.register("1f1b")(1)
    with pytest.raises(ValueError, match="twice"):
        registry.register("1f1b")(2)
    with pytest.raises(InputError, match="did you mean 1f1b"):
        registry["1f1bb"]
    assert ("1f1b" in registry, list(registry), registry.items()) == (True, ["1f1b"], [("1f1b", 1)])


def test_unknown_names_list_the_known_ones_when_none_is_near() -> None:
    assert "use one of: a, b" in str(unknown_name("k", "zzz", ["b", "a"]))
