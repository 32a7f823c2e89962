"""An export is the run's model to whoever loads it, or it is not there. Oracles: transformers, PEFT and the others.

Consumers start in processes of their own, seconds each, so that every format on a real model is marked slow.
"""

import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from gguf_files import SMOLLM2, write_gguf
from models import save_embedder, save_peer
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_runs import CONFIG, SYNTHETIC
from tokenizer_texts import TEXTS
from transformers import AutoModel, AutoModelForCausalLM

from e5core import export as room
from e5core.adapter import adapter_tensors, read_lora
from e5core.encode import Encoder
from e5core.export import export, main, prompts, sample
from e5core.layouts import gguf_description, hf_description
from e5core.model_files import merged, shapes_of, write_hf_weights, write_safetensors
from e5core.model_files import write_gguf as export_gguf
from e5core.tokenizer import Tokenizer
from e5core.tokenizer_files import gguf_tokenizer, write_hf_tokenizer
from e5core.train import main as train_main
from e5core.weights import names_of, read_config, tensors_of

PARTS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES = ["mistral-window", "llama3", "qwen2", "qwen3-window", "gemma3-linear"]


def save_peft(model: torch.nn.Module, folder: Path, base: Path, **more: object) -> PeftModel:
    """Put PEFT's adapter with random B on a model and save it.  Returns PEFT's model."""
    peft = get_peft_model(model, PeftConfig(r=4, lora_alpha=10, target_modules=PARTS, **more))
    peft.peft_config["default"].base_model_name_or_path = str(base)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    peft.save_pretrained(folder)
    return peft.eval()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEFT's adapter of a tiny Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("made_by_peft")
    save_embedder(folder / "model")
    save_peft(AutoModel.from_pretrained(folder / "model"), folder / "adapter", folder / "model")
    return folder / "adapter"


def hidden(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        last = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]
    return (last / last.norm()).numpy()


def loaded(folder: Path) -> torch.nn.Module:
    model, told = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"], told
    return model.eval()


@pytest.mark.parametrize("variant", FAMILIES)
def test_merged_weights_are_peft_s(variant: str, tmp_path: Path) -> None:
    peer = save_peer(variant, tmp_path / "base")
    theirs = save_peft(peer, tmp_path / "adapter", tmp_path / "base").merge_and_unload().state_dict()
    lora, _ = read_lora(tmp_path / "adapter")
    config, out = read_config(tmp_path / "base"), tmp_path / "out"
    out.mkdir()
    tensors = merged(tensors_of(tmp_path / "base", config), dict(adapter_tensors(tmp_path / "adapter")), lora.alpha / 4)
    write_hf_weights(out, config, tensors, torch.float32)
    (out / "config.json").write_text(json.dumps(hf_description(tmp_path / "base", config, "float32")))
    ours = loaded(out).state_dict()
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-6
    assert read_config(out) == config


@pytest.mark.parametrize("variant", ["mistral", "llama-linear", "qwen2", "qwen3", "gemma3-linear"])
def test_a_gguf_base_is_the_same_model_as_a_hugging_face_folder(variant: str, tmp_path: Path) -> None:
    peer = save_peer(variant, tmp_path / "peer")
    if variant == "qwen3":  # whose variant scales as Llama 3 does, which llama.cpp's qwen3 does not know
        peer.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
        peer = type(peer)._from_config(peer.config).eval()
    more = {"attention__sliding_window_pattern": 6, "rope__freq_base_swa": 50.0} if "gemma" in variant else {}
    if variant == "gemma3-linear":  # llama.cpp has no word for another scale
        peer.config.query_pre_attn_scalar = peer.config.head_dim
        state = peer.state_dict()
        peer = type(peer)._from_config(peer.config).eval()
        peer.load_state_dict(state)
    file, out = tmp_path / "base.gguf", tmp_path / "out"
    write_gguf(file, peer, gguf.GGMLQuantizationType.F32, **more)
    config = read_config(file)
    out.mkdir()
    write_hf_weights(out, config, merged(tensors_of(file, config), {}, 0.0), torch.float32)
    (out / "config.json").write_text(json.dumps(hf_description(file, config, "float32")))
    tokens = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, wanted = (model(input_ids=tokens).last_hidden_state for model in (loaded(out), peer))
    assert (got - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("variant", ["mistral", "llama3", "llama-linear", "qwen2"])
def test_a_gguf_file_holds_what_was_written(variant: str, tmp_path: Path) -> None:
    save_peer(variant, tmp_path)
    config, file = read_config(tmp_path), tmp_path / "out.gguf"
    tensors = merged(tensors_of(tmp_path, config), {}, 1.0)
    export_gguf(file, config, {}, names_of(tmp_path, config), tensors, torch.float32)
    read, original = dict(tensors_of(file, read_config(file))), dict(tensors_of(tmp_path, config))
    assert read.keys() == original.keys() and all(torch.equal(read[name], original[name]) for name in read)
    assert np.allclose(read_config(file).rope_divisors or 0, config.rope_divisors or 0, rtol=1e-6)


def test_llama_cpp_s_limits_are_named(tmp_path: Path) -> None:
    for variant, message in (("qwen3", "rope scaling"), ("qwen2-window", "sliding window"), ("gemma3", "Gemma 3")):
        save_peer(variant, tmp_path / variant)
        with pytest.raises(ValueError, match=message):
            gguf_description(read_config(tmp_path / variant))
    save_peer("mistral-window", tmp_path / "window")
    arch, described = gguf_description(read_config(tmp_path / "window"))
    assert arch == "llama" and described["llama.context_length"] == 5  # it has no windows


def test_one_tensor_is_in_memory_at_a_time_and_shards_are_indexed(tmp_path: Path) -> None:
    save_peer("qwen3", tmp_path / "base")
    config = read_config(tmp_path / "base")
    shapes, alive = shapes_of(config), []

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        names = list(reversed(shapes))  # in another order than the file's
        for name in names:
            assert all(reference() is None for reference in alive), "an earlier tensor is still held"
            tensor = torch.full(shapes[name], float(len(alive)))
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    write_safetensors(tmp_path, shapes, watched(), torch.bfloat16, shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    read = {name: tensor for file in files for name, tensor in load_file(tmp_path / file).items()}
    assert read.keys() == shapes.keys() == index["weight_map"].keys()
    assert all((tensor == len(shapes) - 1 - i).all() for i, tensor in enumerate(read[name] for name in shapes))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in read.values())
    with pytest.raises(ValueError, match="tensors are missing, first of them layers.0"):
        some = [(name, torch.zeros(shape)) for name, shape in shapes.items() if not name.endswith("wq.weight")]
        write_safetensors(tmp_path, shapes, some, torch.float32)


def test_merging_holds_one_tensor_at_a_time() -> None:
    alive: list[weakref.ref] = []

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(4):
            assert sum(reference() is not None for reference in alive) <= 1
            tensor = torch.ones(8, 8)
            alive.append(weakref.ref(tensor))
            yield f"layers.{i}.attention.wq.weight", tensor
            del tensor

    factors = {f"layers.{i}.attention.wq.lora_{leaf}": torch.ones(shape) for i in range(4)
               for leaf, shape in (("a", (2, 8)), ("b", (8, 2)))}  # fmt: skip
    assert all((tensor == 1 + 0.5 * 2).all() for _, tensor in merged(watched(), factors, 0.5))


@pytest.mark.parametrize("name", ["mistral", "smollm2"])
def test_tokenizer_json_gives_our_ids_bos_and_eos(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source: Path = request.getfixturevalue(f"{name}_file")
    tokenizer = Tokenizer.load(source)
    write_hf_tokenizer(tmp_path, tokenizer, source, 512)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    ours, _ = tokenizer.encode_batch(TEXTS, 10**9)
    assert [encoding.ids for encoding in theirs.encode_batch(TEXTS)] == ours
    assert Tokenizer.load(tmp_path).contract() == tokenizer.contract()


def test_the_pre_tokenizer_is_found_by_what_it_does(smollm2_file: Path, tmp_path: Path) -> None:
    write_hf_tokenizer(tmp_path, Tokenizer.load(smollm2_file), smollm2_file, 512)
    tokenizer = Tokenizer.load(tmp_path)
    told = gguf_tokenizer(tokenizer, tmp_path, tokenizer.vocab_size + 2)
    kept = gguf_tokenizer(Tokenizer.load(smollm2_file), smollm2_file, tokenizer.vocab_size + 2)
    assert told["tokenizer.ggml.pre"] == "smollm" and told["tokenizer.ggml.add_eos_token"] is True
    for key in ("tokens", "merges", "eos_token_id", "add_bos_token"):
        assert told[f"tokenizer.ggml.{key}"] == kept[f"tokenizer.ggml.{key}"]
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["pre_tokenizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="splits words as none of"):
        gguf_tokenizer(Tokenizer.load(tmp_path), tmp_path, 49152)


def test_samples_are_of_one_and_two_tokens_full_and_truncated(adapter: Path) -> None:
    encoder = Encoder.load(str(adapter), dtype="float32", max_tokens=64)
    samples = sample(encoder)
    assert [len(ids) for ids in samples.ids[:4]] == [3, 4, 64, 64] and encoder.n_truncated >= 1
    assert samples.ids[2] == encoder.tokenizer.encode(samples.texts[2], 10**6)[0]
    assert len(encoder.tokenizer.encode(samples.texts[3], 10**6)[0]) > 64


def test_an_export_is_verified_by_its_library_in_another_process(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([str(adapter), str(tmp_path / "out"), "--format", "merged"]) == 0
    assert "verified by transformers: token ids equal, lowest cosine 1.0000000" in capfd.readouterr().err
    monkeypatch.setitem(room.CONSUMERS, "merged", ("transformers", "with_peft"))  # finds no adapter there
    assert main([str(adapter), str(tmp_path / "no"), "--format", "merged"]) == 1
    assert "with peft the export cannot be used (exit 1)" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_sentence_transformers_embeds_as_we_do(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
    monkeypatch.setattr(room, "find_spec", lambda name: None)  # in this process, it is asked below
    export(str(adapter), tmp_path / "out", "sentence-transformers")
    model = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    encoder = Encoder.load(str(adapter), dtype="float32")  # "auto" is bf16 where that is fast
    texts = ["how do vaccines work", "", "a", "word " * 300, "Straße"]
    task = "Given a web search query, retrieve relevant passages that answer the query"
    for name, ours in (("query", encoder.encode(texts, task)), ("document", encoder.encode(texts))):
        assert np.abs(model.encode(texts, prompt_name=name) - ours).max() < 1e-5
    assert set(model.prompts) >= set(prompts("instruct")) and model.max_seq_length == encoder.max_tokens


def test_our_adapter_is_peft_s_over_either_model(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "find_spec", lambda name: None)  # in this process, PEFT is asked below
    base, encoder = adapter.parent / "model", Encoder.load(str(adapter), dtype="float32")
    samples = sample(encoder)
    for form, kind in (("peft", AutoModel), ("peft-causal-lm", AutoModelForCausalLM)):
        assert main([str(adapter), str(tmp_path / form), "--format", form]) == 0
        model = PeftModel.from_pretrained(kind.from_pretrained(base), tmp_path / form).eval()
        for ids, vector in zip(samples.ids, samples.vectors, strict=True):
            assert np.abs(hidden(model, ids) - vector).max() < 1e-5
        exported = Encoder.load(str(tmp_path / form), dtype="float32")
        assert np.abs(exported.encode(["a"]) - encoder.encode(["a"])).max() < 1e-6
    keys = [next(iter(load_file(tmp_path / form / "adapter_model.safetensors"))) for form in ("peft", "peft-causal-lm")]
    assert keys[0].startswith("base_model.model.layers.0.") and keys[1].startswith("base_model.model.model.layers.0.")


def test_without_the_library_it_is_said(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    assert main([str(adapter), str(tmp_path / "out"), "--format", "merged", "--dtype", "bfloat16"]) == 0
    told = capfd.readouterr().err
    assert "not verified by transformers, which is not installed here" in told
    assert "verified by e5core: token ids equal, lowest cosine 0.99" in told
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_what_cannot_be_exported_is_named_and_leaves_nothing(
    adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(model: Path, out: str, message: str, form: str = "merged", status: int = 2) -> None:
        assert main([str(model), str(tmp_path / out), "--format", form]) == status
        assert message in capfd.readouterr().err and sorted(path.name for path in tmp_path.iterdir()) == before

    model, zero = tmp_path / "model", tmp_path / "zero"
    shutil.copytree(adapter.parent / "model", model)
    shutil.copytree(adapter, zero)
    tensors = load_file(zero / "adapter_model.safetensors")
    tensors[next(name for name in tensors if "lora_B" in name)].zero_()
    save_file(tensors, zero / "adapter_model.safetensors")
    before = ["model", "zero"]
    refused(adapter, "model", "model exists; choose another name")
    refused(zero, "out", "lora_b of 1 linears is all zero")
    refused(model, "out", "no run and no adapter folder")
    refused(adapter, "out", "the format gguf is a file named *.gguf", form="gguf")
    refused(adapter, "no/out", "to write out in")
    content = json.loads((model / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}  # other ids
    shutil.copytree(adapter, tmp_path / "lower")
    before = ["lower", *before]
    described = json.loads((zero / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(model)}
    (tmp_path / "lower" / "adapter_config.json").write_text(json.dumps(described | {"use_dora": True}))
    refused(tmp_path / "lower", "out", "use_dora = True is not supported")


def test_an_export_that_its_library_reads_otherwise_is_not_left(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    written = room.hf_description
    monkeypatch.setattr(room, "hf_description", lambda *a: written(*a) | {"rope_theta": 3.0, "rope_parameters": None})
    assert main([str(adapter), str(tmp_path / "out"), "--format", "merged"]) == 1
    assert "by e5core the export embeds otherwise: lowest cosine" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_changed_base_is_refused(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    shutil.copytree(adapter.parent / "model", tmp_path / "model")
    export(str(adapter), tmp_path / "ours", "peft", base=str(tmp_path / "model"))  # with the base's hash
    weights = load_file(tmp_path / "model" / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="not the base model that .*ours was trained on"):
        export(str(tmp_path / "ours"), tmp_path / "out", "merged")


def test_the_published_layout_is_accepted_and_training_goes_on_from_it(tmp_path: Path) -> None:
    """Merged weights at the root, the adapter in lora/, its base named by a hub id: intfloat/e5-mistral-7b-instruct."""
    base, repo = save_embedder(tmp_path / "Mistral-7B-v0.1", family="mistral"), tmp_path / "e5-mistral"
    peft = save_peft(AutoModel.from_pretrained(base), repo / "lora", Path("mistralai/Mistral-7B-v0.1"),
                     task_type="FEATURE_EXTRACTION", use_rslora=True)  # fmt: skip
    with pytest.raises(FileNotFoundError, match="--base PATH"):
        Encoder.load(str(repo / "lora"))
    encoder = Encoder.load(str(repo), base=str(base), dtype="float32")  # only lora/ is there
    texts = ["a", "the tram " * 20]
    ours = encoder.encode(texts, "Find it.")
    ids, _ = encoder.tokenizer.encode_batch([f"Instruct: Find it.\nQuery: {text}" for text in texts], 512)
    assert max(np.abs(hidden(peft, row) - vector).max() for row, vector in zip(ids, ours, strict=True)) < 1e-5
    config, run = tmp_path / "config.toml", tmp_path / "run"
    config.write_text(CONFIG.format(run=run, model=base, data=SYNTHETIC / "en_sts.jsonl"))
    options = [str(config), "train.steps=2", "eval.max_tokens=64", f"lora.init={repo / 'lora'}"]
    assert train_main(options) == 2  # lora.alpha is not the adapter's
    assert train_main([*options, "lora.alpha=20.0"]) == 0  # 10 * sqrt 4: rsLoRA's scale
    before, after = dict(adapter_tensors(repo / "lora")), dict(adapter_tensors(run / "step_2"))
    moved = [(before[name] - after[name]).norm() / before[name].norm() for name in before]
    assert 0 < min(moved) and max(moved) < 0.2
    peft.merge_and_unload().save_pretrained(repo)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, repo)
    assert np.abs(Encoder.load(str(repo), dtype="float32").encode(texts, "Find it.") - ours).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("form", ["peft", "peft-causal-lm", "merged", "sentence-transformers", "gguf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smollm2_goes_everywhere(form: str, dtype: torch.dtype, tmp_path: Path, smollm2_file: Path) -> None:
    if dtype == torch.bfloat16 and form.startswith("peft"):
        pytest.skip("adapters are fp32")
    pytest.importorskip(room.CONSUMERS[form][0], reason="the library that the format is for is not installed")
    base = Encoder.load(SMOLLM2, dtype="float32")
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, parameter in base.model.backbone.named_parameters():
        if name.startswith("layers.") and parameter.dim() == 2:
            sizes = {"lora_a": (8, parameter.shape[1]), "lora_b": (parameter.shape[0], 8)}
            for leaf, size in sizes.items():
                tensors[f"{name.removesuffix('.weight')}.{leaf}"] = torch.randn(size, generator=generator) * 0.06
    (tmp_path / "adapter").mkdir()
    room.write_adapter(tmp_path / "adapter", tensors, room.LoraConfig(rank=8, alpha=8.0), str(smollm2_file))
    trained = Encoder.load(str(tmp_path / "adapter"), dtype="float32")
    assert (trained.encode(["a cat"]) * base.encode(["a cat"])).sum() < 0.95  # the adapter says something
    cosines = export(str(tmp_path / "adapter"), tmp_path / f"out{'.gguf' * (form == 'gguf')}", form, dtype)
    assert set(cosines) == {"e5core", room.CONSUMERS[form][0]}
    assert min(cosines.values()) > 0.999 and (dtype == torch.bfloat16 or cosines["e5core"] > 0.999999)
