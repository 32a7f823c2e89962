"""How far long work is, for people: a bar on a terminal, plain lines elsewhere.  Imports nothing heavy."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import rich.console
import rich.progress
import rich.table


class Display:
    """Progress of long work on stderr: a bar on a terminal, plain lines elsewhere, the same figures in both."""

    def __init__(self, unit: str, total: int, say: Callable[[str], None]) -> None:
        """say: takes a plain line.  Raises ValueError unless there is a unit to do."""
        if total < 1:
            raise ValueError(f"the number of {unit}s must be at least 1: got {total}")
        self.unit = unit
        self.total = total
        self.say = say
        self.started_s = 0.0
        self.bar: rich.progress.Progress | None = None

    def __enter__(self) -> Self:
        self.started_s = time.monotonic()
        if sys.stderr.isatty():
            self.bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(bar_width=12),
                # The default column cuts the last figures off on a narrow terminal; this one wraps.
                rich.progress.TextColumn("{task.fields[shown]}", table_column=rich.table.Column()),
                console=rich.console.Console(stderr=True),
            )
            self.bar.add_task(self._place(0), total=self.total, shown="")
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def _place(self, done: int) -> str:
        return f"{self.unit} {done:,}/{self.total:,}"

    def show(self, done: int, figures: str, seconds_left: float, plain: bool) -> None:
        """Show that so many are done.  plain: whether a line is due where there is no terminal."""
        shown = f"{figures} eta {_clock(seconds_left)}"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=done, description=self._place(done), shown=shown)
        elif plain:
            self.say(f"{self._place(done)} {shown}")


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
