"""The commands `reftrain finetune` and `reftrain export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from planner.cli import JsonFlag
from planner.errors import InputError

__all__ = ["add_commands"]

PLAN = "finetune.yaml"
JOBS = ("lora", "finetune")


def finetune(
    plan: Annotated[str | None, typer.Argument(metavar="PLAN.yaml", help="A plan with job: finetune or lora; without it, that of --from.")] = None,
    start_from: Annotated[
        str | None, typer.Option("--from", metavar="DIR", help="Weights to start from: a run's folder, a checkpoint, or HF-layout safetensors.")
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE.jsonl", help="prompt/response, source/target, or question/answer.")] = None,
    valid: Annotated[str | None, typer.Option(metavar="FILE.jsonl", help="Held-out examples; without it, a twentieth of the others.")] = None,
    out: Annotated[str, typer.Option(metavar="RUN_DIR", help="Where to write.")] = "runs/finetune",
    job: Annotated[str | None, typer.Option(metavar="NAME", help="lora (default) or finetune, which trains all weights.")] = None,
    rank: Annotated[int | None, typer.Option(metavar="N", help="Of the adapters, with lora.", min=1)] = None,
    epochs: Annotated[float, typer.Option(metavar="N", help="Over the examples, where no number of steps is given.", min=0.01)] = 3.0,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Steps, instead of epochs.", min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option(metavar="RATE", help="Default: the run's own, a tenth of it for finetune.")] = None,
    patience: Annotated[int | None, typer.Option(metavar="N", help="Stop after N evaluations without a better one.", min=1)] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="FILE", help="tokenizer.json; default: the one beside the weights.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest good checkpoint of RUN_DIR.")] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A key of training:, e.g. packing=false.")] = None,
    max_restarts: Annotated[
        int | None, typer.Option("--max-restarts", metavar="N", help="Of a layout's processes when one dies; default 3.", min=0, max=1000)
    ] = None,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Write RUN_DIR/finetune.yaml, with its prediction, and stop.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train adapters or all weights on examples; plans the run first, as the planner does."""
    from planner.files import read_yaml, to_yaml, write_text
    from reftrain.cli_settings import training_changes
    from reftrain.cli_start import start
    from reftrain.config import load_run_config
    from reftrain.finetune import Choices, plan_finetune
    from reftrain.launch import is_worker

    if job is not None and job not in JOBS:
        raise InputError.single("--job", job, f"is {' or '.join(JOBS)}", "leave it out for lora")
    folder, file = Path(out), Path(out) / PLAN
    if is_worker():
        rule, fix = "plans a run, and torchrun has started several processes", f"add --plan-only, without torchrun; then torchrun ... run {file}"
        raise InputError.single("finetune", str(folder), rule, fix)
    given = {"valid_data": valid, "tokenizer": tokenizer, "patience_evals": patience, "learning_rate": learning_rate}
    changes = {**training_changes(settings, steps, data), **{key: value for key, value in given.items() if value is not None}}
    if resume and file.exists() and plan is None and start_from is None:
        made: dict[str, Any] = read_yaml(file)
        made["training"] = {**made["training"], **changes}
    else:
        made, said = plan_finetune(Choices(_path(plan), _path(start_from), job, rank, epochs, changes))  # type: ignore[arg-type]
        sys.stderr.write("".join(f"chosen: {text}\n" for text in said))
    _refuse_used(folder, made, resume)
    write_text(file, to_yaml(made))
    if plan_only:
        sys.stdout.write(f"written: {file}    run it: python -m reftrain run {file} --out {folder}\n")
        return
    arguments = ["run", str(file), "--out", str(folder), *(["--resume"] if resume else []), *(["--json"] if as_json else [])]
    start(load_run_config(file), folder, arguments, resume=resume, max_restarts=max_restarts, as_json=as_json)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _refuse_used(folder: Path, plan: dict[str, Any], resume: bool) -> None:
    from planner.plan import build_request
    from reftrain.config import make_run_config
    from reftrain.prepare_run import check_folder

    check_folder(make_run_config(build_request(plan)), folder, resume)
    folder.mkdir(parents=True, exist_ok=True)


def export(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="Folder that `run` or `finetune` wrote.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Where model.safetensors, config.json and tokenizer.json go.")],
    as_json: JsonFlag = False,
) -> None:
    """Write a run's weights in HF's layout, adapters merged in; of the best checkpoint where the run kept one."""
    from planner.files import to_json
    from reftrain.export_weights import export_run

    checkpoint = export_run(Path(run_dir), Path(out))
    if as_json:
        sys.stdout.write(to_json({"schema_version": 1, "run": run_dir, "checkpoint": str(checkpoint), "out": out}))
    else:
        sys.stdout.write(f"written: {out}, the weights of {checkpoint}\n")


def add_commands(app: typer.Typer) -> None:
    """Puts them under a command line."""
    app.command(epilog="Example: reftrain finetune --from runs/first --data quiz.jsonl --out runs/quiz --patience 3")(finetune)
    app.command(epilog="Example: reftrain export runs/quiz --out weights")(export)
