"""Triton face of `swiglu` and `geglu`: their kernels and the autograd function that launches them.

What is computed stands in swiglu.py. Saved are gate and up; the backward pass makes the activation again while it holds
the gate, and reads and writes every element once. gate and up are read by row strides, so that halves of one packed
projection are not copied; where both are contiguous all is one row, and no width wastes a part of a block, unless spare
columns are asked for behind every row of y, which are neither written nor, of its gradient, read here.

Floor, bf16, 8,192 x 14,336 at the 3.35 TB/s of an H100's data sheet: forward 3 N e = 705 MB, 210 us; backward 5 N e =
1,174 MB, 351 us. Speed is unmeasured; the blocks follow from this reckoning. A program has 2,048 elements (7 make a row
of 14,336) and 4 warps, so 16 elements a thread of every tensor: two loads of 16 bytes in bf16 each from gate and up
(and g). A forward program has 8 KB in flight, so that two of them on a multiprocessor make the 13 KB that 3.35 TB/s ask
for at a latency of 0.5 us (an assumption).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = {"BLOCK": 2048, "num_warps": 4}


@triton.jit
def _place(width, BLOCK: tl.constexpr):
    """Row of a program, its int64 columns, and which of them exist."""
    n_blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    columns = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, columns, columns < width


@triton.jit
def _sigmoid(x, GELU: tl.constexpr):
    """The share of the gate that passes."""
    inner = x
    if GELU:
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    return 1 / (1 + tl.exp(-inner))


@triton.jit
def _swiglu_forward_kernel(
    gate_ptr, up_ptr, y_ptr, width, gate_stride, up_stride, y_stride, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    row, columns, mask = _place(width, BLOCK)
    x = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * y_stride + columns, x * _sigmoid(x, GELU) * up, mask=mask)


@triton.jit
def _swiglu_backward_kernel(
    g_ptr, gate_ptr, up_ptr, d_gate_ptr, d_up_ptr, width, g_stride, gate_stride, up_stride, GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, columns, mask = _place(width, BLOCK)
    place = row * width + columns
    g = tl.load(g_ptr + row * g_stride + columns, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    sigmoid = _sigmoid(x, GELU)
    slope = x * sigmoid * (1 - sigmoid)
    if GELU:
        slope *= 1.5957691216057308 * (1 + 0.134145 * x * x)
    tl.store(d_gate_ptr + place, g * up * (sigmoid + slope), mask=mask)
    tl.store(d_up_ptr + place, g * x * sigmoid, mask=mask)


def _rows(is_whole: bool, *tensors: Tensor) -> list[Tensor]:
    """View tensors of one shape as (rows, width) with unit stride, copying only what has no such view.

    is_whole: may be one row.
    """
    if is_whole and all(x.is_contiguous() for x in tensors):
        return [x.view(1, -1) for x in tensors]
    rows = [x.reshape(-1, x.shape[-1]) for x in tensors]
    return [x if x.stride(1) == 1 else x.contiguous() for x in rows]


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, gelu, spare):  # noqa: ANN001, ANN205
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        y = gate.new_empty(*gate.shape[:-1], gate.shape[-1] + spare)
        if gate.numel():
            gates, ups = _rows(not spare, gate, up)
            n_rows, width = gates.shape
            _swiglu_forward_kernel[(n_rows * triton.cdiv(width, TILE["BLOCK"]),)](
                gates, ups, y, width, gates.stride(0), ups.stride(0), width + spare, GELU=gelu, **TILE
            )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # noqa: ANN001, ANN205
        gate, up = ctx.saved_tensors
        d_gate, d_up, spare = gate.new_empty(gate.shape), up.new_empty(up.shape), g.shape[-1] - gate.shape[-1]
        if gate.numel():
            gates, ups = _rows(not spare, gate, up)
            n_rows, width = gates.shape
            _swiglu_backward_kernel[(n_rows * triton.cdiv(width, TILE["BLOCK"]),)](
                g.contiguous(), gates, ups, d_gate, d_up, width, width + spare, gates.stride(0), ups.stride(0),
                GELU=ctx.gelu, **TILE,
            )  # fmt: skip
        return d_gate, d_up, None, None


def glu_triton(gate: Tensor, up: Tensor, gelu: bool, spare: int = 0) -> Tensor:
    """Multiply up by silu(gate), or by gelu(gate) in its tanh form, by the kernels, on Linux.

    gate, up: (..., F) fp32 or bf16, alike.
    Returns (..., F + spare), contiguous, differentiable in both; the spare columns are not written.
    Raises ValueError where they are not alike.
    """
    if gate.ndim == 0 or gate.shape != up.shape or gate.dtype != up.dtype:
        got = f"{tuple(gate.shape)} {gate.dtype} and {tuple(up.shape)} {up.dtype}"
        raise ValueError(f"gate and up must be (..., F), alike: got {got}")
    return _GLU.apply(gate, up, gelu, spare)
