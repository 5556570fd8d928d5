"""Slurm. Options: sbatch(1) of Slurm 22.05 to 25.05; the shape of the batch scripts shipped with torchtitan and Megatron-Bridge."""

from __future__ import annotations

import math

from planner.exporters import EXPORTERS, Draft, Exporter, ExportJob
from planner.exporters._job import WORD
from planner.exporters._launch import program_of, torchrun_words
from planner.exporters._text import ShellText, shell_array, shell_env, shell_words
from planner.units import format_duration

START_S = 1800
"""For containers, imports, compilation, and loading of the checkpoint: the predicted duration has none of it."""
STOP_AHEAD_S = 120
"""SIGTERM so long before the time limit: time to write a checkpoint."""


def slurm_time(seconds: float) -> str:
    """D-HH:MM:SS, rounded up to a minute.

    Example:
        >>> slurm_time(90061)
        '1-01:02:00'
    """
    minutes = max(math.ceil(seconds / 60), 1)
    return f"{minutes // 1440}-{minutes % 1440 // 60:02d}:{minutes % 60:02d}:00"


class Slurm(Exporter):
    """`run.sbatch`: one torchrun per node, the first node as rendezvous; requeued and resumed after a failure."""

    name = "slurm"
    kind = "launcher"
    versions = ("25.05", "24.11", "23.11", "22.05")
    summary = "Slurm batch script"
    leftover = ""

    def write(self, job: ExportJob) -> Draft:
        """run.sbatch beside the trainer's files."""
        draft, program = program_of(job)
        job.read("cluster.num_devices")
        gpus = [f"gpus-per-node={job.devices_per_node}"] if job.cluster.accelerator.kind == "gpu" else [f"cpus-per-task={job.devices_per_node}"]
        limit_s = job.plan.time.train_s.high + START_S
        options = [
            f"job-name={job.slug}",
            f"nodes={job.num_nodes}",
            "ntasks-per-node=1",
            *gpus,
            "exclusive",
            f"time={slurm_time(limit_s)}",
            f"account={job.placeholder('ACCOUNT', 'Slurm account', WORD)}",
            f"partition={job.placeholder('PARTITION', 'Slurm partition', WORD)}",
            "output=%x_%j.out",
            "open-mode=append",
            "requeue",
            f"signal=TERM@{STOP_AHEAD_S}",
        ]
        job.note(f"--time is {format_duration(limit_s)}: the 90th percentile of the predicted duration and half an hour; submit again to go on")
        launch = shell_words(["srun", *torchrun_words(job, ShellText('"${hosts[0]}:$port"'), ShellText('"$SLURM_JOB_ID"'))])
        text = (
            "#!/usr/bin/env bash\n" + job.header() + "# --time: 90th percentile of the predicted duration, and half an hour to start.\n"
            + "".join(f"#SBATCH --{option}\n" for option in options)
            + 'set -euo pipefail\ncd "$SLURM_SUBMIT_DIR"\n'
            + 'mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")\n'
            + "port=$((20000 + SLURM_JOB_ID % 10000))\n"
            + shell_env(program.env) + shell_array("program", program.words)
            + launch + ' "${program[@]}"\n'
        )  # fmt: skip
        return Draft({**draft.files, "run.sbatch": text}, "sbatch run.sbatch")


EXPORTERS.register("slurm")(Slurm())
