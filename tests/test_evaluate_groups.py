"""Laws of scores.py: clustering, pair classification and reranking against their definitions."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from scoring import DATA, TableEncoder, WordEncoder, set_of

from e5core.scores import evaluate
from e5core.testsets import EvalSet, read_bitext, read_classification, read_retrieval


def clustering(folder: Path, labels_of: dict[str, str], **fields: str) -> EvalSet:
    return set_of("clustering", folder, [{"text": text, "label": label} for text, label in labels_of.items()], **fields)


def test_v_measure_of_clusters_known_by_hand(tmp_path: Path) -> None:
    # Two far groups of four: one holds a, a, a, b, the other b, b, b, b.
    labels_of = {"n0": "a", "n1": "a", "n2": "a", "n3": "b"} | {f"s{i}": "b" for i in range(4)}
    vectors = {text: (math.cos(int(text[1]) / 100), math.sin(int(text[1]) / 100)) for text in labels_of}
    vectors |= {text: (-x, -y) for text, (x, y) in vectors.items() if text.startswith("s")}
    eval_set = clustering(tmp_path / "toy", labels_of, task="Find the group.")

    def entropy(*counts: int) -> float:
        return -sum(n / sum(counts) * math.log(n / sum(counts)) for n in counts)

    together = entropy(3, 1) / 2  # of labels within a cluster, over both; then of clusters within a label
    homogeneity = 1 - together / entropy(3, 5)
    completeness = 1 - entropy(1, 4) * 5 / 8 / entropy(4, 4)
    expected = 2 * homogeneity * completeness / (homogeneity + completeness)
    assert evaluate(TableEncoder(vectors), [eval_set]) == pytest.approx({"toy/v_measure": 100 * expected})
    collapsed = TableEncoder(dict.fromkeys(labels_of, (1.0, 0.0)))
    assert evaluate(collapsed, [eval_set]) == pytest.approx({"toy/v_measure": 0.0})


def test_clustering_of_real_text_is_above_chance_and_the_same_again(tmp_path: Path) -> None:
    read = read_classification(DATA / "classification" / "banking77")
    eval_set = clustering(tmp_path / "banking77", dict(zip(read.test_texts, read.test_labels, strict=True)))
    encoder = WordEncoder(dim=512)
    scores = evaluate(encoder, [eval_set])
    assert 50 < scores["banking77/v_measure"] < 90
    assert encoder.calls[0][1:] == ("Given a online banking query, find the corresponding intents", True)
    assert evaluate(WordEncoder(dim=512), [eval_set]) == scores


def pairs(folder: Path, rows: Sequence[tuple[str, str, int]]) -> EvalSet:
    lines = [{"sentence1": first, "sentence2": second, "label": label} for first, second, label in rows]
    return set_of("pair-classification", folder, lines)


def test_average_precision_of_pairs_known_by_hand(tmp_path: Path) -> None:
    # By falling cosine: 1, 0, then 1 and 0 at one cosine, whose precision is that of both; the file has another order.
    rows = [("o", "far", 0), ("o", "near", 1), ("o", "far ", 1), ("o", "middle", 0), ("o", "opposite", 0)]
    angles = {"o": 0.0, "near": 0.1, "middle": 0.2, "far": 0.3, "far ": 0.3, "opposite": 3.0}
    vectors = {text: (math.cos(angle), math.sin(angle)) for text, angle in angles.items()}
    scores = evaluate(TableEncoder(vectors), [pairs(tmp_path / "by-hand", rows)])
    assert scores == pytest.approx({"by-hand/ap": 100 * (1 / 1 + 2 / 4) / 2})


def test_pairs_of_one_translation_are_told_from_others_with_the_instruction_on_both_sides(tmp_path: Path) -> None:
    read = read_bitext(DATA / "bitext" / "tatoeba" / "deu-eng.jsonl")
    rows = [(x, y, 1) for x, y in zip(read.first, read.second, strict=True)]
    rows += [(x, y, 0) for x, y in zip(read.first, read.second[1:], strict=False)]
    encoder = WordEncoder(pattern=r"(?=(\w\w\w))")
    scores = evaluate(encoder, [pairs(tmp_path / "translated", rows)])
    assert 55 < scores["translated/ap"] < 95
    [(texts, task, normalize)] = encoder.calls
    assert (task, normalize) == ("Retrieve semantically similar text.", True)
    assert {*read.first, *read.second} == {*texts}


def test_map_and_mrr_of_places_known_by_hand(tmp_path: Path) -> None:
    angles = {"q": 0.0, "r": 0.35, "a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4, "e": 0.1}
    vectors = {text: (math.cos(angle), math.sin(angle)) for text, angle in angles.items()}
    lines = [
        {"query": "q", "positive": ["b", "d"], "negative": ["c", "a"]},  # places 2 and 4
        {"query": "r", "positive": ["c"], "negative": ["d", "e"]},  # of two equally near the negative comes first
        {"query": "q", "positive": ["e", "b"], "negative": ["a"]},  # so here: places 2 and 3
    ]
    eval_set = set_of("reranking", tmp_path / "toy", lines)
    scores = evaluate(TableEncoder(vectors | {"d": vectors["c"]}), [eval_set])
    # c and d are equal now: the first query's places are 2 and 4 still, the second's is 2.
    expected = [(1 / 2 + 2 / 4) / 2, 1 / 2, (1 / 2 + 2 / 3) / 2]
    assert scores == pytest.approx({"toy/map": 100 * np.mean(expected), "toy/mrr": 100 * 1 / 2})


def test_reranking_of_real_text_equals_trec_eval_and_only_queries_are_instructed(tmp_path: Path) -> None:
    read = read_retrieval(DATA / "retrieval" / "scifact-small")
    names = sorted(read.documents)
    lines, judged = [], {}
    for place, (query, judgements) in enumerate(list(read.judgements.items())[:60]):
        ids = [name for name in names[place : place + 20] if name not in judgements]
        lines.append({"query": read.queries[query], "positive": [read.documents[name] for name in judgements]})
        lines[-1]["negative"] = [read.documents[name] for name in ids]
        judged[query] = judgements | dict.fromkeys(ids, 0)
    encoder = WordEncoder()
    scores = evaluate(encoder, [set_of("reranking", tmp_path / "reranked", lines)])
    task = "Given a web search query, retrieve relevant passages that answer the query"
    assert [(given, unit) for _, given, unit in encoder.calls] == [(task, True), (None, True)]
    run, vectors = {}, dict(zip(names, encoder.encode([read.documents[x] for x in names]).astype(float), strict=True))
    for query, candidates in judged.items():
        [vector] = encoder.encode([read.queries[query]])
        similarities = [vectors[name] @ vector for name in candidates]
        run[query] = dict(zip(candidates, map(float, similarities), strict=True))
    results = pytrec_eval.RelevanceEvaluator(judged, {"map", "recip_rank"}).evaluate(run).values()
    expected = {"map": np.mean([x["map"] for x in results]), "mrr": np.mean([x["recip_rank"] for x in results])}
    assert scores == pytest.approx({f"reranked/{name}": 100 * value for name, value in expected.items()}, abs=1e-9)
    assert 50 < scores["reranked/map"] < 99
