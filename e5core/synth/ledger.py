"""What a run has spent at most, on disk before it is spent, so that a hard budget outlives kill -9.

    reserve   one line before a request leaves: its key, attempt, model and the most that it can cost
    settle    one line after its answer: what the server says that it cost

A reservation without a settlement (time-out, dropped connection, kill) stays charged at its maximum for ever, since the
server may have done the work. Hence: billed by the server <= ledger <= budget, and answered requests are charged
exactly. A line is one write to a file opened for appending, so a kill leaves whole lines, or a torn last one that is
cut off at the next start: a torn reservation was never sent, a torn settlement leaves the maximum. A power cut may cost
the last seconds: the file is synced when it is closed.

Money is counted in whole trillionths of the budget's currency, so that sums are exact in any order.
"""

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from e5core.synth.settings import BudgetConfig, ModelConfig

TRILLION = 10**12


class Charge(NamedTuple):
    """What an attempt costs, or may cost at most."""

    input_tokens: int
    output_tokens: int
    money: int  # trillionths


class Spent(NamedTuple):
    """A sum of charges."""

    requests: int  # attempts sent
    input_tokens: int
    output_tokens: int
    money: int  # trillionths


class BudgetSpent(RuntimeError):
    """What is left of the budget does not cover what the next request may cost."""


def price(model: ModelConfig, input_tokens: int, output_tokens: int) -> Charge:
    """Return what a model takes for these tokens; prices finer than a millionth per million tokens are rounded up."""
    per_token_in, per_token_out = (math.ceil(round(p * 1e6, 3)) for p in (model.price_in, model.price_out))
    return Charge(input_tokens, output_tokens, per_token_in * input_tokens + per_token_out * output_tokens)


class Ledger:
    """The ledger of a run; one process at a time may hold it."""

    def __init__(self, path: Path, budget: BudgetConfig) -> None:
        """Open or create the file, cut off a torn last line and add up what was charged.

        Raises RuntimeError where another process holds the file or a line is damaged.
        """
        self.path = path
        self.n_lost = 0  # reservations of earlier processes that were never settled
        self.n_over = 0  # answers that cost more than was reserved: the server ignores the limit that it was given
        self._budget = budget
        self._open: dict[tuple[str, int], tuple[str, Charge]] = {}
        self._models: dict[str, list[int]] = {}
        self._total = [0, 0, 0, 0]
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, self._file)
            self._lock()
            self._length = self._cut_torn_line()
            self._replay()
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def n_open(self) -> int:
        """Number of reservations on the way, of this process."""
        return len(self._open)

    @property
    def spent(self) -> Spent:
        """All charges, those on the way and those lost at their maximum."""
        return Spent(*self._total)

    def spent_by_model(self) -> dict[str, Spent]:
        """Return the charges of each model."""
        return {model: Spent(*sums) for model, sums in self._models.items()}

    def reserve(self, key: str, attempt: int, model: str, most: Charge) -> None:
        """Charge an attempt at the most that it can cost; when this returns, the line is in the file.

        Raises BudgetSpent, and charges nothing, where that could exceed the budget; ValueError where the attempt is on
        the way already.
        """
        if (key, attempt) in self._open:
            raise ValueError(f"attempt {attempt} of request {key} is on the way already; ask for a key once at a time")
        if not (key.isascii() and key.isalnum()):
            raise ValueError(f"a request's key must be ASCII letters and digits, got {key!r}")
        self._check_budget(most)
        self._append(f'{{"reserve":"{key}","attempt":{attempt},"model":{json.dumps(model)},{_amounts(most)}}}\n')
        self._charge(key, attempt, model, most)

    def settle(self, key: str, attempt: int, charge: Charge | None) -> None:
        """Replace a reservation's maximum by what the server reported; None leaves it charged at its maximum.

        Raises KeyError where the attempt is not on the way.
        """
        if charge is not None:
            if (key, attempt) not in self._open:
                raise KeyError(f"attempt {attempt} of request {key} was not reserved")
            self._append(f'{{"settle":"{key}","attempt":{attempt},{_amounts(charge)}}}\n')
        self._discharge(key, attempt, charge)

    def close(self) -> None:
        """Sync the file and let go of it."""
        os.fsync(self._file)
        os.close(self._file)

    def _check_budget(self, most: Charge) -> None:
        budget, spent = self._budget, self.spent
        if budget.requests is not None and spent.requests + 1 > budget.requests:
            raise BudgetSpent(f"budget.requests = {budget.requests} is spent")
        charged, tokens = spent.input_tokens + spent.output_tokens, most.input_tokens + most.output_tokens
        if budget.tokens is not None and charged + tokens > budget.tokens:
            raise BudgetSpent(f"budget.tokens = {budget.tokens}: {charged} are charged, the next may cost {tokens}")
        if budget.money is not None and spent.money + most.money > int(budget.money * TRILLION):
            charged, next_cost = spent.money / TRILLION, most.money / TRILLION
            raise BudgetSpent(
                f"budget.money = {budget.money}: {charged:.6f} is charged, the next request may cost {next_cost:.6f}"
            )

    def _charge(self, key: str, attempt: int, model: str, most: Charge) -> None:
        self._open[key, attempt] = (model, most)
        self._add(model, most, 1)

    def _discharge(self, key: str, attempt: int, charge: Charge | None) -> None:
        model, most = self._open.pop((key, attempt))
        if charge is not None:
            self.n_over += charge.money > most.money or sum(charge[:2]) > sum(most[:2])
            self._add(model, most, -1)
            self._add(model, charge, 1)

    def _add(self, model: str, charge: Charge, sign: int) -> None:
        for sums in (self._total, self._models.setdefault(model, [0, 0, 0, 0])):
            for i, amount in enumerate((1, *charge)):
                sums[i] += sign * amount

    def _append(self, line: str) -> None:
        data = line.encode("ascii")
        written = os.write(self._file, data)
        if written != len(data):  # the disk is full: the next line must not be glued to half of this one
            os.ftruncate(self._file, self._length)
            raise OSError(f"{self.path}: only {written} of {len(data)} bytes could be written; is the disk full?")
        self._length += written

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it when the process ends
        except BlockingIOError:
            raise RuntimeError(
                f"{self.path} is in use: another process writes this run; wait for its end or stop it"
            ) from None

    def _cut_torn_line(self) -> int:
        """Cut off what stands after the last line's end.  Returns the length of the file."""
        end = length = os.fstat(self._file).st_size
        while end:
            start = max(0, end - 65536)
            newline = os.pread(self._file, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < length:
            if os.pread(self._file, 2, end) not in (b"{", b'{"'):
                raise RuntimeError(f"{self.path} is no ledger: its last line is not one of ours; move it away")
            os.ftruncate(self._file, end)
        return end

    def _replay(self) -> None:
        """Add up the file's lines; memory holds the attempts that were never settled, and no others."""
        for place, line in _lines(self.path):
            try:
                entry: dict[str, Any] = json.loads(line)
                charge = Charge(*(_count(entry[name]) for name in ("input", "output", "money")))
                attempt = _count(entry["attempt"])
                if "settle" in entry:
                    self._discharge(entry["settle"], attempt, charge)
                    continue
                # Reserved again by a later process: the earlier one is lost, and stays charged.
                self.n_lost += self._open.pop((entry["reserve"], attempt), None) is not None
                self._charge(entry["reserve"], attempt, entry["model"], charge)
            except (ValueError, KeyError, TypeError) as error:
                raise RuntimeError(f"{place}: not a line of a ledger: {error!r}; the file was damaged") from error
        self.n_lost += len(self._open)
        self._open.clear()


def _amounts(charge: Charge) -> str:
    return f'"input":{charge.input_tokens},"output":{charge.output_tokens},"money":{charge.money}'


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"a count must be an integer from 0, got {value!r}")
    return value


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            yield f"{path}:{number}", line
