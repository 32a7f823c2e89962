"""The k nearest are exact: those of correctly rounded sums, ties by row, for any block, k and device."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from e5core.search import nearest, products

CPU = torch.device("cpu")


def near_ties(n_queries: int, n_documents: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows around few centres, closer to one another than fp32 products can tell; some are equal."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((5, dim))
    documents = centres[rng.integers(5, size=n_documents)] + 1e-7 * rng.standard_normal((n_documents, dim))
    documents[n_documents // 2 :: 3] = documents[: len(documents[n_documents // 2 :: 3])]
    queries = centres[rng.integers(5, size=n_queries)] + 0.1 * rng.standard_normal((n_queries, dim))
    return tuple((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (queries, documents))


def definition(queries: np.ndarray, documents: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    pairs = queries.astype(np.float64)[:, None] * documents.astype(np.float64)  # exact
    scores = np.array([[math.fsum(pair) for pair in row] for row in pairs])
    rows = np.array([np.lexsort((np.arange(len(row)), -row))[:k] for row in scores])
    return np.take_along_axis(scores, rows, axis=1), rows


@pytest.mark.parametrize("dim", [1, 7, 64])
def test_nearest_equals_its_definition_for_every_block_where_fp32_does_not(dim: int) -> None:
    queries, documents = near_ties(23, 700, dim)
    scores, rows = definition(queries, documents, 40)
    if dim == 64:
        naive = torch.from_numpy(queries @ documents.T).topk(40).indices.numpy()
        assert (np.sort(naive) != np.sort(rows)).any(axis=1).mean() > 0.9, "the data is too easy"
    answers = [
        nearest(queries, documents, 40, CPU, block_queries=i, block_documents=j)
        for i, j in ((4096, 8192), (23, 1), (1, 350), (5, 39), (23, 40), (7, 41), (8, 699), (22, 700))
    ]
    for found_scores, found_rows in answers:
        assert np.array_equal(found_rows, rows)
        assert np.array_equal(found_scores, answers[0][0]), "the scores' bits depend on the block"
    assert np.abs(answers[0][0] - scores).max() <= 4e-16


def test_equal_documents_go_by_row_and_a_lack_is_marked() -> None:
    queries, documents = np.ones((2, 3), dtype=np.float32), np.ones((50, 3), dtype=np.float16)
    scores, rows = nearest(queries, documents, 20, CPU, block_documents=8)
    assert rows.tolist() == [list(range(20))] * 2 and (scores == 3).all()
    chosen = np.array([4, 9, 30])
    scores, rows = nearest(queries, documents, 5, CPU, rows=chosen, block_documents=2)
    assert rows.tolist() == [[4, 9, 30, -1, -1]] * 2
    assert scores.tolist() == [[3.0, 3.0, 3.0, -math.inf, -math.inf]] * 2


def test_lengths_of_rows_do_not_matter() -> None:
    rng = np.random.default_rng(1)
    queries, documents = near_ties(11, 300, 16)
    queries *= 10.0 ** rng.integers(-3, 4, size=(11, 1))
    documents *= np.float32(10.0) ** rng.integers(-3, 4, size=(300, 1)).astype(np.float32)
    _, rows = definition(queries, documents, 30)
    assert np.array_equal(nearest(queries, documents, 30, CPU, block_documents=37)[1], rows)


def test_pairs_are_multiplied_to_the_bit_as_in_the_search() -> None:
    queries, documents = near_ties(9, 200, 33)
    scores, rows = nearest(queries, documents, 12, CPU, block_documents=50)
    pairs = products(queries, documents, np.repeat(np.arange(9), 12), rows.ravel())
    assert np.array_equal(pairs.reshape(9, 12), scores)


class Largest(TorchDispatchMode):
    """Notes the most numbers that any tensor made by torch holds."""

    numel = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = op(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() != 0:
                self.numel = max(self.numel, each.numel())
        return made


def test_memory_is_of_the_block_whatever_the_corpus_and_the_queries() -> None:
    sizes = []
    for n_queries, n_documents in ((200, 1000), (1000, 5000)):
        queries, documents = near_ties(n_queries, n_documents, 8)
        with Largest() as largest:
            nearest(queries, documents, 10, CPU, block_queries=50, block_documents=100)
        sizes.append(largest.numel)
    assert max(sizes) <= max(50 * (10 + 100), 50 * 100 * 8)  # a product beside the old; float64 pairs
    assert sizes[1] <= 1.2 * sizes[0]


@pytest.mark.gpu
def test_a_gpu_finds_the_same_to_the_bit() -> None:
    queries, documents = near_ties(500, 20_000, 384)
    expected = nearest(queries, documents, 100, CPU)
    found = nearest(queries, documents, 100, torch.device("cuda"), block_queries=77, block_documents=3001)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_cannot_be_searched_is_named() -> None:
    queries, documents = near_ties(4, 30, 8)
    with pytest.raises(ValueError, match="queries have dim 8, documents 7"):
        nearest(queries, documents[:, :7], 3, CPU)
    documents[17, 3] = np.nan
    with pytest.raises(ValueError, match="the vector of document 17 is not finite"):
        nearest(queries, documents, 3, CPU, block_documents=10)
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(RuntimeError, match="got precision 'medium'"):
            nearest(queries, documents[:10], 3, CPU)
    finally:
        torch.set_float32_matmul_precision("highest")
