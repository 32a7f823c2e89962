"""Real ranks for tests: processes that talk by gloo over loopback."""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from e5core.distributed import World, start

ROOT = Path(__file__).parent.parent


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *arguments: object,
    timeout_s: float = 240,
    local_size: int | None = None,
) -> list[Any]:
    """Call function(world, *arguments) in so many processes.  Returns what each returned, by rank.

    local_size: processes on a node; None: there is one node.
    Raises AssertionError with the traceback of the first rank that failed, or where one is silent for too long.
    """
    context = forkserver()
    port, pipes, processes = free_port(), [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        variables |= {"LOCAL_WORLD_SIZE": local_size or world_size}
        process = context.Process(target=_rank, args=(theirs, variables, function, arguments), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return _collect(pipes, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            process.join(timeout=2)
            process.kill()
            process.join()


def forkserver() -> multiprocessing.context.ForkServerContext:
    """Return the context whose processes are forked from one that has imported torch and the program, once for all.

    They have the environment that this process had when it first started one.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tests"))
    multiprocessing.set_forkserver_preload(["e5core.train"])
    return multiprocessing.get_context("forkserver")


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"of {len(pipes)} ranks only {sorted(results)} answered in time"
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                failed, results[rank] = pipe.recv()
            except EOFError:
                failed, results[rank] = True, "the process ended without a word"
            assert not failed, f"rank {rank}: {results[rank]}"
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    pipe: Connection, variables: dict[str, int], function: Callable[..., Any], arguments: tuple[object, ...]
) -> None:
    os.environ |= {name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    try:
        world: World = start()
        pipe.send((False, function(world, *arguments)))
    except BaseException:  # whatever it is, the test must see it
        pipe.send((True, traceback.format_exc()))
