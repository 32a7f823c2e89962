"""A store of records on disk: rows joined, checked and decompressed once, read by their number without being loaded.

A store is a folder: rows.jsonl (a record a line), offsets.npy (n + 1 int64: where each line begins) and store.json
(what it was made of: the source's settings, and size, time and SHA-256 of every file). Both big files are mapped into
memory, so any number of rows costs the memory of the pages in use, which all ranks of a machine share. It appears
whole, by a rename, or not at all; a build that was stopped begins again.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import numpy as np

from e5core.config import read_json
from e5core.records import Record
from e5core.sources import Notes, Source, files_of, format_of, read_source

VERSION = 1
FIELDS = tuple(field.name for field in fields(Record))


class StoredRows(Sequence[Record]):
    """The records of a store."""

    def __init__(self, folder: Path) -> None:
        """Map a store's files.  Raises ValueError where they are not as they were written."""
        self.made_of = read_json(folder / "store.json")
        offsets = np.load(folder / "offsets.npy", mmap_mode="r", allow_pickle=False)
        n_bytes = (folder / "rows.jsonl").stat().st_size
        if self.made_of.get("version") != VERSION:
            raise ValueError(f"{folder} is a store of another version; build it again")
        if len(offsets) != self.made_of["n_rows"] + 1 or int(offsets[-1]) != n_bytes:
            raise ValueError(f"{folder} is damaged: its files have other sizes than were written; build it again")
        self._offsets = offsets
        self._rows = np.memmap(folder / "rows.jsonl", np.uint8, mode="r")

    @property
    def digest(self) -> str:
        """Hash of all rows."""
        return self.made_of["digest"]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> Record:
        if not 0 <= row < len(self):
            raise IndexError(row)
        first, last = self._offsets[row : row + 2]
        values = json.loads(self._rows[first:last].tobytes())
        listed = (tuple(value) if isinstance(value, list) else value for value in values)
        return Record(**dict(zip(FIELDS, listed, strict=True)))


def store_folder(store: Path, source: Source) -> Path:
    """Return the folder of a source's store among those in `store`."""
    key = json.dumps([source.path, source.format, source.split])
    name = Path(source.path).name.partition(".")[0]
    return store / f"{name}-{hashlib.blake2b(key.encode(), digest_size=4).hexdigest()}"


def build_store(
    folder: Path, source: Source, *, skip_broken: bool, show: Callable[[Iterator[Record]], Iterator[Record]]
) -> Notes:
    """Write a source's store, in constant memory.

    show: passes the records on, and shows people how far it is.
    Returns what was left out.  Raises BrokenRecord, OSError or ValueError as read_source does; the folder is then as
    it was.
    """
    notes, files = Notes(skip_broken=skip_broken), [_describe(path) for path in files_of(source)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        new, spool = Path(temporary, "store"), Path(temporary, "spool")
        new.mkdir()
        spool.mkdir()
        n_rows, digest = _write_rows(new, show(read_source(source, spool, notes)))
        made_of = {
            "version": VERSION,
            "n_rows": n_rows,
            "digest": digest,
            "source": _settings(source),
            "format": format_of(source),
            "skip_broken": skip_broken,
            "skipped": len(notes.skipped),
            "without_positive": notes.n_without_positive,
            "files": files,
        }
        (new / "store.json").write_text(json.dumps(made_of, indent=2), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        new.rename(folder)
    return notes


def _write_rows(folder: Path, records: Iterator[Record]) -> tuple[int, str]:
    """Write rows.jsonl and offsets.npy.  Returns the number of rows and their digest."""
    n_rows, at, digest = 0, 0, hashlib.blake2b(digest_size=16)
    raw = folder / "offsets.raw"
    with (folder / "rows.jsonl").open("wb") as rows, raw.open("wb") as offsets:
        offsets.write(np.int64(0).tobytes())
        for record in records:
            line = json.dumps(astuple(record), ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
            rows.write(line)
            digest.update(line)
            at, n_rows = at + len(line), n_rows + 1
            offsets.write(np.int64(at).tobytes())
    with raw.open("rb") as offsets, (folder / "offsets.npy").open("wb") as file:
        header = {"descr": np.dtype(np.int64).str, "fortran_order": False, "shape": (n_rows + 1,)}
        np.lib.format.write_array_header_1_0(file, header)
        shutil.copyfileobj(offsets, file, 1 << 20)
    raw.unlink()
    return n_rows, digest.hexdigest()


def stale(rows: StoredRows, source: Source, *, skip_broken: bool) -> str:
    """Say why a store no longer is its source; "" where it is.

    Sources that are not here (a store may be copied alone) are not compared; a file of the same size and time is taken
    for the same, others are hashed.
    """
    made_of = rows.made_of
    if made_of["source"] != _settings(source):
        return f"it was built from {made_of['source']}"
    if made_of["skip_broken"] and not skip_broken:
        return f"{made_of['skipped']} broken rows were left out of it, and data.skip_broken is false"
    if not Path(source.path).exists():
        return ""
    known = {described["path"]: described for described in made_of["files"]}
    found = [str(path) for path in files_of(source)]
    if set(found) != set(known):
        return f"the source's files are not those it was built from: {', '.join(sorted(set(found) ^ set(known))[:3])}"
    for name, described in known.items():
        status = Path(name).stat()
        if (status.st_size, status.st_mtime_ns) == (described["n_bytes"], described["mtime_ns"]):
            continue
        if status.st_size != described["n_bytes"] or _describe(Path(name))["sha256"] != described["sha256"]:
            return f"{name} has changed since"
    return ""


def _settings(source: Source) -> dict[str, str]:
    return {"path": source.path, "format": source.format, "split": source.split}


def _describe(path: Path) -> dict[str, Any]:
    status = path.stat()
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": str(path), "n_bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha256}
