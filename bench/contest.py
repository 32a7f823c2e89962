"""Contenders that are timed in turns: each turn is a process of its own, and one runs at a time.

So the peak memory of a turn is the contender's own, and what slows the machine for a while slows all of them. A turn is
`python -m MODULE FLAGS`; the last line that it prints is the JSON object that `timed_turn` returned (and more).
"""

import json
import math
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from e5core.distributed import log
from e5core.memory import is_out_of_memory

OUT_OF_MEMORY, TOO_SLOW = "out of memory", "too slow"
MEMORY_SIGNS = ("not enough memory", "annot allocate memory", "OutOfMemoryError", "MemoryError", "bad_alloc")
CLOSE = 1.2  # a rival slower than the best rival by more than this takes no further turn
PATIENCE = 4.0  # a rival's first turn may take this many times the shortest one so far


@dataclass
class Contender:
    """One side, or one variant of a side."""

    name: str
    command: list[str]  # module and flags
    spare_memory: tuple[str, ...] = ()  # flags to try again with where memory does not suffice
    turns: list[dict[str, Any]] = field(default_factory=list)
    failed: str | None = None  # why the last turn gave no result
    wall: float = math.inf  # seconds of the last turn, process start and loading included

    @property
    def seconds(self) -> float:
        """The median of all timed runs."""
        return median([seconds for turn in self.turns for seconds in turn["seconds"]])

    @property
    def peak_mib(self) -> int:
        """The highest peak of its turns."""
        return max(turn["peak_mib"] for turn in self.turns)

    def take_turn(self, limit: float) -> None:
        """Run once, for at most `limit` seconds.  Raises RuntimeError where it fails for neither memory nor time."""
        start = time.perf_counter()
        result = run_module(self.command, limit)
        if result == OUT_OF_MEMORY and self.spare_memory:
            log(f"{self.name}: {OUT_OF_MEMORY}, again with {' '.join(self.spare_memory)}")
            self.name += f", {' '.join(self.spare_memory).lstrip('-')}"
            self.command, self.spare_memory = [*self.command, *self.spare_memory], ()
            start = time.perf_counter()
            result = run_module(self.command, limit)
        if isinstance(result, str):
            self.failed = f"{result}: over {limit:.0f} s" if result == TOO_SLOW else result
            log(f"{self.name}: {self.failed}")
            return
        self.wall = time.perf_counter() - start
        self.turns.append(result)
        log(f"{self.name}: {[round(s, 3) for s in result['seconds']]} s, peak {result['peak_mib']} MiB")


def compete(ours: Sequence[Contender], families: Sequence[Sequence[Contender]], rounds: int, deadline: float) -> None:
    """Let all take turns, for `rounds` rounds.

    families: the rivals; after one that was too slow the rest of its family is left out, since its products are the
    same. The first round tries every rival, later ones those that came close to the best rival.
    """
    for contender in ours:
        contender.take_turn(deadline)
    shortest = math.inf
    for family in families:
        for rival in family:
            rival.take_turn(min(deadline, PATIENCE * shortest))
            shortest = min(shortest, rival.wall)
            if rival.failed is not None and rival.failed.startswith(TOO_SLOW):
                break
    ran = [contender for contender in ours if contender.turns]
    for _ in range(rounds - 1):
        for contender in [*ran, *close_to_best([rival for family in families for rival in family if rival.turns])]:
            contender.take_turn(deadline)


def close_to_best(rivals: Sequence[Contender]) -> list[Contender]:
    """Return the rivals that may still turn out to be the best, the best one first."""
    ranked = sorted(rivals, key=lambda rival: rival.seconds)
    return [rival for rival in ranked if rival.seconds <= CLOSE * ranked[0].seconds]


def run_module(command: Sequence[str], limit: float) -> dict[str, Any] | str:
    """Run `python -m` with the command.  Returns the JSON object that it printed last, OUT_OF_MEMORY or TOO_SLOW."""
    try:
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return TOO_SLOW
    if done.returncode == -signal.SIGKILL or any(sign in done.stderr for sign in MEMORY_SIGNS):
        return OUT_OF_MEMORY
    if done.returncode != 0:
        raise RuntimeError(f"python -m {' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def why_failed(error: BaseException) -> str:
    """Say in a row why it has no figures: OUT_OF_MEMORY, or the error's kind, its first line and its last.

    The traceback of the latter goes to stderr, for the row is all that the caller makes of the error.
    """
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    traceback.print_exception(error)
    told = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {' ... '.join(line[:300] for line in dict.fromkeys((told[0], told[-1])))}"


def timed_turn(step: Callable[[], Tensor], device: torch.device, runs: int) -> dict[str, Any]:
    """Take one step to warm up and `runs` timed ones.

    step: returns its loss.  Returns the first loss (lora_b is still 0, so that contenders agree on it whatever their
    dropout), the seconds of each run and the peak MiB of the process (on CUDA: of its tensors).
    """
    loss = step().item()
    seconds = [seconds_of(step, device) for _ in range(runs)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux: KiB
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    return {"loss": loss, "seconds": seconds, "peak_mib": round(peak)}


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Time one call, the device's work included."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def median(values: Sequence[float]) -> float:
    """Return the middle value (of an even number the upper one, as bench/roofline.py does)."""
    return sorted(values)[len(values) // 2]


def limit_memory(gib: float | None) -> None:
    """Make this process's allocations beyond `gib` GiB fail, before the system kills for them; None limits nothing."""
    if gib is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 2**30), resource.RLIM_INFINITY))
