"""Tiny random models as the real libraries write them, for the tests that hold us against them."""

from pathlib import Path

import tokenizers
import torch
from safetensors.torch import load_file
from transformers import (
    Gemma3TextConfig,
    Gemma3TextModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
GEMMA3 = {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 5}
VARIANTS = {
    "mistral": (MistralConfig, MistralModel, {"sliding_window": None}),
    "mistral-window": (MistralConfig, MistralModel, {"sliding_window": 5}),
    "mistral-theta": (
        MistralConfig,
        MistralModel,
        {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "mistral-head-dim": (MistralConfig, MistralModel, {"sliding_window": 7, "head_dim": 12}),
    "llama2": (LlamaConfig, LlamaModel, {"num_key_value_heads": 6}),
    "llama3": (LlamaConfig, LlamaModel, {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear": (
        LlamaConfig,
        LlamaModel,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "qwen2": (Qwen2Config, Qwen2Model, {"sliding_window": 5, "max_window_layers": 0}),
    "qwen2-window": (
        Qwen2Config,
        Qwen2Model,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, Qwen3Model, {"head_dim": 12, "rope_parameters": LLAMA3_ROPE}),
    "qwen3-window": (
        Qwen3Config,
        Qwen3Model,
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": [LOCAL, GLOBAL, LOCAL], "head_dim": 10},
    ),
    "gemma3": (Gemma3TextConfig, Gemma3TextModel, GEMMA3 | {"layer_types": [LOCAL, GLOBAL, LOCAL]}),
    "gemma3-linear": (
        Gemma3TextConfig,
        Gemma3TextModel,
        GEMMA3
        | {
            "num_hidden_layers": 7,  # the sixth is global
            "rope_parameters": {
                GLOBAL: {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
                LOCAL: {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
}


def peer_model(variant: str, seed: int = 0) -> torch.nn.Module:
    """Make transformers' model with random weights (of about unit gain, so that softmax has work)."""
    config_class, model_class, changes = VARIANTS[variant]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SIZES, **changes}, attn_implementation="eager")).eval()
    return randomised(model)


@torch.no_grad()
def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Draw all parameters, biases and the norms' too, which transformers makes 0 and 1 (0 where it adds the 1)."""
    middle = 0.0 if model.config.model_type == "gemma3_text" else 1.0
    for name, parameter in model.named_parameters():
        parameter.normal_(0, 0.15) if "norm" not in name else parameter.uniform_(middle - 0.5, middle + 0.5)
    return model


def part_names(model: torch.nn.Module) -> dict[str, str]:
    """Our name of every part of a layer and of the whole -> transformers' in this model."""
    attention = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj", "q_norm": "q_norm", "k_norm": "k_norm"}
    feed_forward = {"w_gate": "gate_proj", "w_up": "up_proj", "w_down": "down_proj"}
    parts = {f"attention.{ours}": f"self_attn.{theirs}" for ours, theirs in attention.items()}
    parts |= {f"feed_forward.{ours}": f"mlp.{theirs}" for ours, theirs in feed_forward.items()}
    parts |= {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    if model.config.model_type == "gemma3_text":
        parts |= {"attention_post_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
        parts |= {"ffn_post_norm": "post_feedforward_layernorm"}
    layers = range(model.config.num_hidden_layers)
    names = {f"layers.{i}.{ours}": f"layers.{i}.{theirs}" for i in layers for ours, theirs in parts.items()}
    return names | {"tok_embeddings": "embed_tokens", "norm": "norm"}


def save_peer(variant: str, folder: Path, seed: int = 0) -> torch.nn.Module:
    """Make the model and save it as a Hugging Face folder.  Returns the model."""
    model = peer_model(variant, seed)
    model.save_pretrained(folder)
    return model


def save_embedder(folder: Path, n_layers: int = 2, family: str = "llama") -> Path:
    """Save a tiny random Llama (or Mistral) with a byte-level tokenizer: a whole model folder that can be trained."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": n_layers}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config_class, model_class = VARIANTS[{"llama": "llama2"}.get(family, family)][:2]
    randomised(model_class(config_class(**sizes, bos_token_id=257, eos_token_id=258))).save_pretrained(folder)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true}')
    return folder


def moments(folder: Path) -> dict[str, torch.Tensor]:
    """Read the optimizer's moments out of a checkpoint, each rank's part of each laid end to end."""
    parts = [load_file(path) for path in sorted(folder.glob("optimizer_*.safetensors"))]
    names = {name for part in parts for name in part}
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}
