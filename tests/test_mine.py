"""Mining equals its definition and sentence-transformers' for every filter; its file holds records."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from e5core.contamination import text_hashes
from e5core.encode import Encoder
from e5core.mine import main
from e5core.negatives import Corpus, MineConfig, Miner, Positives
from e5core.records import Record, read_records
from e5core.testsets import read_retrieval

XQUAD = Path(__file__).parents[1] / "data/retrieval/xquad-en"
NONE = np.empty(0, dtype=np.uint64)
FILTERS = {
    "none": MineConfig(n_negatives=5, depth=60),
    "margin": MineConfig(n_negatives=5, depth=60, margin=0.05),
    "relative_margin": MineConfig(n_negatives=5, depth=60, relative_margin=0.05),
    "max_score": MineConfig(n_negatives=5, depth=60, max_score=0.6),
    "min_score": MineConfig(n_negatives=5, depth=60, min_score=0.65),
    "skip": MineConfig(n_negatives=5, depth=60, skip=10),
    "all": MineConfig(n_negatives=5, depth=60, margin=0.02, relative_margin=0.08, max_score=0.6, min_score=0.3, skip=3),
}


class Case:
    """Clusters of documents and queries among them, with one to three positives each."""

    def __init__(self, n_queries: int, n_documents: int) -> None:
        rng = np.random.default_rng(0)
        centres = rng.standard_normal((n_documents // 25, 64))
        of = rng.integers(len(centres), size=n_documents)
        self.documents = self.unit(centres[of] + 0.7 * rng.standard_normal((n_documents, 64)))
        sources = rng.choice(n_documents, n_queries, replace=False)
        self.queries = self.unit(self.documents[sources] * 8 + 0.8 * rng.standard_normal((n_queries, 64)))
        extra = [rng.choice(np.flatnonzero(of == of[row]), 2) for row in sources]
        n_extra = rng.choice(3, n_queries, p=(0.7, 0.2, 0.1))
        self.positives = [
            [int(row), *dict.fromkeys(int(j) for j in more[:n] if j != row)]
            for row, more, n in zip(sources, extra, n_extra, strict=True)
        ]
        self.texts = [f"document {i}" for i in range(n_documents)]
        self.records = [
            Record(id=str(i), task="t", query=f"q{i}", positives=tuple(self.texts[row] for row in rows), source="s")
            for i, rows in enumerate(self.positives)
        ]

    @staticmethod
    def unit(x: np.ndarray) -> np.ndarray:
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)

    def miner(self, config: MineConfig) -> Miner:
        pairs = [(record.query, text) for record in self.records for text in record.positives]
        positives = Positives(text_hashes(query for query, _ in pairs), text_hashes(text for _, text in pairs))
        return Miner(Corpus(self.texts, [], NONE), self.documents, positives, config, torch.device("cpu"))

    def mined(self, config: MineConfig) -> tuple[list[list[str]], Miner]:
        miner = self.miner(config)
        return [fields["neg"] for fields in miner.mine(self.records, self.queries, 0)], miner


@pytest.fixture(scope="module")
def case() -> Case:
    return Case(200, 2000)


def definition(case: Case, config: MineConfig) -> tuple[list[list[int]], dict[str, int]]:
    """Every filter by its sentence in MineConfig, on the whole matrix in float64."""
    negatives, removed = [], dict.fromkeys(("positives", "margin", "relative_margin", "max_score", "min_score"), 0)
    matrix = case.queries.astype(np.float64) @ case.documents.astype(np.float64).T
    for scores, own in zip(matrix, case.positives, strict=True):
        positive = min(scores[row] for row in own)
        steps: dict[str, Callable[[int], bool]] = {"positives": lambda row, own=own: row not in own}
        if config.margin is not None:
            steps["margin"] = lambda row, s=scores, p=positive: p - s[row] >= config.margin
        if config.relative_margin is not None:
            steps["relative_margin"] = lambda row, s=scores, p=positive: s[row] <= p - config.relative_margin * abs(p)
        if config.max_score is not None:
            steps["max_score"] = lambda row, s=scores: s[row] <= config.max_score
        if config.min_score is not None:
            steps["min_score"] = lambda row, s=scores: s[row] >= config.min_score
        left = [int(row) for row in np.argsort(-scores)[: config.depth]]
        for name, passes in steps.items():
            kept = [row for row in left if passes(row)]
            removed[name] += len(left) - len(kept)
            left = kept
        negatives.append(left[config.skip :][: config.n_negatives])
    return negatives, removed


@pytest.mark.parametrize("name", FILTERS)
def test_negatives_and_the_report_are_those_of_the_definition(case: Case, name: str) -> None:
    config = FILTERS[name]
    expected, removed = definition(case, config)
    mined, miner = case.mined(config)
    assert mined == [[case.texts[row] for row in rows] for rows in expected]
    report, counts = miner.report, list(map(len, expected))
    assert {key: value for key, value in report.removed.items() if key != "skip"} == {
        key: value for key, value in removed.items() if key in report.removed
    }
    assert report.looked_at == 200 * config.depth and report.negatives == sum(counts)
    assert report.fewer_negatives == sum(n < 5 for n in counts) and report.no_negatives == counts.count(0)
    bites = [key for key in report.removed if key != "skip"]
    assert all(report.removed[key] > 20 for key in bites), f"a filter is idle: {report.removed}"
    share = f"{report.removed['positives'] / report.looked_at:.1%}"
    assert any(line.startswith("positives removed ") and share in line for line in report.lines())


def peer_negatives(case: Case, config: MineConfig) -> dict[str, list[str]]:
    """Mine by sentence-transformers, in float64, from the same vectors."""
    pytest.importorskip("datasets", reason="sentence-transformers' mining needs: pip install datasets")
    peer = pytest.importorskip("sentence_transformers")
    from_text = dict(zip(case.texts, case.documents.astype(np.float64), strict=True))
    from_text |= {record.query: row.astype(np.float64) for record, row in zip(case.records, case.queries, strict=True)}

    class Given(peer.SentenceTransformer):
        def encode_query(self, texts: Sequence[str], **options: object) -> np.ndarray:
            return np.stack([from_text[text] for text in texts])

        encode_document = encode_query

    normalize = pytest.importorskip("sentence_transformers.models").Normalize()
    pairs = [(record.query, text) for record in case.records for text in record.positives]
    columns = {"query": [query for query, _ in pairs], "positive": [text for _, text in pairs]}
    with pytest.MonkeyPatch.context() as patch:  # its name for caches pickles, which not every pyarrow lets it
        patch.setattr("datasets.arrow_dataset.generate_fingerprint", lambda *_: "none")
        mined = pytest.importorskip("sentence_transformers.util").mine_hard_negatives(
            pytest.importorskip("datasets").Dataset.from_dict(columns),
            Given(modules=[normalize], similarity_fn_name="dot", device="cpu"),
            corpus=case.texts,
            range_min=config.skip,
            range_max=config.depth - max(map(len, case.positives)),  # it looks at that many more
            max_score=config.max_score,
            min_score=config.min_score,
            absolute_margin=config.margin,
            relative_margin=config.relative_margin,
            num_negatives=config.n_negatives,
            output_format="labeled-list",
            verbose=False,
        )
    texts, labels = mined["positive"], mined["labels"]
    assert all(label == [1] + [0] * (len(label) - 1) for label in labels)
    return {query: text[1:] for query, text in zip(mined["query"], texts, strict=True)}


@pytest.mark.parametrize("name", FILTERS)
def test_negatives_are_those_of_sentence_transformers(case: Case, name: str) -> None:
    assert_as_sentence_transformers(case, FILTERS[name])


@pytest.mark.slow
def test_negatives_are_those_of_sentence_transformers_at_ten_times_the_size() -> None:
    case = Case(2000, 20_000)
    for config in FILTERS.values():
        assert_as_sentence_transformers(case, config)


def assert_as_sentence_transformers(case: Case, config: MineConfig) -> None:
    expected = peer_negatives(case, config)  # without the queries that got none
    mined, _ = case.mined(config)
    found = {record.query: texts for record, texts in zip(case.records, mined, strict=True) if texts}
    assert len(found) > len(case.records) / 3 and found == expected


def test_a_random_choice_is_of_what_is_left_and_a_function_of_seed_and_place(case: Case) -> None:
    config = replace(FILTERS["all"], choice="random", depth=20, skip=4)  # so at most 15 are left
    whole, _ = case.mined(config)
    left, _ = case.mined(replace(config, n_negatives=15, choice="top"))
    for texts, everything in zip(whole, left, strict=True):
        places = [everything.index(text) for text in texts]
        assert places == sorted(set(places)) and len(texts) == min(5, len(everything))
    parts = [
        fields["neg"]
        for first, last in ((0, 1), (1, 90), (90, 200))
        for fields in case.miner(config).mine(case.records[first:last], case.queries[first:last], first)
    ]
    assert parts == whole
    assert case.mined(replace(config, seed=1))[0] != whole != case.mined(replace(config, choice="top"))[0]


DOCUMENTS = ["Paris is in France.", "paris  is in FRANCE.", "Rome", "Lyon is in France.", "", "Lyon is in France.",
             "where is paris", "Berlin"]  # fmt: skip


def write_lines(path: Path, rows: Sequence[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A command line with vectors: every document is near the queries, so only texts decide."""
    corpus = write_lines(tmp_path / "c.jsonl", [{"text": text} for text in DOCUMENTS])
    records = [
        {"task": "t", "query": "Where is Paris", "pos": "Paris is in France.", "neg": "old", "id": "one"},
        {"task": "t", "query": "Where is Rome", "pos": ["Rome", "Berlin"], "lang": "en", "in_batch": False},
        {"task": "u", "query": "where is paris", "pos": ["Lyon is in France."], "source": "here"},
    ]
    queries = write_lines(tmp_path / "q.jsonl", records)
    np.save(tmp_path / "c.npy", Case.unit(np.random.default_rng(2).random((len(DOCUMENTS), 4)) + 1))
    np.save(tmp_path / "q.npy", Case.unit(np.ones((3, 4))))
    vectors = ["--corpus-vectors", str(tmp_path / "c.npy"), "--query-vectors", str(tmp_path / "q.npy")]
    return ["--corpus", corpus, "--queries", queries, "--out", str(tmp_path / "mined.jsonl"), *vectors]


def test_positives_of_the_query_anywhere_and_equal_texts_are_never_negatives(tmp_path: Path, files: list[str]) -> None:
    assert main(files) == 0
    records, _ = read_records([tmp_path / "mined.jsonl"])
    one, two, three = records
    # Two records have one query: neither takes the other's positive; nor the query itself, repeats, or the blank text.
    assert set(one.negatives) == {"Rome", "Berlin"} == set(three.negatives)
    assert set(two.negatives) == {"Paris is in France.", "Lyon is in France.", "where is paris"}
    assert (one.id, two.language, two.in_batch, three.source, three.task) == ("one", "en", False, "here", "u")
    vectors, query = np.load(tmp_path / "c.npy").astype(np.float64), np.full(4, 0.5)
    for record in records:
        texts = [*record.positives, *record.negatives]
        wanted = [vectors[DOCUMENTS.index(text)] @ query for text in texts]
        assert record.is_scored and np.allclose(record.scores, wanted, atol=1e-7)
        found = list(record.scores[len(record.positives) :])
        assert found == sorted(found, reverse=True)
    assert max(len(record.positives) for record in records) == 2
    report = json.loads((tmp_path / "mined.report.json").read_text())
    assert report["documents"] == {"repeated": 2, "in evaluation sets": 0, "searched": 5}
    assert report["removed"] == {"positives": 3 + 2 + 3} and report["fewer_negatives"] == 3


def test_texts_of_evaluation_sets_are_no_negatives_and_their_records_are_left_out(
    tmp_path: Path, files: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set/queries.jsonl", [{"_id": "1", "text": "WHERE is rome"}])
    write_lines(tmp_path / "set/corpus.jsonl", [{"_id": "1", "title": "", "text": "berlin"}])
    assert main([*files, "--against", str(tmp_path / "set")]) == 0
    records, _ = read_records([tmp_path / "mined.jsonl"])
    assert [record.query for record in records] == ["Where is Paris", "where is paris"]
    assert [record.negatives for record in records] == [("Rome",), ("Rome",)]
    said = capfd.readouterr().err
    assert "1 records were left out" in said and "1 in evaluation sets" in said


def test_input_that_does_not_fit_is_named_and_leaves_the_old_file(
    tmp_path: Path, files: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mined.jsonl").write_text("old")
    np.save(tmp_path / "short.npy", np.ones((2, 4), dtype=np.float32))
    np.save(tmp_path / "nan.npy", np.full((8, 4), np.nan, dtype=np.float32))
    lacking = write_lines(tmp_path / "lacking.jsonl", [{"task": "t", "query": "q", "pos": "Oslo"}] * 3)
    broken = write_lines(tmp_path / "broken.jsonl", [{"task": "t", "query": "q", "pos": "Rome"}, {"query": "q"}])
    for changed, message in (
        (["--query-vectors", str(tmp_path / "short.npy")], "a row of floats for each of 3 records: got float32 of"),
        (["--corpus-vectors", str(tmp_path / "nan.npy")], "the vector of document 0 is not finite"),
        (["--queries", lacking], "1 positives are not in the corpus, so they have no vector"),
        (["--queries", broken], "broken.jsonl:2: missing field pos"),
        (["--n", "16"], "a record takes 1 to 15 negatives: got n_negatives 16"),
        (["--skip", "95"], "here at least 103: got skip 95, depth 100"),
        (["--margin", "nan"], "margin must be a finite number: got nan"),
        (["--out", str(tmp_path / "no/m.jsonl")], "no such folder for --out"),
    ):
        assert main([*files, *changed]) == 2
        assert message in capfd.readouterr().err
    assert (tmp_path / "mined.jsonl").read_text() == "old"
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name or "report" in path.name]
    with pytest.raises(SystemExit):
        main(files[:-2])  # neither a model nor the queries' vectors


def test_a_real_model_mines_real_questions(tmp_path: Path, smollm2_file: Path) -> None:
    xquad = read_retrieval(XQUAD)
    names = list(xquad.documents)[:8]
    texts = [xquad.documents[name][:60].strip() for name in names]
    asked = [(q, next(iter(judged))) for q, judged in xquad.judgements.items() if set(judged) <= set(names)][::5][:6]
    corpus = write_lines(tmp_path / "c.jsonl", [{"title": "", "text": text} for text in texts[:-1]])
    rows = [
        {"task": "Find it.", "query": xquad.queries[query], "pos": texts[names.index(name)]} for query, name in asked
    ]
    rows.append({"task": "", "query": "Where is Warsaw?", "pos": texts[-1]})  # which the corpus lacks
    queries, out = write_lines(tmp_path / "q.jsonl", rows), tmp_path / "mined.jsonl"
    options = ["--corpus", corpus, "--queries", queries, "--out", str(out), "--n", "2", "--relative-margin", "0.01"]
    assert main([str(smollm2_file), *options, "--max-tokens", "64", "--dtype", "float32"]) == 0
    records, _ = read_records([out])
    assert [record.query for record in records] == [row["query"] for row in rows]
    encoder = Encoder.load(str(smollm2_file), max_tokens=64, dtype="float32")
    documents = encoder.encode(texts)
    for record in records:
        scores = documents @ encoder.encode([record.query], record.task or None)[0]
        positive = scores[texts.index(record.positives[0])]
        expected = [i for i in np.argsort(-scores) if scores[i] <= 0.99 * positive and texts[i] != record.positives[0]]
        assert record.negatives == tuple(texts[i] for i in expected[:2])
        assert np.allclose(record.scores, [positive, *scores[expected[:2]]], atol=1e-5)
    assert sum(len(record.negatives) for record in records) > 6
