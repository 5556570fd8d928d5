"""Runs every console block of a Markdown file in a clean copy of the repository.

In a block fenced as console, each line that starts with `$ ` is a command; a trailing backslash continues it; the other
lines are its output. A command must exit with 0, or with N where its line ends in `# exit N`. All commands run by bash
from the root of one copy, with that copy's `.venv/bin` first on the PATH, so that what `make run` installs is what the
later commands use.

    python scripts/run_readme.py README.md [--skip "make test"] [--update]

`--update` writes the output of each command below it, so that the page shows what the commands print.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

EXIT = re.compile(r"\s+#.*\bexit (\d+)\b.*\Z")
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", "build", "dist")


@dataclass(frozen=True)
class Command:
    """One command of a page."""

    line_index: int
    """First line of the command in the page, from 0."""
    output_index: int
    """First line after the command."""
    end_index: int
    """First line that is no longer its output."""
    text: str
    expected_status: int


def commands(page: str) -> Iterator[Command]:
    """The commands of the console blocks of a Markdown page, in order.

    Raises:
        ValueError: a console block that is never closed, or holds no command.

    Example:
        >>> [(c.text, c.expected_status) for c in commands("```console\\n$ true\\n$ false  # exit 1\\n```\\n")]
        [('true', 0), ('false', 1)]
    """
    lines = page.splitlines()
    index = 0
    while index < len(lines):
        if lines[index].strip() == "```console":
            end = next((i for i in range(index + 1, len(lines)) if lines[i].strip() == "```"), None)
            if end is None:
                raise ValueError(f"line {index + 1}: the console block is never closed")
            yield from _block(lines, index + 1, end)
            index = end
        index += 1


def _block(lines: list[str], start: int, end: int) -> Iterator[Command]:
    starts = [i for i in range(start, end) if lines[i].startswith("$ ")]
    if not starts:
        raise ValueError(f"line {start}: the console block holds no line that starts with '$ '")
    for first, stop in zip(starts, [*starts[1:], end], strict=True):
        last = first
        while lines[last].endswith("\\") and last + 1 < stop:
            last += 1
        text = "\n".join([lines[first][2:], *lines[first + 1 : last + 1]])
        match = EXIT.search(text)
        yield Command(first, last + 1, stop, EXIT.sub("", text), int(match[1]) if match else 0)


def clean_copy(root: Path, target: Path) -> None:
    """Copies what a fresh clone of the working tree would hold; the whole folder where git does not answer."""
    git = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(git, check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError):
        shutil.copytree(root, target, ignore=LEFT_OUT, symlinks=True, dirs_exist_ok=True)
        return
    for name in filter(None, os.fsdecode(listed).split("\0")):
        if (root / name).is_file():  # a file deleted but not yet committed is listed, too
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def run(command: Command, folder: Path, timeout_s: float) -> tuple[int, str]:
    """Exit status and output of one command, run in `folder`; 124 when it runs past `timeout_s`."""
    bin_folder = folder / ".venv" / "bin"
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV", "VENV", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES"}}
    environment |= {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "80", "NO_COLOR": "1"}
    try:
        done = subprocess.run(
            ["bash", "-c", command.text], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=timeout_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return 124, os.fsdecode(error.stdout or b"")
    return done.returncode, done.stdout.decode("utf-8", "replace")


def updated(page: str, outputs: dict[Command, str]) -> str:
    """The page with the output of each command replaced."""
    lines = page.splitlines()
    for command in sorted(outputs, key=lambda c: -c.line_index):
        lines[command.output_index : command.end_index] = [line.rstrip() for line in outputs[command].splitlines()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """0 when every command ended as the page says; else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--skip", action="append", default=[], metavar="COMMAND", help="do not run this command; repeatable")
    parser.add_argument("--timeout-s", type=float, default=900.0, help="limit for each command")
    parser.add_argument("--update", action="store_true", help="write the outputs into the page")
    arguments = parser.parse_args()
    page = arguments.page.read_text(encoding="utf-8")
    found = list(commands(page))
    if not found:
        print(f"{arguments.page}: no console block", file=sys.stderr)
        return 1
    num_failed, outputs = 0, dict[Command, str]()
    with tempfile.TemporaryDirectory(prefix="readme-") as temporary:
        folder = Path(temporary) / "copy"
        clean_copy(arguments.page.resolve().parent, folder)
        for command in found:
            place = f"{arguments.page}:{command.line_index + 1}: {command.text}"
            if command.text in arguments.skip:
                print(f"skip  {place}")
                continue
            start_s = time.monotonic()
            status, output = run(command, folder, arguments.timeout_s)
            is_right = status == command.expected_status
            print(f"{'pass' if is_right else 'FAIL'}  {place}  (status {status}, {time.monotonic() - start_s:.1f} s)", flush=True)
            if is_right:
                outputs[command] = output
            else:
                num_failed += 1
                print(f"expected status {command.expected_status}; its output:\n{output}")
    if arguments.update and not num_failed:
        arguments.page.write_text(updated(page, outputs), encoding="utf-8")
    print(f"{len(found)} commands, {num_failed} failed")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
