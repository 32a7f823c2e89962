"""What frozen linears with adapters are to the ops that do them, lora_linear.py and fp8_linear.py."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from e5kernels.dropout import signed

MOST_LINEARS = 3  # that read one x: q, k and v


class Fp8Weight(NamedTuple):
    """A frozen W (out, in) in row-wise fp8, quantised for both directions."""

    codes: Tensor  # (out, in) e4m3
    scale: Tensor  # (out, 1) fp32
    codes_t: Tensor  # (in, out) e4m3, of W^T
    scale_t: Tensor  # (in, 1) fp32


class Adapted(NamedTuple):
    """A frozen linear and its adapter, whose A and B are of any float dtype and alone take gradients."""

    weight: Tensor | Fp8Weight  # (out, in)
    bias: Tensor | None  # (out,)
    lora_a: Tensor  # (R, in)
    lora_b: Tensor  # (out, R)
    stream: int  # of its dropout, as `keyed_dropout`'s


class Drop(NamedTuple):
    """The dropout of a micro-batch's tokens."""

    keys: Tensor | None = None  # (T,) int64, one a token; None drops nothing
    below: int = 0  # a byte drawn below it drops its element: p = below / 256


def flattened(linears: Sequence[Adapted], scale: float, drop: Drop, is_read: bool) -> tuple:
    """Lay out an autograd function's arguments, scale, keys, below, streams, is_read, and the tensors of every linear.

    Autograd follows no tensor that is in a tuple; and torch's profiler takes no integer beyond 64 bits signed.
    Raises ValueError where linears cannot read one x.
    """
    shapes = [tuple(linear.lora_a.shape) for linear in linears]
    if len(set(shapes)) != 1 or len(shapes) > MOST_LINEARS:
        raise ValueError(f"up to {MOST_LINEARS} linears read one x, each with lora_a (R, in) alike: got {shapes}")
    tensors = []
    for weight, *others, _ in linears:
        tensors += [*(weight if isinstance(weight, Fp8Weight) else (weight,)), *others]
    return scale, *drop, tuple(signed(linear.stream) for linear in linears), is_read, *tensors


def parted(tensors: Sequence[Tensor | None], n: int) -> list[Sequence[Tensor | None]]:
    """Part the tensors of linears, n of one after n of another.  Returns all first ones, all second ones and so on."""
    return [tensors[i::n] for i in range(n)]
