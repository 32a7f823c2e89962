"""Laws of testsets.py: files are read, named and instructed right; a bad one is named before anything is encoded."""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError
from scoring import DATA, WordEncoder, retrieval, set_of, write_beir, write_lines, write_pairs

from e5core.scores import evaluate
from e5core.testsets import EvalSet, read_bitext, read_classification, read_retrieval, read_sts


def test_a_document_is_title_and_text_and_may_be_empty(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "x", {"a": "a"}, {"q": "q"}, ["q\ta\t1"])
    lines = [{"_id": "a", "title": "T", "text": "x"}, {"_id": "b", "text": "y"}, {"_id": "c", "title": "", "text": ""}]
    write_lines(folder / "corpus.jsonl", lines)
    assert read_retrieval(folder).documents == {"a": "T x", "b": "y", "c": ""}


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
        ("clustering", "a/hwu64-scenarios/", "hwu64-scenarios", "Given a user utterance as query, find the user scen"),
        ("pair-classification", "a/snli-test", "snli-test", "Given a premise, retrieve a hypothesis that is entailed"),
        ("pair-classification", "a/mine", "mine", "Retrieve semantically similar text."),
        ("reranking", "a/mine", "mine", "Given a web search query, retrieve relevant passages that answer the query"),
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
        ({"kind": "clustering", "path": "a/unknown"}, "the clustering unknown needs a task"),
        ({"kind": "rerank", "path": "x"}, "'retrieval', 'sts', .* 'pair-classification' or 'reranking'"),
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


def of_one_file(kind: str, *lines: dict) -> Callable[[Path], EvalSet]:
    return lambda folder: set_of(kind, folder / "x", lines, task="t")


ALIKE, RANKED = {"sentence1": "a", "sentence2": "b", "label": 1}, {"query": "a", "positive": ["b"], "negative": ["c"]}
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
    "one cluster": (of_one_file("clustering", A, A), "test.jsonl: a clustering needs two labels or more, got a"),
    "no folder of pairs": (lambda x: EvalSet(kind="pair-classification", path=str(x / "none")), "none/test.jsonl"),
    "label is no verdict": (
        of_one_file("pair-classification", ALIKE, ALIKE | {"label": 2}),
        r"test.jsonl:2: label must be 1 \(alike\) or 0, got 2",
    ),
    "all alike": (of_one_file("pair-classification", ALIKE, ALIKE), "every label is 1; give pairs of 1"),
    "no candidates": (
        of_one_file("reranking", RANKED, RANKED | {"negative": []}),
        r"test.jsonl:2: negative must be a list of one text or more, got \[\]",
    ),
    "a text for a list": (
        of_one_file("reranking", RANKED | {"positive": "b"}),
        r"test.jsonl:1: positive must be a list",
    ),
    "blank candidate": (of_one_file("reranking", RANKED | {"positive": ["b", ""]}), r"test.jsonl:1: positive is empty"),
    "relevant and not": (
        of_one_file("reranking", RANKED | {"negative": ["c", "b"]}),
        r"test.jsonl:1: a text is both positive and negative: 'b'",
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
