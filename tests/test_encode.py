"""Encoding keeps the order, does not depend on batching, and says what is wrong with its input."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import SMOLLM2, smollm2
from models import save_embedder
from safetensors.torch import load_file, save_file
from scoring import ROOT, on_terminal
from tiny_runs import CONFIG, SYNTHETIC

from e5core.encode import Encoder, main
from e5core.metrics import PLAIN_EVERY_S, TextProgress
from e5core.text_encoder import CHUNK, GOLDEN_TEXTS, ShownEncoder
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


def test_fewer_dimensions_are_the_first_ones_of_unit_length_again(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, output = write_texts(tmp_path / "texts.jsonl", TEXTS), tmp_path / "v.npy"
    assert main([str(run), "--input", str(source), "--output", str(output), "--dimensions", "5"]) == 0
    cut = Encoder.load(str(run)).encode([text.strip() for text in TEXTS])[:, :5]
    assert np.abs(np.load(output) - cut / np.linalg.norm(cut, axis=1, keepdims=True)).max() < 1e-6
    raw = Encoder.load(str(run), dimensions=5).encode(TEXTS, normalize=False)
    assert np.array_equal(raw, Encoder.load(str(run)).encode(TEXTS, normalize=False)[:, :5])
    for wrong in ("0", "33"):
        assert main([str(run), "--input", str(source), "--output", str(output), "--dimensions", wrong]) == 2
        assert f"dimensions must be in 1..32, the model's own: got {wrong}" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main([str(run), "--selfcheck", "--dimensions", "5"])
    with pytest.raises(ValueError, match="no golden vectors"):
        Encoder.load(str(run), dimensions=5).selfcheck()


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


def test_selfcheck_notices_a_changed_model(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--selfcheck"]) == 0
    assert "selfcheck passed" in capfd.readouterr().err
    folder = tmp_path / "adapter"
    shutil.copytree(run / "step_2", folder)
    (folder / "manifest.json").unlink()  # which names a changed file before anything is embedded
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor + 0.05 for name, tensor in load_file(file).items()}, file)
    assert main([str(folder), "--selfcheck"]) == 1
    assert "selfcheck FAILED" in capfd.readouterr().err


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


def test_progress_of_a_file_ends_with_all_its_texts_and_their_speed(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_texts(tmp_path / "texts.jsonl", ["a"] * (CHUNK + 3))
    assert main([str(run), "--input", str(source), "--output", str(tmp_path / "v.npy")]) == 0
    shown = [line for line in capfd.readouterr().err.splitlines() if line.startswith("text ")]
    assert re.fullmatch(r"text 2,051/2,051 tokens_per_s [1-9][0-9,]* eta 0:00:00", shown[-1])
    assert len([line for line in shown if line.startswith("text 2,051/")]) == 1


def test_progress_hears_of_every_text_and_token_once_and_changes_no_vector(run: Path) -> None:
    encoder = Encoder.load(str(run))
    encoder.batch_tokens = 100
    sequences, _ = encoder.tokenizer.encode_batch(TEXTS, encoder.max_tokens)
    with TextProgress(len(TEXTS)) as progress:
        vectors = encoder.encode(TEXTS, progress=progress)
    assert (progress.n_texts, progress.n_tokens) == (len(TEXTS), sum(map(len, sequences)))
    assert np.array_equal(vectors, encoder.encode(TEXTS))
    assert np.array_equal(vectors, ShownEncoder(encoder).encode(TEXTS))


def test_python_s_encode_shows_nothing(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    encoder = Encoder.load(str(run))
    capfd.readouterr()
    encoder.encode(TEXTS)
    assert capfd.readouterr() == ("", "")
    ShownEncoder(encoder).encode(TEXTS)
    assert capfd.readouterr().err.startswith("text 10/10 tokens_per_s ")


def test_plain_progress_comes_every_ten_seconds_and_reckons_by_tokens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with TextProgress(2000) as progress:
        started = progress.started_s
        progress.expect(1000, 30_000)  # 30 tokens a text, so 60,000 in all
        for second, texts, tokens in ((4, 10, 2000), (9, 10, 2000), (10, 80, 6000), (15, 100, 5000), (30, 800, 15_000)):
            monkeypatch.setattr("time.monotonic", lambda s=second: started + s)
            progress.advance(texts, tokens)
        progress.expect(1000, 10_000)
        monkeypatch.setattr("time.monotonic", lambda: started + 32)
        progress.advance(1000, 10_000)
    assert PLAIN_EVERY_S == 10
    assert capsys.readouterr().err.splitlines() == [
        "text 100/2,000 tokens_per_s 1,000 eta 0:00:50",
        "text 1,000/2,000 tokens_per_s 1,000 eta 0:00:30",
        "text 2,000/2,000 tokens_per_s 1,250 eta 0:00:00",
    ]
    with pytest.raises(ValueError, match="texts must be at least 1: got 0"):
        TextProgress(0)


def test_a_terminal_shows_a_bar_while_encoding(run: Path, tmp_path: Path) -> None:
    source, output = write_texts(tmp_path / "texts.jsonl", TEXTS), tmp_path / "v.npy"
    shown = on_terminal("e5core.encode", run, "--input", source, "--output", output)
    assert re.search(r"text 10/10 ━+ tokens_per_s [1-9][0-9,]* eta 0:00:00", shown)
    assert output.is_file()
