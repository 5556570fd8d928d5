"""The script that runs the README: what it takes for a command, and what it calls a failure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "run_readme.py"


def run_page(folder: Path, page: str, *options: str) -> subprocess.CompletedProcess[str]:
    path = folder / "page.md"
    path.write_text(page)
    return subprocess.run([sys.executable, str(SCRIPT), str(path), *options], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("block", "status"),
    [
        ("$ true", 0),
        ("$ false", 1),
        ("$ false  # exit 1", 0),
        ("$ true  # exit 1", 1),
        ("$ sh -c 'exit 3'  # does not fit: exit 3", 0),
        ("$ test 1 = \\\n  1", 0),
        ("$ test 1 = \\\n  2", 1),
        ("$ cat other.txt\nany output", 0),
        ("$ touch made\n$ test -e made", 0),
        ("$ no-such-command-anywhere", 1),
        ("no command", 1),
    ],
)
def test_a_block(tmp_path: Path, block: str, status: int) -> None:
    (tmp_path / "other.txt").write_text("a file beside the page")
    done = run_page(tmp_path, f"# Page\n\n```console\n{block}\n```\n")
    assert done.returncode == status, done.stdout + done.stderr
    assert not (tmp_path / "made").exists(), "commands run in a copy"


@pytest.mark.parametrize("page", ["no block", "```\n$ true\n```\n", "```console\n$ true\n"])
def test_a_page_without_a_whole_console_block_fails(tmp_path: Path, page: str) -> None:
    assert run_page(tmp_path, page).returncode == 1


def test_skip_and_limit(tmp_path: Path) -> None:
    assert run_page(tmp_path, "```console\n$ false\n```\n", "--skip", "false").returncode == 0
    done = run_page(tmp_path, "```console\n$ sleep 20\n```\n", "--timeout-s", "0.2")
    assert done.returncode == 1
    assert "status 124" in done.stdout


def test_update_writes_what_the_commands_print(tmp_path: Path) -> None:
    page = "```console\n$ echo new\nold\n$ printf 'a\\nb\\n'\n```\nend\n"
    assert run_page(tmp_path, page, "--update").returncode == 0
    assert (tmp_path / "page.md").read_text() == "```console\n$ echo new\nnew\n$ printf 'a\\nb\\n'\na\nb\n```\nend\n"
