"""A step's memory over time: its peak is the plan's, its parts add up, and its picture is one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from planner.estimate import estimate
from planner.files import to_yaml
from planner.memory import INSTANTS
from planner.peaks import memory_timeline
from planner.plan import Request, build_request
from planner.report.memory_svg import draw_memory
from planner.report.memory_text import render_memory

LAYOUTS: list[dict[str, Any]] = [
    {"dp_shard": 16, "zero_stage": 3},
    {"dp_shard": 2, "tp": 2, "pp": 4, "zero_stage": 2, "sequence_parallel": True},
    {"pp": 8, "dp_replicate": 2, "schedule": "zb_h1"},
    {"pp": 4, "tp": 4, "num_virtual_stages": 2, "schedule": "interleaved_1f1b"},
]
SVG = "{http://www.w3.org/2000/svg}"


def request(layout: dict[str, Any], stack: str = "reftrain", recompute: str = "none") -> Request:
    workload = {"seq_len": 2048, "global_batch_size": 64, "tokens": 1e9, "precision": "bf16", "recompute": recompute}
    cluster = {"accelerator": "h100-80gb-sxm", "num_devices": 16}
    plan = {"schema_version": 1, "model": "llama-3.2-3b", "workload": workload, "cluster": cluster, "stack": stack}
    return build_request(plan | {"layout": {"micro_batch_size": 1, **layout}})


@pytest.mark.parametrize("stack", ["reftrain", "megatron-core"])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_peak_is_the_plan_s(layout: dict[str, Any], recompute: str, stack: str) -> None:
    wanted = request(layout, stack, recompute)
    plan, timeline = estimate(wanted), memory_timeline(wanted)
    for stage, planned in zip(timeline.stages, plan.memory.stages, strict=True):
        assert stage.peak.total_bytes == pytest.approx(planned.total_bytes, rel=1e-12)
        assert stage.peak.breakdown_bytes == pytest.approx({name: value for name, value in planned.breakdown_bytes.items() if value}, rel=1e-9)
        for instant in stage.instants:
            assert sum(num_bytes for _, _, num_bytes in instant.tensors) == pytest.approx(instant.total_bytes, rel=1e-12)
            assert instant.name in INSTANTS


def test_stages_have_the_instants_that_they_come_to() -> None:
    first, *middle, last = memory_timeline(request(LAYOUTS[1])).stages
    names = [{instant.name for instant in stage.instants} for stage in (first, middle[0], last)]
    assert ["loss" in each for each in names] == [False, False, True]
    assert ["embedding" in each for each in names] == [True, False, False]
    assert all("update" in each and "blocks" in each for each in names)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_picture_shows_every_instant_to_scale(layout: dict[str, Any]) -> None:
    timeline = memory_timeline(request(layout))
    widths: dict[str, float] = {}
    for bar in ElementTree.fromstring(draw_memory(timeline)).iter(f"{SVG}rect"):
        if bar.find(f"{SVG}title") is not None:
            widths[bar.attrib["y"]] = widths.get(bar.attrib["y"], 0.0) + float(bar.attrib["width"])
    totals = [instant.total_bytes for stage in timeline.stages for instant in stage.instants]
    drawn = [width / max(widths.values()) for width in widths.values()]
    assert len(drawn) >= len(timeline.stages[0].instants)
    assert all(min(abs(width - total / max(totals)) for total in totals) < 1e-3 for width in drawn)
    assert all(min(abs(width - total / max(totals)) for width in drawn) < 1e-3 for total in totals)


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_text_tells_the_peak_and_every_tensor_of_weight(width: int) -> None:
    timeline = memory_timeline(request(LAYOUTS[3]))
    lines = render_memory(timeline, width=width).splitlines()
    assert sum("<- peak" in line for line in lines) == 1
    shares = [float(line.split()[-1].rstrip("%")) for line in lines if line.endswith("%")]
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(shares))


def test_the_command(tmp_path: Path) -> None:
    plan, picture = tmp_path / "plan.yaml", tmp_path / "memory.svg"
    plan.write_text(to_yaml(estimate(request(LAYOUTS[1])).inputs))

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "planner", "memory", str(plan), *args], capture_output=True, text=True, check=False)

    done = run("--svg", str(picture), "--json")
    assert [stage["stage"] for stage in json.loads(done.stdout)["stages"]] == [0, 1, 2, 3]
    assert picture.read_text().startswith("<svg")
    wrong = run("--stage", "4")
    assert (wrong.returncode, "must be 0 to 3" in wrong.stderr) == (2, True)
