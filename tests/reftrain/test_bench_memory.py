"""The memory benchmark: its layouts are drawn the same each time and can run, its table names every part, and it sees what is wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from planner.memory import MemoryBreakdown
from reftrain.dry_run_report import LABELS

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_memory

    yield bench_memory
    for name in ("bench_memory", "memory_cases"):
        sys.modules.pop(name, None)


def test_a_larger_count_only_adds_and_another_seed_draws_others(bench: Any) -> None:
    ten = [case.key for case in bench.generate(1, 10)]
    assert [case.key for case in bench.generate(1, 14)][:10] == ten
    assert len(set(ten)) == 10
    assert not set(ten) & {case.key for case in bench.generate(2, 10)}


def test_every_part_and_category_has_one_place(bench: Any) -> None:
    ours = [part for _, parts, _ in bench.GROUPS for part in parts]
    theirs = [category for _, _, categories in bench.GROUPS for category in categories]
    assert sorted(theirs) == sorted(LABELS)
    assert sorted(ours) == sorted(set(MemoryBreakdown.PARTS) - {"context", "allocator_slack"})


def test_a_case_is_run_once_and_judged_by_what_the_dry_run_found(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = min(bench.generate(bench.TUNE_SEED, 40), key=lambda case: case.num_block_passes)
    cache = tmp_path / "cache.jsonl"
    bench.fill([case], cache, "tune", 60.0)
    bench.fill([case], cache, "tune", 60.0)
    (row,) = bench._read(cache)
    found = bench.judge(row)
    assert found["dry_run_bytes"] == max(stage["peak_bytes"] for stage in row["stages"])
    stage = found["stages"][0]
    assert sum(stage["dry_run"].values()) == stage["dry_run_bytes"]
    assert sum(stage["differences"].values()) == pytest.approx(stage["error_fraction"])
    for stage in row["stages"]:
        stage["peak_bytes"] *= 2
    assert bench.judge(row)["error_fraction"] == pytest.approx((1 + found["error_fraction"]) / 2 - 1)


def test_a_case_that_takes_too_long_loses_layers_and_says_so(bench: Any, tmp_path: Path) -> None:
    case = next(case for case in bench.generate(bench.TUNE_SEED, 40) if case.plan["layout"]["pp"] == 1 and case.num_layers >= 8 and not case.note)
    shallow = case.with_layers(case.num_layers // 2)
    assert shallow.num_layers == case.num_layers // 2
    assert shallow.note == f"{case.num_layers // 2} layers of {case.num_layers}"
    assert shallow.key != case.key
    row = bench._run(case, 0.05)
    assert not row["stages"]
    assert "takes more than" in row["error"]
    assert row["key"] == case.key
