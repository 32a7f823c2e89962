"""Collections whose texts and judgements stand apart, joined by their ids in constant memory.

    beir       corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv
    msmarco    collection.tsv, queries.SPLIT.tsv, qrels.SPLIT.tsv, and qidpidtriples.SPLIT.*.tsv for hard negatives; or
               the documents: msmarco-docs.tsv, msmarco-docSPLIT-queries.tsv, msmarco-docSPLIT-qrels.tsv
    miracl     topics.*-SPLIT.tsv, qrels.*-SPLIT.tsv, docs*.jsonl anywhere in the folder of one language
    mrtydi     topic.SPLIT.tsv, qrels.SPLIT.txt, docs.jsonl of {id, contents} anywhere in the folder of one language

each also .gz or .zst. A judgement above 0 is a positive, one of 0 or less a hard negative. In memory are the judgements
and, of the corpus, 16 bytes a document: the hash of its id and where its line stands; texts are read when a query needs
them. What is compressed cannot be read so and is decompressed first, into a folder that the caller gives.
"""

import hashlib
import shutil
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from e5core.archives import SUFFIXES, DamagedArchive, open_file, plain_name
from e5core.formats import Fields
from e5core.records import MAX_NEGATIVES, BrokenRecord, checked_text, decode_line, parse_object, read_lines, required

Identified = tuple[str, str]  # an id and a text
Judged = tuple[list[str], list[str]]  # the ids of a query's positives and of its negatives


class Layout(NamedTuple):
    """Where the parts of a collection stand: patterns of file names, in which SPLIT is the split's name."""

    corpus: str
    queries: str
    judgements: str
    triples: str  # "" = none


LAYOUTS = {
    "beir": (Layout("corpus.jsonl", "queries.jsonl", "qrels/SPLIT.tsv", ""),),
    "msmarco": (
        Layout("collection.tsv", "queries.SPLIT.tsv", "qrels.SPLIT.tsv", "qidpidtriples.SPLIT.*tsv"),
        Layout("msmarco-docs.tsv", "msmarco-docSPLIT-queries.tsv", "msmarco-docSPLIT-qrels.tsv", ""),
    ),
    "miracl": (Layout("**/docs*.jsonl", "**/topics.*-SPLIT.tsv", "**/qrels.*-SPLIT.tsv", ""),),
    "mrtydi": (Layout("**/docs.jsonl", "**/topic.SPLIT.tsv", "**/qrels.SPLIT.txt", ""),),
}


def recognise_folder(folder: Path) -> str | None:
    """Tell a folder's layout by its corpus and queries, of any split.  Returns a key of LAYOUTS, or None."""
    for name, layouts in LAYOUTS.items():
        for layout in layouts:
            if _find(folder, layout.corpus, "*") and _find(folder, layout.queries, "*"):
                return name
    return None


def parts(folder: Path, name: str, split: str) -> list[list[Path]]:
    """Find a collection's files.  Returns those of corpus, queries, judgements and triples.

    Raises FileNotFoundError that names the first missing part.
    """
    layouts = LAYOUTS[name]
    layout = next((layout for layout in layouts if _find(folder, layout.corpus, split)), layouts[0])
    found = [_find(folder, pattern, split) if pattern else [] for pattern in layout]
    for pattern, files in zip(layout[:3], found[:3], strict=True):
        if not files:
            wanted = pattern.replace("SPLIT", split)
            raise FileNotFoundError(
                f"{folder}: no {wanted} (or .gz, .zst), which the format {name} with split = {split!r} needs; "
                "fetch it, or name another split"
            )
    return found


def joined_rows(folder: Path, name: str, split: str, spool: Path) -> Iterator[tuple[str, int, object]]:
    """Join a collection, a row a query that has a positive, in the order of the queries.

    spool: an empty folder for what must be decompressed.
    Yields ("FILE:LINE", line, the fields of a plain record); in their place a BrokenRecord for a query that is no row.
    """
    corpus_files, query_files, judgement_files, triple_files = parts(folder, name, split)
    judged = _judgements(judgement_files, triple_files)
    corpus = Corpus(corpus_files, spool)
    for path in query_files:
        for line, raw in read_lines(path):
            place = f"{path}:{line}"
            try:
                identity, query = _identified(raw, place, path)
                positives, negatives = judged.pop(identity, ([], []))
                if not positives:
                    continue
                texts = [[corpus.text(document, place) for document in ids] for ids in (positives, negatives)]
                yield place, line, {"id": identity, "query": query, "pos": texts[0], "neg": texts[1]}
            except BrokenRecord as error:
                yield place, line, error
    lost = [identity for identity, (positives, _) in judged.items() if positives]
    if lost:
        place = f"{judgement_files[0]}:1"
        found = f"{len(lost)} judged queries are in no queries file, the first {lost[0]!r}"
        yield place, 1, BrokenRecord(f"{place}: {found}")


class Corpus:
    """Documents by their ids, read from disk one at a time."""

    def __init__(self, files: list[Path], spool: Path) -> None:
        """files: each is read once.  Raises BrokenRecord on a line that is no document, or an id that occurs twice."""
        self._files = [_plain_file(path, spool / str(i)) for i, path in enumerate(files)]
        self._names = files
        self._starts = list(accumulate((path.stat().st_size for path in self._files), initial=0))
        hashes, places = array("q"), array("q")
        for path, named, start in zip(self._files, files, self._starts, strict=False):
            with path.open("rb") as file:
                at = start
                for line, raw in enumerate(file, start=1):
                    if raw.strip():
                        hashes.append(_hash(_identified(raw, f"{named}:{line}", named)[0]))
                        places.append(at)
                    at += len(raw)
        order = np.argsort(np.frombuffer(hashes, np.int64), kind="stable") if hashes else np.empty(0, np.int64)
        self._hashes = np.array(hashes, np.int64)[order]
        self._places = np.array(places, np.int64)[order]
        self._refuse_twins()

    def __len__(self) -> int:
        return len(self._hashes)

    def text(self, identity: str, place: str) -> str:
        """Return a document's title and text.  Raises BrokenRecord, naming the place, where the corpus lacks it."""
        wanted = _hash(identity)
        at = int(np.searchsorted(self._hashes, wanted))
        while at < len(self) and self._hashes[at] == wanted:
            found, text = self._read(at)
            if found == identity:
                return text
            at += 1  # two ids of one hash
        raise BrokenRecord(f"{place}: the query is judged with the document {identity!r}, which the corpus lacks")

    def _read(self, at: int) -> Identified:
        place = int(self._places[at])
        i = bisect_right(self._starts, place) - 1
        with self._files[i].open("rb") as file:
            file.seek(place - self._starts[i])
            return _identified(file.readline(), f"{self._names[i]}: byte {file.tell()}", self._names[i])

    def _refuse_twins(self) -> None:
        for at in np.flatnonzero(self._hashes[1:] == self._hashes[:-1]).tolist():
            identity = self._read(at)[0]
            if identity == self._read(at + 1)[0]:
                raise BrokenRecord(f"{self._names[0]}:1: the id {identity!r} occurs twice in the corpus")


def _identified(raw: bytes, place: str, path: Path) -> Identified:
    """Read the id and the text of a document or a query: a JSON object or a line of tabs, by the file's name."""
    if plain_name(path).endswith(".jsonl"):
        fields = parse_object(raw, place)
        key = next((key for key in ("_id", "docid", "id") if key in fields), "_id")
        identity = required(fields, key, place)
        text = _titled(fields, required(fields, "contents" if "contents" in fields else "text", place), place)
    else:
        columns = decode_line(raw, place).rstrip("\r\n").split("\t")
        if len(columns) not in (2, 4):
            found = f"got {len(columns)} columns"
            raise BrokenRecord(f"{place}: a line is id, text (or id, url, title, text) between tabs, {found}")
        identity, text = columns[0], " ".join(columns[-2:] if len(columns) == 4 else columns[1:]).strip()
    if isinstance(identity, bool) or not isinstance(identity, str | int) or identity == "":
        raise BrokenRecord(f"{place}: an id must be a text that is not empty, got {identity!r}")
    return str(identity), text


def _titled(fields: Fields, text: object, place: str) -> str:
    title = checked_text(fields.get("title") or "", place, "title", blank=True)
    return f"{title} {checked_text(text, place, 'text', blank=True)}".strip()


def _judgements(files: list[Path], triple_files: list[Path]) -> dict[str, Judged]:
    """Read positives and negatives by query; of negatives the first 15."""
    judged: dict[str, Judged] = {}
    for path in files:
        for line, raw in read_lines(path):
            columns = _split(raw, f"{path}:{line}")
            if line == 1 and columns[0] == "query-id":
                continue
            if len(columns) not in (3, 4) or not columns[-1].removeprefix("-").isdecimal():
                raise BrokenRecord(f"{path}:{line}: a judgement is query, document, whole number, got {columns}")
            _add(judged.setdefault(columns[0], ([], [])), columns[-2], int(columns[-1]) > 0)
    for path in triple_files:
        for line, raw in read_lines(path):
            columns = _split(raw, f"{path}:{line}")
            if len(columns) != 3:
                raise BrokenRecord(f"{path}:{line}: a triple is query, positive, negative, got {columns}")
            query = judged.get(columns[0])
            if query and columns[2] not in query[0]:
                _add(query, columns[2], False)
    return judged


def _add(judged: Judged, document: str, positive: bool) -> None:
    ids = judged[0] if positive else judged[1]
    if document not in ids and (positive or len(ids) < MAX_NEGATIVES):
        ids.append(document)


def _split(raw: bytes, place: str) -> list[str]:
    text = decode_line(raw, place).rstrip("\r\n")
    return text.split("\t") if "\t" in text else text.split()


def _hash(identity: str) -> int:
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "little", signed=True)


def _find(folder: Path, pattern: str, split: str) -> list[Path]:
    """List the files of a pattern, by name; of one that is there compressed and plain, the plain one."""
    pattern = pattern.replace("SPLIT", split)
    found = {path for suffix in ("", *SUFFIXES) for path in folder.glob(pattern + suffix) if path.is_file()}
    return sorted(path for path in found if path.suffix not in SUFFIXES or path.with_suffix("") not in found)


def _plain_file(path: Path, spooled: Path) -> Path:
    """Return the file, or where it was decompressed to."""
    if path.suffix not in SUFFIXES:
        return path
    try:
        with open_file(path) as packed, spooled.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    except DamagedArchive as error:
        raise BrokenRecord(f"{path}:1: {error}; fetch the file again") from error
    return spooled
