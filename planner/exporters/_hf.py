"""The model as Hugging Face's config.json, which several targets want beside their own files."""

from __future__ import annotations

from typing import Any

from planner.exporters._job import ExportJob
from planner.files import to_json

__all__ = ["AUTO_CLASSES", "hf_config"]

AUTO_CLASSES = {"bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}
"""model_type -> class that builds it; AutoModelForCausalLM for all others."""
OWN_KEYS = {"name", "_name_or_path"}


def hf_config(job: ExportJob) -> str:
    """config.json: every key that the plan's model has, and no other; transformers fills in its defaults."""
    job.read_all("model.")
    config: dict[str, Any] = {key: value for key, value in job.config.items() if key not in OWN_KEYS}  # null may mean another thing than absent
    if "rope_theta" not in config and "rope_parameters" not in config and job.model.position == "rope":
        job.note("the plan has no rope_theta: the default of the model's class applies")
    return to_json(config)
