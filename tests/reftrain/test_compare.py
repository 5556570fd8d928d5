"""`reftrain compare` on a real run: the table, the JSON and the page say what the run's files say; what cannot be compared is told in a line."""

import html.parser
import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from matplotlib.figure import Figure

from planner import estimate, load_plan
from planner.cli import run_app
from planner.errors import InputError
from planner.files import read_yaml, to_yaml
from reftrain.cli import app
from reftrain.compare import Metric, compare_run
from reftrain.compare_report import _plot_loss, _plot_phases, _plot_steps
from reftrain.config import load_run_config
from reftrain.data import TokenWriter
from reftrain.measure import read_metrics
from reftrain.train import RunOptions, train
from tests.reftrain import fault_campaigns as campaigns

LAW = "chinchilla-epoch"


def write_plan(folder, steps):
    """A plan with its prediction, for a text with a held-out part of 4 bytes a token."""
    path = campaigns.write_plan(folder, "request", steps=steps, every=100)
    with TokenWriter(folder / "text" / "valid", vocab_size=256, end_of_text_id=0, tokenizer_sha256="0" * 64) as writer:
        writer.add([1, 8, 43] * 100, 1200)
    values = json.loads(path.read_text())
    values["stack"] = "reftrain"
    path.write_text(json.dumps(values))
    estimate(load_plan(path)).save(folder / "plan.yaml")
    return folder / "plan.yaml"


def run(plan, out, progress=lambda record: None):
    torch.set_num_threads(1)
    return train(load_run_config(plan), RunOptions(out), progress).values


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of 12 steps; its plan is for an H100, so that no time is as predicted."""
    folder = tmp_path_factory.mktemp("compare")
    run(write_plan(folder, 12), folder / "run")
    return folder / "run"


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def compare(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["reftrain", "compare", *map(str, arguments)])
        status = run_app(app, "reftrain")
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def predict_as_measured(folder, spread=0.2):
    """Rewrites the plan's prediction of time and memory so that what was measured is its middle."""
    summary, plan = json.loads((folder / "summary.json").read_text()), read_yaml(folder / "plan.yaml")
    measured = {"time": ("step_s", summary["step_s"]["median"]), "memory": ("peak_bytes", summary["peak_bytes"])}
    for section, (key, value) in measured.items():
        plan["prediction"][section][key] = {"value": value, "low": value * (1 - spread), "high": value * (1 + spread)}
    (folder / "plan.yaml").write_text(to_yaml(plan))


def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def by_name(found):
    return {metric["name"]: metric for metric in found["metrics"]}


def test_the_numbers_are_those_of_the_run_s_files(finished, compare):
    status, out, err = compare(finished, "--json")
    found, plan = json.loads(out), read_yaml(finished / "plan.yaml")["prediction"]
    metrics = by_name(found)
    assert (status, err, found["is_within"]) == (5, "", False)
    records = read_metrics(finished / "metrics.jsonl")
    step_s = statistics.median(r["step_s"] for r in records if r.get("timed"))
    assert metrics["step time"]["measured"] == step_s
    assert metrics["tokens/s"]["measured"] == pytest.approx(campaigns.BATCH * campaigns.SEQ_LEN / step_s)
    assert metrics["step time"]["error_fraction"] == pytest.approx(plan["time"]["step_s"]["value"] / step_s - 1)
    assert not metrics["step time"]["is_inside"]
    assert metrics["peak memory"]["predicted"] == plan["memory"]["peak_bytes"]["value"]
    flops = metrics["FLOPs per step"]
    assert abs(flops["error_fraction"]) < 0.005, "counted by torch, predicted from the list of ops"
    assert flops["is_inside"]
    held_out = next(r for r in records if r["kind"] == "eval")
    assert metrics["held-out loss"]["measured"] == held_out["loss"]
    assert metrics["held-out bits per byte"]["measured"] == pytest.approx(held_out["loss"] / math.log(2) * 302 / 1200), (
        "300 tokens and two ends of text"
    )


def test_inside_is_0_outside_is_5_and_the_tolerance_decides(copy, compare):
    assert compare(copy)[0] == 5
    predict_as_measured(copy)
    assert compare(copy)[0] == 0
    assert compare(copy, "--tolerance", "0.01")[0] == 0
    plan = read_yaml(copy / "plan.yaml")
    plan["prediction"]["time"]["step_s"]["value"] *= 1.1  # still inside the interval
    (copy / "plan.yaml").write_text(to_yaml(plan))
    assert compare(copy)[0] == 0
    # Tokens per second are then predicted 1 - 1/1.1 too low, the step time 10% too high.
    for tolerance, status in (("0.0999", 5), ("0.1001", 0)):
        assert compare(copy, "--tolerance", tolerance)[0] == status
    status, _, err = compare(copy, "--tolerance", "-1")
    assert (status, "tolerance" in err) == (2, True)


def test_flops_are_held_to_half_a_percent_whatever_the_tolerance(copy, compare):
    predict_as_measured(copy)
    summary = json.loads((copy / "summary.json").read_text())
    edit(copy / "summary.json", flops_per_step=summary["flops_per_step"] * 1.02)
    assert compare(copy, "--tolerance", "0.5")[0] == 5


def test_the_table_shows_every_metric_and_ends_with_the_verdict(finished, compare):
    status, text, err = compare(finished)
    assert (status, err) == (5, "")
    lines = text.splitlines()
    starts = ["step time", "tokens/s", "peak memory", "FLOPs per step", "held-out loss", "held-out bits per byte", "forward", "optimizer", "data"]
    assert [next(i for i, line in enumerate(lines) if line.startswith(start)) for start in starts] == sorted(
        next(i for i, line in enumerate(lines) if line.startswith(start)) for start in starts
    )
    assert lines[-1] == "outside the interval"
    assert compare(finished, "--tolerance", "0.1")[1].endswith("outside 10%\n")


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def assert_self_contained(text):
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "img", "base"} & set(page.tags)
    loaded = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "data", "action", "srcset")]
    assert all(value.startswith("#") for value in loaded), loaded
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", text)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    return page


def test_the_page_is_one_file_with_tables_and_plots(finished, compare, tmp_path):
    status, text, _ = compare(finished, "--html", tmp_path / "page.html")
    assert status == 5
    source = (tmp_path / "page.html").read_text()
    page = assert_self_contained(source)
    assert page.tags.count("table") == 2
    plots = re.findall(r"<svg.*?</svg>", source, re.DOTALL)
    assert len(plots) == 1
    assert set(re.findall(r"https?://[^\"<\s]+", source)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, "names, not places"
    tree = ElementTree.fromstring(plots[0])
    assert len([e for e in tree.iter() if re.fullmatch(r"axes_\d+", e.get("id", ""))]) == 3
    # Every number of the terminal's table stands in the page's.
    cells = [cell.strip() for line in text.splitlines() if line.startswith(("step time", "peak memory")) for cell in re.split(r" {2,}", line)]
    assert set(cells) <= {" ".join(part.split()) for part in page.text}


def test_the_plots_hold_the_run_s_own_points(finished):
    found, records = compare_run(finished), read_metrics(finished / "metrics.jsonl")
    steps = [r for r in records if r["kind"] == "step"]
    loss, times, phases = Figure().subplots(1, 3)
    _plot_loss(loss, found)
    _plot_steps(times, found)
    _plot_phases(phases, found)
    assert loss.lines[0].get_xydata().tolist() == [[r["step"], r["loss"]] for r in steps]
    assert times.lines[0].get_ydata() == pytest.approx([1e3 * r["step_s"] for r in steps if r["timed"]])
    predicted = read_yaml(finished / "plan.yaml")["prediction"]["time"]["step_s"]["value"]
    assert times.lines[1].get_ydata() == pytest.approx([1e3 * predicted] * 2)
    summary = json.loads((finished / "summary.json").read_text())
    names = [label.get_text() for label in phases.get_yticklabels()]
    measured = dict(zip(names, [bar.get_width() for bar in phases.containers[1]], strict=True))
    assert all(measured[name] == pytest.approx(1e3 * summary["breakdown_s"][name]) for name in ("forward", "backward", "optimizer"))


def test_hostile_names_are_only_text(finished, tmp_path, compare):
    name = "<img src=x onerror=alert(1)>&'\"$x^2$"
    folder = shutil.copytree(finished, tmp_path / name)
    edit(folder / "summary.json", device="</td><script>alert(2)</script>$\\frac")
    status, _, err = compare(folder, "--html", tmp_path / "page.html")
    assert (status, err) == (5, "")
    page = assert_self_contained((tmp_path / "page.html").read_text())
    assert any(name in text for text in page.text)
    assert any("</td><script>alert(2)" in text for text in page.text)


def test_a_page_that_cannot_be_written(finished, tmp_path, compare):
    status, out, err = compare(finished, "--html", tmp_path / "nowhere" / "page.html")
    assert (status, out) == (2, "")
    assert "must be a file that can be written" in err


def test_a_run_that_was_stopped_is_compared_and_says_so(tmp_path, compare):
    def stop(record):
        if record["kind"] == "step" and record["step"] == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    plan = write_plan(tmp_path, 1000)
    assert run(plan, tmp_path / "run", stop)["is_complete"] is False
    status, out, _ = compare(tmp_path / "run", "--json")
    found = json.loads(out)
    assert status == 5
    assert found["notes"][0] == "the run was stopped before its end"
    assert "training loss" in by_name(found), "it never got to its held-out text"


def test_a_run_too_short_to_be_timed(tmp_path, compare):
    plan = write_plan(tmp_path, 2)
    run(plan, tmp_path / "two")
    found = json.loads(compare(tmp_path / "two", "--json")[1])
    assert {"peak memory", "FLOPs per step"} < set(by_name(found))
    assert "step time" not in by_name(found)
    assert found["notes"][0].startswith("too few steps to time")
    shutil.copytree(tmp_path / "two", tmp_path / "none")
    edit(tmp_path / "none" / "summary.json", peak_bytes=None, flops_per_step=None)
    with pytest.raises(InputError, match="measured nothing"):
        compare_run(tmp_path / "none")


def spoil_prediction(folder, *path, value=None):
    """Replaces one key of the plan's prediction, or takes it out."""
    plan = read_yaml(folder / "plan.yaml")
    part = plan["prediction"]
    for key in path[:-1]:
        part = part[key]
    if value is None:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    (folder / "plan.yaml").write_text(to_yaml(plan))


@pytest.mark.parametrize(
    ("spoil", "key", "rule"),
    [
        (lambda run: shutil.rmtree(run), "RUN_DIR", "must be a folder that `reftrain run` wrote"),
        (lambda run: (run / "summary.json").unlink(), "RUN_DIR", "the run is not over"),
        (lambda run: (run / "metrics.jsonl").unlink(), "RUN_DIR", "holds no metrics.jsonl"),
        (lambda run: (run / "summary.json").write_text('{"schema_version": 1, "da'), "summary", "must be valid JSON"),
        (lambda run: (run / "summary.json").write_text(""), "summary", "must be valid JSON"),
        (lambda run: (run / "summary.json").write_bytes(b"\xff\x00"), "summary", "must be UTF-8"),
        (lambda run: (run / "summary.json").write_text("3"), "summary", "must be a mapping"),
        (lambda run: (run / "summary.json").write_text('{"device": "x", "is_complete": true}'), "summary.tokens_per_step", "is required"),
        (lambda run: edit(run / "summary.json", step_s={"median": "soon"}), "summary.step_s.median", "valid number"),
        (lambda run: edit(run / "summary.json", step_s={"median": -1.0}), "summary.step_s.median", "greater than 0"),
        (lambda run: edit(run / "summary.json", tokens_per_step=0), "summary.tokens_per_step", "greater than or equal to 1"),
        (lambda run: edit(run / "summary.json", eval={"loss": "nan"}), "summary.eval.loss", "valid number"),
        (lambda run: (run / "plan.yaml").write_text("a: [\n"), "yaml", ""),
        (lambda run: (run / "plan.yaml").write_text("[]\n"), "plan", "must be a mapping"),
        (lambda run: spoil_prediction(run, "time", "step_s"), "prediction.time.step_s", "is required"),
        (lambda run: spoil_prediction(run, "time", "breakdown_s", "fsdp"), "prediction.time.breakdown_s.fsdp", "is required"),
        (lambda run: spoil_prediction(run, "memory", value=[1]), "prediction.memory", "dictionary"),
    ],
)
def test_what_is_damaged_is_named_once(copy, compare, spoil, key, rule):
    spoil(copy)
    status, out, err = compare(copy)
    assert (status, out) == (2, "")
    assert err.count("error:") == 1
    assert f"error: {key} = " in err
    assert rule in err
    assert "fault of ours" not in err


def test_a_plan_that_nobody_priced_is_told_how_to_get_a_prediction(copy, compare):
    plan = read_yaml(copy / "plan.yaml")
    del plan["prediction"]
    (copy / "plan.yaml").write_text(to_yaml(plan))
    status, _, err = compare(copy)
    assert status == 2
    assert "planner estimate PLAN.yaml --out PLAN.yaml" in err


def test_several_damages_are_told_together(copy, compare):
    edit(copy / "summary.json", step_s={"median": 0}, peak_bytes=-1)
    assert compare(copy)[2].count("error:") == 2


def test_a_loss_law_outside_its_range_predicts_nothing_and_decides_nothing(copy, compare):
    predict_as_measured(copy)
    status, out, _ = compare(copy, "--json")
    found = json.loads(out)
    loss = by_name(found)["held-out loss"]
    assert (status, loss["predicted"], loss["error_fraction"], loss["is_inside"], loss["gates"]) == (0, None, None, None, False)
    assert "perplexity" not in by_name(found)
    notes = [note for note in found["notes"] if LAW in note]
    assert [re.match(r"loss: (\w+) = .* lies outside the ", note).group(1) for note in notes] == ["parameters", "tokens"]
    text = compare(copy)[1]
    assert re.search(r"held-out loss +outside the law's range +\S+ nats/token +not judged", text)
    assert compare(copy, "--tolerance", "0.01")[0] == 0


def test_a_loss_law_inside_its_range_is_compared_and_decides_nothing(copy, compare):
    """The words of a real plan of a size that the law knows, put into this run."""
    predict_as_measured(copy)
    known = estimate({"model": "gpt2", "workload": {"tokens": 1e10}, "cluster": {"accelerator": "h100", "num_devices": 8}})
    assert not [text for text in known.assumptions if LAW in text]
    plan = read_yaml(copy / "plan.yaml")
    prediction = read_prediction_of(known)
    plan["prediction"] |= {"loss": prediction["loss"], "assumptions": prediction["assumptions"]}
    (copy / "plan.yaml").write_text(to_yaml(plan))
    status, out, _ = compare(copy, "--json")
    found = by_name(json.loads(out))
    measured = found["held-out loss"]["measured"]
    assert status == 0, "far outside, and no gate"
    assert found["held-out loss"]["error_fraction"] == pytest.approx(known.loss.nats_per_token.value / measured - 1)
    assert found["perplexity"]["measured"] == pytest.approx(math.exp(measured))
    assert not found["held-out loss"]["is_inside"]
    assert not found["held-out loss"]["gates"]


def read_prediction_of(plan):
    return json.loads(json.dumps({"loss": plan.to_dict()["loss"], "assumptions": list(plan.assumptions)}))


@pytest.mark.parametrize(
    ("metric", "tolerance", "expected"),
    [
        (Metric("t", "s", 1.0, 1.2, 0.8, 1.25), None, True),
        (Metric("t", "s", 1.0, 1.3, 0.8, 1.25), None, False),
        (Metric("t", "s", 1.0, 0.8, 0.8, 1.25), None, True),
        (Metric("t", "s", 1.0, 1.2, 0.8, 1.25), 0.1, False),
        (Metric("f", "FLOP", 1.0, 1.004), None, True),
        (Metric("f", "FLOP", 1.0, 1.006), 0.5, False),
        (Metric("l", "", None, 1.0), 0.1, None),
        (Metric("z", "s", 1.0, 0.0), None, None),
    ],
)
def test_inside(metric, tolerance, expected):
    assert metric.is_inside(tolerance) is expected
