"""torchrun, started by hand or by any tool on every node. Options: PyTorch's torch.distributed.run."""

from __future__ import annotations

from planner.exporters import EXPORTERS, Draft, Exporter, ExportJob
from planner.exporters._launch import program_of, torchrun_words
from planner.exporters._text import ShellText, shell_array, shell_env, shell_words


class Torchrun(Exporter):
    """`run.sh`: one command, the same on every node."""

    name = "torchrun"
    kind = "launcher"
    versions = ("2.13",)
    summary = "torchrun script, started on every node"
    leftover = ""

    def write(self, job: ExportJob) -> Draft:
        """run.sh beside the trainer's files."""
        draft, program = program_of(job)
        job.read("cluster.num_devices")
        if job.num_nodes > 1:
            need = ': "${HEAD_NODE:?name or address of the first node, the same on all nodes}"\n'
            words = torchrun_words(job, ShellText('"$HEAD_NODE:${PORT:-29500}"'))
            how = "on every node: HEAD_NODE=NAME_OF_FIRST_NODE bash run.sh"
        else:
            need, words, how = "", torchrun_words(job, None), "bash run.sh"
        text = (
            "#!/usr/bin/env bash\n" + job.header() + "set -euo pipefail\n" + need + 'cd "$(dirname "${BASH_SOURCE[0]}")"\n'
            + shell_env(program.env) + shell_array("program", program.words)
            + "exec " + shell_words([*words, ShellText('"${program[@]}"')]) + "\n"
        )  # fmt: skip
        return Draft({**draft.files, "run.sh": text}, how)


EXPORTERS.register("torchrun")(Torchrun())
