"""What a folder of growing JSON-lines files held at a moment, so that it can be read again just so.

Files grow only behind their last line, as those of e5core.synth do, and a line is there once its newline is: whoever
writes may go on meanwhile. A Shard is the whole lines of one file and the hash of their bytes; later lines stand after
them and do not change it.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Shard:
    """The first lines of a file."""

    path: str
    n_bytes: int  # up to a newline
    digest: str  # hex blake2b of these bytes


def manifest(folder: Path) -> list[Shard]:
    """List the .jsonl files of a folder by name (hidden ones apart), each up to its last newline now."""
    return [_shard(path) for path in sorted(folder.glob("[!.]*.jsonl"))]


def added(folder: Path, known: Mapping[str, Shard]) -> list[Shard]:
    """List what a folder holds beyond known shards (by path): new files, and longer ones.

    Raises ValueError as `check` does for a known shard of the folder that has changed.
    """
    now = manifest(folder)
    for shard in set(known.values()) - set(now):
        if Path(shard.path).parent == folder:
            check(shard)
    return [shard for shard in now if known.get(shard.path) != shard]


def check(shard: Shard) -> None:
    """Raise ValueError naming the file unless it still begins with the shard's bytes."""
    path = Path(shard.path)
    if not path.is_file() or _shard(path, shard.n_bytes) != shard:
        raise ValueError(
            f"{path} no longer begins with the {shard.n_bytes:,} bytes that this run has read from it; lines may only "
            "be added: put the file back, or start a new run with another train.run"
        )


def new_lines(shard: Shard, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, bytes) for every line of a shard from byte `start` on that is not blank.

    Raises ValueError as `check` does, before the first line.
    """
    check(shard)
    end = 0
    with open(shard.path, "rb") as file:
        for line, raw in enumerate(file, start=1):
            end += len(raw)
            if end > shard.n_bytes:
                break
            if end > start and raw.strip():
                yield line, raw


def _shard(path: Path, limit: float = math.inf) -> Shard:
    """Hash the whole lines within the first `limit` bytes."""
    n_bytes, digest = 0, hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        for raw in file:
            if not raw.endswith(b"\n") or n_bytes + len(raw) > limit:
                break
            digest.update(raw)
            n_bytes += len(raw)
    return Shard(str(path), n_bytes, digest.hexdigest())
