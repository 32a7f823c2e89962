"""A frozen linear in row-wise fp8, alone and with a low-rank adapter in x's own dtype (arXiv 2209.05433, 2106.09685).

    forward    y = (q W_q^T) s_x s_w + b                        q, s_x = quantise(x);  W_q, s_w = quantise(W)
    backward   dx = (g_q V_q^T) s_g s_v                         g_q, s_g = quantise(g);  V_q, s_v = quantise(W^T)
    adapter    y += s z B^T,  z = d(x) A^T                      as in lora_linear.py, from x as it was, not quantised

Scales must be constant along what is summed, so W is held twice, quantised by output row and, transposed, by input row:
together the bytes of bf16. What is gained is the speed of fp8 products; dW is never made. An adapter is an epilogue on
y, no part of the product: B in e4m3 would take its small updates away.

On CUDA a product is torch._scaled_mm with row-wise scales: sums in fp32 by `use_fast_accum`, without which CUTLASS is
slow here, y in bf16. It wants K and N in multiples of 16, any T. The reference, elsewhere, multiplies the same codes in
max(fp32, x's dtype): e4m3's numbers are exact there, and so are their products, so that the two differ by the order of
sums alone. (Codes times scales in bf16 would not be exact.)
Saved for backward: V_q and s_v, and with an adapter x, z and the keys. x: (T, in).  W: (out, in).
"""

import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from e5kernels import native
from e5kernels.dropout import keyed_dropout, signed
from e5kernels.fp8 import E4M3, Rows, face, quantise_rows, rows_of, values

if sys.platform == "linux":  # Triton is published for no other
    from e5kernels.fp8_linear_triton import adapter_backward_triton, adapter_forward_triton

MULTIPLE = 16  # of in and out, that torch._scaled_mm asks for


class Fp8Weight(NamedTuple):
    """A frozen W (out, in), quantised for both directions."""

    codes: Tensor  # (out, in) e4m3
    scale: Tensor  # (out, 1) fp32
    codes_t: Tensor  # (in, out) e4m3, of W^T
    scale_t: Tensor  # (in, 1) fp32


def quantise_weight(weight: Tensor) -> Fp8Weight:
    """Quantise a weight for both directions.  weight: (out, in) any float dtype."""
    return Fp8Weight(*quantise_rows(weight), *quantise_rows(weight.T.contiguous()))


def scaled_product_reference(
    q: Tensor, scale: Tensor, codes: Tensor, codes_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Multiply quantised rows in max(fp32, dtype); the definition.  Arguments and result as `scaled_product`."""
    wide = torch.promote_types(dtype, torch.float32)
    y = values(q, wide) if q.dtype == E4M3 else q.to(wide)
    y = (y @ values(codes, wide).T).mul_(scale).mul_(codes_scale.T)
    return (y if bias is None else y.add_(bias)).to(dtype)


def scaled_product(
    q: Tensor, scale: Tensor, codes: Tensor, codes_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Multiply quantised rows.

    q: (T, K) as Rows has it.  scale: (T, 1) fp32.  codes: (N, K) e4m3.  codes_scale: (N, 1) fp32.  bias: (N,) or None.
    Returns (q codes^T) * scale * codes_scale^T + bias, (T, N) of this dtype, on CUDA bf16.
    """
    if q.device.type == "cuda" and len(q):
        scales = {"scale_a": scale, "scale_b": codes_scale.T}
        return torch._scaled_mm(q, codes.T, **scales, bias=bias, out_dtype=dtype, use_fast_accum=True)
    return scaled_product_reference(q, scale, codes, codes_scale, bias, dtype)


def _gradient(g: Tensor, codes_t: Tensor, scale_t: Tensor) -> Tensor:
    """Return dx (T, in) of g (T, out)."""
    rows = rows_of(g)
    return scaled_product(rows.q, rows.scale, codes_t, scale_t, None, g.dtype)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, q, q_scale, codes, scale, codes_t, scale_t, bias):  # noqa: ANN001, ANN205
        ctx.save_for_backward(codes_t, scale_t)
        return scaled_product(q, q_scale, codes, scale, bias, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # noqa: ANN001, ANN205
        return _gradient(g, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None, *[None] * 7


class _Fp8LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: ANN205
        ctx, x, q, q_scale, codes, codes_scale, codes_t, scale_t, bias,  # noqa: ANN001
        lora_a, lora_b, scale, keys, stream, drop_below, is_read,  # noqa: ANN001
    ):  # fmt: skip
        ctx.scale, ctx.stream, ctx.drop_below = scale, stream, drop_below
        ctx.factor = scale if keys is None else scale * 256 / (256 - drop_below)
        z = _adapter_forward(ctx, x, lora_a, keys)  # (T, R)
        ctx.save_for_backward(x, z, codes_t, scale_t, lora_a, lora_b, keys)
        if not is_read:
            return x.new_zeros(()).expand(len(x), len(codes))
        return scaled_product(q, q_scale, codes, codes_scale, bias, x.dtype).addmm_(z, lora_b.to(x.dtype).T)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # noqa: ANN001, ANN205
        x, z, codes_t, scale_t, lora_a, lora_b, keys = ctx.saved_tensors
        dx = _gradient(g, codes_t, scale_t) if ctx.needs_input_grad[0] else None
        dz = g @ lora_b.to(g.dtype)  # (T, R), not scaled
        da, db = _adapter_backward(ctx, x, dz, dx, lora_a, keys), (g.T @ z).to(lora_b.dtype)
        return dx, *[None] * 7, da, db, *[None] * 5


def _adapter_forward(ctx: FunctionCtx, x: Tensor, lora_a: Tensor, keys: Tensor | None) -> Tensor:
    """Return s z = s d(x) A^T, (T, R), x's dtype."""
    if face(x.device) == "triton" and native.takes(x):
        return adapter_forward_triton(ctx, x, lora_a, keys)
    dropped = x if keys is None else keyed_dropout(x, keys, ctx.stream, ctx.drop_below)
    return (dropped @ lora_a.to(x.dtype).T).mul_(ctx.scale)


def _adapter_backward(
    ctx: FunctionCtx, x: Tensor, dz: Tensor, dx: Tensor | None, lora_a: Tensor, keys: Tensor | None
) -> Tensor:
    """Return dA (R, in), and add the adapter's part to dx, where there is one.  dz: (T, R) = g B."""
    if face(x.device) == "triton" and native.takes(x):
        return adapter_backward_triton(ctx, x, dz, dx, lora_a, keys)
    drop, dz = (keys, ctx.stream, ctx.drop_below), dz * ctx.scale
    if dx is not None:
        added = dz @ lora_a.to(dz.dtype)
        dx.add_(added if keys is None else keyed_dropout(added, *drop))
    return (dz.T @ (x if keys is None else keyed_dropout(x, *drop))).to(lora_a.dtype)


def fp8_linear(x: Tensor | Rows, weight: Fp8Weight, bias: Tensor | None) -> Tensor:
    """Do a frozen linear in fp8.

    x: (T, in), or its Rows.  bias: (out,) or None, no gradient.  Returns y (T, out), x's dtype, differentiable in x.
    """
    rows = x if isinstance(x, Rows) else rows_of(x)
    return _Fp8Linear.apply(*rows, *weight, bias)


def fp8_lora_linear(
    x: Tensor | Rows,
    weight: Fp8Weight,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    keys: Tensor | None,
    stream: int,
    drop_below: int,
    is_read: bool = True,
) -> Tensor:
    """Do a frozen linear in fp8 and its adapter in x's dtype.

    x: (T, in), or its Rows.  The others and the result are `lora_linear`'s.
    """
    rows = x if isinstance(x, Rows) else rows_of(x)
    return _Fp8LoraLinear.apply(
        *rows, *weight, bias, lora_a, lora_b, scale, keys, signed(stream), drop_below, is_read
    )  # fmt: skip
