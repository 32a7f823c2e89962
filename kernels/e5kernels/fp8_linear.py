"""Frozen linears in row-wise fp8, alone and with low-rank adapters in x's own dtype (arXiv 2209.05433, 2106.09685).

    forward    y = (q W_q^T) s_x s_w + b                        q, s_x = quantise(x);  W_q, s_w = quantise(W)
    backward   dx = (g_q V_q^T) s_g s_v                         g_q, s_g = quantise(g);  V_q, s_v = quantise(W^T)
    adapter    y += s z B^T,  z = d(x) A^T                      as in lora_linear.py, from x as it was, not quantised

Scales must be constant along what is summed, so W is held twice, quantised by output row and, transposed, by input row:
together the bytes of bf16. What is gained is the speed of fp8 products; dW is never made. An adapter is an epilogue on
y, no part of the product: B in e4m3 would take its small updates away.

On CUDA a product is torch._scaled_mm with row-wise scales, y in bf16. It wants K and N in multiples of 16, any T.
`use_fast_accum` leaves sums to the product units, which on Hopper cut them to 13 bits after every 32 products:
emulated, 0.3% of the sums' RMS at K = 4,096 and 1.1% at 14,336, beside the 4% that quantising costs. bench/fp8.py times
the products without it beside these. The reference, elsewhere, multiplies the same codes in max(fp32, x's dtype):
e4m3's numbers are exact there, and so are their products. (Codes times scales in bf16 would not be exact.)
Saved for backward: V_q and s_v, and with an adapter x, z and the keys. x: (T, in).  W: (out, in).
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from e5kernels import native
from e5kernels.adapted import Adapted, Drop, Fp8Weight, flattened, parted
from e5kernels.fp8 import E4M3, Rows, face, multiplies_codes, quantise_rows, rows_of, values
from e5kernels.lora_linear import dropped

if sys.platform == "linux":  # Triton is published for no other
    from e5kernels.lora_linear_triton import adapters_backward, adapters_forward

MULTIPLE = 16  # of in and out, that torch._scaled_mm asks for


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
    if not len(q):
        return q.new_empty(0, len(codes), dtype=dtype)
    if multiplies_codes(q.device):
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
    def forward(ctx, x, q, q_scale, scale, keys, below, streams, is_read, *tensors):  # noqa: ANN001, ANN002, ANN205
        codes, scales, codes_t, scales_t, biases, matrices, bs = parted(tensors, 7)
        x = x if x.stride(1) == 1 else x.contiguous()
        zs = _adapters_forward(x, keys, matrices, streams, below, scale)  # (T, R) each
        outputs = []
        for z, weight, its_scale, bias, b in zip(zs, codes, scales, biases, bs, strict=True):
            if is_read:
                outputs.append(scaled_product(q, q_scale, weight, its_scale, bias, x.dtype).addmm_(z, b.to(x.dtype).T))
            else:
                outputs.append(x.new_zeros(()).expand(len(x), len(weight)))
        ctx.save_for_backward(x, keys, *codes_t, *scales_t, *matrices, *bs, *zs)
        ctx.scale, ctx.below, ctx.streams = scale, below, streams
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gs):  # noqa: ANN001, ANN002, ANN205
        x, keys, *rest = ctx.saved_tensors
        n = len(gs)
        codes_t, scales_t, matrices, bs, zs = (rest[i : i + n] for i in range(0, 5 * n, n))
        dxs = list(map(_gradient, gs, codes_t, scales_t)) if ctx.needs_input_grad[0] else []
        dzs = [g @ b.to(g.dtype) for g, b in zip(gs, bs, strict=True)]  # (T, R) each, not scaled
        d_as = _adapters_backward(x, keys, matrices, ctx.streams, ctx.below, ctx.scale, dzs, dxs)
        found = []
        for g, z, a, d_a, b in zip(gs, zs, matrices, d_as, bs, strict=True):
            found += [*[None] * 5, d_a.to(a.dtype), (g.T @ z).to(b.dtype)]
        return dxs[0] if dxs else None, *[None] * 7, *found


def _adapters_forward(
    x: Tensor, keys: Tensor | None, matrices: Sequence[Tensor], streams: Sequence[int], below: int, scale: float
) -> Sequence[Tensor]:
    """Return s z = s d(x) A^T of every A, (T, R), x's dtype."""
    if face(x.device) == "triton" and native.takes(x):
        return adapters_forward(x, keys, matrices, streams, below, scale)
    parts = zip(streams, matrices, strict=True)
    return [(dropped(x, keys, stream, below) @ a.to(x.dtype).T).mul_(scale) for stream, a in parts]


def _adapters_backward(
    x: Tensor, keys: Tensor | None, matrices: Sequence[Tensor], streams: Sequence[int], below: int, scale: float,
    dzs: Sequence[Tensor], dxs: Sequence[Tensor],
) -> Sequence[Tensor]:  # fmt: skip
    """Return every dA (R, in), and leave the sum of dxs, adapters' parts added, in the first, where there are any."""
    if face(x.device) == "triton" and native.takes(x):
        return adapters_backward(x, keys, matrices, streams, below, scale, dzs, dxs)
    found = []
    for i, (a, stream, dz) in enumerate(zip(matrices, streams, dzs, strict=True)):
        drop, dz = (keys, stream, below), dz * scale
        found.append(dz.T @ dropped(x, *drop))
        if dxs:
            dxs[0].add_(dropped(dz @ a.to(dz.dtype), *drop))
            if i:
                dxs[0].add_(dxs[i])
    return found


def fp8_linear(x: Tensor | Rows, weight: Fp8Weight, bias: Tensor | None) -> Tensor:
    """Do a frozen linear in fp8.

    x: (T, in), or its Rows.  bias: (out,) or None, no gradient.  Returns y (T, out), x's dtype, differentiable in x.
    """
    rows = x if isinstance(x, Rows) else rows_of(x)
    return _Fp8Linear.apply(*rows, *weight, bias)


def fp8_lora_linear(
    x: Tensor | Rows, linears: Sequence[Adapted], scale: float, drop: Drop, is_read: bool = True
) -> tuple[Tensor, ...]:
    """Do frozen linears in fp8 that read one x, and their adapters in x's dtype.

    x: (T, in), or its Rows.  linears: their weights are Fp8Weights.  The others and the result are `lora_linear`'s.
    """
    rows = x if isinstance(x, Rows) else rows_of(x) if is_read else Rows(x, None, None)
    return _Fp8LoraLinear.apply(*rows, *flattened(linears, scale, drop, is_read))
