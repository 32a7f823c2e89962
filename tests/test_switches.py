"""What goes beyond the paper, set together: what cannot be is refused by name, before weights are read.

Matryoshka, distillation and pooling by themselves are in test_loss.py and test_pooling.py.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from models import save_embedder
from tiny_runs import CONFIG, SYNTHETIC

from e5core.backbone import Backbone
from e5core.config import load_config
from e5core.encode import main as encode
from e5core.export import main as export
from e5core.merge import main as merge
from e5core.rope_scaling import LongContext, lengthened
from e5core.run import Config, check_files
from e5core.train import main as train
from e5core.weights import read_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and an adapter that was trained on it for two steps, as a folder by itself."""
    folder = tmp_path_factory.mktemp("switches")
    data, model = SYNTHETIC / "en_sts.jsonl", save_embedder(folder / "model")
    (folder / "config.toml").write_text(CONFIG.format(run=folder / "run", model=model, data=data))
    assert train([str(folder / "config.toml"), "train.steps=2", "eval.max_tokens=64"]) == 0
    shutil.copytree(folder / "run" / "step_2", folder / "adapter")
    (folder / "adapter" / "manifest.json").unlink()
    return folder


def test_a_checkpoint_holds_what_is_trained_and_no_base(folder: Path) -> None:
    step, base = folder / "run" / "step_2", (folder / "model" / "model.safetensors").stat().st_size
    assert {file.name.partition("_0")[0] for file in step.glob("*.safetensors")} == {
        "adapter_model.safetensors",
        "optimizer",
    }
    trained, held = (step / "adapter_model.safetensors").stat().st_size, sum(f.stat().st_size for f in step.iterdir())
    assert 3 * trained < held < 3 * trained + base / 2, (trained, held, base)  # two moments and the small files beside


def other_card(folder: Path, to: Path, **changes: object) -> Path:
    """Copy the adapter as one that was trained otherwise."""
    shutil.copytree(folder / "adapter", to)
    card = to / "e5core.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | changes))
    return to


OTHERS = [("causal", False), ("pooling", "mean"), ("pooling", "weighted_mean")]


@pytest.mark.parametrize(("key", "value"), OTHERS)
@pytest.mark.parametrize("form", ["peft", "peft-causal-lm", "merged", "sentence-transformers", "gguf"])
def test_no_export_says_what_others_have_no_word_for(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], form: str, key: str, value: object
) -> None:
    adapter = other_card(folder, tmp_path / "adapter", **{key: value})
    out = tmp_path / ("out.gguf" if form == "gguf" else "out")
    assert export([str(adapter), str(out), "--format", form]) == 2
    said = f"trained with backbone.{key} = {'false' if key == 'causal' else repr(value)}"
    assert said in capfd.readouterr().err and not out.exists()


@pytest.mark.parametrize(("key", "value"), OTHERS)
def test_adapters_of_unlike_models_are_not_merged(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], key: str, value: object
) -> None:
    adapter = other_card(folder, tmp_path / "other", **{key: value})
    assert merge([str(tmp_path / "out"), str(folder / "adapter"), str(adapter)]) == 2
    assert f"cannot be merged with {folder / 'adapter'}: its {key} is {value!r}" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "value"), OTHERS)
def test_an_adapter_that_was_trained_otherwise_may_be_started_from_and_that_is_said(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], key: str, value: object
) -> None:
    adapter = other_card(folder, tmp_path / "other", **{key: value})
    check_files(load_config(Config, folder / "config.toml", [f"lora.init={adapter}"]))
    here = {"causal": True, "pooling": "last"}[key]
    assert capfd.readouterr().err == f"lora.init was trained with backbone.{key} = {value!r}, this run has {here!r}\n"


@pytest.mark.parametrize("causal", [True, False])
def test_no_beginning_is_shared_where_what_follows_reaches_it(folder: Path, causal: bool) -> None:
    config = read_config(folder / "model", causal=causal)
    config = lengthened(config, LongContext(rope_scaling="dynamic:2")) if causal else config
    tokens, bounds = torch.arange(6), torch.tensor([0, 4, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="a beginning of 3 tokens cannot be shared under bidirectional attention"):
        Backbone(config)(tokens, bounds, 3)


def test_one_candidate_teaches_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    overrides = ["loss.distillation=1", "batch.negatives=0", "train.overwrite=true"]
    assert train([str(folder / "config.toml"), *overrides]) == 2
    assert "compares a query's own candidates, and batch.negatives = 0 leaves it a single one" in capfd.readouterr().err
    assert (folder / "run" / "step_2").is_dir()


def test_what_matryoshka_leaves_untrained_is_said(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check_files(load_config(Config, folder / "config.toml", ["loss.matryoshka=[8, 16]"]))
    said = "loss.matryoshka trains 16 of 32 numbers: afterwards use --dimensions 16 or less\n"
    assert capfd.readouterr().err == said
    check_files(load_config(Config, folder / "config.toml", ["loss.matryoshka=[8, 32]"]))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("option", [("--dimensions", "5"), ("--rope-scaling", "ntk:2"), ("--window", "8")])
def test_the_stored_vectors_are_compared_with_the_model_as_trained(folder: Path, option: tuple[str, str]) -> None:
    with pytest.raises(SystemExit):
        encode([str(folder / "adapter"), "--selfcheck", *option])
