"""llama.cpp (PyPI's xllamacpp) as a second opinion on whole models, and as a server of what export writes.

The same ids give the same embedding, and a client of /v1/embeddings gets the run's own, instruction and EOS included.

llama.cpp rounds activations to 8 bits before it multiplies them with quantised weights, so that directions agree to
0.987 (Gemma) and 0.99 (SmolLM2) at least and not to fp32's bits, as ours and transformers' do (test_weights.py). Norm
weights taken for w where they hold 1 + w, as in GGUF they do, give 0.05.
"""

import base64
import json
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from e5core.adapter import write_adapter
from e5core.encode import Encoder
from e5core.export import export
from e5core.lora import LoraConfig
from e5core.model_files import shapes_of
from e5core.tokenizer import Tokenizer
from e5core.tokenizer_files import write_hf_tokenizer
from e5core.weights import read_config

TEXTS = [
    "Hello world",
    "The quick brown fox jumps over the lazy dog.",
    "Vaccines train the immune system by showing it a harmless part of a germ. " * 8,
    "猫が窓辺で眠っている。",
    "def add(a, b):\n    return a + b\n",
]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gemma_gguf", "smollm2_file"])
def test_embeddings_equal_llama_cpp(model: str, request: pytest.FixtureRequest) -> None:
    xllamacpp = pytest.importorskip("xllamacpp", reason="pip install -e '.[oracle]' brings llama.cpp")
    path: Path = request.getfixturevalue(model)
    encoder = Encoder.load(str(path), dtype="float32")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.embedding, params.n_ctx, params.cpuparams.n_threads = True, 512, 1
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_LAST
    server = xllamacpp.Server(params)
    ids, _ = encoder.tokenizer.encode_batch(TEXTS, 512)
    answers = [server.handle_embeddings({"input": list(map(int, row)), "model": "x"}) for row in ids]
    theirs = np.array([answer["data"][0]["embedding"] for answer in answers])
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    cosines = (encoder.encode(TEXTS) * theirs).sum(axis=1)
    assert cosines.min() > 0.98, cosines


TASK = "Given a web search query, retrieve relevant passages that answer the query"


@pytest.fixture
def adapter(smollm2_file: Path, tmp_path: Path) -> Path:
    """An adapter that says something, on a tiny model with SmolLM2's tokenizer."""
    tokenizer, base = Tokenizer.load(smollm2_file), tmp_path / "base"
    sizes = {"vocab_size": tokenizer.vocab_size, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    peer = LlamaModel(LlamaConfig(**sizes, **heads, eos_token_id=tokenizer.eos_id))
    for parameter in peer.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, 0.15)
    peer.save_pretrained(base)
    write_hf_tokenizer(base, tokenizer, smollm2_file, 512)
    tensors = {}
    for name, shape in shapes_of(read_config(base)).items():
        if name.startswith("layers.") and len(shape) == 2:
            tensors[name.replace("weight", "lora_a")] = torch.randn(4, shape[1]) * 0.2
            tensors[name.replace("weight", "lora_b")] = torch.randn(shape[0], 4) * 0.2
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", tensors, LoraConfig(rank=4, alpha=4.0), str(base))
    return tmp_path / "adapter"


def ask(url: str, **body: object) -> list[dict]:
    """Ask /v1/embeddings as OpenAI's clients do.  Returns the answer's rows in the order of the texts."""
    call = urllib.request.Request(
        f"{url}/v1/embeddings", json.dumps({"model": "any"} | body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(call, timeout=60) as response:
        return sorted(json.load(response)["data"], key=lambda row: row["index"])


def test_a_client_of_the_served_export_gets_the_run_s_embeddings(adapter: Path, tmp_path: Path) -> None:
    xllamacpp = pytest.importorskip("xllamacpp", reason="pip install -e '.[test]' brings llama.cpp")
    export(str(adapter), tmp_path / "model.gguf", "gguf")
    params = xllamacpp.CommonParams()
    params.model.path = str(tmp_path / "model.gguf")
    params.embedding, params.warmup, params.verbosity, params.n_parallel = True, False, 0, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_ctx, params.n_batch, params.n_ubatch = 513, 512, 512  # README's llama-server -c 513 -b 512 -ub 512
    server = xllamacpp.Server(params)
    encoder = Encoder.load(str(adapter), dtype="float32")
    wanted = np.concatenate([encoder.encode(TEXTS, TASK), encoder.encode(TEXTS)])
    assert encoder.max_tokens == 512
    texts = [*(f"Instruct: {TASK}\nQuery: {text}" for text in TEXTS), *TEXTS]
    plain = np.array([row["embedding"] for row in ask(server.listening_address, input=texts)])
    coded = [row["embedding"] for row in ask(server.listening_address, input=texts, encoding_format="base64")]
    decoded = np.array([np.frombuffer(base64.b64decode(text), dtype="<f4") for text in coded])  # openai's default
    for got in (plain, decoded):
        assert got.shape == wanted.shape and np.abs(np.linalg.norm(got, axis=1) - 1).max() < 1e-4
        assert (got * wanted).sum(axis=1).min() > 0.999
    assert (wanted @ wanted.T)[~np.eye(len(texts), dtype=bool)].max() < 0.999
