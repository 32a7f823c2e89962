"""Choose hard negatives: which of a corpus' nearest documents become a record's negatives, and what was passed over.

Of the `depth` nearest documents (search.py) these are taken, in this order: the positives of the record and of every
other record with the same query, and texts equal to one of them or to the query; documents nearer than a margin to the
least similar of these positives; those above max_score and below min_score; the `skip` nearest of what is left. Texts
are equal if they differ at most in letter case, width and white space (contamination.py). The relative margin is
TopK-PercPos of NV-Retriever (arXiv 2407.15831, section 3); order and meaning of the filters are those of
sentence-transformers' mine_hard_negatives.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
import torch

from e5core.approximate import ApproximateSearch
from e5core.contamination import occur, text_hash, text_hashes
from e5core.records import MAX_NEGATIVES, Record
from e5core.search import nearest, products

RECALL_QUERIES = 64  # that approximate search is measured on


@dataclass(frozen=True, kw_only=True, slots=True)
class MineConfig:
    """How negatives are chosen; every filter is off by default but the positives'."""

    n_negatives: int = 7  # per record, where so many are left
    depth: int = 100  # nearest documents that are looked at, positives among them
    skip: int = 0  # nearest ones to pass over, of what the other filters leave
    margin: float | None = None  # keep score <= positive - margin
    relative_margin: float | None = None  # keep score <= positive - |positive| * relative_margin
    max_score: float | None = None  # keep score <= max_score
    min_score: float | None = None  # keep score >= min_score
    choice: Literal["top", "random"] = "top"  # which of the rest
    seed: int = 0  # of the random choice, a function of it and of the record's place

    def __post_init__(self) -> None:
        if not 1 <= self.n_negatives <= MAX_NEGATIVES:
            raise ValueError(f"a record takes 1 to {MAX_NEGATIVES} negatives: got n_negatives {self.n_negatives}")
        if self.skip < 0 or self.depth < self.skip + self.n_negatives + 1:
            least = max(self.skip, 0) + self.n_negatives + 1
            raise ValueError(
                f"depth must hold skip (0 or more), n_negatives and a positive, here at least {least}: got skip "
                f"{self.skip}, depth {self.depth}"
            )
        for name in ("margin", "relative_margin", "max_score", "min_score"):
            value = asdict(self)[name]
            if value is not None and not np.isfinite(value):
                raise ValueError(f"{name} must be a finite number: got {value}")


@dataclass(slots=True)
class Report:
    """What became of the records and of the documents that were looked at."""

    n_records: int = 0  # read
    in_evaluation_sets: int = 0  # left out: the query or a positive occurs in one
    written: int = 0
    fewer_negatives: int = 0  # written with fewer negatives than asked for
    no_negatives: int = 0  # of these, with none
    negatives: int = 0
    documents: dict[str, int] = field(default_factory=dict)  # of the corpus: repeated, in evaluation sets, searched
    looked_at: int = 0  # documents near a record, all records together
    removed: dict[str, int] = field(default_factory=dict)  # by each filter, in the order applied
    recall: float = 1.0  # of the nearest documents, the share that the search finds: measured on the first records

    def lines(self) -> Iterator[str]:
        """Yield the report for people, with each filter's part of what had come to it."""
        searched = ", ".join(f"{count:,} {name}" for name, count in self.documents.items())
        yield f"corpus: {searched}; looked at {self.looked_at:,} documents near {self.written:,} records"
        if self.recall < 1:
            yield f"the approximate search found {self.recall:.1%} of them that are nearest, by the first records"
        left = self.looked_at
        for name, count in self.removed.items():
            yield f"{name} removed {count:,} of {left:,} ({count / max(left, 1):.1%})"
            left -= count
        short = f"{self.fewer_negatives:,} got fewer than asked for, {self.no_negatives:,} of them none"
        yield f"{self.written:,} of {self.n_records:,} records written, {self.negatives:,} negatives; {short}"
        if self.in_evaluation_sets:
            yield f"{self.in_evaluation_sets:,} records were left out: in the evaluation sets"
        if self.fewer_negatives:
            yield "a larger --depth or weaker filters find more"


class Corpus:
    """The documents: texts, and for every text the first document that has it."""

    def __init__(self, texts: Sequence[str], added: Sequence[str], banned: np.ndarray) -> None:
        """added: texts that come behind.  banned: (n,) uint64, rising: hashes of texts of evaluation sets."""
        self.texts, self.n_added, self.banned = [*texts, *added], len(added), banned
        self.hashes, self.first = np.unique(text_hashes(self.texts), return_index=True)
        allowed = ~_is_in(self.hashes, banned) & (self.hashes != text_hash(""))
        self.rows = np.sort(self.first[allowed])  # documents that may be negatives

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """Look up texts by hash.  hashes: (n,) uint64.  Returns (n,) int64 rows, -1 where there is none."""
        places = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return np.where(self.hashes[places] == hashes, self.first[places], -1)

    def counts(self) -> dict[str, int]:
        """Count the documents by what becomes of them."""
        n_banned = int(_is_in(self.hashes, self.banned).sum())
        repeated = len(self.texts) - len(self.hashes)
        return {"repeated": repeated, "in evaluation sets": n_banned, "searched": len(self.rows)}


class Positives:
    """Every query's positives over all records: 16 bytes a pair."""

    def __init__(self, queries: np.ndarray, positives: np.ndarray) -> None:
        """queries, positives: (n,) uint64, hashes of the texts of each pair."""
        order = np.lexsort((positives, queries))
        self.queries, self.positives = queries[order], positives[order]

    def of(self, query: int) -> np.ndarray:
        """Return the hashes of a query's positives, (m,) uint64, rising."""
        first, last = (np.searchsorted(self.queries, np.uint64(query), side) for side in ("left", "right"))
        return np.unique(self.positives[first:last])


class Miner:
    """A corpus with vectors, positives and a config: records in, records with negatives out."""

    def __init__(
        self,
        corpus: Corpus,
        vectors: np.ndarray,
        positives: Positives,
        config: MineConfig,
        device: torch.device,
        *,
        approximate: bool = False,
    ) -> None:
        """vectors: (N, D), one per text of the corpus.  approximate: search by faiss (approximate.py).

        Raises ValueError where the corpus has other sizes, or faiss is missing.
        """
        if len(vectors) != len(corpus.texts):
            raise ValueError(f"the corpus has {len(corpus.texts):,} documents and {len(vectors):,} vectors")
        self.corpus, self.vectors, self.positives, self.config = corpus, vectors, positives, config
        self.device = device
        self.index = ApproximateSearch(vectors, corpus.rows) if approximate else None
        names = ("margin", "relative_margin", "max_score", "min_score")
        used = [name for name in names if asdict(config)[name] is not None] + ["skip"] * (config.skip > 0)
        self.report = Report(documents=corpus.counts(), removed=dict.fromkeys(["positives", *used], 0))

    def mine(self, records: Sequence[Record], queries: np.ndarray, first: int) -> Iterator[dict[str, object]]:
        """Choose negatives for records.

        queries: (n, D), their vectors.  first: place of the first of them in the file, for the random choice.
        Yields the plain fields of each, without those that the evaluation sets have.
        """
        depth = self.config.depth
        if self.index is None:
            scores, rows = nearest(queries, self.vectors, depth, self.device, rows=self.corpus.rows)
        else:
            scores, rows = self.index.nearest(queries, depth)
            if self.report.n_records == 0:
                self.report.recall = self.index.recall(queries[:RECALL_QUERIES], depth, self.device)
        self.report.n_records += len(records)
        for i, record in enumerate(records):
            own = text_hashes([record.query, *record.positives])
            if _is_in(own, self.corpus.banned).any():
                self.report.in_evaluation_sets += 1
                continue
            positives = self.positives.of(int(own[0]))
            positive_rows = self.corpus.find(np.concatenate([own[1:], positives]))  # the record's own lead
            similarity = products(queries, self.vectors, np.full(len(positive_rows), i), positive_rows)
            equal = np.append(positive_rows, self.corpus.find(own[:1]))
            kept = self._kept(scores[i], rows[i], equal, float(similarity.min()))
            chosen = self._chosen(kept, first + i)
            told = [*similarity[: len(record.positives)].tolist(), *scores[i, chosen].tolist()]
            yield self._fields(record, told, rows[i, chosen].tolist())

    def _kept(self, scores: np.ndarray, rows: np.ndarray, equal: np.ndarray, positive: float) -> np.ndarray:
        """Filter one record's documents.  positive: the least score of its positives.  Returns places, rising."""
        config, removed = self.config, self.report.removed
        kept = np.flatnonzero(rows >= 0)
        self.report.looked_at += len(kept)
        passing = {"positives": ~np.isin(rows, equal)}
        if config.margin is not None:
            passing["margin"] = scores + config.margin <= positive
        if config.relative_margin is not None:
            # Not positive * (1 - margin), which for a negative score would lie above it
            passing["relative_margin"] = scores <= positive - abs(positive) * config.relative_margin
        if config.max_score is not None:
            passing["max_score"] = scores <= config.max_score
        if config.min_score is not None:
            passing["min_score"] = scores >= config.min_score
        for name, passes in passing.items():
            left = kept[passes[kept]]
            removed[name] += len(kept) - len(left)
            kept = left
        if config.skip:
            removed["skip"] += min(config.skip, len(kept))
        return kept[config.skip :]

    def _chosen(self, kept: np.ndarray, place: int) -> np.ndarray:
        n = self.config.n_negatives
        if self.config.choice == "top" or len(kept) <= n:
            return kept[:n]
        return np.sort(np.random.default_rng([self.config.seed, place]).choice(kept, n, replace=False))

    def _fields(self, record: Record, scores: list[float], rows: list[int]) -> dict[str, object]:
        report = self.report
        report.written += 1
        report.negatives += len(rows)
        report.fewer_negatives += len(rows) < self.config.n_negatives
        report.no_negatives += not rows
        language = {"lang": record.language} if record.language else {}  # readers refuse a blank one
        return language | {
            "id": record.id,
            "task": record.task,
            "query": record.query,
            "pos": list(record.positives),
            "neg": [self.corpus.texts[row] for row in rows],
            "scores": scores,
            "source": record.source,
            "kind": record.kind,
            "symmetric": record.symmetric,
            "in_batch": record.in_batch,
        }


def _is_in(values: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Return which hashes are among others that may be none."""
    return occur(values, hashes) if len(hashes) else np.zeros(len(values), dtype=bool)
