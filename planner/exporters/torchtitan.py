"""torchtitan: a recipe in Python, `--module plan_recipe --config plan`.

Source: torchtitan 0.3.0, torchtitan/config/configs.py and trainer.py, checked by its own ConfigManager, `Trainer.Config` and
`ParallelDims`. Files of 0.2 (TOML) and earlier have other keys; `planner import` reads them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from planner.architectures import load_model
from planner.exporters import EXPORTERS, Draft, Exporter, ExportJob, Program
from planner.layout import chunk_sizes
from planner.model_spec import ModelSpec

RECIPES = {
    "llama-3.1-8b": ("llama3", "llama3_8b", "8B"),
    "llama-3.1-70b": ("llama3", "llama3_70b", "70B"),
    "llama-3.1-405b": ("llama3", "llama3_405b", "405B"),
    "qwen3-0.6b": ("qwen3", "qwen3_0_6b", "0.6B"),
    "qwen3-32b": ("qwen3", "qwen3_32b", "32B"),
    "qwen3-30b-a3b": ("qwen3", "qwen3_30b_a3b", "30B-A3B"),
    "deepseek-v3": ("deepseek_v3", "deepseek_v3_671b", "671B"),
}
"""Preset -> (package, recipe, flavor) of torchtitan with the same sizes."""
SCHEDULES = {"1f1b": "1F1B", "interleaved_1f1b": "Interleaved1F1B", "gpipe": "GPipe"}
CONVERTERS = {"fp8": "Float8LinearConverter", "mxfp8": "MXFP8LinearConverter", "nvfp4": "NVFP4LinearConverter"}
RECOMPUTE = {"none": "None", "selective": "SelectiveAC.Config()", "full": "FullAC.Config()"}
LLAMA_SPEC = '''

def _llama(sizes):
    """A Llama of other sizes than torchtitan's flavors."""
    rope = ComplexRoPE.Config(dim=sizes["dim"] // sizes["n_heads"], max_seq_len=sizes["max_seq_len"], theta=sizes["theta"])
    config = Llama3Model.Config(
        dim=sizes["dim"],
        vocab_size=sizes["vocab_size"],
        enable_weight_tying=sizes["enable_weight_tying"],
        tok_embeddings=llama3.Embedding.Config(
            num_embeddings=sizes["vocab_size"],
            embedding_dim=sizes["dim"],
            param_init=llama3._EMBEDDING_SKIP_INIT if sizes["enable_weight_tying"] else llama3._EMBEDDING_INIT,
        ),
        norm=llama3.RMSNorm.Config(normalized_shape=sizes["dim"], param_init=llama3._NORM_INIT),
        lm_head=llama3.Linear.Config(
            in_features=sizes["dim"], out_features=sizes["vocab_size"], param_init=llama3._output_linear_init(sizes["dim"])
        ),
        layers=llama3._build_llama3_layers(
            n_layers=sizes["n_layers"],
            dim=sizes["dim"],
            n_heads=sizes["n_heads"],
            n_kv_heads=sizes["n_kv_heads"],
            hidden_dim=sizes["hidden_dim"],
            rope=rope,
            attn_backend="flex",
        ),
    )
    return dataclasses.replace(llama3.model_registry("8B"), flavor="planner", model=config)
'''


@lru_cache(maxsize=1)
def _presets() -> dict[str, ModelSpec]:
    return {name: load_model(name) for name in RECIPES}


def _same_sizes(job: ExportJob) -> str | None:
    """The preset that the model is, whatever its name."""
    own = job.model.model_copy(update={"name": "", "assumptions": ()})
    same = [n for n, spec in _presets().items() if spec.model_copy(update={"name": "", "assumptions": ()}) == own]
    return same[0] if same else None


class Torchtitan(Exporter):
    """`plan_recipe.py`: the function `plan` returns a `Trainer.Config`."""

    name = "torchtitan"
    kind = "trainer"
    versions = ("0.3.0",)
    summary = "torchtitan recipe in Python"
    leftover = "torchtitan's Trainer.Config has no such setting"

    def write(self, job: ExportJob) -> Draft:
        """plan_recipe.py."""
        imports: list[str] = []
        head = _model(job, imports)
        lines = [*_layout(job), *_training(job, imports)]
        lines.append(f"cfg.dump_folder = {job.placeholder('RUN_DIR', 'folder for logs and checkpoints, on storage that all nodes see')!a}")
        lines.append(f"cfg.hf_assets_path = {job.placeholder('HF_ASSETS', 'folder with the tokenizer')!a}")
        job.check()
        if "training.data" in job.keys:
            job.drop("training.data", "torchtitan reads its own registered datasets: set cfg.dataloader")
        body = "\n".join(f"    {line}" for line in [*head.body, *lines, "return cfg"])
        constants = f'\nSIZES = {head.sizes}\n"""Of the model."""\n{LLAMA_SPEC}' if head.sizes else ""
        text = job.header() + "\n".join(sorted(set(imports))) + f"\n{constants}\n\ndef plan():\n{body}\n"
        words = ("-m", "torchtitan.train", "--module", "plan_recipe", "--config", "plan")
        return Draft({"plan_recipe.py": text}, "torchrun ... -m torchtitan.train --module plan_recipe --config plan", Program(words))


class _Head(NamedTuple):
    """First lines of the recipe, and the sizes of a model without a flavor."""

    body: list[str]
    sizes: dict[str, Any] | None = None


def _model(job: ExportJob, imports: list[str]) -> _Head:
    """The base recipe; with quantized linears where the precision asks for them."""
    preset = _same_sizes(job)
    precision = job.read("workload.precision")
    if precision in ("tf32", "fp16"):
        job.drop("workload.precision", "torchtitan computes in bfloat16 or float32")
    convert = []
    if precision in CONVERTERS:
        imports.append(f"from torchtitan.components.quantization import {CONVERTERS[precision]}")
        imports.append("from torchtitan.config import CompileConfig")
        where = "" if precision == "fp8" else "fqns=['layers'], "
        convert = [f"{CONVERTERS[precision]}.Config({where}model_compile_enabled=True)"]
    compiled = ["cfg.compile = CompileConfig(enable=True)"] if convert else []
    if preset is not None:
        package, recipe, flavor = RECIPES[preset]
        job.read_all("model.")
        imports.append(f"from torchtitan.models.{package}.config_registry import {recipe}")
        if convert:
            imports.append(f"from torchtitan.models.{package} import model_registry")
            compiled.append(f"cfg.model_spec = model_registry({flavor!r}, converters=[{', '.join(convert)}])")
        return _Head([f"cfg = {recipe}()", *compiled])
    sizes = _llama_sizes(job)
    imports += [
        "import dataclasses", "from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss", "from torchtitan.models import llama3",
        "from torchtitan.models.common import ComplexRoPE", "from torchtitan.models.llama3.config_registry import llama3_8b",
        "from torchtitan.models.llama3.model import Llama3Model",
    ]  # fmt: skip
    body = ["cfg = llama3_8b()", "cfg.model_spec = _llama(SIZES)", *compiled]
    body += [f"cfg.model_spec.model = {c}.build().convert(cfg.model_spec.model)" for c in convert]
    body.append("cfg.loss = ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=SIZES['vocab_size']))")
    return _Head(body, sizes)


def _llama_sizes(job: ExportJob) -> dict[str, Any]:
    """Sizes of a Llama; any other model is refused."""
    job.drop_dropout("torchtitan's Llama has no dropout")
    sizes = {
        "n_layers": job.read("model.num_layers"),
        "dim": job.read("model.hidden_size"),
        "n_heads": job.read("model.num_attention_heads"),
        "n_kv_heads": job.read("model.num_key_value_heads"),
        "hidden_dim": job.read("model.intermediate_size"),
        "vocab_size": job.read("model.vocab_size"),
        "max_seq_len": job.read("model.max_position_embeddings"),
        "enable_weight_tying": job.read("model.tie_word_embeddings"),
        "theta": job.number("model.rope_theta", 10000.0),
    }
    is_square = job.read("model.head_dim") * sizes["n_heads"] == sizes["dim"]
    odd = [*job.unread_structure(), *([] if is_square else ["head_dim"])]
    if odd:
        fix = f"use one of {', '.join(RECIPES)}, a plain Llama, or another target"
        job.refuse("model", f"has recipes for some models and Llamas of any size; this one differs in {', '.join(odd)}", fix)
    return sizes


def _layout(job: ExportJob) -> list[str]:
    layout, model = job.layout, job.model
    stage = layout.dp_shard * layout.cp * layout.tp
    if job.read("layout.ep") > 1 and stage % layout.ep:
        job.refuse("layout.ep", f"ep must divide dp_shard * cp * tp = {stage}", "use a smaller ep, or dp_shard in place of dp_replicate")
    divisor = (layout.tp if layout.sequence_parallel else 1) * (2 * layout.cp if layout.cp > 1 else 1)
    if job.read("workload.seq_len") % divisor:
        job.refuse("workload.seq_len", f"must be a multiple of {divisor} (tp with sequence_parallel, times 2 * cp)", "use another tp or cp")
    p = "cfg.parallelism."
    lines = [
        f"{p}data_parallel_replicate_degree = {job.read('layout.dp_replicate')}",
        f"{p}data_parallel_shard_degree = {job.read('layout.dp_shard')}",
        f"{p}tensor_parallel_degree = {job.read('layout.tp')}",
        f"{p}enable_sequence_parallel = {job.read('layout.sequence_parallel')}",
        f"{p}context_parallel_degree = {job.read('layout.cp')}",
        f"{p}pipeline_parallel_degree = {job.read('layout.pp')}",
        f"{p}expert_parallel_degree = {layout.ep}",
    ]
    if layout.dp_shard > 1:
        lines.append(f"{p}fsdp_reshard_after_forward = {'always' if job.read('layout.zero_stage') == 3 else 'never'!r}")
        if layout.zero_stage == 1:
            job.drop("layout.zero_stage", "FSDP shards the gradients too: the nearest is stage 2, parameters kept between forward and backward")
    if layout.pp > 1:
        schedule = job.read("layout.schedule")
        if schedule not in SCHEDULES:
            job.refuse("layout.schedule", f"runs {', '.join(SCHEDULES)}", "use one of them")
        lines.append(f"{p}pipeline_parallel_schedule = {SCHEDULES.get(schedule)!r}")
        lines.append(f"{p}pipeline_parallel_microbatch_size = {layout.micro_batch_size}")
        lines.append(f"{p}module_fqns_per_model_part = {_chunks(model.num_layers, layout.pp * job.read('layout.num_virtual_stages'))}")
    per_rank = job.read("layout.micro_batch_size") * (job.num_microbatches if layout.pp > 1 else 1)
    return [
        *lines,
        f"cfg.training.local_batch_size = {per_rank}",
        f"cfg.training.global_batch_size = {job.read('workload.global_batch_size')}",
        f"cfg.training.seq_len = {job.read('workload.seq_len')}",
        f"cfg.training.disable_cuda_graphs = {layout.pp > 1 or layout.ep > 1}",
    ]


def _chunks(num_layers: int, num_chunks: int) -> list[list[str]]:
    """Names of the modules of each pipeline chunk, cut as the planner cuts them."""
    chunks, first = [], 0
    for size in chunk_sizes(num_layers, num_chunks):
        chunks.append([f"layers.{i}" for i in range(first, first + size)])
        first += size
    chunks[0].insert(0, "tok_embeddings")
    chunks[-1] += ["norm", "lm_head"]
    return chunks


def _training(job: ExportJob, imports: list[str]) -> list[str]:
    """Optimizer, rate, length, recompute, checkpoints: what the plan names; the rest stays as in the base recipe."""
    recompute = job.read("workload.recompute")
    if recompute != "none":
        imports.append(f"from torchtitan.distributed.activation_checkpoint import {RECOMPUTE[recompute].split('.')[0]}")
    kept = "float32" if job.workload.precision in ("fp32", "tf32") else "bfloat16"
    lines = [
        f"cfg.training.steps = {job.num_steps}",
        f"cfg.training.mixed_precision_param = {kept!r}",
        f"cfg.activation_checkpoint = {RECOMPUTE[recompute]}",
    ]
    if job.read("workload.optimizer") == "adamw":
        given: dict[str, Any] = {**job.training_numbers({"learning_rate": "lr", "eps": "eps", "weight_decay": "weight_decay"})}
        betas = job.betas()
        if betas is not None:
            given["betas"] = betas
        if given:
            imports.append("from torchtitan.components.optimizer import default_adamw")
            lines.append(f"cfg.optimizer = default_adamw({', '.join(f'{own}={value!r}' for own, value in given.items())})")
    else:
        job.drop("workload.optimizer", "this recipe knows adamw; others are set by cfg.optimizer's parameter groups")
    settings = job.training_numbers({
        "clip_norm": "training.max_norm", "warmup_steps": "lr_scheduler.warmup_steps", "min_lr_fraction": "lr_scheduler.min_lr_factor",
        "seed": "debug.seed", "checkpoint_every_steps": "checkpoint.interval", "keep_checkpoints": "checkpoint.keep_latest_k",
    })  # fmt: skip
    lines += [f"cfg.{name} = {value!r}" for name, value in settings.items()]
    if "checkpoint.interval" in settings:
        lines.append("cfg.checkpoint.enable = True")
    if settings.get("checkpoint.keep_latest_k") == 1:
        job.refuse("training.keep_checkpoints", "torchtitan keeps two or more", "use 2 or more")
    schedule = job.lr_schedule(("cosine", "wsd"))
    if schedule == "wsd":
        lines.append(f"cfg.lr_scheduler.decay_ratio = {job.decay_fraction()!r}")
    elif schedule == "cosine":
        lines.append("cfg.lr_scheduler.decay_type = 'cosine'")
    return lines


EXPORTERS.register("torchtitan")(Torchtitan())
