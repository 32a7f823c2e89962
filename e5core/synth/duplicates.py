"""Which texts are the same: within the store, nearly within it, and in evaluation sets.

Texts are compared by hashes of their normal form, in which letter case, width and white space do not count. The paper
drops exact duplicates and looks for test texts in its data by such a comparison (arXiv 2401.00368, appendix B).
"""

import json

import numpy as np

from e5core.contamination import digest, normalised, occur, text_hashes
from e5core.records import RESPONSE_KEYS

RUN = 5  # characters of a piece that near-duplicates are compared by
N_BANDS, N_ROWS = 12, 8  # see near_hashes


def record_hash(fields: dict[str, object]) -> bytes:
    """Return 16 bytes, which two records share if all their texts have the same normal forms."""
    return digest(json.dumps([normalised(text) for text in _response(fields).values()]), 16)


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
    return [int.from_bytes(digest(f"{i}{band.tolist()}", 8), "big") for i, band in enumerate(least)]


def contaminated(fields: dict[str, object], hashes: np.ndarray) -> str:
    """Return the key of the first text of a record that occurs in the evaluation sets; "" where none does.

    fields: a record's line.  hashes: (n,) uint64, of contamination.evaluation_hashes.
    Labels of a classification are passed over: to name a class as the test set does gives nothing away.
    """
    passed_over = RESPONSE_KEYS["long_short"][1:] if fields["kind"] == "long_short" else ()
    for key, text in _response(fields).items():
        if key not in passed_over and occur(text_hashes([text]), hashes)[0]:
            return key
    return ""


def _response(fields: dict[str, object]) -> dict[str, str]:
    response = fields["response"]
    assert isinstance(response, dict)
    return response


def _mixed(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit numbers, one to one (the last steps of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
