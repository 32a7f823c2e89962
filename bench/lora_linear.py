"""Time linears that read one x and their adapters, dropout 0 and 0.1: python -m bench.lora_linear; see bench/op.py.

Ours is timed on a plain x and, where the face takes one, on an x with spare columns behind it, which spares a pass over
y. "products alone" are the frozen linears without adapters; what ours takes beyond them is the adapters' price. "one by
one" is ours without what linears share: a pass over x, and the sum of their dx.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.models import linears
from bench.op import Case, Function, Settings, Work, run
from e5core.lora import READERS
from e5kernels.adapted import Adapted, Drop
from e5kernels.lora_linear import face, lora_linear, lora_linear_reference, spare_columns, with_room

RANK, SCALE, STREAM = 16, 2.0, 0x5EED


class Readers(NamedTuple):
    """Linears that read one x of a block."""

    names: str
    n_in: int
    n_outs: Sequence[int]


def cases(s: Settings) -> Iterator[Case]:
    """Yield the linears of a block by what they read, then the same on an x with spare columns."""
    sizes = linears(s.config)
    for n in s.n_tokens:
        keys = torch.randint(-(2**63), 2**63 - 1, (n,)).to(s.device)
        for names in READERS:
            readers = Readers(" ".join(names), sizes[names[0]][0], [sizes[name][1] for name in names])
            for drop in (Drop(), Drop(keys, 26)):
                yield _case(s, n, readers, drop, 0)
                if face(s.device) == "triton":
                    yield _case(s, n, readers, drop, spare_columns(RANK))


def _case(s: Settings, n: int, readers: Readers, drop: Drop, spare: int) -> Case:
    names, n_in, n_outs = readers
    weights = [s.randn(n_out, n_in) * n_in**-0.5 for n_out in n_outs]
    held = [with_room(weight, spare) for weight in weights] if spare else weights
    inputs = [s.randn(n, n_in + spare)]
    for n_out in n_outs:
        a, b = torch.randn(RANK, n_in, device=s.device), torch.randn(n_out, RANK, device=s.device)
        inputs += [a * n_in**-0.5, b * 0.1]

    def adapted(weights: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Adapted]:
        streams = range(STREAM, STREAM + len(weights))
        return [
            Adapted(w, None, a, b, i) for w, a, b, i in zip(weights, factors[::2], factors[1::2], streams, strict=True)
        ]

    def reference(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        return lora_linear_reference(x, adapted([w.to(x.dtype) for w in weights], factors), SCALE, drop)

    def ours(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        return lora_linear(x, adapted(held, factors), SCALE, drop)

    def one_by_one(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        return tuple(lora_linear(x, [each], SCALE, drop)[0] for each in adapted(held, factors))

    name = face(s.device) + (", spare columns" if spare else "")
    e, n_out = s.dtype.itemsize, sum(n_outs)
    operands, adapters = e * (n * (n_in + n_out) + n_in * n_out), RANK * (len(n_outs) * n_in + n_out)
    shape = f"{names}: {n} x {n_in} x {'+'.join(map(str, n_outs))}, dropout {drop.below / 256:.1f}"
    return Case(
        shape=shape + (", spare columns" if spare else ""),
        inputs=inputs,
        reference=reference,
        ours={name: ours} | ({f"{name}, one by one": one_by_one} if len(n_outs) > 1 else {}),
        unchecked={} if spare or drop.below else _others(weights),
        forward=Work(operands, 2.0 * n * (n_in * n_out + adapters)),
        backward=Work(operands + e * n * n_in, 2.0 * n * (n_in * n_out + 2 * adapters)),
        columns=n_in if spare else None,
        not_compiled="the reference is an autograd function; 'as PEFT' is what torch.compile could take",
    )


def _others(weights: Sequence[Tensor]) -> dict[str, Function]:
    def as_peft(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        parts = zip(weights, factors[::2], factors[1::2], strict=True)
        return tuple(F.linear(x, w) + SCALE * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) for w, a, b in parts)

    def alone(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.linear(x, w) for w in weights)

    compiled = torch.compile(as_peft, dynamic=False)
    return {"as PEFT": as_peft, "torch.compile, as PEFT": compiled, "products alone": alone}


if __name__ == "__main__":
    sys.exit(run("lora_linear", cases))
