"""Seconds of the trainer's own ops on this device, one by one, at sizes from a call's cost to a full memory system.

Sizes of memory-bound ops are the bytes that the planner's op vocabulary gives them, so that both speak of the same thing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from planner.loss_op import Loss
from planner.op_cost import Numerics, Op, Shard
from planner.ops import Elementwise, Embedding, Norm
from reftrain.axes import all_gather, all_reduce, reduce_scatter
from reftrain.kernels import chunk_loss, rms_norm, rotate

__all__ = ["FULL", "QUICK", "Grid", "bench_attention", "bench_collectives", "bench_matmuls", "bench_ops", "seconds_per_call"]

MOST_FLOPS = 3e9
"""Of one timed matmul; larger ones take time in proportion."""
OP_WIDTH = 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MESSAGE_BYTES = tuple(2**power for power in (8, 12, 15, 17, 19, 21, 23, 25))
WORK_WIDTH = 256
"""Of the matmul between two collectives: some 0.3 ms."""
LEAST_S = 1e-6
POOL_BYTES = 48 * 2**20
"""Inputs rotate through so many bytes, because in a model they were not touched a moment ago."""


@dataclass(frozen=True)
class Grid:
    """The sizes that are measured."""

    rows: tuple[int, ...] = (32, 256, 2048)
    widths: tuple[int, ...] = (64, 256, 1024, 4096)
    seq_lens: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)
    head_dims: tuple[int, ...] = (32, 64, 128)
    elements: tuple[int, ...] = tuple(2**power for power in (10, 13, 15, 17, 19, 21, 23, 24))


FULL = Grid()
QUICK = Grid((32, 256, 2048), (64, 256, 1024), (32, 128, 256), (32,), tuple(2**power for power in (10, 14, 17, 20, 22)))


def seconds_per_call(call: Callable[[int], Any], device: torch.device, least_s: float = 0.006, repeats: int = 5) -> float:
    """Lower quartile over `repeats` of the mean seconds of `call(i)`, each over at least `least_s`; all processes work at once.

    The lower quartile, because whatever else the machine does can only add. Results stay alive for a while, as the tensors that a
    step saves for its backward pass do: each call writes to memory that no cache holds.
    """
    first = call(0)
    kept: list[Any] = [None] * _num_cold(first)
    start = time.perf_counter()
    call(1)
    _finish(device)
    once = max(time.perf_counter() - start, 1e-7)
    count = max(int(least_s / once), 1)
    found = []
    for _ in range(repeats):
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        for i in range(count):
            kept[i % len(kept)] = call(i)
        _finish(device)
        found.append((time.perf_counter() - start) / count)
    return _lower_quartile(found)


def _lower_quartile(values: list[float]) -> float:
    return statistics.quantiles(values, n=4, method="inclusive")[0]


def _num_cold(result: Any) -> int:
    """How many results of this size no cache holds."""
    tensors = [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)] if isinstance(result, (tuple, list)) else []
    num_bytes = sum(t.numel() * t.element_size() for t in tensors)
    return min(max(POOL_BYTES // max(num_bytes, 1), 2), 64)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _pool(shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, grad: bool = False) -> list[Tensor]:
    """Several tensors of one shape, together about POOL_BYTES, at least 2 and at most 64."""
    count = _num_cold(torch.empty(shape, dtype=dtype, device="meta"))
    return [torch.randn(*shape, dtype=torch.float32, device=device).to(dtype).requires_grad_(grad) for _ in range(count)]


def bench_matmuls(grid: Grid, dtypes: Sequence[str], device: torch.device, tick: Callable[[], None]) -> dict[str, dict[str, Any]]:
    """`phase/precision` -> grid of seconds, for y = x W^T and both of its gradients, m rows, n outputs, k inputs."""
    found: dict[str, dict[str, Any]] = {}
    for name in dtypes:
        seconds: dict[str, list[float]] = {"forward": [], "backward_input": [], "backward_weight": []}
        for m in grid.rows:
            for n in grid.widths:
                for k in grid.widths:
                    for phase, value in _matmul_s(m, n, k, DTYPES[name], device).items():
                        seconds[phase].append(value)
                    tick()
        for phase, values in seconds.items():
            found[f"{phase}/{name}"] = {"m": _floats(grid.rows), "n": _floats(grid.widths), "k": _floats(grid.widths), "seconds": values}
    return found


def _floats(sizes: Sequence[int]) -> list[float]:
    return [float(size) for size in sizes]


def _matmul_s(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    rows = max(min(m, int(MOST_FLOPS / (2 * n * k))), 16)
    x, y, w = (_pool(shape, dtype, device) for shape in ((rows, k), (rows, n), (n, k)))
    calls = {
        "forward": lambda i: functional.linear(x[i % len(x)], w[i % len(w)]),
        "backward_input": lambda i: y[i % len(y)] @ w[i % len(w)],
        "backward_weight": lambda i: y[i % len(y)].t() @ x[i % len(x)],
    }
    return {phase: seconds_per_call(call, device) * m / rows for phase, call in calls.items()}


def bench_attention(grid: Grid, dtypes: Sequence[str], device: torch.device, tick: Callable[[], None]) -> dict[str, dict[str, Any]]:
    """`phase/precision/head size` -> seconds of one head of one sequence by its length, causal, transposes included."""
    found: dict[str, dict[str, Any]] = {}
    for name in dtypes:
        for head_dim in grid.head_dims:
            forward, backward = [], []
            for seq_len in grid.seq_lens:
                batch, heads = max(512 // seq_len, 1), 8
                q, k, v = (_pool((batch, seq_len, heads, head_dim), DTYPES[name], device, grad=True) for _ in range(3))

                def attend(i: int, q: list[Tensor] = q, k: list[Tensor] = k, v: list[Tensor] = v) -> Tensor:
                    a, b, c = (x[i % len(x)].transpose(1, 2) for x in (q, k, v))
                    return functional.scaled_dot_product_attention(a, b, c, is_causal=True).transpose(1, 2).flatten(2)

                both = _forward_backward_s(attend, _turn(q, k, v), device)
                forward.append(both[0] / (batch * heads))
                backward.append(both[1] / (batch * heads))
                tick()
            found[f"forward/{name}/{head_dim}"] = {"sizes": _floats(grid.seq_lens), "seconds": forward}
            found[f"backward/{name}/{head_dim}"] = {"sizes": _floats(grid.seq_lens), "seconds": backward}
    return found


def _turn(*pools: list[Tensor]) -> Callable[[int], list[Tensor]]:
    """The i-th tensor of each pool."""
    return lambda i: [pool[i % len(pool)] for pool in pools]


def _forward_backward_s(call: Callable[[int], Tensor], inputs: Callable[[int], list[Tensor]], device: torch.device) -> tuple[float, float]:
    """Seconds of an op under autograd: (forward, backward)."""
    forward_s = seconds_per_call(call, device)
    outs = [call(0)]
    count = _num_cold(outs[0])
    outs += [call(i) for i in range(1, count)]
    grads = [torch.ones_like(out) for out in outs]
    backward_s = seconds_per_call(lambda i: torch.autograd.grad(outs[i % count], inputs(i % count), grads[i % count], retain_graph=True), device)
    return forward_s, backward_s


def bench_ops(grid: Grid, dtypes: Sequence[str], device: torch.device, tick: Callable[[], None]) -> dict[str, dict[str, Any]]:
    """`op/phase/precision` -> seconds by bytes moved, for every memory-bound op of the trainer; also casts and gradient sums."""
    found: dict[str, dict[str, Any]] = {}
    for name in dtypes:
        numerics = Numerics(compute_bytes=DTYPES[name].itemsize, loss_kernel="chunked", fused_norm=True, fused_activation=False)
        for op, key, build in _cases():
            curves: dict[str, list[tuple[float, float]]] = {"forward": [], "backward_input": []}
            for elements in grid.elements:
                rows = max(elements // OP_WIDTH, 4)
                call, inputs = build(rows, DTYPES[name], device)
                cost = op.cost(Shard(1, rows), numerics)
                times = _forward_backward_s(call, inputs, device) if key != "loss" else _loss_s(call, device)
                curves["forward"].append((float(cost.forward_bytes), times[0]))
                curves["backward_input"].append((float(cost.backward_bytes), times[1]))
                tick()
            for phase, points in curves.items():
                found[f"{key}/{phase}/{name}"] = {"sizes": [size for size, _ in points], "seconds": [s for _, s in points]}
    return found | _weight_handling(grid, dtypes, device)


def _loss_s(call: Callable[[int], Tensor], device: torch.device) -> tuple[float, float]:
    """The loss makes its gradient as it goes: half of it counts as backward."""
    half = seconds_per_call(call, device) / 2
    return half, half


Case = tuple[Op, str, Callable[[int, torch.dtype, torch.device], tuple[Callable[[int], Tensor], Callable[[int], list[Tensor]]]]]


def _cases() -> list[Case]:
    """(op of the planner, key, how to make the trainer's call for so many rows of OP_WIDTH features)."""
    w = OP_WIDTH

    def unary(function: Callable[[Tensor, Tensor], Tensor]) -> Any:
        def build(rows: int, dtype: torch.dtype, device: torch.device) -> Any:
            x, weight = _pool((1, rows, w), dtype, device, grad=True), torch.ones(w, dtype=dtype, device=device, requires_grad=True)
            return lambda i: function(x[i % len(x)], weight), lambda i: [x[i % len(x)], weight]

        return build

    def plain(function: Callable[[Tensor], Tensor]) -> Any:
        def build(rows: int, dtype: torch.dtype, device: torch.device) -> Any:
            x = _pool((1, rows, w), dtype, device, grad=True)
            return lambda i: function(x[i % len(x)]), lambda i: [x[i % len(x)]]

        return build

    def binary(function: Callable[[Tensor, Tensor], Tensor]) -> Any:
        def build(rows: int, dtype: torch.dtype, device: torch.device) -> Any:
            x, y = (_pool((1, rows, w), dtype, device, grad=True) for _ in range(2))
            return lambda i: function(x[i % len(x)], y[i % len(y)]), lambda i: [x[i % len(x)], y[i % len(y)]]

        return build

    return [
        (Norm(name="norm", width=w), "rmsnorm", unary(lambda x, weight: rms_norm(x, weight, 1e-6))),
        (Norm(name="norm", width=w, is_rms=False, bias=True), "layernorm", unary(lambda x, weight: functional.layer_norm(x, (w,), weight, weight))),
        (Elementwise(name="activation", reads=2 * w, writes=w, num_between=w), "gated_activation", binary(lambda x, y: functional.silu(x) * y)),
        (Elementwise(name="activation", reads=w, writes=w), "activation", plain(functional.gelu)),
        (Elementwise(name="add", reads=2 * w, writes=w), "residual", binary(lambda x, y: x + y)),
        (Elementwise(name="rope", reads=w, writes=w), "rope", _rope_case),
        (Embedding(name="embedding", num_embeddings=4096, embedding_dim=w), "embedding", _embedding_case),
        (Loss(name="loss", vocab_size=w), "loss", _loss_case),
    ]


def _rope_case(rows: int, dtype: torch.dtype, device: torch.device) -> Any:
    heads, head_dim = 4, OP_WIDTH // 4
    x = _pool((1, rows, heads, head_dim), dtype, device, grad=True)
    cos, sin = (torch.rand(rows, 1, head_dim // 2, device=device).to(dtype) for _ in range(2))
    return lambda i: rotate(x[i % len(x)], cos, sin), lambda i: [x[i % len(x)]]


def _embedding_case(rows: int, dtype: torch.dtype, device: torch.device) -> Any:
    table = torch.randn(4096, OP_WIDTH, device=device, requires_grad=True)
    tokens = torch.randint(0, 4096, (1, rows), device=device)
    return lambda i: functional.embedding(tokens, table).to(dtype), lambda i: [table]


def _loss_case(rows: int, dtype: torch.dtype, device: torch.device) -> Any:
    vocab = 2048
    count = max(rows * OP_WIDTH // vocab, 1)
    logits = _pool((count, vocab), dtype, device)
    targets = torch.randint(0, vocab, (count,), device=device)
    return lambda i: chunk_loss(logits[i % len(logits)].float(), targets, 0, None, True)[1].div_(2.0).to(dtype), lambda i: []  # type: ignore[union-attr]


def _weight_handling(grid: Grid, dtypes: Sequence[str], device: torch.device) -> dict[str, dict[str, Any]]:
    """Casts of weights and of their gradients, and sums of gradients over microbatches, by bytes of fp32 parameters."""
    found: dict[str, dict[str, Any]] = {}
    sizes = [4.0 * n for n in grid.elements]
    calls: dict[str, list[Callable[[int], Any]]] = {}
    for n in grid.elements:
        w, g, total = _pool((n,), torch.float32, device), _pool((n,), torch.bfloat16, device), _pool((n,), torch.float32, device)
        calls.setdefault("accumulate", []).append(partial(_add, total, w))
        if "bf16" in dtypes:
            calls.setdefault("cast/forward", []).append(partial(_cast, w, torch.bfloat16))
            calls.setdefault("cast/backward", []).append(partial(_cast, g, torch.float32))
    for key, some in calls.items():
        found[key] = {"sizes": sizes, "seconds": [seconds_per_call(call, device) for call in some]}
    return found


def _add(totals: list[Tensor], terms: list[Tensor], i: int) -> Tensor:
    return totals[i % len(totals)].add_(terms[i % len(terms)])


def _cast(pool: list[Tensor], dtype: torch.dtype, i: int) -> Tensor:
    return pool[i % len(pool)].to(dtype)


def bench_collectives(device: torch.device, tick: Callable[[], None]) -> dict[str, dict[str, Any]]:
    """`collective/ranks` -> seconds by bytes of the full buffer, over all processes; nothing for one process.

    Each one follows some work of its own on every rank, whose time is taken off: as in a step, ranks arrive one after the other, with
    caches full of other things.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return {}
    world, rank, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD
    times: dict[str, list[float]] = {name: [] for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p")}
    for num_bytes in MESSAGE_BYTES:
        # [1, ranks, rest]: what is gathered and scattered lies along dim 1, as tokens do in the model.
        whole = torch.ones(1, world, num_bytes // 4 // world, device=device)
        part, arriving = whole[:, :1].contiguous(), torch.empty_like(whole)

        def pass_on(whole: Tensor = whole, arriving: Tensor = arriving) -> None:
            ops = [dist.P2POp(dist.isend, whole, (rank + 1) % world), dist.P2POp(dist.irecv, arriving, (rank - 1) % world)]
            for work in dist.batch_isend_irecv(ops):
                work.wait()

        calls: dict[str, Callable[[], Any]] = {
            "all_reduce": partial(all_reduce, whole, group),
            "all_gather": partial(all_gather, part, group),
            "reduce_scatter": partial(reduce_scatter, whole, group),
            "all_to_all": partial(dist.all_to_all_single, arriving, whole),
            "p2p": pass_on,
        }
        for name, call in calls.items():
            times[name].append(_after_work_s(call, device))
        tick()
    return {f"{name}/{world}": {"sizes": _floats(MESSAGE_BYTES), "seconds": seconds} for name, seconds in times.items()}


def _after_work_s(call: Callable[[], Any], device: torch.device, count: int = 10, repeats: int = 7) -> float:
    """Seconds that `call` adds to some work before it; as many calls on every rank."""
    square = torch.randn(WORK_WIDTH, WORK_WIDTH, device=device)

    def run(calls: Callable[[], Any] | None) -> float:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(count):
            square @ square
            if calls is not None:
                calls()
        _finish(device)
        return (time.perf_counter() - start) / count

    run(call)
    pairs = [(run(call), run(None)) for _ in range(repeats)]
    return max(statistics.median(both for both, _ in pairs) - statistics.median(work for _, work in pairs), LEAST_S)
