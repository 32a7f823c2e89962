"""llama.cpp (PyPI's xllamacpp) as a second opinion on whole models: the same ids give the same embedding.

llama.cpp rounds activations to 8 bits before it multiplies them with quantised weights, so that directions agree to
0.987 (Gemma) and 0.99 (SmolLM2) at least and not to fp32's bits, as ours and transformers' do (test_weights.py). Norm
weights taken for w where they hold 1 + w, as in GGUF they do, give 0.05.
"""

from pathlib import Path

import numpy as np
import pytest

from e5core.encode import Encoder

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
