"""Commands between a plan and other programs: export and import."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from planner.errors import InputError

if TYPE_CHECKING:
    from planner.exporters import Export

__all__ = ["add_commands"]

JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


def export(
    plan: Annotated[str | None, typer.Argument(metavar="PLAN.yaml", help="A plan file; a layout left open is searched for.")] = None,
    target: Annotated[str | None, typer.Option("--to", metavar="TARGET[@VERSION]", help="See --list.")] = None,
    version: Annotated[str | None, typer.Option("--target-version", metavar="VERSION", help="Dialect; default the newest known.")] = None,
    trainer: Annotated[str, typer.Option(metavar="TARGET", help="For launchers: what to start.")] = "reftrain",
    fill: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A placeholder, e.g. IMAGE=ghcr.io/me/train:1.")] = None,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Write the files there instead of printing them.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that stand there and differ.")] = False,
    show_list: Annotated[bool, typer.Option("--list", help="Known targets and their versions.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """A plan as another trainer's or launcher's own configuration, and what that cannot express."""
    from planner.exporters import export_plan
    from planner.files import to_json
    from planner.plan import load_plan
    from planner.report.export_text import render_export, render_targets, targets

    if show_list:
        sys.stdout.write(to_json({"targets": targets()}) if as_json else render_targets())
        return
    if plan is None or target is None:
        missing = "PLAN.yaml" if plan is None else "--to"
        raise InputError.single(missing, None, "is required", "write planner export PLAN.yaml --to TARGET; planner export --list shows the targets")
    found = export_plan(load_plan(plan), target, version, trainer, _fills(fill or []))
    if out is not None:
        _write(found, Path(out), force)
    if as_json:
        sys.stdout.write(to_json(found.to_dict()))
    elif out is None:
        sys.stdout.write(_joined(found.files))
    (sys.stdout if out is not None and not as_json else sys.stderr).write(render_export(found, out))
    raise typer.Exit(0 if found.fits else 3)


def import_(
    path: Annotated[str, typer.Argument(metavar="FILE", help="The trainer's configuration; it is read, never run.")],
    source: Annotated[str, typer.Option("--from", metavar="SOURCE", help="torchtitan, megatron or deepspeed.")],
    accelerator: Annotated[str | None, typer.Option(metavar="NAME", help="Name in `planner catalog accelerators`.")] = None,
    num_devices: Annotated[int | None, typer.Option(metavar="N", help="Devices in all, where the file does not say.", min=1)] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Preset or config.json, where the file does not say.")] = None,
    seq_len: Annotated[int | None, typer.Option(metavar="N", help="Tokens per sequence, where the file does not say.", min=1)] = None,
    out: Annotated[str | None, typer.Option(metavar="PLAN.yaml", help="Write the plan instead of printing it.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Another trainer's configuration as a plan: then ask planner estimate what it costs."""
    from planner.files import to_json, to_yaml, write_text
    from planner.importers import Given, import_config
    from planner.plan import spec_to_plain

    found = import_config(source, path, Given(accelerator, num_devices, model, seq_len))
    values = spec_to_plain(found.request)
    if out is not None:
        write_text(out, to_yaml(values))
    if as_json:
        sys.stdout.write(to_json({"schema_version": 1, "request": values, "assumed": found.assumed, "ignored": found.ignored}))
    elif out is None:
        sys.stdout.write(to_yaml(values))
    for kind, texts in (("assumed", found.assumed), ("not understood", found.ignored)):
        for text in texts:
            sys.stderr.write(f"{kind}: {text}\n")


def _fills(texts: list[str]) -> dict[str, str]:
    fills = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign:
            raise InputError.single("--fill", text, "must be NAME=VALUE", "write e.g. --fill ACCOUNT=research")
        fills[name.strip("<>")] = value
    return fills


def _joined(files: dict[str, str]) -> str:
    """One file as it is, several with their names between them."""
    if len(files) == 1:
        return next(iter(files.values()))
    return "\n".join(f"==> {name} <==\n{text}" for name, text in files.items())


def _write(found: Export, folder: Path, force: bool) -> None:
    """Every file whole or not at all, and none over a file that somebody changed."""
    from planner.errors import Problem
    from planner.files import write_text

    changed = [name for name, text in found.files.items() if (folder / name).exists() and (folder / name).read_bytes() != text.encode()]
    if changed and not force:
        raise InputError(*(Problem("--out", str(folder / name), "stands there and differs", "use another folder, or --force") for name in changed))
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError.single("--out", str(folder), f"must be a folder that can be made ({error.strerror})", "check the path") from None
    for name, text in found.files.items():
        write_text(folder / name, text)


def add_commands(app: typer.Typer) -> None:
    """Puts them under a command line."""
    app.command(epilog="Example: planner export plan.yaml --to slurm --trainer torchtitan --out job")(export)
    app.command("import", epilog="Example: planner import --from deepspeed ds_config.json --model llama-3.1-8b --accelerator h100")(import_)
