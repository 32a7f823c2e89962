"""A GPU that computes nothing: torch's meta device, on which what a GPU refuses, or waits for, is told.

A tensor there has a shape and no numbers. Ops that mix it with a CPU's tensor, kernels launched on the latter, and all
that reads its numbers are counted; what is read is 1, True or 0.
"""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.dry_run import PRODUCTS, as_on_a_gpu

META = torch.device("meta")
aten = torch.ops.aten


class FakeGpu(TorchDispatchMode):
    """Counts what is read from the device, and what mixes devices, by the room and function of ours that asked.

    waits: those reads before which a kernel or a product was launched, and nothing read since, which a GPU has to end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.is_busy = False
        self.mixed: Counter[str] = Counter()

    def begin(self) -> None:
        """Forget what was counted; nothing is queued."""
        self.reads.clear()
        self.waits.clear()
        self.mixed.clear()
        self.is_busy = False

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, op.overloadpacket
        if torch.is_inference_mode_enabled():  # where ops made of others are not taken apart before they come here
            with self:
                results = op.decompose(*args, **kwargs)
            if results is not NotImplemented:
                return results
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = {x.device for x in given}
        if META in here and (read := self._read(name, args, kwargs, given)) is not None:
            self.reads[_asked_by()] += 1
            if self.is_busy:
                self.waits[_asked_by()] += 1
            self.is_busy = False
            return read
        self.is_busy |= META in here and name in PRODUCTS
        is_copy = name in (aten._to_copy, aten.copy_)  # to the device; the others are reads
        numbers = {x.device for x in given if x.ndim or x.device == META}  # a CPU's single number goes anywhere
        if len(numbers) > 1 and not is_copy:
            self.mixed[f"{_asked_by()} {name.__name__}"] += 1
        return op(*args, **kwargs)

    def _read(self, name: Any, args: tuple, kwargs: dict[str, Any], given: list[Tensor]) -> Any:
        """Return what an op that needs numbers of the device finds there, None where it needs none."""
        x = given[0]
        if name is aten._local_scalar_dense:
            return torch.ones((), dtype=x.dtype).item()
        if name is aten.equal:
            return False
        if name is aten.nonzero:
            return torch.empty(0, x.ndim, dtype=torch.int64, device=META)
        if name is aten._to_copy and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros(x.shape, dtype=kwargs.get("dtype") or x.dtype)
        if name is aten.copy_ and args[0].device != META:
            return args[0]
        return None

    def launch(self, kernel: Any, *arguments: Any, **settings: Any) -> None:
        """Take the place of a kernel's launch."""
        self.is_busy = True
        for x in (*arguments, *settings.values()):
            if isinstance(x, Tensor) and x.device != META:
                self.mixed[f"{_asked_by()} {kernel.__name__}"] += 1


def _asked_by() -> str:
    """Name the innermost function of ours, as room.py:function."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.parent.name in ("e5core", "e5kernels"):
            return f"{path.name}:{frame.name}"
    return "torch"


@contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Have the meta device for a GPU within a with block."""
    found = FakeGpu()

    def launch(kernel: Any, *arguments: Any, **settings: Any) -> None:
        found.launch(kernel, *arguments, **settings)

    with as_on_a_gpu("meta", launch), found:
        yield found
