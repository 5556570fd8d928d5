"""Weights in the layout of HF's safetensors, both ways, for Llama-style (also Mistral, Qwen 2 and 3) and GPT-2 models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from planner.errors import InputError, Problem
from planner.model_spec import ModelSpec
from reftrain.lora import merged, without_adapters
from reftrain.model import Transformer, fill

__all__ = ["from_hf", "load_weights", "save_weights", "to_hf"]

MAX_HEADER_BYTES = 10 * 2**20
LLAMA_FAMILIES = ("llama", "qwen2", "qwen3")
LLAMA = (
    (r"embeddings\.token\.weight", "model.embed_tokens.weight"),
    (r"head\.norm\.weight", "model.norm.weight"),
    (r"head\.weight", "lm_head.weight"),
    (r"blocks\.(\d+)\.attention_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
    (r"blocks\.(\d+)\.mlp_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
    (r"blocks\.(\d+)\.attention\.([qkv])\.(weight|bias)", r"model.layers.\1.self_attn.\2_proj.\3"),
    (r"blocks\.(\d+)\.attention\.out\.(weight|bias)", r"model.layers.\1.self_attn.o_proj.\2"),
    (r"blocks\.(\d+)\.attention\.([qk])_norm\.weight", r"model.layers.\1.self_attn.\2_norm.weight"),
    (r"blocks\.(\d+)\.mlp\.(up|gate|down)\.(weight|bias)", r"model.layers.\1.mlp.\2_proj.\3"),
)
GPT2 = (
    (r"embeddings\.token\.weight", "transformer.wte.weight"),
    (r"embeddings\.position", "transformer.wpe.weight"),
    (r"head\.norm\.(weight|bias)", r"transformer.ln_f.\1"),
    (r"head\.weight", "lm_head.weight"),
    (r"blocks\.(\d+)\.attention_norm\.(weight|bias)", r"transformer.h.\1.ln_1.\2"),
    (r"blocks\.(\d+)\.mlp_norm\.(weight|bias)", r"transformer.h.\1.ln_2.\2"),
    (r"blocks\.(\d+)\.attention\.([qkv])\.(weight|bias)", r"transformer.h.\1.attn.c_attn.\3"),
    (r"blocks\.(\d+)\.attention\.out\.(weight|bias)", r"transformer.h.\1.attn.c_proj.\2"),
    (r"blocks\.(\d+)\.mlp\.up\.(weight|bias)", r"transformer.h.\1.mlp.c_fc.\2"),
    (r"blocks\.(\d+)\.mlp\.down\.(weight|bias)", r"transformer.h.\1.mlp.c_proj.\2"),
)
TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
"""GPT-2 keeps these as [in, out]."""


def _names(spec: ModelSpec) -> tuple[tuple[str, str], ...]:
    if spec.family == "gpt2":
        return GPT2
    if spec.family in LLAMA_FAMILIES and spec.moe is None:
        return LLAMA
    raise InputError.single(
        "model", spec.name, f"HF weights are read and written for {', '.join(LLAMA_FAMILIES)} and gpt2", "use one of these families"
    )


def _hf_name(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    raise KeyError(name)


def to_hf(state: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """Our names and shapes to HF's: GPT-2's q, k and v lie in one transposed matrix. A tied head is left out."""
    table = _names(spec)
    joined: dict[str, list[Tensor]] = {}
    for name, tensor in state.items():
        joined.setdefault(_hf_name(name, table), []).append(tensor)
    whole = {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in joined.items()}
    if spec.family == "gpt2":
        whole = {name: tensor.t() if TRANSPOSED.search(name) else tensor for name, tensor in whole.items()}
    return {name: tensor.contiguous() for name, tensor in whole.items()}


def from_hf(weights: Mapping[str, Tensor], model: Transformer) -> dict[str, Tensor]:
    """HF's weights under our names, for `model.load_state_dict`.

    Raises:
        InputError: every tensor that is missing, left over or of another shape.
    """
    spec = model.spec
    table, found, used = _names(spec), {}, set()
    problems: list[Problem] = []
    prefix = "transformer." if spec.family == "gpt2" else "model."
    have = {name if name.startswith((prefix, "lm_head.")) else prefix + name: tensor for name, tensor in weights.items()}
    for name, parameter in model.named_parameters():
        if not without_adapters(name):
            continue
        hf_name = _hf_name(name, table)
        tensor = have.get(hf_name)
        used.add(hf_name)
        if tensor is None:
            problems.append(Problem(hf_name, None, "is missing from the weights", "use the weights of this very model"))
            continue
        if spec.family == "gpt2" and TRANSPOSED.search(hf_name):
            tensor = tensor.t()
        joint = re.search(r"attention\.([qkv])\.", name)
        if joint and "c_attn" in hf_name and tensor.shape[0] % 3 == 0:
            tensor = tensor.chunk(3)["qkv".index(joint[1])]
        if tensor.shape != parameter.shape:
            problems.append(
                Problem(hf_name, list(tensor.shape), f"must have the shape {list(parameter.shape)}", "use the weights of this very model")
            )
        found[name] = tensor.to(torch.float32)
    ignored = re.compile(r"(\.attn\.(bias|masked_bias)|rotary_emb\.inv_freq|^lm_head\.weight)$")
    left = [name for name in have if name not in used and not ignored.search(name)]
    problems += [Problem(name, list(have[name].shape), "is not part of this model", "use the weights of this very model") for name in left[:8]]
    if problems:
        raise InputError(*problems)
    return found


def load_weights(model: Transformer, folder: str | Path) -> None:
    """Reads `model.safetensors` (or the shards that `model.safetensors.index.json` names) of an HF folder into a whole model.

    Raises:
        InputError: no such file, damaged, or the weights of another model.
    """
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    for file in _weight_files(Path(folder)):
        try:
            with file.open("rb") as stream:
                header_bytes = int.from_bytes(stream.read(8), "little")
            if header_bytes > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {header_bytes} bytes")
            weights |= load_file(file)
        except Exception as error:  # safetensors' own error types are not public
            reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            raise InputError.single("init_from", file.name, f"must be a safetensors file ({reason})", "copy the file again", str(file)) from None
    found = from_hf(weights, model)
    for name, parameter in model.named_parameters():
        if name in found:
            fill(parameter, found[name])


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        from planner.files import read_json

        content = read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
            rule = "must map tensors to files under `weight_map`"
            raise InputError.single("init_from", index.name, rule, "copy the file again", str(index))
        return [folder / Path(name).name for name in sorted(set(weight_map.values()))]
    file = folder / "model.safetensors"
    if not file.is_file():
        raise InputError.single("init_from", folder.name, "must hold model.safetensors", "give a folder with HF-layout weights", str(folder))
    return [file]


def save_weights(model: Transformer, model_config: dict[str, Any], folder: str | Path, lora_scale: float = 0.0) -> Path:
    """Writes `model.safetensors` and `config.json` that transformers loads; returns the weights' path. Split parameters are gathered.

    Args:
        lora_scale: alpha / rank of the adapters, if the model has any, which are merged into the weights.

    Raises:
        InputError: the family has no HF layout here, or the folder cannot be written.
    """
    from safetensors.torch import save_file

    from planner.files import to_json, write_text

    folder = Path(folder)
    state = {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in model.named_parameters()}
    tensors = to_hf(merged({n: p.detach().cpu() for n, p in state.items()}, lora_scale), model.spec)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / ".model.safetensors.partial"
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.replace(folder / "model.safetensors")
    except OSError as error:
        raise InputError.single("out", str(folder), f"cannot be written ({error.strerror})", "choose another folder, or free space") from None
    architecture = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    config = {**model_config, "architectures": [architecture[model.spec.family]], "dtype": "float32"}
    write_text(folder / "config.json", to_json({k: v for k, v in config.items() if k != "name"}))
    return folder / "model.safetensors"
