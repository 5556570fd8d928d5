"""Reading untrusted YAML and JSON, and writing files that are never half written.

The YAML dialect is a small, strict one: no aliases, no tags, no duplicate keys, at most 1 MiB and 32 levels deep, and
scalars as YAML 1.2 has them (`15e12` is a number, `on` and `1:30` are text), so that a file means what it looks like.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
import zlib
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from planner.errors import InputError

__all__ = [
    "DATA_DIR",
    "HOME_VARIABLE",
    "parse_json",
    "parse_yaml",
    "read_json",
    "read_text",
    "read_yaml",
    "sync_folder",
    "to_json",
    "to_yaml",
    "user_dir",
    "write_bytes",
    "write_text",
]

_PACKAGED_DATA = Path(__file__).resolve().parent / "data"
DATA_DIR = _PACKAGED_DATA if _PACKAGED_DATA.is_dir() else _PACKAGED_DATA.parent.parent / "data"
"""Where the catalog lies: inside the installed package, or at the root of a checkout."""
HOME_VARIABLE = "LLM_PLANNER_HOME"
MAX_BYTES = 1 << 20
MAX_DEPTH = 32

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _StrictLoader(_Base):  # type: ignore[misc]
    """SafeLoader with YAML 1.2 scalars, no aliases and no duplicate keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} must be text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands here twice", key_node.start_mark)
            seen[key] = self.construct_object(value_node, deep=True)
        return seen


def _strict_map(loader: Any, node: Any) -> dict[Hashable, Any]:
    return loader.construct_mapping(node)  # type: ignore[no-any-return]


def _strict_int(loader: Any, node: Any) -> int | str:
    text = str(node.value)
    return int(text.replace("_", "")) if len(text) < 40 else text  # longer ones stay text and fail as such later


_StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:bool", r"true|false", "tf"),
    ("tag:yaml.org,2002:null", r"null|~|", "n~"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("tag:yaml.org,2002:float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
):
    _StrictLoader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"\Z"), [""])
_StrictLoader.add_constructor("tag:yaml.org,2002:map", _strict_map)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _strict_int)


def user_dir() -> Path:
    """Where this machine's own measurements lie: `$LLM_PLANNER_HOME`, else `~/.llm-planner`."""
    return Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".llm-planner")


GZIP = 31
"""zlib's window of a gzip stream."""


def read_text(path: str | Path, max_bytes: int = MAX_BYTES) -> str:
    """The text of a UTF-8 file of at most `max_bytes` bytes, uncompressed where its name ends in .gz.

    Raises:
        InputError: missing, a directory, unreadable, too large, or not UTF-8.
    """
    shown = str(path)
    try:
        if Path(path).is_file() and Path(path).stat().st_size > max_bytes:
            raise InputError.single("file", shown, f"at most {max_bytes:,} bytes", "give a smaller file")
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError.single("file", shown, f"must be a readable file ({reason})", "check the path and its permissions") from None
    if str(path).endswith(".gz"):
        try:
            data = zlib.decompressobj(GZIP).decompress(data, max_bytes + 1)
        except zlib.error as error:
            raise InputError.single("file", shown, f"must be a gzip file ({error})", "compress it again, or give it uncompressed") from None
    if len(data) > max_bytes:
        raise InputError.single("file", shown, f"at most {max_bytes:,} bytes", "give a smaller file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError.single("file", shown, f"must be UTF-8 text (byte {error.start} is not)", "save the file as UTF-8") from None


def parse_yaml(text: str, where: str = "") -> Any:
    """Strict YAML to plain dicts, lists, text, booleans and numbers.

    Infinity and NaN pass, so that the record that refuses them can name their key together with every other mistake.

    Raises:
        InputError: syntax, aliases, tags, duplicate keys, depth; `where` becomes file:line:column.

    Example:
        >>> parse_yaml("tokens: 15e12")
        {'tokens': 15000000000000.0}
    """
    try:
        _refuse_aliases_tags_and_depth(text)
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        raise InputError.single("yaml", _line(text, mark), str(error.problem or error.context), "correct the line shown", place) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError.single("yaml", text[:60], f"must be valid YAML ({reason[:100]})", "correct the file", where) from None


def _refuse_aliases_tags_and_depth(text: str) -> None:
    """Reads the event stream, which is flat, before anything is built from it."""
    depth = 0
    for event in yaml.parse(text, Loader=_Base):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not allowed", problem_mark=_mark(event))
        tag = getattr(event, "tag", None)
        if tag is not None:  # `!!map [a]` and `!!bool x` break PyYAML's own constructors
            raise yaml.MarkedYAMLError(problem=f"tags ({tag[:40]}) are not allowed", problem_mark=_mark(event))
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=_mark(event))
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _mark(event: yaml.Event) -> Any:
    """Where an event starts; PyYAML's stubs disagree about the C parser's marks."""
    return event.start_mark


def _line(text: str, mark: Any) -> str:
    lines = text.splitlines()
    return lines[mark.line].strip()[:80] if mark and mark.line < len(lines) else ""


def read_yaml(path: str | Path) -> Any:
    """`parse_yaml` of a file."""
    return parse_yaml(read_text(path, 4 * MAX_BYTES), str(path))


def parse_json(text: str, where: str = "") -> Any:
    """Strict JSON: no NaN, no infinity however it is written, no duplicate keys.

    Raises:
        InputError: not such JSON.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text[:40]} is too large for a number")
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"the key {key!r} stands twice in one object")
            result[key] = value
        return result

    try:
        return json.loads(text, parse_constant=refuse, parse_float=finite, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:120] or type(error).__name__
        raise InputError.single("json", text[:60], f"must be valid JSON ({reason})", "correct the file", where) from None


def read_json(path: str | Path) -> Any:
    """`parse_json` of a file."""
    return parse_json(read_text(path, 4 * MAX_BYTES), str(path))


def to_json(value: Any) -> str:
    """One JSON object with a newline at its end; NaN and infinity are a fault of ours and raise ValueError."""
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


class _Dumper(yaml.SafeDumper):
    """Innermost collections on one line, no aliases, floats that read back to the last bit."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    if not math.isfinite(value):
        raise ValueError(f"{value} cannot be written")
    return dumper.represent_scalar("tag:yaml.org,2002:float", repr(value))


_Dumper.add_representer(float, _represent_float)
# Text that PyYAML would leave bare but our reader takes for a number (15e12) must be quoted.
_Dumper.yaml_implicit_resolvers = _StrictLoader.yaml_implicit_resolvers


def to_yaml(value: Any) -> str:
    """YAML that `parse_yaml` reads back to an equal value.

    Example:
        >>> to_yaml({"a": 15e12, "b": "1e3"})
        "{a: 15000000000000.0, b: '1e3'}\\n"
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True, default_flow_style=None)


def sync_folder(folder: Path) -> None:
    """Forces the names in a folder to the disk: without it a rename may not outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes a whole file or nothing: temporary file, fsync, rename, fsync of the folder.

    A link is followed. What is there and is no plain file (`/dev/stdout`, a named pipe) is written to and never replaced.

    Raises:
        InputError: the folder does not exist or cannot be written; the previous file is intact.
    """
    temporary = ""
    try:
        target = Path(os.path.realpath(path))
        if os.path.exists(path) and not os.path.isfile(path):
            with open(path, "wb") as file:
                file.write(data)
            return
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name[:64]}.", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
        sync_folder(target.parent)
    except (OSError, ValueError) as error:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise _cannot_write(path, error) from None


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of a text, as UTF-8 with the line ends that it has.

    Raises:
        InputError: see `write_bytes`; or half a surrogate pair.
    """
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise _cannot_write(path, error) from None
    write_bytes(path, data)


def _cannot_write(path: str | Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error)
    return InputError.single("out", str(path), f"must be a file that can be written ({reason})", "check the folder and its permissions")
