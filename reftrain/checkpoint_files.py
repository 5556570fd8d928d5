"""The bytes of a checkpoint: files written durably, a manifest that proves them whole, values as JSON. No pickle.

    step-00000100/
        rank-00000.safetensors    the pieces of tensors that rank 0 holds: plain safetensors, readable by any tool
        layout.json               which piece of which tensor lies where, and every value that is not a tensor
        extra.json                what the trainer adds, one entry per rank
        manifest.json             bytes and SHA-256 of each file above, and its own checksum

Nothing here knows torch.distributed; `reftrain.checkpoint` decides who writes what and when.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from planner.errors import InputError, Problem
from planner.files import parse_json, read_text, to_json

__all__ = [
    "MANIFEST", "FileRecord", "Manifest", "damage", "decode", "encode", "json_bytes", "parse_bytes",
    "read_manifest", "safetensors_header", "tensor_bytes", "write_file",
]  # fmt: skip

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
MAX_MANIFEST_BYTES = 64 << 20
CHUNK_BYTES = 16 << 20
_NAME = re.compile(r"[a-z]+(-[0-9]+)?\.(json|safetensors)")
DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The element types a checkpoint can hold, by their names in safetensors."""


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of one file."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Every file of one checkpoint."""

    step: int
    world_size: int
    files: tuple[FileRecord, ...]

    def to_bytes(self) -> bytes:
        """The one spelling of this manifest; its last key is the SHA-256 of the rest as `json_bytes` spells it."""
        body = {
            "schema_version": SCHEMA_VERSION,
            "step": self.step,
            "world_size": self.world_size,
            "files": {f.name: {"bytes": f.num_bytes, "sha256": f.sha256} for f in sorted(self.files, key=lambda f: f.name)},
        }
        return to_json(body | {"checksum": hashlib.sha256(json_bytes(body)).hexdigest()}).encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, refused unless it is bit for bit what `Manifest.to_bytes` would write.

    Raises:
        InputError: missing, not such JSON, names outside the folder, or changed since it was written.
    """
    path = folder / MANIFEST
    try:
        with _open_plain(path) as file:
            text = file.read(MAX_MANIFEST_BYTES)
        raw = parse_json(text.decode(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(_damaged(path, f"cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})")) from None
    try:
        files = tuple(FileRecord(str(name), int(entry["bytes"]), str(entry["sha256"])) for name, entry in raw["files"].items())
        manifest = Manifest(int(raw["step"]), int(raw["world_size"]), files)
        whole = manifest.to_bytes() == text and all(_NAME.fullmatch(f.name) and f.name != MANIFEST for f in files)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        whole = False
    if not whole:
        raise InputError(_damaged(path, "is not what was written: its own checksum fails"))
    return manifest


def damage(folder: Path, record: FileRecord) -> Problem | None:
    """What is wrong with one file of a checkpoint; None if its size and SHA-256 are those of the manifest."""
    path = folder / record.name
    try:
        with _open_plain(path) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes != record.num_bytes:
                return _damaged(path, f"has {num_bytes:,} bytes, the manifest says {record.num_bytes:,}")
            if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                return _damaged(path, "has another SHA-256 than the manifest says")
    except OSError as error:
        return _damaged(path, f"cannot be read ({error.strerror})")
    return None


def _open_plain(path: Path) -> io.BufferedReader:
    """Opens a file to read; links, folders, pipes and devices are OSErrors, and none of them is waited for."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "no plain file", str(path))
    return os.fdopen(handle, "rb")


def _damaged(path: Path, how: str) -> Problem:
    return Problem("checkpoint", str(path), f"a file of a checkpoint must be as it was written; it {how}", "use an older checkpoint", str(path))


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Writes a new file, forces it to the disk and returns its record, hashed on the way from what was meant.

    Raises:
        OSError: as the system says.
    """
    digest, num_bytes = hashlib.sha256(), 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for chunk in chunks:
            view = memoryview(chunk)
            for start in range(0, len(view), CHUNK_BYTES):
                part = view[start : start + CHUNK_BYTES]
                digest.update(part)
                num_bytes += len(part)
                while part:
                    part = part[os.write(handle, part) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    return FileRecord(path.name, num_bytes, digest.hexdigest())


def safetensors_header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The head of a safetensors file: length (8 bytes, little endian), then JSON padded to a multiple of 8.

    Written here, and not by the library, because its writer neither hashes nor reports disk errors as such, and copies everything first.
    Reading goes through the library. Tensors lie in the order given, which must begin with the widest elements so that all stay aligned.

    Source: https://github.com/huggingface/safetensors, section Format.
    """
    entries: dict[str, Any] = {}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> Iterator[memoryview]:
    """The elements of each tensor, on the host one tensor at a time."""
    for tensor in tensors:
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def encode(value: object) -> Any:
    """A value of a state dict as JSON that `decode` turns back into an equal one: tuples and NaN survive.

    Raises:
        TypeError: not None, a boolean, number, text, list, tuple or dict with text keys.

    Example:
        >>> decode(encode({"betas": (0.9, 0.95), "worst": float("inf")}))
        {'betas': (0.9, 0.95), 'worst': inf}
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {"dict": {k: encode(v) for k, v in value.items()}}
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}; give a tensor, number, text, list, tuple or dict with text keys")


def decode(value: Any) -> Any:
    """The value that `encode` was given.

    Raises:
        ValueError: not a result of `encode`.
    """
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"tuple": list(items), **rest} if not rest:
            return tuple(decode(v) for v in items)
        case {"dict": dict(items), **rest} if not rest:
            return {k: decode(v) for k, v in items.items()}
        case {"float": "inf" | "-inf" | "nan" as text, **rest} if not rest:
            return float(text)
    raise ValueError(f"no value of a checkpoint: {str(value)[:60]}")


def json_bytes(value: Any) -> bytes:
    """Strict JSON on one line; NaN and infinity raise ValueError, what JSON cannot hold TypeError."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()


def parse_bytes(path: Path) -> Any:
    """Strict JSON of a file whose size the manifest has already vouched for."""
    return parse_json(read_text(path, path.stat().st_size), str(path))
