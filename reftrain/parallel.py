"""From a layout to models on ranks: process groups, meshes, split parameters, FSDP2, DDP.

Order of ranks, fastest first: tp, cp, dp_shard, dp_replicate, pp, as the planner prices it. Everything that moves data is
torch.distributed's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from planner.errors import InputError
from planner.layout import Layout, chunk_sizes
from reftrain.axes import SINGLE, Axes, local
from reftrain.config import RunConfig
from reftrain.layers import LayerNorm, Linear, RmsNorm
from reftrain.lora import Adapter, add_adapters
from reftrain.model import Transformer, initialize
from reftrain.moe import Experts, Mixture
from reftrain.runnable import expert_shards

__all__ = ["Ranks", "build_model_parts", "default_device", "end_distributed", "start_ranks"]

COLUMN = ("q", "k", "v", "q_up", "kv_up", "up", "gate")
ROW = ("out", "down")
TIMEOUT_S = 600


@dataclass(frozen=True)
class Ranks:
    """Where this process stands, and the groups that it shares work with."""

    layout: Layout
    device: torch.device
    rank: int = 0
    main: DeviceMesh | None = None
    """[pp, replicate, shard, tp]; None: one process."""
    expert: DeviceMesh | None = None
    """[pp, expert_replicate, expert_shard, ep]; None without expert parallelism."""
    axes: Axes = SINGLE
    tied_group: dist.ProcessGroup | None = None
    """First and last pipeline stage, for a parted tied embedding."""
    token_group: dist.ProcessGroup | None = None
    """Ranks of this stage whose routers see other tokens; without expert parallelism tp ranks see the same ones."""

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.layout.num_devices

    @property
    def stage_size(self) -> int:
        """Processes of one pipeline stage."""
        return self.world_size // self.layout.pp

    @property
    def pp_rank(self) -> int:
        """Pipeline rank."""
        return self.rank // self.stage_size

    @property
    def dp_rank(self) -> int:
        """Which part of each batch is this rank's."""
        return self.rank % self.stage_size // (self.layout.tp * self.layout.cp)

    @property
    def is_first(self) -> bool:
        """Whether it writes files and speaks to the user."""
        return self.rank == 0

    @property
    def uses_ddp(self) -> bool:
        """Plain data parallelism of whole models."""
        one = (self.layout.tp, self.layout.cp, self.layout.pp, self.layout.ep, self.layout.dp_shard)
        return self.layout.dp_replicate > 1 and self.layout.zero_stage == 0 and set(one) == {1}


def default_device() -> torch.device:
    """This process's GPU, or the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")


def start_ranks(layout: Layout, device: torch.device | None = None) -> Ranks:
    """Joins the processes that torchrun started, and builds the layout's meshes.

    Raises:
        InputError: another number of processes than the layout wants.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = default_device() if device is None else device
    if world != layout.num_devices:
        raise InputError.single(
            "layout", layout.num_devices, f"wants {layout.num_devices} processes, and {world} are running",
            f"start it with torchrun --nproc-per-node {layout.num_devices} -m reftrain run PLAN.yaml (per node: its devices)",
        )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        return Ranks(layout, device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=TIMEOUT_S))
    return make_ranks(layout, device, dist.get_rank())


def make_ranks(layout: Layout, device: torch.device, rank: int) -> Ranks:
    """The meshes of a layout, once the process group exists."""
    dp_cp = layout.dp * layout.cp
    shard = layout.dp_shard * layout.cp if layout.zero_stage else 1
    names = ("pp", "replicate", "shard", "tp")
    main = init_device_mesh(device.type, (layout.pp, dp_cp // shard, shard, layout.tp), mesh_dim_names=names)
    cp_mesh = None
    if layout.cp > 1:
        cp_mesh = init_device_mesh(device.type, (layout.pp, layout.dp, layout.cp, layout.tp), mesh_dim_names=("pp", "dp", "cp", "tp"))["cp"]
    expert = None
    if layout.ep > 1:
        stage = dp_cp * layout.tp
        expert_shard = expert_shards(layout) if layout.zero_stage else 1
        shape = (layout.pp, stage // (layout.ep * expert_shard), expert_shard, layout.ep)
        expert = init_device_mesh(device.type, shape, mesh_dim_names=("pp", "expert_replicate", "expert_shard", "ep"))
    axes = Axes(main["tp"] if layout.tp > 1 else None, layout.sequence_parallel, cp_mesh, None if expert is None else expert["ep"])
    routers = main["replicate", "shard"] if expert is None else expert["expert_replicate", "expert_shard", "ep"]
    return Ranks(layout, device, rank, main, expert, axes, _make_tied_group(layout, rank), routers._flatten().get_group())


def _make_tied_group(layout: Layout, rank: int) -> dist.ProcessGroup | None:
    """Pairs of first and last stage, for every place within a stage; all ranks make all groups, as torch wants."""
    if layout.pp == 1:
        return None
    stage, mine = layout.num_devices // layout.pp, None
    for place in range(stage):
        ends = [place, place + (layout.pp - 1) * stage]
        group = dist.new_group(ends)
        mine = group if rank in ends else mine
    return mine


def end_distributed() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def build_model_parts(config: RunConfig, ranks: Ranks) -> list[nn.Module]:
    """This rank's part of the model (several with virtual stages): split, sharded, initialized, in training mode.

    Built without memory on the meta device, so that a rank never holds more than its share and one whole parameter.
    """
    layout = config.layout
    parts: list[nn.Module] = []
    num_chunks = layout.pp * layout.num_virtual_stages
    sizes = chunk_sizes(config.model.num_layers, num_chunks)
    is_fake = active_fake_mode() is not None  # costs no memory on any device, and torch cannot move it off the meta device
    for chunk in range(ranks.pp_rank, num_chunks, layout.pp):
        layers = range(sum(sizes[:chunk]), sum(sizes[: chunk + 1]))
        with torch.device(ranks.device if is_fake else "meta"):
            part = Transformer(config.model, config.details, config.kernels, layers=layers, is_first=chunk == 0, is_last=chunk == num_chunks - 1)
            if config.workload.job == "lora":
                add_adapters(part, config.adapters, config.compute_dtype)
        part.dtype = config.compute_dtype
        part.set_axes(ranks.axes)
        _split(part, ranks)
        if config.training.compile:
            for block in part.blocks.values():
                block.compile()
        _shard(part, config, ranks)
        if not is_fake:
            part.to_empty(device=ranks.device)
        initialize(part, config.training.seed)
        if parts:  # masks are large: one for all chunks
            part.positions = unwrap(parts[0]).positions
        else:
            part.positions.place(config.seq_len, ranks.device, config.compute_dtype, ranks.axes)
        parts.append(part.train())
    if ranks.uses_ddp:
        ids = [ranks.device.index] if ranks.device.type == "cuda" else None
        return [DistributedDataParallel(part, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False) for part in parts]
    return parts


def _split(model: Transformer, ranks: Ranks) -> None:
    """Describes every parameter's share of this rank by DTensor: tensor-parallel, and experts over expert-parallel ranks."""
    tp_mesh, ep_mesh = ranks.axes.tp_mesh, ranks.axes.ep_mesh
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if isinstance(module, Experts):
            if ep_mesh is not None:
                _place(module, ep_mesh, {"up": 0, "gate": 0, "down": 0})
            elif tp_mesh is not None:
                _place(module, tp_mesh, {"up": 1, "gate": 1, "down": 2})
        elif tp_mesh is None:
            continue
        elif isinstance(module, Linear):
            is_router = name.endswith("router.gate")
            module.split = "none" if is_router else "column" if last in COLUMN else "row" if last in ROW else "none"
            _place(module, tp_mesh, {"column": {"weight": 0, "bias": 0}, "row": {"weight": 1}, "none": {}}[module.split])
            if module.adapter is not None:
                _place(module.adapter, tp_mesh, {"column": {"b": 0}, "row": {"a": 1}, "none": {}}[module.split])
        elif isinstance(module, Adapter):
            continue  # placed with its layer
        elif isinstance(module, (RmsNorm, LayerNorm)):
            module.is_inside = last in ("q_norm", "k_norm") and model.spec.mla is None
            _place(module, tp_mesh, {})
        else:
            _place(module, tp_mesh, {"weight": 0, "bias": 0} if last in ("token", "tied", "head") else {})
    if tp_mesh is not None and ep_mesh is None:
        for module in model.modules():
            if isinstance(module, Mixture):  # its router runs inside the split region, on every token
                module.router.gate.split = "inside"


def _place(module: nn.Module, mesh: DeviceMesh, dims: dict[str, int]) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        placement = Shard(dims[name]) if name in dims else Replicate()
        whole = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(whole, requires_grad=parameter.requires_grad))


def _shard(model: Transformer, config: RunConfig, ranks: Ranks) -> None:
    """FSDP2 over the data- and context-parallel ranks: each block a unit, then what is left.

    ZeRO-3 drops gathered weights after each block's forward pass; ZeRO-1 and 2 keep them until the step's last backward pass, and so
    do pipelines: torch's keep them from the first backward pass on anyway, and its zero-bubble schedule computes wrong gradients with
    weights that were dropped.
    """
    if ranks.main is None or ranks.uses_ddp or ranks.main["replicate"].size() * ranks.main["shard"].size() * config.layout.ep == 1:
        return
    layout = config.layout
    mesh = ranks.main["replicate", "shard"] if ranks.main["replicate"].size() > 1 else ranks.main["shard"]
    is_mixed = config.compute_dtype != torch.float32
    policy = MixedPrecisionPolicy(config.compute_dtype, torch.float32, cast_forward_inputs=False) if is_mixed else MixedPrecisionPolicy()
    keep = partial(
        fully_shard,
        mp_policy=policy,
        reshard_after_forward=layout.zero_stage == 3 and layout.pp == 1,
        shard_placement_fn=partial(_expert_dim, layout),
    )
    for block in model.blocks.values():
        if ranks.expert is not None and isinstance(block.mlp, Mixture):
            experts = (
                ranks.expert["expert_replicate", "expert_shard"] if ranks.expert["expert_replicate"].size() > 1 else ranks.expert["expert_shard"]
            )
            sharded = keep(block.mlp.experts, mesh=experts)
            # Its gradient already sums over the tokens of all ranks that sent some. Gloo can sum but not scale on the way; over
            # one shard torch scales by itself, and would once more if told to sum.
            sharded.set_gradient_divide_factor(float(layout.dp * layout.cp))
            sharded.set_force_sum_reduction_for_comms(ranks.expert["expert_shard"].size() > 1)
        keep(block, mesh=mesh)
    if not model.spec.tie_word_embeddings:  # a tied table is needed at both ends, and stays with the root
        for end in (model.embeddings, model.head):
            if end is not None:
                keep(end, mesh=mesh)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def _expert_dim(layout: Layout, parameter: nn.Parameter) -> Shard | None:
    """Which dim of stacked experts FSDP splits: whole experts if there are enough of them for every rank, else each by its rows or columns."""
    if parameter.ndim != 3:
        return None
    degree = expert_shards(layout) if layout.ep > 1 else layout.dp_shard * layout.cp
    is_split = {p.dim for p in parameter.placements if isinstance(p, Shard)} if isinstance(parameter, DTensor) else set()
    sizes = local(parameter).shape
    return next((Shard(dim) for dim in (0, 2, 1) if sizes[dim] % degree == 0 and (dim == 0 or dim not in is_split)), None)


def sum_tied(parts: list[nn.Module], ranks: Ranks) -> None:
    """Adds the gradients of a tied table that a pipeline parted."""
    if ranks.tied_group is None:
        return
    for part in parts:
        if isinstance(part, Transformer) and part.spec.tie_word_embeddings:
            table = part.tied if part.tied is not None else part.embeddings.token if part.embeddings is not None else None
            grad = None if table is None else table.weight.grad
            if isinstance(grad, Tensor):
                dist.all_reduce(grad.to_local() if isinstance(grad, DTensor) else grad, group=ranks.tied_group)


def unwrap(part: nn.Module) -> Transformer:
    """The model inside DDP's wrapper."""
    inner = part.module if isinstance(part, DistributedDataParallel) else part
    assert isinstance(inner, Transformer)
    return inner
