"""Triton face of `rope`: one kernel for both directions, and the autograd function that launches it.

What is computed stands in rope.py; backward is the same turn with the sign of sin changed. x and the gradient are read
by their strides, so that q and k of a packed qkv buffer, or a layout head by head, are not copied; y is contiguous. It
is a tensor of its own: in place the same bytes would move, x is free as soon as this returns (no linear keeps what it
returned), and of an x that is a view autograd would copy the whole gradient.

Floor, bf16, 8,192 tokens of 32 + 8 heads of 128 at the 3.35 TB/s of an H100's data sheet: q and k are 2 N e = 168 MB
and the angles, read for either, 5% more: 53 us each way. Speed is unmeasured; the blocks follow from this reckoning. A
program has a token, whose angles it loads once for all heads up to 2,048 pairs: 32 heads of 128. A warp has 512 pairs,
so 16 a thread: two loads of 16 bytes in bf16 from each half of a head. A program has 8 KB of q in flight, and two on a
multiprocessor make the 13 KB that 3.35 TB/s ask for at a latency of 0.5 us (an assumption); of k it is one warp with 2
KB, so seven.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 2048  # pairs of a program, see above


@triton.jit
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, n_heads, half, x_token_stride, x_head_stride, x_channel_stride, sign,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Turn a token's heads by its angles where sign is 1, back where it is -1."""
    n_blocks = tl.cdiv(n_heads, BLOCK_HEADS)
    token = (tl.program_id(0) // n_blocks).to(tl.int64)
    heads = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    pairs = tl.arange(0, BLOCK_HALF)[None, :]
    cos = tl.load(cos_ptr + token * half + pairs, mask=pairs < half, other=0.0)
    sin = tl.load(sin_ptr + token * half + pairs, mask=pairs < half, other=0.0) * sign
    mask = (heads < n_heads) & (pairs < half)
    head_ptr = x_ptr + token * x_token_stride + heads * x_head_stride
    first_ptr = head_ptr + pairs.to(tl.int64) * x_channel_stride
    second_ptr = head_ptr + (pairs + half).to(tl.int64) * x_channel_stride
    first = tl.load(first_ptr, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(second_ptr, mask=mask, other=0.0).to(tl.float32)
    turned_ptr = y_ptr + (token * n_heads + heads) * (2 * half) + pairs
    tl.store(turned_ptr, first * cos - second * sin, mask=mask)
    tl.store(turned_ptr + half, second * cos + first * sin, mask=mask)


def tile_of(n_heads: int, half: int) -> dict[str, int]:
    """Choose the block sizes and warps for a token of so many heads, each of so many pairs."""
    block_half = triton.next_power_of_2(half)
    block_heads = min(triton.next_power_of_2(n_heads), max(1, TILE // block_half))
    n_warps = min(16, max(1, block_heads * block_half // 512))
    return {"BLOCK_HEADS": block_heads, "BLOCK_HALF": block_half, "num_warps": n_warps}


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    n_tokens, n_heads, head_dim = x.shape
    y = x.new_empty(x.shape)
    if x.numel():
        tile = tile_of(n_heads, head_dim // 2)
        _rope_kernel[(n_tokens * triton.cdiv(n_heads, tile["BLOCK_HEADS"]),)](
            x, cos, sin, y, n_heads, head_dim // 2, *x.stride(), sign, **tile
        )
    return y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):  # noqa: ANN001, ANN205
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # noqa: ANN001, ANN205
        return _turned(g, *ctx.saved_tensors, -1.0), None, None


def rope_triton(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every head by its token's angles by the kernel, on Linux.

    x: (T, heads, head_dim) fp32 or bf16, any strides.  cos, sin: (T, 1, head_dim / 2) fp32.
    Returns like x, contiguous, differentiable in x.
    Raises ValueError where the angles do not fit x.
    """
    fits = x.ndim == 3 and x.shape[2] % 2 == 0 and cos.shape == sin.shape == (x.shape[0], 1, x.shape[2] // 2)
    if not fits or cos.dtype != torch.float32 or sin.dtype != torch.float32:
        got = f"x {tuple(x.shape)}, cos {tuple(cos.shape)} {cos.dtype}, sin {tuple(sin.shape)} {sin.dtype}"
        raise ValueError(f"x must be (T, heads, head_dim), cos and sin (T, 1, head_dim / 2) float32: got {got}")
    return _Rope.apply(x, cos.contiguous(), sin.contiguous())
