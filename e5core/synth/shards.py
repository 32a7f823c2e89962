"""A growing list of lines in numbered files: FOLDER/00000.jsonl, 00001.jsonl, ...

Lines are only ever appended, so whoever reads may trust every line that ends in a newline: e5core.manifest, say, for a
training run that follows a growing store.
"""

import os
from collections.abc import Iterator
from pathlib import Path

Place = tuple[int, int, int]  # shard, first byte, bytes


class Stream:
    """One list of lines."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        """shard_bytes: a file of this size or more is not appended to."""
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._limit = shard_bytes
        self._files: dict[int, int] = {}  # descriptors by shard
        self._current = max(self.shards(), default=0)

    def path(self, shard: int) -> Path:
        """Return a shard's file."""
        return self._folder / f"{shard:05d}.jsonl"

    def shards(self) -> list[int]:
        """Return the numbers of the files that are there, in order."""
        return sorted(int(path.stem) for path in self._folder.glob("*.jsonl") if path.stem.isdigit())

    def size(self, shard: int) -> int:
        """Return a file's bytes; 0 if it is not there."""
        path = self.path(shard)
        return path.stat().st_size if path.is_file() else 0

    def append(self, line: bytes) -> Place:
        """Write a line, newline included, behind the last one, whole or not at all.

        Returns its place.  Raises OSError as when the disk is full; the file is then as it was.
        """
        start = os.fstat(self._descriptor(self._current)).st_size
        if start >= self._limit:
            os.fsync(self._descriptor(self._current))
            self._current, start = self._current + 1, 0
        file, rest = self._descriptor(self._current), line
        try:
            while rest:
                rest = rest[os.write(file, rest) :]
        except OSError:
            os.ftruncate(file, start)
            raise
        return self._current, start, len(line)

    def read(self, shard: int, start: int, size: int) -> bytes:
        """Return the bytes at a place."""
        return os.pread(self._descriptor(shard), size, start)

    def repaired(self, shard: int, start: int) -> Iterator[tuple[Place, bytes]]:
        """Yield place and bytes of every whole line from byte start, then cut off what follows the last of them."""
        with self.path(shard).open("rb") as file:
            file.seek(start)
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                yield (shard, start, len(raw)), raw
                start += len(raw)
        os.truncate(self.path(shard), start)

    def sync(self) -> None:
        """Bring the file that is being written to the disk."""
        if self._current in self._files:
            os.fsync(self._files[self._current])

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _descriptor(self, shard: int) -> int:
        if shard not in self._files:
            self._files[shard] = os.open(self.path(shard), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        return self._files[shard]
