"""Measures this machine into an accelerator and a stack that the planner prices like any other.

In: names of precisions and numbers of processes. Out: two files under `planner.files.user_dir()`: `catalog.yaml` (one accelerator per
number of processes that share the machine) and `stacks/NAME.yaml` (their curves).
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from planner.coefficients import TERMS
from planner.curves import Curve, MatmulGrid
from planner.errors import InputError
from planner.files import DATA_DIR, parse_json, read_yaml, to_json, to_yaml, user_dir, write_text
from planner.op_cost import Numerics, Shard
from planner.ops import Elementwise, Norm
from planner.plan import build_request
from reftrain.bench_ops import FULL, QUICK, bench_attention, bench_collectives, bench_matmuls, bench_ops, seconds_per_call
from reftrain.config import RunConfig, make_run_config
from reftrain.data import SyntheticDataset
from reftrain.host_memory import keep_freed_memory
from reftrain.optim import learning_rate, local_gradients, local_squared_norm, make_optimizers, scale_gradients
from reftrain.parallel import Ranks, default_device
from reftrain.steps import Engine, StepTimes

__all__ = ["bench_device", "measure_here"]

OPTIMIZER_PARAMS = tuple(2**power for power in (12, 15, 18, 20, 22, 24))
OPTIMIZER_BYTES_PER_PARAM = 36.0
"""What `planner.timing.optimizer_bytes` counts for AdamW in fp32: two reads of the gradient, master and states both ways, the new weight."""
TINY = 64
USABLE_MEMORY_FRACTION = 0.9


def bench_device(
    name: str, precisions: Sequence[str], processes: Sequence[int], say: Callable[[str], None] = lambda text: None, *, is_quick: bool = False
) -> tuple[Path, Path]:
    """Measures with each number of processes at once, and writes catalog and stack; returns their paths.

    Raises:
        InputError: more processes than cores or GPUs, or a folder that cannot be written.
    """
    measured = {}
    for count in processes:
        say(f"measuring with {count} process{'es' if count > 1 else ''} at work: {', '.join(precisions)}")
        measured[count] = _measure_with(count, precisions, is_quick)
    return _write(name, measured)


def _measure_with(count: int, precisions: Sequence[str], is_quick: bool) -> dict[str, Any]:
    """Runs `measure_here` in `count` processes of their own, all at work at once; the answer is rank 0's."""
    cores = os.cpu_count() or 1
    devices = torch.cuda.device_count() if torch.cuda.is_available() else cores
    if count > devices:
        raise InputError.single("--processes", count, f"this machine has {devices} devices to share out", f"use {devices} or fewer")
    code = f"from reftrain.bench_device import measure_here; measure_here({list(precisions)!r}, {is_quick})"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "--no-python"]
    command = [*(torchrun if count > 1 else []), sys.executable, "-c", code]
    env = {**({"OMP_NUM_THREADS": str(max(cores // count, 1))} if count > 1 else {}), **os.environ}  # the threads that a run would have
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"the measuring processes ended with status {done.returncode}")
    found: dict[str, Any] = parse_json(lines[-1])
    return found


def measure_here(precisions: Sequence[str], is_quick: bool = False) -> None:
    """Measures in this process (and its peers under torchrun); rank 0 prints one JSON object."""
    device = default_device()
    if device.type == "cpu":
        keep_freed_memory()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    tick, grid = _ticker(), QUICK if is_quick else FULL
    curves: dict[str, Any] = {
        "matmul": bench_matmuls(grid, precisions, device, tick),
        "attention": bench_attention(grid, precisions, device, tick),
        "ops": bench_ops(grid, precisions, device, tick) | _bench_optimizers(device),
    }
    collectives = bench_collectives(device, tick)
    world = dist.get_world_size() if dist.is_initialized() else 1
    if dist.is_initialized():
        dist.destroy_process_group()  # the overheads below are those of one process
    curves |= _bench_overheads(curves, device)
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stdout.write("\n" + to_json({"curves": curves, "collectives": collectives, **_facts(curves, device, world)}).replace("\n", " ") + "\n")


def _ticker() -> Callable[[], None]:
    is_first, count = os.environ.get("RANK", "0") == "0", [0]

    def tick() -> None:
        count[0] += 1
        if is_first and sys.stderr.isatty():
            sys.stderr.write(f"\r  {count[0]} sizes measured")

    return tick


def _tiny_config(num_layers: int) -> RunConfig:
    model = {
        "model_type": "llama", "hidden_size": TINY, "intermediate_size": TINY, "num_hidden_layers": num_layers, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": TINY, "max_position_embeddings": 32,
    }  # fmt: skip
    workload = {"seq_len": 32, "global_batch_size": 1, "precision": "fp32"}
    return make_run_config(build_request({"model": model, "workload": workload, "cluster": {"accelerator": "none", "num_devices": 1}}))


def _bench_overheads(curves: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Host time that no op accounts for: the step of a tiny model, less its ops as measured alone."""
    few, many = 2, 10
    small, large = (_tiny_step_s(num_layers, device) for num_layers in (few, many))
    per_block = (large - small) / (many - few)
    b = Numerics(compute_bytes=4, fused_activation=False)
    rows = Shard(1, 32)
    norm, add = Norm(name="n", width=TINY).cost(rows, b), Elementwise(name="add", reads=2 * TINY, writes=TINY).cost(rows, b)
    act = Elementwise(name="activation", reads=2 * TINY, writes=TINY, num_between=TINY).cost(rows, b)
    rope = Elementwise(name="rope", reads=2 * TINY, writes=2 * TINY).cost(rows, b)
    ops = 0.0
    for key, cost, count in (("rmsnorm", norm, 2), ("residual", add, 2), ("gated_activation", act, 1), ("rope", rope, 1)):
        for phase, size in (("forward", cost.forward_bytes), ("backward_input", cost.backward_bytes)):
            ops += count * float(Curve(**curves["ops"][f"{key}/{phase}/fp32"]).at(float(size)))
    for phase in ("forward", "backward_input", "backward_weight"):
        ops += 7 * float(MatmulGrid(**curves["matmul"][f"{phase}/fp32"]).at(32.0, float(TINY), float(TINY)))
    for phase in ("forward", "backward"):
        ops += 2 * float(Curve(**curves["attention"][f"{phase}/fp32/32"]).at(32.0))
    optimizer = float(Curve(**curves["ops"]["optimizer/adamw"]).at(1.0))
    num_passes = 2 * (2 + 2 + 1 + 1 + 7 + 1)  # norms, sums, activation, rotation, matmuls, attention; forward and backward
    return {"op_overhead_s": max(per_block - ops, 0.0) / num_passes, "step_overhead_s": max(small - few * per_block - optimizer, 0.0)}


def _tiny_step_s(num_layers: int, device: torch.device) -> float:
    config = _tiny_config(num_layers)
    engine = Engine(config, Ranks(config.layout, device))
    windows = torch.from_numpy(SyntheticDataset(TINY, 0).sequences(0, 1, 32, 0)).to(device)
    batch = [(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())]

    def step(_i: int) -> None:
        _, norm = engine.agree(engine.forward_backward(batch, StepTimes()))
        engine.update(0, norm)

    return seconds_per_call(step, device, least_s=0.1)


def _bench_optimizers(device: torch.device) -> dict[str, dict[str, Any]]:
    """Seconds of norm, clipping and update by the bytes that the planner counts, for AdamW."""
    config, seconds = _tiny_config(1), []
    for num_params in OPTIMIZER_PARAMS:
        part = torch.nn.ParameterList(
            [torch.nn.Parameter(torch.randn(min(num_params, 2**18), device=device)) for _ in range(max(num_params // 2**18, 1))]
        )
        optimizers = make_optimizers([part], config)
        for parameter in part:
            parameter.grad = torch.randn_like(parameter)

        def update(_i: int, part: Any = part, optimizers: Any = optimizers) -> None:
            pairs = local_gradients([part])
            float(local_squared_norm(pairs, 1))
            scale_gradients(pairs, 0.999)
            for group in optimizers[0].param_groups:
                group["lr"] = learning_rate(0, 10, 1, config.training)
            optimizers[0].step()

        seconds.append(seconds_per_call(update, device))
    return {"optimizer/adamw": {"sizes": [n * OPTIMIZER_BYTES_PER_PARAM for n in OPTIMIZER_PARAMS], "seconds": seconds}}


def _facts(curves: dict[str, Any], device: torch.device, world: int) -> dict[str, Any]:
    """Best rates seen, which the catalog entry states as the device's peaks, and the memory that one process may use."""
    peaks = {}
    for key, grid in curves["matmul"].items():
        phase, name = key.split("/")
        if phase == "forward":
            flops = [2.0 * m * n * k for m in grid["m"] for n in grid["n"] for k in grid["k"]]
            peaks[name] = max(f / s for f, s in zip(flops, grid["seconds"], strict=True))
    residual = curves["ops"]["residual/forward/fp32"]
    if device.type == "cuda":
        memory = float(torch.cuda.get_device_properties(device).total_memory)
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * USABLE_MEMORY_FRACTION / world
    return {
        "peaks": peaks, "memory_bandwidth": residual["sizes"][-1] / residual["seconds"][-1], "memory": memory, "num_processes": world,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "num_threads": torch.get_num_threads(), "torch": torch.__version__, "kind": "gpu" if device.type == "cuda" else "cpu",
    }  # fmt: skip


def _write(name: str, measured: dict[int, dict[str, Any]]) -> tuple[Path, Path]:
    """Puts the measurements into the user's catalog and stacks, beside what is there already."""
    home, today = user_dir(), datetime.date.today().isoformat()
    catalog_path, stack_path = home / "catalog.yaml", home / "stacks" / f"{name}.yaml"
    ids = {count: name if count == 1 else f"{name}-x{count}" for count in measured}
    try:
        stack_path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError.single("LLM_PLANNER_HOME", str(home), f"cannot be made ({error.strerror})", "name a folder that can be written") from None
    catalog = read_yaml(catalog_path) if catalog_path.is_file() else {}
    entries = catalog.setdefault("accelerators", {})
    for count, found in measured.items():
        entries[ids[count]] = _accelerator(name, found, ids, count, today)
    write_text(catalog_path, to_yaml(catalog))
    stack = read_yaml(DATA_DIR / "stacks" / "reftrain.yaml")
    source = f"measured by reftrain bench-device on {today}"
    one_spread = {"evidence": "assumed", "source": "no runs on this machine were compared yet: planner calibrate RUN..."}
    one = {"value": 1.0, "evidence": "measured", "source": source}
    # The curves were taken op by op in a running model: what the host does and what messages wait is in them.
    rates = ("matmul", "attention", "memory", "optimizer", "scale_up")
    inside = ("launch", "block_host", "tensor_parallel_host", "expert_host", "kernel_gap", "sync", "step_overhead", "contention", "straggling")
    included = {"value": 0.0, "evidence": "measured", "source": f"in the curves {source}"}
    shared = {"value": 0.0, "evidence": "assumed", "source": "processes share the cores that compute"}
    serial = {term: shared for term in TERMS if term.endswith("_overlap")}
    stack |= {
        "name": name, "description": f"reftrain on this machine ({name})", "source": source, "date": today,
        "coefficients": {**dict.fromkeys(rates, one), **dict.fromkeys(inside, included), **serial},
        "context": "1 B", "collective_buffers": "1 B", "allocator_slack_fraction": 0.0, "time_interval": {**one_spread, "low": 0.8, "high": 1.25},
        "memory_interval": {**one_spread, "low": 0.9, "high": 1.1},
        "measured": {ids[count]: {"source": source, "date": today, "num_processes": count, **found["curves"]} for count, found in measured.items()},
    }  # fmt: skip
    write_text(stack_path, to_yaml(stack))
    return catalog_path, stack_path


def _accelerator(name: str, found: dict[str, Any], ids: dict[int, str], count: int, today: str) -> dict[str, Any]:
    source = f"measured by reftrain bench-device on {today}: {found['device']}, {found['num_threads']} threads, torch {found['torch']}"
    bandwidth = f"{found['memory_bandwidth']!r} B/s"
    others = {str(n): other for n, other in ids.items()} if count == min(ids) else {}
    return {
        "vendor": "this machine",
        "name": f"{found['device']}, {count} process{'es' if count > 1 else ''}", "kind": found["kind"], "form_factor": "host",
        "memory": f"{found['memory']!r} B", "memory_bandwidth": bandwidth, "dense_flops": {k: f"{v!r} FLOP/s" for k, v in found["peaks"].items()},
        "typical_node_size": count, "year": int(today[:4]), "stack": name, **({"variants": others} if others else {}),
        "scale_up": {
            "name": "between processes of this machine", "kind": "switch", "bandwidth": bandwidth, "peer_bandwidth": bandwidth, "domain_size": count,
            "ring_efficiency_fraction": 1.0, "latency": "50 us", "curves": found["collectives"], "evidence": "measured", "source": source,
        },
        "confidence": "high", "source": source, "date": today,
    }  # fmt: skip
