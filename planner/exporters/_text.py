"""Names from a plan inside other languages. Every value goes through a quoting function of its language, never into text as it is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from planner.files import parse_yaml

__all__ = ["ShellText", "shell_array", "shell_env", "shell_words", "to_plain_yaml"]

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
"""Text that may stand in YAML without quotes, if both dialects also read it as text."""


class _Dumper(yaml.SafeDumper):
    """YAML that reads the same under YAML 1.1 (PyYAML, most trainers) and 1.2: `on`, `1:30` and `15e12` are quoted when they are text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    tag = "tag:yaml.org,2002:str"
    is_block = "\n" in text and all(c.isprintable() or c == "\n" for c in text)
    is_plain = _PLAIN.fullmatch(text) and yaml.safe_load(text) == text and parse_yaml(text) == text
    return dumper.represent_scalar(tag, text, style=None if is_plain else "|" if is_block else '"')


_Dumper.add_representer(str, _represent_str)


def to_plain_yaml(*documents: Any) -> str:
    """YAML for programs that we do not know; several documents are divided by `---`.

    Example:
        >>> to_plain_yaml({"a": "on", "b": 1e-05, "c": True})
        'a: "on"\\nb: 1.0e-05\\nc: true\\n'
    """
    texts = [yaml.dump(d, Dumper=_Dumper, sort_keys=False, width=100_000, allow_unicode=False, default_flow_style=False) for d in documents]
    return "---\n".join(texts)


class ShellText(str):
    """A word that is shell already, such as `"$host:$port"`; only literals of this project's own."""

    __slots__ = ()


def shell_words(words: Iterable[str], indent: str = "    ") -> str:
    """Words of a command, an option per line.

    Example:
        >>> print(shell_words(["torchrun", "--nnodes", ShellText('"$NODES"'), "-m", "x y"]))
        torchrun \\
            --nnodes "$NODES" \\
            -m 'x y'
    """
    return f" \\\n{indent}".join(_lines(words))


def shell_array(name: str, words: Iterable[str]) -> str:
    """A bash array, an option per line, and a check that its placeholders were filled in.

    Example:
        >>> print(shell_array("program", ["--out", "<RUN_DIR>"]), end="")
        program=(
            --out '<RUN_DIR>'
        )
        case "${program[*]}" in *'<RUN_DIR>'*) echo 'fill in <RUN_DIR> first' >&2; exit 2 ;; esac
    """
    words = list(words)
    lines = "".join(f"    {line}\n" for line in _lines(words))
    names = sorted({found for word in words for found in re.findall(r"<[A-Z_]+>", word)})
    checks = [f"""case "${{{name}[*]}}" in *'{n}'*) echo 'fill in {n} first' >&2; exit 2 ;; esac\n""" for n in names]
    return f"{name}=(\n{lines})\n" + "".join(checks)


def _lines(words: Iterable[str]) -> list[str]:
    lines: list[list[str]] = [[]]
    for word in words:
        if re.match(r"--?[A-Za-z]", word) and lines[-1]:
            lines.append([])
        lines[-1].append(word if isinstance(word, ShellText) else shlex.quote(word))
    return [" ".join(line) for line in lines]


def shell_env(env: Mapping[str, str]) -> str:
    """`export` lines."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in env.items())
