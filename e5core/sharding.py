"""Sharding: each rank keeps a slice of the model and gathers a part of it when it is used (ZeRO-3, arXiv 1910.02054).

A unit is a module that is called as a whole, a block; what is in no unit is the root's. A unit's parameters of one
dtype, all trainable or all frozen, are laid flat one after another, each as it lies in its own memory, transposed or
not, with what room is behind it there (lora.make_room), and every rank keeps its slice of that:

    forward    a unit is gathered when it is called, and the next one meanwhile; the one before is freed
    backward   the same from the last unit to the first, whatever is computed again there (recompute.py)
    step       gradients of trainable parameters, added up locally in max(fp32, their dtype), are reduce-scattered once
               (or after every backward pass, where all is trained); frozen units send nothing; AdamW works on slices

So at most two units are whole at a time, beside the root, which stays from the first call to `release`. Parameters are
tensors of their own on a storage that is emptied and filled again: what autograd saved for the backward pass is valid
as soon as the unit is gathered. Every rank must call the units as often as the others: one that has nothing left to
compute calls `idle`.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from e5core.distributed import World, begin_gather, nodes, scatter_sum, share, sum_over_ranks
from e5kernels.lora_linear import room_behind

Strategy = Literal["auto", "full", "hybrid", "none"]
ALIGNMENT = 16  # elements: a parameter begins where a GEMM can load 16 bytes at once, in any dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardingConfig:
    """The [sharding] table."""

    strategy: Strategy = "auto"  # full: a slice a rank; hybrid: slices in a node, copies across; none: a copy a rank


@dataclass(slots=True)
class Traffic:
    """What this rank's units have moved so far; bytes are those received from other ranks and sent to them."""

    n_gathers: int = 0
    gathered_bytes: int = 0
    n_reductions: int = 0
    reduced_bytes: int = 0
    most_gathered: int = 0  # units that were whole at once, without the root


class Place(NamedTuple):
    """Where a rank's part of a parameter lies in the parameter, laid flat, whose shape is the whole's."""

    start: int
    length: int
    shape: torch.Size


@dataclass(frozen=True, slots=True)
class Slice:
    """The stretch of a tensor, laid flat, that one rank holds or writes; n = 0 where it has nothing of it."""

    values: Tensor  # (n,), contiguous
    start: int  # where it begins in the whole, laid flat
    shape: tuple[int, ...]  # of the whole

    @property
    def stop(self) -> int:
        """Where it ends in the whole, laid flat."""
        return self.start + len(self.values)

    def share(self, rank: int, n: int) -> "Slice":
        """Return what the `rank`-th of n that hold the same stretch writes of it."""
        first, last = (len(self.values) * r // n for r in (rank, rank + 1))
        return Slice(self.values[first:last], self.start + first, self.shape)


class _Flat:
    """Parameters of one dtype, all trainable or all frozen, laid one after another; this rank keeps a slice.

    What is trained is kept in max(fp32, dtype) and gathered in dtype.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], world: World) -> None:
        first, self.world = next(iter(parameters.values())), world
        self.offsets: dict[str, int] = {}
        total = 0
        for name, parameter in parameters.items():
            self.offsets[name] = total
            room = room_behind(parameter) * len(parameter)
            total += -(-(parameter.numel() + room) // ALIGNMENT) * ALIGNMENT
        length = -(-total // (ALIGNMENT * world.world_size)) * ALIGNMENT
        self.is_trained = first.requires_grad
        kept = torch.promote_types(first.dtype, torch.float32) if self.is_trained else first.dtype
        self.part = torch.zeros(length, dtype=kept, device=world.device)
        self.whole = torch.empty(length * world.world_size, dtype=first.dtype, device=world.device)
        self.places = {name: self._place(name, parameter) for name, parameter in parameters.items()}
        self.parameters = {name: self._on_storage(name, parameter) for name, parameter in parameters.items()}
        self.n_bytes = self.whole.nbytes
        self.free()
        # this rank's part of each trainable parameter, for the optimizer, and of their summed gradient
        self.own = {name: nn.Parameter(self.slice_of(name, self.part)) for name in parameters if self.is_trained}
        self.gradient = self.part

    def _place(self, name: str, parameter: Tensor) -> Place:
        begin, size = self.world.rank * len(self.part) - self.offsets[name], parameter.numel()
        start, end = min(max(begin, 0), size), min(max(begin + len(self.part), 0), size)
        return Place(start, end - start, parameter.shape)

    def _on_storage(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """Make a parameter on the storage of `whole`: not a view of it, which would count its changes as its own."""
        tensor = torch.empty(0, dtype=self.whole.dtype, device=self.whole.device)
        tensor.set_(self.whole.untyped_storage(), self.offsets[name], parameter.shape, parameter.stride())
        return nn.Parameter(tensor, requires_grad=self.is_trained)

    def slice_of(self, name: str, part: Tensor) -> Tensor:
        """View a parameter's values in a tensor that is laid out as this rank's slice is."""
        place = self.places[name]
        first = max(0, self.offsets[name] - self.world.rank * len(self.part)) if place.length else 0
        return part[first : first + place.length]

    def cut(self, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, values) of every parameter of a tensor that is laid out as all slices together are."""
        for name, offset in self.offsets.items():
            shape = self.places[name].shape
            yield name, whole[offset : offset + shape.numel()].view(shape)

    def free(self) -> None:
        """Give the memory of the whole back."""
        self.whole.untyped_storage().resize_(0)

    @torch.no_grad()
    def reduce(self, replicas: World, each_pass: bool) -> int:
        """Add the parameters' gradients, summed over the ranks, to this rank's slice.  Returns the bytes sent."""
        flat = self.part.new_zeros(len(self.whole))
        reached = {name for name, parameter in self.parameters.items() if each_pass or parameter.grad is not None}
        for name, view in self.cut(flat):
            if self.parameters[name].grad is not None:
                view.copy_(self.parameters[name].grad)
                self.parameters[name].grad = None
        total = sum_over_ranks(scatter_sum(flat, self.world), replicas)
        if all(parameter.grad is None for parameter in self.own.values()):
            self.gradient = total
        else:
            self.gradient += total
        for name in reached:
            self.own[name].grad = self.slice_of(name, self.gradient)
        n_replicas = replicas.world_size
        return total.nbytes * (self.world.world_size - 1) + 2 * total.nbytes * (n_replicas - 1) // n_replicas


class _Unit:
    """What is gathered and freed together."""

    def __init__(self, named: Mapping[str, nn.Parameter], world: World) -> None:
        kinds: dict[tuple[torch.dtype, bool], dict[str, nn.Parameter]] = {}
        for name, parameter in named.items():
            kinds.setdefault((parameter.dtype, parameter.requires_grad), {})[name] = parameter
        self.flats = [_Flat(parameters, world) for parameters in kinds.values()]
        self.is_gathered = False
        self.pending: list[Callable[[], object]] = []  # what is to be waited for before it is used


class Shards:
    """The slices of a model that this rank keeps, and the units that are gathered."""

    def __init__(
        self, root: nn.Module, units: Sequence[nn.Module], world: World, replicas: World, each_pass: bool = False
    ) -> None:
        """Shard a model, on the meta device or not; its values are 0 until they are `put`.

        units: modules below root, each called once in a forward pass, in this order; gradients pass through all.
        world: the ranks over which it is sharded.  replicas: those that keep the same slices.
        each_pass: `reduce_gradients` is called after every backward pass, not once a step.
        Raises ValueError where two modules share a parameter.
        """
        self.world, self.replicas, self.each_pass, self.traffic = world, replicas, each_pass, Traffic()
        self._side = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None
        owner = {id(parameter): i for i, unit in enumerate(units) for parameter in unit.parameters()}
        named: list[dict[str, nn.Parameter]] = [{} for _ in (*units, root)]
        for name, parameter in root.named_parameters(remove_duplicate=False):
            named[owner.get(id(parameter), -1)][name] = parameter
        if len(set(map(id, root.parameters()))) < sum(map(len, named)):
            raise ValueError("two modules share a parameter, which cannot be sharded; give each its own")
        *self._units, self._root = [_Unit(own, world) for own in named]
        self._flat_of = {name: flat for unit in self._all() for flat in unit.flats for name in flat.parameters}
        for name, flat in self._flat_of.items():
            module, _, leaf = name.rpartition(".")
            root.get_submodule(module).register_parameter(leaf, flat.parameters[name])
        root.register_forward_pre_hook(lambda *_: self._enter_root())
        for i, unit in enumerate(units):
            unit.register_forward_pre_hook(lambda *_, i=i: self._enter(i, 1))
            unit.register_forward_hook(lambda module, arguments, output, i=i: _Left.apply(output, self, i))

    def put(self, name: str, values: Tensor) -> None:
        """Keep this rank's slice of a parameter's values.  Raises ValueError for another shape than the parameter's."""
        self.release()
        flat = self._flat_of[name]
        start, length, shape = flat.places[name]
        if values.shape != shape:
            raise ValueError(f"{name} must have the shape {tuple(shape)}: got {tuple(values.shape)}")
        flat.slice_of(name, flat.part).copy_(_stretch(values, start, length, flat.parameters[name].stride()))

    def trained(self) -> dict[str, nn.Parameter]:
        """Return this rank's part of each trainable parameter, (n,) max(fp32, dtype), n may be 0, by name."""
        return {name: flat.own[name] for name, flat in self._flat_of.items() if flat.is_trained}

    def slices(self) -> dict[str, Slice]:
        """Return the same with where each lies."""
        places = {name: self._flat_of[name].places[name] for name in self.trained()}
        return {n: Slice(own, places[n].start, tuple(places[n].shape)) for n, own in self.trained().items()}

    def whole(self, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Gather tensors that are laid out as `trained`, the parameters themselves or moments, unit by unit.

        Every rank must go through all of it.  Yields (name, whole tensor).
        """
        for flat in dict.fromkeys(flat for flat in self._flat_of.values() if flat.is_trained):
            part = torch.zeros_like(flat.part)
            for name in flat.own:
                flat.slice_of(name, part).copy_(parts[name].detach())
            gathered = part.new_empty(len(part) * self.world.world_size)
            work = begin_gather(gathered, part, self.world)
            if work is not None:
                work.wait()
            for name, values in flat.cut(gathered):
                yield name, values.clone()

    def idle(self, backward: bool) -> None:
        """Join the collectives of a forward pass (and its backward pass) of others, with nothing to compute."""
        self._enter_root()
        for i in range(len(self._units)):
            self._enter(i, 1)
        if backward:
            for i in reversed(range(len(self._units))):
                self._enter_backward(i)

    def reduce_gradients(self) -> None:
        """Leave the gradients' sums over the ranks in the parts that `trained` returns, and none in the parameters."""
        for unit in (*self._units[:1], self._root) if self.each_pass else self._all():
            self._reduce(unit)

    def release(self) -> None:
        """Free everything that is gathered; what is changed in the slices is seen from then on."""
        for unit in self._all():
            self._free(unit)

    def _all(self) -> list[_Unit]:
        return [*self._units, self._root]

    def _enter_root(self) -> None:
        self._gather(self._root)
        for unit in self._units[1:]:
            self._free(unit)
        for unit in self._units[:1]:
            self._gather(unit)
        self._wait(self._root)

    def _enter(self, i: int, step: int) -> None:
        """Have unit i whole; begin to gather the one that comes next, and free all others."""
        for j, unit in enumerate(self._units):
            if j not in (i, i + step):
                self._free(unit)
        self._gather(self._units[i])
        if 0 <= i + step < len(self._units):
            self._gather(self._units[i + step])
        self._wait(self._units[i])

    def _enter_backward(self, i: int) -> None:
        self._enter(i, -1)
        if self.each_pass and i + 1 < len(self._units):
            self._reduce(self._units[i + 1])  # autograd accumulates gradients before it goes on to an earlier node

    def _gather(self, unit: _Unit) -> None:
        if unit.is_gathered:
            return
        unit.is_gathered = True
        with self._beside():
            for flat in unit.flats:
                flat.whole.untyped_storage().resize_(flat.n_bytes)
                work = begin_gather(flat.whole, flat.part.to(flat.whole.dtype), self.world)
                if work is not None:
                    unit.pending.append(work.wait)
                self.traffic.n_gathers += 1
                self.traffic.gathered_bytes += flat.n_bytes // self.world.world_size * (self.world.world_size - 1)
            if self._side is not None:
                filled = self._side.record_event()
                unit.pending.append(lambda: torch.cuda.current_stream(self.world.device).wait_event(filled))
        self.traffic.most_gathered = max(self.traffic.most_gathered, sum(unit.is_gathered for unit in self._units))

    def _beside(self) -> AbstractContextManager:
        """Queue on the side stream, behind what has been computed: it read what was freed, and wrote the slices."""
        if self._side is None:
            return nullcontext()
        self._side.wait_stream(torch.cuda.current_stream(self.world.device))
        return torch.cuda.stream(self._side)

    def _wait(self, unit: _Unit) -> None:
        for wait in unit.pending:
            wait()
        unit.pending.clear()

    def _free(self, unit: _Unit) -> None:
        self._wait(unit)
        unit.is_gathered = False
        for flat in unit.flats:
            flat.free()

    def _reduce(self, unit: _Unit) -> None:
        for flat in unit.flats:
            if flat.is_trained:
                self.traffic.n_reductions += 1
                self.traffic.reduced_bytes += flat.reduce(self.replicas, self.each_pass)


def _stretch(values: Tensor, start: int, length: int, stride: tuple[int, ...]) -> Tensor:
    """Return `length` of the values from `start` on, as they are laid out: contiguous, or (out, in) by (1, out)."""
    if stride[-1] == 1:
        return values.reshape(-1)[start : start + length]
    n_out = values.shape[0]
    first = start // n_out
    columns = values[:, first : -(-(start + length) // n_out)]  # no more of them is copied
    return columns.T.reshape(-1)[start - first * n_out :][:length]


class _Left(torch.autograd.Function):
    """What leaves a unit: the first thing of the unit that the backward pass meets."""

    @staticmethod
    def forward(ctx, output, shards, i):  # noqa: ANN001, ANN205
        ctx.shards, ctx.i = shards, i
        return output.view_as(output)

    @staticmethod
    def backward(ctx, g):  # noqa: ANN001, ANN205
        ctx.shards._enter_backward(ctx.i)
        return g, None, None


def settle_strategy(strategy: Strategy, root: nn.Module, world: World) -> tuple[Strategy, str]:
    """Resolve "auto" for all ranks, as rank 0 does.  Returns the strategy and a sentence that says why."""
    if strategy != "auto":
        return strategy, "as configured"
    if world.world_size == 1:
        return "none", "auto: one rank"
    # a trained parameter has a gradient and two moments beside it, all as wide as its master
    wide = [(p, torch.promote_types(p.dtype, torch.float32).itemsize) for p in root.parameters()]
    n_bytes = sum(p.numel() * 4 * size if p.requires_grad else p.nbytes for p, size in wide)
    memory = share(_memory(world), world)[0]
    chosen: Strategy = "none" if 3 * n_bytes <= memory else "full"
    return chosen, f"auto: weights, adapters and optimizer are {n_bytes / 2**30:.2f} GiB of {memory / 2**30:.1f} a rank"


def shard(
    root: nn.Module, units: Sequence[nn.Module], strategy: Strategy, world: World, each_pass: bool = False
) -> Shards | None:
    """Shard a model by a strategy, `each_pass` as in Shards.  Returns None where "none" leaves it as it is.

    Where all is trained, "none" is a slice that is the whole: weights in bf16 for two units, masters in fp32 for all.
    Raises ValueError for "hybrid" where nodes do not have the same number of ranks.
    """
    if strategy == "none" and not each_pass:
        return None
    alone = World(rank=0, world_size=1, device=world.device)
    parts = {"full": (world, alone), "none": (alone, world)}
    return Shards(root, units, *(nodes(world) if strategy == "hybrid" else parts[strategy]), each_pass)


def _memory(world: World) -> int:
    """Return the bytes of this rank's device; ranks on a CPU have the machine's memory in equal parts."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world.local_size
