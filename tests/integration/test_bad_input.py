"""Wrong input of every kind: always exit status 2 and one message that names key, value, rule and fix; never a traceback."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from planner.cli import main
from planner.files import to_yaml

GOOD: dict[str, Any] = {
    "schema_version": 1,
    "model": {
        "model_type": "llama",
        "hidden_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 4096,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "workload": {
        "job": "pretrain",
        "seq_len": 2048,
        "global_batch_size": 256,
        "tokens": 1e10,
        "precision": "bf16",
        "optimizer": "adamw",
        "recompute": "none",
    },
    "cluster": {"accelerator": "h100-80gb-sxm", "num_devices": 16, "pricing": "on_demand"},
    "stack": "torchtitan",
    "layout": {
        "dp_replicate": 1,
        "dp_shard": 4,
        "tp": 2,
        "cp": 1,
        "pp": 2,
        "num_virtual_stages": 1,
        "schedule": "1f1b",
        "ep": 1,
        "zero_stage": 3,
        "sequence_parallel": True,
        "micro_batch_size": 4,
    },
}
SECTIONS = ("workload", "cluster", "layout")
PROBLEM = re.compile(r"^error: (?P<key>\S.*?) = (?P<value>.*)\n  rule \S.*\n  fix  \S.*$", re.MULTILINE)


def run(argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of `planner argv`."""
    monkeypatch.setattr(sys, "argv", ["planner", *argv])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr()
    code = stop.value.code
    assert isinstance(code, int)
    return code, printed.out, printed.err


def assert_refused(status: int, out: str, err: str, key: str | None = None) -> None:
    """Exit status 2, nothing but well-formed problems on standard error, no traceback."""
    assert status == 2, (status, out[-500:], err)
    assert "Traceback" not in err + out
    problems = list(PROBLEM.finditer(err))
    assert problems, err
    assert err.count("error: ") == len(problems), err
    if key is not None:
        assert any(key in found["key"] for found in problems), (key, err)


def changed(path: tuple[str, ...], value: Any, *, rename: str | None = None) -> dict[str, Any]:
    """GOOD with one value replaced, or one key renamed."""
    request = copy.deepcopy(GOOD)
    inner = request
    for name in path[:-1]:
        inner = inner[name]
    if rename is not None:
        inner[rename] = inner.pop(path[-1])
    else:
        inner[path[-1]] = value
    return request


def typos(word: str) -> Iterator[str]:
    """A letter lost, two swapped, one doubled."""
    middle = len(word) // 2
    yield word[:middle] + word[middle + 1 :]
    yield word[:middle] + word[middle + 1 : middle + 2] + word[middle] + word[middle + 2 :]
    yield word + word[-1]


def paths() -> Iterator[tuple[str, ...]]:
    for name in GOOD:
        yield (name,)
    for section in SECTIONS:
        for name in GOOD[section]:
            yield (section, name)


def cases() -> Iterator[tuple[str, dict[str, Any], str | None]]:
    """(label, wrong request, part of the key that must be named)."""
    for path in paths():
        for typo in dict.fromkeys(typos(path[-1])):
            if typo != path[-1] and typo not in GOOD and typo:
                yield f"typo {'.'.join(path)} as {typo}", changed(path, None, rename=typo), typo
        for value in ([1], {"a": 1}, True, "abc", 1.5, -1, -(10**400), math.nan, math.inf):
            if not (path[-1] == "sequence_parallel" and value is True) and not (path == ("workload", "tokens") and value == 1.5):
                if path[-1] in ("stack", "model") and value == {"a": 1}:
                    continue
                yield f"{'.'.join(path)} = {value!r}"[:60], changed(path, value), path[0]
    for section in SECTIONS:
        for value in (7, "text", [], [1, 2]):
            yield f"{section} = {value!r}", changed((section,), value), section
    for section, name in (p for p in paths() if len(p) == 2):
        if isinstance(GOOD[section][name], int) and not isinstance(GOOD[section][name], bool) and name != "zero_stage":
            for value in (0, 10**13, 2**63, "8", 1e308):
                yield f"{section}.{name} = {value!r}", changed((section, name), value), section
    layout_cases = {
        "tp": (3, 16, 5),
        "dp_shard": (3, 5, 8),
        "pp": (3, 4, 32),
        "cp": (3, 7),
        "ep": (2,),
        "micro_batch_size": (3, 7, 128),
        "zero_stage": (0, 4, 9),
        "dp_replicate": (2, 3),
    }
    for name, values in layout_cases.items():
        for layout_value in values:
            yield f"impossible layout.{name} = {layout_value}", changed(("layout", name), layout_value), "layout"
    for name in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
        request = copy.deepcopy(GOOD)
        del request["model"][name]
        yield f"model without {name}", request, name
    for name, value in (
        ("hidden_size", 1000),
        ("num_key_value_heads", 3),
        ("num_attention_heads", 7),
        ("model_type", "lama"),
        ("hidden_act", "tanhh"),
        ("tie_word_embeddings", "yes"),
        ("hidden_size", 10**12),
        ("num_hidden_layers", 0),
    ):
        yield f"model.{name} = {value!r}", changed(("model", name), value), "model"
    for name in ("accelerator", "num_devices"):
        request = copy.deepcopy(GOOD)
        del request["cluster"][name]
        yield f"cluster without {name}", request, name
    for path, value in (
        (("model",), "llama-3-8bb"),
        (("model",), "no/such/config.json"),
        (("model",), ""),
        (("stack",), "torchtian"),
        (("cluster", "accelerator"), "h100-smx"),
        (("cluster", "accelerator"), ""),
        (("schema_version",), 2),
        (("schema_version",), "1"),
        (("layout", "schedule"), "1f1bb"),
        (("workload", "precision"), "fp6"),
        (("workload", "precision"), "nvfp4"),
        (("workload", "seq_len"), 3),
        (("workload", "global_batch_size"), 255),
    ):
        yield f"{'.'.join(path)} = {value!r}", changed(path, value), None
    for name, value in (
        ("offer", "aws/p5.48xlargee"),
        ("offer", "aws/p4d.24xlarge"),
        ("price", 2.1),
        ("price", "2.1"),
        ("price", "-2 USD/h"),
        ("network", 400),
        ("network", "400"),
        ("domain_size", 0),
        ("node_size", -8),
        ("region", "mars"),
    ):
        yield f"cluster.{name} = {value!r}", changed(("cluster", name), value), "cluster"
    yield "lora rank without lora", changed(("workload", "lora_rank"), 8), "workload"


CASES = list(cases())


def test_there_are_at_least_300_of_them() -> None:
    assert len(CASES) + len(FILES) + len(COMMANDS) >= 300
    assert len({label for label, _, _ in CASES}) == len(CASES)


@pytest.mark.parametrize(("request_", "key"), [pytest.param(r, k, id=label) for label, r, k in CASES])
def test_wrong_request(
    request_: dict[str, Any], key: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(request_))
    assert_refused(*run(["estimate", str(path)], capsys, monkeypatch), key)


def test_the_good_request_is_good(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(to_yaml(GOOD))
    status, out, err = run(["estimate", str(path)], capsys, monkeypatch)
    assert (status, err) == (0, "")
    assert out.count("FITS") == 1


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES: dict[str, bytes] = {
    "alias bomb": BOMB.encode(),
    "one alias": b"model: &m gpt2\ncluster: {accelerator: *m, num_devices: 8}\n",
    "duplicate key": b"model: gpt2\nmodel: gpt2\ncluster: {accelerator: h100, num_devices: 8}\n",
    "duplicate inner key": b"model: gpt2\ncluster: {accelerator: h100, num_devices: 8, num_devices: 16}\n",
    "latin-1": "model: café\n".encode("latin-1"),
    "utf-16": "model: gpt2\n".encode("utf-16"),
    "utf-32": "model: gpt2\n".encode("utf-32"),
    "nul byte": b"model: gpt2\0\n",
    "binary": bytes(range(256)),
    "empty": b"",
    "only a comment": b"# nothing\n",
    "a list": b"- model\n- gpt2\n",
    "a number": b"42\n",
    "python tag": b"model: !!python/object/apply:os.system [echo]\n",
    "unknown tag": b"model: !secret x\n",
    "deep list": b"[" * 20000 + b"]" * 20000,
    "deep mapping": b"{a: " * 5000,
    "open quote": b'model: "gpt2\n',
    "tab indent": b"cluster:\n\taccelerator: h100\n",
    "two documents": b"model: gpt2\n---\nmodel: gpt2\n",
    "number as key": b"1: 2\n",
    "yaml infinity": b"model: gpt2\ncluster: {accelerator: h100, num_devices: .inf}\n",
    "huge integer": b"model: gpt2\ncluster: {accelerator: h100, num_devices: " + b"9" * 5000 + b"}\n",
    "too large": b"# " + b"x" * (5 << 20),
}


@pytest.mark.parametrize("name", list(FILES))
def test_wrong_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(FILES[name])
    for command in (["estimate", str(path)], ["estimate", str(path), "--json"], ["explain", str(path)]):
        assert_refused(*run(command, capsys, monkeypatch))


@pytest.mark.parametrize(
    "text", ["{", "[1", '{"a": NaN}', '{"a": 1, "a": 2}', '{"model": "gpt2", "cluster": 1e400}', "null", '"text"', "[" * 100_000]
)
def test_wrong_json(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    assert_refused(*run(["estimate", str(path)], capsys, monkeypatch))


ASK = "estimate --model gpt2 --accelerator h100 --num-devices 8"
COMMANDS = [
    *([word] for word in ("estimate", "estmate", "explain", "compare", "catalog", "validate", "--no-such-option")),
    *(["estimate", path] for path in ("/no/such/plan.yaml", "/", "", "a\0b")),
    *(
        text.split()
        for text in (
            "estimate --modle gpt2",
            "estimate --tokens",
            "estimate --model gpt2",
            "estimate --accelerator h100",
            "estimate --num-devices 8",
            "estimate --model gpt2 --accelerator h100 --num-devices eight",
            "estimate --model gpt2 --accelerator tpu-v4 --num-devices 8 --precision fp8",
            f"{ASK} --tokens 15X",
            f"{ASK} --tokens -1",
            f"{ASK} --tp 5",
            f"{ASK} --budget cheap",
            f"{ASK} --max-days nan",
            f"{ASK} --out /no/such/dir/p.yaml",
            f"{ASK} --out /",
            f"{ASK} --seq-len 4096",
            f"{ASK} --catalog /no/such.yaml",
            f"{ASK} --price free",
            f"{ASK} --network 400",
            f"{ASK} --sequence-parallel maybe",
            "explain /no/such.yaml",
            "compare a.yaml",
            "catalog acelerators",
            "catalog accelerators h100-smx",
            "catalog models gpt-2",
            "catalog models ../gpt2",
            "catalog offers aws/nothing",
            "catalog stacks megatron",
            "validate --measurements /no/such.csv",
        )
    ),
]


@pytest.mark.parametrize("argv", COMMANDS, ids=lambda argv: " ".join(argv)[:70].replace("\0", "NUL"))
def test_wrong_command_line(argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(*run(argv, capsys, monkeypatch))


def test_all_errors_at_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [
        "estimate",
        "--model",
        "gpt2",
        "--accelerator",
        "h100",
        "--num-devices",
        "-3",
        "--precision",
        "bf61",
        "--tokens",
        "x",
        "--schedule",
        "1f1bb",
        "--zero-stage",
        "7",
    ]
    status, _, err = run(argv, capsys, monkeypatch)
    assert status == 2
    assert {found["key"] for found in PROBLEM.finditer(err)} == {
        "cluster.num_devices",
        "workload.precision",
        "workload.tokens",
        "layout.schedule",
        "layout.zero_stage",
    }
    assert "did you mean bf16?" in err


def test_unknown_names_are_reported_together(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    status, _, err = run(
        ["estimate", "--model", "lama-3.1-8b", "--accelerator", "h10", "--num-devices", "8", "--stack", "nothing"], capsys, monkeypatch
    )
    assert status == 2
    assert {found["key"] for found in PROBLEM.finditer(err)} == {"model", "cluster.accelerator", "stack"}


def test_json_errors_are_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, _ = run(["estimate", "--model", "gpt2", "--accelerator", "h100", "--num-devices", "0", "--json"], capsys, monkeypatch)
    assert status == 2
    assert json.loads(out)["error"][0]["key"] == "cluster.num_devices"


def test_a_real_process_says_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "planner", "estimate", "--model", "gpt2", "--accelerator", "h1000", "--num-devices", "8"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert_refused(done.returncode, done.stdout, done.stderr, "cluster.accelerator")


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400, "8", "1e9", "inf", "\u202e", "../x", "a\0b", "${x}"]),
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=5)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(path=("workload",), value={"\n": None})
@given(path=st.sampled_from([*paths(), *(("model", name) for name in GOOD["model"])]), value=VALUES)
def test_any_value_anywhere_is_answered_or_refused(
    path: tuple[str, ...], value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stands in a plan: a result (0, 3) or a refusal (2), never a fault of ours (1)."""
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(changed(path, value)))
    status, out, err = run(["estimate", str(file)], capsys, monkeypatch)
    if status == 2:
        assert_refused(status, out, err)
    else:
        assert status in (0, 3), (status, err)
