"""Families: what a file leaves out is what its own library takes, and what is not supported is named."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from gguf_files import write_gguf
from models import GEMMA3, GLOBAL, LOCAL, SIZES, peer_model, randomised, save_peer
from safetensors.torch import load_file, save_file
from test_backbone import load, packed
from test_weights import edit_config
from transformers import (
    AutoConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma3TextModel,
)

from e5core.weights import read_config

UNSUPPORTED = {
    "qwen2 act": ("qwen2", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported for qwen2; it must be 'silu'"),
    "qwen2 yarn": ("qwen2", {"rope_parameters": {"rope_type": "yarn"}}, "'yarn' is not supported"),
    "qwen2 mrope": ("qwen2", {"rope_parameters": None, "rope_scaling": {"type": "mrope"}}, "'mrope' is not supported"),
    "qwen2 part": ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported; it must be 1"),
    "qwen2 two bases": ("qwen2", {"rope_parameters": {GLOBAL: {}, LOCAL: {}}}, "must be one table for all layers"),
    "qwen2 layers": (
        "qwen2",
        {"layer_types": [GLOBAL]},
        "layer_types must be 3 of sliding_attention and full_attention",
    ),
    "qwen2 kinds": ("qwen2", {"layer_types": ["linear_attention"] * 3}, "layer_types must be 3 of"),
    "qwen2 first": ("qwen2-window", {"max_window_layers": "2"}, "max_window_layers must be a number above 0: got '2'"),
    "qwen3 bias": ("qwen3", {"attention_bias": True}, "attention_bias = True is not supported for qwen3"),
    "mistral layers": ("mistral", {"layer_types": [GLOBAL] * 3}, "layer_types = .* is not supported for mistral"),
    "gemma act": ("gemma3", {"hidden_activation": "silu"}, "hidden_activation = 'silu' is not supported"),
    "gemma cap": ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported"),
    "gemma embedding": ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    "gemma one base": ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "must be tables named full_attention"),
    "gemma local scaling": (
        "gemma3",
        {"rope_parameters": {LOCAL: {"rope_type": "linear", "factor": 2.0}}},
        "rope scaling of sliding_attention layers is not supported",
    ),
    "gemma period": ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern must be a number above 0"),
    "gemma no text": ("gemma3", {"model_type": "gemma3"}, "text_config must be a JSON object: got None"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_features_that_are_not_supported_are_named(case: str, tmp_path: Path) -> None:
    variant, changes, message = UNSUPPORTED[case]
    save_peer(variant, tmp_path)
    read_config(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "variant, key, value, message",
    [
        ("qwen2", "rope__scaling__type", "yarn", "rope scaling 'yarn' is not supported"),
        ("qwen2", "attention__sliding_window", 5, "attention.sliding_window = 5 is not supported"),
        ("qwen3", "rope__dimension_count", 6, "rope.dimension_count = 6 is not supported; it must be 12"),
        ("gemma3", "attn_logit_softcapping", 50.0, "attn_logit_softcapping is not supported"),
        ("gemma3", "attention__sliding_window_pattern", [True, False, True], "sliding_window_pattern must be a number"),
    ],
)
def test_gguf_features_that_are_not_supported_are_named(
    variant: str, key: str, value: object, message: str, tmp_path: Path
) -> None:
    peer, file = peer_model(variant), tmp_path / "m.gguf"
    write_gguf(file, peer, gguf.GGMLQuantizationType.F32)
    read_config(file)
    write_gguf(file, peer, gguf.GGMLQuantizationType.F32, **{key: value})
    with pytest.raises(ValueError, match=f"m.gguf: .*{message}"):
        read_config(file)


def test_gguf_gemma_of_62_layers_scales_attention_as_the_27b_model_does(tmp_path: Path) -> None:
    sizes = SIZES | GEMMA3 | {"num_hidden_layers": 62, "hidden_size": 60, "head_dim": 8}
    peer = Gemma3TextModel(Gemma3TextConfig(**sizes))
    write_gguf(tmp_path / "m.gguf", peer, gguf.GGMLQuantizationType.F32, rope__freq_base_swa=77.0)
    config = read_config(tmp_path / "m.gguf")
    assert config.attention_scale == pytest.approx((60 / 6) ** -0.5)
    assert config.local_rope_theta == 77.0


def test_multimodal_gemma_is_read_for_its_text(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    text = Gemma3TextConfig(**SIZES, **GEMMA3, layer_types=[LOCAL, GLOBAL, LOCAL])
    peer = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    )
    decoder = randomised(peer.model.language_model)
    peer.save_pretrained(tmp_path)
    backbone, (texts, tokens, cu_seqlens) = load(tmp_path), packed()
    with torch.no_grad():
        expected = torch.cat([decoder(text[None]).last_hidden_state[0] for text in texts])
        assert (backbone.norm(backbone(tokens, cu_seqlens)) - expected).abs().max() < 1e-5
    tensors = load_file(tmp_path / "model.safetensors")
    assert any("vision_tower." in name for name in tensors) and any(
        "multi_modal_projector." in name for name in tensors
    )
    renamed = {name.replace("vision_tower.", "audio_tower."): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="unexpected tensor 'audio_tower"):
        load(tmp_path)


def test_what_config_json_leaves_out_is_what_transformers_takes(tmp_path: Path) -> None:
    defaults = {
        "gemma3-linear": ("rope_parameters", "layer_types", "query_pre_attn_scalar", "head_dim", "num_attention_heads"),
        "qwen3": ("head_dim", "rope_parameters", "layer_types"),
        "qwen2-window": ("layer_types",),
        "qwen2": ("layer_types", "max_window_layers", "use_sliding_window"),
        "mistral": ("sliding_window", "rope_parameters"),
    }
    for variant, absent in defaults.items():
        save_peer(variant, tmp_path / variant)
        file = tmp_path / variant / "config.json"
        raw = {key: value for key, value in json.loads(file.read_text()).items() if key not in absent}
        file.write_text(json.dumps(raw))
        config, theirs = read_config(tmp_path / variant), AutoConfig.from_pretrained(tmp_path / variant)
        assert config.n_heads == theirs.num_attention_heads, variant
        assert variant.startswith("qwen2") or config.head_dim == theirs.head_dim, variant  # which has no such key
        rope = theirs.rope_parameters
        assert config.rope_theta == rope.get(GLOBAL, rope)["rope_theta"], variant
        if variant == "gemma3-linear":
            assert config.local_rope_theta == rope[LOCAL]["rope_theta"]
            assert config.attention_scale == theirs.query_pre_attn_scalar**-0.5
        kinds = [LOCAL] * 3 if variant == "mistral" else theirs.layer_types
        windows = [theirs.sliding_window if kind == LOCAL else None for kind in kinds]
        assert [config.window_of(i) for i in range(config.n_layers)] == windows, variant


def test_a_window_that_is_switched_off_is_none(tmp_path: Path) -> None:
    save_peer("qwen2", tmp_path)
    off = {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0}
    edit_config(tmp_path, **off, layer_types=None)
    assert read_config(tmp_path).window is None
    edit_config(tmp_path, **off | {"use_sliding_window": True})
    assert read_config(tmp_path).window == 5
    edit_config(tmp_path, **off, layer_types=[LOCAL] * 3)
    with pytest.raises(ValueError, match="sliding_window is null or switched off"):
        read_config(tmp_path)


def test_a_gemma_config_of_the_time_before_transformers_5(tmp_path: Path) -> None:
    save_peer("gemma3-linear", tmp_path)
    expected, file = read_config(tmp_path), tmp_path / "config.json"
    raw = json.loads(file.read_text())
    del raw["rope_parameters"], raw["layer_types"]
    raw |= {"rope_theta": 1e5, "rope_local_base_freq": 50.0, "sliding_window_pattern": 6}
    raw |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    file.write_text(json.dumps(raw))
    assert read_config(tmp_path) == expected
