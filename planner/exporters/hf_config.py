"""The model alone: config.json in Hugging Face's layout, read by AutoConfig. Source: transformers 5.23.0."""

from __future__ import annotations

from planner.exporters import EXPORTERS, Draft, Exporter, ExportJob
from planner.exporters._hf import AUTO_CLASSES, hf_config


class HfConfig(Exporter):
    """`config.json`."""

    name = "hf-config"
    kind = "model"
    versions = ("5.23",)
    summary = "config.json of the model for transformers"
    leftover = "a model's config.json holds no run"

    def write(self, job: ExportJob) -> Draft:
        """config.json."""
        text = hf_config(job)
        factory = AUTO_CLASSES.get(str(job.config["model_type"]), "AutoModelForCausalLM")
        return Draft({"config.json": text}, f"{factory}.from_config(AutoConfig.from_pretrained('.'))")


EXPORTERS.register("hf-config")(HfConfig())
