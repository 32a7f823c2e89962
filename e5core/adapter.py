"""Adapters on disk, in PEFT's layout (adapter_config.json, adapter_model.safetensors; task type FEATURE_EXTRACTION).

The names of the linears are families.py's table; PEFT's own words occur here alone.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from e5core.backbone import Backbone
from e5core.families import HF_NAMES
from e5core.lora import LoraConfig, adapters

_PEFT_PREFIX = "base_model.model."  # of an adapter on a model without a head


def write_adapter(folder: Path, masters: Mapping[str, Tensor], config: LoraConfig, base: str) -> None:
    """Write the adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors.

    masters: whole tensors by their names in the backbone, e.g. "layers.0.attention.wq.lora_a".
    """
    theirs = {ours: name for name, ours in HF_NAMES.items()}
    tensors = {}
    for name, tensor in masters.items():
        _, layer, rest = name.split(".", 2)
        part, _, leaf = rest.rpartition(".")
        matrix = leaf.replace("lora_a", "lora_A").replace("lora_b", "lora_B")
        tensors[f"{_PEFT_PREFIX}layers.{layer}.{theirs[part]}.{matrix}.weight"] = tensor.detach().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    parts = {ours.rpartition(".")[2]: name.rpartition(".")[2] for name, ours in HF_NAMES.items()}
    described = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "bias": "none",
        "target_modules": [parts[target] for target in config.targets],
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def read_adapter(folder: Path, backbone: Backbone, put: Callable[[str, Tensor], None] | None = None) -> None:
    """Fill the backbone's adapters from a folder in PEFT's layout.

    put: takes (name in the backbone, tensor) instead.
    Raises FileNotFoundError, or ValueError for tensors that are missing, left over, of another shape or not finite.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no adapter_model.safetensors; the checkpoint is not whole")
    wanted = {f"{name}.{leaf}": (name, linear) for name, linear in adapters(backbone) for leaf in ("lora_A", "lora_B")}
    try:
        with safe_open(file, framework="pt") as source:
            for name in source.keys():  # noqa: SIM118  (safe_open is no dict)
                layer, _, rest = name.removeprefix(f"{_PEFT_PREFIX}layers.").partition(".")
                part, _, leaf = rest.removesuffix(".weight").rpartition(".")
                found = wanted.pop(f"layers.{layer}.{HF_NAMES.get(part, part)}.{leaf}", None)
                if found is None:
                    raise ValueError(f"{file}: {name} fits no adapted linear of this model")
                ours, linear = found
                tensor = source.get_tensor(name)
                parameter = linear.lora_a if leaf == "lora_A" else linear.lora_b
                if tensor.shape != parameter.shape or not torch.isfinite(tensor).all():
                    raise ValueError(
                        f"{file}: {name} must be finite and {tuple(parameter.shape)}: got shape {tuple(tensor.shape)}"
                    )
                if put is not None:
                    put(f"{ours}.{leaf.lower()}", tensor)
                    continue
                with torch.no_grad():
                    parameter.copy_(tensor)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from error
    if wanted:
        raise ValueError(f"{file}: no tensors for {len(wanted)} adapters, first of them {next(iter(wanted))}")
