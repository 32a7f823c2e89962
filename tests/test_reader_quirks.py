"""What files of the field have that no format's page tells: each quirk is read right, or named by file and line."""

import gzip
import json
from pathlib import Path

import pytest
from scoring import ROOT
from test_readers import NEGATIVES, POSITIVES, QUERIES, TRIPLES, lines, read, triples, write_beir, write_msmarco

from e5core.records import BrokenRecord, read_records
from e5core.sources import Source, format_of

BOM = b"\xef\xbb\xbf"


def read_file(tmp_path: Path, name: str, content: bytes, **fields: object) -> list:
    (tmp_path / name).write_bytes(content)
    return read(tmp_path, Source(path=str(tmp_path / name), **fields))[0]


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path: Path) -> None:
    rows = [dict(zip(("query", "positive", "negative"), row, strict=True)) for row in TRIPLES]
    assert triples(read_file(tmp_path, "e5.jsonl", BOM + lines(rows).replace(b"\n", b"\r\n"))) == TRIPLES
    table = "".join("\t".join(row) + "\r\n" for row in TRIPLES).encode()
    assert triples(read_file(tmp_path, "t.tsv", BOM + table)) == TRIPLES
    csv = BOM + b"anchor,positive,negative\r\n" + b'"q, 1","p\r\nwith two lines",n\r\n'
    assert triples(read_file(tmp_path, "t.csv", csv)) == [("q, 1", "p\r\nwith two lines", "n")]
    dpr = [{"question": "q", "positive_ctxs": [{"title": "", "text": "p"}], "hard_negative_ctxs": [{"text": "n"}]}]
    assert triples(read_file(tmp_path, "d.json", BOM + json.dumps(dpr).encode())) == [("q", "p", "n")]
    write_beir(tmp_path / "set")
    for file in (tmp_path / "set").rglob("*.*"):
        file.write_bytes(BOM + file.read_bytes().replace(b"\n", b"\r\n"))
    assert triples(read(tmp_path, Source(path=str(tmp_path / "set")))[0]) == TRIPLES


def test_an_archive_of_several_members_is_read_to_its_end(tmp_path: Path) -> None:
    table = ["\t".join(row).encode() + b"\n" for row in TRIPLES]
    packed = gzip.compress(b"".join(table[:15])) + gzip.compress(b"".join(table[15:]))
    assert triples(read_file(tmp_path, "t.tsv.gz", packed)) == TRIPLES
    assert triples(read_file(tmp_path, "t.tsv.gz", packed + bytes(512))) == TRIPLES  # a tape's padding
    with pytest.raises(BrokenRecord, match=r"t\.tsv\.gz:\d+: damaged gzip archive"):
        read_file(tmp_path, "t.tsv.gz", packed[:-4])
    with pytest.raises(BrokenRecord, match=r"t\.tsv\.gz:1: damaged gzip archive .Not a gzipped file"):
        read_file(tmp_path, "t.tsv.gz", b"".join(table))  # unpacked by the browser, its name left


@pytest.mark.parametrize("name", ["long.jsonl", "long.csv", "long.tsv", "long.json"])
def test_a_text_of_megabytes_is_read(name: str, tmp_path: Path) -> None:
    text = "word " * 500_000 + "end"
    content = {
        "long.jsonl": lines([{"query": "q", "positive": text, "negative": "n"}]),
        "long.csv": f"anchor,positive,negative\nq,{text},n\n".encode(),
        "long.tsv": f"q\t{text}\tn\n".encode(),
        "long.json": json.dumps(
            [{"question": "q", "positive_ctxs": [{"text": text}], "hard_negative_ctxs": [{"text": "n"}]}]
        ).encode(),
    }[name]
    assert triples(read_file(tmp_path, name, content)) == [("q", text, "n")]


def test_ids_may_be_numbers(tmp_path: Path) -> None:
    [record] = read_file(tmp_path, "r.jsonl", lines([{"id": 7, "query": "q", "pos": ["p"], "neg": []}]))
    assert record.id == "7"
    rows = [{"query_id": 7, "query": "q", "positive_passages": [{"docid": 1, "text": "p"}], "negative_passages": []}]
    assert read_file(tmp_path, "t.jsonl", lines(rows))[0].id == "7"
    with pytest.raises(BrokenRecord, match=r"r\.jsonl:1: id must be a string, got a boolean"):
        read_file(tmp_path, "r.jsonl", lines([{"id": True, "query": "q", "pos": ["p"]}]))
    folder = tmp_path / "set"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_bytes(lines([{"_id": 3, "title": None, "text": "p"}]))
    (folder / "queries.jsonl").write_bytes(lines([{"_id": 2, "text": "q"}]))
    (folder / "qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\n2\t3\t1\n")
    [record] = read(tmp_path, Source(path=str(folder)))[0]
    assert (record.id, record.query, record.positives) == ("2", "q", ("p",))


def test_titles_are_texts_or_nothing(tmp_path: Path) -> None:
    def row(title: object) -> bytes:
        return lines([{"query": "q", "positive_passages": [{"title": title, "text": "p"}]}])

    for title, text in (("", "p"), (None, "p"), ("T", "T p")):
        assert read_file(tmp_path, "t.jsonl", row(title))[0].positives == (text,)
    with pytest.raises(BrokenRecord, match=r"t\.jsonl:1: title must be a string, got a number"):
        read_file(tmp_path, "t.jsonl", row(1984))


def test_flagembedding_s_files_are_known_without_prompt_and_scores(tmp_path: Path) -> None:
    rows = lines([{"query": "q", "pos": ["p"], "neg": ["n"], "type": "normal"}])
    [record] = read_file(tmp_path, "f.jsonl", rows)
    assert format_of(Source(path=str(tmp_path / "f.jsonl"))) == "flagembedding" and record.negatives == ("n",)


def test_a_table_s_column_of_row_numbers_is_no_query(tmp_path: Path) -> None:
    for header in ("", "Unnamed: 0"):
        with pytest.raises(BrokenRecord, match=r"t\.csv:2: a column without a name is a table's index"):
            read_file(tmp_path, "t.csv", f"{header},sentence1,sentence2\n0,a,b\n".encode())
    assert triples(read_file(tmp_path, "t.csv", b",anchor,positive,negative\n0,a,b,c\n")) == [("a", "b", "c")]


def judge(folder: Path, *rows: str) -> None:
    (folder / "qrels/train.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]))


def test_grades_above_0_are_positives_and_no_document_is_both(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_beir(folder)
    judge(folder, "q 0\tp 0\t2", "q 0\tn 0\t0", "q 0\tn 1\t-1", "q 0\tp 0\t0", "q 0\tp 0\t1", "q 1\tn 1\t0")
    records, notes = read(tmp_path, Source(path=str(folder)))
    assert [(r.id, r.positives, r.negatives) for r in records] == [("q 0", (POSITIVES[0],), NEGATIVES[:2])]
    assert notes.n_without_positive == 1  # q 1; the others nobody judged
    judge(folder, "q 0\tp 0\tyes")
    with pytest.raises(BrokenRecord, match=r"train\.tsv:2: a judgement is query, document, whole number"):
        read(tmp_path, Source(path=str(folder)))
    (folder / "qrels/train.tsv").write_text("query_id\tcorpus_id\trelevance\nq 0\tp 0\t1\n")
    assert len(read(tmp_path, Source(path=str(folder)))[0]) == 1


def test_a_broken_line_of_a_part_is_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_beir(folder)
    with (folder / "corpus.jsonl").open("ab") as file:
        file.write(b'{"_id": "x"}\n{"_id": "y", "text": "\xff"}\n')
    judge(folder, "q 0\tp 0\t1", "q 0", "q 1\tp 1\t1", "q 1\ty\t0", "q 2\tp 2\t1")
    with pytest.raises(BrokenRecord, match=r"train\.tsv:3: a judgement is"):
        read(tmp_path, Source(path=str(folder)))
    records, notes = read(tmp_path, Source(path=str(folder)), skip_broken=True)
    assert [record.id for record in records] == ["q 0", "q 2"]  # of q 1 a document is unreadable
    places = (
        "train.tsv:3: a judgement",
        "corpus.jsonl:81: missing",
        "corpus.jsonl:82: invalid UTF-8",
        "'y', which the",
    )
    assert len(notes.skipped) == 4 and all(told in at for told, at in zip(places, notes.skipped, strict=True))


def test_blank_documents_are_no_candidates(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_msmarco(folder)
    collection = folder / "collection.tsv"
    texts = collection.read_text().splitlines(keepends=True)
    texts[0], texts[len(TRIPLES) + 1] = "0\t\n", f"{len(TRIPLES) + 1}\t \n"
    collection.write_text("".join(texts))
    records, notes = read(tmp_path, Source(path=str(folder)))
    assert notes.n_without_positive == 1 and [record.id for record in records[:2]] == ["1", "2"]
    assert [record.negatives for record in records[:2]] == [(), (NEGATIVES[2],)]


def test_a_query_id_that_occurs_twice_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_beir(folder)
    with (folder / "queries.jsonl").open("ab") as file:
        file.write(b'{"_id": "q 3", "text": "another"}\n')
    with pytest.raises(BrokenRecord, match=r"queries\.jsonl:41: the query id 'q 3' occurs twice"):
        read(tmp_path, Source(path=str(folder)))
    assert len(read(tmp_path, Source(path=str(folder)), skip_broken=True)[0]) == len(TRIPLES)


def write_documents(folder: Path, n: int) -> list[str]:
    """MS-MARCO's document set, of n real texts.  Returns them."""
    folder.mkdir()
    records, _ = read_records([ROOT / "data/synthetic/en_short_long_a.jsonl"])
    bodies = [" ".join(text.split()) for record in records for text in record.positives][:n]
    rows = [f"D{i}\thttps://example.org/{i}\tTitle {i}\t{body}\n" for i, body in enumerate(bodies)]
    (folder / "msmarco-docs.tsv.gz").write_bytes(gzip.compress("".join(rows).encode()))
    queries = "".join(f"{i}\t{query}\n" for i, query in enumerate(QUERIES[:3]))
    (folder / "msmarco-doctrain-queries.tsv.gz").write_bytes(gzip.compress(queries.encode()))
    judged = "".join(f"{i} 0 D{i} 1\n" for i in range(3))
    (folder / "msmarco-doctrain-qrels.tsv.gz").write_bytes(gzip.compress(judged.encode()))
    return [f"Title {i} {body}" for i, body in enumerate(bodies)]


def test_a_ranking_gives_fifteen_of_its_documents_as_negatives_but_no_positive(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    texts = write_documents(folder, 120)
    order = [*range(20, 120), *range(5)]
    lines_of = {
        q: [f"{q} Q0 D{d} {at} {-5.5 - at} IndriQueryLikelihood\n" for at, d in enumerate(order)] for q in "019"
    }
    ranking = "".join(lines_of["0"] + lines_of["1"][-8:] + lines_of["9"])  # 9: of another split; 2 has none
    (folder / "msmarco-doctrain-top100.gz").write_bytes(gzip.compress(ranking.encode()))
    source = Source(path=str(folder))
    records, notes = read(tmp_path, source)
    assert format_of(source) == "msmarco" and notes.skipped == []
    assert [record.positives for record in records] == [(texts[i],) for i in range(3)]
    chosen = [order.index(texts.index(text)) for text in records[0].negatives]
    assert len(set(chosen)) == 15 and chosen == sorted(chosen)  # nearest first
    assert max(chosen) > 30 and texts[0] not in records[0].negatives  # not the first fifteen
    assert records[1].negatives == tuple(texts[order[at]] for at in range(97, 105) if order[at] != 1)
    assert records[2].negatives == ()
    assert read(tmp_path, source)[0] == records
    (folder / "msmarco-doctrain-top100.gz").write_bytes(gzip.compress(b"0 Q0 D7 1 -5.5\n"))
    with pytest.raises(BrokenRecord, match=r"top100\.gz:1: a ranking's line is query, Q0, document, place"):
        read(tmp_path, source)


def test_a_folder_of_records_beside_a_corpus_is_no_tevatron_folder(tmp_path: Path) -> None:
    (tmp_path / "mined").mkdir()
    (tmp_path / "mined/corpus.jsonl").write_bytes(lines([{"docid": "1", "text": "a"}]))
    (tmp_path / "mined/train.jsonl").write_bytes(lines([{"query": "q", "pos": "p"}]))
    assert format_of(Source(path=str(tmp_path / "mined"))) == "records"


def test_a_query_s_documents_must_be_in_the_corpus_and_a_list(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "corpus.jsonl").write_bytes(lines([{"docid": "1", "title": "T", "text": "a"}]))
    rows = [
        {"query_id": "a", "query_text": "q", "positive_document_ids": ["1"]},
        {"query_id": "b", "query": "q", "positive_document_ids": ["2"], "negative_document_ids": None},
        {"query_id": "c", "query_text": "q", "positive_document_ids": "1"},
        {"query_id": "d", "query_text": "q", "positive_document_ids": []},
    ]
    (folder / "train.jsonl").write_bytes(lines(rows))
    records, notes = read(tmp_path, Source(path=str(folder)), skip_broken=True)
    assert [(record.id, record.positives) for record in records] == [("a", ("T a",))]
    assert notes.n_without_positive == 1
    assert [at.partition("train.")[2][:9] for at in notes.skipped] == ["jsonl:2: ", "jsonl:3: "]
    assert "'2', which the corpus lacks" in notes.skipped[0] and "must be a list" in notes.skipped[1]
