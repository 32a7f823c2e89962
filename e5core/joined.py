"""Collections whose texts and judgements stand apart, joined by their ids in constant memory.

    beir       corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv
    msmarco    collection.tsv, queries.SPLIT.tsv, qrels.SPLIT.tsv, and qidpidtriples.SPLIT.*.tsv for hard negatives; or
               the documents: msmarco-docs.tsv, msmarco-docSPLIT-queries.tsv, msmarco-docSPLIT-qrels.tsv, and
               msmarco-docSPLIT-top100 for hard negatives
    miracl     topics.*-SPLIT.tsv, qrels.*-SPLIT.tsv, docs*.jsonl anywhere in the folder of one language
    mrtydi     topic.SPLIT.tsv, qrels.SPLIT.txt, docs.jsonl of {id, contents} anywhere in the folder of one language
    tevatron-ids  SPLIT.jsonl of {query_id, query_text, positive_document_ids, negative_document_ids}, and
               corpus*.jsonl or corpus/*.jsonl of {docid, text}

each also .gz or .zst. A judgement above 0 is a positive, one of 0 or less a hard negative; so are 15 of a ranking's
documents, drawn at random: the first ones often answer, too, and nobody judged them (how the paper chose of its 100
nearest it does not say). What is blank is no candidate. In memory are the judgements and, of the corpus, 16 bytes a
document: the hash of its id and where its line stands; texts are read when a query needs them. What is compressed
cannot be read so and is decompressed first, into a folder that the caller gives.
"""

import hashlib
import random
import shutil
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate, groupby
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
    judgements: str  # "" = the queries name their documents
    triples: str = ""  # "" = none
    ranking: str = ""


LAYOUTS = {
    "beir": (Layout("corpus.jsonl", "queries.jsonl", "qrels/SPLIT.tsv"),),
    "msmarco": (
        Layout("collection.tsv", "queries.SPLIT.tsv", "qrels.SPLIT.tsv", "qidpidtriples.SPLIT.*tsv"),
        Layout(
            "msmarco-docs.tsv",
            "msmarco-docSPLIT-queries.tsv",
            "msmarco-docSPLIT-qrels.tsv",
            ranking="msmarco-docSPLIT-top100",
        ),
    ),
    "miracl": (Layout("**/docs*.jsonl", "**/topics.*-SPLIT.tsv", "**/qrels.*-SPLIT.tsv"),),
    "mrtydi": (Layout("**/docs.jsonl", "**/topic.SPLIT.tsv", "**/qrels.SPLIT.txt"),),
    "tevatron-ids": (Layout("corpus*.jsonl", "SPLIT.jsonl", ""), Layout("corpus/*.jsonl", "SPLIT.jsonl", "")),
}
Broken = Callable[[BrokenRecord], None]  # takes a line that cannot be used, or raises it


def recognise_folder(folder: Path) -> str | None:
    """Tell a folder's layout by its corpus and queries, of any split.  Returns a key of LAYOUTS, or None."""
    for name, layouts in LAYOUTS.items():
        for layout in layouts:
            corpus = _find(folder, layout.corpus, "*")
            queries = [path for path in _find(folder, layout.queries, "*") if path not in corpus]
            if corpus and queries and (layout.judgements or _names_documents(queries[0])):
                return name
    return None


def _names_documents(path: Path) -> bool:
    line, raw = next(read_lines(path), (1, b"{}"))
    return "positive_document_ids" in parse_object(raw, f"{path}:{line}")


def parts(folder: Path, name: str, split: str) -> list[list[Path]]:
    """Find a collection's files.  Returns those of corpus, queries, judgements, triples and ranking.

    Raises FileNotFoundError that names the first missing part.
    """
    layouts = LAYOUTS[name]
    layout = next((layout for layout in layouts if _find(folder, layout.corpus, split)), layouts[0])
    found = [_find(folder, pattern, split) if pattern else [] for pattern in layout]
    for pattern, files in zip(layout[:3], found[:3], strict=True):
        if pattern and not files:
            wanted = pattern.replace("SPLIT", split)
            raise FileNotFoundError(
                f"{folder}: no {wanted} (or .gz, .zst), which the format {name} with split = {split!r} needs; "
                "fetch it, or name another split"
            )
    return found


def joined_rows(
    folder: Path, name: str, split: str, spool: Path, broken: Broken
) -> Iterator[tuple[str, int, Fields | None]]:
    """Join a collection, a row a query that is judged, in the order of the queries.

    spool: an empty folder for what must be decompressed.
    Yields ("FILE:LINE", line, the fields of a plain record, or None for a query without a positive).
    """
    corpus_files, query_files, judgement_files, *negative_files = parts(folder, name, split)
    judged = _judgements(judgement_files, *negative_files, broken)
    corpus, seen = Corpus(corpus_files, spool, broken), set()
    for path in query_files:
        for line, raw in read_lines(path):
            place = f"{path}:{line}"
            try:
                asked = _asked(raw, place, path, judged) if judgement_files else _asked_with_ids(raw, place)
                if asked is None:
                    continue
                identity, query, (positives, negatives) = asked
                if identity in seen:
                    raise BrokenRecord(f"{place}: the query id {identity!r} occurs twice")
                seen.add(identity)
                found = {"pos": corpus.texts(positives, place)}
                found["neg"] = corpus.texts([i for i in negatives if i not in positives], place)
                yield place, line, {"id": identity, "query": query} | found if found["pos"] else None
            except BrokenRecord as error:
                broken(error)
    lost = [identity for identity, (positives, _) in judged.items() if positives and identity not in seen]
    if lost:
        found = f"{len(lost)} judged queries are in no queries file, the first {lost[0]!r}"
        broken(BrokenRecord(f"{judgement_files[0]}:1: {found}"))


def _asked(raw: bytes, place: str, path: Path, judged: dict[str, Judged]) -> tuple[str, str, Judged] | None:
    """Return a query's id, text and documents; None where nobody judged it."""
    identity, query = _identified(raw, place, path)
    return (identity, query, judged[identity]) if identity in judged else None


def _asked_with_ids(raw: bytes, place: str) -> tuple[str, str, Judged]:
    """The same of a query that names its documents."""
    fields = parse_object(raw, place)
    judged: Judged = ([], [])
    for key, positive in (("positive_document_ids", True), ("negative_document_ids", False)):
        ids = required(fields, key, place) if positive else fields.get(key) or []
        if not isinstance(ids, list):
            raise BrokenRecord(f"{place}: {key} must be a list")
        for document in ids:
            _add(judged, _checked_id(document, place), positive)
    text = required(fields, "query_text" if "query_text" in fields else "query", place)
    return _checked_id(required(fields, "query_id", place), place), checked_text(text, place, "query_text"), judged


class Corpus:
    """Documents by their ids, read from disk one at a time."""

    def __init__(self, files: list[Path], spool: Path, broken: Broken) -> None:
        """files: each is read once.  broken: told of a line that is no document, and of an id with two texts."""
        self._files = [_plain_file(path, spool / str(i)) for i, path in enumerate(files)]
        self._names = files
        self._starts = list(accumulate((path.stat().st_size for path in self._files), initial=0))
        hashes, places = array("q"), array("q")
        for path, named, start in zip(self._files, files, self._starts, strict=False):
            with path.open("rb") as file:
                at = start
                for line, raw in enumerate(file, start=1):
                    try:
                        if raw.strip():
                            hashes.append(_hash(_identified(raw, f"{named}:{line}", named)[0]))
                            places.append(at)
                    except BrokenRecord as error:
                        broken(error)
                    at += len(raw)
        keys, lines = (np.frombuffer(held, np.int64) if held else np.empty(0, np.int64) for held in (hashes, places))
        order = np.argsort(keys, kind="stable")
        self._hashes, self._places = keys[order], lines[order]
        self._report_twins(broken)

    def __len__(self) -> int:
        return len(self._hashes)

    def texts(self, identities: list[str], place: str) -> list[str]:
        """Return the texts of documents, without those that are blank.  Raises as `text` does."""
        return [text for text in (self.text(identity, place) for identity in identities) if text]

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

    def _report_twins(self, broken: Broken) -> None:
        """Name the ids that have two texts; one that has the same text twice, as parts that overlap, does no harm."""
        for at in np.flatnonzero(self._hashes[1:] == self._hashes[:-1]).tolist():
            (identity, text), (other, other_text) = self._read(at), self._read(at + 1)
            if identity == other and text != other_text:
                broken(
                    BrokenRecord(f"{self._names[0]}:1: the id {identity!r} occurs twice in the corpus, with two texts")
                )


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
    return _checked_id(identity, place), text


def _checked_id(identity: object, place: str) -> str:
    if isinstance(identity, bool) or not isinstance(identity, str | int) or identity == "":
        raise BrokenRecord(f"{place}: an id must be a text that is not empty, got {identity!r}")
    return str(identity)


def _titled(fields: Fields, text: object, place: str) -> str:
    title = checked_text(fields.get("title") or "", place, "title", blank=True)
    return f"{title} {checked_text(text, place, 'text', blank=True)}".strip()


def _judgements(
    files: list[Path], triple_files: list[Path], ranking_files: list[Path], broken: Broken
) -> dict[str, Judged]:
    """Read positives and negatives by query; of negatives the first 15, of a ranking's any 15."""
    judged: dict[str, Judged] = {}
    for line, columns, place in _table(files, (3, 4), "a judgement is query, document, whole number", broken):
        if columns[-1].removeprefix("-").isdecimal():
            _add(judged.setdefault(columns[0], ([], [])), columns[-2], int(columns[-1]) > 0)
        elif line > 1 or not columns[-1].isalpha():  # else it is the header
            broken(BrokenRecord(f"{place}: a judgement is query, document, whole number, got {columns}"))
    for _, columns, _ in _table(triple_files, (3,), "a triple is query, positive, negative", broken):
        query = judged.get(columns[0])
        if query and columns[2] not in query[0]:
            _add(query, columns[2], False)
    ranked = _table(ranking_files, (6,), "a ranking's line is query, Q0, document, place, score, name", broken)
    for identity, rows in groupby(ranked, key=lambda row: row[1][0]):
        query = judged.get(identity)
        if query:
            others = [columns[2] for _, columns, _ in rows if columns[2] not in query[0]]
            for place in sorted(random.Random(identity).sample(range(len(others)), min(MAX_NEGATIVES, len(others)))):
                _add(query, others[place], False)
    return judged


def _table(
    files: list[Path], widths: tuple[int, ...], what: str, broken: Broken
) -> Iterator[tuple[int, list[str], str]]:
    """Yield (line, columns, "FILE:LINE") of tables of ids; `broken` is told of lines of another width."""
    for path in files:
        for line, raw in read_lines(path):
            place = f"{path}:{line}"
            try:
                text = decode_line(raw, place).rstrip("\r\n")
                columns = text.split("\t") if "\t" in text else text.split()
                if len(columns) not in widths:
                    raise BrokenRecord(f"{place}: {what}, got {columns}")
            except BrokenRecord as error:
                broken(error)
                continue
            yield line, columns, place


def _add(judged: Judged, document: str, positive: bool) -> None:
    ids = judged[0] if positive else judged[1]
    if document not in ids and (positive or len(ids) < MAX_NEGATIVES):
        ids.append(document)


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
