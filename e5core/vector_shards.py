"""Vectors written shard by shard into one .npy: what was cut off goes on behind its last whole shard.

While V.npy is made, .partial_V.npy holds its header and the shards so far, and .partial_V.npy.jsonl says what they are
of (first line) and then, once a shard is on the disk, its rows and the hash of its bytes. At the end the file is
renamed, so nothing is copied and no second disk is needed. A cut-off shard and one whose bytes have changed are made
again, with all behind it. Where there are two files a cut can fall between their renames: a last line of the journal
says that they have begun, and the next call takes back what has its name already. V.npy, of an earlier call too, is
there only while its own scales are.

float32 and float16 hold the numbers themselves. int8 holds round(x / s), one scale a row, s = max|x| / 127, float32
in V.scales.npy, so that a number is off by s / 2 at most:

    vectors = np.load("V.npy", mmap_mode="r")[rows] * np.load("V.scales.npy", mmap_mode="r")[rows, None]
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Self

import numpy as np

from e5core.config import write_whole

Form = Literal["float32", "float16", "int8"]
_DESCRIPTIONS = {"float32": "<f4", "float16": "<f2", "int8": "|i1"}
_NAMING = {"naming": True}  # the journal's line before the renames


def scales_path(output: Path) -> Path:
    """Return where the scales of int8 vectors lie: V.scales.npy beside V.npy."""
    return output.with_suffix(".scales.npy")


def quantise(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round rows to whole numbers from -127 to 127, each by its own scale.

    vectors: (n, D) float32, finite.  Returns (n, D) int8 and (n,) float32 scales; a row of zeros has the scale 1.
    """
    largest = np.abs(vectors).max(axis=1)
    scales = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    return np.rint(vectors / scales[:, None]).clip(-127, 127).astype(np.int8), scales


class VectorFile:
    """A .npy of (n, dim) that grows by whole shards; a context, which keeps them where it is left by an error."""

    def __init__(self, output: Path, shape: tuple[int, int], form: Form, made_of: Mapping[str, object]) -> None:
        """Begin it, or go on with what was cut off.

        made_of: what decides the vectors, JSON values by their names for people.
        Raises ValueError where what was cut off was of other things, OSError.
        """
        self.n_done, self._form, self._whole = 0, form, False
        parts = [(output, _DESCRIPTIONS[form], shape)]
        parts += [(scales_path(output), "<f4", shape[:1])] if form == "int8" else []
        self._ends = [(path.with_name(f".partial_{path.name}"), path) for path, _, _ in parts]
        self._journal = output.with_name(f".partial_{output.name}.jsonl")
        first = {"shape": list(shape), "vectors": form, **made_of}
        known = self._known(first, output)
        self._files: list[BinaryIO] = []
        self._open = ExitStack()
        for (partial, _), (_, described, whole) in zip(self._ends, parts, strict=True):
            # written, not mapped: a full disk raises OSError instead of killing us
            self._files.append(self._open.enter_context(open(partial, "r+b" if known else "w+b")))
            header = {"descr": described, "fortran_order": False, "shape": whole}
            np.lib.format.write_array_header_1_0(self._files[-1], header)
        row_bytes = [
            np.dtype(described).itemsize * (shape[1] if len(whole) > 1 else 1) for _, described, whole in parts
        ]
        kept = self._verified(known[1:], row_bytes)
        for file in self._files:
            file.truncate()
        write_whole(self._journal, "".join(json.dumps(line) + "\n" for line in (first, *kept)))

    def append(self, vectors: np.ndarray) -> None:
        """Put the next rows, (n, dim) float32, on the disk.  Raises OSError."""
        arrays = quantise(vectors) if self._form == "int8" else (vectors.astype(_DESCRIPTIONS[self._form]),)
        digest = hashlib.blake2b(digest_size=16)
        for file, array in zip(self._files, arrays, strict=True):
            data = array.astype(array.dtype.newbyteorder("<")).tobytes()
            digest.update(data)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._note({"rows": len(vectors), "blake2b": digest.hexdigest()})
        self.n_done += len(vectors)

    def finish(self) -> None:
        """Give the files their names, after their last row: the scales before the vectors."""
        self._whole = True
        self._note(_NAMING)
        if len(self._ends) > 1:
            self._ends[0][1].unlink(missing_ok=True)
        for partial, path in reversed(self._ends):
            os.replace(partial, path)
        self._journal.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._open.close()  # which fails again on a full disk
        finally:
            if not self._whole and self.n_done == 0:
                for path in (self._journal, *(partial for partial, _ in self._ends)):
                    path.unlink(missing_ok=True)

    def _note(self, line: Mapping[str, object]) -> None:
        with open(self._journal, "a", encoding="utf-8") as journal:
            journal.write(json.dumps(line) + "\n")

    def _known(self, first: dict[str, object], output: Path) -> list[dict]:
        """Read the journal's whole lines; none where there is nothing to go on with."""
        if not self._journal.is_file():
            return []
        whole = self._journal.read_text(encoding="utf-8").rpartition("\n")[0]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except json.JSONDecodeError as error:
            raise ValueError(f"{self._journal} is damaged ({error}); delete it to begin {output} again") from error
        named = [(partial, path) for partial, path in self._ends if not partial.is_file()]
        naming = lines[-1:] == [_NAMING]
        different = [name for name in first if lines and lines[0].get(name) != first[name]]
        if named and (not naming or not all(path.is_file() for _, path in named)):
            return []
        if different and len(named) == len(self._ends):  # of a call that was cut off behind its last rename
            return []
        if different:
            listed = "; ".join(f"{name} was {lines[0].get(name)!r}, is {first[name]!r}" for name in different)
            raise ValueError(
                f"{output} was begun with other things: {listed}; give the same to go on, or delete {self._journal} to "
                "begin again"
            )
        for partial, path in named:
            os.replace(path, partial)
        return lines[:-1] if naming else lines

    def _verified(self, shards: list[dict], row_bytes: list[int]) -> list[dict]:
        """Return the shards whose bytes are as written, up to the first that is not, and stand behind the last."""
        kept = []
        for shard in shards:
            starts = [file.tell() for file in self._files]
            digest = hashlib.blake2b(digest_size=16)
            for file, n_bytes in zip(self._files, row_bytes, strict=True):
                digest.update(file.read(shard["rows"] * n_bytes))
            if digest.hexdigest() != shard["blake2b"]:
                for file, start in zip(self._files, starts, strict=True):
                    file.seek(start)
                break
            self.n_done += shard["rows"]
            kept.append(shard)
        for file in self._files:
            file.seek(file.tell())  # between reading and writing
        return kept
