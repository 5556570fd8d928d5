"""Model families: an HF configuration in, a `ModelSpec` and its ops out.

One file per family registers an `Architecture` under the `model_type`s that it reads. A new family is one new file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from planner.architectures._config import Config
from planner.errors import InputError, nearest
from planner.files import DATA_DIR, read_json, read_yaml
from planner.model_spec import ModelSpec
from planner.op_cost import Op
from planner.registry import Registry, unknown_name

__all__ = [
    "ARCHITECTURES", "Architecture", "ModelOps", "load_model", "model_ops", "preset_names", "preset_record", "read_model_config",
    "unread_keys",
]  # fmt: skip


@dataclass(frozen=True)
class ModelOps:
    """A model as lists of ops. `layers` holds, for each block from input to output, an index into `blocks`."""

    embedding: tuple[Op, ...]
    blocks: tuple[tuple[str, tuple[Op, ...]], ...]
    """(name, ops) of each distinct kind of block."""
    layers: tuple[int, ...]
    head: tuple[Op, ...]


class Architecture(Protocol):
    """A family: how its configuration reads, and which ops it runs."""

    def read(self, config: Config) -> ModelSpec:
        """ModelSpec of an HF configuration."""
        ...

    def ops(self, spec: ModelSpec) -> ModelOps:
        """Ops of the model, from embedding to loss."""
        ...


ARCHITECTURES: Registry[Architecture] = Registry("model_type", "planner.architectures")


@lru_cache(maxsize=64)
def model_ops(spec: ModelSpec) -> ModelOps:
    """Ops of `spec`, by its family."""
    return ARCHITECTURES[spec.family].ops(spec)


def preset_names() -> list[str]:
    """Names of the models shipped under data/models/."""
    return sorted(path.stem for path in (DATA_DIR / "models").glob("*.yaml"))


def preset_record(name: str) -> dict[str, Any]:
    """The file of one preset: config, published parameter count, source, date.

    Raises:
        InputError: unknown name.
    """
    if name not in preset_names():
        raise unknown_name("model", name, preset_names(), " (or give a path to an HF config.json)")
    record: dict[str, Any] = read_yaml(DATA_DIR / "models" / f"{name}.yaml")
    return record


def load_model(model: str | Mapping[str, Any]) -> ModelSpec:
    """The model that a user named.

    Args:
        model: a preset, a path to an HF `config.json`, or with a slash in it to the folder that holds it, or a mapping with its keys.
    Raises:
        InputError: unknown preset or model_type, unreadable file, missing or impossible keys.
    """
    return _read_config(*read_model_config(model))


def read_model_config(model: str | Mapping[str, Any]) -> tuple[dict[str, Any], str, str]:
    """(keys, name, place for error messages) of the configuration that a user named; see `load_model`.

    Raises:
        InputError: unknown preset, unreadable file, no mapping.
    """
    if isinstance(model, Mapping):
        return dict(model), str(model.get("name", "inline")), "model"
    if not isinstance(model, str):
        raise InputError.single("model", model, "is a preset name, a path to config.json, or a mapping of its keys", "write e.g. model: llama-3.1-8b")
    if "/" in model or model.endswith(".json"):
        file = Path(model) if model.endswith(".json") else Path(model) / "config.json"
        config = read_json(file)
        if not isinstance(config, dict):
            raise InputError.single("model", config, "config.json must hold one JSON object", "give the config.json of an HF model", str(file))
        name = file.parent.name if file.name == "config.json" and file.parent.name else file.stem
        return config, name, str(file)
    return dict(preset_record(model)["config"]), model, f"preset {model}"


def unread_keys(model: str | Mapping[str, Any]) -> set[str]:
    """Keys of a configuration that do not change what the model costs, such as `rope_theta`.

    Raises:
        InputError: see `load_model`.
    """
    reader = Config(*read_model_config(model))
    ARCHITECTURES[reader.model_type].read(reader)
    return reader.unread


def _read_config(config: dict[str, Any], name: str, where: str) -> ModelSpec:
    model_type = config.get("model_type")
    known = sorted(ARCHITECTURES)
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        close = nearest(model_type, known)
        hint = f"did you mean {', '.join(close)}? " if close else ""
        rule = "must name a known family" if model_type is not None else "is required: it names the model's family"
        raise InputError.single("model.model_type", model_type, rule, f"{hint}known: {', '.join(known)}", where)
    return ARCHITECTURES[model_type].read(Config(config, name, where))
