"""The configs that ship: each is valid, says what it needs, and trains a tiny model of its family end to end."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch
from models import SIZES, VARIANTS, randomised, save_embedder
from safetensors.torch import load_file
from scoring import ROOT

from bench.models import MISTRAL, write_config
from e5core.checkpoint import step_folder
from e5core.config import load_config
from e5core.encode import Encoder
from e5core.mixture import load_mixture
from e5core.plan import main as plan
from e5core.run import Config
from e5core.synth.__main__ import main as synth
from e5core.synth.settings import SynthConfig
from e5core.testsets import read_sets
from e5core.train import main, total_steps

SYNTH = sorted((ROOT / "configs").glob("synth*.toml"))
CARDS = sorted((ROOT / "configs").glob("e5_mistral_7b_*.toml"))  # e5_mistral_7b on other cards
FETCHED = sorted(set((ROOT / "configs").glob("e5_mistral_*.toml")) - {ROOT / "configs/e5_mistral_7b.toml", *CARDS})
CONFIGS = sorted(set((ROOT / "configs").glob("*.toml")) - {*SYNTH, *FETCHED, *CARDS})  # their data ships
FAMILIES = {  # of the backbone that a config names, as tests/models.py has it
    "e5_mistral_7b": "mistral-window",
    "gemma3_270m": "gemma3",
    "llama3_8b": "llama3",
    "qwen3_0_6b": "qwen3",
    "quickstart": "llama2",
    "smollm2": "llama2",
}
each_config = pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)


def test_every_config_has_a_family_and_a_line_in_the_readme() -> None:
    assert {file.stem for file in CONFIGS} == set(FAMILIES)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [file.name for file in (*CONFIGS, *CARDS, *FETCHED, *SYNTH) if f"configs/{file.name}" not in readme] == []


@each_config
def test_a_config_is_valid_and_names_files_that_ship(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(Config, file)
    mixture, skipped = load_mixture(config.data, config.train.seed)
    assert skipped == [] and mixture.n_records >= config.batch.size // 4
    for sets in (config.eval.sets, config.eval.report):
        assert not sets or len(read_sets(sets)) == len(sets)
    assert config.train.run == f"runs/{file.stem}"
    assert total_steps(config, mixture) >= 1


@pytest.mark.parametrize("file", [*CONFIGS, *FETCHED], ids=lambda file: file.stem)
def test_a_config_s_head_says_how_to_run_it_and_where_its_weights_come_from(file: Path) -> None:
    head = file.read_text(encoding="utf-8").partition("\n\n[")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"torchrun --nproc-per-node 1 -m e5core.train configs/{file.name}" in head
    path = tomllib.loads(file.read_text(encoding="utf-8"))["backbone"]["path"]
    if not path.startswith("package:"):  # those come with `make`
        [fetched, *_] = re.findall(rf"(?:--local-dir |assemble\('){re.escape(path)}\b", head)
        assert fetched and "Needs " in head and "Licence: " in head


@pytest.mark.parametrize("file", CARDS, ids=lambda file: file.stem)
def test_a_card_s_config_is_what_its_plan_says(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    write_config(tmp_path, MISTRAL, torch.bfloat16)
    head = file.read_text(encoding="utf-8").partition("\n\nextends")[0]
    command = re.search(r"-m e5core\.plan (.*)", head)[1].split()
    wanted = load_config(Config, file)
    assert f"--nproc-per-node {command[command.index('--world-size') + 1] if '--world-size' in command else 1} " in head
    for arguments in ([], ["batch.micro_batch_tokens=auto", "batch.recompute=auto"]):
        assert plan([*command, f"backbone.path={tmp_path}", *arguments]) == 0
        said = capfd.readouterr().out
        peak = float(re.search(r"([\d,.]+)  with what the framework keeps", said)[1].replace(",", ""))
        needed = float(re.search(r"Needs ([\d,]+) MiB of each card by plan", head)[1].replace(",", ""))
        assert abs(needed - peak) <= 0.5
        setting = f"micro_batch_tokens = {wanted.batch.micro_batch_tokens}  recompute = {wanted.batch.recompute}"
        assert setting in said
    base = load_config(Config, ROOT / "configs/e5_mistral_7b.toml")
    assert wanted.data == base.data and wanted.train.run == f"runs/{file.stem}"


@pytest.mark.parametrize("file", SYNTH, ids=lambda file: file.stem)
def test_a_synth_config_can_be_previewed_and_has_a_budget(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.md").write_text("A folder of documents holds this one.")
    corpus = [f"corpus.path={tmp_path}"] if "\n[corpus]" in file.read_text(encoding="utf-8") else []
    assert synth([str(file), *corpus, "--preview", "3"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("[user]") == 3 and shown.count("holds this one") == 3 * len(corpus)
    config = load_config(SynthConfig, file, corpus)
    assert config.budget.money and config.synth.out == {"synth": "runs/synth", "synth_domain": "runs/domain"}[file.stem]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_trains_a_tiny_model_of_its_family_and_the_run_encodes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    model, run = save_family(FAMILIES[name], tmp_path / "model"), tmp_path / "run"
    small = {"train.run": run, "train.epochs": 0.012, "backbone.path": model, "backbone.dtype": "float32"}
    small |= {"batch.size": 4, "batch.max_tokens": 40, "batch.micro_batch_tokens": 100, "eval.max_tokens": 40}
    small |= {"eval.report": "[]", "tokenizer.eos_id": 258, "train.save_every": 0}
    overrides = [f"{key}={value}" for key, value in small.items()]
    assert main([str(ROOT / "configs" / f"{name}.toml"), *overrides]) == 0
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert 2 <= len(steps) <= 4 and all(step["grad_norm"] > 0 for step in steps)
    adapter = load_file(step_folder(run, len(steps)) / "adapter_model.safetensors")
    moved = [bool(tensor.any()) for key, tensor in adapter.items() if "lora_B" in key]
    n_layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    assert len(moved) == 7 * n_layers and all(moved)
    encoder = Encoder.load(str(run))
    assert encoder.model.backbone.config.family == VARIANTS[FAMILIES[name]][0].model_type
    assert encoder.selfcheck() > 1 - 1e-5
    ids, _ = encoder.tokenizer.encode("Straße", 40)
    assert ids[0] == 257 and ids[-1] == 258


def save_family(variant: str, folder: Path) -> Path:
    """Save a tiny random model of a family with a byte-level tokenizer: a whole model folder that can be trained."""
    save_embedder(folder)
    config_class, model_class, changes = VARIANTS[variant]
    sizes = SIZES | changes | {"vocab_size": 259, "bos_token_id": 257, "eos_token_id": 258, "pad_token_id": None}
    torch.manual_seed(0)
    randomised(model_class(config_class(**sizes))).save_pretrained(folder)
    return folder
