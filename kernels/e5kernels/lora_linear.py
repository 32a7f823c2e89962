"""Frozen linears that read one x, and their low-rank adapters (arXiv 2106.09685), with keyed dropout on x.

    forward    z = d(x) A^T,  y = x W^T + b + s z B^T,  d(x) = m * x / (1 - p)
    backward   dz = s g B,  dB = s g^T z,  dA = dz^T d(x),  dx = the linears' sum of g W + m * (dz A) / (1 - p)

m is a function of keys and stream, drawn forward and again backward (dropout.py). A and B, fp32 masters, are cast to
x's dtype where they are used. Saved: x, z and the keys, never m and never dW of the frozen W.
x: (T, in).  Of each linear W: (out, in), b: (out,) or None, A: (R, in), B: (out, R).
FLOPs of one: forward 2 T (in out + R in + R out), backward 2 T (in out + 2 R in + 2 R out).  Bytes: those of the
products' operands; what adapters add stands in lora_linear_triton.py, with the layout of an x with spare columns.
"""

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from e5kernels import native
from e5kernels.adapted import Adapted, Drop, flattened, parted
from e5kernels.dropout import keyed_dropout

if sys.platform == "linux":  # Triton is published for no other
    from e5kernels.lora_linear_triton import lora_linear_triton

ALIGNMENT = 16  # elements: rows with spare columns begin where 16 bytes can be loaded at once, in any dtype


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, keys, below, streams, is_read, *tensors):  # noqa: ANN001, ANN002, ANN205
        outputs, zs = [], []
        for stream, weight, bias, lora_a, lora_b in zip(streams, *parted(tensors, 4), strict=True):
            z = dropped(x, keys, stream, below) @ lora_a.to(x.dtype).T  # (T, R)
            if is_read:
                y = F.linear(x, weight, bias).addmm_(z, lora_b.to(x.dtype).T, alpha=scale)  # (T, out)
            else:
                y = x.new_zeros(()).expand(x.shape[0], weight.shape[0])
            outputs.append(y)
            zs.append(z)
        ctx.save_for_backward(x, keys, *zs, *tensors)
        ctx.scale, ctx.below, ctx.streams = scale, below, streams
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *gs):  # noqa: ANN001, ANN002, ANN205
        x, keys, *rest = ctx.saved_tensors
        zs, (weights, _, *factors) = rest[: len(gs)], parted(rest[len(gs) :], 4)
        dx, found = None, []
        for g, z, stream, weight, lora_a, lora_b in zip(gs, zs, ctx.streams, weights, *factors, strict=True):
            drop, a = (keys, stream, ctx.below), lora_a.to(g.dtype)
            dz = (g @ lora_b.to(g.dtype)).mul_(ctx.scale)  # (T, R)
            db = (g.T @ z).to(lora_b.dtype).mul_(ctx.scale)
            da = (dz.T @ dropped(x, *drop)).to(lora_a.dtype)
            found += [None, None, da, db]
            if ctx.needs_input_grad[0]:
                dx = g @ weight if dx is None else dx.addmm_(g, weight)  # (T, in)
                dx = dx.addmm_(dz, a) if keys is None else dx.add_(keyed_dropout(dz @ a, *drop))
        return dx, None, None, None, None, None, *found


def dropped(x: Tensor, keys: Tensor | None, stream: int, below: int) -> Tensor:
    """Return d(x): x itself where keys are None."""
    return x if keys is None else keyed_dropout(x, keys, stream, below)


def lora_linear_reference(
    x: Tensor, linears: Sequence[Adapted], scale: float, drop: Drop, is_read: bool = True
) -> tuple[Tensor, ...]:
    """Do linears and their adapters by plain torch; the definition.  Arguments and result as `lora_linear`."""
    n_in = linears[0].weight.shape[1]
    return _LoraLinear.apply(x if x.shape[1] == n_in else x[:, :n_in], *flattened(linears, scale, drop, is_read))


def face(device: torch.device) -> str:
    """Name the face that `lora_linear` uses on a device: "triton" on CUDA under Linux, else "reference"."""
    return "triton" if device.type == "cuda" and sys.platform == "linux" else "reference"


def lora_linear(
    x: Tensor, linears: Sequence[Adapted], scale: float, drop: Drop, is_read: bool = True
) -> tuple[Tensor, ...]:
    """Do frozen linears that read one x, and their adapters.

    x: (T, in), or, where all weights are `with_room`, (T, in + spare_columns(R)), the last columns being this
    function's to write.
    Returns y (T, out) of each, x's dtype, differentiable in x and in every lora_a and lora_b; where not `is_read`,
    zeros in its place, through which all gradients flow as ever.
    """
    if face(x.device) == "triton" and native.takes(x):
        return lora_linear_triton(x, linears, scale, drop, is_read)
    return lora_linear_reference(x, linears, scale, drop, is_read)


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
