"""SkyPilot: a task in YAML, for `sky launch` or, with restarts, `sky jobs launch`.

Source: SkyPilot 0.14.1, sky/utils/schemas.py, checked by its own JSON schema, which refuses unknown keys.
"""

from __future__ import annotations

from typing import Any

from planner.exporters import EXPORTERS, Draft, Exporter, ExportJob
from planner.exporters._job import FREE_TEXT
from planner.exporters._launch import MAX_RESTARTS, program_of, torchrun_words
from planner.exporters._text import ShellText, shell_array, shell_env, shell_words, to_plain_yaml

ACCELERATORS = {
    "v100-16gb-sxm2": "V100", "v100-32gb-sxm2": "V100-32GB", "t4": "T4", "a10": "A10", "a10g": "A10G", "l4": "L4", "l40s": "L40S",
    "a100-40gb-sxm": "A100", "a100-80gb-sxm": "A100-80GB", "h100-80gb-sxm": "H100", "h200-141gb-sxm": "H200", "gh200-96gb": "GH200",
    "b200-sxm": "B200", "b300-sxm": "B300", "mi300x": "MI300X",
}  # fmt: skip
"""Catalog id -> SkyPilot's name."""
CLOUDS = {"aws": "aws", "gcp": "gcp", "azure": "azure", "oci": "oci", "lambda": "lambda", "nebius": "nebius", "runpod": "runpod"}
PORT = 29500


class SkyPilot(Exporter):
    """`task.yaml`; the folder with it and the trainer's files is the task's workdir."""

    name = "skypilot"
    kind = "launcher"
    versions = ("0.14.1",)
    summary = "SkyPilot task YAML"
    leftover = ""

    def write(self, job: ExportJob) -> Draft:
        """task.yaml beside the trainer's files."""
        draft, program = program_of(job)
        job.read("cluster.num_devices")
        task: dict[str, Any] = {
            "name": job.slug,
            "workdir": ".",
            "num_nodes": job.num_nodes,
            "resources": _resources(job),
        }
        setup = job.optional("SETUP_COMMAND", "command that installs the trainer on every node", FREE_TEXT)
        task |= {"setup": setup + "\n"} if setup else {}
        task["run"] = _script(job, program.words, program.env)
        text = job.header() + to_plain_yaml(task)
        return Draft({**draft.files, "task.yaml": text}, "sky jobs launch task.yaml")


def _resources(job: ExportJob) -> dict[str, Any]:
    device, offer = job.cluster.accelerator, job.cluster.offer
    job.read("cluster.accelerator")
    name = ACCELERATORS.get(device.id) or job.placeholder("ACCELERATOR", f"SkyPilot's name of {device.id}, see sky gpus list")
    found: dict[str, Any] = {"accelerators": f"{name}:{job.devices_per_node}"}
    if offer is not None and offer.provider.lower() in CLOUDS:
        job.read("cluster.offer")
        found["infra"] = CLOUDS[offer.provider.lower()] + (f"/{offer.region}" if offer.region else "")
        if job.devices_per_node == offer.devices_per_instance:
            found["instance_type"] = offer.instance_type
    pricing = job.keys.get("cluster.pricing")
    if pricing in ("spot", "on_demand"):
        job.read("cluster.pricing")
    found["use_spot"] = pricing == "spot"
    if job.num_nodes > 1:
        found["network_tier"] = "best"
    found["job_recovery"] = {"strategy": "FAILOVER", "max_restarts_on_errors": MAX_RESTARTS}
    image = job.optional("IMAGE", "container image with the trainer")
    return found | ({"image_id": f"docker:{image}"} if image else {})


def _script(job: ExportJob, words: tuple[str, ...], env: Any) -> str:
    rank_words = torchrun_words(job, ShellText(f'"$head:{PORT}"'))
    return (
        'set -euo pipefail\nmapfile -t hosts <<< "$SKYPILOT_NODE_IPS"\nhead="${hosts[0]}"\n'
        + shell_env(env) + shell_array("program", words) + shell_words([*rank_words, ShellText('"${program[@]}"')]) + "\n"
    )  # fmt: skip


EXPORTERS.register("skypilot")(SkyPilot())
