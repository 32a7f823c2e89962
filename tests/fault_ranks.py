"""Ranks of e5core.train that tests kill, signal and starve: real processes, forked from one that has imported torch."""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from ranks import forkserver, free_port

from e5core.train import main


@contextmanager
def started(world_size: int, log: Path, arguments: list[str], starved: int = -1) -> Iterator[list[BaseProcess]]:
    """Start e5core.train on so many ranks, which write what they say to log; what is left at the end is killed.

    starved: the rank that can write no file of more than 6,000 bytes.
    """
    context, port, processes = forkserver(), free_port(), []
    for rank in range(world_size):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        process = context.Process(target=_rank, args=(variables, str(log), arguments, rank == starved), daemon=True)
        process.start()
        processes.append(process)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def ended(processes: list[BaseProcess], within_s: float) -> list[int]:
    """Wait until all ranks have ended, or raise AssertionError.  Returns their exit codes."""
    deadline = time.monotonic() + within_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        assert process.exitcode is not None, f"a rank still runs after {within_s} s"
    return [process.exitcode for process in processes]


def wait_until(condition: Callable[[], bool], processes: list[BaseProcess], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert all(process.is_alive() for process in processes) and time.monotonic() < deadline, log.read_text()
        time.sleep(0.002)


def _rank(variables: dict[str, int], log: str, arguments: list[str], starved: bool) -> None:
    os.environ |= {name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    torch.set_num_threads(1)
    if starved:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
    sys.exit(main(arguments))
