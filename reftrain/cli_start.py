"""From a run's configuration to its end: processes started where the layout wants several, progress shown, the summary told."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from reftrain.config import RunConfig

__all__ = ["start"]


def start(config: RunConfig, folder: Path, arguments: Sequence[str], *, resume: bool, max_restarts: int | None, as_json: bool) -> None:
    """Trains in this process, or in several that run `python -m reftrain ARGUMENTS`; exits with 130 where a signal ended the run."""
    from reftrain.launch import MAX_RESTARTS, is_restarted, is_worker, launch
    from reftrain.parallel import default_device
    from reftrain.prepare_run import check_folder
    from reftrain.progress import make_progress
    from reftrain.runnable import check_runnable
    from reftrain.train import RunOptions, train

    if not is_worker() and config.layout.num_devices > 1:
        check_runnable(config, default_device())  # once, and not by every process
        check_folder(config, folder, resume)
        raise typer.Exit(launch(arguments, folder, config.layout.num_devices, MAX_RESTARTS if max_restarts is None else max_restarts))
    progress, close = make_progress(config, is_quiet=as_json)
    try:
        summary = train(config, RunOptions(folder, resume=resume or is_restarted()), progress)
    finally:
        close()
    if summary.values:
        _report(summary.values, folder, as_json)
        if not summary.values["is_complete"]:
            raise typer.Exit(130)


def _report(values: dict[str, Any], folder: Path, as_json: bool) -> None:
    from planner.files import to_json
    from reftrain.progress import render_summary

    sys.stdout.write(to_json(values) if as_json else render_summary(values, folder))
