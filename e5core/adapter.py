"""Adapters on disk, in PEFT's layout: adapter_config.json and adapter_model.safetensors.

Ours are written for the model without a head (task type FEATURE_EXTRACTION, keys base_model.model.layers...), as
intfloat/e5-mistral-7b-instruct is published, or for the one with a head (CAUSAL_LM, base_model.model.model.layers...);
both are read, whoever made them, as long as they are plain LoRA. PEFT only warns about keys that it does not find, so
the wrong one of the two gives an untrained model there. The names of the linears are families.py's table; PEFT's own
words occur here alone.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from e5core.backbone import Backbone
from e5core.config import read_json
from e5core.families import HF_NAMES
from e5core.lora import LINEARS, LoraConfig, adapters

_PREFIX, _HEAD = "base_model.model.", "model."  # of an adapter on a model; and more where that has a head
_LEAVES = {"lora_a": "lora_A", "lora_b": "lora_B"}
_PARTS = {ours.rpartition(".")[2]: name.rpartition(".")[2] for name, ours in HF_NAMES.items()}
# What changes the formula of a plain LoRA, and the values that leave it as it is; absent means the first.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
}


def write_adapter(
    folder: Path, masters: Mapping[str, Tensor], config: LoraConfig, base: str, head: bool = False
) -> None:
    """Write the adapters as PEFT does; head: for the model with its language-model head.

    masters: whole tensors by their names in the backbone, "layers.0.attention.wq.lora_a" (R, in) and lora_b (out, R).
    """
    theirs = {ours: name for name, ours in HF_NAMES.items()}
    prefix, tensors = _PREFIX + _HEAD * head, {}
    for name, tensor in masters.items():
        _, layer, rest = name.split(".", 2)
        part, _, leaf = rest.rpartition(".")
        tensors[f"{prefix}layers.{layer}.{theirs[part]}.{_LEAVES[leaf]}.weight"] = tensor.detach().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if head else "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "bias": "none",
        "target_modules": [_PARTS[target] for target in config.targets],
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def read_lora(folder: Path) -> tuple[LoraConfig, str]:
    """Read adapter_config.json.  Returns the [lora] table that it means, and the name of the base model.

    rsLoRA's alpha / sqrt(r) is expressed by alpha.  Raises FileNotFoundError, or ValueError for what is no plain LoRA
    on the linears of a decoder.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no adapter_config.json; an adapter is a folder in PEFT's layout")
    raw = read_json(file)
    for key, allowed in _PLAIN.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{file}: {key} = {raw[key]!r:.80} is not supported; it must be {allowed[0]!r}")
    rank, alpha, targets = raw.get("r"), raw.get("lora_alpha"), raw.get("target_modules")
    if type(rank) is not int or rank < 1 or isinstance(alpha, bool) or not isinstance(alpha, int | float) or alpha <= 0:
        raise ValueError(f"{file}: r and lora_alpha must be numbers above 0: got {rank!r} and {alpha!r}")
    names = {_PARTS[linear]: linear for linear in LINEARS}
    if not isinstance(targets, list) or not targets or not set(targets) <= set(names):
        raise ValueError(f"{file}: target_modules must be a list of {', '.join(names)}: got {targets!r:.120}")
    config = LoraConfig(
        rank=rank,
        alpha=float(alpha) * (math.sqrt(rank) if raw.get("use_rslora") else 1),
        dropout=float(raw.get("lora_dropout") or 0),
        targets=tuple(linear for theirs, linear in names.items() if theirs in targets),
    )
    return config, str(raw.get("base_model_name_or_path") or "")


def adapter_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (our name, tensor), e.g. "layers.0.attention.wq.lora_a", of adapter_model.safetensors.

    Raises FileNotFoundError, or ValueError where the file is damaged or a tensor is not finite.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        pickled = " (adapter_model.bin is a pickle, which is never read)" * (folder / "adapter_model.bin").is_file()
        raise FileNotFoundError(f"{folder}: no adapter_model.safetensors; the adapter is not whole{pickled}")
    leaves = {theirs: ours for ours, theirs in _LEAVES.items()}
    try:
        with safe_open(file, framework="pt") as source:
            for name in source.keys():  # noqa: SIM118  (safe_open is no dict)
                rest = name.removeprefix(_PREFIX).removeprefix(_HEAD)
                layer, _, rest = rest.removeprefix("layers.").partition(".")
                part, _, leaf = rest.removesuffix(".weight").rpartition(".")
                tensor = source.get_tensor(name)
                if not torch.isfinite(tensor).all():
                    raise ValueError(f"{file}: {name} must be finite; it holds NaN or infinite values")
                yield f"layers.{layer}.{HF_NAMES.get(part, part)}.{leaves.get(leaf, leaf)}", tensor
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from error


def read_adapter(folder: Path, backbone: Backbone, put: Callable[[str, Tensor], None] | None = None) -> None:
    """Fill the backbone's adapters from a folder in PEFT's layout.

    put: takes (name in the backbone, tensor) instead.
    Raises FileNotFoundError, or ValueError for tensors that are missing, left over, of another shape or not finite.
    """
    wanted = {f"{name}.{leaf}": linear for name, linear in adapters(backbone) for leaf in _LEAVES}
    for name, tensor in adapter_tensors(folder):
        linear = wanted.pop(name, None)
        if linear is None:
            raise ValueError(f"{folder}: {name} fits no adapted linear of this model")
        parameter = linear.lora_a if name.endswith("lora_a") else linear.lora_b
        if tensor.shape != parameter.shape:
            raise ValueError(f"{folder}: {name} must be {tuple(parameter.shape)}: got shape {tuple(tensor.shape)}")
        if put is not None:
            put(name, tensor)
            continue
        with torch.no_grad():
            parameter.copy_(tensor)
    if wanted:
        raise ValueError(f"{folder}: no tensors for {len(wanted)} adapters, first of them {next(iter(wanted))}")
