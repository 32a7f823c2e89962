"""Training records: what one line of a JSON-lines file says, checked once, where it enters.

A line has one of two forms, told apart by its keys:

    {"kind", "task", "language", "params", "response": {...}}   the six kinds of arXiv 2401.00368, appendix C
    {"task", "query", "pos", "neg", ...}                        plain; pos and neg are a text or a list of texts

Files end in .jsonl, .jsonl.gz or .jsonl.zst; blank lines are passed over. All text leaves here in Unicode's NFC form.
Whoever gets a Record may trust it: text is not blank, there is a positive, at most 15 negatives, scores fit the
candidates.
"""

import difflib
import json
import math
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from e5core.archives import DamagedArchive, open_file, plain_name

MAX_NEGATIVES = 15

# Keys of `response` per kind: query, positive, hard negative (arXiv 2401.00368, tables 8-13); two have no negative
RESPONSE_KEYS = {
    "short_long": ("user_query", "positive_document", "hard_negative_document"),
    "long_short": ("input_text", "label", "misleading_label"),
    "short_short": ("input", "positive_document"),
    "long_long": ("input", "positive_document"),
    "sts": ("S1", "S2", "S3"),
    "bitext": ("S1", "S2", "S3"),
}
KINDS = (*RESPONSE_KEYS, "plain")
SYMMETRIC_KINDS = ("sts", "bitext")
SYNTHETIC_KEYS = ("kind", "task", "language", "params", "response", "id", "source", "in_batch")
PLAIN_KEYS = (
    "task",
    "query",
    "pos",
    "neg",
    "id",
    "scores",
    "source",
    "lang",
    "language",
    "kind",
    "symmetric",
    "in_batch",
)


class BrokenRecord(ValueError):
    """A line that cannot be used; the message starts with "FILE:LINE: "."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One training example."""

    id: str  # as given, or FILE_STEM:LINE
    task: str  # the instruction, one sentence; "" = none, in plain records only
    query: str
    positives: tuple[str, ...]  # at least one
    negatives: tuple[str, ...] = ()  # 0 to 15
    scores: tuple[float, ...] = ()  # a teacher's, for each positive (or the first alone), then each negative; or none
    source: str  # as given, or the file's stem
    language: str = ""
    kind: str = "plain"  # one of KINDS
    symmetric: bool = False  # both sides are of one sort (sts, bitext), so both may carry the instruction
    in_batch: bool = True  # False: the query sees only its own candidates, and they are offered to nobody else

    @property
    def is_scored(self) -> bool:
        """Whether every candidate has a teacher's score."""
        return len(self.scores) == len(self.positives) + len(self.negatives)

    def scores_of(self, positive: int, negatives: Sequence[int]) -> list[float | None]:
        """Return the teacher's scores of a positive and of negatives, by their places; None where there is none."""
        if not self.scores:
            return [None] * (1 + len(negatives))
        n_scored = len(self.scores) - len(self.negatives)
        own = self.scores[positive] if positive < n_scored else None
        return [own, *(self.scores[n_scored + place] for place in negatives)]


def read_records(paths: Sequence[Path], *, skip_broken: bool = False) -> tuple[list[Record], list[str]]:
    """Read the records of JSON-lines files, in the order of the paths and lines.

    Returns the records, and "FILE:LINE: why" for every line left out (none unless skip_broken).
    Raises BrokenRecord on the first broken line unless skip_broken, and always on a damaged archive, since nobody can
    say what it lost; FileNotFoundError on a missing file; ValueError on a file without any usable record.
    """
    if not paths:
        raise ValueError("no record file given: name at least one .jsonl or .jsonl.gz file")
    records: list[Record] = []
    skipped: list[str] = []
    for path in paths:
        found, broken = parse_lines(read_lines(path), path, skip_broken=skip_broken)
        if not found:
            raise ValueError(
                f"{path} holds no usable record: {len(broken)} broken lines and no other; give a file with one"
            )
        records += found
        skipped += broken
    return records, skipped


def parse_lines(lines: Iterable[tuple[int, bytes]], path: Path, *, skip_broken: bool) -> tuple[list[Record], list[str]]:
    """Parse numbered lines of the file at `path` as records.

    Returns the records, and "FILE:LINE: why" for every line left out.  Raises BrokenRecord unless skip_broken.
    """
    records: list[Record] = []
    skipped: list[str] = []
    for line, raw in lines:
        place = f"{path}:{line}"
        try:
            fields = parse_object(raw, place)
            records.append(record_of(fields, place, stem=stem_of(path), line=line))
        except BrokenRecord as error:
            if not skip_broken:
                raise
            skipped.append(str(error))
    return records, skipped


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, bytes) for every line of a file, plain, .gz or .zst, that is not blank.

    Raises FileNotFoundError if path is no file, BrokenRecord on a damaged archive.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    line = 0
    try:
        with open_file(path) as file:
            for line, raw in enumerate(file, start=1):
                if raw.strip():
                    yield line, raw
    except DamagedArchive as error:
        raise BrokenRecord(f"{path}:{line + 1}: {error}; fetch the file again") from error


def read_texts(path: Path) -> Iterator[str]:
    """Yield the text of every line of a JSON-lines file: `text`, with `title` and a space before it where there is one.

    Raises BrokenRecord naming file and line.
    """
    for number, raw in read_lines(path):
        place = f"{path}:{number}"
        row = parse_object(raw, place)
        title, text = row.get("title") or "", required(row, "text", place)
        parts = (checked_text(title, place, "title", blank=True), checked_text(text, place, "text", blank=True))
        yield " ".join(parts).strip()


def parse_object(raw: bytes, place: str) -> dict[str, object]:
    """Parse one line as a JSON object; place is the "FILE:LINE" that a BrokenRecord names."""
    text = decode_line(raw, place)
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise BrokenRecord(f"{place}: broken JSON at column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise BrokenRecord(f"{place}: JSON that cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise BrokenRecord(f"{place}: a line must be a JSON object, got {_type_name(fields)}")
    return fields


def decode_line(raw: bytes, place: str) -> str:
    """Decode one line of UTF-8, without a byte-order mark."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise BrokenRecord(f"{place}: invalid UTF-8 (byte 0x{byte:02x} at position {error.start})") from error


def checked_text(value: object, place: str, name: str, *, blank: bool = False) -> str:
    """Return a text in NFC form; a BrokenRecord names what is no string, no valid Unicode, or blank if not allowed."""
    if not isinstance(value, str):
        raise BrokenRecord(f"{place}: {name} must be a string, got {_type_name(value)}")
    if not blank and not value.strip():
        raise BrokenRecord(f"{place}: {name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise BrokenRecord(f"{place}: {name} holds half a surrogate pair at character {error.start}") from error
    return unicodedata.normalize("NFC", value)


def required(fields: dict[str, object], key: str, place: str, *, where: str = "") -> object:
    """Return fields[key]; a BrokenRecord names the missing key and the keys that are there."""
    if key not in fields:
        found = ", ".join(map(str, fields)) or "none"
        raise BrokenRecord(f"{place}: missing field {where}{key}; fields found: {found}")
    return fields[key]


def nearest(name: str, known: Collection[str]) -> str:
    """Say which names are known, and which of them is meant by a misspelt one."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"known: {', '.join(known)}" + (f"; did you mean {matches[0]}?" if matches else "")


def record_of(fields: dict[str, object], place: str, *, stem: str, line: int) -> Record:
    """Make a Record of a line's object; place is the "FILE:LINE" that a BrokenRecord names.

    stem, line: the file's, of which id and source are made where the line has none.
    """
    if "response" in fields:
        return _synthetic_record(fields, place, stem, line)
    kind = _kind(fields, place)
    if "query" not in fields and kind != "plain":
        raise BrokenRecord(f"{place}: a record of kind {kind} must have a response (or query and pos), got neither")
    return _plain_record(fields, kind, place, stem, line)


def _synthetic_record(fields: dict[str, object], place: str, stem: str, line: int) -> Record:
    _refuse_unknown(fields, SYNTHETIC_KEYS, place)
    required(fields, "kind", place)
    kind = _kind(fields, place)
    if kind == "plain":
        raise BrokenRecord(f"{place}: a record with a response must be of one of the kinds {', '.join(RESPONSE_KEYS)}")
    response = fields["response"]
    if not isinstance(response, dict):
        raise BrokenRecord(f"{place}: response must be an object, got {_type_name(response)}")
    keys = RESPONSE_KEYS[kind]
    _refuse_unknown(response, keys, place, where="response.")
    texts = [checked_text(required(response, key, place, where="response."), place, f"response.{key}") for key in keys]
    return Record(
        id=_identity(fields, place, f"{stem}:{line}"),
        task=checked_text(required(fields, "task", place), place, "task"),
        query=texts[0],
        positives=(texts[1],),
        negatives=tuple(texts[2:]),
        source=_optional_text(fields, "source", place, stem),
        language=checked_text(required(fields, "language", place), place, "language"),
        kind=kind,
        symmetric=kind in SYMMETRIC_KINDS,
        in_batch=_switch(fields, "in_batch", place, True),
    )


def _plain_record(fields: dict[str, object], kind: str, place: str, stem: str, line: int) -> Record:
    _refuse_unknown(fields, PLAIN_KEYS, place)
    query = checked_text(required(fields, "query", place), place, "query")
    positives = _texts(required(fields, "pos", place), place, "pos")
    negatives = _texts(fields.get("neg", []), place, "neg")
    if not positives:
        raise BrokenRecord(f"{place}: a record needs at least one positive, got pos = []")
    if len(negatives) > MAX_NEGATIVES:
        raise BrokenRecord(f"{place}: a record may have at most {MAX_NEGATIVES} negatives, got {len(negatives)}")
    if "lang" in fields and "language" in fields:
        raise BrokenRecord(f"{place}: lang and language are the same field; give one of them")
    task = fields.get("task", "")
    if task != "" or kind != "plain":
        task = checked_text(task, place, "task")
    return Record(
        id=_identity(fields, place, f"{stem}:{line}"),
        task=task,
        query=query,
        positives=positives,
        negatives=negatives,
        scores=_scores(fields, place, len(positives), len(negatives)),
        source=_optional_text(fields, "source", place, stem),
        language=_optional_text(fields, "lang" if "lang" in fields else "language", place, ""),
        kind=kind,
        symmetric=_switch(fields, "symmetric", place, kind in SYMMETRIC_KINDS),
        in_batch=_switch(fields, "in_batch", place, True),
    )


def _kind(fields: dict[str, object], place: str) -> str:
    kind = _optional_text(fields, "kind", place, "plain")
    if kind not in KINDS:
        raise BrokenRecord(f"{place}: unknown kind {kind!r}; {nearest(kind, KINDS)}")
    return kind


def _texts(value: object, place: str, name: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return (checked_text(value, place, name),)
    if not isinstance(value, list):
        raise BrokenRecord(f"{place}: {name} must be a string or a list of strings, got {_type_name(value)}")
    return tuple(checked_text(text, place, f"{name}[{i}]") for i, text in enumerate(value))


def _scores(fields: dict[str, object], place: str, n_positives: int, n_negatives: int) -> tuple[float, ...]:
    if "scores" not in fields:
        return ()
    values = fields["scores"]
    if not isinstance(values, list):
        raise BrokenRecord(f"{place}: scores must be a list of numbers, got {_type_name(values)}")
    if len(values) not in (1 + n_negatives, n_positives + n_negatives):
        positives = "1 positive" if n_positives == 1 else f"{n_positives} positives (or the first alone)"
        raise BrokenRecord(
            f"{place}: scores must be one per candidate: got {len(values)} for {positives} + {n_negatives} negatives"
        )
    return tuple(checked_number(value, place, f"scores[{i}]") for i, value in enumerate(values))


def checked_number(value: object, place: str, name: str) -> float:
    """Return a finite number as float; a BrokenRecord names the field otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BrokenRecord(f"{place}: {name} must be a number, got {_type_name(value)}")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond float64
        number = math.inf
    if not math.isfinite(number):
        raise BrokenRecord(f"{place}: {name} must be a finite number, got {number}")
    return number


def _optional_text(fields: dict[str, object], key: str, place: str, default: str) -> str:
    return checked_text(fields[key], place, key) if key in fields else default


def _identity(fields: dict[str, object], place: str, default: str) -> str:
    value = fields.get("id")
    whole = isinstance(value, int) and not isinstance(value, bool)  # as many files have it
    return str(value) if whole else _optional_text(fields, "id", place, default)


def _switch(fields: dict[str, object], key: str, place: str, default: bool) -> bool:
    value = fields.get(key, default)
    if not isinstance(value, bool):
        raise BrokenRecord(f"{place}: {key} must be true or false, got {_type_name(value)}")
    return value


def _refuse_unknown(fields: dict[str, object], known: Collection[str], place: str, *, where: str = "") -> None:
    for key in fields:
        if key not in known:
            raise BrokenRecord(f"{place}: unknown field {where}{key}; {nearest(key, known)}")


def _type_name(value: object) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def stem_of(path: Path) -> str:
    """Return the name of a file without its endings, by which its records are called."""
    return plain_name(path).removesuffix(".jsonl")
