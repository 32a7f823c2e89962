"""Which records make up each step: a pure function of (seed, step), so that a resumed run goes on exactly.

Every source gives `ratio` of its records to an epoch (1 = each once, 0.1 = a tenth drawn anew each epoch, 2 = each
twice: the paper's sample ratios, arXiv 2401.00368 Table 14). An epoch is one seeded permutation of these; epochs follow
one another without a gap, so there is no incomplete last batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from e5core.records import Record, read_records


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One [[data.sources]] table."""

    path: str  # JSON lines (.jsonl or .jsonl.gz): the paper's six kinds, or {task, query, pos, neg}
    ratio: Annotated[float, Field(gt=0, le=100)] = 1.0  # of its records per epoch


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The [data] table."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    skip_broken: bool = False  # leave out lines that cannot be read (each is named in the log) instead of stopping


class Mixture:
    """The records of a run and their order."""

    def __init__(self, sources: Sequence[Sequence[Record]], ratios: Sequence[float], seed: int) -> None:
        self.records = [record for source in sources for record in source]
        self.seed = seed
        self._bounds = np.cumsum([0, *map(len, sources)])
        self._counts = [max(1, round(len(s) * ratio)) for s, ratio in zip(sources, ratios, strict=True)]
        self._epoch: tuple[int, np.ndarray] | None = None  # the permutation of the epoch in hand

    @property
    def epoch_size(self) -> int:
        """Number of records in an epoch."""
        return sum(self._counts)

    def batch(self, step: int, size: int) -> list[Record]:
        """Return the records of step `step` (from 0) in order."""
        first = step * size
        return [self.records[self._index(position)] for position in range(first, first + size)]

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, self.epoch_size)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._permutation(epoch))
        return int(self._epoch[1][place])

    def _permutation(self, epoch: int) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        drawn = []
        for first, last, count in zip(self._bounds, self._bounds[1:], self._counts, strict=False):
            whole, rest = divmod(count, last - first)
            drawn += [np.arange(first, last)] * whole + [first + generator.permutation(last - first)[:rest]]
        return generator.permutation(np.concatenate(drawn))


def load_mixture(config: DataConfig, seed: int) -> tuple[Mixture, list[str]]:
    """Read all sources.  Returns the mixture and a message for each broken line that was skipped.

    Raises BrokenRecord (a line) or FileNotFoundError (a source).
    """
    sources, skipped = [], []
    for source in config.sources:
        records, messages = read_records([Path(source.path)], skip_broken=config.skip_broken)
        sources.append(records)
        skipped += messages
    return Mixture(sources, [source.ratio for source in config.sources], seed), skipped
