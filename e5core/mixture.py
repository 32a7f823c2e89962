"""Which records make up each step: a pure function of (seed, step), so that a resumed run goes on exactly.

Every source gives `ratio` of its records to an epoch (1 = each once, 0.1 = a tenth drawn anew each epoch, 2 = each
twice: the paper's sample ratios, arXiv 2401.00368 Table 14). An epoch is one seeded permutation of these; epochs follow
one another without a gap, so there is no incomplete last batch.

A source that is a folder may grow while the run goes on. What is in it is looked up when an epoch begins, and holds for
that epoch. A checkpoint keeps what each epoch begun so far took in, and a resumed run begins these as they were; one
that began after the checkpoint begins anew.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from e5core.distributed import ALONE, World, log, share
from e5core.manifest import Shard, added, new_lines
from e5core.records import Record, parse_lines, read_records


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One [[data.sources]] table."""

    # JSON lines (.jsonl or .jsonl.gz): the paper's six kinds, or {task, query, pos, neg}; or a folder of such .jsonl
    # files that may grow during the run, as e5core.synth's records/ does: an epoch has the whole lines at its beginning
    path: str
    ratio: Annotated[float, Field(gt=0, le=100)] = 1.0  # of its records per epoch


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The [data] table."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    skip_broken: bool = False  # leave out lines that cannot be read (each is named in the log) instead of stopping


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
        self, sources: Sequence[Sequence[Record]], ratios: Sequence[float], seed: int, folders: Folders | None = None
    ) -> None:
        """sources: the files' records, nothing for a folder.  folders: what gives the others theirs."""
        self.records = [record for source in sources for record in source]
        self.seed = seed
        self._n_fixed = len(self.records)  # later ones are the folders'
        self._ratios = ratios
        self._folders = folders
        self._places = [np.arange(*bounds) for bounds in pairwise(np.cumsum([0, *map(len, sources)]))]  # in records
        self._lengths: list[list[int]] = []  # of each epoch begun: how many records each source has
        self._starts = [0]  # the first position of each epoch begun, and of the next one
        self._epoch: tuple[int, np.ndarray] | None = None  # the permutation of the epoch in hand
        self.begin_epoch()

    @property
    def epoch_size(self) -> int:
        """Number of records in the newest epoch."""
        return self._starts[-1] - self._starts[-2]

    @cached_property
    def digest(self) -> str:
        """Hash of the records that are the same at every epoch."""
        digest = hashlib.blake2b(digest_size=16)
        for record in self.records[: self._n_fixed]:
            digest.update(repr(record).encode())
        return digest.hexdigest()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the digest, and what each epoch begun took in from folders (JSON values)."""
        epochs = self._folders.epochs if self._folders else []
        return {"data": self.digest, "epochs": [[asdict(shard) for shard in epoch] for epoch in epochs]}

    def batch(self, step: int, size: int) -> list[Record]:
        """Return the records of step `step` (from 0) in order; begins the epochs that it reaches."""
        first = step * size
        return [self.records[self._index(position)] for position in range(first, first + size)]

    def n_epochs(self, n_drawn: int) -> float:
        """Return how many epochs the first n_drawn records are (n_drawn >= 1, all of them given out by `batch`)."""
        epoch = bisect_right(self._starts, n_drawn - 1) - 1
        first, end = self._starts[epoch : epoch + 2]
        return epoch + (n_drawn - first) / (end - first)

    def begin_epoch(self) -> None:
        """Begin the next epoch, with what the folders gained."""
        for source, gained in enumerate(self._folders.enter() if self._folders else []):
            first, last = len(self.records), len(self.records) + len(gained)
            self._places[source] = np.concatenate([self._places[source], np.arange(first, last)])
            self.records += gained
        self._lengths.append([len(places) for places in self._places])
        self._starts.append(self._starts[-1] + sum(self._counts(-1)))

    def _counts(self, epoch: int) -> list[int]:
        """Return how many records each source gives to an epoch."""
        return [max(1, round(n * ratio)) for n, ratio in zip(self._lengths[epoch], self._ratios, strict=True)]

    def _index(self, position: int) -> int:
        while position >= self._starts[-1]:
            self.begin_epoch()
        epoch = bisect_right(self._starts, position) - 1
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._permutation(epoch))
        return int(self._epoch[1][position - self._starts[epoch]])

    def _permutation(self, epoch: int) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        drawn = []
        for places, n, count in zip(self._places, self._lengths[epoch], self._counts(epoch), strict=True):
            whole, rest = divmod(count, n)
            drawn += [places[:n]] * whole + [places[generator.permutation(n)[:rest]]]
        return generator.permutation(np.concatenate(drawn))


def load_mixture(
    config: DataConfig, seed: int, epochs: Sequence[Sequence[Mapping[str, Any]]] = (), world: World = ALONE
) -> tuple[Mixture, list[str]]:
    """Read all sources.  Returns the mixture and a message for each broken line of a file that was skipped.

    epochs: of the state() of the run to go on with.  world: its ranks begin each epoch together, in `batch`.
    Raises BrokenRecord (a line), FileNotFoundError (a source) or ValueError (a source without records, or a file of a
    folder that has changed since the run read it).
    """
    sources, paths, skipped = [], [], []
    for path in (Path(source.path) for source in config.sources):
        folder = path.is_dir()
        records, messages = ([], []) if folder else read_records([path], skip_broken=config.skip_broken)
        paths.append(path if folder else None)
        sources.append(records)
        skipped += messages
    recorded = [[Shard(**shard) for shard in epoch] for epoch in epochs]
    folders = Folders(paths, recorded, skip_broken=config.skip_broken, world=world) if any(paths) else None
    mixture = Mixture(sources, [source.ratio for source in config.sources], seed, folders)
    for _ in recorded[1:]:
        mixture.begin_epoch()
    return mixture, skipped
