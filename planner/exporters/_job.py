"""What an exporter works on: a plan as a ledger of keys. A key that was not read is a key that was not exported."""

from __future__ import annotations

import datetime
import hashlib
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

from planner.architectures import load_model, read_model_config, unread_keys
from planner.errors import InputError, Problem
from planner.files import to_json
from planner.layout import Layout
from planner.model_spec import Mla, ModelSpec, Moe
from planner.plan import Plan
from planner.resolve import resolve
from planner.spec import Spec
from planner.units import format_gib
from planner.workload import Workload

__all__ = ["Draft", "ExportJob", "NotExported", "Placeholder", "Program", "one_line", "slug"]


@dataclass(frozen=True)
class NotExported:
    """A key of the plan that the files do not hold, and why."""

    key: str
    value: Any
    why: str


@dataclass(frozen=True)
class Placeholder:
    """`<NAME>` in the files: what only the user knows."""

    name: str
    meaning: str
    is_filled: bool


@dataclass(frozen=True)
class Program:
    """A trainer as launchers start it: what follows torchrun's own options, and environment variables."""

    words: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Draft:
    """What an exporter writes."""

    files: Mapping[str, str]
    how: str
    program: Program | None = None
    """None where torchrun cannot start it."""


PLANNING_ONLY = {
    "stack": "names the software whose efficiency the prediction assumes",
    "cluster.accelerator": "is where the job is sent, no setting of a run",
    "cluster.node_size": "is where the job is sent, no setting of a run",
    "catalog": "a file on this machine with hardware and prices for the prediction",
    **{f"cluster.{key}": "prices the plan; no setting of a run" for key in ("offer", "pricing", "price", "network", "domain_size")},
}
"""Keys that only the prediction reads."""
BOOKKEEPING = {"model_type", "name", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "_name_or_path"}
"""Keys of a config.json that say nothing about the training."""
SILENT_WORKLOAD = ("job", "recompute", "attention_kernel", "loss_kernel", "activation_input")
LORA_ONLY = ("lora_targets", "lora_dropout", "frozen_format")
"""Keys of the workload whose default says nothing; those of adapters where there are none."""
ALIASES = {"rms_norm_eps": "norm_eps", "layer_norm_eps": "norm_eps", "layer_norm_epsilon": "norm_eps", "rotary_emb_base": "rope_theta"}
PARTS: dict[str, type[Spec]] = {"moe": Moe, "mla": Mla}
"""Parts of a ModelSpec, by key."""
FREE_TEXT = r"[^\x00-\x1f\x7f]{1,200}"
WORD = r"[A-Za-z0-9][A-Za-z0-9_.,@:/+=-]{0,199}"
"""What fits into a comment-like directive without quotes."""


def one_line(text: object, limit: int = 120) -> str:
    """Printable ASCII on one line, for comments.

    Example:
        >>> one_line("a\\nrm -rf /")
        'a?rm -rf /'
    """
    shown = "".join(c if c.isascii() and c.isprintable() else "?" for c in str(text))
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def slug(text: object, limit: int = 40) -> str:
    """A name that a DNS label, a job name and a file name can be (RFC 1123): lower-case letters, digits and hyphens.

    Example:
        >>> slug("Llama 3.1 / 8B $(id)")
        'llama-3-1-8b-id'
    """
    found = re.sub(r"[^a-z0-9]+", "-", str(text).lower()).strip("-")[:limit].strip("-")
    return found if found[:1].isalpha() else f"run-{found}".strip("-")


def _digest(plan: Plan) -> str:
    """Which plan it was: the first digits of a hash of all that it says."""
    try:
        return hashlib.sha256(to_json(plan.inputs).encode()).hexdigest()[:12]
    except UnicodeEncodeError as error:
        raise InputError.single("plan", error.object[error.start : error.end], "must be text that UTF-8 can hold", "correct the name") from None


class ExportJob:
    """A complete plan while it is being exported."""

    def __init__(self, plan: Plan, target: str, version: str, fills: dict[str, str]) -> None:
        request = plan.to_request()
        self.plan = plan
        self.digest = _digest(plan)
        self.target, self.version, self.trainer = target, version, ""
        self.layout: Layout = plan.layout
        self.workload: Workload = request.workload
        self.model: ModelSpec = load_model(request.model)
        self.config, self.model_name, _ = read_model_config(request.model)
        self.cluster = resolve(request).cluster
        self.keys = self._flatten(plan)
        self.fills = fills
        self.placeholders: dict[str, Placeholder] = {}
        self.notes: list[str] = []
        self.leftover = ""
        self.write_trainer: Callable[[], Draft]
        self._read: set[str] = set()
        self._dropped: dict[str, str] = {}
        self._problems: list[Problem] = []

    def _flatten(self, plan: Plan) -> dict[str, Any]:
        """Dotted key -> value of all that the plan says."""
        keys: dict[str, Any] = {"stack": plan.inputs["stack"]}
        for name, value in self.model.model_dump(exclude={"name", "family", "assumptions"}).items():
            parts = value if isinstance(value, dict) else None
            keys |= {f"model.{name}.{k}": v for k, v in parts.items()} if parts is not None else {f"model.{name}": value}
        for name in unread_keys(plan.inputs["model"]) - BOOKKEEPING:
            value = self.config[name]
            if name == "rope_parameters" and isinstance(value, dict):
                theta, rest = value.get("rope_theta"), {k: v for k, v in value.items() if k != "rope_theta"}
                keys |= {"model.rope_theta": theta} if theta is not None else {}
                keys |= {"model.rope_scaling": rest} if rest.get("rope_type", "default") != "default" else {}
            elif value is not None:
                keys[f"model.{ALIASES.get(name, name)}"] = value
        for section in ("workload", "cluster", "layout", "training"):
            keys |= {f"{section}.{name}": value for name, value in (plan.inputs.get(section) or {}).items()}
        return keys | ({"catalog": plan.inputs["catalog"]} if "catalog" in plan.inputs else {})

    def read(self, key: str, default: Any = None) -> Any:
        """The value of a key, which thereby counts as exported; `default` where the plan does not have it."""
        self._read.add(key)
        return self.keys.get(key, default)

    def read_all(self, prefix: str = "") -> None:
        """Counts every key that starts with `prefix` as exported."""
        self._read |= {key for key in self.keys if key.startswith(prefix)}

    def unread_structure(self) -> list[str]:
        """Keys of the model's structure that were neither read nor dropped and say something: the target would build another model."""
        known = {*ModelSpec.model_fields, *PARTS}
        rest = [key for key in self.keys if key.startswith("model.") and key.split(".")[1] in known and key not in self._read]
        return [key.removeprefix("model.") for key in rest if key not in self._dropped and not self._is_neutral(key)]

    @overload
    def number(self, key: str) -> float | int | None: ...
    @overload
    def number(self, key: str, default: float) -> float | int: ...
    def number(self, key: str, default: float | None = None) -> float | int | None:
        """`read` of a number, which nobody checked yet; `default` where absent."""
        value = self.keys.get(key)
        if value is None:
            return default
        self.read(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise InputError.single(key, value, "must be a number", "write a number, or leave it out")
        return value

    def training_numbers(self, names: Mapping[str, str]) -> dict[str, float | int]:
        """Numbers under `training:` that the plan has, from key -> the target's name, under the target's names."""
        found = {own: self.number(f"training.{key}") for key, own in names.items()}
        return {own: value for own, value in found.items() if value is not None}

    def betas(self) -> tuple[float, float] | None:
        """Adam's two, where the plan has one of them; reftrain's default for the other."""
        if self.number("training.beta1") is None and self.number("training.beta2") is None:
            return None
        return self.number("training.beta1", 0.9), self.number("training.beta2", 0.95)

    def lr_schedule(self, known: Collection[str]) -> str | None:
        """`read` of the learning rate's schedule where the target has it; else None, and it is not exported."""
        kind = self.keys.get("training.lr_schedule")
        return str(self.read("training.lr_schedule")) if isinstance(kind, str) and kind in known else None

    def decay_fraction(self) -> float:
        """Share of the steps in which a wsd schedule decays; reftrain's default where the plan leaves it open."""
        return self.number("training.decay_fraction", 0.2)

    def decay_steps(self) -> int:
        """The same in steps."""
        return max(round(self.num_steps * self.decay_fraction()), 1)

    def drop_dropout(self, why: str) -> None:
        """Says that the target's blocks have no dropout, where the model has."""
        for name in ("attention_dropout", "hidden_dropout"):
            if self.keys[f"model.{name}"]:
                self.drop(f"model.{name}", why)

    def drop(self, key: str, why: str) -> None:
        """Says why a key is not exported, in better words than `leftover`."""
        self._read.discard(key)
        self._dropped[key] = why

    def refuse(self, key: str, why: str, fix: str) -> None:
        """Notes that the target cannot run the layout at all; `check` raises."""
        self._problems.append(Problem(key, self.keys.get(key), f"{self.target} {self.version}: {why}", fix))

    def refuse_degree(self, name: str, why: str, fix: str = "") -> None:
        """`refuse` unless `layout.NAME` is 1."""
        if self.read(f"layout.{name}") != 1:
            self.refuse(f"layout.{name}", why, fix or f"use {name}: 1, or another target")

    def check(self) -> None:
        """Raises what was refused.

        Raises:
            InputError: one Problem per key.
        """
        if self._problems:
            raise InputError(*self._problems)

    def not_exported(self) -> tuple[NotExported, ...]:
        """Every key that says something and was not read."""
        rest = [key for key in self.keys if key not in self._read and not self._is_neutral(key)]
        return tuple(NotExported(key, self.keys[key], self._dropped.get(key) or PLANNING_ONLY.get(key) or self.leftover) for key in rest)

    def _is_neutral(self, key: str) -> bool:
        """Whether a key says nothing: a degree of 1, a switch that is off, a pipeline's schedule without a pipeline."""
        section, _, name = key.partition(".")
        value = self.keys[key]
        if section == "layout":
            if name in ("schedule", "num_virtual_stages"):
                return self.layout.pp == 1
            if name == "zero_stage":
                return self.layout.dp_shard == 1
            return name != "micro_batch_size" and value == Layout.model_fields[name].default
        if section == "workload":
            says_nothing = (*SILENT_WORKLOAD, *(LORA_ONLY if self.workload.job != "lora" else ()))
            return name in says_nothing and value == Workload.model_fields[name].default
        if section == "model":
            part, _, inner = name.partition(".")
            kind: type[Spec] | None = PARTS.get(part) if inner else ModelSpec
            fields = kind.model_fields if kind else {}
            return (inner or name) in fields and value == fields[inner or name].default
        return key == "cluster.num_devices" or (key == "cluster.pricing" and value == "on_demand")  # the product of the degrees says it

    def placeholder(self, name: str, meaning: str, pattern: str = FREE_TEXT) -> str:
        """What the user gave for `name`, else `<NAME>`; listed either way.

        Raises:
            InputError: what was given does not match `pattern`, or has a line break in it.
        """
        value = self.fills.get(name)
        self.placeholders[name] = Placeholder(name, meaning, value is not None)
        if value is None:
            return f"<{name}>"
        if not re.fullmatch(pattern, value) or not value.isprintable():
            raise InputError.single(f"--fill {name}", value, f"is {meaning}", "use letters, digits and . _ - / : only")
        return value

    def optional(self, name: str, meaning: str, pattern: str = WORD) -> str | None:
        """`placeholder`, but None instead of `<NAME>`: the setting is left out unless the user gives it."""
        found = self.placeholder(name, f"{meaning} (optional)", pattern)
        return found if name in self.fills else None

    def check_fills(self) -> None:
        """Refuses fills that nothing asked for.

        Raises:
            InputError: unknown placeholder, with the known ones.
        """
        known = ", ".join(self.placeholders) or "none"
        unknown = [name for name in self.fills if name not in self.placeholders]
        if unknown:
            raise InputError(*(Problem("--fill", name, f"{self.target} has no such placeholder", f"known here: {known}") for name in unknown))

    def note(self, text: str) -> None:
        """Something to tell the user beside the files."""
        if text not in self.notes:
            self.notes.append(text)

    @property
    def num_microbatches(self) -> int:
        """Microbatches per data-parallel rank and step."""
        return int(self.keys["workload.global_batch_size"]) // (self.layout.dp * self.layout.micro_batch_size)

    @property
    def num_steps(self) -> int:
        """Steps of the run, from `training.num_steps` or the tokens."""
        self.read("workload.tokens")
        steps = self.number("training.num_steps")
        return self.plan.time.num_steps if steps is None else int(steps)

    @property
    def num_nodes(self) -> int:
        """Nodes that the run occupies."""
        return self.cluster.num_devices // self.devices_per_node

    @property
    def devices_per_node(self) -> int:
        """Processes on each node.

        Raises:
            InputError: the devices do not fill whole nodes.
        """
        per_node, world = min(self.cluster.node_size, self.cluster.num_devices), self.cluster.num_devices
        if world % per_node:
            fix = f"use num_devices {world - world % per_node}, or a node_size that divides {world}"
            raise InputError.single("cluster.num_devices", world, f"must be whole nodes of {per_node} devices to be launched", fix)
        return per_node

    @property
    def slug(self) -> str:
        """The run's name where names are restricted."""
        return slug(self.model_name)

    def header(self, comment: str = "# ") -> str:
        """The first lines of every file that can hold comments."""
        plan = self.plan
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        predicted = f"predicted: peak {format_gib(plan.memory.peak_bytes.value)} GiB, {plan.time.tokens_per_s_per_device:,.0f} tok/s/device"
        lines = (
            f"planner {plan.provenance.get('planner_version', 'unknown')}, plan {self.digest}, for {self.target} {self.version}, {today}",
            f"{self.model_name} on {self.cluster.num_devices} x {self.cluster.accelerator.id}, {predicted}",
        )
        return "".join(f"{comment}{one_line(line, 200)}\n" for line in lines)
