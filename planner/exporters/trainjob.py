"""Kubeflow TrainJob on the runtime `torch-distributed`, which gives torchrun its options as PET_* variables.

Source: trainer.kubeflow.org/v1alpha1, API types and shipped runtimes of 2026-08-21 (read).
"""

from __future__ import annotations

from typing import Any

from planner.exporters import EXPORTERS, Draft, Exporter, ExportJob
from planner.exporters._kubernetes import RUNS_DIR, config_map, container, labels, mounts, volumes
from planner.exporters._launch import program_of
from planner.exporters._text import to_plain_yaml

RUNTIME = {"apiGroup": "trainer.kubeflow.org", "kind": "ClusterTrainingRuntime", "name": "torch-distributed"}
NODE = "node"
"""The replicated job and container of that runtime."""


class TrainJob(Exporter):
    """`trainjob.yaml`: a ConfigMap with the trainer's files, then the TrainJob."""

    name = "trainjob"
    kind = "launcher"
    versions = ("v1alpha1",)
    summary = "Kubeflow TrainJob"
    leftover = ""

    def write(self, job: ExportJob) -> Draft:
        """trainjob.yaml."""
        job.fills.setdefault("RUN_DIR", f"{RUNS_DIR}/{job.slug}")
        draft, program = program_of(job)
        job.read("cluster.num_devices")
        trainer: dict[str, Any] = container(job, NODE, ["torchrun"], program.words, program.env)
        trainer["resourcesPerNode"] = trainer.pop("resources")
        for key in ("name", "workingDir", "volumeMounts"):
            del trainer[key]
        trainer |= {"numNodes": job.num_nodes, "numProcPerNode": job.devices_per_node}
        pod = {"containers": [{"name": NODE, "workingDir": "/plan", "volumeMounts": mounts()}], "volumes": volumes(job)}
        patch = {"name": NODE, "template": {"spec": {"template": {"spec": pod}}}}
        document = {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainJob",
            "metadata": {"name": job.slug, "labels": labels(job)},
            "spec": {
                "runtimeRef": dict(RUNTIME),
                "trainer": trainer,
                "runtimePatches": [{"manager": "planner", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [patch]}}}}],
            },
        }
        text = job.header() + to_plain_yaml(config_map(job, draft.files), document)
        return Draft({"trainjob.yaml": text}, "kubectl apply -f trainjob.yaml")


EXPORTERS.register("trainjob")(TrainJob())
