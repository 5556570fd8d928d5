"""torchtitan's recipes in Python (0.3) and its TOML files (up to 0.2.2).

A recipe is read as text: assignments of plain values to `cfg.section.key` count, anything else is listed as not understood. What a
recipe takes over from torchtitan's own (`cfg = llama3_70b()`) is not known here and has the defaults of ParallelismConfig.
"""

from __future__ import annotations

import ast
import tomllib
from typing import Any

from planner.errors import InputError, Problem
from planner.exporters.torchtitan import CONVERTERS, RECIPES, SCHEDULES
from planner.importers import IMPORTERS, Found, Given, Importer, quotient, whole

TRAINING = {
    "training.max_norm": "clip_norm", "lr_scheduler.warmup_steps": "warmup_steps", "lr_scheduler.min_lr_factor": "min_lr_fraction",
    "debug.seed": "seed", "checkpoint.interval": "checkpoint_every_steps", "checkpoint.keep_latest_k": "keep_checkpoints",
    "optimizer.lr": "learning_rate", "optimizer.eps": "eps", "optimizer.weight_decay": "weight_decay", "optimizer.beta1": "beta1",
    "optimizer.beta2": "beta2",
}  # fmt: skip
"""torchtitan's key -> the plan's, under training."""
NOT_OURS = ("dump_folder", "hf_assets_path", "model_spec", "loss", "training.disable_cuda_graphs", "compile", "checkpoint.enable", "lr_scheduler")
RECOMPUTE = {"SelectiveAC": "selective", "FullAC": "full", "selective": "selective", "full": "full", "none": "none"}


class Torchtitan(Importer):
    """`plan_recipe.py` or any recipe like it, or a TOML file."""

    name = "torchtitan"
    versions = ("0.3.0", "0.2.2")
    summary = "recipe in Python, or TOML"

    def read(self, text: str, where: str, given: Given) -> Found:
        """The plan's words for the file."""
        found = Found(stack="torchtitan")
        values = _toml(text, where, found) if where.endswith(".toml") else _recipe(text, where, found)
        _layout(values, found, given, where)
        _workload(values, found, where)
        for key, own in TRAINING.items():
            if isinstance(values.get(key), (int, float)):
                found.training[own] = values[key]
        if values.get("lr_scheduler.decay_ratio") is not None:
            found.training |= {"lr_schedule": "wsd", "decay_fraction": values["lr_scheduler.decay_ratio"]}
        elif values.get("lr_scheduler.decay_type") == "cosine":
            found.training["lr_schedule"] = "cosine"
        return found


def _toml(text: str, where: str, found: Found) -> dict[str, Any]:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError.single("toml", text[:60], f"must be valid TOML ({error})", "correct the file", where) from None
    values = {f"{section}.{key}": value for section, part in document.items() if isinstance(part, dict) for key, value in part.items()}
    mode = values.get("activation_checkpoint.mode")
    values["activation_checkpoint"] = RECOMPUTE.get(str(mode), "none") if mode is not None else "selective"
    flavors = {(package, flavor): preset for preset, (package, _, flavor) in RECIPES.items()}
    found.model = flavors.get((str(values.get("model.name")), str(values.get("model.flavor"))))
    converters = values.get("model.converters") or []
    values["precision"] = "fp8" if isinstance(converters, list) and "float8" in converters else None
    return values


def _recipe(text: str, where: str, found: Found) -> dict[str, Any]:
    """Dotted key -> value of the assignments in the file."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError.single("python", text[:60], f"must be Python ({type(error).__name__})", "correct the file", where) from None
    values: dict[str, Any] = {"precision": None}
    aliases = {"cfg": ""}
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.Assign)):
        for target, value in _pairs(node):
            path = _path(target, aliases)
            if path is None and isinstance(target, ast.Name) and isinstance(value, ast.Attribute):
                inner = _path(value, aliases)
                aliases |= {target.id: inner} if inner else {}
            elif isinstance(target, ast.Name) and target.id == "SIZES":
                found.model = _llama(_literal(value))
            elif path == "" and isinstance(value, ast.Call):
                called = ast.unparse(value.func).split(".")[-1]
                found.model = found.model or {recipe: preset for preset, (_, recipe, _) in RECIPES.items()}.get(called)
            elif path:
                _note(path, value, values, found)
    for precision, converter in CONVERTERS.items():
        if any(isinstance(n, ast.Name) and n.id == converter for n in ast.walk(tree)):
            values["precision"] = precision
    return values


def _pairs(node: ast.Assign) -> list[tuple[ast.expr, ast.expr]]:
    """(target, value) of `a = x` and of `a, b = x, y`."""
    pairs = []
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple) and len(target.elts) == len(node.value.elts):
            pairs += list(zip(target.elts, node.value.elts, strict=True))
        else:
            pairs.append((target, node.value))
    return pairs


def _path(node: ast.expr, aliases: dict[str, str]) -> str | None:
    """`parallelism.tensor_parallel_degree` of `cfg.parallelism.tensor_parallel_degree`; "" of `cfg`; None of anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in aliases:
        return None
    return ".".join([*([aliases[node.id]] if aliases[node.id] else []), *names])


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _note(path: str, value: ast.expr, values: dict[str, Any], found: Found) -> None:
    if path == "activation_checkpoint":
        name = ast.unparse(value).split(".")[0].split("(")[0]
        values[path] = "none" if name == "None" else RECOMPUTE.get(name, "selective")
    elif path == "optimizer" and isinstance(value, ast.Call):
        arguments = {word.arg: _literal(word.value) for word in value.keywords if word.arg}
        betas = arguments.pop("betas", None)
        if isinstance(betas, tuple) and len(betas) == 2:
            arguments |= {"beta1": betas[0], "beta2": betas[1]}
        values |= {f"optimizer.{name}": argument for name, argument in arguments.items()}
    elif _literal(value) is not None:
        values[path] = _literal(value)
    elif not path.startswith(NOT_OURS):
        found.ignored.append(f"cfg.{path} = {ast.unparse(value)[:60]}")


def _llama(sizes: Any) -> dict[str, Any] | None:
    """A config.json of the sizes that an exported recipe holds."""
    names = {
        "n_layers": "num_hidden_layers", "dim": "hidden_size", "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
        "hidden_dim": "intermediate_size", "vocab_size": "vocab_size", "max_seq_len": "max_position_embeddings",
        "enable_weight_tying": "tie_word_embeddings", "theta": "rope_theta",
    }  # fmt: skip
    return {"model_type": "llama", **{own: sizes[name] for name, own in names.items() if name in sizes}} if isinstance(sizes, dict) else None


def _layout(values: dict[str, Any], found: Found, given: Given, where: str) -> None:
    p = "parallelism."
    degrees = {
        "dp_replicate": "data_parallel_replicate_degree", "tp": "tensor_parallel_degree", "cp": "context_parallel_degree",
        "pp": "pipeline_parallel_degree", "ep": "expert_parallel_degree",
    }  # fmt: skip
    layout: dict[str, Any] = {own: whole(values, p + name, 1, where) for own, name in degrees.items()}
    others = layout["dp_replicate"] * layout["tp"] * layout["cp"] * layout["pp"]
    shard = whole(values, f"{p}data_parallel_shard_degree", -1, where, minimum=-1)
    if shard < 1 and given.num_devices is None:
        raise InputError(Problem("--num-devices", None, "the file leaves data_parallel_shard_degree to the number of devices", "add it", where))
    shard = quotient(given.num_devices or 0, others, "--num-devices", where) if shard < 1 else shard
    found.num_devices = others * shard
    schedule = str(values.get(f"{p}pipeline_parallel_schedule", "1F1B"))
    known = {theirs: own for own, theirs in SCHEDULES.items()}
    if layout["pp"] > 1 and schedule not in known:
        raise InputError.single(f"{p}pipeline_parallel_schedule", schedule, "is a schedule that the plan has no word for", "use another", where)
    policy = values.get(f"{p}fsdp_reshard_after_forward", "default")
    keeps = policy == "never" or (policy == "default" and layout["pp"] > 1)
    layout |= {
        "dp_shard": shard,
        "zero_stage": 0 if shard == 1 else 2 if keeps else 3,
        "sequence_parallel": layout["tp"] > 1 and values.get(f"{p}enable_sequence_parallel", True) is True,
        "micro_batch_size": whole(values, f"{p}pipeline_parallel_microbatch_size" if layout["pp"] > 1 else "training.local_batch_size", 1, where),
    }
    if layout["pp"] > 1:
        layout |= {"schedule": known[schedule], "num_virtual_stages": _virtual_stages(values, layout["pp"], schedule, where)}
    found.layout = layout


def _virtual_stages(values: dict[str, Any], pp: int, schedule: str, where: str) -> int:
    parts = values.get("parallelism.module_fqns_per_model_part")
    if isinstance(parts, list):
        return quotient(len(parts), pp, "parallelism.module_fqns_per_model_part", where)
    return 2 if schedule.startswith("Interleaved") else 1


def _workload(values: dict[str, Any], found: Found, where: str) -> None:
    local, layout = whole(values, "training.local_batch_size", 8, where), found.layout
    batch = whole(values, "training.global_batch_size", -1, where, minimum=-1)
    seq_len, steps = whole(values, "training.seq_len", 2048, where), whole(values, "training.steps", 10000, where)
    batch = batch if batch > 0 else local * layout["dp_replicate"] * layout["dp_shard"]
    kept = values.get("training.mixed_precision_param", "bfloat16")
    found.workload = {
        "seq_len": seq_len,
        "global_batch_size": batch,
        "tokens": float(batch * seq_len * steps),
        "precision": values.get("precision") or ("fp32" if kept == "float32" else "bf16"),
        "recompute": values.get("activation_checkpoint", "selective"),
    }
    found.training["num_steps"] = steps
    for name in ("local_batch_size", "seq_len", "steps"):
        if f"training.{name}" not in values:
            found.assumed.append(f"training.{name}: TrainingConfig's default, unless the base recipe sets it")


IMPORTERS.register("torchtitan")(Torchtitan())
