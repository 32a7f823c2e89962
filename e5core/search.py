"""Exact nearest documents by inner product, block by block: the same answer on any device, by any block size.

A block of queries meets a block of documents in one fp32 product. It only says who may be among the k nearest: with
u = 2^-24, every order of summation of D products errs by at most gamma |q||d|, gamma = D u / (1 - D u) (Higham,
Accuracy and Stability of Numerical Algorithms, section 3.1, by Cauchy-Schwarz from sum |q_i d_i|). So

    e = D eps |q| max|d|,   eps = 2 u

bounds it with a factor of two to spare for what rounding does to the norms and to the float64 below. If k documents
are known whose k-th exact product is s, a document of the k nearest has an fp32 product of at least s - e. In the
first block s is not known, but k of its fp32 products are at least its k-th largest, t, so s >= t - e: t - 2e is safe.

What passes is multiplied again in float64, where the product of two fp32 numbers is exact, and is added up by halves,
an order that shapes and devices do not change. Equal products go by the lower row. Memory is a few blocks of products.
"""

import numpy as np
import torch
from torch import Tensor

BLOCK_QUERIES, BLOCK_DOCUMENTS = 4096, 8192  # rows of a product: 128 MiB
# Numbers that are multiplied in float64 together: on a CPU 2 MiB, which its cache holds (bench/mine.py's search takes
# half the time that it takes by 32 MiB), elsewhere 32 MiB, which few launches fill.
PAIRS, CPU_PAIRS = 1 << 22, 1 << 18


@torch.inference_mode()
def nearest(
    queries: np.ndarray,
    documents: np.ndarray,
    k: int,
    device: torch.device,
    *,
    rows: np.ndarray | None = None,
    block_queries: int = BLOCK_QUERIES,
    block_documents: int = BLOCK_DOCUMENTS,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k documents with the largest inner product for each query.

    queries: (Q, D), documents: (N, D), floating, taken as fp32; documents may be mapped from a file.
    rows: (M,) int64, rising: search these documents only; None = all.
    Returns (Q, k) float64 products, falling, and (Q, k) int64 rows of documents; -inf and -1 where there are fewer.
    Raises ValueError on vectors that are not finite or of different dim, RuntimeError if fp32 products are cut short.
    """
    if torch.get_float32_matmul_precision() != "highest":
        raise RuntimeError(
            f"float32 products must be exact to fp32: got precision {torch.get_float32_matmul_precision()!r}; "
            'call torch.set_float32_matmul_precision("highest")'
        )
    if queries.shape[1] != documents.shape[1]:
        raise ValueError(f"queries have dim {queries.shape[1]}, documents {documents.shape[1]}; take one model")
    n_documents = len(documents) if rows is None else len(rows)
    scores, found = np.empty((len(queries), k)), np.empty((len(queries), k), dtype=np.int64)
    for i in range(0, len(queries), block_queries):
        block = _rows(queries, np.arange(i, min(i + block_queries, len(queries))), "query", device)
        best = _Best(block, k)
        for j in range(0, n_documents, block_documents):
            chosen = np.arange(j, min(j + block_documents, n_documents))
            best.meet(*_block(documents, chosen if rows is None else rows[chosen], device))
        scores[i : i + block_queries], found[i : i + block_queries] = best.scores.cpu(), best.rows.cpu()
    return scores, found


@torch.inference_mode()
def products(
    queries: np.ndarray, documents: np.ndarray, query_rows: np.ndarray, document_rows: np.ndarray
) -> np.ndarray:
    """Multiply pairs of rows as `nearest` does, to the bit.

    query_rows, document_rows: (n,) int64.  Returns (n,) float64.
    """
    device, piece = torch.device("cpu"), max(1, CPU_PAIRS // queries.shape[1])
    parts = [np.empty(0)]
    for i in range(0, len(query_rows), piece):
        left = _rows(queries, query_rows[i : i + piece], "query", device)
        right = _rows(documents, document_rows[i : i + piece], "document", device)
        parts.append(_sum_by_halves(left.double() * right.double()).numpy())
    return np.concatenate(parts)


class _Best:
    """The k best documents so far of a block of queries."""

    def __init__(self, queries: Tensor, k: int) -> None:
        self.queries, self.k = queries, k
        self.norms = queries.norm(dim=1)
        self.scores = torch.full((len(queries), k), -torch.inf, dtype=torch.float64, device=queries.device)
        self.rows = torch.full((len(queries), k), -1, dtype=torch.int64, device=queries.device)

    def meet(self, documents: Tensor, rows: Tensor) -> None:
        """Take in a block of documents, whose rows are higher than all before."""
        product = self.queries @ documents.T  # (Q, P)
        error = torch.finfo(torch.float32).eps * self.queries.shape[1] * self.norms * documents.norm(dim=1).max()
        floor = self.scores[:, -1] - error
        if len(documents) >= self.k:
            unknown = floor.isneginf().nonzero().flatten()
            largest = product[unknown].topk(self.k).values[:, -1] if len(unknown) else product.new_empty(0)
            floor[unknown] = largest.double() - 2 * error[unknown].double()
        below = floor.float().nextafter(torch.full_like(error, -torch.inf))  # rounding must not lift it
        query, document = (product >= below[:, None]).nonzero(as_tuple=True)
        if len(query):
            self._merge(query, rows[document], self._exact(documents, query, document))

    def _exact(self, documents: Tensor, query: Tensor, document: Tensor) -> Tensor:
        numbers = CPU_PAIRS if documents.device.type == "cpu" else PAIRS
        piece = max(1, numbers // documents.shape[1])
        pairs = zip(query.split(piece), document.split(piece), strict=True)
        return torch.cat([_sum_by_halves(self.queries[q].double() * documents[d].double()) for q, d in pairs])

    def _merge(self, query: Tensor, rows: Tensor, scores: Tensor) -> None:
        """Put new ones, in the order of query and row, behind the old ones; a stable sort then settles ties by row."""
        n_new = torch.bincount(query, minlength=len(self.queries))
        place = self.k + torch.arange(len(query), device=query.device) - (n_new.cumsum(0) - n_new)[query]
        wide = (len(self.queries), int(n_new.max()))
        all_scores = torch.cat([self.scores, self.scores.new_full(wide, -torch.inf)], dim=1)  # (Q, k + new)
        all_rows = torch.cat([self.rows, self.rows.new_full(wide, -1)], dim=1)
        all_scores[query, place], all_rows[query, place] = scores, rows
        all_scores, order = all_scores.sort(dim=1, descending=True, stable=True)
        self.scores, self.rows = all_scores[:, : self.k], all_rows.gather(1, order[:, : self.k])


def _sum_by_halves(x: Tensor) -> Tensor:
    """Add up each row of x, (n, D), which is overwritten: its right half goes onto its left half, again and again."""
    width = x.shape[1]
    while width > 1:
        half = (width + 1) // 2
        x[:, : width - half] += x[:, half:width]
        width = half
    return x[:, 0].clone()


def _block(documents: np.ndarray, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    return _rows(documents, rows, "document", device), torch.from_numpy(rows).to(device)


def _rows(vectors: np.ndarray, rows: np.ndarray, side: str, device: torch.device) -> Tensor:
    """Bring some rows to the device.  Returns (n, D) fp32."""
    block = torch.from_numpy(vectors[rows].astype(np.float32)).to(device)
    broken = (~block.norm(dim=1).isfinite()).nonzero().flatten()
    if len(broken):
        raise ValueError(f"the vector of {side} {rows[int(broken[0])]} is not finite, or too long for fp32")
    return block
