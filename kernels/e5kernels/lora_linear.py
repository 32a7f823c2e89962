"""A frozen linear and its low-rank adapter (arXiv 2106.09685), with keyed dropout on the adapter's input.

    forward    z = d(x) A^T,  y = x W^T + b + s z B^T,  d(x) = m * x / (1 - p)
    backward   dz = s g B,  dB = s g^T z,  dA = dz^T d(x),  dx = g W + m * (dz A) / (1 - p)

m is a function of keys and stream, drawn forward and again backward (dropout.py). A and B, fp32 masters, are cast to
x's dtype where they are used. Saved: x, z and the keys, never m and never dW of the frozen W.
x: (T, in).  W: (out, in).  b: (out,) or None.  A: (R, in).  B: (out, R).
FLOPs: forward 2 T (in out + R in + R out), backward 2 T (in out + 2 R in + 2 R out).  Bytes: those of the product's
operands; what the adapter adds to them stands in lora_linear_triton.py, with the layout of an x with spare columns.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from e5kernels import native
from e5kernels.dropout import keyed_dropout, signed

if sys.platform == "linux":  # Triton is published for no other
    from e5kernels.lora_linear_triton import lora_linear_triton

ALIGNMENT = 16  # elements: rows with spare columns begin where 16 bytes can be loaded at once, in any dtype


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scale, keys, stream, drop_below, is_read):  # noqa: ANN001, ANN205
        dropped = x if keys is None else keyed_dropout(x, keys, stream, drop_below)
        z = dropped @ lora_a.to(x.dtype).T  # (T, R)
        if is_read:
            y = F.linear(x, weight, bias)  # (T, out)
            y.addmm_(z, lora_b.to(x.dtype).T, alpha=scale)
        else:
            y = x.new_zeros(()).expand(x.shape[0], weight.shape[0])
        ctx.save_for_backward(x, z, weight, lora_a, lora_b, keys)
        ctx.scale, ctx.stream, ctx.drop_below = scale, stream, drop_below
        return y

    @staticmethod
    def backward(ctx, g):  # noqa: ANN001, ANN205
        x, z, weight, lora_a, lora_b, keys = ctx.saved_tensors
        drop = (keys, ctx.stream, ctx.drop_below)
        dz = (g @ lora_b.to(g.dtype)).mul_(ctx.scale)  # (T, R)
        db = (g.T @ z).to(lora_b.dtype).mul_(ctx.scale)
        da = (dz.T @ (x if keys is None else keyed_dropout(x, *drop))).to(lora_a.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = g @ weight  # (T, in)
            if keys is None:
                dx.addmm_(dz, lora_a.to(g.dtype))
            else:
                dx.add_(keyed_dropout(dz @ lora_a.to(g.dtype), *drop))
        return dx, None, None, da, db, None, None, None, None, None


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    keys: Tensor | None,
    stream: int,
    drop_below: int,
    is_read: bool = True,
) -> Tensor:
    """Do a linear and its adapter by plain torch; the definition.  Arguments and result as `lora_linear`."""
    x = x if x.shape[1] == weight.shape[1] else x[:, : weight.shape[1]]
    return _LoraLinear.apply(x, weight, bias, lora_a, lora_b, scale, keys, signed(stream), drop_below, is_read)


def face(device: torch.device) -> str:
    """Name the face that `lora_linear` uses on a device: "triton" on CUDA under Linux, else "reference"."""
    return "triton" if device.type == "cuda" and sys.platform == "linux" else "reference"


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    keys: Tensor | None,
    stream: int,
    drop_below: int,
    is_read: bool = True,
) -> Tensor:
    """Do a frozen linear and its adapter.

    x: (T, in), or, where weight is `with_room`, (T, in + spare_columns(R)), the last columns being this function's to
    write.
    weight: (out, in), no gradient.  bias: (out,) or None, no gradient.  lora_a: (R, in), lora_b: (out, R), any float.
    keys: (T,) int64, one a token; None drops nothing.  stream, drop_below: as `keyed_dropout`'s.
    Returns y (T, out), x's dtype, differentiable in x, lora_a and lora_b; where not `is_read`, zeros in its place,
    through which all gradients flow as ever.
    """
    if face(x.device) == "triton" and native.takes(x):
        return lora_linear_triton(
            x, weight, bias, lora_a, lora_b, scale, keys, signed(stream), drop_below, is_read
        )  # fmt: skip
    return lora_linear_reference(x, weight, bias, lora_a, lora_b, scale, keys, stream, drop_below, is_read)


def spare_columns(rank: int) -> int:
    """Say how many columns beside x and W hold s z and B.  Returns rank, rounded up to ALIGNMENT."""
    return -(-rank // ALIGNMENT) * ALIGNMENT


def room_of(rank: int, dtype: torch.dtype, device: torch.device) -> int:
    """Say for how many spare columns there is use on a device; 0 where its face has two products."""
    used = face(device) == "triton" and dtype in (torch.float32, torch.bfloat16)
    return spare_columns(rank) if used else 0


def with_room(weight: Tensor, spare: int) -> Tensor:
    """Copy a weight (out, in), transposed, into a buffer (in + spare, out), whose last rows are left for B^T.

    Returns its view (out, in), of strides (1, out); the rows behind it belong to its storage alone.
    """
    whole = weight.new_empty(weight.shape[1] + spare, weight.shape[0])
    whole[: weight.shape[1]].copy_(weight.T)
    return whole[: weight.shape[1]].T


def room_behind(weight: Tensor) -> int:
    """Say how many rows of B a parameter has room for behind it; 0 where it is no weight `with_room`."""
    if weight.ndim != 2 or weight.stride() != (1, len(weight)):
        return 0
    n_elements = weight.untyped_storage().nbytes() // weight.itemsize - weight.storage_offset()
    return (n_elements - weight.numel()) // len(weight)
