"""The project's own trainer: the plan file is its configuration, complete and with nothing of this machine in it."""

from __future__ import annotations

from typing import Any

from planner.architectures import preset_names
from planner.exporters import EXPORTERS, Draft, Exporter, ExportJob, Program
from planner.files import to_yaml

SHIPPED_DATA = ("corpus", "synthetic")


class Reftrain(Exporter):
    """`plan.yaml`, which `python -m reftrain run` takes as it is.

    A model that lies in a file is written into the plan, and a folder of data becomes a placeholder, so that no path of this
    machine goes along.
    """

    name = "reftrain"
    kind = "trainer"
    versions = ("0.1",)
    summary = "reftrain: the plan file itself"
    leftover = "a file on this machine, which the run does not need"

    def write(self, job: ExportJob) -> Draft:
        """plan.yaml."""
        job.read_all()
        values: dict[str, Any] = dict(job.plan.inputs)
        if "catalog" in values:
            del values["catalog"]
            job.drop("catalog", self.leftover)
        if not isinstance(values["model"], str) or values["model"] not in preset_names():
            values["model"] = {"name": job.model_name, **{key: value for key, value in job.config.items() if key != "_name_or_path"}}
        if "/" in str(values["stack"]) or str(values["stack"]).endswith((".yaml", ".yml")):
            del values["stack"]
            job.drop("stack", self.leftover)
        training = dict(values.get("training") or {})
        for key, meaning in (("data", "folder that `reftrain data prepare` wrote"), ("init_from", "folder with the weights to start from")):
            if training.get(key) is not None and training[key] not in SHIPPED_DATA:
                training[key] = job.placeholder("DATA_DIR" if key == "data" else "INIT_DIR", meaning)
        if training:
            values["training"] = training
        out = job.placeholder("RUN_DIR", "folder for the run, on storage that all nodes see")
        words = ("-m", "reftrain", "run", "plan.yaml", "--out", out, "--resume")
        prediction = {name: part for name, part in job.plan.to_dict().items() if name in ("memory", "time", "cost", "loss")}
        prediction["memory"] = {name: part for name, part in prediction["memory"].items() if name != "stages"}
        text = job.header() + to_yaml({**values, "prediction": prediction, "provenance": job.plan.provenance})
        return Draft({"plan.yaml": text}, "python -m reftrain run plan.yaml --out RUN_DIR --resume", Program(words))


EXPORTERS.register("reftrain")(Reftrain())
