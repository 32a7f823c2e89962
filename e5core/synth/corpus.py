"""The user's own documents as passages to ground examples on, and a test set of the passages that are held out.

Read are, below a folder and in the order of their paths, .txt and .md files, and .jsonl and .jsonl.gz files with one
{"title", "text"} a line, as in a BEIR corpus (the title may be missing; queries.jsonl is passed over). A document of
more words than a passage may have is cut: between paragraphs where there is such a border at a good place, else between
sentences, and only within a sentence that is too long itself between words. No word of it is lost, and none is cut.
"""

import bisect
import hashlib
import itertools
import json
import math
import os
import re
import tempfile
import unicodedata
import weakref
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from e5core.records import checked_text, decode_line, parse_object, read_lines, required

# Sizes are in tenths of a word. Of scripts without spaces, a word has about so many letters as languages.toml says.
WORD, EAST_ASIAN, SOUTH_EAST_ASIAN = 10, 5, 2
EAST = r"\u3001-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"  # Chinese, Japanese
SOUTH_EAST = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
LONGEST_WORD = 100  # characters; what goes on without a space, such as encoded bytes, counts as several words
EAST_LETTER, SOUTH_EAST_LETTER = re.compile(f"[{EAST}]"), re.compile(f"[{SOUTH_EAST}]")
UNSPACED = re.compile(f"[{EAST}{SOUTH_EAST}]")
SPACED = re.compile(rf"[^\s{EAST}{SOUTH_EAST}]{{1,{LONGEST_WORD}}}")
ATOM = re.compile(f"{UNSPACED.pattern}|{SPACED.pattern}")  # what is not cut
CLOSING = "\"'’”»)\\]」』）】"
BORDER = re.compile(
    rf"[.!?…؟۔।॥։።][{CLOSING}]*\s+(?=[^\sa-z])"  # a small letter follows an abbreviation
    rf"|[。！？]+[{CLOSING}]*\s*"
    r"|\n\s*\n\s*"
    r"|\n(?=[ \t]*(?:[-*+|>#]|\d+[.)])[ \t])"  # items of a list, rows of a table
)
BETWEEN_WORDS, BETWEEN_SENTENCES, BETWEEN_PARAGRAPHS = range(3)
BLOCK = 2**18  # characters of a plain text at which a blank line is taken for its end, so that no file fills the memory


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a document."""

    id: str  # passage_id(text)
    text: str  # in NFC


class Corpus:
    """The passages of a folder, each text once, in the order of the paths.

    The texts lie in a nameless temporary file; 16 bytes a passage stay in memory.
    """

    def __init__(self, folder: Path, words: int = 200) -> None:
        """Read a folder.

        words: of a passage at most, at least 10.
        Raises FileNotFoundError where there is no such folder, BrokenRecord ("FILE:LINE: why") on invalid UTF-8 or a
        broken line, ValueError where there is no text.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"no such folder: {folder}")
        self.skipped: Counter[str] = Counter()  # files that were not read, by the ending of their names
        self._texts = tempfile.TemporaryFile()
        weakref.finalize(self, self._texts.close)
        ids, ends = array("Q"), array("Q", [0])
        for text in itertools.chain.from_iterable(cut(document, words) for document in self._documents(folder)):
            ids.append(int(passage_id(text), 16))
            ends.append(ends[-1] + self._texts.write(text.encode("utf-8")))
        self._texts.flush()
        if not ids:
            passed = ", ".join(f"{n} {ending}" for ending, n in self.skipped.most_common()) or "none"
            raise ValueError(f"{folder} holds no text; give one with .txt, .md or .jsonl files (passed over: {passed})")
        _, first = np.unique(np.frombuffer(ids, dtype=np.uint64), return_index=True)
        first.sort()
        bounds = np.frombuffer(ends, dtype=np.uint64).astype(np.int64)
        self._starts, self._sizes = bounds[first], np.diff(bounds)[first]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Passage:
        text = os.pread(self._texts.fileno(), int(self._sizes[i]), int(self._starts[i])).decode("utf-8")
        return Passage(passage_id(text), text)

    def __iter__(self) -> Iterator[Passage]:
        return (self[i] for i in range(len(self)))

    def _documents(self, folder: Path) -> Iterator[str]:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name, hidden = path.name.lower(), any(part[0] == "." for part in path.relative_to(folder).parts)
            queries = name.startswith("queries.jsonl")  # to write questions from a test set's would spoil it
            if name.endswith((".jsonl", ".jsonl.gz")) and not hidden and not queries:
                yield from _json_documents(path)
            elif name.endswith((".txt", ".md")) and not hidden:
                yield from _text_documents(path)
            else:
                self.skipped[name if queries else path.suffix.lower() or name] += 1


def passage_id(text: str) -> str:
    """Return 64 bits of a text in hex: what a record notes as the passage that it is grounded on."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest()


def is_held_out(identity: str, share: float) -> bool:
    """Say whether a passage, by its id, is among the share of all that no training record is of."""
    return int(identity, 16) < share * 2**64


def write_held_out(folder: Path, corpus: Corpus, rows: Iterable[dict], share: float) -> tuple[int, int]:
    """Write a BEIR folder, as testsets.read_retrieval takes it, of the records of held-out passages.

    A record of kind short_long gives a query; the document to find for it, among all passages of the corpus, is the
    passage that it was written from.
    rows: records' lines, others among them.  share: of is_held_out.
    Returns the numbers of queries and documents.  A folder that was there is written over, whole or not at all.
    Raises ValueError if no record is of a held-out passage, or one is of a passage that the corpus does not hold.
    """
    queries: dict[str, str] = {}
    relevant: dict[str, str] = {}
    for n, row in enumerate(rows):
        passage = row["params"].get("passage") if row["kind"] == "short_long" else None
        if passage is not None and is_held_out(passage, share):
            query = str(row.get("id", f"q{n}"))
            queries[query], relevant[query] = row["response"]["user_query"], passage
    if not queries:
        raise ValueError(
            f"no record of kind short_long is of a held-out passage: raise corpus.held_out, got {share:g} of "
            f"{len(corpus):,} passages, or the number of records"
        )
    lost = set(relevant.values()).difference(passage.id for passage in corpus)
    if lost:
        raise ValueError(
            f"{len(lost)} held-out records are of passages that the corpus does not hold ({min(lost)} is one): put its "
            "files and corpus.words back as they were"
        )
    columns = (f"{query}\t{passage}\t1\n" for query, passage in relevant.items())
    files = {
        "corpus.jsonl": (_line({"_id": passage.id, "title": "", "text": passage.text}) for passage in corpus),
        "queries.jsonl": (_line({"_id": query, "text": text}) for query, text in queries.items()),
        "qrels/test.tsv": itertools.chain(["query-id\tcorpus-id\tscore\n"], columns),
    }
    _write_together(folder, files)
    return len(queries), len(corpus)


def cut(text: str, words: int) -> Iterator[str]:
    """Cut a document into passages of at most so many words, about equal in length."""
    limit = WORD * words
    if _size(text) <= limit:
        yield from filter(None, [text.strip()])
        return
    ends, sizes, levels = zip((0, 0, BETWEEN_PARAGRAPHS), *_units(text, limit), strict=True)
    sums = list(itertools.accumulate(sizes))
    start, last = 0, len(sums) - 1
    while start < last:
        end = _best_end(sums, levels, start, limit)
        if passage := text[ends[start] : ends[end]].strip():
            yield passage
        start = end


def _best_end(sums: Sequence[int], levels: Sequence[int], start: int, limit: int) -> int:
    """Choose the border that the passage from border `start` ends at."""
    rest = sums[-1] - sums[start]
    furthest = bisect.bisect_right(sums, sums[start] + limit) - 1
    if furthest == len(sums) - 1:
        return furthest
    equal = rest / math.ceil(rest / limit)  # of the fewest passages that can hold the rest

    def merits(i: int) -> tuple[bool, int, float]:
        size = sums[i] - sums[start]
        leaves_no_crumb = equal / 2 <= size <= rest - equal / 2
        return leaves_no_crumb, levels[i], -abs(size - equal)

    return max(range(start + 1, furthest + 1), key=merits)


def _units(text: str, limit: int) -> Iterator[tuple[int, int, int]]:
    """Yield (end, size, level of the border there) of every sentence, of every word where the sentence is too long."""
    borders = ((border.end(), border[0].count("\n") > 1) for border in BORDER.finditer(text))
    start = 0
    for end, ends_paragraph in itertools.chain(borders, [(len(text), True)]):
        level, size = BETWEEN_PARAGRAPHS if ends_paragraph else BETWEEN_SENTENCES, _size(text[start:end])
        if size > limit:
            for atom in ATOM.finditer(text, start, end):
                # A mark, such as a vowel sign of Thai, stays with its letter
                if atom.end() < end and unicodedata.category(text[atom.end()])[0] != "M":
                    yield atom.end(), _size(text[start : atom.end()]), BETWEEN_WORDS
                    start = atom.end()
            size = _size(text[start:end])
        yield end, size, level
        start = end


def _size(text: str) -> int:
    """Return the length of a text in tenths of a word."""
    if text.isascii() or not UNSPACED.search(text):
        runs = text.split()
        if max(map(len, runs), default=0) <= LONGEST_WORD:
            return WORD * len(runs)
    spaced, east = len(SPACED.findall(text)), len(EAST_LETTER.findall(text))
    return WORD * spaced + EAST_ASIAN * east + SOUTH_EAST_ASIAN * len(SOUTH_EAST_LETTER.findall(text))


def _json_documents(path: Path) -> Iterator[str]:
    for number, raw in read_lines(path):
        place = f"{path}:{number}"
        row = parse_object(raw, place)
        title = checked_text(row.get("title") or "", place, "title", blank=True)
        yield f"{title}\n\n{checked_text(required(row, 'text', place), place, 'text', blank=True)}"


def _text_documents(path: Path) -> Iterator[str]:
    """Yield a file's text; a large one's in pieces, cut at blank lines."""
    lines: list[str] = []
    n_characters, before = 0, 0
    for number, raw in read_lines(path):  # passes blank lines over, so their numbers tell where one was
        if number > before + 1:
            if n_characters > BLOCK:
                yield unicodedata.normalize("NFC", "".join(lines))
                lines, n_characters = [], 0
            lines.append("\n")
        lines.append(decode_line(raw, f"{path}:{number}").replace("\r\n", "\n"))
        n_characters, before = n_characters + len(lines[-1]), number
    yield unicodedata.normalize("NFC", "".join(lines))


def _line(fields: dict[str, str]) -> str:
    return json.dumps(fields, ensure_ascii=False) + "\n"


def _write_together(folder: Path, files: dict[str, Iterable[str]]) -> None:
    """Write files of lines into a folder; it is never found with the last one beside others than that one's own."""
    partial = {folder / name: folder / f"{name}.tmp" for name in files}
    try:
        for path, lines in zip(partial.values(), files.values(), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8", newline="") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
        list(partial)[-1].unlink(missing_ok=True)
        for path, temporary in partial.items():
            os.replace(temporary, path)
    finally:
        for temporary in partial.values():
            temporary.unlink(missing_ok=True)
