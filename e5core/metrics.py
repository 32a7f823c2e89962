"""What training and encoding tell while they run: RUN/metrics.jsonl for programs, progress for people.

metrics.jsonl holds one JSON object per line with a `step` in each. Lines are appended whole and flushed, so a killed
run leaves at most one torn last line. On resume the lines of steps after the resumed one are cut off before the first
new line is written, so that a step never occurs twice.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from e5core.distributed import log
from e5core.progress import Display

# Shown in this order, on the terminal and in plain lines alike: the key in metrics.jsonl and its format.
SHOWN = {
    "loss": "{:.4f}",
    "lr": "{:.2e}",
    "grad_norm": "{:.3f}",
    "tokens_per_s": "{:,.0f}",
    "in_batch_accuracy": "{:.3f}",
}
PLAIN_EVERY_S = 10.0  # seconds between the plain lines of encoding, whose micro-batches can take milliseconds


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


class Progress(Display):
    """Progress of a run; plain lines come every log_every steps and at the end."""

    def __init__(self, total_steps: int, log_every: int) -> None:
        """Raises ValueError unless both are at least 1."""
        super().__init__("step", total_steps, log)
        if log_every < 1:
            raise ValueError(f"log_every must be at least 1: got {log_every}")
        self.log_every = log_every
        self.first_step: int | None = None

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
        per_step = (time.monotonic() - self.started_s) / (step - self.first_step + 1)
        figures = " ".join(f"{key} {form.format(metrics[key])}" for key, form in SHOWN.items())
        due = step % self.log_every == 0 or step == self.total
        self.show(step, figures, per_step * (self.total - step), due)


class TextProgress(Display):
    """Progress of encoding; plain lines come every PLAIN_EVERY_S seconds and at the end."""

    def __init__(self, total_texts: int) -> None:
        """Raises ValueError unless there is a text."""
        super().__init__("text", total_texts, log)
        self.known_texts, self.known_tokens = 0, 0
        self.n_texts, self.n_tokens = 0, 0
        self.plain_s = 0.0  # seconds from the start to the newest plain line

    def expect(self, n_texts: int, n_tokens: int) -> None:
        """Count texts that have been tokenised: their lengths stand for those of the texts to come."""
        self.known_texts += n_texts
        self.known_tokens += n_tokens

    def advance(self, n_texts: int, n_tokens: int) -> None:
        """Count texts, of those expected, that have been embedded, and show how far the work is."""
        self.n_texts += n_texts
        self.n_tokens += n_tokens
        seconds = time.monotonic() - self.started_s
        # Of tokens, not of texts: within a chunk the longest texts come first.
        left = self.known_tokens / self.known_texts * self.total - self.n_tokens
        due = seconds - self.plain_s >= PLAIN_EVERY_S or self.n_texts == self.total
        if due:
            self.plain_s = seconds
        figures = f"tokens_per_s {self.n_tokens / seconds:,.0f}"
        self.show(self.n_texts, figures, max(left, 0.0) * seconds / self.n_tokens, due)


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
