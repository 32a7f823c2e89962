"""Which records make up each step: a pure function of (seed, step), so that a resumed run goes on exactly.

Every source gives `ratio` of its records to an epoch (1 = each once, 0.1 = a tenth drawn anew each epoch, 2 = each
twice: the paper's sample ratios, arXiv 2401.00368 Table 14), or its part by `weight` of an epoch as long as all sources
together. An epoch is one seeded permutation of these, or of batches of one source each (order.py); epochs follow one
another without a gap, so there is no incomplete last batch.

Sources are in memory, or in stores on disk where the config names a folder of them (row_store.py).

A source that is a folder may grow while the run goes on. What is in it is looked up when an epoch begins, and holds for
that epoch. A checkpoint keeps what each epoch begun so far took in, and a resumed run begins these as they were; one
that began after the checkpoint begins anew.
"""

import hashlib
import tempfile
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from e5core.distributed import ALONE, World, log, share
from e5core.manifest import Shard, added, new_lines
from e5core.order import HomogeneousOrder, ListedOrder, MixedOrder
from e5core.records import Record, parse_lines
from e5core.row_store import StoredRows, stale, store_folder
from e5core.sources import Notes, Source, format_of, is_growing, read_source


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The [data] table."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    skip_broken: bool = False  # leave out lines that cannot be read (each is named in the log) instead of stopping
    workers: Annotated[int, Field(ge=0, le=64)] = 0  # processes of each rank that build batches ahead; 0: none
    store: str = ""  # folder of the stores that `python -m e5core.data build` writes; "" = read the sources into memory

    def __post_init__(self) -> None:
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            missing = self.sources[weighted.index(False)].path
            raise ValueError(f"weight is for all sources or none: {missing} has none; give it one, or ratios to all")


class Folders:
    """The sources that are folders, and what entered from them at each epoch begun so far."""

    def __init__(
        self,
        paths: Sequence[Path | None],
        recorded: Sequence[list[Shard]],
        *,
        skip_broken: bool = False,
        world: World = ALONE,
    ) -> None:
        """paths: one per source, None for a file.  recorded: `epochs` of the run to go on with.

        world: whose rank 0 looks into the folders for all, since they may grow between two looks.
        """
        self.epochs: list[list[Shard]] = []  # files that were new at its beginning, or longer than before
        self._paths = paths
        self._recorded = recorded
        self._skip_broken = skip_broken
        self._world = world
        self._known: dict[str, Shard] = {}

    def enter(self) -> list[list[Record]]:
        """Begin the next epoch: as it was recorded, else with what is there now.

        Returns the records that each source gains; broken lines that were skipped are named in the log.
        Raises ValueError for an empty folder or a changed file, BrokenRecord.
        """
        epoch = len(self.epochs)
        folders = dict.fromkeys(path for path in self._paths if path is not None)
        if epoch < len(self._recorded):
            shards = self._recorded[epoch]
        else:
            looked = folders if self._world.is_main else ()
            found = [asdict(shard) for path in looked for shard in added(path, self._known)]
            shards = [Shard(**shard) for shard in share(found, self._world)[0]]
        gained: dict[Path | None, list[Record]] = {path: [] for path in self._paths}
        for shard in shards:
            records = self._read(shard)  # which refuses a file of a folder that is none any more
            gained[Path(shard.path).parent] += records
        if epoch == 0 and (empty := [str(path) for path in folders if not gained[path]]):
            raise ValueError(f"{empty[0]} holds no usable record in a whole line of a .jsonl file yet; wait for some")
        if epoch and (n_gained := sum(len(gained[path]) for path in folders)):
            log(f"epoch {epoch + 1} begins with {n_gained:,} new records from {len(shards)} files")
        self.epochs.append(shards)
        return [gained[path] for path in self._paths]

    def _read(self, shard: Shard) -> list[Record]:
        before = self._known.get(shard.path)
        lines = new_lines(shard, before.n_bytes if before else 0)
        records, skipped = parse_lines(lines, Path(shard.path), skip_broken=self._skip_broken)
        for message in skipped:
            log(f"skipped {message}")
        self._known[shard.path] = shard
        return records


class Mixture:
    """The records of a run and their order."""

    def __init__(
        self,
        sources: Sequence[Sequence[Record]],
        ratios: Sequence[float],
        seed: int,
        folders: Folders | None = None,
        *,
        settings: Sequence[Source] = (),
        homogeneous: int | None = None,
        scored: bool = False,
    ) -> None:
        """sources: the files' records or stores, nothing for a folder.  folders: what gives the others theirs.

        settings: the sources' tables, for weight, tasks and in_batch.  homogeneous: the size of batches of one source.
        scored: refuse records without a teacher's scores.
        """
        self.seed = seed
        self._sources = [rows if isinstance(rows, StoredRows) else list(rows) for rows in sources]
        self._n_fixed = [len(rows) for rows in sources]  # later ones are the folders'
        self._ratios = ratios
        self._settings = settings
        self._folders = folders
        self._scored = scored
        for rows in self._sources:
            self._check_scores(rows)
        if homogeneous is not None:
            self._order = HomogeneousOrder(seed, homogeneous)
        elif any(isinstance(rows, StoredRows) for rows in sources):
            self._order = MixedOrder(seed)
        else:
            self._order = ListedOrder(seed)
        self.begin_epoch()

    @property
    def n_records(self) -> int:
        """Number of records there are now."""
        return sum(map(len, self._sources))

    @property
    def epoch_size(self) -> int:
        """Number of records that the newest epoch draws."""
        return sum(self._counts())

    @property
    def shares(self) -> list[tuple[int, int]]:
        """How many records each source has now, and how many of them the newest epoch draws."""
        return list(zip(map(len, self._sources), self._counts(), strict=True))

    @cached_property
    def digest(self) -> str:
        """Hash of the records that are the same at every epoch."""
        digest = hashlib.blake2b(digest_size=16)
        for source, (rows, n) in enumerate(zip(self._sources, self._n_fixed, strict=True)):
            if isinstance(rows, StoredRows):
                setting = self._settings[source] if self._settings else None
                digest.update(repr((rows.digest, setting and (setting.tasks, setting.in_batch))).encode())
                continue
            for row in range(n):
                digest.update(repr(self._record(source, row)).encode())
        return digest.hexdigest()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the digest, and what each epoch begun took in from folders (JSON values)."""
        epochs = self._folders.epochs if self._folders else []
        return {"data": self.digest, "epochs": [[asdict(shard) for shard in epoch] for epoch in epochs]}

    def batch(self, step: int, size: int) -> list[Record]:
        """Return the records of step `step` (from 0) in order; begins the epochs that it reaches.

        size: of a homogeneous mixture at most its batches' own: the first so many of the step's.
        """
        while self._order.starts[-1] < self._order.end(step, size):
            self.begin_epoch()
        return [self._record(source, row) for source, row in self._order.rows(step, size)]

    def is_begun(self, step: int, size: int) -> bool:
        """Tell whether `batch` would give this step without a look into a folder, which may grow until it is due."""
        return self._folders is None or self._order.starts[-1] >= self._order.end(step, size)

    def n_epochs(self, n_drawn: int) -> float:
        """Return how many epochs the first n_drawn records are (n_drawn >= 1, all of them given out by `batch`)."""
        starts = self._order.starts
        epoch = bisect_right(starts, n_drawn - 1) - 1
        first, end = starts[epoch : epoch + 2]
        return epoch + (n_drawn - first) / (end - first)

    def begin_epoch(self) -> None:
        """Begin the next epoch, with what the folders gained."""
        for source, gained in enumerate(self._folders.enter() if self._folders else []):
            if gained:
                self._check_scores(gained)
                self._sources[source] += gained
        self._order.begin_epoch([len(rows) for rows in self._sources], self._counts())

    def _check_scores(self, rows: Sequence[Record]) -> None:
        """Raise ValueError for the first record of which a candidate has no score, where they are asked for."""
        bare = next((record for record in rows if not record.is_scored), None) if self._scored else None
        if bare is not None:
            raise ValueError(
                f"record {bare.id!r} of {bare.source} has {len(bare.scores)} teacher scores for {len(bare.positives)} "
                f"positives and {len(bare.negatives)} negatives, and loss.distillation needs one for each; give them "
                "(`scores`), or leave the source out"
            )

    def _counts(self) -> list[int]:
        """Return how many records each source gives to an epoch."""
        lengths = [len(rows) for rows in self._sources]
        weights = [setting.weight for setting in self._settings if setting.weight is not None]
        if weights:
            parts = [sum(lengths) * weight / sum(weights) for weight in weights]
        else:
            parts = [n * ratio for n, ratio in zip(lengths, self._ratios, strict=True)]
        return [max(1, round(part)) for part in parts]

    def _record(self, source: int, row: int) -> Record:
        record = self._sources[source][row]
        return self._settings[source].dress(record, row) if self._settings else record


def load_mixture(
    config: DataConfig,
    seed: int,
    epochs: Sequence[Sequence[Mapping[str, Any]]] = (),
    world: World = ALONE,
    homogeneous: int | None = None,
    scored: bool = False,
) -> tuple[Mixture, list[str]]:
    """Read all sources.  Returns the mixture and a message for each broken line of a file that was skipped.

    epochs: of the state() of the run to go on with.  world: its ranks begin each epoch together, in `batch`.
    homogeneous: the size of batches of one source each; None: mixed ones.  scored: all candidates must have a
    teacher's score; a later epoch is asked for them when it begins.
    Raises BrokenRecord (a line), FileNotFoundError (a source) or ValueError (a source without records, a stale store,
    a record without scores, or a file of a folder that has changed since the run read it).
    """
    sources, paths = [], []
    notes = Notes(skip_broken=config.skip_broken)
    for source in config.sources:
        stored = stored_rows(config, source)
        growing = stored is None and is_growing(source)
        paths.append(Path(source.path) if growing else None)
        if stored is None:
            stored = [] if growing else _read(source, notes)
        sources.append(stored)
    recorded = [[Shard(**shard) for shard in epoch] for epoch in epochs]
    folders = Folders(paths, recorded, skip_broken=config.skip_broken, world=world) if any(paths) else None
    ratios = [source.ratio for source in config.sources]
    chosen = {"settings": config.sources, "homogeneous": homogeneous, "scored": scored}
    mixture = Mixture(sources, ratios, seed, folders, **chosen)
    for _ in recorded[1:]:
        mixture.begin_epoch()
    return mixture, notes.skipped


def stored_rows(config: DataConfig, source: Source) -> StoredRows | None:
    """Open a source's store; None where the config names no folder of stores or this one was not built.

    Raises ValueError for a store that is no longer its source's.
    """
    folder = store_folder(Path(config.store), source)
    if not config.store or not folder.is_dir():
        return None
    rows = StoredRows(folder)
    if why := stale(rows, source, skip_broken=config.skip_broken):
        raise ValueError(f"the store {folder} is stale: {why}; run python -m e5core.data build on the config again")
    gone = "" if Path(source.path).exists() else ", whose files are not here to compare"
    log(f"{source.path}: {len(rows):,} rows from the store {folder}{gone}")
    return rows


def _read(source: Source, notes: Notes) -> list[Record]:
    """Read a source into memory, and say in the log what form it has, unless it is the usual one."""
    before = notes.n_without_positive
    with tempfile.TemporaryDirectory() as spool:
        records = list(read_source(source, Path(spool), notes))
    if (name := format_of(source)) != "records":
        left_out = notes.n_without_positive - before
        log(f"{source.path}: {len(records):,} rows of the format {name}; {left_out:,} without a positive left out")
    return records
