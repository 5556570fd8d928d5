"""A software stack: what it fuses, overlaps and keeps, and the rates it reaches, from `data/stacks/*.yaml`.

Every coefficient carries its evidence: measured, fitted or assumed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from planner.coefficients import TERMS, Coefficients
from planner.curves import DeviceCurves
from planner.errors import nearest
from planner.files import DATA_DIR, read_yaml, user_dir
from planner.registry import unknown_name
from planner.spec import Bytes, Fraction, ScheduleName, Spec, ZeroStage, build

__all__ = ["Coefficient", "Evidence", "FitReport", "Spread", "StackSpec", "load_stack", "stack_names"]

Evidence = Literal["measured", "fitted", "assumed"]


class Coefficient(Spec):
    """One number of a stack and why it is believed."""

    value: float = Field(ge=0, le=10)
    evidence: Evidence
    source: str = Field(min_length=4)


class Spread(Spec):
    """The 80% interval of a prediction, as factors: 10th and 90th percentile of measured over predicted, at least around 1."""

    low: float = Field(gt=0, le=1)
    high: float = Field(ge=1, le=1000)
    evidence: Evidence
    source: str = Field(min_length=4)


class FitReport(Spec):
    """How the coefficients of a stack were fitted, and what they reach on runs that were left out."""

    date: str
    num_runs: int = Field(ge=1)
    accelerators: dict[str, int]
    """Runs per accelerator."""
    median_error_fraction: float = Field(ge=0)
    """Absolute error of the step time, each run predicted by a fit without its group."""
    p90_error_fraction: float = Field(ge=0)
    source: str = Field(min_length=4)


class StackSpec(Spec):
    """A software stack: what it fuses, overlaps, keeps and reaches."""

    name: str
    description: str
    source: str
    date: str
    kin: str | None = None
    """A stack that this one is built on: they are fitted together, each with less of its own."""
    schedules: list[ScheduleName] = Field(default=["1f1b", "interleaved_1f1b"], min_length=1)
    """Pipeline schedules that it has; a search tries these."""
    zero_stages: list[ZeroStage] = Field(default=[0, 1], min_length=1)
    """ZeRO stages that it has; likewise."""
    zero_stages_in_pipelines: list[ZeroStage] | None = None
    """Those of them that go with a pipeline; None: all."""
    axes: list[Literal["tp", "cp", "pp", "ep"]] = Field(default=["tp", "cp", "pp", "ep"])
    """Axes along which it can split a model or its input, beside data parallelism; likewise."""
    weight_storage: Literal["separate_master", "fp32_in_place", "compute_only"]
    """`separate_master`: weights in compute format and an fp32 copy with the optimizer (Megatron, DeepSpeed);
    `fp32_in_place`: fp32 weights, cast when used (FSDP, DDP with autocast, JAX); `compute_only`: weights, gradients and optimizer
    states all in compute format (Lightning's bf16-true)."""
    keeps_quantized_weights: bool = False
    """With fp8 and narrower, matrices of blocks are stored in that format alone, beside the fp32 master (fp8_param_gather of Megatron-Core)."""
    gradient_bytes: float = Field(ge=1, le=4)
    """Bytes of one accumulated gradient, with a 2-byte compute format."""
    gradient_bytes_by_precision: dict[str, float] = Field(default_factory=dict)
    """The same where it depends on the precision: a stack may add bf16 gradients up in a second, fp32 buffer (DeepSpeed's BF16_Optimizer)."""
    step_gradient_bytes: float = Field(0.0, ge=0, le=8)
    """Bytes of one gradient in the format of the optimizer step, made of the accumulated ones for every step where those are not fp32."""
    reduction_bucket_params: float = Field(0.0, ge=0)
    """Gradients that lie in buckets of the data-parallel reduction at once, as copies of the accumulated ones."""
    reduce_bytes: float = Field(ge=1, le=4)
    """Bytes of one gradient element on the wire."""
    frees_gradients: bool = False
    """Gradients are made anew each step (`zero_grad(set_to_none=True)`), not kept in buffers."""
    is_one_fsdp_unit: bool = False
    """ZeRO-3 gathers the whole model, and makes all of its gradients, at once: no block is wrapped by itself."""
    pipeline_keeps_outputs: bool = False
    """Pipeline stages have a buffer for everything they will receive in a step, and hold their outputs while a microbatch is in flight
    (torch.distributed.pipelining)."""
    pipeline_waits_for_sends: list[str] = Field(default_factory=list)
    """Schedules whose stages hold what they sent, activations and gradients, until the step ends."""
    pipeline_waits: bool = False
    """Pipelines keep weights gathered and gradients whole until the step's last microbatch, whatever the ZeRO stage."""
    copies_gathered: bool = False
    """What sequence parallelism gathers or scatters is copied into another order of dims, unless a microbatch has one sequence."""
    loops_experts: bool = False
    """Experts run one after the other, not in one grouped kernel."""
    attention_masks: bool = False
    """Attention takes a tensor that says which keys each query sees, where plain causal or full attention does not."""
    pipeline_buffers_outputs: bool = False
    """Pipeline stages hold the output of each microbatch in flight beside what its backward pass needs (DeepSpeed's PipelineEngine), where
    others free it once it is sent (Megatron's deallocate_pipeline_outputs)."""
    context_parallel: Literal["ring", "gather"] = "ring"
    """Keys and values go around a ring, or every rank gathers those of the whole sequence and keeps them."""
    attention_kernel: Literal["flash", "unfused"]
    attention_library: str
    """A kernel of data/attention_kernels.yaml."""
    loss_kernel: Literal["fused", "compiled", "vocab_parallel", "unfused", "chunked"]
    keeps_placeholder_gradients: bool = False
    """One tensor in compute format for each shape of matrix, which autograd gets in place of the gradient that the matmul has added to the
    buffer already, kept for the next time (`get_dummy_wgrad` of Transformer Engine 2.3 and later)."""
    workspace: Bytes = 0.0
    """Bytes of scratch memory that the math libraries keep inside the framework's allocator from the first step on."""
    fused_activation: bool
    """Activation and its product with the gate run inside one kernel that keeps only its inputs."""
    fused_norm: bool
    repeats_keys: bool = False
    """Keys and values are repeated for every query head before the kernel."""
    keeps_fused_projection: bool = False
    """Values are a view of one tensor with queries and keys before rotation, so that all of it stays with the rotated ones."""
    saves_gathered_input: bool
    selective_recompute: list[Literal["norm", "activation", "scores", "dropout", "dispatch"]]
    """Producers whose tensors `recompute: selective` drops."""
    selective_keeps_outputs: bool = False
    """`recompute: selective` keeps what matmuls made, needed or not, and not what ops save."""
    recompute_stops_early: bool
    """Recomputing a block ends once every tensor of the backward pass is there again: its last matmul is not repeated."""
    coefficients: dict[str, Coefficient] = Field(default_factory=dict)
    """Terms of `planner.coefficients` that were measured, fitted or assumed for this stack; the others are as in that table."""
    devices: dict[str, dict[str, Coefficient]] = Field(default_factory=dict)
    """The same for single accelerators, which go before `coefficients`."""
    fit: FitReport | None = None
    """What the fitted ones were fitted to, and how well."""
    context: Bytes
    """Device memory of runtime, libraries and kernels."""
    collective_buffers: Bytes
    """Device memory of the communication library, more than one device."""
    allocator_slack_fraction: Fraction
    """Reserved above allocated memory, over allocated."""
    time_interval: Spread
    memory_interval: Spread
    measured: dict[str, DeviceCurves] = Field(default_factory=dict)
    """Accelerator id -> seconds measured op by op, which go before the rooflines; the coefficients above still divide them."""

    @model_validator(mode="after")
    def _known_terms(self) -> StackSpec:
        for where, given in {"coefficients": self.coefficients, **{f"devices.{name}": each for name, each in self.devices.items()}}.items():
            for name in given:
                if name not in TERMS:
                    near = ", ".join(nearest(name, TERMS)) or ", ".join(TERMS)
                    raise ValueError(f"{where}.{name} is no coefficient of the time model; use one of: {near}")
        return self

    def coefficient(self, name: str, accelerator: str) -> Coefficient:
        """A term of the time model on an accelerator: fitted for the pair, else for the stack, else as in `planner.coefficients`."""
        term = TERMS[name]
        known = self.devices.get(accelerator, {}).get(name) or self.coefficients.get(name)
        return known or Coefficient(value=term.value, evidence="assumed", source=term.source)

    def coefficients_on(self, accelerator: str) -> Coefficients:
        """All terms on an accelerator."""
        return Coefficients(**{name: self.coefficient(name, accelerator).value for name in TERMS})

    def accumulated_gradient_bytes(self, precision: str) -> float:
        """Of one accumulated gradient under a precision with a 2-byte compute format."""
        return self.gradient_bytes_by_precision.get(precision, self.gradient_bytes)


def _stack_files() -> dict[str, Path]:
    """This machine's stacks hide shipped ones of the same name."""
    return {path.stem: path for folder in (DATA_DIR, user_dir()) for path in sorted((folder / "stacks").glob("*.yaml"))}


def stack_names() -> list[str]:
    """Names of the stacks shipped under data/stacks/, and of those that this machine measured."""
    return sorted(_stack_files())


def load_stack(name: str) -> StackSpec:
    """A stack by name, or by path to a file that `planner calibrate` wrote.

    Raises:
        InputError: unknown name or a file that is not a stack.
    """
    if "/" in name or name.endswith((".yaml", ".yml")):
        return build(StackSpec, read_yaml(name), "stack", name)
    files = _stack_files()
    if name not in files:
        raise unknown_name("stack", name, list(files))
    return build(StackSpec, read_yaml(files[name]), "stack", f"stacks/{name}.yaml")
