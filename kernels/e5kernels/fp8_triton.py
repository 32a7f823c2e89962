"""Triton face of row-wise fp8: its kernels, and the autograd functions of the norm and the gate that quantise.

What is computed stands in fp8.py. What a fused kernel quantises is what it stores, rounded to x's dtype, so that codes
and scales are those of its y. (The norm by itself may sum a row in another order: Triton lays a tile out by its widest
access, here 16 codes a thread, there 8 bf16.) amax is a maximum of the numbers' bits as integers: of positive
floats they rise with the number, infinity's lie above and NaN's above these, so nothing of it is lost, as in a maximum
of floats it would be. Backward passes are those of the ops without fp8. Needs sm_89, whose conversion to e4m3 it is.

Floor, bf16, at the 3.35 TB/s of an H100's data sheet: quantising 8,192 x 4,096 moves 101 MB, 30 us; 8,192 x 14,336, 352
MB, 105 us. Fused it is N bytes more than the norm, be a term added before it or not, or the gate: 34 MB, 10 us, and 117
MB, 35 us. Speed is unmeasured; blocks are rms_norm_triton's, a row whole in registers: of one of 14,336, padded to
16,384, each of 512 threads holds 32 numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from e5kernels.rms_norm_triton import _AddRMSNorm, _check_added, _inverse_rms, tile_of
from e5kernels.swiglu_triton import _GLU, _sigmoid

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LARGEST = tl.constexpr(448.0)
LEAST_AMAX_BITS = tl.constexpr(0x04E00000)  # of 448 * 2^-126


@triton.jit
def _on_grid(x):
    """Round fp32 to the nearest of e4m3's numbers, ties to even, and make NaN the one that stays NaN in e4m3."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size + 0x7FFFF + ((size >> 20) & 1)) & -0x100000
    small = ((size.to(tl.float32, bitcast=True) + 24576.0) - 24576.0).to(tl.int32, bitcast=True)  # in steps of 2^-9
    size = tl.where(size > 0x7F800000, 0x7FFFFFFF, tl.where(size < 0x3C800000, small, normal))  # NaN; below 2^-6
    return (size | (bits & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _store_rows(x, q_ptr, scale_ptr, rows, columns, n_rows, dim):
    """Quantise a tile of whole rows.  x: (rows, columns) fp32, 0 where nothing is.  rows: int64."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    amax = tl.maximum(tl.max(bits, 1), LEAST_AMAX_BITS).to(tl.float32, bitcast=True)
    scaled = x * tl.math.div_rn(LARGEST, amax)[:, None]
    if INTERPRETED:  # the interpreter cuts off, and takes NaN to a number
        scaled = _on_grid(scaled)
    mask = (rows < n_rows)[:, None] & (columns < dim)[None, :]
    tl.store(q_ptr + rows[:, None] * dim + columns[None, :], scaled.to(tl.float8e4nv), mask=mask)
    tl.store(scale_ptr + rows, tl.math.div_rn(amax, LARGEST), mask=rows < n_rows)


@triton.jit(do_not_specialize=["n_rows"])
def _quantise_rows_kernel(
    x_ptr, codes_ptr, scale_ptr, n_rows, dim, x_stride, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < n_rows)[:, None] & (columns < dim)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    _store_rows(x, codes_ptr, scale_ptr, rows, columns, n_rows, dim)


@triton.jit(do_not_specialize=["n_rows"])
def _add_rms_norm_rows_kernel(
    x_ptr, added_ptr, weight_ptr, h_ptr, y_ptr, codes_ptr, scale_ptr, n_rows, dim, x_stride, eps, ADDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write y = rms_norm(x), or with ADDS h = x + added and y = rms_norm(h), and quantise y."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < n_rows)[:, None] & (columns < dim)[None, :]
    weight = tl.load(weight_ptr + columns, mask=columns < dim, other=0.0).to(tl.float32)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    place = rows[:, None] * dim + columns[None, :]
    if ADDS:
        x += tl.load(added_ptr + place, mask=mask, other=0.0).to(tl.float32)
        h = x.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + place, h, mask=mask)
        x = h.to(tl.float32)
    y = (x * _inverse_rms(x, dim, eps) * weight).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + place, y, mask=mask)
    _store_rows(y.to(tl.float32), codes_ptr, scale_ptr, rows, columns, n_rows, dim)


@triton.jit(do_not_specialize=["n_rows"])
def _glu_rows_kernel(
    gate_ptr, up_ptr, y_ptr, codes_ptr, scale_ptr, n_rows, dim, gate_stride, up_stride, GELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < n_rows)[:, None] & (columns < dim)[None, :]
    x = tl.load(gate_ptr + rows[:, None] * gate_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows[:, None] * up_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    y = (x * _sigmoid(x, GELU) * up).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * dim + columns[None, :], y, mask=mask)
    _store_rows(y.to(tl.float32), codes_ptr, scale_ptr, rows, columns, n_rows, dim)


def _flat(x: Tensor) -> Tensor:
    """View x as (rows, K) with unit stride, copying only what has no such view."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _room(x: Tensor) -> tuple[Tensor, Tensor]:
    """Make what the codes and scales of x's rows are written to."""
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


def _grid(rows: Tensor) -> tuple[tuple[int], dict[str, int]]:
    tile = tile_of(*rows.shape)
    return (triton.cdiv(len(rows), tile["BLOCK_ROWS"]),), tile


def quantise_rows_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise the last dimension by the kernel, on Linux.

    x: (..., K) fp32 or bf16.  Returns q (..., K) e4m3 and scale (..., 1) fp32, contiguous.
    Raises ValueError where rows have no elements, hence no scale.
    """
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be (..., K) with K > 0: got {tuple(x.shape)}")
    q, scale = _room(x)
    if x.numel():
        rows = _flat(x)
        grid, tile = _grid(rows)
        _quantise_rows_kernel[grid](rows, q, scale, *rows.shape, rows.stride(0), **tile)
    return q, scale


class _AddRMSNormRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, added, weight, eps):  # noqa: ANN001, ANN205
        h = x if added is None else x.new_empty(x.shape)
        y, (q, scale) = x.new_empty(x.shape), _room(x)
        ctx.save_for_backward(h, weight)
        ctx.eps, ctx.adds = eps, added is not None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(q, scale)
        if x.numel():
            rows = _flat(x)
            grid, tile = _grid(rows)
            _add_rms_norm_rows_kernel[grid](
                rows, None if added is None else added.contiguous(), weight.contiguous(), h, y, q, scale, *rows.shape,
                rows.stride(0), eps, ADDS=added is not None, **tile,
            )  # fmt: skip
        return h, y, q, scale

    @staticmethod
    @once_differentiable
    def backward(ctx, dh, g, *_):  # noqa: ANN001, ANN002, ANN205
        return _AddRMSNorm.backward(ctx, dh, g)[:4]


class _GLURows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, gelu):  # noqa: ANN001, ANN205
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        y, (q, scale) = gate.new_empty(gate.shape), _room(gate)
        ctx.set_materialize_grads(False)  # or autograd makes zeros of q's size for nobody
        ctx.mark_non_differentiable(q, scale)
        if gate.numel():
            gates, ups = _flat(gate), _flat(up)
            grid, tile = _grid(gates)
            _glu_rows_kernel[grid](
                gates, ups, y, q, scale, *gates.shape, gates.stride(0), ups.stride(0), GELU=gelu, **tile
            )
        return y, q, scale

    @staticmethod
    @once_differentiable
    def backward(ctx, g, *_):  # noqa: ANN001, ANN002, ANN205
        return _GLU.backward(ctx, g)


def add_rms_norm_rows_triton(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add to the residual stream, normalise it and quantise the result by one kernel, on Linux.

    x: (..., D) fp32 or bf16.  added: like x, or None.  weight: (D,) any float dtype.
    Returns h = x + added, x itself where that is None, and y, like x and differentiable in all three, y's codes and
    scales.  Raises ValueError where added or weight does not fit x.
    """
    _check_added(x, added, weight)
    return _AddRMSNormRows.apply(x, added, weight, eps)


def glu_rows_triton(gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Multiply up by silu(gate), or by gelu(gate) in its tanh form, and quantise by one kernel, on Linux.

    gate, up: (..., F) fp32 or bf16, alike.  Returns y like gate, differentiable in both, its codes and scales.
    Raises ValueError where they are not alike.
    """
    if gate.ndim == 0 or gate.shape != up.shape or gate.dtype != up.dtype:
        got = f"{tuple(gate.shape)} {gate.dtype} and {tuple(up.shape)} {up.dtype}"
        raise ValueError(f"gate and up must be alike: got {got}")
    return _GLURows.apply(gate, up, gelu)
