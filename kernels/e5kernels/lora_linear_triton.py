"""Triton face of `lora_linear`: its kernels and the autograd function that launches them.

What is computed stands in lora_linear.py; the dropout's bits are dropout.py's, drawn in registers as x is loaded, so
that neither d(x) nor a mask is ever in memory. Where x has spare columns, each pass is one product for both paths:

    forward    y = [x | s z] @ [W | B]^T     a kernel reads x, writes s z behind it and, for backward, apart
    backward   [dx | g B] = g @ [W | B]      then a kernel reads x and g B, adds the dropped s g B A to dx in place,
                                             and sums dA over a fixed share of the tokens in every program (no atomics)

Linears that share x share its spare columns too: each writes its own s z there just before its product reads it, on one
stream, and keeps s z apart, (T, R). So a linear need not know its siblings, there are no zero blocks to multiply, as
there would be with all z side by side, and an x serves any number of linears. The price is that each reads x anew: for
q, k and v of Mistral-7B at 8,192 tokens in bf16 two more times 67 MB, 40 us at the 3.35 TB/s of an H100's data sheet.

[W | B] lies transposed, (in + spare, out) contiguous, W^T before B^T: so W is one stretch of memory. A sharded model
gathers it with the rows behind it, 0.3% more of Mistral-7B at rank 16. B is cast there whenever it is to be read, the
cast that any path must do, so it is right after every gather, update or load.

Products as wide as 4,112 have a tile more than those of 4,096, and whether that eats what is saved, above all in dx, no
GPU has said yet: measure it first (make_room in e5core/lora.py is the one place that asks for spare columns).

Where x has no spare columns, y takes s z B^T in a second product (one more read and write of y), and g is read once
more for g B. Bytes in bf16 beside the products' own at T = 8,192, in = out = 4,096, R = 16: forward, spare: x, 67 MB;
else x, and y twice: 201 MB; by plain torch x three times and y twice: 336 MB. Backward: x, and dx twice: 201 MB.

Speed is unmeasured; the blocks follow from this reckoning. A thread's 16 bytes of bf16 are the 8 channels of one mix. A
forward program has 32 tokens x 256 channels on 4 warps: eight such loads a thread, 16 KB in flight, which makes 32 KB
with two programs on a multiprocessor (256 programs at 8,192 tokens), where 3.35 TB/s ask for 13 at a latency of 0.5 us
(an assumption). Each reads all of A, 67 MB together, out of the L2 cache. A backward program keeps a tile of A and of
dA, 64 channels wide, and goes over the tokens of its share, 32 at a time; shares are made until there are about four
programs for each of 132 multiprocessors: 9 of them at 4,096 channels, whose partial sums are 2.4 MB. In fp32 the tiles
are smaller, so that no register spills.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from e5kernels.dropout_triton import drawn_bytes

FORWARD_TILES = {  # of an element's bytes
    2: {"BLOCK_T": 32, "BLOCK_C": 256, "num_warps": 4},
    4: {"BLOCK_T": 32, "BLOCK_C": 64, "num_warps": 4},
}
BACKWARD_TILES = {
    2: {"BLOCK_T": 32, "BLOCK_C": 64, "num_warps": 4},
    4: {"BLOCK_T": 16, "BLOCK_C": 64, "num_warps": 4},
}
MOST_RANKS = 64  # of a program: what fits in its registers
N_PROGRAMS = 528  # wanted of a backward pass, see above
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b, sums):
    """a b + sums, fp32."""
    if INTERPRETED:  # the interpreter knows no product of bf16; that of the same values in fp32 is as exact
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _channels(first, BLOCK_C: tl.constexpr):
    """Groups (1, BLOCK_C / 8, 1) and bytes (1, 1, 8) of the channels that begin with `first`."""
    groups = first // 8 + tl.arange(0, BLOCK_C // 8)
    return groups[None, :, None], tl.arange(0, 8)[None, None, :]


@triton.jit
def _lora_linear_forward_kernel(
    x_ptr, keys_ptr, a_ptr, z_ptr, n_tokens, dim, rank, x_stride, stream, drop_below, scale, DROPS: tl.constexpr,
    SPARE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write z (T, R) = scale * (m * x) A^T and, where SPARE > 0, the same behind the rows of x, with zeros to SPARE."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    is_token = tokens < n_tokens
    rows = (tokens * x_stride)[:, None, None]
    if DROPS:
        keys = (tl.load(keys_ptr + tokens, mask=is_token, other=0) ^ stream.to(tl.int64))[:, None, None]
    z = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for first in range(0, dim, BLOCK_C):
        groups, byte = _channels(first, BLOCK_C)
        columns = 8 * groups + byte
        x = tl.load(x_ptr + rows + columns, mask=is_token[:, None, None] & (columns < dim), other=0.0)
        if DROPS:
            x = tl.where(drawn_bytes(keys, groups, byte) >= drop_below, x, 0.0)
        flat = first + tl.arange(0, BLOCK_C)[None, :]
        a = tl.load(a_ptr + ranks * dim + flat, mask=(ranks < rank) & (flat < dim), other=0.0).to(x.dtype)
        z = _dot(tl.reshape(x, (BLOCK_T, BLOCK_C)), tl.trans(a), z)
    z *= scale
    columns = tl.trans(ranks)
    tl.store(z_ptr + tokens[:, None] * rank + columns, z, mask=is_token[:, None] & (columns < rank))
    if SPARE > 0:
        place = x_ptr + tokens[:, None] * x_stride + dim + columns
        tl.store(place, z, mask=is_token[:, None] & (columns < SPARE))


@triton.jit
def _lora_linear_backward_kernel(
    x_ptr, keys_ptr, a_ptr, dz_ptr, dx_ptr, d_a_ptr, n_tokens, dim, rank, x_stride, dz_stride, dx_stride, stream,
    drop_below, scale, DROPS: tl.constexpr, DX: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write this program's part of scale * dz^T (m * x), (n_programs, R, in), and add scale * m * (dz A) to dx."""
    first = tl.program_id(0) * BLOCK_C
    flat = first + tl.arange(0, BLOCK_C)[None, :]
    groups, byte = _channels(first, BLOCK_C)
    columns = 8 * groups + byte
    ranks = tl.arange(0, BLOCK_R)
    is_a = (ranks[:, None] < rank) & (flat < dim)
    a = tl.load(a_ptr + ranks[:, None] * dim + flat, mask=is_a, other=0.0).to(x_ptr.dtype.element_ty)
    d_a = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(tl.program_id(1) * BLOCK_T, n_tokens, tl.num_programs(1) * BLOCK_T):
        tokens = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        is_token = tokens < n_tokens
        is_x = is_token[:, None, None] & (columns < dim)
        x = tl.load(x_ptr + (tokens * x_stride)[:, None, None] + columns, mask=is_x, other=0.0)
        if DROPS:
            keys = tl.load(keys_ptr + tokens, mask=is_token, other=0) ^ stream.to(tl.int64)
            kept = drawn_bytes(keys[:, None, None], groups, byte) >= drop_below
            x = tl.where(kept, x, 0.0)
        is_dz = is_token[:, None] & (ranks[None, :] < rank)
        dz = tl.load(dz_ptr + tokens[:, None] * dz_stride + ranks[None, :], mask=is_dz, other=0.0)
        d_a = _dot(tl.trans(dz), tl.reshape(x, (BLOCK_T, BLOCK_C)), d_a)
        if DX:
            added = _dot(dz, a, tl.zeros((BLOCK_T, BLOCK_C), tl.float32)) * scale
            added = tl.reshape(added, (BLOCK_T, BLOCK_C // 8, 8))
            if DROPS:
                added = tl.where(kept, added, 0.0)
            place = dx_ptr + (tokens * dx_stride)[:, None, None] + columns
            tl.store(place, tl.load(place, mask=is_x, other=0.0).to(tl.float32) + added, mask=is_x)
    row = tl.program_id(1).to(tl.int64) * rank + ranks[:, None]
    tl.store(d_a_ptr + row * dim + flat, d_a * scale, mask=is_a)


def block_r(rank: int) -> int:
    """Choose how many rows of A a program takes; a dot has at least 16."""
    return min(MOST_RANKS, max(16, triton.next_power_of_2(rank)))


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scale, keys, stream, drop_below, is_read):  # noqa: ANN001, ANN205
        n_tokens, (rank, dim) = len(x), lora_a.shape
        spare = x.shape[1] - dim
        rows = x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()
        z = x.new_empty(n_tokens, rank)  # scaled
        ctx.factor = scale if keys is None else scale * 256 / (256 - drop_below)
        if n_tokens:
            block, tile = block_r(rank), FORWARD_TILES[x.itemsize]
            _lora_linear_forward_kernel[(triton.cdiv(n_tokens, tile["BLOCK_T"]), triton.cdiv(rank, block))](
                rows, keys, lora_a.contiguous(), z, n_tokens, dim, rank, rows.stride(0), stream, drop_below, ctx.factor,
                DROPS=keys is not None, SPARE=spare if is_read else 0, BLOCK_R=block, **tile,
            )  # fmt: skip
        ctx.save_for_backward(x, z, weight, lora_a, lora_b, keys)
        ctx.scale, ctx.stream, ctx.drop_below = scale, stream, drop_below
        if not is_read:
            return x.new_zeros(()).expand(n_tokens, len(weight))
        if spare:
            whole = _with_b(weight, lora_b, spare)
            return rows @ whole if bias is None else torch.addmm(bias, rows, whole)  # (T, out)
        return torch.nn.functional.linear(x, weight, bias).addmm_(z, lora_b.to(x.dtype).T)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # noqa: ANN001, ANN205
        x, z, weight, lora_a, lora_b, keys = ctx.saved_tensors
        (rank, dim), wants_x = lora_a.shape, ctx.needs_input_grad[0]
        spare, dx = x.shape[1] - dim, None
        if wants_x and spare:
            dx = g @ _with_b(weight, lora_b, spare).T  # (T, in + spare)
            dz = dx[:, dim : dim + rank]
        else:
            dx = g @ weight if wants_x else None
            dz = g @ lora_b.to(g.dtype)
        d_a = _finish(ctx, x, keys, lora_a.contiguous(), dz, dx)
        d_b = (g.T @ z).to(lora_b.dtype)
        return dx, None, None, d_a.to(lora_a.dtype), d_b, None, None, None, None, None


def _finish(
    ctx: torch.autograd.function.FunctionCtx,
    x: Tensor,
    keys: Tensor | None,
    lora_a: Tensor,
    dz: Tensor,
    dx: Tensor | None,
) -> Tensor:
    """Return dA (R, in) fp32, and add the adapter's part to dx, where there is one.  dz: (T, R), not scaled."""
    n_tokens, (rank, dim) = len(x), lora_a.shape
    if not n_tokens:
        return torch.zeros_like(lora_a)
    tile, block = BACKWARD_TILES[x.itemsize], block_r(rank)
    n_blocks = triton.cdiv(dim, tile["BLOCK_C"])
    n_shares = min(triton.cdiv(N_PROGRAMS, n_blocks), triton.cdiv(n_tokens, tile["BLOCK_T"]))
    rows, found = x if x.stride(1) == 1 else x.contiguous(), []
    for a, part in zip(lora_a.split(block), dz.split(block, dim=1), strict=True):
        partial = x.new_empty(n_shares, len(a), dim, dtype=torch.float32)
        _lora_linear_backward_kernel[(n_blocks, n_shares)](
            rows, keys, a, part, dx, partial, n_tokens, dim, len(a), rows.stride(0), part.stride(0),
            0 if dx is None else dx.stride(0), ctx.stream, ctx.drop_below, ctx.factor, DROPS=keys is not None,
            DX=dx is not None, BLOCK_R=block, **tile,
        )  # fmt: skip
        found.append(partial.sum(0))
    return found[0] if len(found) == 1 else torch.cat(found)


def _with_b(weight: Tensor, lora_b: Tensor, spare: int) -> Tensor:
    """Cast B into the spare rows and return [W | B]^T, (in + spare, out).

    By .data: what autograd saved of the frozen weight stays valid.
    """
    n_out, dim = weight.shape
    whole = weight.data.as_strided((dim + spare, n_out), (n_out, 1))
    rank = lora_b.shape[1]
    whole[dim : dim + rank].copy_(lora_b.T)
    if rank < spare:
        whole[dim + rank :].zero_()
    return whole


def lora_linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    keys: Tensor | None,
    stream: int,
    drop_below: int,
    is_read: bool,
) -> Tensor:
    """Do a linear and its adapter by the kernels, on Linux.  Arguments as `lora_linear`, x fp32 or bf16, stream signed.

    Raises ValueError where a shape does not fit, or where x has spare columns and weight has no room behind it.
    """
    n_out, dim = weight.shape
    spare = x.shape[-1] - dim
    if x.ndim != 2 or spare < 0 or lora_a.shape[1:] != (dim,) or lora_b.shape != (n_out, len(lora_a)):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, weight, lora_a, lora_b))
        raise ValueError(f"x must be (T, in), weight (out, in), lora_a (R, in), lora_b (out, R): got {shapes}")
    if spare and (spare < len(lora_a) or weight.stride() != (1, n_out)):
        got = f"{spare} spare columns, weight's strides {weight.stride()}"
        raise ValueError(f"spare columns must hold R = {len(lora_a)} and weight must be `with_room`: got {got}")
    return _LoraLinear.apply(x, weight, bias, lora_a, lora_b, scale, keys, stream, drop_below, is_read)
