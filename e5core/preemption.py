"""Leaving when the machine is taken away: SIGTERM makes all ranks drop the step in hand and go together.

The signal may reach one rank only, or each at another moment, while others are on their way into a collective. So no
rank leaves by itself. A step has phases with no collective inside, in which ranks may have other numbers of
micro-batches. A rank that was asked cuts its phase short at the next micro-batch; at a phase's end every rank tells
whether it was asked, as often as every other rank; and where one was, all leave there, before the next collective.
Ranks that hold a model in shards meet in every block: they tell one another before each micro-batch.
"""

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from e5core.distributed import ALONE, World, largest, share

T = TypeVar("T")


class Preempted(Exception):
    """All ranks leave: one of them got SIGTERM."""


class Preemption:
    """What this rank knows of a wish to leave."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM, also one that comes again, for the wish to leave until the end of the block (main thread)."""

        def ask(number: int, frame: FrameType | None) -> None:
            self.asked = True

        before = signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def between(self, micro_batches: Iterable[T]) -> Iterator[T]:
        """Yield the micro-batches of a phase until this rank is asked to leave.  Raises Preempted."""
        for micro_batch in micro_batches:
            if self.asked:
                raise Preempted
            yield micro_batch

    def together(self, micro_batches: Iterable[T]) -> Iterator[T]:
        """Yield micro-batches in which all ranks meet, as many on each, until one is asked to leave.  Raises Preempted.

        Asking costs an all-reduce of one number, for which the host waits.
        """
        for micro_batch in micro_batches:
            if largest(int(self.asked), self.world):
                raise Preempted
            yield micro_batch

    @contextmanager
    def phase(self) -> Iterator[None]:
        """Go through a phase and meet the other ranks at its end.  Raises Preempted on all where one was asked."""
        try:
            yield
        except Preempted:
            pass
        if any(share(self.asked, self.world)):
            raise Preempted


NEVER = Preemption(ALONE)  # for a step that nobody interrupts
