"""`reftrain demo`: the whole loop, and what stands in its way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from planner.errors import InputError, PlannerError
from planner.files import HOME_VARIABLE
from reftrain import demo as module
from reftrain.compare import compare_run
from reftrain.demo import JUDGE, SIZES, demo

ROOT = Path(__file__).resolve().parents[2]


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="holds something already"):
        demo(tmp_path, print)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_command_that_fails_ends_the_demo_with_its_name_shown(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(module, "NAME", "no/name")  # refused by bench-device
    with pytest.raises(PlannerError, match="ended with status 2"):
        demo(tmp_path / "out", said.append)
    assert said[-1] == "   $ python -m reftrain bench-device --quick --name no/name"


@pytest.mark.slow
def test_the_whole_loop(tmp_path):
    """Real processes from a bare folder to the page; its figures are those of the files that it left."""
    out = tmp_path / "out"
    env = {**os.environ, HOME_VARIABLE: str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-m", "reftrain", "demo", "--out", str(out)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert not (tmp_path / "home").exists(), "this machine's own measurements are not touched"
    found = json.loads((out / "demo.json").read_text())
    judged = next(metric for metric in compare_run(out / "runs" / JUDGE).metrics if metric.name == "step time")
    assert found["error_fraction_before"] == judged.error_fraction
    again = subprocess.run(
        [sys.executable, "-m", "planner", "estimate", f"plans/{JUDGE}.request.yaml", "--stack", "calibrated.yaml", "--json"],
        env={**env, HOME_VARIABLE: str(out / "machine"), "PYTHONPATH": str(ROOT)}, cwd=out, capture_output=True, text=True, check=True,
    )  # fmt: skip
    predicted_s = json.loads(again.stdout)["time"]["step_s"]["value"]
    assert found["error_fraction_after"] == pytest.approx(predicted_s / judged.measured - 1)
    page = (out / "demo.html").read_text()
    assert page.count("<svg") == len(SIZES)
    assert all(f"runs/{name}" in page for name in SIZES)
    flops = [m for name in SIZES for m in compare_run(out / "runs" / name).metrics if m.name == "FLOPs per step"]
    assert len(flops) == len(SIZES)
    assert all(metric.is_inside(None) for metric in flops)
