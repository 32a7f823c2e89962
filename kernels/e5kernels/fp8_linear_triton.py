"""Triton face of an adapter beside a product in fp8: lora_linear_triton's kernels, for x without spare columns."""

import torch
import triton
from torch import Tensor

from e5kernels.lora_linear_triton import FORWARD_TILES, _finish, _lora_linear_forward_kernel, block_r


def adapter_forward_triton(
    ctx: torch.autograd.function.FunctionCtx, x: Tensor, lora_a: Tensor, keys: Tensor | None
) -> Tensor:
    """Return s d(x) A^T, (T, R), on Linux.

    ctx: with stream, drop_below and factor, s / (1 - p).  x: (T, in) fp32 or bf16.  lora_a: (R, in).
    """
    n_tokens, (rank, dim) = len(x), lora_a.shape
    rows = x if x.stride(1) == 1 else x.contiguous()
    z = x.new_empty(n_tokens, rank)
    if n_tokens:
        block, tile = block_r(rank), FORWARD_TILES[x.itemsize]
        _lora_linear_forward_kernel[(triton.cdiv(n_tokens, tile["BLOCK_T"]), triton.cdiv(rank, block))](
            rows, keys, lora_a.contiguous(), z, n_tokens, dim, rank, rows.stride(0), ctx.stream, ctx.drop_below,
            ctx.factor, DROPS=keys is not None, SPARE=0, BLOCK_R=block, **tile,
        )  # fmt: skip
    return z


def adapter_backward_triton(
    ctx: torch.autograd.function.FunctionCtx,
    x: Tensor,
    dz: Tensor,
    dx: Tensor | None,
    lora_a: Tensor,
    keys: Tensor | None,
) -> Tensor:
    """Return dA (R, in), A's dtype, and add s m * (dz A) / (1 - p) to dx, on Linux.  ctx: as above.  dz: (T, R)."""
    return _finish(ctx, x, keys, lora_a.contiguous(), dz, dx).to(lora_a.dtype)
