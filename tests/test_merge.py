"""A merged adapter is the mean of the merged models, not of the factors. Oracle: dense float64 deltas, PEFT's merge."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from models import save_embedder
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from e5core.adapter import adapter_tensors, read_lora
from e5core.encode import Encoder
from e5core.merge import main, merge

PARTS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and three adapters of PEFT's on it, of other ranks and scales each."""
    folder = tmp_path_factory.mktemp("made")
    save_embedder(folder / "model")
    for name, rank, alpha, seed in (("one", 2, 4.0, 1), ("two", 3, 12.0, 2), ("three", 3, 3.0, 3)):
        config = PeftConfig(r=rank, lora_alpha=alpha, target_modules=PARTS)
        model = get_peft_model(AutoModel.from_pretrained(folder / "model"), config)
        model.peft_config["default"].base_model_name_or_path = str(folder / "model")
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(0, 0.1, generator=generator)
        model.save_pretrained(folder / name)
    return folder


def deltas(folder: Path) -> dict[str, np.ndarray]:
    """What an adapter adds to every weight, float64."""
    lora, _ = read_lora(folder)
    tensors = {name: tensor.double().numpy() for name, tensor in adapter_tensors(folder)}
    linears = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    return {x: lora.alpha / lora.rank * tensors[f"{x}.lora_b"] @ tensors[f"{x}.lora_a"] for x in linears}


def test_linear_is_the_weighted_mean_of_the_deltas(made: Path, tmp_path: Path) -> None:
    models = [str(made / name) for name in ("one", "two", "three")]
    assert merge(tmp_path / "out", models, "linear", [1, 2, 5]) == 0
    got, parts = deltas(tmp_path / "out"), [deltas(Path(model)) for model in models]
    assert len(got) == 2 * len(PARTS)
    for name, delta in got.items():
        wanted = (parts[0][name] + 2 * parts[1][name] + 5 * parts[2][name]) / 8
        assert np.abs(delta - wanted).max() < 1e-7 * np.abs(wanted).max() * 10
    assert read_lora(tmp_path / "out")[0].rank == 2 + 3 + 3


def test_the_merged_adapter_is_the_mean_of_the_merged_models_to_peft_and_to_us(made: Path, tmp_path: Path) -> None:
    models = [made / "one", made / "two"]
    merge(tmp_path / "out", [str(model) for model in models])
    theirs = []
    for folder in (*models, tmp_path / "out"):
        peft = PeftModel.from_pretrained(AutoModel.from_pretrained(made / "model"), folder)
        theirs.append(peft.merge_and_unload().state_dict())
    for name, weight in theirs[2].items():
        assert (weight - (theirs[0][name] + theirs[1][name]) / 2).abs().max() < 1e-6
    encoder = Encoder.load(str(tmp_path / "out"), dtype="float32")
    assert encoder.selfcheck() > 0.99999
    peft = AutoModel.from_pretrained(made / "model").eval()
    peft.load_state_dict(theirs[2])
    ids, _ = encoder.tokenizer.encode("the tram", 64)
    with torch.no_grad():
        last = peft(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    assert np.abs(encoder.encode(["the tram"])[0] - (last / last.norm()).numpy()).max() < 1e-5


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_goes_along_the_arc(made: Path, tmp_path: Path, t: float) -> None:
    merge(tmp_path / "out", [str(made / "one"), str(made / "two")], "slerp", [1 - t, t])
    first, second, got = (deltas(folder) for folder in (made / "one", made / "two", tmp_path / "out"))
    for name, delta in got.items():
        one, two = first[name], second[name]
        angle = math.acos((one * two).sum() / np.linalg.norm(one) / np.linalg.norm(two))
        wanted = (math.sin((1 - t) * angle) * one + math.sin(t * angle) * two) / math.sin(angle)
        assert np.abs(delta - wanted).max() < 1e-6 * np.abs(wanted).max()


def test_slerp_of_an_adapter_with_itself_is_that_adapter(made: Path, tmp_path: Path) -> None:
    merge(tmp_path / "out", [str(made / "one")] * 2, "slerp")
    wanted = deltas(made / "one")
    assert all(np.abs(delta - wanted[name]).max() < 1e-7 for name, delta in deltas(tmp_path / "out").items())


def test_a_cut_is_the_best_of_its_rank_and_its_loss_is_said(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    models = [str(made / "one"), str(made / "two")]
    merge(tmp_path / "whole", models)
    assert main([str(tmp_path / "cut"), *models, "--rank", "3"]) == 0
    whole, cut = deltas(tmp_path / "whole"), deltas(tmp_path / "cut")
    missed, all_of_it = 0.0, 0.0
    for name, delta in whole.items():
        values = np.linalg.svd(delta, compute_uv=False)
        assert np.linalg.norm(delta - cut[name]) < 1.0001 * np.linalg.norm(values[3:])
        missed, all_of_it = missed + (values[3:] ** 2).sum(), all_of_it + (values**2).sum()
    assert f"rank 3, lost {math.sqrt(missed / all_of_it):.2%} of the norm" in capfd.readouterr().err
    assert merge(tmp_path / "same", models, rank=5) < 1e-6
    assert all(np.abs(d - whole[name]).max() < 1e-6 for name, d in deltas(tmp_path / "same").items())


def test_what_cannot_be_merged_is_named_and_leaves_nothing(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one, two, three = (str(made / name) for name in ("one", "two", "three"))
    other = tmp_path / "elsewhere"
    save_embedder(other / "model")
    weights = load_file(other / "model" / "model.safetensors")
    save_file(
        {name: 2 * weight for name, weight in weights.items()}, other / "model" / "model.safetensors", {"format": "pt"}
    )
    model = get_peft_model(AutoModel.from_pretrained(other / "model"), PeftConfig(r=2, target_modules=PARTS))
    model.peft_config["default"].base_model_name_or_path = str(other / "model")
    model.save_pretrained(other / "adapter")
    fewer = tmp_path / "fewer"
    model = get_peft_model(AutoModel.from_pretrained(made / "model"), PeftConfig(r=2, target_modules=PARTS[:2]))
    model.peft_config["default"].base_model_name_or_path = str(made / "model")
    model.save_pretrained(fewer)
    for arguments, message in (
        ([one], "linear merges two or more adapters: got 1"),
        ([one, two, three, "--method", "slerp"], "slerp merges two adapters: got 3"),
        ([one, two, "--weights", "1", "-1"], "weights must be 2 numbers, none negative"),
        ([one, two, "--weights", "1"], "weights must be 2 numbers"),
        ([one, two, "--rank", "9"], "rank must be at most 5"),
        ([one, str(fewer)], "they adapt other linears: ['layers."),
        ([one, str(made / "model")], "no run and no adapter folder"),
        ([one, str(other / "adapter")], "its base_sha256 is"),
    ):
        assert main([str(tmp_path / "out"), *arguments]) == 2
        assert message in capfd.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "fewer"]
    assert main([str(fewer), one, two]) == 2 and "exists" in capfd.readouterr().err


def test_a_damaged_adapter_is_named(made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (made / "one").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "adapter_model.safetensors")
    del tensors[next(name for name in tensors if "lora_B" in name)]
    save_file(tensors, broken / "adapter_model.safetensors")
    assert main([str(tmp_path / "out"), str(broken), str(made / "two")]) == 2
    assert "has no lora_b" in capfd.readouterr().err
