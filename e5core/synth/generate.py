"""The thin generator: training records, one by one, as an LLM writes them (arXiv 2401.00368, section 3.1).

    async for record in records(config): ...

First the tasks of all kinds are brainstormed and their pools closed, then examples are asked for in rounds: as many as
records are missing, then as many as the acceptance so far lets hope for, until there are n_records. Every answer is on
disk before it is told of, so a rerun after any end goes on where this one stopped, and asks what it would have asked:

    OUT/plan.json    digests of what the requests hang on, lists of tasks asked for, last request of every round
    OUT/ledger.jsonl, OUT/records/, OUT/tasks/, OUT/rejects/, OUT/index.sqlite      see ledger.py and store.py
"""

import asyncio
import contextlib
import functools
import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from e5core.config import read_json, write_whole
from e5core.records import Record, record_of
from e5core.synth.checks import check_record, check_tasks
from e5core.synth.client import Client, Reply
from e5core.synth.duplicates import contaminated
from e5core.synth.ledger import BudgetSpent, Ledger
from e5core.synth.plan import Ask, Plan
from e5core.synth.replies import Rejection
from e5core.synth.settings import SynthConfig
from e5core.synth.store import Store

FATAL = ("http_401", "http_402", "http_403", "http_404", "quota")  # the next request would fare no better
LEAST_ROUND = 16  # requests
HOPELESS = 100  # requests after which a round must have brought a record for every HOPELESS of them


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a request."""

    ask: Ask
    record: Record | None = None  # accepted
    reason: str = ""  # why not, of replies.REASONS or of wire; "" also for tasks
    again: bool = False  # nothing is kept: a later run asks again


class Run:
    """A run's folder, open: its plan, ledger and store."""

    def __init__(self, config: SynthConfig, evaluation: np.ndarray | None = None) -> None:
        """Open or begin the folder.

        evaluation: (n,) uint64 of contamination.evaluation_hashes, of sets that no record may come from.
        Raises RuntimeError if another process has it open, if it is damaged, or if it was begun with a config whose
        requests are others; what Plan raises.
        """
        self.config = config
        self.evaluation = evaluation
        self.plan = Plan(config)
        self.out = Path(config.synth.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.n_unanswered: Counter[str] = Counter()  # requests given up for now, by reason
        self._n_silent = 0  # of them, since the last answer
        with contextlib.ExitStack() as opened:
            self.ledger = opened.enter_context(Ledger(self.out / "ledger.jsonl", config.budget))
            self.store = opened.enter_context(Store(self.out))
            self._state = self._begin()
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    async def outcomes(self) -> AsyncIterator[Outcome]:
        """Ask until n_records are accepted, and yield what comes of every request, in order of arrival.

        Raises BudgetSpent where the budget does not cover the next request, RuntimeError where going on is of no use
        (the server refuses the key, does not answer, or what it writes is not accepted). What was answered is kept.
        """
        counts = self._state["brainstorms"]
        async with Client(self.config.models, self.config.limits, self.ledger, self.config.synth.seed) as client:
            async for outcome in self._answered(client, lambda: self.plan.brainstorms(counts)):
                yield outcome
            n_tasks = {kind: self._close_pool(kind) for kind in counts}
            for first, last in self._rounds():
                n_asked, n_before = 0, self.store.n_records
                asks = functools.partial(self.plan.generates, first, last, n_tasks, self.store.task)
                async for outcome in self._answered(client, asks):
                    n_asked += 1
                    yield outcome
                self._check_hope(n_asked, self.store.n_records - n_before)

    def contaminated(self, fields: dict[str, object]) -> str:
        """Return the key of a record's text that occurs in the evaluation sets; "" where none does."""
        return "" if self.evaluation is None else contaminated(fields, self.evaluation)

    def _rounds(self) -> Iterator[tuple[int, int]]:
        """Yield the first and the end of every round's requests; those of earlier runs again, for what they lack."""
        ends: list[int] = self._state["ends"]
        yield from zip([0, *ends], ends, strict=False)
        while (missing := self.config.synth.n_records - self.store.n_records) > 0:
            first = ends[-1] if ends else 0
            size = missing if not first else math.ceil(missing * first / max(self.store.n_records, 1))
            # At most as many again as before: the first rounds say little about what is accepted.
            ends.append(first + max(LEAST_ROUND, min(size, first or size)))
            self._save()
            yield first, ends[-1]

    def _check_hope(self, n_asked: int, n_accepted: int) -> None:
        is_short = self.store.n_records < self.config.synth.n_records
        if is_short and n_asked >= HOPELESS and n_accepted < n_asked / HOPELESS:
            raise RuntimeError(
                f"only {n_accepted} of the last {n_asked} requests brought a record; see {self.out / 'rejects'} for "
                "the reasons, and ask another model or for other kinds"
            )

    async def _answered(self, client: Client, asks: Callable[[], Iterator[Ask]]) -> AsyncIterator[Outcome]:
        """Ask what has no answer yet; and again what the servers failed to answer, as long as that helps."""
        n_failed, n_before = -1, math.inf
        while n_failed:
            n_failed = 0
            self.n_unanswered.clear()
            async for outcome in self._ask_all(client, (a for a in asks() if not self.store.has(a.request.key))):
                n_failed += outcome.again
                yield outcome
            if n_failed >= n_before:
                raise RuntimeError(
                    f"{n_failed} requests got no answer ({self._silence()}); run again to ask them again"
                )
            n_before = n_failed

    async def _ask_all(self, client: Client, asks: Iterator[Ask]) -> AsyncIterator[Outcome]:
        """Ask with bounded concurrency and no barrier: a worker that has its answer takes the next request.

        The queue is bounded: who does not take outcomes is not given more than a few.
        """
        n_workers = 2 * self.config.limits.concurrency  # those that pause before a new attempt hold no slot
        outcomes: asyncio.Queue[Outcome | None] = asyncio.Queue(n_workers)

        async def work() -> None:
            try:
                for ask in asks:
                    await outcomes.put(self._keep(ask, await client.ask(ask.request)))
            finally:
                await outcomes.put(None)

        workers = [asyncio.create_task(work()) for _ in range(n_workers)]
        try:
            for _ in workers:
                while (outcome := await outcomes.get()) is not None:
                    yield outcome
                _raise_first(workers)
            await asyncio.gather(*workers)  # the budget is spent: what was on the way has come in by now
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    def _keep(self, ask: Ask, reply: Reply) -> Outcome:
        """Write an answer to the store."""
        if reply.again:
            self._count_silence(reply)
            return Outcome(ask, reason=reply.error, again=True)
        if reply.error in FATAL:
            raise RuntimeError(f"model {reply.model}: {reply.error}: {reply.detail}; mend that and run again")
        self._n_silent = 0
        key, prompt = ask.request.key, ask.prompt
        kept: dict[str, object] | list[str] | Rejection
        if reply.error is not None:
            kept = Rejection(reply.error, reply.detail)
        elif prompt.step == "brainstorm":
            kept = check_tasks(reply.text)
        else:
            scripts = self.config.checks.scripts
            kept = check_record(reply.text, prompt, ask.kind, self.plan.languages, scripts=scripts)
            if isinstance(kept, dict) and (where := self.contaminated(kept)):
                kept = Rejection("contaminated", where)
        if isinstance(kept, Rejection):
            about = {"kind": ask.kind.name, "model": reply.model, "text": reply.text or "", "language": prompt.language}
            self.store.add_reject(key, kept, **about)
            return Outcome(ask, reason=kept.reason)
        if isinstance(kept, list):
            self.store.add_tasks(key, kept, kind=ask.kind.name, model=reply.model)
            return Outcome(ask)
        if not self.store.add_record(key, kept, model=reply.model):
            return Outcome(ask, reason="duplicate")
        fields = {**kept, "id": key, "source": reply.model}
        return Outcome(ask, record_of(fields, f"reply {key}", stem=reply.model, line=0))

    def _count_silence(self, reply: Reply) -> None:
        """Stop where nothing is answered any more."""
        self.n_unanswered[reply.error] += 1
        self._n_silent += 1
        if self._n_silent >= max(20, 2 * self.config.limits.concurrency):
            raise RuntimeError(
                f"{self._n_silent} requests in a row got no answer ({self._silence()}; the last: {reply.detail}); "
                "run again when the server is back"
            )

    def _silence(self) -> str:
        return ", ".join(f"{reason}: {n}" for reason, n in self.n_unanswered.most_common())

    def _close_pool(self, kind: str) -> int:
        n_tasks = self.store.close_pool(kind)
        if not n_tasks:
            raise RuntimeError(
                f"no task for kind {kind}: none of {self._state['brainstorms'][kind]} lists was usable; see "
                f"{self.out / 'rejects'}, and ask another model or begin anew in another synth.out"
            )
        return n_tasks

    def _begin(self) -> dict:
        """Read plan.json and refuse another config; write it where nothing was sent yet."""
        path, digests = self.out / "plan.json", self.plan.digests()
        if path.is_file() and self.ledger.spent.requests:
            state = read_json(path)
            changed = [key for key, digest in digests.items() if state["digests"].get(key) != digest]
            if changed:
                raise RuntimeError(
                    f"{self.out} was begun with other settings of {', '.join(changed)}: put them back, or give another "
                    "synth.out"
                )
            return state
        self._state = {"digests": digests, "brainstorms": self.plan.n_brainstorms(), "ends": []}
        self._save()
        return self._state

    def _save(self) -> None:
        write_whole(self.out / "plan.json", json.dumps(self._state, indent=2) + "\n")


async def records(config: SynthConfig) -> AsyncIterator[Record]:
    """Yield records as they are accepted, until the config's folder holds n_records of them.

    A record may give way later to one with the same texts and a smaller key; the files that `python -m e5core.synth`
    writes at the end hold the survivors only. Closing the generator early loses nothing that was answered.
    Raises what Run and Run.outcomes raise.
    """
    with Run(config) as run:
        async for outcome in run.outcomes():
            if outcome.record is not None:
                yield outcome.record


def _raise_first(workers: list[asyncio.Task[None]]) -> None:
    """Raise what a worker ended with, at once; but let the others finish where only the budget is spent."""
    for worker in workers:
        error = worker.exception() if worker.done() and not worker.cancelled() else None
        if error is not None and not isinstance(error, BudgetSpent):
            raise error
