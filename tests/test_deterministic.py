"""train.deterministic: torch's switch is on while a run lasts, and the run is the one without it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import moments, save_embedder
from safetensors.torch import load_file
from tiny_runs import CONFIG, SYNTHETIC, lines_of, train_until

from e5core import checkpoint
from e5core.config import load_config
from e5core.run import Config
from e5core.train import main, train


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deterministic")
    text = CONFIG.format(run=folder / "run", model=save_embedder(folder / "model"), data=SYNTHETIC / "en_sts.jsonl")
    (folder / "config.toml").write_text(text)
    return folder / "config.toml"


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = checkpoint.step_folder(run, step)
    return load_file(folder / "adapter_model.safetensors") | moments(folder)


def switched(config_file: Path, run: Path) -> Config:
    return load_config(Config, config_file, [f"train.run={run}", "train.deterministic=true"])


def test_it_trains_the_same_run_and_the_switch_is_put_back(config_file: Path, tmp_path: Path) -> None:
    assert main([str(config_file), "train.steps=3"]) == 0
    seen: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        train_until(
            switched(config_file, tmp_path / "run"),
            3,
            lambda step: seen.append(torch.are_deterministic_algorithms_enabled()),
        )
    assert seen == [True] * 3 and not torch.are_deterministic_algorithms_enabled()
    runs = (tmp_path / "run", config_file.parent / "run")
    got, wanted = ([line["loss"] for line in lines_of(run)] for run in runs)
    assert got == pytest.approx(wanted, rel=1e-5)


@pytest.mark.gpu
def test_a_resumed_run_is_bitwise_the_same_on_a_gpu(config_file: Path, tmp_path: Path) -> None:
    whole, stopped = (switched(config_file, tmp_path / name) for name in ("whole", "stopped"))
    train(whole)
    with pytest.raises(KeyboardInterrupt):
        train_until(stopped, 3)
    assert checkpoint.steps_of(tmp_path / "stopped")[-1] == 2
    train(replace(stopped, train=replace(stopped.train, resume=True)))
    wanted, got = state(tmp_path / "whole", 6), state(tmp_path / "stopped", 6)
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[name], got[name]) for name in wanted)


@pytest.mark.gpu
def test_another_workspace_of_cublas_is_refused(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    assert main([str(config_file), f"train.run={tmp_path / 'run'}", "train.deterministic=true"]) == 2
    assert "train.deterministic needs CUBLAS_WORKSPACE_CONFIG to be one of" in capfd.readouterr().err
