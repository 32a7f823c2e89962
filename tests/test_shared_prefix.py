"""A prefix that the texts of a micro-batch share is computed once and changes no vector."""

from pathlib import Path

import numpy as np
import pytest
import torch
from models import VARIANTS, save_embedder, save_peer
from test_backbone import relative
from torch import Tensor

from e5core.backbone import layout_of
from e5core.batches import pack
from e5core.encode import Encoder
from e5core.encoder import EmbeddingModel, build_model
from e5core.lora import LoraConfig, adapters
from e5core.metrics import TextProgress

CPU = torch.device("cpu")
PREFIX = list(range(3, 15))  # longer than the tiny models' windows of 5 and 7
# Longer than the prefix, one token beyond it (twice, of them two alike), and the prefix itself.
TEXTS = [PREFIX + list(range(20, 60)), PREFIX + [2], PREFIX, PREFIX + [2], PREFIX + [96, 2], PREFIX + list(range(9))]
TASK = "Given a question, retrieve passages that answer it"


def model_of(folder: Path, dtype: torch.dtype, causal: bool = True, lora: LoraConfig | None = None) -> EmbeddingModel:
    return build_model(folder, dtype, CPU, causal=causal, lora=lora, seed=0)


def embed(model: EmbeddingModel, texts: list[list[int]], share_prefix: bool, budget: int = 1000) -> Tensor:
    pieces = pack(texts, budget, CPU, share_prefix)
    with torch.inference_mode():
        vectors = torch.cat([model(piece, normalize=False) for piece in pieces])
    return vectors[torch.cat([piece.rows for piece in pieces]).argsort()]


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_vectors_are_those_of_whole_texts(variant: str, dtype: torch.dtype, allowed: float, tmp_path: Path) -> None:
    save_peer(variant, tmp_path)
    model = model_of(tmp_path, dtype)
    whole = embed(model, TEXTS, share_prefix=False)
    assert relative(embed(model, TEXTS, share_prefix=True), whole) < allowed
    alone = torch.cat([embed(model, [text], share_prefix=True) for text in TEXTS])
    assert relative(alone, whole) < allowed


def test_adapters_see_the_prefix_too(tmp_path: Path) -> None:
    save_peer("qwen2-window", tmp_path)
    model = model_of(tmp_path, torch.float64, lora=LoraConfig(rank=2))
    for _, linear in adapters(model.backbone):
        torch.nn.init.normal_(linear.lora_b, std=0.1)
    whole = embed(model, TEXTS, share_prefix=False)
    assert relative(embed(model, TEXTS, share_prefix=True), whole) < 1e-12


def test_every_text_sees_the_prefix_and_itself() -> None:
    layout = layout_of(torch.tensor([0, 3, 5, 6], dtype=torch.int32), n_tokens=6, n_shared=3)
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 3]
    assert layout.key_rows.tolist() == [0, 1, 2] + [0, 1, 2, 3, 4] + [0, 1, 2, 5]
    assert layout.cu_seqlens_k.tolist() == [0, 3, 8, 12] and layout.cu_seqlens_k.dtype == torch.int32


def test_a_pack_holds_the_prefix_once_and_the_rest_of_every_text() -> None:
    (piece,) = pack(TEXTS, 1000, CPU, share_prefix=True)
    assert piece.n_shared == 11  # the text that is the prefix keeps its last token
    bounds = piece.cu_seqlens.tolist()
    prefix, *rests = [piece.tokens[a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)]
    assert [prefix + rest for rest in rests] == [TEXTS[row] for row in piece.rows.tolist()]
    assert piece.max_seqlen == 41 and piece.rows.tolist() == list(range(6))


@pytest.mark.parametrize("budget", [1, 30, 64])
def test_sharing_never_adds_to_a_micro_batch(budget: int) -> None:
    shared, whole = (pack(TEXTS * 5, budget, CPU, share) for share in (True, False))
    assert [piece.rows.tolist() for piece in shared] == [piece.rows.tolist() for piece in whole]
    for ours, theirs in zip(shared, whole, strict=True):
        assert len(ours.tokens) + ours.n_shared * (len(ours.rows) - 1) == len(theirs.tokens)


def test_a_prefix_that_saves_little_is_not_shared() -> None:
    alike = [[1, *range(10 * i, 10 * i + 20)] for i in range(5)]  # BOS alone
    assert pack(alike, 1000, CPU, share_prefix=True)[0].n_shared == 0
    assert pack([PREFIX], 1000, CPU, share_prefix=True)[0].n_shared == 0
    assert pack([[2], [2], [2]], 1000, CPU, share_prefix=True)[0].n_shared == 0  # nothing but their last token


def test_bidirectional_attention_shares_nothing(tmp_path: Path) -> None:
    save_embedder(tmp_path)
    model = model_of(tmp_path, torch.float32, causal=False)
    with pytest.raises(ValueError, match="11 tokens cannot be shared under bidirectional"):
        embed(model, TEXTS, share_prefix=True)
    whole = Encoder.load(str(tmp_path))
    encoder = Encoder(model, whole.tokenizer, CPU, max_tokens=64)
    assert np.isfinite(encoder.encode(["a", "b"], TASK)).all()


def test_encoding_shares_the_instruction_and_keeps_order_truncation_and_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("e5core.text_encoder.CHUNK", 50)
    encoder = Encoder.load(str(save_embedder(tmp_path)), max_tokens=128)
    texts = ["", "a", "the tram", "x" * 700, "Straße", "", "a", "猫", "word " * 9] * 20
    encoder.batch_tokens = 400
    n_computed: list[int] = []
    encoder.model.backbone.register_forward_pre_hook(lambda _, inputs: n_computed.append(len(inputs[0])))
    with TextProgress(len(texts)) as progress:
        shared = encoder.encode(texts, TASK, progress=progress)
    n_shared, n_truncated = sum(n_computed), encoder.n_truncated
    assert max(n_computed) <= 400
    n_computed.clear()
    encoder.share_prefix = False
    whole = encoder.encode(texts, TASK)
    assert np.abs(shared - whole).max() < 1e-6
    assert encoder.n_truncated == 2 * n_truncated == 40
    assert progress.n_tokens == sum(n_computed) > 2 * n_shared
    assert np.abs(encoder.encode(texts[95:104], TASK) - whole[95:104]).max() < 1e-6
