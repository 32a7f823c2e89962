"""Nearest documents by faiss' inverted file, for corpora that exact search (search.py) takes too long for on a CPU.

K-means cuts the documents into 4 sqrt(N) cells; of these the sqrt of their number that are nearest to a query are
looked at. So documents can be missed, which `recall` measures; what is found has its exact product, and the exact
order. The index holds all vectors in memory, 4 bytes a number. faiss is an extra: pip install 'e5core[faiss]'.
"""

import math
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import torch

from e5core.search import BLOCK_DOCUMENTS, nearest, products

POINTS_PER_CELL = 39  # of the sample that k-means sees; of fewer faiss itself warns


class ApproximateSearch:
    """An index over some documents."""

    def __init__(self, documents: np.ndarray, rows: np.ndarray) -> None:
        """documents: (N, D), floating; may be mapped from a file.  rows: (M,) int64, rising: those to search.

        Raises ValueError where faiss is missing, or a vector is not finite.
        """
        check_faiss()
        faiss, dim = import_module("faiss"), documents.shape[1]
        self._documents, self._rows = documents, rows
        n_cells = max(1, min(round(4 * math.sqrt(len(rows))), len(rows) // POINTS_PER_CELL))
        self._index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, n_cells, faiss.METRIC_INNER_PRODUCT)
        self._index.nprobe = math.ceil(math.sqrt(n_cells))
        sample = np.random.default_rng(0).choice(rows, min(len(rows), n_cells * POINTS_PER_CELL), replace=False)
        self._index.train(self._block(np.sort(sample)))
        for first in range(0, len(rows), BLOCK_DOCUMENTS):
            self._index.add(self._block(rows[first : first + BLOCK_DOCUMENTS]))

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find k documents that are near each query.  Takes and returns what search.nearest does."""
        _, places = self._index.search(np.ascontiguousarray(queries, np.float32), k)
        query, column = np.nonzero(places >= 0)
        rows = np.full(places.shape, -1, np.int64)
        scores = np.full(places.shape, -np.inf)
        rows[query, column] = self._rows[places[query, column]]
        scores[query, column] = products(queries, self._documents, query, rows[query, column])
        order = np.lexsort((rows, -scores))
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)

    def recall(self, queries: np.ndarray, k: int, device: torch.device) -> float:
        """Return the share of the k nearest documents that `nearest` finds, by exact search for all these queries."""
        found = self.nearest(queries, k)[1]
        exact = nearest(queries, self._documents, k, device, rows=self._rows)[1]
        hits = sum(len(np.intersect1d(one[one >= 0], other)) for one, other in zip(exact, found, strict=True))
        return hits / int((exact >= 0).sum())

    def _block(self, rows: np.ndarray) -> np.ndarray:
        block = np.ascontiguousarray(self._documents[rows], np.float32)
        broken = np.flatnonzero(~np.isfinite(block).all(axis=1))
        if len(broken):
            raise ValueError(f"the vector of document {rows[broken[0]]} is not finite")
        return block


def check_faiss() -> None:
    """Raise ValueError where faiss is missing."""
    if find_spec("faiss") is None:
        raise ValueError("approximate search needs the package faiss-cpu: pip install 'e5core[faiss]'")
