"""Exporters: a plan in, another program's own configuration out.

One file per target registers one `Exporter`. A target is a trainer (torchtitan, DeepSpeed, ...), a launcher around any of
them (Slurm, Kubernetes, ...), or a model configuration. What a target cannot express is never lost in silence: whatever key
of the plan an exporter did not read is listed in `Export.not_exported` with a reason, and a layout that the target cannot
run at all is an error.

No host, account, path or secret is written: they are placeholders (`<IMAGE>`), listed, and filled in by `fills`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from planner.errors import InputError
from planner.estimate import estimate
from planner.exporters._job import Draft, ExportJob, NotExported, Placeholder, Program
from planner.plan import Plan, Request
from planner.registry import Registry, unknown_name

__all__ = ["EXPORTERS", "Draft", "Export", "ExportJob", "Exporter", "NotExported", "Placeholder", "Program", "export_plan", "split_target"]


class Exporter(ABC):
    """One target in the dialects (versions) that were checked."""

    name: str
    """As in `--to`."""
    kind: Literal["trainer", "launcher", "model"]
    versions: tuple[str, ...]
    """Known versions of the target, the default first."""
    summary: str
    """One line for `planner export --list`."""
    leftover: str
    """Why a key of the plan that this exporter does not read is not in its files."""

    @abstractmethod
    def write(self, job: ExportJob) -> Draft:
        """The files of one plan."""


EXPORTERS: Registry[Exporter] = Registry("--to", "planner.exporters")


@dataclass(frozen=True)
class Export:
    """What a target needs, and what it cannot be told."""

    target: str
    target_version: str
    files: dict[str, str]
    """Name -> text."""
    how: str
    """How to start it, from the folder that holds the files."""
    not_exported: tuple[NotExported, ...]
    placeholders: tuple[Placeholder, ...]
    notes: tuple[str, ...]
    fits: bool
    program: Program | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The object that `export --json` prints."""
        return {
            "schema_version": 1,
            "target": self.target,
            "target_version": self.target_version,
            "files": self.files,
            "how": self.how,
            "not_exported": [{"key": n.key, "value": n.value, "why": n.why} for n in self.not_exported],
            "placeholders": [{"name": p.name, "meaning": p.meaning, "is_filled": p.is_filled} for p in self.placeholders],
            "notes": list(self.notes),
            "fits": self.fits,
        }


def split_target(text: str, version: str | None = None) -> tuple[Exporter, str]:
    """The exporter and the version that `name` or `name@version` means; `0.3` stands for `0.3.0`.

    Raises:
        InputError: unknown target; unknown version, with the known ones.

    Example:
        >>> split_target("slurm@22")[1]
        '22.05'
    """
    name, _, own = text.partition("@")
    exporter, wanted = EXPORTERS[name], version or own
    if own and version and own != version:
        raise InputError.single("--target-version", version, f"the target says {text}", "give the version once")
    if not wanted:
        return exporter, exporter.versions[0]
    for known in exporter.versions:
        if known == wanted or known.startswith(wanted + "."):
            return exporter, known
    raise InputError.single("--target-version", wanted, f"must be a known version of {name}", f"use one of: {', '.join(exporter.versions)}")


def export_plan(
    request: Request | Plan, target: str, version: str | None = None, trainer: str = "reftrain", fills: Mapping[str, str] | None = None
) -> Export:
    """What `target` needs to run a plan.

    Args:
        request: a request, completed as `estimate` does, or a plan.
        target: name of an exporter, with `@version` where another than the newest known one is meant.
        version: the same, apart.
        trainer: for launchers: the trainer to start.
        fills: placeholder -> text, e.g. {"IMAGE": "ghcr.io/me/train:1"}.
    Raises:
        InputError: unknown target, version or placeholder; a layout that the target cannot run.

    Example:
        >>> found = export_plan(estimate({"model": "llama-3.1-8b", "cluster": {"accelerator": "h100", "num_devices": 8}}), "torchrun")
        >>> sorted(found.files), found.not_exported
        (['plan.yaml', 'run.sh'], ())
    """
    exporter, version = split_target(target, version)
    inner, inner_version = split_target(trainer)
    if inner.kind != "trainer":
        trainers = [name for name, known in EXPORTERS.items() if known.kind == "trainer"]
        raise unknown_name("--trainer", trainer, trainers)
    plan = request if isinstance(request, Plan) else estimate(request)
    job = ExportJob(plan, exporter.name, version, dict(fills or {}))

    def write_trainer() -> Draft:
        draft = inner.write(job)
        job.leftover = inner.leftover
        job.note(f"starts {inner.name} {inner_version}")
        return draft

    job.write_trainer = write_trainer
    job.trainer = inner.name
    job.leftover = exporter.leftover
    draft = exporter.write(job)
    job.check_fills()
    return Export(
        exporter.name, version, dict(draft.files), draft.how, job.not_exported(), tuple(job.placeholders.values()), tuple(job.notes), plan.fits,
        draft.program,
    )  # fmt: skip
