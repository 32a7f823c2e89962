"""Time the exact search that mining rests on: python -m bench.mine [--device cuda].

    e5core                 search.nearest: fp32 products say who may be among the k nearest, float64 settles the order
    torch topk, blocks     the same blocks of products, topk of each, topk of both: fp32 throughout
    torch topk, whole      one product of all queries and documents, then topk: what sentence-transformers'
                           mine_hard_negatives does; left out where the products do not fit --whole-gib
    semantic_search        sentence-transformers' own blockwise search
    product                the products of the blocks alone, which nobody can do without

Before it is timed each is held against float64: every document that it found must be as near, to fp32's rounding, as
the exact one in its place. `misplaced` counts the places where it has another document than float64 has: ties of fp32.

    mined (--mined)        negatives.Miner on these vectors with every filter: the search, and choosing by record

Vectors are unit rows in clusters, so that the k nearest are close to each other, as an embedder's are.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sentence_transformers.util import semantic_search
from torch import Tensor

from bench.roofline import device_name, median_seconds, record
from e5core.contamination import text_hashes
from e5core.negatives import Corpus, MineConfig, Miner, Positives
from e5core.records import Record
from e5core.search import BLOCK_DOCUMENTS, BLOCK_QUERIES, nearest

Found = tuple[np.ndarray, np.ndarray]  # scores and rows, (Q, k) each, falling
Search = Callable[[], Found]
CLUSTER = 200  # documents
CLOSE = 1e-5  # of unit vectors' products, what fp32 may err by


def main() -> None:
    """Check, time and record every way."""
    arguments = _parser().parse_args()
    device = torch.device(arguments.device)
    out = arguments.out or Path(f"bench/results/{device_name(device)}.jsonl")
    sizes = {"queries": arguments.queries, "documents": arguments.documents, "dim": arguments.dim, "k": arguments.k}
    queries, documents = vectors(arguments.queries, arguments.documents, arguments.dim)
    searches = ways(queries, documents, arguments.k, device, arguments.whole_gib)
    exact = searches["e5core"]()
    for name, search in searches.items():
        misplaced = 0 if name == "product" else check(search(), exact, queries, documents)
        seconds = median_seconds(search, device, arguments.runs)
        gflops = 2e-9 * arguments.queries * arguments.documents * arguments.dim / seconds
        row = {"bench": "mine", "part": "search", **sizes, "implementation": name, "misplaced": misplaced}
        record(row | {"seconds": round(seconds, 3), "gflops_per_s": round(gflops, 1)}, device, out)
    if arguments.mined:
        seconds = median_seconds(lambda: mined(queries, documents, arguments.k, device), device, arguments.runs)
        row = {"bench": "mine", "part": "mined", **sizes, "implementation": "e5core", "seconds": round(seconds, 3)}
        record(row, device, out)


def vectors(n_queries: int, n_documents: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Make unit rows in clusters.  Returns (Q, D) and (N, D) float32."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((max(1, n_documents // CLUSTER), dim), dtype=np.float32)

    def near_centres(n: int) -> np.ndarray:
        rows = centres[generator.integers(len(centres), size=n)]
        rows = rows + generator.standard_normal((n, dim), dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    return near_centres(n_queries), near_centres(n_documents)


def ways(
    queries: np.ndarray, documents: np.ndarray, k: int, device: torch.device, whole_gib: float
) -> dict[str, Search]:
    """Return the ways to search, by name, all from arrays on the host to arrays on the host."""
    found: dict[str, Search] = {
        "product": lambda: in_blocks(queries, documents, 1, device, product_only=True),
        "e5core": lambda: nearest(queries, documents, k, device),
        "torch topk, blocks": lambda: in_blocks(queries, documents, k, device),
        "semantic_search": lambda: by_semantic_search(queries, documents, k, device),
    }
    if 4 * len(queries) * len(documents) <= whole_gib * 2**30:
        found["torch topk, whole"] = lambda: whole(queries, documents, k, device)
    return found


@torch.inference_mode()
def in_blocks(
    queries: np.ndarray, documents: np.ndarray, k: int, device: torch.device, product_only: bool = False
) -> Found:
    """Search in the blocks of search.nearest, in fp32; or multiply alone."""
    scores, rows = [], []
    for block in torch.from_numpy(queries).split(BLOCK_QUERIES):
        held = block.to(device)
        best = torch.full((len(held), k), -torch.inf, device=device)
        best_rows = torch.full((len(held), k), -1, device=device)
        for first in range(0, len(documents), BLOCK_DOCUMENTS):
            products = held @ torch.from_numpy(documents[first : first + BLOCK_DOCUMENTS]).to(device).T
            if not product_only:
                top = products.topk(min(k, products.shape[1]))
                merged = torch.cat([best, top.values], dim=1).topk(k)
                best_rows = torch.cat([best_rows, top.indices + first], dim=1).gather(1, merged.indices)
                best = merged.values
        scores.append(best.cpu())
        rows.append(best_rows.cpu())
    return torch.cat(scores).numpy(), torch.cat(rows).numpy()


@torch.inference_mode()
def whole(queries: np.ndarray, documents: np.ndarray, k: int, device: torch.device) -> Found:
    """Search by one product."""
    top = (torch.from_numpy(queries).to(device) @ torch.from_numpy(documents).to(device).T).topk(k)
    return top.values.cpu().numpy(), top.indices.cpu().numpy()


def by_semantic_search(queries: np.ndarray, documents: np.ndarray, k: int, device: torch.device) -> Found:
    """Search by sentence-transformers' semantic_search, by dot product."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return a @ b.T

    held = torch.from_numpy(documents).to(device)
    hits = semantic_search(torch.from_numpy(queries).to(device), held, top_k=k, score_function=dot)
    ids = np.array([[hit["corpus_id"] for hit in own] for own in hits])
    return np.array([[hit["score"] for hit in own] for own in hits]), ids


def check(found: Found, exact: Found, queries: np.ndarray, documents: np.ndarray) -> int:
    """Hold a search against the exact one.  Returns the number of places with another document.

    Raises RuntimeError where a document is not as near as the exact one in its place.
    """
    rows = found[1]
    products = np.stack(
        [documents[own].astype(np.float64) @ q.astype(np.float64) for own, q in zip(rows, queries, strict=True)]
    )
    worst = float(np.abs(products - exact[0]).max())
    if worst > CLOSE:
        raise RuntimeError(f"a search is wrong by {worst:.2e} in a product of unit vectors, allowed {CLOSE}")
    return int((rows != exact[1]).sum())


def mined(queries: np.ndarray, documents: np.ndarray, k: int, device: torch.device) -> None:
    """Mine negatives with every filter on; each query's positive is the document nearest to it."""
    texts = [f"document {i}" for i in range(len(documents))]
    _, rows = nearest(queries, documents, 1, device)
    records = [
        Record(id=str(i), task="", query=f"query {i}", positives=(texts[row],), source="bench")
        for i, row in enumerate(rows[:, 0].tolist())
    ]
    positives = Positives(text_hashes(r.query for r in records), text_hashes(r.positives[0] for r in records))
    config = MineConfig(n_negatives=7, depth=k, margin=0.01, relative_margin=0.05, max_score=0.9, min_score=0.0)
    miner = Miner(Corpus(texts, [], np.empty(0, np.uint64)), documents, positives, config, device)
    for first in range(0, len(records), BLOCK_QUERIES):
        block = slice(first, first + BLOCK_QUERIES)
        if not all(len(fields["neg"]) <= 7 for fields in miner.mine(records[block], queries[block], first)):
            raise RuntimeError("a record has more negatives than were asked for")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.mine", description="Time exact search.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=576, help="of the vectors (576: SmolLM2's; 4096: Mistral's)")
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--whole-gib", type=float, default=4.0, help="memory that one product of all may take")
    parser.add_argument("--mined", action="store_true", help="time mining with its filters, too")
    parser.add_argument("--out", type=Path)
    return parser


if __name__ == "__main__":
    main()
