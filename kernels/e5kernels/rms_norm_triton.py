"""Triton face of `rms_norm` and `add_rms_norm`: their kernels and the autograd functions that launch them.

What is computed stands in rms_norm.py. Saved for backward are x and weight alone: r is one more sum over a row that the
backward pass holds anyway. dweight, where it is asked for, is a sum over a fixed share of the rows in every program,
then over the programs: no atomics, the same bits on every run.

x is read where it lies, as (outer, inner, D) with any two outer strides: a head of a packed qkv buffer is not copied.
y and its gradient may have spare columns behind every row, neither written nor read here. The sum h is rounded before
it is normalised, as it is where it is kept and normalised again. All else is contiguous. Rows are numbered in
int64 beyond the program's own number.

Floor, bf16, 8,192 x 4,096 at the 3.35 TB/s of an H100's data sheet: forward 2 N e = 134 MB, 40 us; backward 3 N e = 201
MB, 60 us; with an added term 4 N e = 268 MB, 80 us, either way. Speed is unmeasured; the blocks follow from this
reckoning. A row lies in registers whole, so that it is read once, and a program takes as many rows as make 4,096
elements: one of a 4,096-wide model, 32 heads of 128. A warp has 512, so 16 a thread: two loads of 16 bytes in bf16, and
x, g, dh and weight of the backward pass in 64 fp32 registers. 3.35 TB/s at a latency of 0.5 us (an assumption) ask for
13 KB in flight on each of 132 multiprocessors; two resident forward programs make 16. Rows wider than 16,384, which no
model has, are computed too, their registers spilling.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 4096  # elements of a program, see above
N_PARTIALS = 256  # programs that share the rows where dweight is wanted: about two for each multiprocessor


@triton.jit
def _place(tile, n_inner, dim, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Outer index, inner indices (BLOCK_ROWS, 1), columns (1, BLOCK_D) of a program's tile, and what of it exists."""
    n_tiles = tl.cdiv(n_inner, BLOCK_ROWS)
    outer = (tile // n_tiles).to(tl.int64)
    inner = (tile % n_tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    return outer, inner, columns, (inner < n_inner) & (columns < dim)


@triton.jit
def _inverse_rms(x, dim, eps):
    return tl.rsqrt(tl.sum(x * x, 1) / dim + eps)[:, None]


@triton.jit(do_not_specialize=["n_inner"])
def _rms_norm_forward_kernel(
    x_ptr, added_ptr, weight_ptr, h_ptr, y_ptr, n_inner, dim, x_outer_stride, x_inner_stride, y_stride, eps,
    ADDS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write y = rms_norm(x), or with ADDS h = x + added and y = rms_norm(h)."""
    outer, inner, columns, mask = _place(tl.program_id(0), n_inner, dim, BLOCK_ROWS, BLOCK_D)
    weight = tl.load(weight_ptr + columns, mask=columns < dim, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + outer * x_outer_stride + inner * x_inner_stride + columns, mask=mask, other=0.0).to(tl.float32)
    row = outer * n_inner + inner
    if ADDS:
        x += tl.load(added_ptr + row * dim + columns, mask=mask, other=0.0).to(tl.float32)
        h = x.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row * dim + columns, h, mask=mask)
        x = h.to(tl.float32)
    y = x * _inverse_rms(x, dim, eps) * weight
    tl.store(y_ptr + row * y_stride + columns, y, mask=mask)


@triton.jit(do_not_specialize=["n_tiles", "n_inner"])
def _rms_norm_backward_kernel(
    g_ptr, dh_ptr, x_ptr, weight_ptr, dx_ptr, d_weight_ptr, n_tiles, n_inner, dim, g_stride, x_outer_stride,
    x_inner_stride, eps, HAS_DH: tl.constexpr, D_WEIGHT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write dx, with HAS_DH dh + dx, and, with D_WEIGHT, this program's row of d_weight (n_programs, dim) fp32."""
    all_columns = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + all_columns, mask=all_columns < dim, other=0.0).to(tl.float32)[None, :]
    d_weight = tl.zeros((BLOCK_D,), tl.float32)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        outer, inner, columns, mask = _place(tile, n_inner, dim, BLOCK_ROWS, BLOCK_D)
        x_place = x_ptr + outer * x_outer_stride + inner * x_inner_stride + columns
        x = tl.load(x_place, mask=mask, other=0.0).to(tl.float32)
        row = outer * n_inner + inner
        g = tl.load(g_ptr + row * g_stride + columns, mask=mask, other=0.0).to(tl.float32)
        inverse = _inverse_rms(x, dim, eps)
        along = tl.sum(x * g * weight, 1)[:, None] * inverse * inverse / dim
        dx = (g * weight - x * along) * inverse
        if HAS_DH:
            dx += tl.load(dh_ptr + row * dim + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * dim + columns, dx, mask=mask)
        if D_WEIGHT:
            d_weight += tl.sum(g * x * inverse, 0)
    if D_WEIGHT:
        row = tl.program_id(0).to(tl.int64) * dim
        tl.store(d_weight_ptr + row + all_columns, d_weight, mask=all_columns < dim)


def tile_of(n_inner: int, dim: int) -> dict[str, int]:
    """Choose the block sizes and warps for rows of this width, n_inner of them side by side."""
    block_d = triton.next_power_of_2(dim)
    block_rows = min(triton.next_power_of_2(n_inner), max(1, TILE // block_d))
    return {"BLOCK_ROWS": block_rows, "BLOCK_D": block_d, "num_warps": min(16, max(1, block_rows * block_d // 512))}


def _rows(x: Tensor) -> Tensor:
    """View x as (outer, inner, D) with unit stride in D, copying only what has no such view."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.ndim == 3 and x.stride(0) != x.shape[1] * x.stride(1):
        return x
    return x.reshape(-1, x.shape[-1])[None]


def _forward(x: Tensor, added: Tensor | None, weight: Tensor, eps: float, spare: int) -> tuple[Tensor, Tensor]:
    """Return h, x itself where nothing is added, and y (..., D + spare)."""
    dim = x.shape[-1]
    h = x if added is None else x.new_empty(x.shape)
    y = x.new_empty(*x.shape[:-1], dim + spare)
    if x.numel():
        rows = _rows(x)
        tile = tile_of(*rows.shape[1:])
        _rms_norm_forward_kernel[(len(rows) * triton.cdiv(rows.shape[1], tile["BLOCK_ROWS"]),)](
            rows, None if added is None else added.contiguous(), weight.contiguous(), h, y, *rows.shape[1:],
            *rows.stride()[:2], dim + spare, eps, ADDS=added is not None, **tile,
        )  # fmt: skip
    return h, y


def _backward(
    g: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor, eps: float, wants_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Return dx, dh included, and dweight.  g: (..., D + spare), whose spare columns are not read."""
    dx = x.new_empty(x.shape)
    if not x.numel():
        return dx, torch.zeros_like(weight) if wants_weight else None
    rows = _rows(x)
    tile = tile_of(*rows.shape[1:])
    n_tiles = len(rows) * triton.cdiv(rows.shape[1], tile["BLOCK_ROWS"])
    n_programs = min(n_tiles, N_PARTIALS) if wants_weight else n_tiles
    partial = x.new_empty(n_programs if wants_weight else 0, x.shape[-1], dtype=torch.float32)
    _rms_norm_backward_kernel[(n_programs,)](
        g.contiguous(), None if dh is None else dh.contiguous(), rows, weight.contiguous(), dx, partial, n_tiles,
        *rows.shape[1:], g.shape[-1], *rows.stride()[:2], eps, HAS_DH=dh is not None, D_WEIGHT=wants_weight, **tile,
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype) if wants_weight else None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):  # noqa: ANN001, ANN205
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _forward(x, None, weight, eps, 0)[1]

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # noqa: ANN001, ANN205
        return *_backward(g, None, *ctx.saved_tensors, ctx.eps, ctx.needs_input_grad[1]), None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, added, weight, eps, spare):  # noqa: ANN001, ANN205
        h, y = _forward(x, added, weight, eps, spare)
        ctx.save_for_backward(h, weight)
        ctx.eps, ctx.adds = eps, added is not None
        ctx.set_materialize_grads(False)
        return h, y

    @staticmethod
    @once_differentiable
    def backward(ctx, dh, g):  # noqa: ANN001, ANN205
        if g is None:
            return dh, dh if ctx.adds else None, None, None, None
        dx, d_weight = _backward(g, dh, *ctx.saved_tensors, ctx.eps, ctx.needs_input_grad[2])
        return dx, dx if ctx.adds else None, d_weight, None, None


def _check(x: Tensor, weight: Tensor) -> None:
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be (D,) for x (..., D): got {tuple(weight.shape)} for {tuple(x.shape)}")


def _check_added(x: Tensor, added: Tensor | None, weight: Tensor) -> None:
    _check(x, weight)
    if added is not None and (added.shape != x.shape or added.dtype != x.dtype):
        got = f"{tuple(added.shape)} {added.dtype} for {tuple(x.shape)} {x.dtype}"
        raise ValueError(f"added must be like x, or None: got {got}")


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension by the kernels, on Linux.

    x: (..., D) fp32 or bf16.  weight: (D,) any float dtype.  Returns like x, contiguous, differentiable in both.
    Raises ValueError where weight does not fit x.
    """
    _check(x, weight)
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm_triton(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, spare: int = 0
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and normalise it by the kernels, on Linux.

    Arguments and results as `add_rms_norm`, x fp32 or bf16, y contiguous; the spare columns are not written.
    Raises ValueError where added or weight does not fit x.
    """
    _check_added(x, added, weight)
    return _AddRMSNorm.apply(x, added, weight, eps, spare)
