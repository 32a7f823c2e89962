"""What a step allocates on a GPU, told where there is none: the step is run dry, on the CPU.

Under `dry_run` every op takes its Triton face, no kernel is launched, and torch's own ops are computed on small tensors
alone: large results have the right size, and nothing is written into them. So a 7B's step costs seconds and address
space, and hardly any memory, while each tensor that it asks a GPU for comes and goes as it would there.
Not seen are what cuBLAS keeps for itself (32 MiB on Hopper), what torch's own CUDA kernels take while they run, what
NCCL keeps, and that CUDA's allocator rounds to 512 bytes.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from e5core.cards import MIB
from e5kernels import attention, dropout, fp8, fp8_linear, infonce, last_token, lora_linear, rms_norm, rope, swiglu

ROOMS = (attention, dropout, fp8, fp8_linear, infonce, last_token, lora_linear, rms_norm, rope, swiglu)
COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce", "reduce_scatter_single",
    "reduce_scatter_tensor",
)  # fmt: skip
SMALL = 4 * MIB  # bytes of a tensor whose numbers a step may read: ids, bounds, relations, embeddings, the loss
aten = torch.ops.aten
FILLED = (aten.full, aten.full_like, aten.new_full, aten.new_zeros, aten.ones_like, aten.zeros, aten.zeros_like)
LAID_OUT = (aten._unsafe_view, aten.resize_, aten.set_)  # nothing is computed, whatever their schemas say
PRODUCTS = (aten.mm, aten.addmm, aten.addmm_, aten._scaled_mm)  # never done: a CPU's take memory that a GPU's do not


class Uncomputed(TorchDispatchMode):
    """Gives what is made of large tensors without computing it: zeros where it is small, else whatever lies there."""

    def __init__(self) -> None:
        super().__init__()
        self.n_left_out = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, op.overloadpacket
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        is_meta = torch.device("meta") in (kwargs.get("device"), *(x.device for x in given))
        is_large = name in (*FILLED, *PRODUCTS) or not all(map(_is_small, given))
        if op.is_view or name in LAID_OUT or is_meta or not is_large:
            results = op(*args, **kwargs)
            return tree_map_only(Tensor, _zeroed, results) if "empty" in name.__name__ else results
        self.n_left_out += 1
        shapes = _on_meta(op, args, kwargs)
        if op._schema.is_mutable:
            return _written(op, args, kwargs, shapes)
        if name in FILLED and all(_is_small(x) for x in tree_leaves(shapes)):
            return op(*args, **kwargs)
        return tree_map_only(Tensor, lambda x: _zeroed(_like(x, "cpu")), shapes)


def _on_meta(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Return what an op returns, on the meta device."""
    args, kwargs = tree_map_only(Tensor, lambda x: _like(x, "meta"), (args, kwargs))
    return op(*args, **kwargs | ({"device": torch.device("meta")} if "device" in kwargs else {}))


def _written(op: Any, args: tuple, kwargs: dict[str, Any], shapes: Any) -> Any:
    """Return what an op returns that writes into its arguments: these, if they have the shapes of its results."""
    schema = op._schema
    named = {a.name: x for a, x in zip(schema.arguments, args, strict=False)} | kwargs
    written = [named[a.name] for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    for x, wanted in zip(written, tree_leaves(shapes), strict=False):
        if x.shape != wanted.shape:
            raise RuntimeError(
                f"{op} resizes {tuple(x.shape)} to {tuple(wanted.shape)}, which a dry run would not count"
            )
    return written[0] if len(schema.returns) == 1 else tuple(written[: len(schema.returns)])


class _Work:
    """A collective that is under way: it holds its tensors until it is waited for, as NCCL's does."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.held = arguments

    def wait(self) -> None:
        self.held = ()


def _like(x: Tensor, device: str) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)


def _is_small(x: Tensor) -> bool:
    return x.nbytes <= SMALL


def _zeroed(x: Tensor) -> Tensor:
    return x.zero_() if _is_small(x) and x.device.type == "cpu" else x


@contextmanager
def dry_run() -> Iterator[None]:
    """Do everything within a with block as on a GPU, on CPU tensors, but launch no kernel and compute nothing large."""
    with as_on_a_gpu("cpu"), Uncomputed():
        yield


@contextmanager
def as_on_a_gpu(device: str, launch: Callable[..., None] = lambda *arguments, **settings: None) -> Iterator[None]:
    """Take the ways of a GPU on devices of this type, with `launch` in place of every launch of a Triton kernel.

    Nor is any other rank spoken to: what would come from it is left as it is, so that one process can be one of many.
    """
    gpus = (device, "cuda")
    with ExitStack() as stack:
        for room in ROOMS:
            stack.enter_context(patch.object(room, "face", lambda own: "triton" if own.type in gpus else "reference"))
        for room in (fp8, fp8_linear):
            stack.enter_context(patch.object(room, "multiplies_codes", lambda own: own.type in gpus))
        for function in (JITFunction, InterpretedFunction):  # a kernel is either, by TRITON_INTERPRET
            stack.enter_context(patch.object(function, "run", launch))
        for name in filter(vars(dist).__contains__, COLLECTIVES):  # by torch's version
            stack.enter_context(patch.object(dist, name, _Work))
        yield
