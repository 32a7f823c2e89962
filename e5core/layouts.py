"""The decoder's files as others read them: what families.py reads, written.

Names, values and descriptions of Hugging Face's and llama.cpp's files, from ours. Folders are those of a model without
a language-model head (transformers' AutoModel, as intfloat/e5-mistral-7b-instruct is published). What a format cannot
say is refused by name.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
from torch import Tensor

from e5core.backbone import BackboneConfig
from e5core.config import read_json
from e5core.families import FAMILIES, GGUF_DIVISORS, GGUF_NAMES, hf_config, hf_family

_CLASSES = {
    "llama": "LlamaModel",
    "mistral": "MistralModel",
    "qwen2": "Qwen2Model",
    "qwen3": "Qwen3Model",
    "gemma3_text": "Gemma3TextModel",
}
_ENDS = {"tok_embeddings.weight": "embed_tokens.weight"}  # and norm.weight, which is called so there too
_GGUF_ENDS = {"tok_embeddings.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
_GGUF_ARCHITECTURES = {"mistral": "llama"}  # llama.cpp knows no other; its llama has no window


def hf_description(path: Path, config: BackboneConfig, dtype: str) -> dict[str, Any]:
    """Return the config.json of the decoder at `path` (a Hugging Face folder or a .gguf file) with weights in `dtype`.

    Raises ValueError for rope scaling that transformers has no word for.
    """
    if path.suffix == ".gguf":
        described = _described(path, config)
    else:
        file = path / "config.json"
        _, raw = hf_family(read_json(file), file)
        left_out = ("auto_map", "_name_or_path", "transformers_version")
        described = FAMILIES[config.family].defaults | {k: v for k, v in raw.items() if k not in left_out}
    return described | {
        "model_type": config.family,
        "architectures": [_CLASSES[config.family]],
        "dtype": dtype,
        "torch_dtype": dtype,  # its name before transformers 5
    }


def hf_stored(name: str, tensor: Tensor, config: BackboneConfig) -> tuple[str, Tensor]:
    """Turn our name and values of a tensor into those of a Hugging Face file."""
    family = FAMILIES[config.family]
    if family.hf_norm_offset and name.endswith("norm.weight"):
        tensor = tensor - family.hf_norm_offset
    return _stored_name(name, _ENDS, "layers", {ours: theirs for theirs, ours in family.hf_names.items()}), tensor


def gguf_stored(name: str, tensor: Tensor, config: BackboneConfig) -> tuple[str, Tensor]:
    """Turn our name and values of a tensor into those of a .gguf file."""
    heads = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(name.split(".")[-2])
    if heads is not None and FAMILIES[config.family].gguf_interleaved:
        tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)  # rotary pairs side by side
    return _stored_name(name, _GGUF_ENDS, "blk", {ours: theirs for theirs, ours in GGUF_NAMES.items()}), tensor


def gguf_description(config: BackboneConfig) -> tuple[str, dict[str, Any]]:
    """Return a .gguf file's architecture and the metadata that describe the decoder as an embedder.

    Raises ValueError for what llama.cpp would not compute as we do.
    """
    arch = _GGUF_ARCHITECTURES.get(config.family, FAMILIES[config.family].gguf)
    _check_gguf(arch, config)
    context = config.max_positions
    if arch == "llama" and config.window is not None:
        context = min(context, config.window)  # a text that fits the window needs none
    described: dict[str, Any] = {
        "block_count": config.n_layers,
        "context_length": context,
        "embedding_length": config.dim,
        "feed_forward_length": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
        "pooling_type": int(gguf.PoolingType.LAST),
    }
    if config.rope_divisors is not None and len(set(config.rope_divisors)) == 1:
        described |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_divisors[0]}
    if arch == "gemma3":
        described |= {"attention.sliding_window": config.window, "rope.freq_base_swa": config.local_rope_theta}
    return arch, {f"{arch}.{key}": value for key, value in described.items()}


def gguf_divisors(config: BackboneConfig) -> tuple[str, tuple[float, ...]] | None:
    """Return the name and values of the tensor that holds rope scaling which no single factor says."""
    if config.rope_divisors is None or len(set(config.rope_divisors)) == 1:
        return None
    return GGUF_DIVISORS, config.rope_divisors


def _stored_name(name: str, ends: dict[str, str], blocks: str, table: dict[str, str]) -> str:
    if not name.startswith("layers."):
        return ends.get(name, name)
    _, layer, rest = name.split(".", 2)
    part, _, leaf = rest.rpartition(".")
    return f"{blocks}.{layer}.{table[part]}.{leaf}"


def _check_gguf(arch: str, config: BackboneConfig) -> None:
    if gguf_divisors(config) is not None and arch != "llama":
        raise ValueError(f"a .gguf file of the architecture {arch} cannot hold this rope scaling; export merged")
    if arch.startswith("qwen") and config.window is not None:
        raise ValueError("llama.cpp has no sliding window for Qwen, and this model has one; export merged")
    if arch != "gemma3":
        return
    # What llama.cpp takes for granted: every sixth layer is global, and queries are scaled by head_dim, or as in 27B.
    expected = tuple(i for i in range(config.n_layers) if (i + 1) % 6 == 0)
    scaled_by = config.dim / config.n_heads if config.n_layers == 62 else config.head_dim
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    if config.window is None or config.global_layers != expected or not math.isclose(scale, scaled_by**-0.5):
        raise ValueError("llama.cpp has other global layers or another attention scale for Gemma 3; export merged")


def _described(path: Path, config: BackboneConfig) -> dict[str, Any]:
    """Describe a decoder read from a .gguf file as config.json does; what was written is read back and compared."""
    described: dict[str, Any] = {
        "model_type": config.family,
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "sliding_window": config.window,
        "tie_word_embeddings": True,
    }
    described |= {"hidden_act": "silu"} if config.activation == "silu" else {}
    if config.local_rope_theta is not None:
        kinds = [
            "full_attention" if config.window_of(i) is None else "sliding_attention" for i in range(config.n_layers)
        ]
        scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        described |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "layer_types": kinds,
            "query_pre_attn_scalar": round(scale**-2),  # transformers takes whole numbers alone
            "rope_local_base_freq": config.local_rope_theta,
        }
    for scaling in _scalings(config):
        candidate = described | ({} if scaling is None else {"rope_scaling": scaling})
        if _equal(hf_config(candidate, path), config):
            return candidate
    raise ValueError(f"{path}: config.json has no word for this model's rope scaling; export gguf")


def _scalings(config: BackboneConfig) -> list[dict[str, Any] | None]:
    """Return the rope_scaling tables that may have made the divisors: one factor, or Llama 3.1's and 3.2's."""
    if config.rope_divisors is None:
        return [None]
    factor = max(config.rope_divisors)
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return [{"rope_type": "linear", "factor": factor}, {"rope_type": "llama3", "factor": round(factor, 3)} | llama3]


def _equal(read: BackboneConfig, config: BackboneConfig) -> bool:
    plain = {"rope_divisors": None, "attention_scale": None, "causal": True}
    one, other = read.rope_divisors or (), config.rope_divisors or ()
    scales = [c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale for c in (read, config)]
    return (
        replace(read, **plain) == replace(config, **plain)
        and len(one) == len(other)
        and all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(one, other, strict=True))
        and math.isclose(*scales, rel_tol=1e-6)
    )
