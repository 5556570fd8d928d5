"""Strict YAML and JSON, and files that are never half written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import InputError
from planner.files import parse_json, parse_yaml, read_text, to_json, to_yaml, write_text

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(min_size=1, max_size=10), inner, max_size=4),
    max_leaves=20,
)


def printable(value: Any) -> bool:
    """YAML has no way to write some control characters and lone surrogates; everything else must survive."""
    if isinstance(value, str):
        return all(c.isprintable() or c in "\n\t" for c in value)
    if isinstance(value, list):
        return all(map(printable, value))
    return all(printable(k) and printable(v) for k, v in value.items()) if isinstance(value, dict) else True


@settings(max_examples=300, deadline=None)
@given(PLAIN.filter(printable))
def test_yaml_round_trip_is_identity(value: Any) -> None:
    assert parse_yaml(to_yaml(value)) == value


@given(PLAIN)
def test_json_round_trip_is_identity(value: Any) -> None:
    assert parse_json(to_json(value)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("15e12", 15e12),
        ("1e9", 1e9),
        ("-.5", -0.5),
        ("1_000", 1000),
        ("on", "on"),
        ("no", "no"),
        ("1:30", "1:30"),
        ("0x10", "0x10"),
        ("017", 17),
        ("~", None),
        ("true", True),
        ("True", "True"),
        ("'8'", "8"),
        ("80 GB", "80 GB"),
        ("2026-11-23", "2026-11-23"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    assert parse_yaml(f"a: {text}") == {"a": value}


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a: &x 1\nb: *x", "aliases"),
        ("a: 1\na: 2", "twice"),
        ("x: {a: 1, a: 2}", "twice"),
        ("[" * 33 + "]" * 33, "deeper than 32"),
        ("1: 2", "must be text"),
        ("a: !!python/name:os.system", "tag"),
        ("a: !!timestamp soon", "tag"),
        ("a: !!bool maybe", "tag"),
        ("!!map [a]", "tag"),
        ("a: !!str 5", "tag"),
        ("a: ! 5", "tag"),
        ("a: b: c", "not allowed"),
        ("a: [", "node content"),
    ],
)
def test_what_yaml_may_not_hold(text: str, rule: str) -> None:
    with pytest.raises(InputError, match=rule) as caught:
        parse_yaml(text, "plan.yaml")
    assert caught.value.problems[0].where.startswith("plan.yaml:")


def test_an_alias_bomb_is_refused_before_it_grows() -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklmnopqrstuvwx", "bcdefghijklmnopqrstuvwxy", strict=True)
    )
    with pytest.raises(InputError, match="aliases"):
        parse_yaml(bomb)


@pytest.mark.parametrize("text", ["NaN", '{"a": Infinity}', '{"a": 1e400}', "-1e999", '{"a": 1, "a": 2}', "{", "[" * 100_000, "1" * 5000, ""])
def test_what_json_may_not_hold(text: str) -> None:
    with pytest.raises(InputError):
        parse_json(text, "x.json")


def test_nan_is_never_written() -> None:
    with pytest.raises(ValueError, match="nan"):
        to_yaml({"a": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        to_json({"a": float("inf")})


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", "é".encode("latin-1"), b"x" * 2_000_000])
def test_files_that_are_no_small_utf8_text(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "f"
    path.write_bytes(content)
    with pytest.raises(InputError):
        read_text(path)


def test_directories_and_missing_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", "a\0b", ""):
        with pytest.raises(InputError, match="readable file"):
            read_text(path)


def test_an_endless_file_is_cut_off() -> None:
    with pytest.raises(InputError, match="at most"):
        read_text("/dev/zero")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "plan.yaml"
    write_text(target, "old")
    for name in ("fsync", "replace", "chmod"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, _no_space)
            with pytest.raises(InputError, match="No space left"):
                write_text(target, "new")
        assert target.read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]


def _no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.skipif(os.name == "nt", reason="named pipes and links as POSIX has them")
def test_a_pipe_is_written_to_and_a_link_is_followed(tmp_path: Path) -> None:
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(pipe, "text")
        assert os.read(reader, 100) == b"text"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "pipe", "target"]


def test_a_folder_is_not_written_to(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can be written"):
        write_text(tmp_path, "text")


def test_a_long_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250)
    write_text(path, "text")
    assert path.read_text() == "text"


def test_a_killed_process_never_leaves_a_torn_file(tmp_path: Path) -> None:
    """30 real kills while a process rewrites a 2 MB file; every time the file is whole, and it did change."""
    target = tmp_path / "plan.yaml"
    code = f"from planner.files import write_text\nn = 0\nwhile True:\n    n += 1\n    write_text({str(target)!r}, f'{{n:08d}}' * 250_000)\n"
    write_text(target, "00000000" * 250_000)
    seen = set()
    for delay in range(30):
        before = target.stat().st_ino
        process = subprocess.Popen([sys.executable, "-c", code])
        while process.poll() is None and target.stat().st_ino == before:
            time.sleep(0.002)
        time.sleep(0.001 * delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        text = target.read_text()
        assert len(text) == 2_000_000
        assert text == text[:8] * 250_000
        seen.add(text[:8])
    assert "00000000" not in seen, "no write happened before the kill: the test proved nothing"
