"""Tiny random models as the real libraries write them, for the tests that hold us against them."""

from pathlib import Path

import tokenizers
import torch
from transformers import LlamaConfig, LlamaModel, MistralConfig, MistralModel

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
}


def peer_model(variant: str, seed: int = 0) -> torch.nn.Module:
    """Make transformers' model with random weights (of about unit gain, so that softmax has work)."""
    config_class, model_class, changes = VARIANTS[variant]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SIZES, **changes}, attn_implementation="eager")).eval()
    return _randomised(model)


@torch.no_grad()
def _randomised(model: torch.nn.Module) -> torch.nn.Module:
    for name, parameter in model.named_parameters():
        parameter.normal_(0, 0.15) if "norm" not in name else parameter.uniform_(0.5, 1.5)
    return model


def save_peer(variant: str, folder: Path, seed: int = 0) -> torch.nn.Module:
    """Make the model and save it as a Hugging Face folder.  Returns the model."""
    model = peer_model(variant, seed)
    model.save_pretrained(folder)
    return model


def save_embedder(folder: Path) -> Path:
    """Save a tiny random Llama with a byte-level tokenizer: a whole model folder that can be trained."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    _randomised(LlamaModel(LlamaConfig(**sizes, bos_token_id=257, eos_token_id=258))).save_pretrained(folder)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true}')
    return folder
