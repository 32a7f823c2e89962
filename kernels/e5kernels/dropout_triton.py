"""Triton face of `keyed_dropout`: its kernel and launcher.

What is computed stands in dropout.py; the bits are the reference's. The mask is drawn in registers, in forward and in
the caller's backward alike, and x is read by its row stride.

Floor, bf16, 8,192 x 4,096 at the 3.35 TB/s of an H100's data sheet: 2 T C e = 134 MB, 40 us; x 14,336: 140 us. Speed is
unmeasured; the blocks follow from this reckoning. A thread's 16 bytes of bf16 are the 8 channels of one mix, so that
each mix is made once (in fp32 by two threads). A program has up to 256 groups, 2,048 channels, on 4 warps: two groups a
thread, 4 KB in flight, so that four on a multiprocessor make the 13 KB that 3.35 TB/s ask for at a latency of 0.5 us
(an assumption). A mix is two 64-bit products and some ten other operations for 8 channels, below what the bytes cost.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_GROUPS = 256


@triton.jit
def _splitmix64(z):
    z += 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def drawn_bytes(key, groups, byte):
    """What the channels 8 * groups + byte of the tokens with these keys draw: 0..255.  All broadcast.

    key: int64, with the stream's bits already in it.
    """
    bits = _splitmix64(key.to(tl.uint64) + groups.to(tl.uint64) * 0x9E3779B97F4A7C15)
    return ((bits >> (8 * byte).to(tl.uint64)) & 255).to(tl.int32)


@triton.jit(do_not_specialize=["stream", "drop_below"])
def _keyed_dropout_kernel(
    x_ptr, keys_ptr, y_ptr, width, x_stride, stream, drop_below, scale, BLOCK_GROUPS: tl.constexpr
):
    """Drop channels of one token, 8 to a group."""
    n_blocks = tl.cdiv(width, 8 * BLOCK_GROUPS)
    token = (tl.program_id(0) // n_blocks).to(tl.int64)
    groups = (tl.program_id(0) % n_blocks) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)[:, None]
    byte = tl.arange(0, 8)[None, :]
    drawn = drawn_bytes(tl.load(keys_ptr + token) ^ stream.to(tl.int64), groups, byte)
    columns = 8 * groups + byte
    mask = columns < width
    x = tl.load(x_ptr + token * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * width + columns, tl.where(drawn >= drop_below, x * scale, 0.0), mask=mask)


def tile_of(width: int) -> dict[str, int]:
    """Choose the block size and warps for rows of this width."""
    block = min(BLOCK_GROUPS, triton.next_power_of_2(triton.cdiv(width, 8)))
    return {"BLOCK_GROUPS": block, "num_warps": max(1, block // 64)}


def keyed_dropout_triton(x: Tensor, keys: Tensor, stream: int, drop_below: int) -> Tensor:
    """Drop by the kernel, on Linux.

    x: (T, C) fp32 or bf16.  keys: (T,) int64.  stream: 64 bits, signed.  drop_below: 0..255.
    Returns like x, contiguous.  Raises ValueError where a shape, the keys' dtype or drop_below is another.
    """
    if x.ndim != 2 or keys.shape != x.shape[:1] or keys.dtype != torch.int64 or not 0 <= drop_below < 256:
        got = f"{tuple(x.shape)}, {tuple(keys.shape)} {keys.dtype}, {drop_below}"
        raise ValueError(f"x must be (T, C), keys (T,) int64 and drop_below within 0..255: got {got}")
    y = x.new_empty(x.shape)
    if x.numel():
        rows = x if x.stride(1) == 1 else x.contiguous()
        tile = tile_of(x.shape[1])
        _keyed_dropout_kernel[(len(x) * triton.cdiv(x.shape[1], 8 * tile["BLOCK_GROUPS"]),)](
            rows, keys.contiguous(), y, x.shape[1], rows.stride(0), stream, drop_below, 256 / (256 - drop_below), **tile
        )
    return y
