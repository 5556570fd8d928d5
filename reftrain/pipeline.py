"""Pipeline schedules of torch.distributed.pipelining over this rank's model parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from reftrain.config import RunConfig
from reftrain.model import Transformer
from reftrain.parallel import Ranks

__all__ = ["kept_bytes_per_microbatch", "make_pipeline"]

ONE_CHUNK = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
MANY_CHUNKS = {"interleaved_1f1b": ScheduleInterleaved1F1B, "zb_h1": ScheduleInterleavedZeroBubble}
"""torch's zero-bubble schedule with one chunk per rank is ZB-H1 (arXiv:2401.10241)."""


def make_pipeline(config: RunConfig, ranks: Ranks, models: list[Transformer]) -> Callable[..., Tensor]:
    """A function that runs one step's microbatches and returns their mean loss on the last stage, 0 elsewhere."""
    layout = config.layout
    if ranks.main is None:
        raise RuntimeError("a pipeline needs more than one process")
    group = ranks.main["pp"].get_group()
    num_stages = layout.pp * layout.num_virtual_stages
    stages: list[Any] = [
        PipelineStage(model, ranks.pp_rank + i * layout.pp, num_stages, ranks.device, *_examples(config, model), group=group)
        for i, model in enumerate(models)
    ]
    options: dict[str, Any] = {"n_microbatches": config.num_microbatches, "loss_fn": lambda output, _target: output.sum()}
    if layout.schedule in ONE_CHUNK:
        schedule: Any = ONE_CHUNK[layout.schedule](stages[0], **options)
    else:
        schedule = MANY_CHUNKS[layout.schedule](stages, **options)
    is_last = any(model.head is not None for model in models)
    is_first = any(model.embeddings is not None for model in models)

    def run(microbatches: list[tuple[Tensor, Tensor]], *, is_training: bool = True) -> Tensor:
        tokens, targets = (torch.cat(tensors) for tensors in zip(*microbatches, strict=True))
        losses: list[Tensor] = []
        step = schedule.step if is_training else schedule.eval
        step(
            *((tokens,) if is_first else ()), target=targets if is_last else None, losses=losses if is_last else None,
            targets=targets, return_outputs=False,
        )  # fmt: skip
        return torch.stack([loss.detach() for loss in losses]).mean() if is_last else torch.zeros((), device=ranks.device)

    return run


def _examples(config: RunConfig, model: Transformer) -> tuple[Tensor, Tensor]:
    """Input and output of a stage, without memory.

    torch would otherwise find their shapes by a pass over made-up data, which costs time and which a mixture's router would count.
    """
    layout = config.layout
    batch, seq_len = layout.micro_batch_size, config.seq_len // layout.cp
    tokens = torch.empty(batch, seq_len, dtype=torch.int64, device="meta")
    width = seq_len // (layout.tp if layout.sequence_parallel else 1)
    hidden = torch.empty(batch, width, config.model.hidden_size, dtype=config.compute_dtype, device="meta", requires_grad=True)
    loss = torch.empty(1, device="meta", requires_grad=True)
    return hidden if model.embeddings is None else tokens, hidden if model.head is None else loss


def kept_bytes_per_microbatch(config: RunConfig, models: list[Transformer]) -> dict[str, int]:
    """Bytes that torch's schedules hold for every microbatch of a step until its end, by what they are; zeros without a pipeline.

    Buffers to receive activations and gradients in, from the first step on. Schedules of many chunks wait for what they sent at
    the step's end only.
    """
    received_bytes = sent_bytes = 0
    for model in models if config.layout.pp > 1 else ():
        received, sent = _examples(config, model)
        received_bytes += received.numel() * received.element_size() * (model.embeddings is None)
        sent_bytes += sent.numel() * sent.element_size() * (model.head is None)
    is_many = config.layout.schedule in MANY_CHUNKS
    return {"activations": sent_bytes * is_many, "communication_buffers": received_bytes * (1 + is_many) + sent_bytes}
