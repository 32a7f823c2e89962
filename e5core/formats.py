"""Rows of the files that the field trains from, each turned into the fields of a plain record (records.py checks them).

    records        our JSON lines: the paper's six kinds, or {task, query, pos, neg}
    flagembedding  JSON lines {query, pos, neg, prompt, pos_scores, neg_scores}: FlagEmbedding's fine-tuning files
    tevatron       JSON lines {query_id, query, positive_passages, negative_passages} of {docid, title, text}, or
                   {query, positives, negatives} of texts: Tevatron's
    e5             JSON lines {query, positive, negative}: the public replica of the E5 mixture (arXiv 2402.15449)
    triplets       JSON lines, .csv or .parquet with the columns anchor, positive, negative...: sentence-transformers';
                   other names are taken by place: query, positive, and the rest negatives
    dpr            one JSON array of {question, positive_ctxs, hard_negative_ctxs, negative_ctxs} (arXiv 2004.04906)
    triples-tsv    query, positive, negative between tabs, no header: MS-MARCO's triples.train.*.tsv

Titles stand before their texts. Of more than 15 negatives the first are taken, hard ones before others. What has no
positive is no training example: it is left out, not broken (a quarter of DPR's TriviaQA).
"""

import csv
import json
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from e5core.archives import CHUNK_BYTES, DamagedArchive, open_file, plain_name
from e5core.records import (
    MAX_NEGATIVES,
    BrokenRecord,
    checked_text,
    decode_line,
    parse_object,
    read_lines,
    required,
)

Fields = dict[str, object]
LONGEST_ELEMENT = 1 << 26  # characters of a JSON array's element; beyond it something is not closed
NAMELESS = {"", "Unnamed: 0", "__index_level_0__"}  # what pandas calls the column of row numbers
LABEL_COLUMNS = ("label", "labels", "score", "scores")


class Format(NamedTuple):
    """How a file is cut into numbered rows, and what a row says.

    rows: a file's (line from 1, row); one that is a BrokenRecord cannot be cut out.
    fields: of a row and its "FILE:LINE", those of a plain record; None where it has no positive.
    """

    rows: Callable[[Path], Iterator[tuple[int, object]]]
    fields: Callable[[object, str], Fields | None]


def recognise(path: Path) -> str:
    """Tell a file's format by its ending and its first row.  Returns a key of FORMATS.

    Raises ValueError naming the file and the formats, or, where no row can be read, BrokenRecord naming the first.
    """
    ending = Path(plain_name(path)).suffix
    by_ending = {".json": "dpr", ".csv": "triplets", ".parquet": "triplets", ".tsv": "triples-tsv"}
    if ending in by_ending:
        return by_ending[ending]
    broken = None
    for line, raw in read_lines(path):
        if raw.lstrip().startswith(b"["):
            return "triplets"
        try:
            keys = parse_object(raw, f"{path}:{line}").keys()
        except BrokenRecord as error:
            broken = broken or error
            continue
        for name, marks in MARKS:
            if marks <= keys:
                return name
        broken = None
        break
    if broken is not None:
        raise broken
    raise ValueError(f"{path}: cannot tell its format; name it in the source: format = one of {', '.join(FORMATS)}")


MARKS = (  # the first that a row has tells a JSON-lines file's format
    ("records", {"response"}),
    ("tevatron", {"query", "positive_passages"}),
    ("tevatron", {"query", "positives"}),
    ("flagembedding", {"query", "pos", "prompt"}),
    ("flagembedding", {"query", "pos", "type"}),
    ("flagembedding", {"query", "pos", "pos_scores"}),
    ("flagembedding", {"query", "pos", "neg_scores"}),
    ("records", {"query", "pos"}),
    ("e5", {"query", "positive"}),
    ("triplets", {"anchor", "positive"}),
)


def _record(row: object, place: str) -> Fields:
    return parse_object(row, place)


def _flagembedding(row: object, place: str) -> Fields | None:
    given = parse_object(row, place)
    positives = _list(given, "pos", place)
    negatives = _list(given, "neg", place) if given.get("neg") is not None else []
    fields = _fields(required(given, "query", place), positives, negatives, given.get("id"))
    if given.get("prompt"):
        fields["task"] = _bare_task(given["prompt"])
    scores = [given.get(name) or [] for name in ("pos_scores", "neg_scores")]
    if any(scores):
        for name, values, texts in zip(("pos_scores", "neg_scores"), scores, (positives, negatives), strict=True):
            if not isinstance(values, list) or len(values) != len(texts):
                raise BrokenRecord(f"{place}: {name} must be a list of {len(texts)} numbers, one for each text")
        fields["scores"] = [*scores[0], *scores[1][:MAX_NEGATIVES]]
    return fields if positives else None


def _bare_task(prompt: object) -> object:
    """Return the instruction of a prompt, which may have the template around it."""
    if not isinstance(prompt, str):
        return prompt
    return prompt.strip().removeprefix("Instruct:").removesuffix("Query:").strip()


def _tevatron(row: object, place: str) -> Fields | None:
    given = parse_object(row, place)
    if "positive_passages" in given or "positives" not in given:
        positives = [_passage(item, place) for item in _list(given, "positive_passages", place)]
        negatives = [_passage(item, place) for item in given.get("negative_passages") or []]
    else:
        positives, negatives = _list(given, "positives", place), given.get("negatives") or []
    fields = _fields(required(given, "query", place), positives, negatives, given.get("query_id"))
    return fields if positives else None


def _dpr(row: object, place: str) -> Fields | None:
    if not isinstance(row, dict):
        raise BrokenRecord(f"{place}: an element must be an object")
    positives = [_passage(item, place) for item in _list(row, "positive_ctxs", place)]
    others = [*(row.get("hard_negative_ctxs") or []), *(row.get("negative_ctxs") or [])]
    fields = _fields(
        required(row, "question", place), positives, [_passage(item, place) for item in others[:MAX_NEGATIVES]]
    )
    return fields if positives else None


def _e5(row: object, place: str) -> Fields:
    given = parse_object(row, place)
    negatives = given.get("negative")
    return _fields(required(given, "query", place), _texts(required(given, "positive", place)), _texts(negatives))


def _triplet(row: object, place: str) -> Fields:
    """Read columns by the names anchor, positive, negative..., else by their places."""
    given = _columns(row, place)
    labels = [name for name in given if name.lower() in LABEL_COLUMNS]
    if labels:
        raise BrokenRecord(f"{place}: {labels[0]} makes this a labelled pair; triplets are anchor, positive, negatives")
    if {"anchor", "positive"} <= given.keys():
        query, positives = given["anchor"], _texts(given["positive"])
        rest = [text for name, value in given.items() if name.startswith("negative") for text in _texts(value)]
    else:
        if NAMELESS & given.keys():
            raise BrokenRecord(f"{place}: a column without a name is a table's index; leave it out of the file")
        query, *values = given.values()
        positives = _texts(values[0] if values else None)
        rest = [text for value in values[1:] for text in _texts(value)]
    if not positives:
        raise BrokenRecord(f"{place}: a triplet needs two columns at least, anchor and positive")
    return _fields(query, positives, rest)


def _columns(row: object, place: str) -> Fields:
    if isinstance(row, dict):
        return row
    if isinstance(row, bytes) and row.lstrip().startswith(b"["):
        wrapped = parse_object(b'{"row": ' + row.removeprefix(b"\xef\xbb\xbf") + b"}", place)["row"]
        return {str(i): value for i, value in enumerate(wrapped)} or {"0": ""}
    return parse_object(row, place) or {"0": ""}


def _triple(row: object, place: str) -> Fields:
    columns = decode_line(row, place).rstrip("\r\n").split("\t")
    if len(columns) != 3:
        raise BrokenRecord(f"{place}: a triple is query, positive, negative between tabs, got {len(columns)} columns")
    return _fields(columns[0], columns[1:2], columns[2:])


def _fields(query: object, positives: list, negatives: object, identity: object = None) -> Fields:
    """Make a plain record's fields; what is no text is found where all records are checked."""
    cut = negatives[:MAX_NEGATIVES] if isinstance(negatives, list) else negatives
    fields: Fields = {"query": query, "pos": positives, "neg": cut}
    if identity not in (None, ""):
        fields["id"] = str(identity)
    return fields


def _passage(item: object, place: str) -> str:
    """Join a passage's title and text by a space."""
    if not isinstance(item, dict) or not isinstance(item.get("text"), str):
        raise BrokenRecord(f"{place}: a passage must be an object with a text")
    title = checked_text(item.get("title") or "", place, "title", blank=True)
    return f"{title} {item['text']}".strip()


def _list(given: Fields, key: str, place: str) -> list:
    value = required(given, key, place)
    if not isinstance(value, list):
        raise BrokenRecord(f"{place}: {key} must be a list")
    return value


def _texts(value: object) -> list:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _array_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yield the elements of one JSON array, of which only one is in memory at a time."""
    decoder, line, text, at, wanted = json.JSONDecoder(), 1, "", 0, CHUNK_BYTES
    with _named(path, lambda: line), open_file(path) as file:
        decode = getincrementaldecoder("utf-8-sig")()
        opened = False
        while True:
            end = len(text)
            while at < end and text[at] in " \t\r\n,[" and not (text[at] == "[" and opened):
                opened = opened or text[at] == "["
                line += text[at] == "\n"
                at += 1
            if at < end and text[at] == "]":
                return
            if at < end and (not opened or text[at] != "{"):
                raise BrokenRecord(f"{path}:{line}: not a JSON array of objects")
            try:
                element, stop = decoder.raw_decode(text, at) if at < end else (None, 0)
            except json.JSONDecodeError as error:
                stop, cause = 0, error.msg
            else:
                cause = "the array is not closed"
            if stop:
                yield line, element
                line += text.count("\n", at, stop)
                at, wanted = stop, CHUNK_BYTES
                continue
            chunk = file.read(wanted)
            if not chunk or end - at > LONGEST_ELEMENT:
                raise BrokenRecord(f"{path}:{line}: broken JSON: {cause}; the file was cut off or damaged")
            text, at, wanted = text[at:] + decode.decode(chunk), 0, 2 * wanted


def _column_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Cut a JSON-lines, .csv or .parquet file of columns into rows."""
    ending = Path(plain_name(path)).suffix
    readers = {".csv": _csv_rows, ".parquet": _parquet_rows}
    return readers.get(ending, read_lines)(path)


def _csv_rows(path: Path) -> Iterator[tuple[int, object]]:
    with _named(path, lambda: reader.line_num), open_file(path) as file:
        # A byte that is no UTF-8 becomes half a surrogate pair, which the check of the row names
        lines = (raw.decode("utf-8-sig" if i == 0 else "utf-8", "surrogateescape") for i, raw in enumerate(file))
        csv.field_size_limit(LONGEST_ELEMENT)  # its own limit is 128 KiB
        reader = csv.reader(lines, strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                yield line, BrokenRecord(f"{path}:{line}: broken CSV: {error}")
                continue
            if row is None:
                return
            if header is None:
                header = row
            elif row and len(row) != len(header):
                found = f"{len(row)} columns where the header has {len(header)}"
                yield line, BrokenRecord(f"{path}:{line}: {found}")
            elif row:
                yield line, dict(zip(header, row, strict=True))


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    if find_spec("pyarrow") is None:
        raise ValueError(f"{path}: .parquet needs the package pyarrow: pip install pyarrow, or export it as JSON lines")
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    line = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                line += 1
                yield line, row
    except arrow.ArrowException as error:
        raise BrokenRecord(f"{path}:{line + 1}: broken Parquet: {error}; fetch the file again") from error


@contextmanager
def _named(path: Path, line: Callable[[], int]) -> Iterator[None]:
    """Name the file and the line where an archive is damaged or a text is no UTF-8."""
    try:
        yield
    except (DamagedArchive, UnicodeDecodeError) as error:
        raise BrokenRecord(f"{path}:{line()}: {error}; fetch the file again") from error


FORMATS = {
    "records": Format(read_lines, _record),
    "flagembedding": Format(read_lines, _flagembedding),
    "tevatron": Format(read_lines, _tevatron),
    "e5": Format(read_lines, _e5),
    "triplets": Format(_column_rows, _triplet),
    "dpr": Format(_array_rows, _dpr),
    "triples-tsv": Format(read_lines, _triple),
}
