"""Kubernetes JobSet: one indexed job, a pod per node, torchrun in each.

Source: jobset.x-k8s.io/v1alpha2, API types and shipped examples of 2026-08-18; Kueue's labels of 2026-08-22 (read).
"""

from __future__ import annotations

from typing import Any

from planner.exporters import EXPORTERS, Draft, Exporter, ExportJob
from planner.exporters._kubernetes import RUNS_DIR, config_map, container, labels, volumes
from planner.exporters._launch import program_of, torchrun_words
from planner.exporters._text import to_plain_yaml

WORKERS = "workers"
PORT = 29500
MAX_SET_RESTARTS = 10


class JobSet(Exporter):
    """`jobset.yaml`: a ConfigMap with the trainer's files, then the JobSet; it starts anew after a failure, and the run goes on."""

    name = "jobset"
    kind = "launcher"
    versions = ("v1alpha2",)
    summary = "Kubernetes JobSet"
    leftover = ""

    def write(self, job: ExportJob) -> Draft:
        """jobset.yaml."""
        job.fills.setdefault("RUN_DIR", f"{RUNS_DIR}/{job.slug}")
        draft, program = program_of(job)
        job.read("cluster.num_devices")
        head = f"{job.slug}-{WORKERS}-0-0.{job.slug}"
        command = torchrun_words(job, f"{head}:{PORT}" if job.num_nodes > 1 else None)
        pod: dict[str, Any] = {
            "restartPolicy": "Never",
            "containers": [container(job, "trainer", command, program.words, program.env)],
            "volumes": volumes(job),
        }
        worker = {"parallelism": job.num_nodes, "completions": job.num_nodes, "completionMode": "Indexed", "backoffLimit": 0}
        document = {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {"name": job.slug, "labels": labels(job)},
            "spec": {
                "network": {"enableDNSHostnames": True, "subdomain": job.slug},
                "failurePolicy": {"maxRestarts": MAX_SET_RESTARTS, "restartStrategy": "Recreate"},
                "replicatedJobs": [{"name": WORKERS, "replicas": 1, "template": {"spec": {**worker, "template": {"spec": pod}}}}],
            },
        }
        text = job.header() + to_plain_yaml(config_map(job, draft.files), document)
        return Draft({"jobset.yaml": text}, "kubectl apply -f jobset.yaml")


EXPORTERS.register("jobset")(JobSet())
