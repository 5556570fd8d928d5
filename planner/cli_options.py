"""The options that say what to train and on what, shared by all commands that take a request."""

from __future__ import annotations

import inspect
import shutil
import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from planner.errors import InputError

__all__ = ["JsonFlag", "number_of", "read_request", "show_progress", "takes_request", "terminal_width"]

JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
OPTIONS: dict[str, tuple[str, str]] = {
    "model": ("NAME", "Preset, or path to an HF config.json."),
    "accelerator": ("NAME", "Name in `planner catalog accelerators`."),
    "num_devices": ("N", "Devices in all."),
    "tokens": ("N", "Training tokens, e.g. 15T."),
    "seq_len": ("N", "Tokens per sequence."),
    "global_batch_size": ("N", "Sequences per step."),
    "precision": ("NAME", "fp32, tf32, fp16, bf16, fp8, mxfp8 or nvfp4."),
    "optimizer": ("NAME", "adamw, sgd, sgd_momentum, adafactor, adamw_8bit or muon."),
    "recompute": ("NAME", "none, selective or full."),
    "job": ("NAME", "pretrain, finetune or lora."),
    "lora_rank": ("N", "Rank of the adapters, with --job lora."),
    "attention_kernel": ("NAME", "auto, flash or unfused."),
    "loss_kernel": ("NAME", "auto, fused, compiled, vocab_parallel, unfused or chunked."),
    "offer": ("NAME", "Cloud offer, e.g. aws/p5.48xlarge."),
    "pricing": ("NAME", "on_demand, spot, reserved_1y or reserved_3y."),
    "price": ("USD", "Dollars per device-hour, instead of the catalog's."),
    "node_size": ("N", "Devices per node."),
    "network": ("RATE", "Between nodes, per node and direction, e.g. 400GB/s."),
    "domain_size": ("N", "Devices per scale-up domain (NVLink domain, TPU slice)."),
    "stack": ("NAME", "Software stack, or path to a stack file."),
    "catalog": ("FILE", "Own accelerators and offers."),
    "dp_replicate": ("N", "Copies of the sharded model, or plain data parallelism."),
    "dp_shard": ("N", "Data-parallel ranks over which ZeRO shards."),
    "tp": ("N", "Tensor parallel degree."),
    "cp": ("N", "Context parallel degree."),
    "pp": ("N", "Pipeline stages."),
    "num_virtual_stages": ("N", "Model chunks per pipeline rank."),
    "schedule": ("NAME", "1f1b, interleaved_1f1b, gpipe, zb_h1 or dualpipe."),
    "ep": ("N", "Expert parallel degree."),
    "zero_stage": ("N", "0, 1, 2 or 3."),
    "sequence_parallel": ("true|false", ""),
    "micro_batch_size": ("N", "Sequences per microbatch and data-parallel rank."),
}
"""Option -> (what its value looks like, help). All are text; `planner.options` knows where in a plan they belong."""


def takes_request(command: Callable[..., None]) -> Callable[..., None]:
    """A command `f(plan, given, ...)` with a plan file as argument and `OPTIONS` as options, of which those given come as one mapping.

    The command's own options go before those of the same name here.
    """
    own = [parameter for name, parameter in inspect.signature(command, eval_str=True).parameters.items() if name not in ("plan", "given")]
    taken = {parameter.name for parameter in own}
    plan = Annotated[str | None, typer.Argument(metavar="[PLAN.yaml]", help="A plan file; options below change it.")]
    shared = [_parameter(name, Annotated[str | None, typer.Option(metavar=m, help=text)]) for name, (m, text) in OPTIONS.items() if name not in taken]

    @wraps(command)
    def run(**values: Any) -> None:
        given = {name: values.pop(name) for name in OPTIONS if name not in taken}
        command(values.pop("plan"), {name: text for name, text in given.items() if text is not None}, **values)

    parameters = [_parameter("plan", plan), *shared, *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def read_request(path: str | None, given: dict[str, str]) -> Any:
    """The plan file with the options put in, as a Request."""
    from planner.options import put_options
    from planner.plan import build_request, read_plan_file

    if path is None and not given:
        raise InputError.single("model", None, "is required", "name a plan file, or use --model, --accelerator and --num-devices")
    values = {} if path is None else read_plan_file(path)
    where = path or "command line"
    if not isinstance(values, dict):
        return build_request(values, where)
    return build_request(put_options(values, given), where)


def number_of(text: str | None, key: str) -> float | None:
    """The number in an option's text, e.g. 100k; None where the option is not given."""
    from planner.units import parse_count

    return None if text is None else parse_count(text, key)


def terminal_width() -> int:
    """Columns to write in."""
    return shutil.get_terminal_size((80, 24)).columns


def show_progress(done: int, total: int, what: str = "") -> None:
    """How far long work is, on standard error, for people who watch; the line goes when all is done."""
    if sys.stderr.isatty():
        sys.stderr.write("\r" + " " * 40 + "\r" if done == total else f"\r{done:,} of {total:,} {what}".rstrip())
        sys.stderr.flush()
