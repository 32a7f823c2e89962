"""Full fine-tuning (train.full): the same training on any ranks, kept, exported and refused as a run with adapters."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from full_laws import CASES, by_torch, resumed, steps, trained, trainings
from models import moments, save_embedder, save_peer
from rank_laws import cut_to
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_runs import CONFIG, SYNTHETIC, batch_of, lines_of, train_until

from e5core import checkpoint
from e5core.batches import pack
from e5core.checkpoint import Card
from e5core.config import load_config
from e5core.distributed import ALONE
from e5core.encode import Encoder
from e5core.encoder import build_model
from e5core.evaluate import main as evaluate_main
from e5core.export import Trained
from e5core.export import main as export_main
from e5core.loss import LossConfig
from e5core.merge import main as merge_main
from e5core.model_files import write_gguf
from e5core.optim import OptimConfig
from e5core.plan import main as plan_main
from e5core.report import report
from e5core.run import Config
from e5core.step import backward_step, make_optimizer
from e5core.stretches import Stretches, write_stretches
from e5core.train import main, train
from e5core.trained import weight_files
from e5core.verify_grad import verify_gradient
from e5core.weights import read_config, tensors_of

N_LAYERS, CPU = 3, torch.device("cpu")
LORA = "[lora]\nrank = 4\ndropout = 0.1\n"


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_embedder(tmp_path_factory.mktemp("embedder"), N_LAYERS)


@pytest.fixture(scope="module")
def config_file(embedder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    text = CONFIG.format(run=folder / "run", model=embedder, data=SYNTHETIC / "en_sts.jsonl")
    text = text.replace(LORA, "").replace("steps = 6", "steps = 4\nfull = true")
    text = text.replace("max_tokens = 48", "max_tokens = 140").replace("lr = 1e-3", "lr = 2e-4")
    text += "[loss]\ntemperature = 0.5\n"  # unsaturated
    (folder / "config.toml").write_text(text)
    return folder / "config.toml"


@pytest.fixture(scope="module")
def run(config_file: Path) -> Path:
    """A run of one process."""
    assert main([str(config_file)]) == 0
    return config_file.parent / "run"


@pytest.fixture(scope="module")
def two(config_file: Path) -> Path:
    """The same by two ranks that hold half of every block, and again from its second step on."""
    run_ranks(2, trainings, str(config_file), str(config_file.parent / "two"))
    return config_file.parent / "two"


def distance(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return dict(Stretches(weight_files(checkpoint.step_folder(run, step))).whole())


@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_are_those_of_plain_autograd_and_torch_s_adamw(world_size: int, embedder: Path) -> None:
    wanted = by_torch(str(embedder))
    assert len(set(wanted["losses"])) == 3
    if world_size == 1:
        found: list[dict[Any, dict[str, Any]]] = [{"alone": trained(ALONE, str(embedder), "none", "none", 110)}]
    else:
        found = run_ranks(2, steps, str(embedder), local_size=1)
        assert len(found[0]) == 2 * len(CASES)
    for rank in found:
        for case, got in rank.items():
            assert got["losses"] == pytest.approx(wanted["losses"], rel=1e-11), case
            assert got["norms"] == pytest.approx(wanted["norms"], rel=1e-10), case
            assert distance(got["weights"], wanted["weights"]) < 1e-12, case
            assert got["left"] == 0 and got["most"] == 2


def test_masters_are_fp32_under_bf16_weights(embedder: Path) -> None:
    """Steps that are lost in bf16 add up: what a bf16 copy of the weights alone would not do (peers train so)."""
    model = build_model(embedder, torch.bfloat16, CPU, causal=True, lora=None, full=True, seed=0)
    begun = {name: part.values.detach().clone() for name, part in model.slices().items()}
    source = dict(tensors_of(embedder, model.backbone.config))
    assert all(torch.equal(begun[name], source[name].float().flatten()) for name in begun)  # not rounded to bf16
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.0))
    for step in range(2):
        backward_step(model, batch_of(embedder, n=6), LossConfig(temperature=0.5), 400, (0, step))
        optimizer.clip_gradients()
        optimizer.update(1e-6)
    moved = {name: part.values.detach() - begun[name] for name, part in model.slices().items()}
    assert all(0 < change.abs().max() < 3e-6 for change in moved.values())
    unseen = torch.cat([(begun[n] + c).bfloat16() == begun[n].bfloat16() for n, c in moved.items()])
    assert unseen.double().mean() > 0.9
    (piece, *_) = pack(batch_of(embedder, n=6).sequences, 400, CPU)
    assert model(piece).dtype == torch.float32 and model.backbone.tok_embeddings.weight.dtype == torch.bfloat16


def test_a_training_is_the_same_on_two_ranks(run: Path, two: Path) -> None:
    assert len(lines_of(run)) == len(lines_of(two)) == 4
    for wanted, got in zip(lines_of(run), lines_of(two), strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
    wanted, got = weights(run, 4), weights(two, 4)
    assert wanted.keys() == got.keys() and len(wanted) == 9 * N_LAYERS + 2
    for name in wanted:
        assert (got[name] - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


def test_a_run_goes_on_bitwise(run: Path, two: Path, config_file: Path) -> None:
    alone = config_file.parent / "alone"
    config = load_config(Config, config_file, [f"train.run='{alone}'"])
    with pytest.raises(KeyboardInterrupt):
        train_until(config, 3)
    assert checkpoint.steps_of(alone) == [2]
    train(replace(config, train=replace(config.train, resume=True)))
    for whole, again in ((run, alone), (two, two.with_name("two-resumed"))):
        assert lines_of(whole) == lines_of(again)
        for read in (weights, lambda run, step: moments(checkpoint.step_folder(run, step))):
            one, other = read(whole, 4), read(again, 4)
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_holds_all_weights_once_and_every_rank_s_part(run: Path, two: Path, embedder: Path) -> None:
    source = dict(tensors_of(embedder, read_config(embedder)))
    for folder, n_ranks in ((run / "step_4", 1), (two / "step_4", 2)):
        names = {path.name for path in folder.iterdir()}
        ranks = [f"{r:05d}_of_{n_ranks:05d}.safetensors" for r in range(n_ranks)]
        parts = {f"{kind}_{rank}" for kind in ("weights", "optimizer") for rank in ranks}
        assert names == parts | {"e5core.json", "golden.npy", "state.json", "manifest.json"}
        stored = sum(t.numel() for path in weight_files(folder) for t in load_file(path).values())
        assert stored == sum(tensor.numel() for tensor in source.values())
    assert all((tensor != source[name]).any() for name, tensor in weights(run, 4).items())  # all of them moved


def test_two_ranks_go_on_with_what_one_wrote(run: Path, config_file: Path) -> None:
    other = config_file.parent / "from-one"
    cut_to(run, other, 2)
    run_ranks(2, resumed, str(config_file), str(other), "none")
    for wanted, got in zip(lines_of(run), lines_of(other), strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert len(weight_files(other / "step_4")) == 2  # each of the two holds all, and writes a half


def test_it_is_encoded_evaluated_and_reported_as_it_was_trained(
    run: Path, two: Path, embedder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = ["the tram", "a", "word " * 20]
    found = [Encoder.load(str(path), dtype="float32") for path in (run, two / "step_4", embedder)]
    assert found[0].selfcheck() > 1 - 1e-6
    one, other, base = (encoder.encode(texts) for encoder in found)
    assert np.abs(one - other).max() < 1e-4 < np.abs(one - base).max()
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"sentence1": "a tram", "sentence2": text, "score": i} for i, text in enumerate(texts)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate_main([str(run), "--sts", str(pairs), "--out", str(tmp_path / "scores.json")]) == 0
    assert "with all its weights trained" in report(run).read_text()
    flipped = bytearray((part := weight_files(two / "step_2")[1]).read_bytes())
    flipped[len(flipped) // 2] ^= 1
    part.write_bytes(flipped)
    with pytest.raises(ValueError, match=f"{part.name} is damaged"):
        Encoder.load(str(two / "step_2"))


def test_it_is_exported_as_it_is_encoded(run: Path, two: Path, tmp_path: Path) -> None:
    """The command itself holds the export against the run, and leaves nothing where they differ."""
    assert export_main([str(two), str(tmp_path / "merged"), "--format", "merged"]) == 0
    texts = ["the tram", "a"]
    merged = Encoder.load(str(tmp_path / "merged"), dtype="float32")
    assert np.abs(merged.encode(texts) - Encoder.load(str(two)).encode(texts)).max() < 1e-6
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("variant", ["llama2", "qwen2"])
def test_a_gguf_file_holds_the_trained_weights(variant: str, tmp_path: Path) -> None:
    """By the writer itself: the tiny tokenizer has no merges, without which llama.cpp's format has no tokenizer."""
    save_peer(variant, tmp_path / "base")
    config = read_config(tmp_path / "base")
    model = build_model(tmp_path / "base", torch.float32, CPU, causal=True, lora=None, full=True, seed=0)
    for part in model.slices().values():
        part.values.detach().add_(0.5)
    write_stretches(tmp_path / "weights_00000_of_00001.safetensors", model.slices())
    card = Card(**{field.name: None for field in fields(Card)})
    trained = Trained(folder=tmp_path, card=card, lora=None, adapter={}, base=tmp_path / "base")
    write_gguf(tmp_path / "out.gguf", config, {}, trained.names(), trained.tensors(), torch.float32)
    read, original = (dict(tensors_of(path, read_config(path))) for path in (tmp_path / "out.gguf", tmp_path / "base"))
    assert read.keys() == original.keys()
    assert all((read[name] - original[name] - 0.5).abs().max() < 1e-6 for name in read)


def test_what_needs_an_adapter_refuses_it_by_name(
    run: Path, config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for form in ("peft", "peft-causal-lm"):
        assert export_main([str(run), str(tmp_path / "out"), "--format", form]) == 2
        assert f"no adapter to export as {form}; take merged, sentence-transformers or gguf" in capfd.readouterr().err
    assert merge_main([str(tmp_path / "out"), str(run), str(run)]) == 2
    assert "all its weights were trained, and merged are adapters" in capfd.readouterr().err
    other = [str(config_file), f"train.run={tmp_path / 'other'}", "train.full=false", f"lora.init={run}"]
    assert main(other) == 2
    assert "all its weights were trained, so it holds no adapter; export it as a merged model" in capfd.readouterr().err
    assert main([str(config_file), "lora.rank=4"]) == 2
    assert "train.full = true trains all weights and no adapters; leave [lora] out" in capfd.readouterr().err
    assert main([str(config_file), "backbone.frozen_dtype=fp8"]) == 2
    assert 'train.full = true leaves no frozen linear for backbone.frozen_dtype = "fp8"' in capfd.readouterr().err
    assert main([str(config_file), f"train.run={run}", "train.full=false", "train.resume=true"]) == 2
    assert "train.full was True, is False" in capfd.readouterr().err


def test_its_gradient_is_that_of_the_whole_batch(config_file: Path) -> None:
    config = load_config(Config, config_file)
    found = verify_gradient(config, ALONE)
    assert found.passed and found.scale == pytest.approx(1, abs=1e-5)


def test_a_plan_knows_what_it_takes(config_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert plan_main([str(config_file), "--gpu", "h100", "--world-size", "8"]) == 0
    said = capfd.readouterr().out
    assert "0 frozen and 31,552 trainable numbers" in said and "masters (fp32)" in said
