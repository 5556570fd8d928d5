"""Megatron-LM: options of pretrain_gpt.py as a bash array.

Source: Megatron core 0.19.2, megatron/training/arguments.py, checked by its own `parse_args` and `validate_args`.
"""

from __future__ import annotations

from typing import Any

from planner.exporters import EXPORTERS, Draft, Exporter, ExportJob, Program
from planner.exporters._megatron import cluster_environment, layout_options, model_options, training_options
from planner.exporters._text import shell_array, shell_env


def option_words(options: dict[str, Any]) -> list[str]:
    """`--name value` for each option; switches have no value, floats are written as Python writes them.

    Example:
        >>> option_words({"bf16": True, "lr": 3e-4})
        ['--bf16', '--lr', '0.0003']
    """
    return [word for name, value in options.items() for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]


class MegatronLm(Exporter):
    """`megatron_args.sh` defines MEGATRON_ARGS and the environment; `source` it."""

    name = "megatron-lm"
    kind = "trainer"
    versions = ("0.19.2",)
    summary = "Megatron-LM options as a bash array"
    leftover = "Megatron-LM has no such option"

    def write(self, job: ExportJob) -> Draft:
        """megatron_args.sh."""
        options = {**model_options(job), **layout_options(job), **training_options(job)}
        job.check()
        run_dir = job.placeholder("RUN_DIR", "folder for checkpoints, on storage that all nodes see")
        paths = {
            "data-path": job.placeholder("DATA_PATH", "prefix of the tokenized data (preprocess_data.py)"),
            "tokenizer-type": "HuggingFaceTokenizer",
            "tokenizer-model": job.placeholder("TOKENIZER", "name or folder of the tokenizer"),
            "save": run_dir,
            "load": run_dir,
        }
        if "training.data" in job.keys:
            job.drop("training.data", "is <DATA_PATH> here")
        words = option_words({**options, **paths})
        script = job.placeholder("MEGATRON_DIR", "folder of the Megatron-LM checkout") + "/pretrain_gpt.py"
        environment = cluster_environment(job)
        how = 'source megatron_args.sh; torchrun ... pretrain_gpt.py "${MEGATRON_ARGS[@]}"'
        text = job.header() + shell_env(environment) + shell_array("MEGATRON_ARGS", words)
        return Draft({"megatron_args.sh": text}, how, Program((script, *words), environment))


EXPORTERS.register("megatron-lm")(MegatronLm())
