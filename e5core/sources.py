"""Sources of training records: files and folders in any layout of formats.py and joined.py, read as a stream.

Each row is checked once. A broken one is named by file and line, and stops the reading or is left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from e5core.formats import FORMATS, recognise
from e5core.joined import LAYOUTS, joined_rows, parts, recognise_folder
from e5core.records import BrokenRecord, Record, record_of, stem_of

FormatName = Literal[
    "auto", "records", "flagembedding", "tevatron", "e5", "triplets", "dpr", "triples-tsv",
    "beir", "msmarco", "miracl", "mrtydi", "tevatron-ids",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One [[data.sources]] table."""

    # a file in any layout of formats.py, plain, .gz or .zst; a folder in one of joined.py; or a folder of .jsonl files
    # of records that may grow during the run, as e5core.synth's records/ does: an epoch has the whole lines at its
    # beginning
    path: str
    format: FormatName = (
        "auto"  # auto: told by the files; a folder and a file's format: all its files of such an ending
    )
    split: str = "train"  # of a folder of corpus and queries: which judgements
    ratio: Annotated[float, Field(gt=0, le=100)] = 1.0  # of its records per epoch
    # instead of ratio, in all sources or in none: this source's part of an epoch, as long as all sources together
    weight: Annotated[float, Field(gt=0)] | None = None
    tasks: tuple[str, ...] = ()  # instructions in place of the rows' own, row by row in turn; [""]: none
    in_batch: bool = True  # false: its queries see only their own candidates, which are offered to nobody else
    url: str = ""  # where to get it, for people

    def dress(self, record: Record, row: int) -> Record:
        """Return the source's record number `row` with the source's own instruction and switch."""
        if not self.tasks and self.in_batch:
            return record
        task = self.tasks[row % len(self.tasks)] if self.tasks else record.task
        return replace(record, task=task, in_batch=record.in_batch and self.in_batch)


class Notes:
    """What a reading left out."""

    def __init__(self, *, skip_broken: bool) -> None:
        self.skipped: list[str] = []  # "FILE:LINE: why"
        self.n_without_positive = 0
        self._skip_broken = skip_broken

    def broken(self, error: BrokenRecord) -> None:
        """Keep the message of a broken row, or raise it."""
        if not self._skip_broken:
            raise error
        self.skipped.append(str(error))


def format_of(source: Source) -> str:
    """Return the source's format, told by its files where it is "auto".  Raises OSError, ValueError."""
    path = Path(source.path)
    if source.format != "auto":
        return source.format
    return (recognise_folder(path) or "records") if path.is_dir() else recognise(path)


def is_growing(source: Source) -> bool:
    """Tell whether the source is a folder of records, which may grow while a run goes on."""
    return Path(source.path).is_dir() and format_of(source) == "records"


def files_of(source: Source) -> list[Path]:
    """List the files of a source.  Raises FileNotFoundError for a missing one."""
    path, name = Path(source.path), format_of(source)
    if name in LAYOUTS:
        return [file for files in parts(path, name, source.split) for file in files]
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        return [path]
    endings = {"dpr": [".json"], "triples-tsv": [".tsv"], "triplets": [".jsonl", ".csv", ".parquet"]}
    found = [
        file
        for ending in endings.get(name, [".jsonl"])
        for file in path.glob(f"[!.]*{ending}*")
        if file.name.endswith((ending, f"{ending}.gz", f"{ending}.zst"))
    ]
    if not found:
        raise FileNotFoundError(f"{path} holds no file of the format {name}")
    return sorted(found)


def read_source(source: Source, spool: Path, notes: Notes) -> Iterator[Record]:
    """Yield a source's records as its files have them, before `dress`.

    spool: an empty folder for what must be decompressed to be joined.  notes: takes what is left out.
    Raises BrokenRecord (unless the notes skip it), OSError; ValueError where there is no usable record.
    """
    name = format_of(source)
    if name in LAYOUTS:
        rows = _joined(source, name, spool, notes)
    else:
        rows = (record for file in files_of(source) for record in _rows(file, name, notes))
    empty = True
    for record in rows:
        empty = False
        yield record
    if empty:
        raise ValueError(
            f"{source.path} holds no usable record: {len(notes.skipped)} broken lines, {notes.n_without_positive} rows "
            "without a positive and no other; give a file with one"
        )


def _joined(source: Source, name: str, spool: Path, notes: Notes) -> Iterator[Record]:
    path = Path(source.path)
    for place, line, fields in joined_rows(path, name, source.split, spool, notes.broken):
        if fields is None:
            notes.n_without_positive += 1
            continue
        try:
            yield record_of(fields, place, stem=path.resolve().name, line=line)
        except BrokenRecord as error:
            notes.broken(error)


def _rows(path: Path, name: str, notes: Notes) -> Iterator[Record]:
    form, stem = FORMATS[name], stem_of(path)
    for line, row in form.rows(path):
        place = f"{path}:{line}"
        try:
            if isinstance(row, BrokenRecord):
                raise row
            fields = form.fields(row, place)
            if fields is None:
                notes.n_without_positive += 1
                continue
            yield record_of(fields, place, stem=stem, line=line)
        except BrokenRecord as error:
            notes.broken(error)
