"""Encoding keeps the order, does not depend on batching, and says what is wrong with its input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import save_embedder
from safetensors.torch import load_file, save_file
from test_train import CONFIG, ROOT, SYNTHETIC
from test_weights import SMOLLM2, smollm2

from e5core.encode import GOLDEN_TEXTS, Encoder, main
from e5core.train import main as train_main

TEXTS = ["", "a", "the tram", "word " * 300, "Straße", "猫", "a", "x" * 700, "\n", "🦊 jumps"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    model, file = save_embedder(folder / "model"), folder / "config.toml"
    file.write_text(CONFIG.format(run=folder / "run", model=model, data=SYNTHETIC / "en_sts.jsonl"))
    assert train_main([str(file), "train.steps=2", "eval.max_tokens=64"]) == 0
    return folder / "run"


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_vectors_do_not_depend_on_batching_or_order(run: Path) -> None:
    encoder = Encoder.load(str(run))
    together = encoder.encode(TEXTS, task="Find it.")
    alone = np.concatenate([encoder.encode([text], task="Find it.") for text in TEXTS])
    assert together.shape == (10, 32) and together.dtype == np.float32
    assert np.abs(together - alone).max() < 1e-6
    assert np.abs(encoder.encode(TEXTS[::-1], task="Find it.")[::-1] - together).max() < 1e-6
    assert np.array_equal(together[1], together[6])
    assert encoder.n_truncated == 6  # two long texts, three times


def test_normalisation_is_a_choice(run: Path) -> None:
    encoder = Encoder.load(str(run))
    raw, unit = encoder.encode(TEXTS, normalize=False), encoder.encode(TEXTS)
    assert np.allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    assert np.linalg.norm(raw, axis=1).min() > 1.5
    assert np.allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), unit, atol=1e-6)


def test_the_command_line_writes_what_python_returns(run: Path, tmp_path: Path) -> None:
    source, output = write_texts(tmp_path / "texts.jsonl", TEXTS), tmp_path / "v.npy"
    assert main([str(run), "--input", str(source), "--output", str(output), "--task", "Find it."]) == 0
    expected = Encoder.load(str(run)).encode([text.strip() for text in TEXTS], task="Find it.")
    assert np.abs(np.load(output, allow_pickle=False) - expected).max() < 1e-6
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []
    source.write_text('{"title": "T", "text": "a"}\n')
    assert main([str(run), "--input", str(source), "--output", str(output)]) == 0
    assert np.abs(np.load(output) - Encoder.load(str(run)).encode(["T a"])).max() < 1e-6


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "texts.jsonl:2: broken JSON"),
        ('{"query": "x"}', "texts.jsonl:2: missing field text"),
        ("3", "texts.jsonl:2: a line must be a JSON object"),
        ('{"text": "\\ud83d"}', "texts.jsonl:2: text holds half a surrogate pair"),
    ],
)
def test_a_broken_line_is_named_and_writes_nothing(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    source = write_texts(tmp_path / "texts.jsonl", ["a"])
    source.write_text(source.read_text() + line + "\n")
    assert main([str(run), "--input", str(source), "--output", str(tmp_path / "v.npy")]) == 2
    assert message in capfd.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["texts.jsonl"]


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from e5core.encode import main
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_is_one_line_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    source, output = write_texts(tmp_path / "texts.jsonl", ["a"] * 100), tmp_path / "v.npy"
    command = [sys.executable, "-c", FULL_DISK, str(run), "--input", str(source), "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["texts.jsonl"]


def test_a_text_of_1_mb_is_cut_and_counted(run: Path) -> None:
    encoder = Encoder.load(str(run))
    vector = encoder.encode(["long text " * 100_000])
    assert encoder.n_truncated == 1
    assert np.abs(vector - encoder.encode(["long text " * 50])).max() < 1e-6


def test_selfcheck_notices_a_changed_model(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--selfcheck"]) == 0
    assert "selfcheck passed" in capfd.readouterr().err
    file = run / "step_2" / "adapter_model.safetensors"
    whole = load_file(file)
    save_file({name: tensor + 0.05 for name, tensor in whole.items()}, file)
    assert main([str(run), "--selfcheck"]) == 1
    assert "selfcheck FAILED" in capfd.readouterr().err
    save_file(whole, file)


def test_models_without_a_run_are_encoded_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = save_embedder(tmp_path / "model")
    assert Encoder.load(str(model), dtype="float32").encode(["a"]).shape == (1, 32)
    assert main([str(model), "--selfcheck"]) == 2
    assert "no golden vectors" in capfd.readouterr().err
    assert main(["someone/some-model", "--selfcheck"]) == 2
    assert "hf download someone/some-model" in capfd.readouterr().err


def test_smollm2_encodes_from_its_gguf() -> None:
    smollm2()
    encoder = Encoder.load(SMOLLM2, dtype="float32")
    vectors = encoder.encode([text for _, text in GOLDEN_TEXTS[:4]])
    assert vectors.shape == (4, 576) and encoder.tokenizer.eos_id == 2 and encoder.tokenizer.bos_id is None


def test_vectors_that_are_not_finite_are_named(run: Path) -> None:
    encoder = Encoder.load(str(run))
    ids, _ = encoder.tokenizer.encode("Z", 8)
    encoder.model.backbone.tok_embeddings.weight.data[ids[1]] = torch.inf
    with pytest.raises(FloatingPointError, match="text 1 is not finite"):
        encoder.encode(["a", "Z"])
