"""What a run tells while it runs: RUN/metrics.jsonl for programs, a progress bar or plain lines for people.

metrics.jsonl holds one JSON object per line with a `step` in each. Lines are appended whole and flushed, so a killed
run leaves at most one torn last line. On resume the lines of steps after the resumed one are cut off before the first
new line is written, so that a step never occurs twice.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import rich.console
import rich.progress
import rich.table

from e5core.distributed import log

# Shown in this order, on the terminal and in plain lines alike: the key in metrics.jsonl and its format.
SHOWN = {
    "loss": "{:.4f}",
    "lr": "{:.2e}",
    "grad_norm": "{:.3f}",
    "tokens_per_s": "{:,.0f}",
    "in_batch_accuracy": "{:.3f}",
}


class MetricsFile:
    """RUN/metrics.jsonl, open for appending."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        """Open path: a new, empty file if resume_step is None, else the old one cut after that step.

        Raises ValueError, naming file and line, if a line other than a torn last one is no JSON object with a step.
        """
        kept = "" if resume_step is None or not path.exists() else _lines_until(path, resume_step)
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self.file = open(path, "a", encoding="utf-8")

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append one object as one line, and flush it.

        metrics: JSON values and nested tables of them; `step` is an integer.
        Raises ValueError that names the key of a float that is not finite, or a missing step.
        """
        if not _is_step(metrics.get("step")):
            raise ValueError(f"metrics need an integer step >= 0: got {metrics.get('step')!r}")
        _check_finite(metrics, "")
        self.file.write(json.dumps(metrics, ensure_ascii=False, allow_nan=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self.file.close()


class Progress:
    """Progress of a run on stderr: a bar on a terminal, a plain line every log_every steps and at the end elsewhere."""

    def __init__(self, total_steps: int, log_every: int) -> None:
        """Raises ValueError unless both are at least 1."""
        if total_steps < 1 or log_every < 1:
            raise ValueError(f"total_steps and log_every must be at least 1: got {total_steps} and {log_every}")
        self.total_steps = total_steps
        self.log_every = log_every
        self.first_step: int | None = None
        self.started_s = 0.0
        self.bar: rich.progress.Progress | None = None

    def __enter__(self) -> "Progress":
        self.started_s = time.monotonic()
        if sys.stderr.isatty():
            self.bar = rich.progress.Progress(
                rich.progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                rich.progress.BarColumn(bar_width=12),
                # The default column cuts the last figures off on a narrow terminal; this one wraps.
                rich.progress.TextColumn("{task.fields[shown]}", table_column=rich.table.Column()),
                console=rich.console.Console(stderr=True),
            )
            self.bar.add_task("steps", total=self.total_steps, shown="")
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(self, metrics: Mapping[str, float | int]) -> None:
        """Show one finished step.

        metrics: `step`, counted from 1, and every key of SHOWN; others are ignored.
        Raises ValueError that names the keys that are missing.
        """
        missing = [key for key in ("step", *SHOWN) if key not in metrics]
        if missing:
            raise ValueError(f"progress needs step, {', '.join(SHOWN)}: got no {', '.join(missing)}")
        step = int(metrics["step"])
        if self.first_step is None:
            self.first_step = step  # a resumed run starts late, and its speed is that of its own steps
        shown = " ".join(f"{key} {form.format(metrics[key])}" for key, form in SHOWN.items())
        shown += f" eta {_clock(self._seconds_left(step))}"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step, shown=shown)
        elif step % self.log_every == 0 or step == self.total_steps:
            log(f"step {step}/{self.total_steps} {shown}")

    def _seconds_left(self, step: int) -> float:
        done = step - (self.first_step or 0) + 1
        return (time.monotonic() - self.started_s) / done * (self.total_steps - step)


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_finite(value: object, dotted: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_finite(item, f"{dotted}.{key}".removeprefix("."))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_finite(item, f"{dotted}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"metric {dotted} must be finite: got {value}; JSON has no such number")


def _lines_until(path: Path, last_step: int) -> str:
    """The whole lines of path whose step is at most last_step."""
    *lines, torn = path.read_text(encoding="utf-8", errors="replace").split("\n")  # torn: "" or a line cut by a kill
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            metrics = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error.msg}; mend or remove that line") from error
        if not isinstance(metrics, dict) or not _is_step(metrics.get("step")):
            raise ValueError(f"{path}:{number} must be an object with an integer step: got {line[:80]}")
        if metrics["step"] <= last_step:
            kept.append(line + "\n")
    return "".join(kept)
