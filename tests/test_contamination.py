"""Texts that training data shares with evaluation sets are found, told apart by set and side, and shown."""

import json
from pathlib import Path

import pytest

from e5core.contamination import Found, evaluation_hashes, find_overlap, occur, text_hash, text_hashes
from e5core.data import main
from e5core.records import Record, read_records
from e5core.testsets import read_retrieval

DATA = Path(__file__).parents[1] / "data"
XQUAD, SCIFACT = DATA / "retrieval/xquad-en", DATA / "retrieval/scifact-small"


def record(name: str, query: str, *positives: str, negatives: tuple[str, ...] = (), kind: str = "plain") -> Record:
    return Record(id=name, task="t", query=query, positives=positives, negatives=negatives, source="s", kind=kind)


def test_texts_of_a_set_are_counted_by_side_and_shown() -> None:
    xquad, scifact = read_retrieval(XQUAD), read_retrieval(SCIFACT)
    question, paragraph = next(iter(xquad.queries.values())), next(iter(xquad.documents.values()))
    abstract = next(iter(scifact.documents.values()))  # its title and text, joined
    records = [
        record("clean", "who is it", "a person", negatives=("nobody",)),
        record("a", question.upper(), "x", paragraph.replace(" ", "  "), negatives=("y", "z")),
        record("b", "q", "p", negatives=(abstract,)),
        record("c", question + " please", "p"),
    ]
    overlaps = find_overlap(iter(records), [XQUAD, SCIFACT])
    assert list(overlaps) == [str(XQUAD), str(SCIFACT)]
    first, second = overlaps.values()
    assert (first.n_records, first.n_texts) == (1, {"query": 1, "positive": 1, "negative": 0})
    assert first.examples == [
        Found("a", "query", records[1].query),
        Found("a", "positive", records[1].positives[1]),
    ]
    assert (second.n_records, second.n_texts) == (1, {"query": 0, "positive": 0, "negative": 1})
    assert second.examples == [Found("b", "negative", abstract)]


def test_every_record_counts_and_few_are_kept_as_examples() -> None:
    questions = list(read_retrieval(XQUAD).queries.values())
    records = [record(str(i), question, "p") for i, question in enumerate(questions)]
    overlap = find_overlap(records, [XQUAD], n_examples=3)[str(XQUAD)]
    assert overlap.n_records == overlap.n_texts["query"] == len(questions) == 1185
    assert [found.record for found in overlap.examples] == ["0", "1", "2"]


def test_labels_of_a_classification_are_no_contamination_and_its_text_is(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"text": "My card is lost", "label": "card lost"}', encoding="utf-8")
    same = record("a", "x", "card lost", negatives=("card lost",), kind="long_short")
    assert find_overlap([same], [tmp_path])[str(tmp_path)].n_records == 0
    assert find_overlap([record("b", "my card is lost", "x", kind="long_short")], [tmp_path])[str(tmp_path)].n_records


def test_the_shipped_records_share_no_text_with_the_shipped_sets() -> None:
    records, _ = read_records(sorted((DATA / "synthetic").glob("*.jsonl")))
    overlaps = find_overlap(records, [XQUAD, SCIFACT, DATA / "sts", DATA / "bitext", DATA / "classification"])
    assert len(records) == 950 and [overlap.n_records for overlap in overlaps.values()] == [0] * 5


def test_a_hash_is_looked_up_below_between_and_above_the_others() -> None:
    hashes = text_hashes(["a", "b", "c"])
    hashes.sort()
    values = text_hashes(["a", "A ", "b", "c", "d", ""])
    assert occur(values, hashes).tolist() == [True, True, True, True, False, False]
    assert int(values[0]) == text_hash("a")
    ends = hashes[[0, 0, -1, -1]]
    ends[1] -= 1
    ends[3] += 1
    assert occur(ends, hashes).tolist() == [True, False, True, False]


def test_a_folder_without_texts_or_with_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no text of an evaluation set"):
        evaluation_hashes(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.jsonl:2: broken JSON"):
        find_overlap([], [tmp_path])


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def overlaps_told(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run `data check c.toml`, which passes.  Returns what it says of texts that evaluation sets have, too."""
    assert main(["check", "c.toml", *arguments]) == 0
    return capfd.readouterr().err.partition("texts of the training data in evaluation sets")[2]


PLANTED = """
[train]
run = "run"
steps = 1
[backbone]
path = "model"
[[data.sources]]
path = "planted.jsonl"
[[data.sources]]
path = "clean.jsonl"
[[eval.report]]
kind = "sts"
path = "{sts}"
"""


def test_data_check_counts_what_the_sets_of_eval_and_against_have_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sts = DATA / "sts/stsb-cc-en/test.jsonl"
    questions = list(read_retrieval(XQUAD).queries.values())[:5]
    sentence = json.loads(sts.read_text(encoding="utf-8").partition("\n")[0])["sentence1"]
    rows = [{"id": f"r{i}", "query": text.upper(), "pos": [f"p{i}"]} for i, text in enumerate(questions)]
    rows.append({"id": "s", "query": "x", "pos": ["y"], "neg": [sentence]})
    write_rows(Path("planted.jsonl"), rows)
    write_rows(Path("clean.jsonl"), [{"query": "who wrote this", "pos": ["nobody did"]}])
    Path("c.toml").write_text(PLANTED.format(sts=sts), encoding="utf-8")
    said = overlaps_told(capfd, "--against", str(XQUAD), "--against", str(SCIFACT), "data.skip_broken=true")
    assert f"{sts}: 1 records (0 query, 0 positive, 1 negative)\n      s, negative: {sentence[:100]!r}\n" in said
    assert f"{XQUAD}: 5 records (5 query, 0 positive, 0 negative)\n      r0, query: " in said
    assert "r2, query: " in said and "r3, query: " not in said
    assert f"{SCIFACT}: 0 records (0 query, 0 positive, 0 negative)\n" in said
    assert main(["check", "c.toml", "--against", "nowhere"]) == 1
    assert "missing evaluation set: nowhere" in capfd.readouterr().err


CLASSIFIED = """
[train]
run = "run"
steps = 1
[backbone]
path = "model"
[[data.sources]]
path = "source.jsonl"
[[eval.report]]
kind = "classification"
path = "intents"
task = "Find the intent."
"""


def test_data_check_compares_with_the_texts_that_a_classification_holds_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("intents").mkdir()
    for split, text in (("train", "my card is lost"), ("test", "where is my card")):
        write_rows(Path(f"intents/{split}.jsonl"), [{"text": text, "label": "card"}])
    texts = ["my card is lost", "who is it"]
    write_rows(Path("source.jsonl"), [{"id": f"r{i}", "query": text, "pos": ["card"]} for i, text in enumerate(texts)])
    Path("c.toml").write_text(CLASSIFIED)
    said = overlaps_told(capfd, "--against", "intents")
    held_out = Path("intents/test.jsonl")
    assert f"{held_out}: 2 records (0 query, 2 positive, 0 negative)" in said, "its label, as of any set"
    assert "below --against's folders every file counts, a train split's too" in said
    assert "   intents: 2 records (1 query, 2 positive, 0 negative)\n      r0, query: 'my card is lost'" in said
    write_rows(Path("source.jsonl"), [{"query": "Where is  my card", "pos": ["lost"]}])
    said = overlaps_told(capfd)
    assert f"{held_out}: 1 records (1 query, 0 positive, 0 negative)" in said
    held_out.unlink()
    assert main(["check", "c.toml"]) == 1
    assert f"missing evaluation set: {held_out}" in capfd.readouterr().err
