"""Breakdowns -> Plan: scalars out of arrays, intervals, violations, assumptions and evidence. No formula of cost here."""

from __future__ import annotations

import math
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from planner.coefficients import TERMS
from planner.economics import CostBreakdown, Goodput
from planner.graph import Part, StepGraph, count_params, model_flops_per_token
from planner.layout import Layout
from planner.memory import MemoryBreakdown
from planner.plan import Cost, Evidence, Flops, Interval, Loss, Memory, Params, Plan, Request, StageMemory, Time, Violation, spec_to_plain
from planner.resolve import Job
from planner.scaling_laws import predict_loss
from planner.stack import Coefficient, Spread
from planner.step_work import repeated_ops
from planner.timing import TimeBreakdown

QUANTILE_90 = 1.2816
"""Standard deviations to the 90th percentile: an 80% interval on either side."""
NUM_NEIGHBOURS = 5
PUBLISHED_RUN = "published run"
"""How evidence of the kind begins."""

__all__ = ["PUBLISHED_RUN", "QUANTILE_90", "assemble_plan", "counted_flops_per_token", "hardware_flops_per_token", "repeated_flops", "time_interval"]


def assemble_plan(
    request: Request,
    job: Job,
    layout: Layout,
    graph: StepGraph,
    memory: MemoryBreakdown,
    time: TimeBreakdown,
    cost: CostBreakdown,
    goodput: Goodput,
    why: list[str],
) -> Plan:
    """The record of everything that `estimate` found."""
    params = Params(**{name: int(value) for name, value in count_params(job.model, job.seq_len).items()})
    flops = _flops(job, graph)
    memory_report = _memory(job, memory)
    loss, loss_notes = _loss(job, params)
    return Plan(
        inputs=_inputs(request, job, layout),
        params=params,
        flops=flops,
        memory=memory_report,
        time=_time(job, graph, time, cost, flops),
        loss=loss,
        cost=_cost(job, time, cost, goodput),
        violations=_violations(memory_report),
        assumptions=(*job.assumptions, *why, *_standing_assumptions(job, time, goodput), *loss_notes),
        evidence=_evidence(job, graph),
        provenance=_provenance(job),
    )


def _inputs(request: Request, job: Job, layout: Layout) -> dict[str, Any]:
    """The request made complete; reading it again gives the same plan."""
    workload = {**spec_to_plain(job.workload), "seq_len": job.seq_len, "global_batch_size": job.global_batch_size, "tokens": job.tokens}
    inputs: dict[str, Any] = {
        "schema_version": request.schema_version,
        "model": request.model,
        "workload": workload,
        "cluster": {**spec_to_plain(request.cluster), "accelerator": job.cluster.accelerator.id},
        "stack": request.stack or job.stack.name,
        "layout": spec_to_plain(layout),
    }
    if request.catalog is not None:
        inputs["catalog"] = request.catalog
    if request.software_year is not None:
        inputs["software_year"] = request.software_year
    if request.training is not None:
        inputs["training"] = request.training
    return inputs


def _flops(job: Job, graph: StepGraph) -> Flops:
    model = model_flops_per_token(job.model, job.seq_len, job.numerics)
    return Flops(
        model["full"],
        sum(sum(hardware_flops_per_token(job, graph, part)) for part in graph.parts),
        sum(sum(counted_flops_per_token(job, graph, part)) for part in graph.parts),
        "full",
        model["causal"],
        model["full"] * job.tokens,
    )


def hardware_flops_per_token(job: Job, graph: StepGraph, part: Part) -> list[float]:
    """FLOPs that each op of a part executes on all stages and all devices of a replica, over the tokens trained.

    Each device of a (tp, cp) group does its share of the same tokens; copies of key-value heads count as executed.
    """
    scale = float(np.sum(part.counts)) * graph.layout.tp * graph.layout.cp / float(graph.shard.micro_batch_size * graph.seq_len)
    again = repeated_flops(job, graph, part)
    return [
        scale * float(cost.forward_flops + cost.backward_input_flops + cost.backward_weight_flops + repeated)
        for cost, repeated in zip(part.costs, again, strict=True)
    ]


def counted_flops_per_token(job: Job, graph: StepGraph, part: Part) -> list[float]:
    """`hardware_flops_per_token` of each op, as if no kernel skipped what a mask hides."""
    executed = hardware_flops_per_token(job, graph, part)
    return [
        flops * float(cost.model_forward_flops / cost.forward_flops) if cost.op.kind == "attention" else flops
        for flops, cost in zip(executed, part.costs, strict=True)
    ]


def repeated_flops(job: Job, graph: StepGraph, part: Part) -> list[float]:
    """Forward FLOPs of each op that one run of a part does again in its backward pass."""
    again = repeated_ops(graph, part, job.stack)
    return [float(cost.forward_flops) * repeats for cost, repeats in zip(part.costs, again, strict=True)]


def _memory(job: Job, memory: MemoryBreakdown) -> Memory:
    peak_stage, usable = int(memory.peak_stage), job.cluster.accelerator.memory_bytes
    stages = tuple(
        StageMemory(stage, float(memory.total_bytes[stage]), {name: float(getattr(memory, name)[stage]) for name in memory.PARTS})
        for stage in range(memory.total_bytes.shape[-1])
    )
    peak = stages[peak_stage].total_bytes
    interval = Interval.around(peak, job.stack.memory_interval)
    return Memory(interval, usable, peak <= usable, peak_stage, stages[peak_stage].breakdown_bytes, stages)


def _time(job: Job, graph: StepGraph, time: TimeBreakdown, cost: CostBreakdown, flops: Flops) -> Time:
    step_s = float(time.step_s)
    interval = Interval.around(step_s, time_interval(job, time))
    tokens_per_s = job.global_batch_size * job.seq_len / step_s
    per_device = tokens_per_s / job.cluster.num_devices
    peak = job.efficiency.peak_flops_per_s(job.precision.matmul_rate)
    parts = {name: float(getattr(time, name)) for name in time.PARTS}
    return Time(
        step_s=interval,
        tokens_per_s=tokens_per_s,
        tokens_per_s_per_device=per_device,
        model_flops_per_s_per_device=per_device * flops.model_per_token,
        mfu=per_device * flops.model_per_token / peak,
        hfu=per_device * flops.hardware_per_token / peak,
        mfu_causal=per_device * flops.model_per_token_causal / peak,
        peak_flops_per_s=peak,
        peak_name=f"dense {job.precision.matmul_rate} of {job.cluster.accelerator.id}",
        breakdown_s=parts,
        stage_forward_s=tuple(map(float, time.stage_forward_s)),
        stage_backward_s=tuple(map(float, time.stage_backward_s)),
        slowest_stage=int(time.slowest_stage),
        num_steps=int(-(-job.tokens // (job.global_batch_size * job.seq_len))),
        num_microbatches=int(graph.num_microbatches),
        bubble_fraction=parts["pipeline_transfer_and_bubble"] / step_s,
        train_s=interval.scaled(cost.train_s / step_s),
    )


def time_interval(job: Job, time: TimeBreakdown) -> Spread:
    """The 80% interval of the step time: from measured runs near to the plan, else from the stack's file."""
    if time.spread is None:
        return job.stack.time_interval
    reach = math.exp(QUANTILE_90 * float(time.spread))
    source = "scatter of measured runs of this stack around the model, wider the farther the nearest of them are: docs/validation.md"
    return Spread(low=1 / reach, high=reach, evidence="fitted", source=source)


def _loss(job: Job, params: Params) -> tuple[Loss | None, list[str]]:
    if job.workload.job != "pretrain" or not job.model.is_causal:
        return None, ["loss: no law for fine-tuning or masked language models"]
    found = predict_loss(params.active, job.tokens)
    notes = [f"loss: {warning}" for warning in found.warnings]
    guessing = math.log(job.model.vocab_size)
    if found.value > guessing:
        text = f"loss: not predicted: the law's {found.value:.3g} nats per token are more than guessing costs, {guessing:.3g} among"
        return None, [*notes, f"{text} {job.model.vocab_size:,} tokens"]
    if job.model.is_moe:
        notes.append("loss: the law is for dense models; active parameters are put in, which is pessimistic")
    return Loss(Interval(found.value, found.low, found.high), Interval(*found.perplexity), f"{found.law.name} ({found.law.source})"), notes


def _cost(job: Job, time: TimeBreakdown, cost: CostBreakdown, goodput: Goodput) -> Cost:
    offer = job.cluster.offer
    usd = None if cost.usd is None else Interval.around(cost.usd, time_interval(job, time))
    price: dict[str, Any] | None = None
    breakdown: dict[str, float] = {}
    if cost.usd is not None and cost.idle_device_usd is not None and cost.lost_time_usd is not None:
        price = {"pricing": job.cluster.pricing, "usd_per_device_hour": job.cluster.usd_per_device_hour}
        price |= (
            {"offer": offer.id, "region": offer.region, "date": str(offer.price_date), "source": offer.source}
            if offer is not None
            else {"source": "given by the user"}
        )
        breakdown = {
            "training": cost.usd - cost.idle_device_usd - cost.lost_time_usd,
            "failures_and_checkpoints": cost.lost_time_usd,
            "idle_devices": cost.idle_device_usd,
        }
    return Cost(
        usd=usd,
        usd_per_device_hour=job.cluster.usd_per_device_hour,
        price=price,
        device_hours=cost.device_hours,
        billed_device_hours=cost.billed_device_hours,
        goodput_fraction=goodput.fraction,
        mean_time_between_failures_s=goodput.mean_time_between_failures_s,
        checkpoint_interval_s=goodput.checkpoint_interval_s,
        energy_kwh=cost.energy_kwh,
        co2e_kg=cost.co2e_kg,
        breakdown_usd=breakdown,
    )


def _violations(memory: Memory) -> tuple[Violation, ...]:
    return tuple(Violation("memory", s.stage, s.total_bytes, memory.usable_bytes) for s in memory.stages if s.total_bytes > memory.usable_bytes)


def _standing_assumptions(job: Job, time: TimeBreakdown, goodput: Goodput) -> list[str]:
    """What every plan of this kind rests on."""
    spreads = {"step time": time_interval(job, time), "memory": job.stack.memory_interval}
    notes = [
        f"goodput {goodput.fraction:.3f}: 4 failures per 1000 node-days, 10 min to restart, 30 s stall per checkpoint",
        "energy: boards at 80% of rated power, 240 W per device for the host, PUE 1.15, 475 g CO2e/kWh (world average)",
        *(f"interval of {name}: x{s.low:.3g} to x{s.high:.3g}, {s.evidence} ({s.source})" for name, s in spreads.items()),
    ]
    if job.cluster.accelerator.power_watts is None:
        notes.append(f"energy counts the hosts only: the board power of {job.cluster.accelerator.id} is not published")
    if job.cluster.usd_per_device_hour is None:
        notes.append("no price: name an offer with --offer, or a price with --price")
    if job.model.is_moe:
        notes.append("experts: tokens are routed evenly")
    return notes


def _evidence(job: Job, graph: StepGraph) -> tuple[Evidence, ...]:
    """What the step time rests on: the published runs nearest to it and how far off they were, then the coefficients."""
    accelerator = job.cluster.accelerator.id
    nearest = [] if job.nearby is None else job.nearby.nearest(graph, job.cluster, NUM_NEIGHBOURS, job.software_year)
    found = [
        Evidence(
            f"{PUBLISHED_RUN}: {run.model} on {run.num_devices} {run.accelerator}, predicted over measured step time less 1",
            run.left_out_error_fraction, "measured", f"{run.source}, row {run.id}; {distance:.1f} away; predicted by a fit without it",
        )
        for distance, run in nearest
    ]  # fmt: skip
    found.append(Evidence("best matmul alone over dense peak", *_told(job.efficiency.best_matmul)))
    for name, term in TERMS.items():
        if name.endswith("_matmul") and name not in ("grouped_matmul", f"{job.precision.name}_matmul"):
            continue
        found.append(Evidence(f"{name}: {term.meaning}", *_told(job.stack.coefficient(name, accelerator))))
    return tuple(found)


def _told(coefficient: Coefficient) -> tuple[float, str, str]:
    return coefficient.value, coefficient.evidence, coefficient.source


def _provenance(job: Job) -> dict[str, Any]:
    try:
        own = version("llm-planner")
    except PackageNotFoundError:
        own = "unknown"
    return {"planner_version": own, "stack": f"{job.stack.name} ({job.stack.date})", "accelerator_source": job.cluster.accelerator.source}
