"""Laws of synth's corpus: no word is lost or cut, a text keeps its id, and a held-out test is whole or not there."""

import gzip
import json
import random
import re
import tracemalloc
import unicodedata
from pathlib import Path

import pytest

from e5core.records import BrokenRecord
from e5core.synth.corpus import LONGEST_WORD, Corpus, Passage, cut, is_held_out, passage_id, write_held_out
from e5core.synth.languages import load_languages
from e5core.synth.prompts import generate_request, load_kind
from e5core.testsets import read_retrieval

WORDS = "the river town keeps its old mill, Über-Straße 12.5 §4 and naïve cafés".split()
JAPANESE = "川沿いの町には古い水車がある。" * 40
UNPUNCTUATED = "川沿いの町には古い水車がある" * 40
THAI = "กรุงเทพมหานครเป็นเมืองหลวงที่มีผู้คนอาศัยอยู่มากที่สุดของประเทศไทยซึ่งตั้งอยู่ริมแม่น้ำ" * 20


def prose(seed: int) -> str:
    """Paragraphs of sentences of words, some of them far too long for a passage."""
    draw = random.Random(seed)
    paragraphs = []
    for _ in range(draw.randint(1, 6)):
        sentences = [" ".join(draw.choices(WORDS, k=draw.choice((3, 12, 70)))) for _ in range(draw.randint(1, 9))]
        paragraphs.append("".join(f"{sentence.capitalize()}. " for sentence in sentences))
    return "\n\n".join(paragraphs)


def write(folder: Path, **files: str) -> Path:
    """Write files of text; __ stands for a dot and ___ for a slash."""
    for name, text in files.items():
        path = folder / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    return folder


def record(number: int, passage: str, kind: str = "short_long") -> dict:
    response = {"user_query": f"question {number}?", "positive_document": "yes", "hard_negative_document": "no"}
    return {"id": f"r{number}", "kind": kind, "params": {"passage": passage}, "response": response}


def files_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(write(tmp_path / "texts", a__txt="\n\n".join(prose(seed) for seed in range(8))), 20)


@pytest.mark.parametrize("words", [10, 40, 200])
@pytest.mark.parametrize("seed", range(5))
def test_passages_hold_every_word_of_the_document_whole_in_order_and_within_the_limit(seed: int, words: int) -> None:
    passages = list(cut(prose(seed), words))
    assert [word for passage in passages for word in passage.split()] == prose(seed).split()
    assert all(len(passage.split()) <= words for passage in passages)


def test_a_cut_falls_between_paragraphs_else_between_sentences_else_between_words() -> None:
    first, second, third = ("Here are five words now. " * 2).strip(), "Small words. " * 4, "word " * 30
    second = second.strip()
    assert list(cut(f"{first}\n\n{second}\n \n{first}", 20)) == [first, f"{second}\n \n{first}"]
    assert list(cut(f"{first} {second}", 12)) == [first, second]
    assert [len(passage.split()) for passage in cut(third, 20)] == [15, 15]
    abbreviated = ["One two three four, e.g. five, six, seven.", "“Eight?” Nine, ten."]
    assert list(cut(" ".join(abbreviated), 10)) == abbreviated
    items = "- one thing to do\n* another thing\n1. the first of all\n| a | b |\n"
    assert all(re.match(r"- |\* |1\. |\| ", passage) for passage in cut(items * 5, 15))


def test_no_passage_is_a_crumb() -> None:
    for seed in range(20):
        sizes = [len(passage.split()) for passage in cut("Six words stand in every sentence. " * (34 + seed), 200)]
        assert min(sizes) >= 48, sizes
    late = "Six words stand in every sentence. " * 32 + "\n\nThe last paragraph is of nine words only.\n"
    assert min(len(passage.split()) for passage in cut(late, 195)) >= 48


@pytest.mark.parametrize(("text", "letters"), [(JAPANESE, 40), (UNPUNCTUATED, 40), (THAI, 100)])
def test_scripts_without_spaces_are_cut_between_letters_and_marks_stay_with_theirs(text: str, letters: int) -> None:
    passages = list(cut(text, 20))
    assert "".join(passages) == text
    assert all(letters / 4 <= len(passage) <= letters for passage in passages)
    assert not any(unicodedata.category(passage[0]).startswith("M") for passage in passages)
    if text is JAPANESE:
        assert all(passage.endswith("。") for passage in passages)


def test_what_goes_on_without_a_space_does_not_become_one_endless_passage() -> None:
    blob = "QUJD" * 50_000
    passages = list(cut(f"Before it. {blob} After it.", 20))
    assert "".join(passages).count("QUJD") >= 49_900 and max(map(len, passages)) <= 20 * (LONGEST_WORD + 1)
    assert "".join("".join(passages).split()) == f"Beforeit.{blob}Afterit."


def test_files_are_read_in_the_order_of_their_paths_and_each_text_once(tmp_path: Path) -> None:
    line = json.dumps({"_id": "7", "title": "Mill", "text": "It grinds."})
    write(tmp_path, b__md="Mills grind.\r\n\r\nAlways.", a___z__txt="Cafe\u0301", c___d___e__TXT="Caf\u00e9")
    write(tmp_path, d__jsonl=f'{line}\n\n{{"text": "Bare."}}\n{{"title": null, "text": " "}}\n', e__txt="It grinds.")
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(f"{line}\n".encode()))
    corpus = Corpus(tmp_path)
    assert [passage.text for passage in corpus] == [
        "Caf\u00e9",
        "Mills grind.\n\nAlways.",
        "Mill\n\nIt grinds.",
        "Bare.",
        "It grinds.",
    ]
    assert len(corpus) == 5 and corpus[3] == Passage(passage_id("Bare."), "Bare.") and not corpus.skipped
    with pytest.raises(IndexError):
        corpus[5]


def test_a_passage_s_id_is_what_its_records_note(corpus: Corpus) -> None:
    kind, languages = load_kind("short_long"), load_languages()
    for passage in list(corpus)[:5]:
        asked = {"seed": 0, "languages": languages, "passage": passage.text}
        assert generate_request(kind, "Find it.", 0, **asked).params["passage"] == passage.id


def test_files_that_are_not_read_are_counted_and_a_test_set_s_queries_are_among_them(tmp_path: Path) -> None:
    write(tmp_path, a__pdf="x", b__PDF="x", c="x", corpus__jsonl='{"text": "x"}', queries__jsonl='{"text": "y"}')
    write(tmp_path, __git___a__txt="z", qrels___test__tsv="q\tc\t1")
    corpus = Corpus(tmp_path)
    assert [passage.text for passage in corpus] == ["x"]
    assert corpus.skipped == {".pdf": 2, "c": 1, "queries.jsonl": 1, ".txt": 1, ".tsv": 1}


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder: .*none"):
        Corpus(tmp_path / "none")
    write(tmp_path, a__pdf="x", b__md=" \n")
    with pytest.raises(ValueError, match=r"holds no text; .* \(passed over: 1 \.pdf\)"):
        Corpus(tmp_path)
    (tmp_path / "c.txt").write_bytes(b"one\n\ntwo \xff\n")
    with pytest.raises(BrokenRecord, match=r"c\.txt:3: invalid UTF-8 \(byte 0xff at position 4\)"):
        Corpus(tmp_path)
    write(tmp_path, c__txt="", d__jsonl='{"text": "a"}\n{"title": "b"}')
    with pytest.raises(BrokenRecord, match=r"d\.jsonl:2: missing field text; fields found: title"):
        Corpus(tmp_path)


def test_texts_are_not_kept_in_memory_nor_a_large_file_s(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("w", encoding="utf-8") as file:
        file.writelines(f"Passage {i}. {'All of them are about as long as this one. ' * 20}\n\n" for i in range(1500))
    tracemalloc.start()
    corpus = Corpus(tmp_path)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "a.txt").stat().st_size > 1_300_000 and len(corpus) >= 1500
    assert kept < 17 * len(corpus) + 50_000 and most < 6_000_000


def test_held_out_are_about_the_share_and_a_larger_share_holds_the_smaller_one() -> None:
    identities = [passage_id(str(i)) for i in range(4000)]
    held = {share: {i for i in identities if is_held_out(i, share)} for share in (0.0, 0.05, 0.3, 1.0)}
    assert not held[0.0] and len(held[1.0]) == 4000
    assert 150 < len(held[0.05]) < 250 and 1080 < len(held[0.3]) < 1320 and held[0.05] < held[0.3]
    assert is_held_out("00000000ffffffff", 2**-32) and not is_held_out("0000000100000000", 2**-32)


def test_the_held_out_test_asks_for_the_passages_that_its_queries_were_written_from(
    corpus: Corpus, tmp_path: Path
) -> None:
    held = [passage for passage in corpus if is_held_out(passage.id, 0.5)]
    open_ = [passage for passage in corpus if not is_held_out(passage.id, 0.5)]
    rows = [record(i, passage.id) for i, passage in enumerate([*held, *open_, held[0]])]
    rows += [record(900, held[0].id, kind="long_long"), {**record(901, ""), "params": {}}]
    assert write_held_out(tmp_path / "test", corpus, iter(rows), 0.5) == (len(held) + 1, len(corpus))
    written = read_retrieval(tmp_path / "test")
    assert written.documents == {passage.id: passage.text for passage in corpus}
    assert written.queries == {row["id"]: row["response"]["user_query"] for row in rows if row["id"] in written.queries}
    last = len(held) + len(open_)
    assert written.judgements == {f"r{i}": {p.id: 1} for i, p in enumerate(held)} | {f"r{last}": {held[0].id: 1}}


def test_a_held_out_test_is_written_whole_or_not_at_all(corpus: Corpus, tmp_path: Path) -> None:
    folder, all_rows = tmp_path / "test", [record(i, passage.id) for i, passage in enumerate(corpus)]
    with pytest.raises(ValueError, match=r"raise corpus\.held_out, got 0 of .* passages, or the number of records"):
        write_held_out(folder, corpus, all_rows, 0.0)
    with pytest.raises(ValueError, match="1 held-out records are of passages that the corpus does not hold"):
        write_held_out(folder, corpus, [*all_rows, record(5, passage_id("gone"))], 1.0)
    assert not folder.exists()
    write_held_out(folder, corpus, all_rows[:3], 1.0)
    before = files_of(folder)
    assert set(before) == {"corpus.jsonl", "queries.jsonl", "qrels/test.tsv"}
    broken = [{**all_rows[0], "response": {"user_query": "half \ud83d"}}]  # ends the writing of the second file
    with pytest.raises(UnicodeEncodeError):
        write_held_out(folder, corpus, broken, 1.0)
    assert files_of(folder) == before
    (folder / "queries.jsonl").unlink()
    (folder / "queries.jsonl").mkdir()  # ends the replacing of the second file
    with pytest.raises(IsADirectoryError):
        write_held_out(folder, corpus, all_rows, 1.0)
    assert not (folder / "qrels/test.tsv").exists()
    (folder / "queries.jsonl").rmdir()
    assert write_held_out(folder, corpus, all_rows, 1.0)[0] == len(read_retrieval(folder).queries) == len(corpus)
