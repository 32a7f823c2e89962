"""Every layout that the field has on disk gives the same records: one set of real triples is written in each."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest
from scoring import ROOT

from e5core import formats
from e5core.archives import open_file
from e5core.formats import FORMATS
from e5core.joined import LAYOUTS, Corpus
from e5core.records import BrokenRecord, Record, read_records
from e5core.sources import FormatName, Notes, Source, format_of, is_growing, read_source
from e5core.testsets import read_retrieval

TRIPLES = [
    (record.query, record.positives[0], record.negatives[0])
    for record in read_records([ROOT / "data/synthetic/en_sts.jsonl"])[0][:40]
]
QUERIES, POSITIVES, NEGATIVES = zip(*TRIPLES, strict=True)


def read(tmp_path: Path, source: Source, *, skip_broken: bool = False) -> tuple[list[Record], Notes]:
    spool, notes = tmp_path / ".spool", Notes(skip_broken=skip_broken)
    spool.mkdir(exist_ok=True)
    return list(read_source(source, spool, notes)), notes


def triples(records: list[Record]) -> list[tuple[str, str, str]]:
    assert all(len(record.positives) == len(record.negatives) == 1 for record in records)
    return [(record.query, record.positives[0], record.negatives[0]) for record in records]


def lines(rows: list[object]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def table(rows: list[tuple[str, ...]], header: tuple[str, ...]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    return text.getvalue().encode()


def passage(text: str) -> dict[str, str]:
    """A text as title and text."""
    title, _, rest = text.partition(" ")
    return {"docid": "7", "title": title, "text": rest}


FILES: dict[str, tuple[str, str, bytes]] = {  # layout: format, file name, content
    "records": ("records", "x.jsonl", lines([{"query": q, "pos": [p], "neg": n} for q, p, n in TRIPLES])),
    "flagembedding": (
        "flagembedding", "x.jsonl", lines([
            {"query": q, "pos": [p], "neg": [n], "pos_scores": [0.9], "neg_scores": [0.1], "prompt": "Find it.",
             "type": "normal"} for q, p, n in TRIPLES
        ])),
    "tevatron passages": (
        "tevatron", "x.jsonl", lines([
            {"query_id": f"id{i}", "query": q, "positive_passages": [passage(p)], "negative_passages": [passage(n)]}
            for i, (q, p, n) in enumerate(TRIPLES)
        ])),
    "tevatron texts": (
        "tevatron", "x.jsonl", lines([{"query": q, "positives": [p], "negatives": [n]} for q, p, n in TRIPLES])),
    "e5": ("e5", "x.jsonl", lines([{"query": q, "positive": p, "negative": n} for q, p, n in TRIPLES])),
    "triplets by name": (
        "triplets", "x.jsonl", lines([{"negative_1": n, "anchor": q, "positive": p} for q, p, n in TRIPLES])),
    "triplets in lists": ("triplets", "x.jsonl", lines([list(row) for row in TRIPLES])),
    "triplets in csv": ("triplets", "x.csv", table(TRIPLES, ("sentence", "paraphrase", "contradiction"))),
    "triples-tsv": ("triples-tsv", "x.tsv", "".join("\t".join(row) + "\r\n" for row in TRIPLES).encode()),
    "dpr": (
        "dpr", "x.json", json.dumps([
            {"dataset": "nq", "question": q, "answers": ["{[,"], "positive_ctxs": [passage(p)],
             "negative_ctxs": [], "hard_negative_ctxs": [passage(n)]} for q, p, n in TRIPLES
        ], indent=4).encode()),
}  # fmt: skip


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("layout", FILES)
def test_a_file_in_any_layout_is_recognised_and_gives_the_same_triples(
    layout: str, compressed: bool, tmp_path: Path
) -> None:
    name, file, content = FILES[layout]
    path = tmp_path / (file + ".gz" * compressed)
    path.write_bytes(gzip.compress(content) if compressed else content)
    source = Source(path=str(path))
    records, notes = read(tmp_path, source)
    assert format_of(source) == name and triples(records) == TRIPLES
    assert notes.skipped == [] and notes.n_without_positive == 0
    assert {record.source for record in records} == {path.name.removesuffix(".gz").removesuffix(".jsonl")}
    if layout == "flagembedding":
        assert {(record.task, record.scores) for record in records} == {("Find it.", (0.9, 0.1))}
    if layout == "tevatron passages":
        assert [record.id for record in records[:2]] == ["id0", "id1"]


def test_the_config_names_every_format_and_no_other() -> None:
    assert set(get_args(FormatName)) == {"auto", *FORMATS, *LAYOUTS}


def write_beir(folder: Path) -> None:
    (folder / "qrels").mkdir(parents=True)
    documents = [(f"p {i}", p) for i, p in enumerate(POSITIVES)] + [(f"n {i}", n) for i, n in enumerate(NEGATIVES)]
    (folder / "corpus.jsonl").write_bytes(
        lines([{"_id": i, **{k: v for k, v in passage(t).items() if k != "docid"}} for i, t in documents])
    )
    (folder / "queries.jsonl").write_bytes(lines([{"_id": f"q {i}", "text": q} for i, q in enumerate(QUERIES)]))
    rows = [f"q {i}\tp {i}\t1\nq {i}\tn {i}\t0" for i in range(len(TRIPLES))]
    (folder / "qrels/train.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]))


def write_msmarco(folder: Path) -> None:
    folder.mkdir()
    texts = [*POSITIVES, *NEGATIVES]
    (folder / "collection.tsv").write_text("".join(f"{i}\t{text}\n" for i, text in enumerate(texts)))
    (folder / "queries.train.tsv").write_text("".join(f"{i}\t{text}\n" for i, text in enumerate(QUERIES)))
    (folder / "qrels.train.tsv").write_text("".join(f"{i}\t0\t{i}\t1\n" for i in range(len(TRIPLES))))
    triple = "".join(f"{i}\t{i}\t{i + len(TRIPLES)}\n{i}\t{i}\t{i}\n" for i in range(len(TRIPLES)))
    (folder / "qidpidtriples.train.full.2.tsv").write_text(triple)


def write_msmarco_documents(folder: Path) -> None:
    folder.mkdir()
    rows = [f"D{i}\thttp://x\t{t.replace(' ', chr(9), 1)}\n" for i, t in enumerate((*POSITIVES, *NEGATIVES))]
    (folder / "msmarco-docs.tsv").write_text("".join(rows))
    (folder / "msmarco-doctrain-queries.tsv").write_text("".join(f"{i}\t{q}\n" for i, q in enumerate(QUERIES)))
    judged = [f"{i} 0 D{i} 1\n{i} 0 D{i + len(TRIPLES)} 0\n" for i in range(len(TRIPLES))]
    (folder / "msmarco-doctrain-qrels.tsv").write_text("".join(judged))


def write_miracl(folder: Path) -> None:
    for name in ("miracl-v1.0-en/topics", "miracl-v1.0-en/qrels", "miracl-corpus-v1.0-en"):
        (folder / name).mkdir(parents=True)
    texts = [*POSITIVES, *NEGATIVES]
    for part, first in enumerate((0, 30)):  # of which the second begins inside the positives
        rows = [{**passage(text), "docid": f"7#{i}"} for i, text in enumerate(texts)][first : 30 if part == 0 else 99]
        (folder / f"miracl-corpus-v1.0-en/docs-{part}.jsonl.gz").write_bytes(gzip.compress(lines(rows)))
    topics = "".join(f"{i}\t{q}\n" for i, q in enumerate(QUERIES))
    (folder / "miracl-v1.0-en/topics/topics.miracl-v1.0-en-train.tsv").write_text(topics)
    judged = [f"{i}\tQ0\t7#{i + j * len(TRIPLES)}\t{1 - j}\n" for i in range(len(TRIPLES)) for j in (0, 1)]
    (folder / "miracl-v1.0-en/qrels/qrels.miracl-v1.0-en-train.tsv").write_text("".join(judged))


def write_mrtydi(folder: Path) -> None:
    (folder / "collection").mkdir(parents=True)
    rows = [{"id": f"7#{i}", "contents": text} for i, text in enumerate((*POSITIVES, *NEGATIVES))]
    (folder / "collection/docs.jsonl.gz").write_bytes(gzip.compress(lines(rows)))
    (folder / "topic.train.tsv").write_text("".join(f"{i}\t{q}\n" for i, q in enumerate(QUERIES)))
    judged = [f"{i}\tQ0\t7#{i + j * len(TRIPLES)}\t{1 - j}\n" for i in range(len(TRIPLES)) for j in (0, 1)]
    (folder / "qrels.train.txt").write_text("".join(judged))


def write_tevatron_ids(folder: Path) -> None:
    (folder / "corpus").mkdir(parents=True)
    for part, texts in enumerate((POSITIVES, NEGATIVES)):  # ids are numbers in one part, texts in the queries
        rows = [{"docid": 100 * part + i, "text": text, "image": None} for i, text in enumerate(texts)]
        (folder / f"corpus/part{part}.jsonl.gz").write_bytes(gzip.compress(lines(rows)))
    rows = [
        {"query_id": f"id{i}", "query_text": query, "query_image": None, "positive_document_ids": [str(i)],
         "negative_document_ids": [str(100 + i), str(i)], "answer": None, "source": "x"}
        for i, query in enumerate(QUERIES)
    ]  # fmt: skip
    (folder / "train.jsonl").write_bytes(lines(rows))


FOLDERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "beir": ("beir", write_beir),
    "msmarco": ("msmarco", write_msmarco),
    "msmarco documents": ("msmarco", write_msmarco_documents),
    "miracl": ("miracl", write_miracl),
    "mrtydi": ("mrtydi", write_mrtydi),
    "tevatron-ids": ("tevatron-ids", write_tevatron_ids),
}


@pytest.mark.parametrize("layout", FOLDERS)
def test_a_collection_is_recognised_and_joined(layout: str, tmp_path: Path) -> None:
    name, write = FOLDERS[layout]
    folder = tmp_path / "set"
    write(folder)
    source = Source(path=str(folder))
    records, _ = read(tmp_path, source)
    assert format_of(source) == name and not is_growing(source)
    assert triples(records) == TRIPLES and {record.source for record in records} == {"set"}
    with pytest.raises(FileNotFoundError, match="which the format .* with split = 'dev' needs"):
        read(tmp_path, Source(path=str(folder), split="dev"))


def test_a_real_collection_is_joined_as_the_test_set_reader_has_it(tmp_path: Path) -> None:
    folder = ROOT / "data/retrieval/scifact-small"
    records, _ = read(tmp_path, Source(path=str(folder), split="test"))
    expected = read_retrieval(folder)
    assert [record.id for record in records] == list(expected.queries)
    for record in records:
        judged = [expected.documents[i] for i, score in expected.judgements[record.id].items() if score > 0]
        assert record.query == expected.queries[record.id] and set(record.positives) == set(judged)


def test_a_document_that_is_missing_or_there_twice_is_named(tmp_path: Path) -> None:
    write_beir(tmp_path / "set")
    corpus = tmp_path / "set/corpus.jsonl"
    whole = corpus.read_bytes()
    corpus.write_bytes(whole.split(b"\n", 1)[1])
    source = Source(path=str(tmp_path / "set"))
    with pytest.raises(BrokenRecord, match=r"queries\.jsonl:1: .* document 'p 0', which the corpus lacks"):
        read(tmp_path, source)
    records, notes = read(tmp_path, source, skip_broken=True)
    assert triples(records) == TRIPLES[1:] and len(notes.skipped) == 1
    first = whole.split(b"\n", 1)[0]
    corpus.write_bytes(whole + first)
    assert triples(read(tmp_path, source)[0]) == TRIPLES  # parts that overlap
    corpus.write_bytes(whole + first.replace(b'"text": "', b'"text": "other '))
    with pytest.raises(BrokenRecord, match="'p 0' occurs twice in the corpus, with two texts"):
        read(tmp_path, source)


def test_documents_are_found_though_all_ids_have_one_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_beir(tmp_path / "set")
    monkeypatch.setattr("e5core.joined._hash", lambda identity: 5)
    corpus = Corpus([tmp_path / "set/corpus.jsonl"], tmp_path, Notes(skip_broken=False).broken)
    assert [corpus.text(f"n {i}", "here") for i in range(len(TRIPLES))] == list(NEGATIVES)
    with pytest.raises(BrokenRecord, match="here: .*'n 99'"):
        corpus.text("n 99", "here")


def test_flagembedding_s_scores_are_of_every_candidate(tmp_path: Path) -> None:
    row = {"query": "q", "pos": ["p", "r"], "neg": ["n"], "pos_scores": [0.9, 0.8], "neg_scores": [0.1]}
    (tmp_path / "x.jsonl").write_bytes(lines([row]))
    ((record,), _) = read(tmp_path, Source(path=str(tmp_path / "x.jsonl")))
    assert record.scores == (0.9, 0.8, 0.1) and record.is_scored


BROKEN = {  # layout: what is wrong, put in place of the second row, and what the message says of it
    "records": (b'{"query": "q"}\n', "x.jsonl:2: missing field pos"),
    "flagembedding": (b'{"query": "q", "pos": ["p"], "neg": [], "pos_scores": [1, 2]}\n', "x.jsonl:2: pos_scores"),
    "tevatron passages": (b'{"query": "q", "positive_passages": ["p"]}\n', "x.jsonl:2: a passage must be"),
    "e5": (b'{"query": "q", "negative": "n"}\n', "x.jsonl:2: missing field positive"),
    "triplets in lists": (b'["q"]\n', "x.jsonl:2: a triplet needs two"),
    "triplets by name": (b'{"anchor": "q", "positive": "p", "label": 1}\n', "x.jsonl:2: label makes this"),
    "triplets in csv": (b"q,p\r\n", "x.csv:2: 2 columns where the header has 3"),
    "triples-tsv": (b"q\t\xff\tn\n", "x.tsv:2: invalid UTF-8"),
}


@pytest.mark.parametrize("layout", BROKEN)
def test_a_broken_row_is_named_and_can_be_left_out(layout: str, tmp_path: Path) -> None:
    name, file, content = FILES[layout]
    broken, message = BROKEN[layout]
    rows = content.splitlines(keepends=True)
    rows[1] = broken
    path = tmp_path / file
    path.write_bytes(b"".join(rows))
    source = Source(path=str(path), format=name)
    with pytest.raises(BrokenRecord) as error:
        read(tmp_path, source)
    assert message in str(error.value)
    records, notes = read(tmp_path, source, skip_broken=True)
    place = 0 if "csv" in layout else 1  # a header stands before its rows
    assert triples(records) == [*TRIPLES[:place], *TRIPLES[place + 1 :]]
    assert len(notes.skipped) == 1 and message in notes.skipped[0]


def test_rows_without_a_positive_are_counted_and_long_lists_cut(tmp_path: Path) -> None:
    contexts = [passage(f"t {i}") for i in range(20)]
    rows = [
        {"question": "a", "positive_ctxs": [], "hard_negative_ctxs": contexts},
        {"question": "b", "positive_ctxs": contexts[:1], "hard_negative_ctxs": contexts[1:10],
         "negative_ctxs": contexts[10:]},
    ]  # fmt: skip
    path = tmp_path / "biencoder-trivia-train.json"
    path.write_text(json.dumps(rows))
    records, notes = read(tmp_path, Source(path=str(path)))
    assert notes.n_without_positive == 1
    assert [record.negatives for record in records] == [tuple(f"t {i}" for i in range(1, 16))]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_an_array_is_read_alike_in_pieces_of_any_size(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "CHUNK_BYTES", chunk)
    path = tmp_path / "x.json"
    rows = [{"question": 'Straße 東京 "]}', "positive_ctxs": [passage(p)]} for p in POSITIVES]
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    records, _ = read(tmp_path, Source(path=str(path)))
    assert [record.positives[0] for record in records] == list(POSITIVES)
    found = [(record.query, int(record.id.rpartition(":")[2])) for record in records[:2]]
    first, second = (i for i, text in enumerate(path.read_text().splitlines(), 1) if text == " {" and i < 20)
    assert found == [('Straße 東京 "]}', first), ('Straße 東京 "]}', second)]
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(BrokenRecord, match=r"x\.json:\d+: broken JSON: .* cut off"):
        read(tmp_path, Source(path=str(path)), skip_broken=True)


def test_a_zst_file_reads_as_its_text_or_says_what_it_needs(tmp_path: Path) -> None:
    content = FILES["e5"][2]
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd")
    if find_spec("zstandard") is None:
        with pytest.raises(ValueError, match=r"x\.jsonl\.zst: \.zst needs Python 3\.14 or `pip install zstandard`"):
            read(tmp_path, Source(path=str(path)))
        return
    zstandard, half = import_module("zstandard"), len(content) // 2
    packed = [zstandard.ZstdCompressor().compress(part) for part in (content[:half], content[half:])]
    path.write_bytes(b"".join(packed))  # two frames
    assert triples(read(tmp_path, Source(path=str(path)))[0]) == TRIPLES
    path.write_bytes(b"".join(packed)[:-9])
    with pytest.raises(BrokenRecord, match=r"x\.jsonl\.zst:\d+: damaged zstd archive"):
        read(tmp_path, Source(path=str(path)))
    path.write_bytes(packed[0])
    with open_file(path) as file:
        assert file.read() == content[:half]


def test_parquet_reads_as_its_table_or_says_what_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1")
    if find_spec("pyarrow") is None:
        with pytest.raises(ValueError, match=r"x\.parquet: \.parquet needs the package pyarrow"):
            read(tmp_path, Source(path=str(path)))
        return
    pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    with pytest.raises(BrokenRecord, match=r"x\.parquet:1: broken Parquet"):
        read(tmp_path, Source(path=str(path)))
    columns = {"anchor": QUERIES, "positive": POSITIVES, "negative": NEGATIVES}
    parquet.write_table(pyarrow.table({name: list(values) for name, values in columns.items()}), path)
    assert triples(read(tmp_path, Source(path=str(path)))[0]) == TRIPLES


def test_two_instructions_alternate_and_the_switch_closes_a_source(tmp_path: Path) -> None:
    source = Source(path="x", tasks=("One.", "Two."), in_batch=False)
    record = Record(id="a", task="Own.", query="q", positives=("p",), source="x")
    dressed = [source.dress(record, row) for row in range(3)]
    assert [(r.task, r.in_batch) for r in dressed] == [("One.", False), ("Two.", False), ("One.", False)]
    assert Source(path="x").dress(record, 1) == record
