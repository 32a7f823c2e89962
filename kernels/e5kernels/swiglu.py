"""Gated activations (arXiv 2002.05202): SwiGLU of Mistral, Llama and Qwen, GeGLU (tanh form) of Gemma.

    forward   y = gate s(w) up,  s the logistic function, w = gate (SwiGLU) or 2 sqrt(2/pi) (gate + 0.044715 gate^3)
    backward  d_up = g gate s,  d_gate = g up (s + gate s (1 - s) w')

gate, up: (..., F) any float dtype, alike.  y: like gate; arithmetic in max(fp32, that dtype).
Bytes, of e each element, for N elements: forward 3 N e, backward 5 N e; saved: gate and up, never the activation.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from e5kernels import native

if sys.platform == "linux":  # Triton is published for no other
    from e5kernels.swiglu_triton import glu_triton


def swiglu_reference(gate: Tensor, up: Tensor, spare: int = 0) -> Tensor:
    """Multiply silu(gate) and up by plain torch; the definition, whose spare columns are 0.  As `swiglu`."""
    return _with_spare(F.silu(gate) * up, spare)


def geglu_reference(gate: Tensor, up: Tensor, spare: int = 0) -> Tensor:
    """Multiply gelu(gate), in its tanh form, and up by plain torch; the definition, whose spare columns are 0."""
    return _with_spare(F.gelu(gate, approximate="tanh") * up, spare)


def _with_spare(y: Tensor, spare: int) -> Tensor:
    return F.pad(y, (0, spare)) if spare else y


def face(device: torch.device) -> str:
    """Name the face that `swiglu` and `geglu` use on a device: "triton" on CUDA under Linux, else as `native.face`."""
    return "triton" if device.type == "cuda" and sys.platform == "linux" else native.face(device)


def swiglu(gate: Tensor, up: Tensor, spare: int = 0) -> Tensor:
    """Multiply silu(gate) and up.

    gate, up: (..., F), alike.  spare: columns for others.
    Returns (..., F + spare), gate's dtype, of which the last columns hold anything; differentiable in both.
    """
    chosen = face(gate.device) if native.takes(gate) else "reference"
    if chosen == "triton":
        return glu_triton(gate, up, False, spare)
    if chosen == "reference":
        return swiglu_reference(gate, up, spare)
    return _with_spare(torch.ops.e5kernels.glu_forward(gate.contiguous(), up.contiguous(), False), spare)


def geglu(gate: Tensor, up: Tensor, spare: int = 0) -> Tensor:
    """Multiply gelu(gate), in its tanh form, and up.

    gate, up: (..., F), alike.  spare: columns for others.
    Returns (..., F + spare), gate's dtype, of which the last columns hold anything; differentiable in both.
    """
    chosen = face(gate.device) if native.takes(gate) else "reference"
    if chosen == "triton":
        return glu_triton(gate, up, True, spare)
    if chosen == "reference":
        return geglu_reference(gate, up, spare)
    return _with_spare(torch.ops.e5kernels.glu_forward(gate.contiguous(), up.contiguous(), True), spare)


def _forward_fake(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    return torch.empty_like(gate)


def _backward_fake(g: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    gate, up, ctx.gelu = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> tuple[Tensor, Tensor, None]:
    return *torch.ops.e5kernels.glu_backward(g.contiguous(), *ctx.saved_tensors, ctx.gelu), None


if native.AVAILABLE:
    torch.library.register_fake("e5kernels::glu_forward", _forward_fake)
    torch.library.register_fake("e5kernels::glu_backward", _backward_fake)
    torch.library.register_autograd("e5kernels::glu_forward", _backward, setup_context=_setup_context)
