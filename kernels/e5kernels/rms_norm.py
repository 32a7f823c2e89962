"""RMSNorm over the last dimension (arXiv 1910.07467).

    forward   y = x * r * weight,  r = 1 / sqrt(mean(x^2) + eps)
    backward  dx = r * (g * weight - x * r^2 * mean(g * weight * x))

`add_rms_norm` is the same where a branch leaves the residual stream: h = x + added goes on beside y = rms_norm(h), and
dx = d_added = dh + rms_norm's dx of dy come from one pass too.

x: (..., D) any float dtype.  weight: (D,), x's dtype, or fp32 under bf16.  y: like x, by way of max(fp32, x's dtype).
The weight is frozen wherever it matters to speed; its own gradient, sum(g * x * r), is left to plain torch on the CPU.
Bytes, of e each element, for N elements: forward 2 N e, backward 3 N e; with an added term 4 N e (6 with the sum by
itself) and 4 N e (6); saved: x, or h, and at most one number a row.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from e5kernels import native

if sys.platform == "linux":  # Triton is published for no other
    from e5kernels.rms_norm_triton import add_rms_norm_triton, rms_norm_triton


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise rows by plain torch; the definition.  Arguments and result as `rms_norm`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, (x.shape[-1],), weight.to(wide.dtype), eps).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, spare: int = 0
) -> tuple[Tensor, Tensor]:
    """Add and normalise by plain torch; the definition, whose spare columns are 0.  As `add_rms_norm`."""
    h = x if added is None else x + added
    return h, F.pad(rms_norm_reference(h, weight, eps), (0, spare))


def face(device: torch.device) -> str:
    """Name the face that `rms_norm` uses on a device: "triton" on CUDA under Linux, else as `native.face`."""
    return "triton" if device.type == "cuda" and sys.platform == "linux" else native.face(device)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension.

    x: (..., D).  weight: (D,), x's dtype, or fp32 under bf16.  Returns like x, differentiable in both.
    """
    chosen = face(x.device) if native.takes(x) else "reference"
    if chosen == "triton":
        return rms_norm_triton(x, weight, eps)
    if chosen == "reference" or weight.requires_grad:
        return rms_norm_reference(x, weight, eps)
    return torch.ops.e5kernels.rms_norm_forward(x.contiguous(), weight.contiguous(), eps)[0]


def add_rms_norm(x: Tensor, added: Tensor | None, weight: Tensor, eps: float, spare: int = 0) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and normalise it for the branch that leaves it there.

    x: (..., D).  added: like x, or None.  weight: (D,), x's dtype, or fp32 under bf16.  spare: columns for others.
    Returns h = x + added, x itself where that is None, and y (..., D + spare), of which the last columns hold anything;
    both x's dtype, differentiable in x, added and weight.
    """
    if native.takes(x) and face(x.device) == "triton":
        return add_rms_norm_triton(x, added, weight, eps, spare)
    h = x if added is None else x + added
    y = rms_norm(h, weight, eps)
    return h, F.pad(y, (0, spare)) if spare else y


def _forward_fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    return torch.empty_like(x), x.new_empty(rows, dtype=torch.promote_types(x.dtype, torch.float32))


def _backward_fake(g: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.e5kernels.rms_norm_backward(g.contiguous(), *ctx.saved_tensors), None, None


if native.AVAILABLE:
    torch.library.register_fake("e5kernels::rms_norm_forward", _forward_fake)
    torch.library.register_fake("e5kernels::rms_norm_backward", _backward_fake)
    torch.library.register_autograd("e5kernels::rms_norm_forward", _backward, setup_context=_setup_context)
