"""Model families: the only room that knows Hugging Face's and GGUF's names, and what each family's files leave unsaid.

FAMILIES has one entry a family; with the name maps below it, it turns config.json or a GGUF's metadata into the fields
of BackboneConfig, and the files' tensors into ours. No other room names a family. docs/design.md says how to add one.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from e5core.backbone import BackboneConfig

HF_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "feed_forward.w_gate",
    "mlp.up_proj": "feed_forward.w_up",
    "mlp.down_proj": "feed_forward.w_down",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
# Where blocks have four norms, post_attention_layernorm is what it says.
HF_FOUR_NORMS = HF_NAMES | {
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "ffn_post_norm",
}
GGUF_NAMES = {
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "attn_q_norm": "attention.q_norm",
    "attn_k_norm": "attention.k_norm",
    "ffn_gate": "feed_forward.w_gate",
    "ffn_up": "feed_forward.w_up",
    "ffn_down": "feed_forward.w_down",
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
    "post_attention_norm": "attention_post_norm",
    "post_ffw_norm": "ffn_post_norm",
}
GGUF_DIVISORS = "rope_freqs.weight"  # llama.cpp's place for Llama 3.1's rope scaling
_EMBEDDING, _NORM = "tok_embeddings.weight", "norm.weight"
# Tensors that a decoder file may hold and an embedder does not use.
_UNUSED = ("lm_head.weight", "output.weight", GGUF_DIVISORS)
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"  # the words of config.json's layer_types
_SILU = {"hidden_act": ("silu",), "attention_bias": (False, None), "mlp_bias": (False, None)}
_Read = Callable[[dict[str, Any], dict[str, Any], Path], dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What sets the files of one family apart from those of the others."""

    gguf: str  # general.architecture of its .gguf files
    wrapper: str | None = None  # model_type of the multimodal config.json that holds it as text_config
    wrapped_with: tuple[str, ...] = ()  # beginnings of the names of that model's other tensors
    fields: dict[str, Any] = field(default_factory=dict)  # of BackboneConfig, the same for every model of the family
    only: dict[str, tuple[Any, ...]]  # keys of config.json and the values supported; absent means the first
    defaults: dict[str, Any] = field(default_factory=dict)  # what transformers takes where config.json is silent
    rope_by_layer: bool = False  # local and global layers have rotary bases of their own
    # From (config.json or a GGUF's metadata, the fields so far, the file): the fields that only this family reads.
    read_hf: _Read = lambda raw, fields, file: {}
    read_gguf: _Read = lambda metadata, fields, file: {}
    hf_names: dict[str, str] = field(default_factory=lambda: HF_NAMES)
    # What Hugging Face's norm weights lack: Gemma computes with (1 + w) and files w. GGUF's hold 1 + w already: the
    # converter adds it and llama.cpp multiplies by what it reads. Whoever writes Hugging Face's files subtracts it.
    hf_norm_offset: float = 0.0
    gguf_interleaved: bool = False  # llama.cpp stores q and k of the llama architecture with rotary pairs interleaved


def _mistral_hf(raw: dict[str, Any], fields: dict[str, Any], file: Path) -> dict[str, Any]:
    return {"window": None if raw["sliding_window"] is None else _size(raw, "sliding_window", file)}


def _qwen_hf(raw: dict[str, Any], fields: dict[str, Any], file: Path) -> dict[str, Any]:
    if not raw["use_sliding_window"]:
        raw = raw | {"sliding_window": None}
    first = 0 if raw["max_window_layers"] == 0 else _size(raw, "max_window_layers", file)
    return _hf_layers(raw, fields["n_layers"], lambda i: raw["sliding_window"] is not None and i >= first, file)


def _gemma_hf(raw: dict[str, Any], fields: dict[str, Any], file: Path) -> dict[str, Any]:
    period = _size(raw, "sliding_window_pattern", file)
    return _hf_layers(raw, fields["n_layers"], lambda i: (i + 1) % period != 0, file) | {
        "embedding_scale": fields["dim"] ** 0.5,
        "attention_scale": _positive(raw, "query_pre_attn_scalar", file) ** -0.5,
    }


def _qwen_gguf(metadata: dict[str, Any], fields: dict[str, Any], file: Path) -> dict[str, Any]:
    if fields["window"] is not None:  # llama.cpp neither writes one nor says which layers it would be for
        raise ValueError(f"{file}: attention.sliding_window = {fields['window']} is not supported for Qwen in GGUF")
    return {}


def _gemma_gguf(metadata: dict[str, Any], fields: dict[str, Any], file: Path) -> dict[str, Any]:
    if metadata.get("gemma3.attn_logit_softcapping"):
        raise ValueError(f"{file}: gemma3.attn_logit_softcapping is not supported; it must be absent")
    period = _size(metadata, "gemma3.attention.sliding_window_pattern", file, 6)
    layers = range(fields["n_layers"])
    # The format has no key for query_pre_attn_scalar. It is head_dim but for the 27B model (62 layers), where it is
    # dim / n_heads; llama.cpp goes by the layers as well.
    scalar = fields["dim"] / fields["n_heads"] if len(layers) == 62 else fields["head_dim"]
    return {
        "rope_theta": _positive(metadata, "gemma3.rope.freq_base", file),
        "local_rope_theta": _positive(metadata, "gemma3.rope.freq_base_swa", file, 10_000.0),
        "global_layers": () if fields["window"] is None else tuple(i for i in layers if (i + 1) % period == 0),
        "embedding_scale": fields["dim"] ** 0.5,
        "attention_scale": scalar**-0.5,
    }


FAMILIES = {
    "llama": Family(
        gguf="llama",
        only=_SILU | {"layer_types": (None,)},
        gguf_interleaved=True,
    ),
    "mistral": Family(
        gguf="mistral",
        only=_SILU | {"layer_types": (None,)},
        defaults={"sliding_window": 4096},
        read_hf=_mistral_hf,
        gguf_interleaved=True,
    ),
    "qwen2": Family(
        gguf="qwen2",
        fields={"qkv_bias": True},
        only={"hidden_act": ("silu",)},
        defaults={"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
        read_hf=_qwen_hf,
        read_gguf=_qwen_gguf,
    ),
    "qwen3": Family(
        gguf="qwen3",
        fields={"qk_norm": True},
        only=_SILU,
        defaults={"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
        read_hf=_qwen_hf,
        read_gguf=_qwen_gguf,
    ),
    "gemma3_text": Family(
        gguf="gemma3",
        wrapper="gemma3",
        wrapped_with=("vision_tower.", "multi_modal_projector."),
        fields={"qk_norm": True, "post_norms": True, "activation": "gelu_tanh"},
        only={
            "hidden_activation": ("gelu_pytorch_tanh",),
            "attention_bias": (False, None),
            "attn_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
        },
        defaults={  # the text_config of the multimodal models says little more than the sizes that are not these
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262_208,
            "rms_norm_eps": 1e-6, "max_position_embeddings": 131_072, "query_pre_attn_scalar": 256,
            "sliding_window": 4096, "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        },  # fmt: skip
        rope_by_layer=True,
        read_hf=_gemma_hf,
        read_gguf=_gemma_gguf,
        hf_names=HF_FOUR_NORMS,
        hf_norm_offset=1.0,
    ),
}  # fmt: skip


def hf_config(raw: dict[str, Any], file: Path) -> BackboneConfig:
    """Turn a config.json into ours.  Raises ValueError for a family or a feature that is not supported."""
    name, raw = hf_family(raw, file)
    family = FAMILIES[name]
    raw = family.defaults | raw
    for key, allowed in family.only.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{file}: {key} = {raw[key]!r} is not supported for {name}; it must be {allowed[0]!r}")
    dim, n_heads = _size(raw, "hidden_size", file), _size(raw, "num_attention_heads", file)
    fields = {
        "family": name,
        "dim": dim,
        "n_layers": _size(raw, "num_hidden_layers", file),
        "n_heads": n_heads,
        "n_kv_heads": _size(raw, "num_key_value_heads", file, n_heads),
        "head_dim": _size(raw, "head_dim", file, dim // n_heads),
        "hidden_dim": _size(raw, "intermediate_size", file),
        "vocab_size": _size(raw, "vocab_size", file),
        "norm_eps": _positive(raw, "rms_norm_eps", file),
        "max_positions": _size(raw, "max_position_embeddings", file),
    }
    fields |= _hf_rope(raw, family.rope_by_layer, fields["head_dim"], file)
    return _backbone_config(file, fields | family.fields | family.read_hf(raw, fields, file))


def gguf_config(metadata: dict[str, Any], rope_freqs: tuple[float, ...] | None, file: Path) -> BackboneConfig:
    """Turn a GGUF's metadata and its rope_freqs.weight into our config.  Raises ValueError as hf_config does."""
    arch = metadata.get("general.architecture")
    name = next((name for name, family in FAMILIES.items() if family.gguf == arch), None)
    if name is None:
        supported = ", ".join(family.gguf for family in FAMILIES.values())
        raise ValueError(f"{file}: architecture {arch!r} is not supported; supported are {supported}")

    def size(key: str, default: int | None = None) -> int:
        return _size(metadata, f"{arch}.{key}", file, default)

    dim, n_heads = size("embedding_length"), size("attention.head_count")
    head_dim = size("attention.key_length", dim // n_heads)
    if size("rope.dimension_count", head_dim) != head_dim:
        rotated = metadata[f"{arch}.rope.dimension_count"]
        raise ValueError(f"{file}: {arch}.rope.dimension_count = {rotated} is not supported; it must be {head_dim}")
    tokens = metadata.get("tokenizer.ggml.tokens")  # files of 2023 say the vocabulary's size by them alone
    fields = {
        "family": name,
        "dim": dim,
        "n_layers": size("block_count"),
        "n_heads": n_heads,
        "n_kv_heads": size("attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "hidden_dim": size("feed_forward_length"),
        "vocab_size": size("vocab_size", len(tokens) if isinstance(tokens, list) else None),
        "norm_eps": _positive(metadata, f"{arch}.attention.layer_norm_rms_epsilon", file),
        "rope_theta": _positive(metadata, f"{arch}.rope.freq_base", file, 10_000.0),
        "rope_divisors": _gguf_divisors(metadata, f"{arch}.rope", rope_freqs, head_dim // 2, file),
        "window": size("attention.sliding_window") if metadata.get(f"{arch}.attention.sliding_window") else None,
        "max_positions": size("context_length"),
    }
    family = FAMILIES[name]
    return _backbone_config(file, fields | family.fields | family.read_gguf(metadata, fields, file))


def hf_name(name: str, family: Family) -> str | None:
    """Translate the name of a Hugging Face tensor.  Returns None for one that an embedder does not use."""
    for prefix in ("model.", "language_model.", "model."):  # multimodal models wrap the decoder in either order
        name = name.removeprefix(prefix)
    if family.wrapped_with and name.startswith(family.wrapped_with):
        return None
    return _our_name(name, "embed_tokens.weight", _NORM, "layers", family.hf_names)


def hf_tensor(name: str, tensor: Tensor, family: Family) -> Tensor:
    """Turn the values of a Hugging Face tensor into those of ours of this name."""
    if not family.hf_norm_offset or not name.endswith("norm.weight"):
        return tensor
    # In fp32 whatever the file's dtype, as transformers computes it: 1 + w in bf16 would lose up to 8 of w's bits.
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) + family.hf_norm_offset


def gguf_name(name: str) -> str | None:
    """Translate the name of a GGUF tensor, as hf_name does."""
    return _our_name(name, "token_embd.weight", "output_norm.weight", "blk", GGUF_NAMES)


def gguf_tensor(name: str, tensor: Tensor, config: BackboneConfig) -> Tensor:
    """Turn the values of a GGUF tensor into those of ours of this name."""
    heads = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(name.split(".")[-2])
    if heads is None or not FAMILIES[config.family].gguf_interleaved:
        return tensor
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)  # (heads * head_dim, D), in halves


def object_of(value: Any, what: str, file: Path) -> dict[str, Any]:
    """Return a JSON object as it is.  Raises ValueError for anything else."""
    if not isinstance(value, dict):
        raise ValueError(f"{file}: {what} must be a JSON object: got {value!r:.80}")
    return value


def _our_name(name: str, embedding: str, norm: str, blocks: str, table: dict[str, str]) -> str | None:
    if name in _UNUSED or name.endswith("rotary_emb.inv_freq"):
        return None
    if name in (embedding, norm):
        return _EMBEDDING if name == embedding else _NORM
    prefix, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    part, _, leaf = rest.rpartition(".")
    return f"layers.{layer}.{table[part]}.{leaf}" if prefix == blocks and part in table else name


def hf_family(raw: dict[str, Any], file: Path) -> tuple[str, dict[str, Any]]:
    """Return the family of a config.json, and the table of it that describes the decoder.  Raises ValueError."""
    kind = raw.get("model_type")
    for name, family in FAMILIES.items():
        if kind == name:
            return name, raw
        if kind is not None and kind == family.wrapper:
            return name, object_of(raw.get("text_config"), "text_config", file)
    supported = ", ".join(name for key, family in FAMILIES.items() for name in (key, family.wrapper) if name)
    raise ValueError(f"{file}: architecture {kind!r} is not supported; supported are {supported}")


def _backbone_config(file: Path, fields: dict[str, Any]) -> BackboneConfig:
    try:
        return BackboneConfig(**fields)
    except ValueError as error:  # sizes that do not fit each other
        raise ValueError(f"{file}: {error}") from error


def _hf_layers(raw: dict[str, Any], n_layers: int, local: Callable[[int], bool], file: Path) -> dict[str, Any]:
    """Read which layers see a window only; `local` says it for those of a config.json without layer_types."""
    kinds = raw.get("layer_types")
    if kinds is None:
        kinds = [_LOCAL if local(i) else _GLOBAL for i in range(n_layers)]
    if not isinstance(kinds, list) or len(kinds) != n_layers or any(kind not in (_LOCAL, _GLOBAL) for kind in kinds):
        raise ValueError(f"{file}: layer_types must be {n_layers} of {_LOCAL} and {_GLOBAL}: got {kinds!r:.80}")
    if _LOCAL not in kinds:
        return {"window": None}
    if raw["sliding_window"] is None:
        raise ValueError(f"{file}: layer_types names {_LOCAL}, but sliding_window is null or switched off")
    global_layers = tuple(i for i, kind in enumerate(kinds) if kind == _GLOBAL)
    return {"window": _size(raw, "sliding_window", file), "global_layers": global_layers}


def _hf_rope(raw: dict[str, Any], by_layer: bool, head_dim: int, file: Path) -> dict[str, Any]:
    """Read the rotary bases and scaling: rope_parameters since transformers 5, rope_theta and rope_scaling before."""
    table = object_of(raw.get("rope_parameters") or {}, "rope_parameters", file)
    if table and by_layer != any(isinstance(value, dict) for value in table.values()):
        wanted = f"tables named {_GLOBAL} and {_LOCAL}" if by_layer else "one table for all layers"
        raise ValueError(f"{file}: rope_parameters must be {wanted}: got {table!r:.80}")
    fields: dict[str, Any] = {}
    if by_layer:
        local = object_of(table.get(_LOCAL) or {}, f"rope_parameters.{_LOCAL}", file)
        table = object_of(table.get(_GLOBAL) or {}, f"rope_parameters.{_GLOBAL}", file)
        fields["local_rope_theta"] = _theta(local, raw, "rope_local_base_freq", file)
        if _hf_divisors(local, fields["local_rope_theta"], head_dim, file) is not None:
            raise ValueError(f"{file}: rope scaling of {_LOCAL} layers is not supported; rope_type must be default")
    scaling = table or object_of(raw.get("rope_scaling") or {}, "rope_scaling", file)
    if any(place.get("partial_rotary_factor") not in (None, 1) for place in (raw, scaling)):
        raise ValueError(f"{file}: partial_rotary_factor is not supported; it must be 1")
    theta = _theta(table, raw, "rope_theta", file)
    return fields | {"rope_theta": theta, "rope_divisors": _hf_divisors(scaling, theta, head_dim, file)}


def _theta(table: dict[str, Any], raw: dict[str, Any], key: str, file: Path) -> float:
    return _positive({"rope_theta": table.get("rope_theta") or raw.get(key)}, "rope_theta", file, 10_000.0)


def _hf_divisors(scaling: dict[str, Any], theta: float, head_dim: int, file: Path) -> tuple[float, ...] | None:
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


def _gguf_divisors(
    metadata: dict[str, Any], prefix: str, rope_freqs: tuple[float, ...] | None, n: int, file: Path
) -> tuple[float, ...] | None:
    kind = metadata.get(f"{prefix}.scaling.type", "linear")  # llama.cpp's default, by a factor of 1 where none is said
    if kind not in ("none", "linear"):
        raise ValueError(f"{file}: rope scaling {kind!r} is not supported; supported are none, linear, rope_freqs")
    old = _positive(metadata, f"{prefix}.scale_linear", file, 1.0)  # the key's name in files of 2023
    factor = 1.0 if kind == "none" else _positive(metadata, f"{prefix}.scaling.factor", file, old)
    if rope_freqs is None and factor == 1.0:
        return None
    return tuple(factor * divisor for divisor in rope_freqs or (1.0,) * n)


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
