"""torch.distributed.checkpoint's planners and storage, over safetensors and JSON instead of pickles.

DCP decides which rank writes which piece of a tensor and which pieces a rank needs on load; these classes carry the pieces.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future as TorchFuture

from planner.errors import InputError
from reftrain.checkpoint_files import (
    DTYPES,
    FileRecord,
    Manifest,
    decode,
    encode,
    json_bytes,
    parse_bytes,
    safetensors_header,
    tensor_bytes,
    write_file,
)

__all__ = ["LAYOUT", "JsonLoadPlanner", "JsonSavePlanner", "PieceCollector", "PieceReader", "cause_of", "unfit"]

LAYOUT = "layout.json"
_DTYPE_NAMES = {name: dtype for dtype, name in DTYPES.items()}


def unfit(folder: Path, reason: str) -> InputError:
    """The error for a checkpoint that is intact and yet does not serve."""
    rule = f"must hold what the run asks for ({' '.join(reason.split())[:300]})"
    return InputError.single("checkpoint", str(folder), rule, "resume with the model and optimizer that were saved", str(folder))


def cause_of(error: CheckpointException) -> str:
    """What DCP wraps, in one line; an interrupt is passed on as what it is."""
    causes = [cause for cause, _ in error.failures.values()]
    for cause in causes:
        if isinstance(cause, (KeyboardInterrupt, SystemExit)):
            raise cause
    return "; ".join(sorted({f"{type(cause).__name__}: {cause}" for cause in causes}))


class JsonSavePlanner(DefaultSavePlanner):
    """Values that are no tensors as JSON, where DCP would pickle them."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:  # noqa: A002 - DCP's name
        """The bytes to write for a value; a tensor as it is."""
        return io.BytesIO(json_bytes(encode(object))) if write_item.type == WriteItemType.BYTE_IO else object


class JsonLoadPlanner(DefaultLoadPlanner):
    """The reverse of `JsonSavePlanner`, where DCP would run a pickle."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Puts a value where the state dict has it."""
        *path, last = self.mappings[read_item.dest_index.fqn]
        place: Any = self.original_state_dict
        for key in path:
            place = place[key]
        place[last] = decode(json.loads(value.getvalue()))


def _piece_name(fqn: str, offsets: Sequence[int], sizes: Sequence[int], whole: Sequence[int]) -> str:
    """Name of a piece in a safetensors file: that of the tensor, with its ranges unless it is the whole of it."""
    if list(sizes) == list(whole):
        return fqn
    return f"{fqn}[{','.join(f'{o}:{o + s}' for o, s in zip(offsets, sizes, strict=True))}]"


class PieceCollector(StorageWriter):
    """Takes from DCP the pieces that this rank is to write, and writes them when told to.

    Args:
        buffers: host memory to copy the pieces to, by name, reused from save to save; None: only refer to them.
    """

    def __init__(self, buffers: dict[str, torch.Tensor] | None) -> None:
        self.layout: dict[str, Any] = {}
        self.pieces: dict[str, torch.Tensor] = {}
        self._buffers = buffers
        self._rank = 0

    @property
    def num_bytes(self) -> int:
        """Size of the pieces of this rank."""
        return sum(t.numel() * t.element_size() for t in self.pieces.values())

    def write(self, folder: Path, rank: int) -> FileRecord | None:
        """Writes the pieces as one safetensors file; None if this rank holds none."""
        if not self.pieces:
            return None
        widest_first = dict(sorted(self.pieces.items(), key=lambda item: -item[1].element_size()))
        header: bytes | memoryview = safetensors_header(widest_first)
        return write_file(folder / _rank_file(rank), chain([header], tensor_bytes(widest_first.values())))

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to reset: one collector, one save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Learns its rank."""
        self._rank = int(kwargs.get("rank") or 0)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        """Collects, copying if there are buffers; values travel to the coordinator in the result."""
        results = []
        for item in plan.items:
            data = planner.resolve_data(item)
            if isinstance(data, io.BytesIO):
                text = data.getvalue().decode()
                results.append(WriteResult(item.index, len(text), json.loads(text)))
                continue
            assert item.tensor_data is not None  # DCP's contract for items that are no bytes
            chunk, tensor = item.tensor_data.chunk, data.detach()
            if tensor.dtype not in DTYPES:
                raise TypeError(f"{item.index.fqn}: a checkpoint cannot hold {tensor.dtype}")
            name = _piece_name(item.index.fqn, chunk.offsets, chunk.sizes, item.tensor_data.size)
            self.pieces[name] = tensor if self._buffers is None else self._copy(name, tensor)
            results.append(WriteResult(item.index, tensor.numel() * tensor.element_size(), _rank_file(self._rank)))
        if any(t.is_pinned() for t in self.pieces.values()):  # copies from a device are still under way
            torch.cuda.synchronize()
        done: TorchFuture[list[WriteResult]] = TorchFuture()
        done.set_result(results)
        return done

    def _copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        assert self._buffers is not None
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return buffer.copy_(tensor, non_blocking=True)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Turns DCP's metadata into `layout.json` (on the coordinator)."""
        where = {result.index: result.storage_data for rank_results in results for result in rank_results}
        tensors, values = {}, {}
        for fqn, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                chunks = [[list(c.offsets), list(c.sizes), where[MetadataIndex(fqn, c.offsets)]] for c in entry.chunks]
                tensors[fqn] = {"dtype": DTYPES[entry.properties.dtype], "shape": list(entry.size), "pieces": chunks}
            else:
                values[fqn] = where[MetadataIndex(fqn)]
        self.layout = {"tensors": tensors, "values": values}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Never chosen by DCP for itself."""
        return False


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


class PieceReader(StorageReader):
    """Gives DCP the pieces of a verified checkpoint; a file is mapped, and only the rows asked for are read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._metadata = Metadata({})
        self._files: dict[MetadataIndex, tuple[str, str]] = {}
        self._values: dict[str, bytes] = {}

    def open(self, manifest: Manifest) -> None:
        """Reads `layout.json`.

        Raises:
            InputError: not such a layout, or it points to files that the manifest does not vouch for.
        """
        known = {f.name for f in manifest.files}
        entries: dict[str, Any] = {}
        try:
            layout = parse_bytes(self._folder / LAYOUT)
            for fqn, value in layout["values"].items():
                decode(value)
                entries[fqn], self._values[fqn] = BytesStorageMetadata(), json_bytes(value)
            for fqn, tensor in layout["tensors"].items():
                shape, chunks = torch.Size(tensor["shape"]), []
                for offsets, sizes, file in tensor["pieces"]:
                    if file not in known:
                        raise ValueError(f"{file} is not in the manifest")
                    chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                    self._files[MetadataIndex(fqn, offsets)] = (file, _piece_name(fqn, offsets, sizes, shape))
                entries[fqn] = TensorStorageMetadata(TensorProperties(dtype=_DTYPE_NAMES[tensor["dtype"]]), shape, chunks)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise unfit(self._folder, f"{LAYOUT}: {type(error).__name__}: {error}") from None
        self._metadata = Metadata(entries)

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to reset: one reader, one load."""

    def read_metadata(self, *args: Any) -> Metadata:
        """What `open` found."""
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> TorchFuture[None]:
        """Copies each piece, or the part of it that is asked for, into the tensor it belongs to."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(self._values[item.storage_index.fqn]))
            else:
                by_file.setdefault(self._files[item.storage_index][0], []).append(item)
        for name, items in by_file.items():
            with safe_open(self._folder / name, framework="pt") as file:
                for item in items:
                    piece = file.get_tensor(self._files[item.storage_index][1])
                    for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                        piece = piece.narrow(dim, start, length)
                    target = planner.resolve_tensor(item).detach()
                    if target.shape != piece.shape or target.dtype != piece.dtype:
                        was, now = (f"{t.dtype} {list(t.shape)}" for t in (piece, target))
                        raise ValueError(f"{item.storage_index.fqn} is {was} in the checkpoint and {now} in the run")
                    target.copy_(piece)
                    planner.commit_tensor(item, target)
        done: TorchFuture[None] = TorchFuture()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Never chosen by DCP for itself."""
        return False
