"""Ranks: which process this is, which device it owns, and the one line of log that a run prints.

The only file that reads RANK, WORLD_SIZE and LOCAL_RANK (set by torchrun; without it the process is rank 0 of 1) and
the only one that logs (evaluate prints its table, which is its result, to stdout). This version trains on one process;
more are refused by name, never half-run.
"""

import os
import sys
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The processes of a job, seen from one of them."""

    rank: int  # 0 .. world_size - 1, over all nodes
    world_size: int
    device: torch.device  # where this rank computes

    @property
    def is_main(self) -> bool:
        """Whether this rank does the work that is done once: logs, files."""
        return self.rank == 0


def start() -> World:
    """Find this process's place in the job and its device: cuda:LOCAL_RANK where CUDA is available, else the CPU.

    Raises ValueError for more than one process, a variable that is no number, or a LOCAL_RANK without its own GPU.
    """
    rank, world_size, local_rank = _variable("RANK", 0), _variable("WORLD_SIZE", 1), _variable("LOCAL_RANK", 0)
    if world_size != 1:
        raise ValueError(
            f"this version trains on one process: got WORLD_SIZE={world_size}; run torchrun --nproc-per-node 1"
        )
    if rank != 0:
        raise ValueError(f"the rank of a single process must be 0: got RANK={rank}; start it with torchrun")
    if not torch.cuda.is_available():
        return World(rank=rank, world_size=world_size, device=torch.device("cpu"))
    if not 0 <= local_rank < torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK must name one of {torch.cuda.device_count()} visible GPUs: got {local_rank}; "
            "lower --nproc-per-node or widen CUDA_VISIBLE_DEVICES"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)  # Triton launches on the current device, whatever device its tensors live on
    return World(rank=rank, world_size=world_size, device=device)


def log(message: str) -> None:
    """Print one line to stderr, at once, on rank 0 only."""
    if _variable("RANK", 0) == 0:
        print(message, file=sys.stderr, flush=True)


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} must be an integer: got {text!r}; start the job with torchrun") from None
