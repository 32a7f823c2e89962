"""Rotary positions (arXiv 2104.09864): the pair (i, i + head_dim / 2) of every head turned by its token's angle.

    forward   y1 = x1 cos - x2 sin,  y2 = x2 cos + x1 sin
    backward  the same turn by the negative angle

x: (T, heads, head_dim) any float dtype.  cos, sin: (T, 1, head_dim / 2), max(fp32, x's dtype).  y: like x.
Bytes, of e each element, for N elements: 2 N e forward, 2 N e backward; saved: the angles, shared by all layers.
"""

import sys

import torch
from torch import Tensor

from e5kernels import native

if sys.platform == "linux":  # Triton is published for no other
    from e5kernels.rope_triton import rope_triton


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads by plain torch; the definition.  Arguments and result as `rope`."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def face(device: torch.device) -> str:
    """Name the face that `rope` uses on a device: "triton" on CUDA under Linux, else as `native.face`."""
    return "triton" if device.type == "cuda" and sys.platform == "linux" else native.face(device)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every head by its token's angles.

    x: (T, heads, head_dim).  cos, sin: (T, 1, head_dim / 2), max(fp32, x's dtype).  Returns like x, differentiable.
    """
    chosen = face(x.device) if native.takes(x) else "reference"
    if chosen == "triton":
        return rope_triton(x, cos, sin)
    if chosen == "reference":
        return rope_reference(x, cos, sin)
    heads = x if _heads_contiguous(x) else x.contiguous()
    return torch.ops.e5kernels.rope(heads, cos.contiguous(), sin.contiguous(), False)


def _heads_contiguous(x: Tensor) -> bool:
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]


def _fake(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.e5kernels.rope(g.contiguous(), *ctx.saved_tensors, not ctx.inverse), None, None, None


if native.AVAILABLE:
    torch.library.register_fake("e5kernels::rope", _fake)
    torch.library.register_autograd("e5kernels::rope", _backward, setup_context=_setup_context)
