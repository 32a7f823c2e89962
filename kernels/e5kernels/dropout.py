"""Dropout whose mask is a function of keys, so that any packing, micro-batch, rank and pass draws the same.

    forward   y[t, c] = x[t, c] * 256 / (256 - drop_below)  where byte c % 8 of
              splitmix64((keys[t] ^ stream) + (c // 8) * golden) is at least drop_below, else 0
    backward  the same function of the gradient

One 64-bit mix (splitmix64, Steele et al. 2014) serves 8 channels. Every face draws these bits; the tests hold them
against an independent integer implementation.
x: (T, C) any float dtype.  keys: (T,) int64.  Bytes, of e each element: 2 T C e; the mask is in memory for
the reference alone.
"""

import sys

import torch
from torch import Tensor

from e5kernels import native

if sys.platform == "linux":  # Triton is published for no other
    from e5kernels.dropout_triton import keyed_dropout_triton

_U64 = (1 << 64) - 1
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def keyed_dropout_reference(x: Tensor, keys: Tensor, stream: int, drop_below: int) -> Tensor:
    """Drop by plain torch; the definition.  Arguments and result as `keyed_dropout`."""
    groups = torch.arange(-(-x.shape[1] // 8), device=keys.device, dtype=torch.int64) * signed(_GOLDEN)
    bits = mix_tensor((keys ^ signed(stream))[:, None] + groups)  # (T, C / 8), 8 bytes each
    drawn = bits.flatten().view(torch.uint8).view(len(keys), 8 * len(groups))  # flat: no row at all has no strides
    kept = drawn[:, : x.shape[1]] >= drop_below
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.where(kept, wide * (256 / (256 - drop_below)), 0).to(x.dtype)


def face(device: torch.device) -> str:
    """Name the face that `keyed_dropout` uses on a device: "triton" on CUDA under Linux, else as `native.face`."""
    return "triton" if device.type == "cuda" and sys.platform == "linux" else native.face(device)


def keyed_dropout(x: Tensor, keys: Tensor, stream: int, drop_below: int) -> Tensor:
    """Drop elements by key and scale up the rest.

    x: (T, C).  keys: (T,) int64, one a token.  stream: 64 bits that name the place of the mask.  drop_below: 0..255,
    256 times the probability.  Returns like x, without a gradient of its own: its caller's backward calls it again.
    """
    chosen = face(x.device) if native.takes(x) else "reference"
    if chosen == "triton":
        return keyed_dropout_triton(x, keys, signed(stream), drop_below)
    if chosen == "reference":
        return keyed_dropout_reference(x, keys, stream, drop_below)
    return torch.ops.e5kernels.keyed_dropout(x.contiguous(), keys.contiguous(), signed(stream), drop_below)


def mix(value: int) -> int:
    """Mix 64 bits (splitmix64: golden-ratio step, then finaliser).  Returns an int in [0, 2^64)."""
    z = (value + _GOLDEN) & _U64
    z = ((z ^ (z >> 30)) * _MIX_1) & _U64
    z = ((z ^ (z >> 27)) * _MIX_2) & _U64
    return z ^ (z >> 31)


def mix_tensor(z: Tensor) -> Tensor:
    """Do what `mix` does to every element of an int64 tensor, in place, and return it."""
    z.add_(signed(_GOLDEN))
    for shift, factor in ((30, _MIX_1), (27, _MIX_2), (31, None)):
        high = (z >> shift).bitwise_and_((1 << (64 - shift)) - 1)  # torch shifts arithmetically
        z.bitwise_xor_(high)
        if factor is not None:
            z.mul_(signed(factor))
    return z


def signed(value: int) -> int:
    """Read the low 64 bits as a signed integer."""
    value &= _U64
    return value - (1 << 64) if value >> 63 else value


def _fake(x: Tensor, keys: Tensor, stream: int, drop_below: int) -> Tensor:
    return torch.empty_like(x)


if native.AVAILABLE:
    torch.library.register_fake("e5kernels::keyed_dropout", _fake)
