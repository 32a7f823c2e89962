"""Ranks: which process this is, which device it owns, what the ranks tell one another, and the lines that a run prints.

The only file that reads RANK, WORLD_SIZE and the like (set by torchrun; without it the process is rank 0 of 1), that
starts process groups (NCCL between GPUs, gloo between CPUs) and that logs (evaluate prints its table, which is its
result, to stdout). Every rank must call the same collectives in the same order; a world of one has no group, and its
collectives return at once.

Gradients go through `gather_rows` and `sum_over_ranks` as if all ranks were one process: each computes a part of one
loss from all rows, and what it sends back to another's row is added up there. So the gradient's scale and direction
are the same for any number of ranks.
"""

import gc
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    # Its functions keep the job's group as their default where there is one when it is imported (torch 2.13), which
    # torch._dynamo does as a model is first built; a group that is referred to outlives `finish`. So import it before.
    import torch.distributed.nn.functional  # noqa: F401


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The processes of a job, or of a part of it (`nodes`), seen from one of them."""

    rank: int  # 0 .. world_size - 1, over all nodes
    world_size: int
    device: torch.device  # where this rank computes
    local_size: int = 1  # processes on this node
    group: "dist.ProcessGroup | None" = None  # of a part; None: the whole job

    @property
    def is_main(self) -> bool:
        """Whether this rank does the work that is done once: logs, files."""
        return self.rank == 0


GIVE_UP_AFTER = timedelta(minutes=30)  # of a collective that a rank does not join; longer than saving.PARTS_LIMIT_S
ALONE = World(rank=0, world_size=1, device=torch.device("cpu"))  # for what has no device to find


def start() -> World:
    """Join the job: find this process's place, its device, and the other ranks; a second call finds the same.

    Raises ValueError for a variable that is no number or is missing, or a LOCAL_RANK without its own GPU.
    """
    rank, world_size, device = _variable("RANK", 0), _variable("WORLD_SIZE", 1), _device()
    local_size = _variable("LOCAL_WORLD_SIZE", world_size)
    if not 0 <= rank < world_size:
        raise ValueError(
            f"RANK must be in 0..{world_size - 1}, for WORLD_SIZE={world_size}: got RANK={rank}; start it with torchrun"
        )
    if world_size > 1 and not dist.is_initialized():
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(f"got WORLD_SIZE={world_size} but no {missing[0]}: start the job with torchrun")
        if device.type == "cuda":
            backend, on = "nccl", {"device_id": device}
        else:
            backend, on = "gloo", {}
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=GIVE_UP_AFTER, **on)
    return World(rank=rank, world_size=world_size, device=device, local_size=local_size)


def use_one_thread() -> None:
    """Compute by one thread in this process, which works beside others: torch, and tokenizers' batches of texts."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@contextmanager
def same_bits(wanted: bool, device: torch.device) -> Iterator[None]:
    """Have torch compute the same bits every time, or raise where it cannot; our kernels always do (no atomics).

    wanted: False changes nothing.  Raises ValueError where cuBLAS is told not to.
    """
    if not wanted:
        yield
        return
    workspaces = (":4096:8", ":16:8")  # cuBLAS reads it at its first product; torch takes no other
    if device.type == "cuda" and os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", workspaces[0]) not in workspaces:
        raise ValueError(f"train.deterministic needs CUBLAS_WORKSPACE_CONFIG to be one of {workspaces}, or not set")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def alone() -> World:
    """Return this process as a world of its own on its device, also where it is one of many.  Raises as `start`."""
    return World(rank=0, world_size=1, device=_device())


def nodes(world: World) -> tuple[World, World]:
    """Part a job by its nodes.  Returns the world of this node's ranks, and that of those with its place on each node.

    Every rank must call it.  Raises ValueError where the nodes do not have the same number of ranks.
    """
    size, sizes = world.local_size, set(share(world.local_size, world))
    if len(sizes) > 1 or size < 1 or world.world_size % size:
        raise ValueError(
            f"nodes must have the same number of ranks: got {sorted(sizes)}, {world.world_size} in all; give every "
            "node the same --nproc-per-node"
        )
    if size in (1, world.world_size):
        one = World(rank=0, world_size=1, device=world.device)
        return (one, world) if size == 1 else (world, one)
    ranks = torch.arange(world.world_size).unflatten(0, (-1, size))
    parts = []
    for groups, rank in ((ranks, world.rank % size), (ranks.T, world.rank // size)):
        members = [own for own in groups.tolist() if world.rank in own][0]
        group, _ = dist.new_subgroups_by_enumeration(groups.tolist(), timeout=GIVE_UP_AFTER)
        parts.append(replace(world, rank=rank, world_size=len(members), group=group))
    return parts[0], parts[1]


def finish() -> None:
    """Leave the job, at the end of a command that succeeded; nothing may refer to a World with a `group` any more.

    Gloo's threads are joined as the last reference to their group goes. One that runs on may drop a collective's
    tensor while the interpreter ends, ask for its lock, and abort the process (pytorch/pytorch #179291, #190489).
    One that failed must not leave so: the others wait in a collective, and it would wait for them. It exits, and
    torchrun ends the others.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # models refer to their hooks and back


def share(value: Any, world: World) -> list[Any]:
    """Tell all ranks a JSON value.  Returns every rank's, by rank; a world of one gets its own as it is."""
    if world.world_size == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(world.device)
    lengths = _all_gather(torch.tensor([len(text)], device=world.device), world).flatten().tolist()
    padded = text.new_zeros(max(lengths))
    padded[: len(text)] = text
    texts = _all_gather(padded, world).cpu().numpy()
    return [json.loads(row[:length].tobytes()) for row, length in zip(texts, lengths, strict=True)]


def tell(value: Any, world: World) -> Any:
    """Tell all ranks a JSON value of rank 0; the others' is not looked at.  Returns it, on every rank."""
    if world.world_size == 1:
        return value
    text = json.dumps(value).encode() if world.is_main else b""
    length = torch.tensor([len(text)], device=world.device)
    dist.broadcast(length, group=world.group, group_src=0)
    told = torch.empty(int(length.item()), dtype=torch.uint8, device=world.device)
    if world.is_main:
        told.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(told, group=world.group, group_src=0)
    return json.loads(told.cpu().numpy().tobytes())


def patient(world: World) -> World:
    """Return the same ranks for what one may wait long for: collectives by gloo, on the CPU, that may take 30 days.

    Every rank must call it. The collectives of the job's own group give up after GIVE_UP_AFTER.
    """
    if world.world_size == 1:
        return world
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    return replace(world, device=torch.device("cpu"), group=group)


def check_same(values: Mapping[str, Any], world: World) -> None:
    """Compare named JSON values over the ranks.  Raises ValueError on every rank where one has others than rank 0."""
    first, *others = share(dict(values), world)
    for rank, theirs in enumerate(others, start=1):
        different = [name for name in first if theirs.get(name) != first[name]]
        if different:
            listed = "; ".join(f"{name} is {theirs.get(name)!r}, not {first[name]!r}" for name in different[:3])
            raise ValueError(
                f"rank {rank} began with another configuration than rank 0: {listed}; give all ranks the same files "
                "and arguments"
            )


def sum_over_ranks(term: Tensor, world: World) -> Tensor:
    """Add up a tensor over the ranks.  term: the same shape on each.

    Returns the sum, on every rank; its gradient goes to this rank's term unchanged, for all ranks hold one sum.
    """
    return term if world.world_size == 1 else _Sum.apply(term, world)


def largest(number: int, world: World) -> int:
    """Return the largest of all ranks' numbers."""
    if world.world_size == 1:
        return number
    most = torch.tensor(number, device=world.device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=world.group)
    return int(most.item())


def gather_rows(rows: Tensor, places: Sequence[Sequence[int]], world: World) -> Tensor:
    """Bring the rows of all ranks together.

    rows: (n, ...), this rank's; ranks may have different numbers, 0 too.  places[r]: where rank r's rows stand in the
    result, 0 to N - 1 over all ranks; the same on all.
    Returns (N, ...). The gradient of a row is the sum of what all ranks send back to it.
    """
    if world.world_size == 1:
        return rows
    most = max(map(len, places))
    slots = torch.empty(sum(map(len, places)), dtype=torch.int64)
    for rank, own in enumerate(places):
        slots[torch.tensor(own, dtype=torch.int64)] = torch.arange(len(own)) + rank * most
    return _GatherRows.apply(rows, slots.to(rows.device), most, world)


@torch.no_grad()
def sum_gradients(parameters: Iterable[Tensor], world: World) -> None:
    """Add up the gradients of one dtype over the ranks, in place, by one collective."""
    if world.world_size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=world.group)
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def begin_gather(whole: Tensor, part: Tensor, world: World) -> "dist.Work | None":
    """Lay the parts of all ranks one after another.  whole: (W * n,), part: (n,), contiguous.

    Returns what is to be waited for before `whole` is read, None where there is nothing (a world of one).
    """
    if world.world_size == 1:
        whole.copy_(part)
        return None
    if whole.dtype.itemsize == 1:  # bytes are bytes; gloo, and NCCL before 2.24, know no fp8
        whole, part = whole.view(torch.uint8), part.view(torch.uint8)
    # One tensor, for NCCL would gather a list into a copy; before torch 2.13 the same had another name.
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    return gather(whole, part, group=world.group, async_op=True)


def scatter_sum(whole: Tensor, world: World) -> Tensor:
    """Add up a tensor over the ranks.  whole: (W * n, ...), contiguous.  Returns (n, ...), this rank's part."""
    if world.world_size == 1:
        return whole
    part = whole.new_empty(len(whole) // world.world_size, *whole.shape[1:])
    scatter = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
    scatter(part, whole, group=world.group)  # one tensor, as in begin_gather
    return part


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, term, world):  # noqa: ANN001, ANN205
        total = term.clone()
        dist.all_reduce(total, group=world.group)
        return total

    @staticmethod
    def backward(ctx, g):  # noqa: ANN001, ANN205
        return g, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, slots, most, world):  # noqa: ANN001, ANN205
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        ctx.save_for_backward(slots)
        ctx.n_rows, ctx.most, ctx.world = len(rows), most, world
        return _all_gather(padded, world).flatten(0, 1)[slots]

    @staticmethod
    def backward(ctx, g):  # noqa: ANN001, ANN205
        (slots,) = ctx.saved_tensors
        padded = g.new_zeros(ctx.world.world_size * ctx.most, *g.shape[1:])
        padded[slots] = g
        return scatter_sum(padded, ctx.world)[: ctx.n_rows], None, None, None


def _all_gather(tensor: Tensor, world: World) -> Tensor:
    """Stack a tensor of one shape over the ranks.  Returns (W, *shape)."""
    gathered = tensor.new_empty(world.world_size, *tensor.shape)
    dist.all_gather(list(gathered), tensor, group=world.group)
    return gathered


def log(message: str) -> None:
    """Print one line to stderr, at once, on rank 0 only."""
    if _variable("RANK", 0) == 0:
        print(message, file=sys.stderr, flush=True)


def log_error(message: str) -> None:
    """Print why this rank ends: on every rank, since torchrun may end the others before they can say anything."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    print(f"rank {os.environ.get('RANK')}: {message}" if several else message, file=sys.stderr, flush=True)


def _device() -> torch.device:
    """Find cuda:LOCAL_RANK where CUDA is available, else the CPU, and make it the current device."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = _variable("LOCAL_RANK", 0)
    if not 0 <= local_rank < torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK must name one of {torch.cuda.device_count()} visible GPUs: got {local_rank}; "
            "lower --nproc-per-node or widen CUDA_VISIBLE_DEVICES"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)  # Triton launches on the current device, whatever device its tensors live on
    return device


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} must be an integer: got {text!r}; start the job with torchrun") from None
