"""The last layer is computed for last tokens alone: vectors and gradients are those of the whole layer."""

from pathlib import Path

import pytest
import torch
from models import VARIANTS, save_peer
from test_backbone import relative
from test_shared_prefix import TEXTS
from torch import Tensor

from e5core.backbone import positions_of
from e5core.batches import MicroBatch, pack
from e5core.encoder import EmbeddingModel, build_model
from e5core.lora import LoraConfig, adapters
from e5core.recompute import Policy
from e5kernels.last_token import last_token_reference

CPU = torch.device("cpu")
DROPOUT = (5, 9)


def model_of(folder: Path, causal: bool = True, recompute: Policy = "none", dropout: float = 0.3) -> EmbeddingModel:
    lora = LoraConfig(rank=3, dropout=dropout)
    model = build_model(folder, torch.float64, CPU, causal=causal, lora=lora, seed=0, recompute=recompute)
    generator = torch.Generator().manual_seed(1)
    for _, linear in adapters(model.backbone):
        linear.lora_b.data.normal_(0, 0.1, generator=generator)
    return model


def whole(model: EmbeddingModel, piece: MicroBatch) -> Tensor:
    """Embed with every token of every layer computed, and gather in the end."""
    bounds, n_tokens = piece.cu_seqlens, piece.tokens.shape[0]
    rows = piece.rows.repeat_interleave(bounds.diff(), output_size=n_tokens)
    model.token_keys.set(*DROPOUT, rows, positions_of(bounds, n_tokens))
    hidden = model.backbone(piece.tokens, bounds)
    assert hidden.shape[0] == n_tokens
    return torch.nn.functional.normalize(model.backbone.norm(last_token_reference(hidden, bounds)), dim=-1)


def gradients(model: EmbeddingModel, embeddings: Tensor) -> Tensor:
    (embeddings * torch.arange(embeddings.numel(), dtype=torch.float64).view_as(embeddings).cos()).sum().backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.cat([p.grad.flatten() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return found


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_vectors_and_gradients_are_those_of_the_whole_layer_with_dropout(
    variant: str, causal: bool, tmp_path: Path
) -> None:
    save_peer(variant, tmp_path)
    model = model_of(tmp_path, causal)
    (piece,) = pack([[5], [7], *TEXTS], 1000, CPU)
    expected = whole(model, piece)
    wanted = gradients(model, expected)
    got = model(piece, DROPOUT)
    assert relative(got, expected) < 1e-12
    assert relative(gradients(model, got), wanted) < 1e-12
    model.token_keys.clear()
    assert relative(model(piece), expected) > 1e-3  # dropout was drawn


@pytest.mark.parametrize("policy", ["mlp", "block"])
def test_a_replay_draws_the_dropout_of_last_tokens(policy: Policy, tmp_path: Path) -> None:
    save_peer("mistral-window", tmp_path)
    (piece,) = pack([[5], [7], *TEXTS], 1000, CPU)
    wanted = gradients(model := model_of(tmp_path), whole(model, piece))
    replayed = model_of(tmp_path, recompute=policy)
    assert relative(gradients(replayed, replayed(piece, DROPOUT)), wanted) < 1e-12


def test_beyond_keys_and_values_the_last_layer_sees_one_row_a_text(tmp_path: Path) -> None:
    save_peer("gemma3", tmp_path)
    model, seen = model_of(tmp_path), {}
    for name, linear in adapters(model.backbone):
        linear.register_forward_hook(lambda _, inputs, out, name=name: seen.update({name: inputs[0].shape[0]}))
    (piece,) = pack(TEXTS, 1000, CPU)
    model(piece, DROPOUT)
    n_tokens, last = piece.tokens.shape[0], f"layers.{len(model.backbone.layers) - 1}."
    narrow = {name for name, n_rows in seen.items() if n_rows == len(TEXTS)}
    assert narrow == {name for name in seen if name.startswith(last) and name.rpartition(".")[2] not in ("wk", "wv")}
    assert {seen[name] for name in seen.keys() - narrow} == {n_tokens}
