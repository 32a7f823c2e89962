"""In which order rows are drawn: pure functions of (seed, epoch, place), computed for the places asked for alone.

A permutation of n rows is a Feistel network over a grid of a x b >= n cells: (l, r) -> (l + F(r) mod a, r), then the
other half, each of which is a bijection; a place that falls outside n goes round again until it falls inside (cycle
walking, Black and Rogaway 2002). No list of n rows is ever made, and the row at place 5,000,000 costs what the first
one does.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

ROUNDS = 10
BATCHES = 2**32  # the stream of an epoch's batches; sources have the numbers below
PLACES = 2**32 - 1  # the stream of a mixed epoch's places


def permuted(places: np.ndarray, n: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """Return the rows at places of the permutation of n rows that (seed, epoch, stream) names.

    places: (N,) int64, 0 <= place < n.
    Returns (N,) int64, a bijection of range(n) on range(n).
    """
    a = max(1, math.isqrt(n - 1) + 1)
    b = -(-n // a)
    keys = [_mix(np.array([(round_ << 56) ^ stream], np.uint64)) for round_ in range(ROUNDS)]
    keys = [_mix(_mix(key ^ np.uint64(epoch)) ^ np.uint64(seed)) for key in keys]
    rows = np.array(places, np.uint64)
    outside = np.ones(len(rows), bool)
    while outside.any():
        left, right = rows[outside] // np.uint64(b), rows[outside] % np.uint64(b)
        for i, key in enumerate(keys):
            if i % 2:
                right = (right + _mix(left ^ key) % np.uint64(b)) % np.uint64(b)
            else:
                left = (left + _mix(right ^ key) % np.uint64(a)) % np.uint64(a)
        rows[outside] = left * np.uint64(b) + right
        outside = rows >= n
    return rows.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Mix the bits of (N,) uint64 (the finaliser of splitmix64)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def drawn(places: np.ndarray, n: int, seed: int, epoch: int, source: int) -> np.ndarray:
    """Return the rows that a source of n rows gives at places of its draw for an epoch, which may be longer than n.

    Every n places hold each row once, in another order each time.
    """
    rows = np.empty(len(places), np.int64)
    for turn in np.unique(places // n).tolist():
        here = places // n == turn
        rows[here] = permuted(places[here] % n, n, seed, epoch, source + (turn << 20))
    return rows


class _Places:
    """Epochs one after another, whose places steps take in turn."""

    def __init__(self, seed: int) -> None:
        self.starts = [0]  # the first place of each epoch begun, and of the next one
        self._seed = seed
        self._epochs: list[tuple[list[int], list[int]]] = []  # rows there are, and rows drawn, of each source

    def begin_epoch(self, lengths: Sequence[int], counts: Sequence[int]) -> None:
        """Begin an epoch that draws counts[s] of the lengths[s] rows of each source s."""
        self._epochs.append((list(lengths), list(counts)))
        self.starts.append(self.starts[-1] + sum(counts))

    def end(self, step: int, size: int) -> int:
        """Return the place after a step's last one."""
        return (step + 1) * size


class ListedOrder(_Places):
    """Epochs in which the rows of all sources stand in one permutation, listed whole: for sources in memory."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._listed: tuple[int, np.ndarray] | None = None  # an epoch and its rows, (n, 2)

    def rows(self, step: int, size: int) -> list[tuple[int, int]]:
        """Return the (source, row) of a step's places, of epochs that have begun."""
        return [self._row(place) for place in range(step * size, (step + 1) * size)]

    def _row(self, place: int) -> tuple[int, int]:
        epoch = bisect_right(self.starts, place) - 1
        if self._listed is None or self._listed[0] != epoch:
            self._listed = (epoch, self._list(epoch))
        source, row = self._listed[1][place - self.starts[epoch]].tolist()
        return source, row

    def _list(self, epoch: int) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        drawn = []
        for source, (n, count) in enumerate(zip(*self._epochs[epoch], strict=True)):
            whole, rest = divmod(count, n)
            rows = np.concatenate([*[np.arange(n)] * whole, generator.permutation(n)[:rest]])
            drawn.append(np.stack([np.full(count, source), rows], axis=1))
        return generator.permutation(np.concatenate(drawn))


class MixedOrder(_Places):
    """Epochs in which the rows of all sources stand in one permutation, computed place by place: for stores."""

    def rows(self, step: int, size: int) -> list[tuple[int, int]]:
        """Return the (source, row) of a step's places, of epochs that have begun."""
        found: list[tuple[int, int]] = []
        place, end = step * size, (step + 1) * size
        while place < end:
            epoch = bisect_right(self.starts, place) - 1
            last = min(end, self.starts[epoch + 1])
            found += self._epoch_rows(epoch, np.arange(place, last) - self.starts[epoch])
            place = last
        return found

    def _epoch_rows(self, epoch: int, places: np.ndarray) -> list[tuple[int, int]]:
        lengths, counts = self._epochs[epoch]
        bounds = np.cumsum([0, *counts])
        places = permuted(places, int(bounds[-1]), self._seed, epoch, PLACES)
        sources = np.searchsorted(bounds, places, side="right") - 1
        rows = np.empty(len(places), np.int64)
        for source in np.unique(sources).tolist():
            here = sources == source
            rows[here] = drawn(places[here] - bounds[source], lengths[source], self._seed, epoch, source)
        return list(zip(sources.tolist(), rows.tolist(), strict=True))


class HomogeneousOrder:
    """Batches of one source each, whose order is a permutation; a source gives whole batches only.

    What a source draws epoch by epoch is one stream without a gap, cut into batches: what is left of an epoch begins
    the source's next batch. So each row comes once an epoch (by its source's ratio), and small sources give a batch
    every few epochs.
    """

    def __init__(self, seed: int, size: int) -> None:
        """size: of every batch."""
        self.starts = [0]  # the first place of each epoch begun, and of the next one: multiples of size
        self._seed, self._size = seed, size
        self._lengths: list[list[int]] = []
        self._drawn: list[list[int]] = []  # per source: where each epoch begins in its stream, and the next one

    def begin_epoch(self, lengths: Sequence[int], counts: Sequence[int]) -> None:
        """Begin an epoch that draws counts[s] of the lengths[s] rows of each source s."""
        self._drawn = self._drawn or [[0] for _ in lengths]
        self._lengths.append(list(lengths))
        for stream, count in zip(self._drawn, counts, strict=True):
            stream.append(stream[-1] + count)
        n_batches = sum(self._batches(len(self._lengths) - 1))
        self.starts.append(self.starts[-1] + n_batches * self._size)

    def end(self, step: int, size: int) -> int:
        """Return the place after a step's last one, whatever part of the batch is asked for."""
        return (step + 1) * self._size

    def _batches(self, epoch: int) -> list[int]:
        """Count the batches that each source fills in an epoch, with what earlier epochs left."""
        return [stream[epoch + 1] // self._size - stream[epoch] // self._size for stream in self._drawn]

    def rows(self, step: int, size: int) -> list[tuple[int, int]]:
        """Return the (source, row) of the first `size` places of a step's batch, of epochs that have begun."""
        epoch = bisect_right(self.starts, step * self._size) - 1
        bounds = np.cumsum([0, *self._batches(epoch)])
        place = np.array([step - self.starts[epoch] // self._size])
        batch = int(permuted(place, int(bounds[-1]), self._seed, epoch, BATCHES)[0])
        source = int(np.searchsorted(bounds, batch, side="right")) - 1
        stream = self._drawn[source]
        first = (stream[epoch] // self._size + batch - int(bounds[source])) * self._size
        rows: list[tuple[int, int]] = []
        while len(rows) < size:
            at = first + len(rows)
            epoch = bisect_right(stream, at) - 1
            last = min(first + size, stream[epoch + 1])
            places = np.arange(at, last) - stream[epoch]
            found = drawn(places, self._lengths[epoch][source], self._seed, epoch, source)
            rows += [(source, row) for row in found.tolist()]
        return rows
