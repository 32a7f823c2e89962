"""Laws of synth's round-trip filter: what it drops, by vectors made by hand and by a real encoder in its process."""

import json
from pathlib import Path

import numpy as np
import pytest
from models import save_embedder
from scoring import ROOT

from e5core.encode import Encoder
from e5core.synth.round_trip import failing, n_rivals


def unit_rows(n: int, dim: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def records_of(*names: str) -> list[dict]:
    lines = [line for name in names for line in (ROOT / f"data/synthetic/{name}.jsonl").read_text().splitlines()[:12]]
    return [{**json.loads(line), "id": f"id{number}"} for number, line in enumerate(lines)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_embedder(tmp_path_factory.mktemp("embedder"))


def test_rivals_are_the_positives_of_others_that_are_nearer_than_the_own_one() -> None:
    positives = np.eye(3, dtype=np.float32)
    queries = np.array([[1, 0, 0], [0.8, 0.6, 0], [0.6, 0.6, 0.52915]], dtype=np.float32)
    assert n_rivals(queries, positives).tolist() == [0, 1, 2]


def test_a_positive_that_stands_twice_is_no_rival_of_itself() -> None:
    queries, positives = unit_rows(3, 64, seed=0), np.repeat(unit_rows(1, 64, seed=1), 3, axis=0)
    positives[1] += np.float32(1e-7)  # as its vector may differ in another batch
    assert n_rivals(queries, positives).tolist() == [0, 0, 0]


@pytest.mark.parametrize("block", [1, 7, 40, 64])
def test_blocks_change_no_count(block: int, tmp_path: Path) -> None:
    pairs = unit_rows(80, 16, seed=2)
    queries, positives = pairs[::2], pairs[1::2]
    products = queries.astype(np.float64) @ positives.T.astype(np.float64)
    expected = (products > np.diagonal(products)[:, None]).sum(axis=1)
    assert n_rivals(queries, positives, block).tolist() == expected.tolist() and expected.max() > 20
    np.save(tmp_path / "v.npy", pairs)
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    assert n_rivals(mapped[::2], mapped[1::2], block).tolist() == expected.tolist()


def test_a_record_fails_unless_its_own_positive_is_among_the_top_of_all(model: Path, tmp_path: Path) -> None:
    rows = records_of("en_short_long_a", "en_sts", "en_short_short", "en_long_short", "en_long_long")
    filtered = [row for row in rows if row["kind"] in ("short_long", "short_short", "long_long")]
    texts = [tuple(row["response"].values())[:2] for row in filtered]
    encoder = Encoder.load(str(model))
    queries = np.concatenate([encoder.encode([q], row["task"]) for row, (q, _) in zip(filtered, texts, strict=True)])
    products = queries @ encoder.encode([positive for _, positive in texts]).T
    places = (products > np.diagonal(products)[:, None] + 1e-5).sum(axis=1) + 1
    expected = {row["id"] for row, place in zip(filtered, places, strict=True) if place > 3}
    assert failing(iter(rows), str(model), 3, tmp_path) == expected
    assert 0 < len(expected) < len(filtered) and not list(tmp_path.iterdir())


def test_where_no_record_is_of_a_filtered_kind_no_model_is_asked(tmp_path: Path) -> None:
    assert failing(records_of("en_sts", "en_long_short"), "no/model", 1, tmp_path) == set()
    assert not list(tmp_path.iterdir())


def test_a_failing_encoder_is_named_with_what_it_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)ended with status 2: .*hf download no/model"):
        failing(records_of("en_short_short"), "no/model", 1, tmp_path)
    assert "hf download no/model" in capfd.readouterr().err and not list(tmp_path.iterdir())
