"""Scores of an embedder on test sets, as percentages.

    retrieval       nDCG@10 and recall@100 by pytrec_eval, from the exact 100 nearest documents; instruction on queries
    sts             Spearman of cosine and human score, by scipy; instruction on both sides
    bitext          for each foreign sentence the nearest English one: accuracy and F1; instruction on both sides
    classification  logistic regression on 16 texts per label, mean accuracy of 10 draws; instruction on every text, and
                    vectors of the length that they have
    clustering      V-measure of mini-batch k-means against the labels, as MTEB runs it; instruction on every text
    pair-classification  average precision of cosine (MTEB's cosine_ap); instruction on both sides
    reranking       MAP and MRR of each query's own candidates; instruction on queries

The protocol is that of arXiv 2401.00368 section 4.2 and its published script; testsets.py reads the files.
"""

import random
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import pytrec_eval
from rich.console import Console
from rich.table import Column, Table
from scipy.stats import spearmanr
from sklearn.cluster import MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, v_measure_score

from e5core.testsets import Classification, Clustering, EvalSet, Pairs, Reranking, Retrieval, Texts, read_sets

N_NEAREST = 100
N_SHOTS = 16
N_DRAWS = 10
BLOCK_ENTRIES = 2**24  # similarities held at once: 64 MiB of float32


class TextEncoder(Protocol):
    """What can be evaluated."""

    def encode(self, texts: Sequence[str], task: str | None = None, normalize: bool = True) -> np.ndarray:
        """Embed texts with an instruction, or without for None. Returns (N, D) float32, unit rows if normalize."""
        ...


def evaluate(encoder: TextEncoder, sets: Sequence[EvalSet]) -> dict[str, float]:
    """Score an encoder on test sets; all files are read and checked before the first text is encoded.

    Returns {"NAME/METRIC": percentage}, not rounded, with the metrics that testsets.METRICS names for each kind.
    Raises ValueError on no set, two sets of one name, a broken line (FILE:LINE); FileNotFoundError on a missing file;
    FloatingPointError where a vector is not finite, naming set and text.
    """
    scores: dict[str, float] = {}
    for eval_set, texts in read_sets(sets):
        scores |= score_set(encoder, eval_set, texts)
    return scores


def score_set(encoder: TextEncoder, eval_set: EvalSet, texts: Texts) -> dict[str, float]:
    """Score an encoder on one set that read_sets has read. Returns and raises as evaluate does."""
    match texts:
        case Retrieval():
            scores = _score_retrieval(encoder, eval_set, texts)
        case Pairs() if eval_set.kind == "sts":
            scores = _score_sts(encoder, eval_set, texts)
        case Pairs() if eval_set.kind == "bitext":
            scores = _score_bitext(encoder, eval_set, texts)
        case Pairs():
            scores = _score_pair_classification(encoder, eval_set, texts)
        case Classification():
            scores = _score_classification(encoder, eval_set, texts)
        case Clustering():
            scores = _score_clustering(encoder, eval_set, texts)
        case Reranking():
            scores = _score_reranking(encoder, eval_set, texts)
    return {f"{eval_set.name}/{metric}": 100.0 * score for metric, score in scores.items()}


def _score_retrieval(encoder: TextEncoder, eval_set: EvalSet, texts: Retrieval) -> dict[str, float]:
    query_ids = _chosen(texts.queries, eval_set.max_queries)
    # Equal similarities are ranked by falling document id, which is trec_eval's rule.
    document_ids = sorted(texts.documents, reverse=True)
    queries = {f"query {name}": texts.queries[name] for name in query_ids}
    documents = {f"document {name}": texts.documents[name] for name in document_ids}
    query_vectors = _embed(encoder, eval_set.name, queries, eval_set.instruction)
    document_vectors = _embed(encoder, eval_set.name, documents, "")
    run: dict[str, dict[str, float]] = {}
    ranking = nearest_rows(query_vectors, document_vectors, N_NEAREST + 1)
    for query, rows in zip(query_ids, ranking, strict=True):
        found = [document_ids[row] for row in rows if document_ids[row] != query][:N_NEAREST]
        run[query] = {document: float(len(found) - place) for place, document in enumerate(found)}
    judgements = {query: texts.judgements[query] for query in query_ids}
    results = pytrec_eval.RelevanceEvaluator(judgements, {"ndcg_cut.10", "recall.100"}).evaluate(run)
    return {
        "ndcg@10": float(np.mean([results[query]["ndcg_cut_10"] for query in query_ids])),
        "recall@100": float(np.mean([results[query]["recall_100"] for query in query_ids])),
    }


def _score_sts(encoder: TextEncoder, eval_set: EvalSet, texts: Pairs) -> dict[str, float]:
    cosines = _cosines(encoder, eval_set, texts)
    if np.ptp(cosines) == 0.0:  # an encoder that has collapsed orders nothing, and Spearman is not defined
        return {"spearman": 0.0}
    return {"spearman": float(spearmanr(cosines, texts.scores).statistic)}


def _score_bitext(encoder: TextEncoder, eval_set: EvalSet, texts: Pairs) -> dict[str, float]:
    """Each English sentence is a label: F1 is the mean over labels, as in MTEB's BitextMining."""
    foreign, english = _embed_pairs(encoder, eval_set, texts)
    found = [int(rows[0]) for rows in nearest_rows(foreign, english, 1)]
    n_found = Counter(found)
    right = [row for row, best in enumerate(found) if row == best]
    # One sentence has the label, n_found[row] are given it: precision 1 / n_found, recall 1.
    f1 = sum(2.0 / (1 + n_found[row]) for row in right)
    return {"accuracy": len(right) / len(found), "f1": f1 / len(found)}


def _score_classification(encoder: TextEncoder, eval_set: EvalSet, texts: Classification) -> dict[str, float]:
    draws = _draws(texts.train_labels)
    rows = sorted({row for draw in draws for row in draw})
    train = {f"train text {row}": texts.train_texts[row] for row in rows}
    test = {f"test text {row}": text for row, text in enumerate(texts.test_texts)}
    vectors = _embed(encoder, eval_set.name, train | test, eval_set.instruction, normalize=False)
    test_vectors, test_labels = vectors[len(rows) :], np.array(texts.test_labels)
    accuracies: list[float] = []
    for draw in draws:
        labels = [texts.train_labels[row] for row in draw]
        with warnings.catch_warnings():  # 100 iterations are the protocol, converged or not
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(max_iter=100).fit(vectors[np.searchsorted(rows, draw)], labels)
        accuracies.append(float(np.mean(model.predict(test_vectors) == test_labels)))
    return {"accuracy": float(np.mean(accuracies))}


def _score_clustering(encoder: TextEncoder, eval_set: EvalSet, texts: Clustering) -> dict[str, float]:
    """As MTEB's clustering evaluator: as many clusters as labels, batches of 500 rows in the file's order, seed 42.

    V-measure is the harmonic mean of homogeneity (a cluster holds one label) and completeness (a label is in one
    cluster); k-means depends on its seed and on the order of the rows, so both are fixed.
    """
    named = {f"text {row}": text for row, text in enumerate(texts.texts)}
    vectors = _embed(encoder, eval_set.name, named, eval_set.instruction)
    k_means = MiniBatchKMeans(n_clusters=len(set(texts.labels)), batch_size=500, n_init="auto", random_state=42)
    with warnings.catch_warnings():  # an encoder that has collapsed makes fewer distinct vectors than labels
        warnings.simplefilter("ignore", ConvergenceWarning)
        clusters = k_means.fit_predict(vectors)
    return {"v_measure": float(v_measure_score(texts.labels, clusters))}


def _score_pair_classification(encoder: TextEncoder, eval_set: EvalSet, texts: Pairs) -> dict[str, float]:
    """Unit vectors have one order by cosine, dot and Euclidean distance, so MTEB's ap by each is this to rounding."""
    return {"ap": float(average_precision_score(texts.scores, _cosines(encoder, eval_set, texts)))}


def _score_reranking(encoder: TextEncoder, eval_set: EvalSet, texts: Reranking) -> dict[str, float]:
    """Of equal similarities negatives come first, as in MTEB, so that a collapsed encoder gains nothing."""
    queries = {f"query {row}": text for row, text in enumerate(texts.queries)}
    candidates = [[*p, *n] for p, n in zip(texts.positives, texts.negatives, strict=True)]
    documents = {f"candidate {i} of query {row}": x for row, own in enumerate(candidates) for i, x in enumerate(own)}
    query_vectors = _embed(encoder, eval_set.name, queries, eval_set.instruction)
    document_vectors = _embed(encoder, eval_set.name, documents, "")
    ends = np.cumsum([len(own) for own in candidates])
    precisions: list[float] = []
    reciprocals: list[float] = []
    for query, end, own, positives in zip(query_vectors, ends, candidates, texts.positives, strict=True):
        similarities = np.sum(document_vectors[end - len(own) : end] * query.astype(np.float64), axis=1)
        relevant = np.arange(len(own)) < len(positives)
        places = np.flatnonzero(relevant[np.lexsort((relevant, -similarities))]) + 1
        precisions.append(float(np.mean(np.arange(1, len(places) + 1) / places)))
        reciprocals.append(1.0 / float(places[0]))
    return {"map": float(np.mean(precisions)), "mrr": float(np.mean(reciprocals))}


def nearest_rows(
    queries: np.ndarray, documents: np.ndarray, k: int, block_entries: int = BLOCK_ENTRIES
) -> Iterator[np.ndarray]:
    """Yield for every query the rows of its k nearest documents, best first; of equal ones the lower row first.

    queries: (Q, D) float32, unit rows.  documents: (P, D) float32, unit rows.
    Yields Q arrays (min(k, P),) int64. At most block_entries similarities are held, and they never change the answer.
    """
    n_documents = len(documents)
    k = min(k, n_documents)
    n_rows = max(1, block_entries // n_documents)
    for first in range(0, len(queries), n_rows):
        block = queries[first : first + n_rows]
        similarities = block @ documents.T  # (rows, P)
        for query, row in zip(block, similarities, strict=True):
            kth = np.partition(row, n_documents - k)[n_documents - k]
            # A GEMM rounds the same product differently at the edge of a block, so what lies within its error of the
            # k-th is put in order by float64.
            candidates = np.flatnonzero(row >= kth - 1e-5)
            exact = np.sum(documents[candidates] * query.astype(np.float64), axis=1)
            yield candidates[np.argsort(-exact, kind="stable")[:k]]


def _embed(
    encoder: TextEncoder, name: str, texts: Mapping[str, str], instruction: str, normalize: bool = True
) -> np.ndarray:
    """Embed {place: text}, each distinct text once. Returns (N, D) float32 in the order of texts."""
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts.values()))}
    try:
        vectors = encoder.encode(list(rows), task=instruction or None, normalize=normalize)
    except FloatingPointError as error:
        raise FloatingPointError(f"{name}: {error}") from error
    if vectors.ndim != 2 or len(vectors) != len(rows):
        raise ValueError(
            f"{name}: an encoder must return ({len(rows)}, dim) for {len(rows)} texts, got {vectors.shape}"
        )
    finite = np.isfinite(vectors).all(axis=1)
    for place, text in texts.items():
        if not finite[rows[text]]:
            raise FloatingPointError(f"{name}: the embedding of {place} is not finite ({text[:60]!r})")
    return vectors[[rows[text] for text in texts.values()]]


def _embed_pairs(encoder: TextEncoder, eval_set: EvalSet, texts: Pairs) -> tuple[np.ndarray, np.ndarray]:
    first = {f"sentence1 of pair {row}": text for row, text in enumerate(texts.first)}
    second = {f"sentence2 of pair {row}": text for row, text in enumerate(texts.second)}
    vectors = _embed(encoder, eval_set.name, first | second, eval_set.instruction)
    return vectors[: len(first)], vectors[len(first) :]


def _cosines(encoder: TextEncoder, eval_set: EvalSet, texts: Pairs) -> np.ndarray:
    """The cosine of every pair, (N,) float64."""
    first, second = _embed_pairs(encoder, eval_set, texts)
    return np.sum(first * second, axis=1, dtype=np.float64)


def _chosen(queries: Mapping[str, str], max_queries: int | None) -> list[str]:
    """The first max_queries of a shuffle that depends on the ids only, so that a smaller number takes a part of it."""
    names = sorted(queries)
    random.Random(0).shuffle(names)
    return names[:max_queries]


def _draws(labels: Sequence[str]) -> list[list[int]]:
    """Rows of 16 texts per label, or of all where there are fewer, for each draw."""
    rows_of: dict[str, list[int]] = {label: [] for label in sorted(set(labels))}
    for row, label in enumerate(labels):
        rows_of[label].append(row)
    # Where no label has more than 16 rows every draw is the same.
    n_draws = N_DRAWS if max(map(len, rows_of.values())) > N_SHOTS else 1
    draws: list[list[int]] = []
    for seed in range(n_draws):
        generator = random.Random(seed)
        drawn = [generator.sample(rows, min(N_SHOTS, len(rows))) for rows in rows_of.values()]
        draws.append(sorted(row for rows in drawn for row in rows))
    return draws


def show_table(columns: Mapping[str, Mapping[str, float]]) -> None:
    """Show {column: {"NAME/METRIC": percentage}} on stdout: a table on a terminal, else a plain line per score."""
    names = list(dict.fromkeys(name for scores in columns.values() for name in scores))
    cells = {name: [f"{scores[name]:.2f}" if name in scores else "-" for scores in columns.values()] for name in names}
    console = Console()
    if console.is_terminal:
        table = Table("set", "metric", *(Column(column, justify="right") for column in columns))
        for name in names:
            table.add_row(*name.rsplit("/", 1), *cells[name])
        console.print(table)
        return
    for name in names:
        values = "  ".join(f"{column} {cell}" for column, cell in zip(columns, cells[name], strict=True))
        console.out(f"{name}  {values}", highlight=False)
