"""Which texts are the same: within the store, nearly within it, and in evaluation sets.

Texts are compared by hashes of their normal form, in which letter case, width and white space do not count. The paper
drops exact duplicates and looks for test texts in its data by such a comparison (arXiv 2401.00368, appendix B).
"""

import csv
import hashlib
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from e5core.config import read_json
from e5core.records import RESPONSE_KEYS, parse_object, read_lines

RUN = 5  # characters of a piece that near-duplicates are compared by
N_BANDS, N_ROWS = 12, 8  # see near_hashes


def normalised(text: str) -> str:
    """Return a text's normal form for comparison: NFKC, letter case folded, no white space."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_hash(text: str) -> int:
    """Return 64 bits of a text's normal form."""
    return int.from_bytes(_digest(normalised(text), 8), "big")


def record_hash(fields: dict[str, object]) -> bytes:
    """Return 16 bytes, which two records share if all their texts have the same normal forms."""
    return _digest(json.dumps([normalised(text) for text in _response(fields).values()]), 16)


def near_hashes(fields: dict[str, object]) -> list[int]:
    """Return N_BANDS numbers of 64 bits; of near-duplicates, at least one is the same.

    MinHash over the pieces of RUN characters of all texts: records that share a part J of their pieces share a number
    with probability 1 - (1 - J**N_ROWS)**N_BANDS, which is 0.05 for J = 0.5, 0.51 for 0.7, 0.89 for 0.8, 1.00 for 0.9.
    """
    form = "\n".join(normalised(text) for text in _response(fields).values())
    points = np.frombuffer(form.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    pieces = np.zeros(max(1, len(points) - RUN + 1), dtype=np.uint64)
    for i in range(min(RUN, len(points))):
        pieces = pieces * np.uint64(0x100000001B3) + points[i : i + len(pieces)]
    pieces = _mixed(np.unique(pieces))
    factors = _mixed(np.arange(1, N_BANDS * N_ROWS + 1, dtype=np.uint64)) | np.uint64(1)
    least = np.array([(pieces * factor).min() for factor in factors]).reshape(N_BANDS, N_ROWS)
    return [int.from_bytes(_digest(f"{i}{band.tolist()}", 8), "big") for i, band in enumerate(least)]


def evaluation_hashes(folder: Path) -> np.ndarray:
    """Read every text of the evaluation sets below a folder.

    Texts are all strings in .jsonl, .jsonl.gz and .json, the cells of .tsv and .csv and the lines of .txt; of a
    document, "title" and "text" count one by one and joined by a space. Eight bytes a text stay in memory.
    Returns (n,) uint64, rising, each once: their text_hash.
    Raises ValueError if the folder holds none, or a broken file.
    """
    readers = {".jsonl": _json_lines, ".json": _json_file, ".tsv": _cells, ".csv": _csv_cells, ".txt": _lines}
    parts: list[np.ndarray] = []
    for path in sorted(folder.rglob("*")):
        reader = _json_lines if path.name.endswith(".jsonl.gz") else readers.get(path.suffix)
        if reader is not None and path.is_file():
            texts = (text for text in reader(path) if text.strip())
            parts.append(np.unique(np.fromiter(map(text_hash, texts), dtype=np.uint64)))
    hashes = np.unique(np.concatenate(parts)) if parts else np.empty(0, dtype=np.uint64)
    if not len(hashes):
        raise ValueError(f"{folder} holds no text of an evaluation set; give a folder of .jsonl, .tsv, .csv or .txt")
    return hashes


def contaminated(fields: dict[str, object], hashes: np.ndarray) -> str:
    """Return the key of the first text of a record that occurs in the evaluation sets; "" where none does.

    fields: a record's line.  hashes: (n,) uint64, of evaluation_hashes.
    Labels of a classification are passed over: to name a class as the test set does gives nothing away.
    """
    passed_over = RESPONSE_KEYS["long_short"][1:] if fields["kind"] == "long_short" else ()
    for key, text in _response(fields).items():
        if key not in passed_over:
            value = np.uint64(text_hash(text))
            place = int(np.searchsorted(hashes, value))
            if place < len(hashes) and hashes[place] == value:
                return key
    return ""


def _digest(text: str, size: int) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).digest()


def _response(fields: dict[str, object]) -> dict[str, str]:
    response = fields["response"]
    assert isinstance(response, dict)
    return response


def _mixed(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit numbers, one to one (the last steps of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


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
