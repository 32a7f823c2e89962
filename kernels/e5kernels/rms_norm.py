"""RMSNorm over the last dimension (arXiv 1910.07467).

    forward   y = x * r * weight,  r = 1 / sqrt(mean(x^2) + eps)
    backward  dx = r * (g * weight - x * r^2 * mean(g * weight * x))

x: (..., D) any float dtype.  weight: (D,), x's dtype, or fp32 under bf16.  y: like x, by way of max(fp32, x's dtype).
The weight is frozen wherever it matters to speed; its own gradient, sum(g * x * r), is left to plain torch on the CPU.
Bytes, of e each element, for N elements: forward 2 N e, backward 3 N e; saved: x and at most one number a row.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from e5kernels import native

if sys.platform == "linux":  # Triton is published for no other
    from e5kernels.rms_norm_triton import rms_norm_triton


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise rows by plain torch; the definition.  Arguments and result as `rms_norm`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, (x.shape[-1],), weight.to(wide.dtype), eps).to(x.dtype)


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
