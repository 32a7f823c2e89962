"""Laws of records.py: both forms are read, every broken line is named, nothing is lost in silence."""

import gzip
import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from e5core.records import RESPONSE_KEYS, BrokenRecord, read_records

DATA = Path(__file__).parents[1] / "data"
STS = {"kind": "sts", "task": "Retrieve.", "language": "English", "params": {"free": 1}}
PLAIN = {"task": "Find.", "query": "q", "pos": ["p"]}


def write(path: Path, *lines: dict | str | bytes) -> Path:
    encoded = [json.dumps(line).encode() if isinstance(line, dict) else line for line in lines]
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in encoded) + b"\n")
    return path


def test_the_six_kinds_map_to_query_positive_negative(tmp_path: Path) -> None:
    for kind, keys in RESPONSE_KEYS.items():
        line = STS | {"kind": kind, "response": {key: f"text of {key}" for key in keys}}
        [record], skipped = read_records([write(tmp_path / f"{kind}.jsonl", line)])
        assert (record.query, *record.positives, *record.negatives) == tuple(f"text of {key}" for key in keys)
        assert len(record.positives) == 1 and len(record.negatives) == len(keys) - 2
        assert record.symmetric == (kind in ("sts", "bitext"))
        assert (record.kind, record.task, record.language, record.in_batch) == (kind, "Retrieve.", "English", True)
        assert (record.id, record.source, record.scores) == (f"{kind}:1", kind, ())
        assert skipped == []


def test_plain_record_keeps_every_field(tmp_path: Path) -> None:
    line = {"task": "T", "query": "q", "pos": ["a", "b"], "neg": "n", "id": "x7", "scores": [0.5, 2], "source": "web"}
    line |= {"lang": "de", "kind": "short_long", "symmetric": True, "in_batch": False}
    [record], _ = read_records([write(tmp_path / "a.jsonl", line)])
    assert (record.id, record.task, record.query, record.source, record.language) == ("x7", "T", "q", "web", "de")
    assert (record.positives, record.negatives, record.scores) == (("a", "b"), ("n",), (0.5, 2.0))
    assert (record.kind, record.symmetric, record.in_batch) == ("short_long", True, False)


def test_plain_record_needs_only_query_and_positive(tmp_path: Path) -> None:
    path = write(tmp_path / "some.v1.jsonl", "", {"query": "q", "pos": "p"}, {"query": "q", "pos": "p", "task": ""})
    records, _ = read_records([path])
    assert [record.id for record in records] == ["some.v1:2", "some.v1:3"]
    assert [record.task for record in records] == ["", ""]
    assert (records[0].positives, records[0].negatives, records[0].kind) == (("p",), (), "plain")
    assert (records[0].language, records[0].source, records[0].symmetric) == ("", "some.v1", False)


def test_plain_record_of_a_symmetric_kind_is_symmetric_unless_it_says_otherwise(tmp_path: Path) -> None:
    lines = (PLAIN | {"kind": "sts"}, PLAIN | {"kind": "sts", "symmetric": False})
    records, _ = read_records([write(tmp_path / "a.jsonl", *lines)])
    assert [record.symmetric for record in records] == [True, False]


def test_text_becomes_nfc(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "Müßig é 한국")
    line = {"task": decomposed, "query": decomposed, "pos": [decomposed], "neg": [decomposed]}
    [record], _ = read_records([write(tmp_path / "a.jsonl", line)])
    composed = unicodedata.normalize("NFC", decomposed)
    assert composed != decomposed
    assert (record.task, record.query, *record.positives, *record.negatives) == (composed,) * 4


def test_gzip_and_plain_files_read_the_same_in_the_order_given(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *(PLAIN | {"query": f"q{i}"} for i in range(3)))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    records, _ = read_records([tmp_path / "b.jsonl.gz", path])
    assert [record.query for record in records] == ["q0", "q1", "q2"] * 2
    assert [record.id for record in records] == ["b:1", "b:2", "b:3", "a:1", "a:2", "a:3"]


def test_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PLAIN).encode() + b"\r\n\r\n" + json.dumps(PLAIN).encode())
    assert [record.id for record in read_records([path])[0]] == ["a:1", "a:3"]


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(PLAIN | {"query": "a\u2028b\u0085c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_records([path])[0][0].query == "a\u2028b\u0085c"


BROKEN = {
    "broken JSON": ('{"query": "q", "pos": [', "broken JSON at column"),
    "no object": ('["q", "p"]', "must be a JSON object, got a list"),
    "too deep": ("[" * 100_000, "cannot be read"),
    "huge number": ('{"query": "q", "pos": "p", "scores": [' + "9" * 5000 + "]}", "cannot be read"),
    "invalid UTF-8": (b'{"query": "caf\xe9", "pos": "p"}', "invalid UTF-8 (byte 0xe9 at position 14)"),
    "half a surrogate pair": ('{"query": "\\ud83d", "pos": "p"}', "query holds half a surrogate pair"),
    "unknown kind": (PLAIN | {"kind": "long_shot"}, "unknown kind 'long_shot'; known: short_long, long_short"),
    "nearest kind": (STS | {"kind": "shortshort"}, "did you mean short_short?"),
    "misspelt key": (PLAIN | {"negs": ["n"]}, "unknown field negs; known: task, query, pos, neg,"),
    "nearest key": (PLAIN | {"negs": ["n"]}, "did you mean neg?"),
    "misspelt long key": ({"query": "q", "positives": "p"}, "did you mean pos?"),
    "unknown key of a kind": (STS | {"response": {}, "parms": {}}, "did you mean params?"),
    "negative of a kind without one": (
        STS | {"kind": "long_long", "response": {"input": "a", "positive_document": "b", "negative": "c"}},
        "unknown field response.negative",
    ),
    "missing response key": (
        STS | {"response": {"S1": "a", "S2": "b"}},
        "missing field response.S3; fields found: S1, S2",
    ),
    "missing response": (STS, "must have a response"),
    "response of the plain kind": (STS | {"kind": "plain", "response": {}}, "must be of one of the kinds"),
    "response is text": (STS | {"response": "a"}, "response must be an object, got a string"),
    "missing kind": ({"task": "t", "language": "e", "response": {}}, "missing field kind"),
    "missing language": (
        {"kind": "sts", "task": "t", "response": dict.fromkeys(("S1", "S2", "S3"), "x")},
        "field language",
    ),
    "missing query": ({"pos": "p"}, "missing field query"),
    "missing positive": ({"query": "q"}, "missing field pos"),
    "no positive": (PLAIN | {"pos": []}, "at least one positive"),
    "empty query": (PLAIN | {"query": ""}, "query is empty"),
    "blank positive": (PLAIN | {"pos": ["p", " \t\u00a0"]}, "pos[1] is empty"),
    "blank negative": (PLAIN | {"neg": ["n", "\n"]}, "neg[1] is empty"),
    "blank negative alone": (PLAIN | {"neg": ""}, "neg is empty"),
    "blank response": (STS | {"response": {"S1": "a", "S2": " ", "S3": "c"}}, "response.S2 is empty"),
    "query is a number": (PLAIN | {"query": 3}, "query must be a string, got a number"),
    "positive is null": (PLAIN | {"pos": None}, "pos must be a string or a list of strings, got null"),
    "positive in an object": (PLAIN | {"pos": [{"text": "p"}]}, "pos[0] must be a string, got an object"),
    "blank task": (PLAIN | {"task": " "}, "task is empty"),
    "kind without task": ({"query": "q", "pos": "p", "kind": "short_long"}, "task is empty"),
    "id is a list": ({**PLAIN, "id": [7]}, "id must be a string, got a list"),
    "two languages": (PLAIN | {"lang": "de", "language": "German"}, "give one of them"),
    "too many negatives": (PLAIN | {"neg": ["n"] * 16}, "at most 15 negatives, got 16"),
    "too few scores": (PLAIN | {"neg": ["n", "m"], "scores": [1, 2]}, "got 2 for 1 positive + 2 negatives"),
    "too many scores": (PLAIN | {"scores": [1, 2]}, "got 2 for 1 positive + 0 negatives"),
    "scores of some positives": (
        PLAIN | {"pos": ["a", "b", "c"], "scores": [1, 2]},
        "got 2 for 3 positives (or the first alone) + 0 negatives",
    ),
    "score is text": (PLAIN | {"scores": ["1"]}, "scores[0] must be a number, got a string"),
    "score is true": (PLAIN | {"scores": [True]}, "scores[0] must be a number, got a boolean"),
    "score is NaN": ('{"query": "q", "pos": "p", "scores": [NaN]}', "scores[0] must be a finite number"),
    "score beyond floats": (PLAIN | {"scores": [10**400]}, "scores[0] must be a finite number"),
    "switch is text": (PLAIN | {"in_batch": "no"}, "in_batch must be true or false, got a string"),
    "switch is a number": (PLAIN | {"symmetric": 1}, "symmetric must be true or false, got a number"),
}


@pytest.mark.parametrize(("line", "why"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_line_is_refused_by_file_and_line(tmp_path: Path, line: dict | str | bytes, why: str) -> None:
    path = write(tmp_path / "a.jsonl", PLAIN, line, PLAIN)
    with pytest.raises(BrokenRecord) as caught:
        read_records([path])
    assert str(caught.value).startswith(f"{path}:2: ")
    assert why in str(caught.value)


@pytest.mark.parametrize(("line", "why"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_line_is_left_out_and_named_when_told_to(tmp_path: Path, line: dict | str | bytes, why: str) -> None:
    path = write(tmp_path / "a.jsonl", PLAIN, line, PLAIN)
    records, skipped = read_records([path], skip_broken=True)
    assert [record.id for record in records] == ["a:1", "a:3"]
    assert len(skipped) == 1 and skipped[0].startswith(f"{path}:2: ") and why in skipped[0]


def test_fifteen_negatives_and_their_scores_are_allowed(tmp_path: Path) -> None:
    line = PLAIN | {"neg": [f"n{i}" for i in range(15)], "scores": [float(i) for i in range(16)]}
    [record], _ = read_records([write(tmp_path / "a.jsonl", line)])
    assert len(record.negatives) == 15 and record.scores[15] == 15.0


@pytest.mark.parametrize("skip_broken", [False, True])
def test_a_file_without_any_record_is_refused(tmp_path: Path, skip_broken: bool) -> None:
    good, blank = write(tmp_path / "good.jsonl", PLAIN), write(tmp_path / "blank.jsonl", "", "  ")
    with pytest.raises(ValueError, match="blank.jsonl holds no usable record"):
        read_records([good, blank], skip_broken=skip_broken)


def test_a_file_with_broken_lines_only_is_refused_even_when_skipping(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no usable record: 2 broken lines"):
        read_records([write(tmp_path / "a.jsonl", "{", "{")], skip_broken=True)


def test_a_missing_file_a_folder_and_no_file_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no such file: {path}"):
            read_records([path])
    with pytest.raises(ValueError, match="no record file given"):
        read_records([])


@pytest.mark.parametrize("skip_broken", [False, True])
@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip"])
def test_a_damaged_archive_is_always_refused(tmp_path: Path, damage: str, skip_broken: bool) -> None:
    whole = gzip.compress(b"".join(json.dumps(PLAIN | {"query": f"{i * 7919}"}).encode() + b"\n" for i in range(999)))
    middle = len(whole) // 2
    damaged = {
        "cut": whole[:middle],
        "flipped": whole[:middle] + bytes(byte ^ 255 for byte in whole[middle : middle + 40]) + whole[middle + 40 :],
        "not gzip": json.dumps(PLAIN).encode(),
    }[damage]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(damaged)
    with pytest.raises(BrokenRecord, match=r"a\.jsonl\.gz:\d+: damaged gzip archive"):
        read_records([path], skip_broken=skip_broken)


def test_the_shipped_records_are_the_950_english_ones() -> None:
    records, skipped = read_records(sorted((DATA / "synthetic").glob("*.jsonl")))
    kinds = [record.kind for record in records]
    counts = {"short_long": 500, "long_short": 200, "short_short": 60, "long_long": 50, "sts": 140}
    assert {kind: kinds.count(kind) for kind in set(kinds)} == counts and skipped == []
    assert {record.language for record in records} == {"English"}
    assert len({record.id for record in records}) == 950


def test_no_training_text_equals_a_text_of_a_test_set() -> None:
    def bare(text: str) -> str:
        return "".join(text.lower().split())

    records, _ = read_records(sorted((DATA / "synthetic").glob("*.jsonl")))
    training = {bare(text) for record in records for text in (record.query, *record.positives, *record.negatives)}
    test: set[str] = set()
    for folder in ("retrieval", "sts", "bitext", "classification"):
        for path in (DATA / folder).rglob("*.jsonl"):
            for line in path.read_text(encoding="utf-8").strip().split("\n"):
                fields = json.loads(line)
                test |= {bare(fields[key]) for key in ("text", "sentence1", "sentence2") if key in fields}
    assert len(test) > 8000
    assert not training & test


def test_reading_records_does_not_import_torch() -> None:
    code = "import sys, e5core.records; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=DATA.parent).returncode == 0
