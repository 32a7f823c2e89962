"""Which texts of training data occur in evaluation sets.

Texts are compared by hashes of their normal form, in which letter case, width and white space do not count. The paper
looks for test texts in its data by such a comparison (arXiv 2401.00368, appendix B). It imports no torch.
"""

import csv
import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from e5core.config import read_json
from e5core.records import Record, parse_object, read_lines


@dataclass(frozen=True, slots=True)
class Found:
    """A text of a record that an evaluation set has too."""

    record: str  # its id
    side: str  # query, positive or negative
    text: str


@dataclass(slots=True)
class Overlap:
    """What training records share with one evaluation set."""

    n_records: int = 0  # with at least one text of the set
    n_texts: dict[str, int] = field(default_factory=lambda: {"query": 0, "positive": 0, "negative": 0})  # by side
    examples: list[Found] = field(default_factory=list)  # the first ones


def find_overlap(records: Iterable[Record], folders: Sequence[Path], *, n_examples: int = 5) -> dict[str, Overlap]:
    """Look for the texts of evaluation sets in training records, which are read once and not kept.

    folders: one per set, as evaluation_hashes reads them.  n_examples: how many to keep of each set.
    The labels of a classification (long_short) are passed over: to name a class as the test set does gives nothing
    away. A set's ids and labels count as its texts, so look at the examples before you believe a count.
    Returns the overlap with each set, by its folder as given.
    Raises ValueError if a folder holds no text, or a broken file.
    """
    hashes = {str(folder): evaluation_hashes(folder) for folder in folders}
    overlaps = {name: Overlap() for name in hashes}
    for record in records:
        texts = list(_texts(record))
        values = text_hashes(text for _, text in texts)
        for name, overlap in overlaps.items():
            places = np.flatnonzero(occur(values, hashes[name]))
            overlap.n_records += len(places) > 0
            for side, text in (texts[place] for place in places):
                overlap.n_texts[side] += 1
                if len(overlap.examples) < n_examples:
                    overlap.examples.append(Found(record.id, side, text))
    return overlaps


def _texts(record: Record) -> Iterator[tuple[str, str]]:
    yield "query", record.query
    if record.kind != "long_short":
        yield from (("positive", text) for text in record.positives)
        yield from (("negative", text) for text in record.negatives)


def normalised(text: str) -> str:
    """Return a text's normal form for comparison: NFKC, letter case folded, no white space."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_hash(text: str) -> int:
    """Return 64 bits of a text's normal form."""
    return int.from_bytes(digest(normalised(text), 8), "big")


def text_hashes(texts: Iterable[str]) -> np.ndarray:
    """Return the text_hash of each: (n,) uint64."""
    return np.fromiter(map(text_hash, texts), dtype=np.uint64)


def digest(text: str, size: int) -> bytes:
    """Return `size` bytes of a text's hash."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).digest()


def evaluation_hashes(folder: Path) -> np.ndarray:
    """Read every text of the evaluation sets below a folder, or of one file.

    Texts are all strings in .jsonl, .jsonl.gz and .json, the cells of .tsv and .csv and the lines of .txt; of a
    document, "title" and "text" count one by one and joined by a space. Eight bytes a text stay in memory.
    Returns (n,) uint64, rising, each once: their text_hash.
    Raises ValueError if the folder holds none, or a broken file.
    """
    readers = {".jsonl": _json_lines, ".json": _json_file, ".tsv": _cells, ".csv": _csv_cells, ".txt": _lines}
    parts: list[np.ndarray] = []
    for path in [folder] if folder.is_file() else sorted(folder.rglob("*")):
        reader = _json_lines if path.name.endswith(".jsonl.gz") else readers.get(path.suffix)
        if reader is not None and path.is_file():
            texts = (text for text in reader(path) if text.strip())
            parts.append(np.unique(text_hashes(texts)))
    hashes = np.unique(np.concatenate(parts)) if parts else np.empty(0, dtype=np.uint64)
    if not len(hashes):
        raise ValueError(f"{folder} holds no text of an evaluation set; give a folder of .jsonl, .tsv, .csv or .txt")
    return hashes


def occur(values: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Look up text hashes.  values: (n,) uint64.  hashes: (m,) uint64, rising, m >= 1.  Returns (n,) bool."""
    places = np.minimum(np.searchsorted(hashes, values), len(hashes) - 1)
    return hashes[places] == values


def _json_lines(path: Path) -> Iterator[str]:
    for line, raw in read_lines(path):
        yield from _strings(parse_object(raw, f"{path}:{line}"))


def _json_file(path: Path) -> Iterator[str]:
    yield from _strings(read_json(path))


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
        if isinstance(value.get("title"), str) and isinstance(value.get("text"), str):
            yield f"{value['title']} {value['text']}"


def _cells(path: Path) -> Iterator[str]:
    for line in _lines(path):
        yield from line.rstrip("\r\n").split("\t")


def _csv_cells(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        try:
            for row in csv.reader(file):
                yield from row
        except csv.Error as error:
            raise ValueError(f"{path}: not CSV ({error}); save it as .tsv or .jsonl") from error


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        yield from file
