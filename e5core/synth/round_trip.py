"""Does a query find its own document? The round-trip filter, by an embedding model of the user's choice.

A record stays if at most `top` - 1 other positives of the whole run are more similar to its query than its own is. It
is the filter of Promptagator (arXiv 2209.11755, section 3.2; top 1) and of E5 (arXiv 2212.03533; top 2). The model is
run by our own `python -m e5core.encode`, in a process of its own, since synth imports no torch.
"""

import collections
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from e5core.records import RESPONSE_KEYS
from e5core.template import query_text

# A label is the positive of many records, and of a symmetric kind's texts others may rightly be as similar
FILTERED = ("short_long", "long_long", "short_short")
BLOCK = 8192  # rows of a side whose similarities are in memory at once: 256 MiB
TIE = 1e-5  # equal texts are encoded in different batches, so their similarities differ by rounding


def failing(rows: Iterable[dict], model: str, top: int, workdir: Path) -> set[str]:
    """Return the ids of the records whose query does not find their positive.

    rows: records' lines; those of other kinds than FILTERED pass, and are no one's rivals.
    model: what e5core.encode takes.  top: at which place the own positive must be at last; at least 1.
    workdir: a folder for the texts and for 8 * dim bytes a record of vectors; both are removed.
    Raises RuntimeError, with its last lines, if the encoder fails.
    Time beside the encoder's: n * n * dim multiplications, 5.5 s a core for 16,384 records and 576 dimensions.
    """
    texts, vectors = workdir / "round_trip.jsonl", workdir / "round_trip.npy"
    ids: list[str] = []
    try:
        with texts.open("w", encoding="utf-8") as file:
            for row in rows:
                if row["kind"] in FILTERED:
                    query, positive, *_ = (row["response"][key] for key in RESPONSE_KEYS[row["kind"]])
                    for text in (query_text(row["task"], query), positive):
                        file.write(json.dumps({"text": text}) + "\n")
                    ids.append(row["id"])
        if not ids:
            return set()
        _encode(model, texts, vectors)
        pairs = np.load(vectors, mmap_mode="r", allow_pickle=False)  # (2n, dim)
        lost = n_rivals(pairs[::2], pairs[1::2]) >= top
    finally:
        texts.unlink(missing_ok=True)
        vectors.unlink(missing_ok=True)
    return {ids[i] for i in np.flatnonzero(lost)}


def n_rivals(queries: np.ndarray, positives: np.ndarray, block: int = BLOCK) -> np.ndarray:
    """Count for each query the positives of others that are more similar to it than its own.

    queries, positives: (n, dim) float32, unit rows, row by row of one record; may be memory-mapped.
    Returns (n,) int64.
    """
    counts = np.zeros(len(queries), dtype=np.int64)
    for first in range(0, len(queries), block):
        mine = slice(first, first + block)
        own = np.einsum("nd,nd->n", queries[mine], positives[mine])
        for other in range(0, len(positives), block):
            similarities = queries[mine] @ positives[other : other + block].T
            counts[mine] += (similarities > own[:, None] + TIE).sum(axis=1)
    return counts


def _encode(model: str, texts: Path, vectors: Path) -> None:
    """Run the encoder; what it says passes through to stderr."""
    command = [sys.executable, "-m", "e5core.encode", model, "--input", str(texts), "--output", str(vectors)]
    said: collections.deque[str] = collections.deque(maxlen=5)
    with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8", errors="replace") as process:
        try:
            for line in process.stderr:
                sys.stderr.write(line)
                said.append(line)
            status = process.wait()
        finally:
            process.kill()  # where we are interrupted; nothing to one that has ended
    if status:
        last = "".join(said).strip() or "it said nothing"
        raise RuntimeError(f"the encoder of checks.round_trip ended with status {status}: {last}")
