"""What the Kubernetes targets share: the container, its volumes, and the ConfigMap with the trainer's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from planner.exporters._job import ExportJob

__all__ = ["FILES_DIR", "RUNS_DIR", "config_map", "container", "escaped", "labels", "volumes"]

FILES_DIR, RUNS_DIR = "/plan", "/runs"
DNS_NAME = r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?"
"""RFC 1123."""
IMAGE = r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,250}"
RESOURCES = {"nvidia": "nvidia.com/gpu", "amd": "amd.com/gpu", "google": "google.com/tpu", "aws": "aws.amazon.com/neuron", "intel": "habana.ai/gaudi"}
"""Vendor -> the extended resource of its device plugin."""


def escaped(words: Sequence[str]) -> list[str]:
    """Words for `args`, in which Kubernetes would expand `$(NAME)`.

    Example:
        >>> escaped(["$(HOME)", "x"])
        ['$$(HOME)', 'x']
    """
    return [word.replace("$(", "$$(") for word in words]


def labels(job: ExportJob) -> dict[str, str]:
    """Labels of the job: Kueue's queue, where the user names one."""
    queue = job.optional("KUEUE_QUEUE", "Kueue's local queue", DNS_NAME)
    return {"app.kubernetes.io/name": job.slug} | ({"kueue.x-k8s.io/queue-name": queue} if queue else {})


def resources(job: ExportJob) -> dict[str, Any]:
    """Devices of one pod, all of a node's."""
    device = job.cluster.accelerator
    key = RESOURCES.get(device.vendor.lower().split()[0])
    amount = {key: job.devices_per_node} if key and device.kind != "cpu" else {"cpu": job.devices_per_node}
    return {"limits": amount, "requests": dict(amount)}


def config_map(job: ExportJob, files: Mapping[str, str]) -> dict[str, Any]:
    """The trainer's files, as Kubernetes hands them to every pod."""
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{job.slug}-files"}, "data": dict(files)}


def volumes(job: ExportJob) -> list[dict[str, Any]]:
    """The files, shared storage for checkpoints, and shared memory for the collectives."""
    claim = job.placeholder("PVC", "PersistentVolumeClaim that all pods may write (ReadWriteMany)", DNS_NAME)
    return [
        {"name": "files", "configMap": {"name": f"{job.slug}-files"}},
        {"name": "runs", "persistentVolumeClaim": {"claimName": claim}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]


def mounts() -> list[dict[str, Any]]:
    """Where they appear."""
    return [{"name": "files", "mountPath": FILES_DIR}, {"name": "runs", "mountPath": RUNS_DIR}, {"name": "shm", "mountPath": "/dev/shm"}]


def container(job: ExportJob, name: str, command: Sequence[str], args: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
    """One pod's container. `command` is this project's own; `args` may hold anything and are escaped."""
    return {
        "name": name,
        "image": job.placeholder("IMAGE", "container image with the trainer", IMAGE),
        "workingDir": FILES_DIR,
        "command": list(command),
        "args": escaped(args),
        "env": [{"name": key, "value": value.replace("$(", "$$(")} for key, value in env.items()],
        "resources": resources(job),
        "volumeMounts": mounts(),
    }
