"""The batches of a run's steps, built when they are asked for, or ahead by worker processes while earlier ones train.

The trainer alone chooses the records of a step, so that epochs begin as they would without workers. Worker k of N turns
those of steps k, k + N, ... into tokens, relations and micro-batches, all of which are a pure function of the records
and (seed, step): any number of workers gives the same bytes. A worker has one step at a time, in hand or ready, so at
most N batches lie ahead.

Workers are new processes ("spawn": a fork would copy the locks of this one's threads). They take neither Ctrl-C nor
SIGTERM, which reach whole process groups, for the trainer may need their batches to leave in order. They end with the
trainer, however it ends: by `Batches`' exit, or since nobody is at the other end of their pipe.
"""

import multiprocessing
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch

from e5core.batches import BatchConfig, GlobalBatch, MicroBatch, build_batch, pack
from e5core.distributed import World, use_one_thread
from e5core.mixture import Mixture
from e5core.records import Record
from e5core.tokenizer import Tokenizer, TokenizerConfig
from e5kernels.infonce import Relations

CPU = torch.device("cpu")
ENDED_WITHIN_S = 5.0  # what the system may take to bury a process that closed its pipe

Made = tuple[GlobalBatch, list[MicroBatch]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a rank's batches depend on beside the records, in any process."""

    model_path: Path  # of the tokenizer
    tokenizer: TokenizerConfig
    batch: BatchConfig  # micro_batch_tokens settled
    seed: int
    world: World  # the whole job

    def make(self, records: Sequence[Record], tokenizer: Tokenizer, step: int) -> Made:
        """Build a step's batch, and pack this rank's part of it on the CPU."""
        batch = build_batch(records, tokenizer, self.batch, self.seed, step, self.world)
        return batch, pack(batch.sequences, self.batch.micro_batch_tokens, CPU, numbers=batch.rows)


class Batches:
    """The batches of steps `steps`, each taken once, in order, within a `with`."""

    def __init__(self, mixture: Mixture, tokenizer: Tokenizer, recipe: Recipe, steps: range, n_workers: int) -> None:
        """tokenizer: the recipe's, for this process.  n_workers: 0 builds in this process."""
        self.mixture = mixture
        self._tokenizer, self._recipe = tokenizer, recipe
        self._ordered, self._end = steps.start, steps.stop  # the next step that a worker gets
        self._n_workers = n_workers
        self._workers: list[_Worker] = []
        self._running = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as starting:
            for number in range(self._n_workers):
                self._workers.append(_Worker(number, self._recipe))
                starting.callback(self._workers[-1].end)
            self._running = starting.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.close()

    def take(self, step: int) -> Made:
        """Return the next step's batch and this rank's micro-batches of it, on the CPU.

        Raises what choosing or building it raised, in a worker too; ChildProcessError where a worker died.
        """
        n = self._n_workers
        if not n:
            return self._recipe.make(self._records(step), self._tokenizer, step)
        if self._ordered == step:
            self._order()
        self._order_until(step + n)
        made = self._workers[step % n].receive()
        self._order_until(step + n + 1)  # that worker is free again
        return made

    def _order_until(self, end: int) -> None:
        """Give out the steps before `end`, but none for which a folder would have to be looked into too early."""
        while self._ordered < min(end, self._end) and self.mixture.is_begun(self._ordered, self._recipe.batch.size):
            self._order()

    def _order(self) -> None:
        self._workers[self._ordered % self._n_workers].order(self._ordered, self._records(self._ordered))
        self._ordered += 1

    def _records(self, step: int) -> list[Record]:
        return self.mixture.batch(step, self._recipe.batch.size)


class _Parcel(NamedTuple):
    """A batch on its way between processes. Tensors would go as file descriptors, which end with their process."""

    sequences: list[list[int]]
    rows: list[int]
    relations: list[np.ndarray]
    candidates: list[list[int]]
    scores: list[float | None]
    record_ids: list[str]
    n_truncated: int
    packed: list[tuple[np.ndarray, np.ndarray, int, np.ndarray]]

    @classmethod
    def of(cls, made: Made) -> Self:
        batch, packed = made
        relations = [tensor.numpy() for tensor in batch.relations.tensors()]
        pieces = [(p.tokens.numpy(), p.cu_seqlens.numpy(), p.max_seqlen, p.rows.numpy()) for p in packed]
        return cls(
            batch.sequences,
            batch.rows,
            relations,
            batch.candidates,
            batch.scores,
            batch.record_ids,
            batch.n_truncated,
            pieces,
        )

    def made(self) -> Made:
        relations = Relations(*map(torch.from_numpy, self.relations))
        packed = [
            MicroBatch(torch.from_numpy(tokens), torch.from_numpy(bounds), longest, torch.from_numpy(rows))
            for tokens, bounds, longest, rows in self.packed
        ]
        rest = self.candidates, self.scores, self.record_ids, self.n_truncated
        return GlobalBatch(self.sequences, self.rows, relations, *rest), packed


class _Worker:
    """One process that builds batches, seen from the trainer."""

    def __init__(self, number: int, recipe: Recipe) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, recipe), name=f"data worker {number}")
        self._step = 0
        resource_tracker.ensure_running()  # or it begins with the process, and unblocks these signals for it
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self._process.start()  # which inherits what is blocked, from its first instruction on
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            theirs.close()

    def order(self, step: int, records: Sequence[Record]) -> None:
        """Let it build a step's batch; it must have none in hand."""
        self._step = step
        try:
            self._connection.send((step, records))
        except OSError as error:
            raise self._death() from error

    def receive(self) -> Made:
        """Return the batch that was ordered, once it is there.  Raises what building it raised, ChildProcessError."""
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if isinstance(answer, _Parcel):
            return answer.made()
        raise answer

    def end(self) -> None:
        """End the process, which holds nothing that could be lost."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _death(self) -> ChildProcessError:
        self._process.join(ENDED_WITHIN_S)
        code = self._process.exitcode
        if code is None:
            how = "closed its pipe"
        else:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return ChildProcessError(
            f"{self._process.name} (process {self._process.pid}) {how} with the batch of step {self._step + 1} in "
            "hand; what it said stands above, and SIGKILL is mostly a lack of memory; lower data.workers, and go on "
            "with train.resume=true"
        )


def _work(connection: Connection, recipe: Recipe) -> None:
    """Build the batches that are ordered until the trainer is gone."""
    use_one_thread()
    tokenizer = None
    while True:
        try:
            step, records = connection.recv()
        except (EOFError, OSError):
            return
        try:
            tokenizer = tokenizer or Tokenizer.load(recipe.model_path, recipe.tokenizer)
            answer = _Parcel.of(recipe.make(records, tokenizer, step))
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            answer = error
        try:
            connection.send(answer)
        except OSError:
            return
