"""Approximate search: exact products of allowed documents, and a report of the share of the nearest that it finds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from e5core import approximate
from e5core.mine import main
from e5core.search import nearest

CPU = torch.device("cpu")


def clusters(n: int, dim: int = 16) -> np.ndarray:
    generator = np.random.default_rng(n)
    rows = generator.standard_normal((40, dim))[generator.integers(40, size=n)]
    rows = rows + 0.4 * generator.standard_normal((n, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def search_of() -> type[approximate.ApproximateSearch]:
    pytest.importorskip("faiss", reason="an extra: pip install 'e5core[faiss]'")
    return approximate.ApproximateSearch


def test_one_cell_is_exact_search(search_of: type[approximate.ApproximateSearch]) -> None:
    documents, queries, rows = clusters(60), clusters(9), np.arange(5, 55)
    scores, found = search_of(documents, rows).nearest(queries, 60)
    exact_scores, exact = nearest(queries, documents, 60, CPU, rows=rows)
    assert np.array_equal(found, exact) and np.array_equal(scores, exact_scores)
    assert (found[:, 50:] == -1).all()


def test_recall_is_the_share_of_the_nearest(search_of: type[approximate.ApproximateSearch]) -> None:
    documents, queries, rows = clusters(4000), clusters(30), np.arange(0, 4000, 2)
    search = search_of(documents, rows)
    scores, found = search.nearest(queries, 20)
    exact = nearest(queries, documents, 20, CPU, rows=rows)[1]
    share = np.mean([len(set(one) & set(other)) for one, other in zip(found, exact, strict=True)]) / 20
    assert search.recall(queries, 20, CPU) == pytest.approx(share) and 0.7 < share < 1
    assert (np.diff(scores, axis=1) <= 0).all() and (found % 2 == 0).all()
    expected = np.einsum("qd,qkd->qk", queries.astype(np.float64), documents[found].astype(np.float64))
    assert np.abs(scores - expected).max() < 1e-12


def test_a_vector_that_is_not_finite_is_named(search_of: type[approximate.ApproximateSearch]) -> None:
    documents = clusters(100)
    documents[7, 3] = np.nan
    with pytest.raises(ValueError, match="the vector of document 7 is not finite"):
        search_of(documents, np.arange(100))


def write_mining(tmp_path: Path) -> list[str]:
    documents, queries = clusters(500), clusters(20)
    np.save(tmp_path / "c.npy", documents)
    np.save(tmp_path / "q.npy", queries)
    corpus = [{"text": f"document {i}"} for i in range(500)]
    records = [{"query": f"query {i}", "pos": [f"document {i}"]} for i in range(20)]
    for name, rows in (("c", corpus), ("q", records)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {f"--{key}": str(tmp_path / name) for key, name in (
        ("corpus", "c.jsonl"), ("queries", "q.jsonl"), ("corpus-vectors", "c.npy"), ("query-vectors", "q.npy"),
        ("out", "mined.jsonl"),
    )}  # fmt: skip
    return ["--approximate", *(word for pair in named.items() for word in pair)]


def test_mining_reports_what_the_search_finds(
    search_of: type[approximate.ApproximateSearch], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*write_mining(tmp_path), "--depth", "50"]) == 0
    report = json.loads((tmp_path / "mined.report.json").read_text())
    assert 0.3 < report["recall"] < 1 and report["written"] == 20
    assert f"the approximate search found {report['recall']:.1%}" in capfd.readouterr().err


def test_faiss_is_asked_for_by_name_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(approximate, "find_spec", lambda name: None)
    assert main([*write_mining(tmp_path), "--corpus", str(tmp_path / "none")]) == 2
    assert "approximate search needs the package faiss-cpu: pip install 'e5core[faiss]'" in capfd.readouterr().err
