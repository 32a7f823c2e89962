"""A text's embedding may be the mean of its tokens: transformers' states averaged, in any packing and on any ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from loss_laws import CASES, WHOLE, pooled_model, step, steps
from models import save_embedder, save_peer
from ranks import run_ranks
from test_backbone import LENGTHS, packed, relative
from tiny_runs import CONFIG, SYNTHETIC
from torch import Tensor

from e5core.batches import pack
from e5core.checkpoint import read_card, step_folder, write_json
from e5core.distributed import ALONE
from e5core.encode import Encoder
from e5core.encoder import Pooling, build_model, mean_tokens
from e5core.export import export
from e5core.train import main

CPU = torch.device("cpu")
TASK, TEXTS = "Find the same meaning.", ["", "a", "the tram runs every ten minutes", "猫が窓辺で眠っている。"]
each_mean = pytest.mark.parametrize("pooling", ["mean", "weighted_mean"])


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_embedder(tmp_path_factory.mktemp("embedder")))


def averaged(states: Tensor, pooling: Pooling) -> Tensor:
    """The mean of one text's states (n, D), by its definition."""
    n = states.shape[0]
    weights = torch.ones(n) if pooling == "mean" else torch.arange(1, n + 1)
    return (states * weights[:, None]).sum(0) / weights.sum()


def mask(n: int, window: int) -> Tensor:
    """What tokens add to their scores where each sees a window in both directions."""
    distance = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    return torch.zeros(n, n).masked_fill(distance >= window, float("-inf"))[None, None]


@each_mean
@pytest.mark.parametrize(  # transformers takes no mask of ours for Gemma's layers of two kinds
    ("variant", "causal"),
    [("llama3", True), ("llama3", False), ("mistral-window", True), ("mistral-window", False), ("gemma3", True)],
)
def test_vectors_are_means_of_transformers_states(variant: str, causal: bool, pooling: Pooling, tmp_path: Path) -> None:
    peer, texts = save_peer(variant, tmp_path).double(), packed()[0]
    model = build_model(tmp_path, torch.float64, CPU, causal=causal, lora=None, seed=0, pooling=pooling)
    (piece,) = pack([text.tolist() for text in texts], WHOLE, CPU)
    masks = [None if causal else mask(n, 5 if "window" in variant else n).double() for n in LENGTHS]
    with torch.no_grad():
        states = [peer(t[None], attention_mask=m).last_hidden_state[0] for t, m in zip(texts, masks, strict=True)]
        got = model(piece, normalize=False)
    assert relative(got, torch.stack([averaged(each, pooling) for each in states])) < 1e-6  # its angles are fp32
    assert torch.equal(model(piece), torch.nn.functional.normalize(got, dim=1))


@each_mean
def test_the_mean_and_its_gradient_are_the_definition_s(pooling: Pooling) -> None:
    _, _, bounds = packed()
    hidden = torch.randn(sum(LENGTHS), 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(LENGTHS), 5, dtype=torch.float64)
    expected = torch.stack([averaged(part, pooling) for part in hidden.split(LENGTHS)])
    got = mean_tokens(hidden, bounds, pooling == "weighted_mean")
    assert relative(got, expected) < 1e-14
    gradients = [torch.autograd.grad((out * weight).sum(), hidden)[0] for out in (got, expected)]
    assert relative(*gradients) < 1e-14


@each_mean
def test_micro_batches_and_recompute_leave_loss_and_gradient(pooling: Pooling, embedder: str) -> None:
    loss, gradient = step(ALONE, embedder, pooling, "none", "none", WHOLE)
    last, _ = step(ALONE, embedder, "last", "none", "none", WHOLE)
    assert abs(loss - last) > 1e-3 * loss
    for policy in ("none", "mlp", "block"):
        got_loss, got = step(ALONE, embedder, pooling, "none", policy, 110)
        assert got_loss == pytest.approx(loss, rel=1e-12)
        assert np.linalg.norm(got - gradient) < 1e-12 * np.linalg.norm(gradient)


def test_ranks_and_shards_leave_loss_and_gradient(embedder: str) -> None:
    wanted = [step(ALONE, embedder, pooling, "none", "none", WHOLE) for pooling, _, _ in CASES]
    for rank in run_ranks(2, steps, embedder):
        for (loss, gradient), (got_loss, got) in zip(wanted, rank, strict=True):
            assert got_loss == pytest.approx(loss, rel=1e-12)
            assert np.linalg.norm(got - gradient) < 1e-12 * np.linalg.norm(gradient)


def test_no_prefix_is_shared_where_its_tokens_count(embedder: str) -> None:
    model = pooled_model(ALONE, embedder, "mean")
    (piece,) = pack([[5, 6, 7, n] for n in range(9)], WHOLE, CPU, share_prefix=True)
    with pytest.raises(ValueError, match=f"cannot share a prefix of {piece.n_shared} tokens under mean pooling"):
        model(piece)
    model.pooling = "last"
    model(piece)


def test_a_run_keeps_its_pooling(embedder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = tmp_path / "run", tmp_path / "config.toml"
    file.write_text(CONFIG.format(run=run, model=embedder, data=SYNTHETIC / "en_sts.jsonl"))
    assert main([str(file), "train.steps=2", "backbone.pooling=mean"]) == 0
    encoder = Encoder.load(str(run))
    assert encoder.selfcheck() > 1 - 1e-6
    together = encoder.encode(TEXTS, TASK)  # they begin alike
    assert np.abs(together - np.concatenate([encoder.encode([text], TASK) for text in TEXTS])).max() < 1e-6
    card = step_folder(run, 2) / "e5core.json"
    said = json.loads(card.read_text())
    assert said.pop("pooling") == "mean"
    write_json(tmp_path / "e5core.json", said)
    assert read_card(tmp_path).pooling == "last"  # what was written before there was a choice
    with pytest.raises(ValueError, match="backbone.pooling = 'mean', and exports pool the last token"):
        export(str(run), tmp_path / "out", "merged")
    assert main([str(file), "train.steps=4", "train.resume=true"]) == 2
    assert "pooling was 'mean', is 'last'" in capsys.readouterr().err
    assert main([str(file), "backbone.pooling=max"]) == 2
    assert "backbone.pooling: input should be 'last', 'mean' or 'weighted_mean'" in capsys.readouterr().err
