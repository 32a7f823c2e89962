"""Time a frozen linear with its adapter, dropout 0 and 0.1: python -m bench.lora_linear; see bench/op.py.

Ours is timed on a plain x and, where the face takes one, on an x with spare columns behind it, which spares a pass over
y. "product alone" is the frozen linear without adapter; what ours takes beyond it is the adapter's price.
"""

import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.models import linears
from bench.op import Case, Function, Settings, Work, run
from e5kernels.lora_linear import face, lora_linear, lora_linear_reference, spare_columns, with_room

RANK, SCALE, STREAM = 16, 2.0, 0x5EED


def cases(s: Settings) -> Iterator[Case]:
    """Yield each different linear of a block, then the same on an x with spare columns."""
    for n in s.n_tokens:
        keys = torch.randint(-(2**63), 2**63 - 1, (n,)).to(s.device)
        for n_in, n_out in dict.fromkeys(linears(s.config).values()):
            for drop_below in (0, 26):
                yield _case(s, n, n_in, n_out, keys if drop_below else None, drop_below, 0)
                if face(s.device) == "triton":
                    yield _case(s, n, n_in, n_out, keys if drop_below else None, drop_below, spare_columns(RANK))


def _case(s: Settings, n: int, n_in: int, n_out: int, keys: Tensor | None, drop_below: int, spare: int) -> Case:
    weight = s.randn(n_out, n_in) * n_in**-0.5
    a, b = torch.randn(RANK, n_in, device=s.device), torch.randn(n_out, RANK, device=s.device)
    inputs = [s.randn(n, n_in + spare), a * n_in**-0.5, b * 0.1]
    held = with_room(weight, spare) if spare else weight

    def reference(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear_reference(x, weight.to(x.dtype), None, a, b, SCALE, keys, STREAM, drop_below)

    def ours(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, held, None, a, b, SCALE, keys, STREAM, drop_below)

    name = face(s.device) + (", spare columns" if spare else "")
    e, adapter = s.dtype.itemsize, RANK * (n_in + n_out)
    operands = e * (n * (n_in + n_out) + n_in * n_out)
    return Case(
        shape=f"{n} x {n_in} x {n_out}, dropout {drop_below / 256:.1f}" + (", spare columns" if spare else ""),
        inputs=inputs,
        reference=reference,
        ours={name: ours},
        unchecked={} if spare or drop_below else _others(weight),
        forward=Work(operands, 2.0 * n * (n_in * n_out + adapter)),
        backward=Work(operands + e * n * n_in, 2.0 * n * (n_in * n_out + 2 * adapter)),
        columns=n_in if spare else None,
        not_compiled="the reference is an autograd function; 'as PEFT' is what torch.compile could take",
    )


def _others(weight: Tensor) -> dict[str, Function]:
    def as_peft(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, weight) + SCALE * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))

    def alone(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, weight)

    return {"as PEFT": as_peft, "torch.compile, as PEFT": torch.compile(as_peft, dynamic=False), "product alone": alone}


if __name__ == "__main__":
    sys.exit(run("lora_linear", cases))
