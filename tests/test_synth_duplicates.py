"""Laws of duplicates and contamination: what is the same text is found, and nothing else."""

import gzip
import json
from pathlib import Path

import numpy as np

from e5core.contamination import evaluation_hashes, normalised, text_hash
from e5core.synth.duplicates import contaminated, near_hashes, record_hash

DATA = Path(__file__).parents[1] / "data"
FILES = [file for name in ("synthetic", "multilingual") for file in sorted((DATA / name).glob("*.jsonl"))]
STS = {"S1": "A dog runs over a field.", "S2": "Over the field runs a dog.", "S3": "A dog sleeps in a field."}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_hashes_ignore_case_width_and_space_and_nothing_else() -> None:
    assert normalised(" A  b\nC\u3000Ｄ") == "abcd"
    assert text_hash("The Cat.") == text_hash("THE  cat.") != text_hash("The cat")
    record = {"kind": "sts", "response": STS}
    same = {"kind": "sts", "response": {key: text.upper() + "\n" for key, text in STS.items()}}
    swapped = {"kind": "sts", "response": STS | {"S2": STS["S3"], "S3": STS["S2"]}}
    joined = {"kind": "sts", "response": STS | {"S1": STS["S1"] + STS["S2"], "S2": ""}}
    assert record_hash(record) == record_hash(same)
    assert len({record_hash(r) for r in (record, swapped, joined)}) == 3
    hashes = [record_hash(fields) for path in FILES for fields in lines(path)]
    assert len(set(hashes)) == len(hashes) == 1_840  # the shipped records hold no duplicate


def test_near_hashes_meet_for_small_changes_only() -> None:
    records = [fields for path in FILES if "short_long" in path.stem for fields in lines(path)][:120]
    bands = [set(near_hashes(fields)) for fields in records]
    assert not any(bands[i] & bands[j] for i in range(120) for j in range(i)), "different records met"
    met = 0
    for fields, band in zip(records, bands, strict=True):
        words = fields["response"]["positive_document"].split()
        words[len(words) // 2] = "different"
        changed = {**fields, "response": fields["response"] | {"positive_document": " ".join(words)}}
        assert near_hashes(fields) == near_hashes({**fields, "response": dict(fields["response"])})
        met += bool(band & set(near_hashes(changed)))
    assert met >= 118
    assert len(near_hashes({"kind": "sts", "response": {"S1": "a", "S2": "b", "S3": "c"}})) == 12


def test_texts_of_evaluation_sets_are_found_whatever_their_case_and_spaces(tmp_path: Path) -> None:
    (tmp_path / "beir/qrels").mkdir(parents=True)
    (tmp_path / "beir/queries.jsonl").write_text('{"_id": "q1", "text": "Is WATER wet?"}\n\n', encoding="utf-8")
    (tmp_path / "beir/corpus.jsonl.gz").write_bytes(
        gzip.compress(b'{"_id": "d1", "title": "Water", "text": "It is  wet."}\n')
    )
    (tmp_path / "sts.tsv").write_bytes('A\tB\n"Ein Hund\tläuft.\r\n'.encode())
    (tmp_path / "pairs.csv").write_text('1,"Yes, a cat",No\n', encoding="utf-8")
    (tmp_path / "lines.txt").write_text("\ufeffFirst line\n\nSecond line\n", encoding="utf-8")
    (tmp_path / "nested.json").write_text('{"data": [{"q": ["Deep \\ud800 text"]}]}', encoding="utf-8")
    (tmp_path / "README.md").write_text("Not read", encoding="utf-8")
    hashes = evaluation_hashes(tmp_path)
    assert hashes.dtype == np.uint64 and np.all(np.diff(hashes.astype(object)) > 0)
    present = [
        "is water wet?", "Water", "IT IS WET.", "water it is wet.", "a", '"ein hund', "Läuft.", "yes, a cat",
        "firstline", "second line", "deep \ud800 text",
    ]  # fmt: skip
    for text in present:
        fields = {"kind": "sts", "response": {"S1": "other", "S2": text, "S3": "third"}}
        assert contaminated(fields, hashes) == "S2", text
    for text in ("is water wet", "wet", "Not read", "zzzz"):
        assert contaminated({"kind": "sts", "response": {"S1": text, "S2": "x", "S3": "y"}}, hashes) == "", text


def test_a_label_of_an_evaluation_set_contaminates_nothing_but_its_text_does(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"text": "My card is lost", "label": "card lost"}', encoding="utf-8")
    hashes = evaluation_hashes(tmp_path)
    response = {"input_text": "Where is it?", "label": "card lost", "misleading_label": "card stolen"}
    assert contaminated({"kind": "long_short", "response": response}, hashes) == ""
    response["input_text"] = "my card is LOST"
    assert contaminated({"kind": "long_short", "response": response}, hashes) == "input_text"


def test_the_shipped_records_hold_no_text_of_the_shipped_evaluation_sets() -> None:
    parts = [evaluation_hashes(DATA / name) for name in ("retrieval", "sts", "bitext", "classification")]
    hashes = np.unique(np.concatenate(parts))
    assert len(hashes) > 10_000
    assert [fields for path in FILES for fields in lines(path) if contaminated(fields, hashes)] == []
