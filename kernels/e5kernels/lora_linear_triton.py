"""Triton face of `lora_linear`: its kernels and the autograd function that launches them.

What is computed stands in lora_linear.py; the dropout's bits are dropout.py's, drawn in registers as x is loaded, so
that neither d(x) nor a mask is ever in memory. Where x has spare columns, each pass is one product for both paths:

    forward    y = [x | s z] @ [W | B]^T     a kernel reads x once for all linears and writes every s z, (T, R); another
                                             puts one linear's s z behind x and its B behind W, for its product
    backward   [dx | g B] = g @ [W | B]      then a kernel reads x and every dx and g B, writes the sum of all dx and
                                             of the dropped s g B A in the first one's place, and sums every dA over a
                                             fixed share of the tokens in every program (no atomics)

Linears that share x share its spare columns too, in turn, on one stream: so no zero blocks are multiplied, as there
would be with all z side by side, and x is as wide for any number of linears. Each turn moves (T, R) and B: 1 MB for q.
That x is read once for up to three linears, and that no sum of their dx is made apart, saves for q, k and v of
Mistral-7B at 8,192 tokens in bf16 134 MB forward and 670 backward, 40 and 200 us at the 3.35 TB/s of an H100's data
sheet, and for gate and up half of that: 2% of a step by this reckoning. The dx are all in memory at once: of q, k and v
one (T, in) more than where autograd sums them, at a moment when gate and up are gone.

[W | B] lies transposed, (in + spare, out) contiguous, W^T before B^T: so W is one stretch of memory. A sharded model
gathers it with the rows behind it, 0.3% more of Mistral-7B at rank 16. B is cast there whenever it is to be read, the
cast that any path must do, so it is right after every gather, update or load.

Products as wide as 4,112 have a tile more than those of 4,096, and whether that eats what is saved, above all in dx, no
GPU has said yet: measure it first (make_room in e5core/lora.py is the one place that asks for spare columns).

Where x has no spare columns, y takes s z B^T in a second product (one more read and write of y), and g is read once
more for g B. Bytes in bf16 beside the products' own at T = 8,192, in = out = 4,096, R = 16: forward, spare: x, 67 MB;
else x, and y twice: 201 MB; by plain torch x three times and y twice: 336 MB. Backward: x, and dx twice: 201 MB.

Speed is unmeasured; the blocks follow from this reckoning. A thread's 16 bytes of bf16 are the 8 channels of one mix. A
forward program of one linear has 32 tokens x 256 channels on 4 warps: eight such loads a thread, 16 KB in flight, which
makes 32 KB with two programs on a multiprocessor (256 programs at 8,192 tokens), where 3.35 TB/s ask for 13 at a
latency of 0.5 us (an assumption). The bits that several linears draw take registers: two have 128 channels, three 64,
whose 4 KB are 16 with two programs and a stage loaded ahead. Each program reads all of A, 67 MB a linear together, out
of the L2 cache. A backward program keeps a tile of each A and dA, 64 channels wide, and goes over the tokens of its
share, 32 at a time. There are as many shares as 132 multiprocessors hold programs at once, by their registers five of
one linear and two of several: 10 at 4,096 channels, whose partial sums are 2.6 MB, and 4 of q, k and v, 3.1 MB. In fp32
and at higher ranks the tiles are smaller: within the 99 KB of an RTX 4090, and tests/test_compile.py lets 16 bytes at
most spill from registers.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from e5kernels.adapted import MOST_LINEARS, Adapted, Drop, flattened, parted
from e5kernels.dropout_triton import drawn_bytes

MOST_RANKS = {2: 32, 4: 16}  # of a program, by an element's bytes
N_PROGRAMS = {1: 660, 2: 264, 3: 264}  # most of a backward pass of so many linears, see above
BLOCK_JOINED = 64  # tokens and outputs of a program: 128 programs at 8,192 tokens
VARYING = ["n_tokens", "stream_0", "stream_1", "stream_2", "drop_below"]  # no kernel is compiled for a value of theirs
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
def _kept(keys, stream, groups, byte, drop_below):
    """Which channels of the tokens are not dropped by a linear's stream."""
    return drawn_bytes(keys ^ stream.to(tl.int64), groups, byte) >= drop_below


@triton.jit
def _add_z(
    z, x, keys, stream, groups, byte, drop_below, a_ptr, is_a,
    DROPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """z + (m * x) A^T of one linear, over a tile of channels."""
    if DROPS:
        x = tl.where(_kept(keys, stream, groups, byte, drop_below), x, 0.0)
    a = tl.load(a_ptr, mask=is_a, other=0.0).to(x.dtype)
    return _dot(tl.reshape(x, (BLOCK_T, BLOCK_C)), tl.trans(a), z)


@triton.jit(do_not_specialize=VARYING)
def _lora_linear_forward_kernel(
    x_ptr, keys_ptr, a_0_ptr, a_1_ptr, a_2_ptr, z_ptr, n_tokens, dim, rank, x_stride, stream_0, stream_1, stream_2,
    drop_below, scale, N: tl.constexpr, DROPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write z (N, T, R), each scale * (m * x) A^T."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    is_token = tokens < n_tokens
    rows = (tokens * x_stride)[:, None, None]
    keys = tokens[:, None, None]
    if DROPS:
        keys = tl.load(keys_ptr + tokens, mask=is_token, other=0)[:, None, None]
    z_0 = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    z_1 = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    z_2 = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for first in range(0, dim, BLOCK_C):
        groups, byte = _channels(first, BLOCK_C)
        columns = 8 * groups + byte
        x = tl.load(x_ptr + rows + columns, mask=is_token[:, None, None] & (columns < dim), other=0.0)
        flat = first + tl.arange(0, BLOCK_C)[None, :]
        place, is_a = ranks * dim + flat, (ranks < rank) & (flat < dim)
        z_0 = _add_z(
            z_0, x, keys, stream_0, groups, byte, drop_below, a_0_ptr + place, is_a, DROPS, BLOCK_T, BLOCK_C
        )  # fmt: skip
        if N > 1:
            z_1 = _add_z(
                z_1, x, keys, stream_1, groups, byte, drop_below, a_1_ptr + place, is_a, DROPS, BLOCK_T, BLOCK_C
            )  # fmt: skip
        if N > 2:
            z_2 = _add_z(
                z_2, x, keys, stream_2, groups, byte, drop_below, a_2_ptr + place, is_a, DROPS, BLOCK_T, BLOCK_C
            )  # fmt: skip
    columns = tl.trans(ranks)
    is_z = is_token[:, None] & (columns < rank)
    z_rows = tokens[:, None]
    tl.store(z_ptr + z_rows * rank + columns, z_0 * scale, mask=is_z)
    if N > 1:
        tl.store(z_ptr + (z_rows + n_tokens) * rank + columns, z_1 * scale, mask=is_z)
    if N > 2:
        tl.store(z_ptr + (z_rows + 2 * n_tokens) * rank + columns, z_2 * scale, mask=is_z)


@triton.jit(do_not_specialize=["n_tokens"])
def _lora_linear_join_kernel(
    x_ptr, z_ptr, room_ptr, b_ptr, n_tokens, n_out, dim, rank, spare, x_stride, BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Put z (T, R) into the spare columns of x, and B^T into the room (spare, out) behind W^T, with zeros beyond R."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    is_rank, is_spare = ranks < rank, ranks < spare
    z = tl.load(z_ptr + rows * rank + ranks, mask=(rows < n_tokens) & is_rank, other=0.0)
    tl.store(x_ptr + rows * x_stride + dim + ranks, z, mask=(rows < n_tokens) & is_spare)
    b = tl.load(b_ptr + rows * rank + ranks, mask=(rows < n_out) & is_rank, other=0.0)
    tl.store(room_ptr + ranks * n_out + rows, b, mask=(rows < n_out) & is_spare)


@triton.jit
def _add_gradients(
    d_a, dx, x, a, keys, stream, groups, byte, drop_below, scale, dx_ptr, is_x, dz_ptr, is_dz,
    DROPS: tl.constexpr, DX: tl.constexpr, ADDS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One linear's d_a + dz^T (m * x), and dx + scale * m * (dz A), where ADDS with what its product has put there."""
    if DROPS:
        kept = _kept(keys, stream, groups, byte, drop_below)
        x = tl.where(kept, x, 0.0)
    dz = tl.load(dz_ptr, mask=is_dz, other=0.0)
    d_a = _dot(tl.trans(dz), tl.reshape(x, (BLOCK_T, BLOCK_C)), d_a)
    if DX:
        added = _dot(dz, a, tl.zeros((BLOCK_T, BLOCK_C), tl.float32)) * scale
        added = tl.reshape(added, (BLOCK_T, BLOCK_C // 8, 8))
        if DROPS:
            added = tl.where(kept, added, 0.0)
        dx += added
        if ADDS:
            dx += tl.load(dx_ptr, mask=is_x, other=0.0).to(tl.float32)
    return d_a, dx


@triton.jit(do_not_specialize=VARYING)
def _lora_linear_backward_kernel(
    x_ptr, keys_ptr, a_0_ptr, a_1_ptr, a_2_ptr, dz_0_ptr, dz_1_ptr, dz_2_ptr, dx_0_ptr, dx_1_ptr, dx_2_ptr, d_a_ptr,
    n_tokens, dim, rank, x_stride, dz_stride, dx_stride, stream_0, stream_1, stream_2, drop_below, scale,
    N: tl.constexpr, DROPS: tl.constexpr, DX: tl.constexpr, SUMS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write this program's part of every scale * dz^T (m * x), (N, n_programs, R, in), and the sum of dx in dx_0.

    Where SUMS, every dx is added up; else dx_0 has their sum, and only what the adapters add to it is new.
    """
    first = tl.program_id(0) * BLOCK_C
    flat = first + tl.arange(0, BLOCK_C)[None, :]
    groups, byte = _channels(first, BLOCK_C)
    columns = 8 * groups + byte
    ranks = tl.arange(0, BLOCK_R)
    is_a = (ranks[:, None] < rank) & (flat < dim)
    place = ranks[:, None] * dim + flat
    a_0 = tl.load(a_0_ptr + place, mask=is_a, other=0.0).to(x_ptr.dtype.element_ty)
    d_a_0 = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if N > 1:
        a_1 = tl.load(a_1_ptr + place, mask=is_a, other=0.0).to(x_ptr.dtype.element_ty)
        d_a_1 = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if N > 2:
        a_2 = tl.load(a_2_ptr + place, mask=is_a, other=0.0).to(x_ptr.dtype.element_ty)
        d_a_2 = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(tl.program_id(1) * BLOCK_T, n_tokens, tl.num_programs(1) * BLOCK_T):
        tokens = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        is_token = tokens < n_tokens
        is_x = is_token[:, None, None] & (columns < dim)
        x = tl.load(x_ptr + (tokens * x_stride)[:, None, None] + columns, mask=is_x, other=0.0)
        keys = tokens[:, None, None]
        if DROPS:
            keys = tl.load(keys_ptr + tokens, mask=is_token, other=0)[:, None, None]
        is_dz, dz_place = is_token[:, None] & (ranks[None, :] < rank), tokens[:, None] * dz_stride + ranks[None, :]
        dx_place = (tokens * dx_stride)[:, None, None] + columns
        dx = tl.zeros((BLOCK_T, BLOCK_C // 8, 8), tl.float32)
        d_a_0, dx = _add_gradients(
            d_a_0, dx, x, a_0, keys, stream_0, groups, byte, drop_below, scale, dx_0_ptr + dx_place, is_x,
            dz_0_ptr + dz_place, is_dz, DROPS, DX, True, BLOCK_T, BLOCK_C,
        )  # fmt: skip
        if N > 1:
            d_a_1, dx = _add_gradients(
                d_a_1, dx, x, a_1, keys, stream_1, groups, byte, drop_below, scale, dx_1_ptr + dx_place, is_x,
                dz_1_ptr + dz_place, is_dz, DROPS, DX, SUMS, BLOCK_T, BLOCK_C,
            )  # fmt: skip
        if N > 2:
            d_a_2, dx = _add_gradients(
                d_a_2, dx, x, a_2, keys, stream_2, groups, byte, drop_below, scale, dx_2_ptr + dx_place, is_x,
                dz_2_ptr + dz_place, is_dz, DROPS, DX, SUMS, BLOCK_T, BLOCK_C,
            )  # fmt: skip
        if DX:
            tl.store(dx_0_ptr + dx_place, dx, mask=is_x)
    size = tl.num_programs(1).to(tl.int64) * rank * dim  # of a linear's parts
    d_a_ptr += (tl.program_id(1).to(tl.int64) * rank + ranks[:, None]) * dim + flat
    tl.store(d_a_ptr, d_a_0 * scale, mask=is_a)
    if N > 1:
        tl.store(d_a_ptr + size, d_a_1 * scale, mask=is_a)
    if N > 2:
        tl.store(d_a_ptr + 2 * size, d_a_2 * scale, mask=is_a)


def forward_tile(n_linears: int, rank: int, itemsize: int) -> dict[str, int]:
    """Choose ranks, tokens, channels and warps of a forward program: 4,096 numbers of all A at once, in fp32 3,072."""
    block_r = _block_r(rank, itemsize)
    channels = min(256, 4096 // (n_linears * block_r)) if itemsize == 2 else min(64, 3072 // (n_linears * block_r))
    return {"BLOCK_R": block_r, "BLOCK_T": 32, "BLOCK_C": _channels_of(channels), "num_warps": 4}


def backward_tile(n_linears: int, rank: int, itemsize: int) -> dict[str, int]:
    """Choose ranks, tokens, channels and warps of a backward program: 3,072 numbers of all dA, in fp32 half."""
    block_r = _block_r(rank, itemsize)
    channels = min(64, (3072 if itemsize == 2 else 1536) // (n_linears * block_r))
    return {
        "BLOCK_R": block_r,
        "BLOCK_T": 32 if itemsize == 2 else 16,
        "BLOCK_C": _channels_of(channels),
        "num_warps": 4,
    }


def _block_r(rank: int, itemsize: int) -> int:
    """Choose how many rows of A a program takes; a dot has at least 16."""
    return min(MOST_RANKS[itemsize], max(16, triton.next_power_of_2(rank)))


def _channels_of(most: int) -> int:
    """Round down to a power of 2; a dot has at least 16."""
    return max(16, 1 << (most.bit_length() - 1))


def named(items: Sequence) -> list:
    """Fill the names that a kernel has for linears; what is beyond their number it does not touch."""
    return [*items, *[items[0]] * (MOST_LINEARS - len(items))]


def adapters_forward(
    x: Tensor, keys: Tensor | None, matrices: Sequence[Tensor], streams: Sequence[int], below: int, scale: float
) -> Tensor:
    """Project x onto every A by the kernel, on Linux.

    x: (T, in) or wider, fp32 or bf16.  matrices: A (R, in) of each linear, up to MOST_LINEARS.  streams, below: as
    `keyed_dropout`'s.  Returns z (N, T, R), each s d(x) A^T.
    """
    n_tokens, (rank, dim) = len(x), matrices[0].shape
    z = x.new_empty(len(matrices), n_tokens, rank)
    if n_tokens:
        tile = forward_tile(len(matrices), rank, x.itemsize)
        grid = triton.cdiv(n_tokens, tile["BLOCK_T"]), triton.cdiv(rank, tile["BLOCK_R"])
        _lora_linear_forward_kernel[grid](
            x, keys, *named([a.contiguous() for a in matrices]), z, n_tokens, dim, rank, x.stride(0), *named(streams),
            below, factor(scale, keys, below), N=len(matrices), DROPS=keys is not None, **tile,
        )  # fmt: skip
    return z


def adapters_backward(
    x: Tensor, keys: Tensor | None, matrices: Sequence[Tensor], streams: Sequence[int], below: int, scale: float,
    dzs: Sequence[Tensor], dxs: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """Return every dA, (N, R, in) fp32, and leave the sum of all dx, adapters' parts added, in the first of dxs.

    dzs: (T, R) of each linear, g B, not scaled, of one row stride.  dxs: (T, in) or wider, g W, of one row stride; none
    where x takes no gradient.  The others as in `adapters_forward`.
    """
    n_tokens, (rank, dim), n = len(x), matrices[0].shape, len(matrices)
    if not n_tokens:
        return x.new_zeros(n, rank, dim, dtype=torch.float32)
    tile = backward_tile(n, rank, x.itemsize)
    n_blocks, block = triton.cdiv(dim, tile["BLOCK_C"]), tile["BLOCK_R"]
    n_shares = min(max(1, N_PROGRAMS[n] // n_blocks), triton.cdiv(n_tokens, tile["BLOCK_T"]))
    whole, found = [a.contiguous() for a in matrices], []
    for start in range(0, rank, block):
        parts, dz_parts = [a[start : start + block] for a in whole], [dz[:, start : start + block] for dz in dzs]
        n_rows = len(parts[0])
        partial = x.new_empty(n, n_shares, n_rows, dim, dtype=torch.float32)
        _lora_linear_backward_kernel[(n_blocks, n_shares)](
            x, keys, *named(parts), *named(dz_parts), *named(dxs or [x]), partial, n_tokens, dim, n_rows, x.stride(0),
            dzs[0].stride(0), dxs[0].stride(0) if dxs else 0, *named(streams), below, factor(scale, keys, below), N=n,
            DROPS=keys is not None, DX=bool(dxs), SUMS=start == 0, **tile,
        )  # fmt: skip
        found.append(partial.sum(1))
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def factor(scale: float, keys: Tensor | None, below: int) -> float:
    """Return s / (1 - p)."""
    return scale if keys is None else scale * 256 / (256 - below)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, keys, below, streams, is_read, *tensors):  # noqa: ANN001, ANN002, ANN205
        weights, biases, matrices, bs = parted(tensors, 4)
        spare = x.shape[1] - weights[0].shape[1]
        rows = x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()
        z = adapters_forward(rows, keys, matrices, streams, below, scale)
        ctx.save_for_backward(rows, keys, z, *tensors)
        ctx.scale, ctx.below, ctx.streams = scale, below, streams
        if not is_read:
            return tuple(x.new_zeros(()).expand(len(x), len(weight)) for weight in weights)
        outputs = []
        for weight, bias, b, z_one in zip(weights, biases, bs, z, strict=True):
            if not spare:
                outputs.append(torch.nn.functional.linear(x, weight, bias).addmm_(z_one, b.to(x.dtype).T))
                continue
            whole = joined(weight, b, spare, rows, z_one)
            outputs.append(rows @ whole if bias is None else torch.addmm(bias, rows, whole))  # (T, out)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gs):  # noqa: ANN001, ANN002, ANN205
        x, keys, z, *tensors = ctx.saved_tensors
        weights, _, matrices, bs = parted(tensors, 4)
        (rank, dim), dxs, dzs = matrices[0].shape, [], []
        for g, weight, b in zip(gs, weights, bs, strict=True):
            if ctx.needs_input_grad[0] and x.shape[1] > dim:
                dxs.append(g @ joined(weight, b, x.shape[1] - dim).T)  # (T, in + spare)
                dzs.append(dxs[-1][:, dim : dim + rank])
                continue
            dxs += [g @ weight] if ctx.needs_input_grad[0] else []
            dzs.append(g @ b.to(g.dtype))
        d_a = adapters_backward(x, keys, matrices, ctx.streams, ctx.below, ctx.scale, dzs, dxs)
        found = []
        for g, z_one, a, d_a_one, b in zip(gs, z, matrices, d_a, bs, strict=True):
            found += [None, None, d_a_one.to(a.dtype), (g.T @ z_one).to(b.dtype)]
        return dxs[0] if dxs else None, None, None, None, None, None, *found


def joined(weight: Tensor, lora_b: Tensor, spare: int, x: Tensor | None = None, z: Tensor | None = None) -> Tensor:
    """Cast B into the room behind a weight and return [W | B]^T, (in + spare, out).

    x, z: where given, z (T, R) is put into the spare columns of x (T, in + spare) as well.
    """
    (n_out, dim), rank = weight.shape, lora_b.shape[1]
    whole = weight.detach().as_strided((dim + spare, n_out), (n_out, 1))
    room, n_tokens, block_r = whole[dim:], 0 if z is None else len(z), _block_r(spare, weight.itemsize)
    _lora_linear_join_kernel[(triton.cdiv(max(n_out, n_tokens), BLOCK_JOINED), triton.cdiv(spare, block_r))](
        room if x is None else x, room if z is None else z, room, lora_b.contiguous(), n_tokens, n_out, dim, rank,
        spare, 0 if x is None else x.stride(0), BLOCK=BLOCK_JOINED, BLOCK_R=block_r,
    )  # fmt: skip
    return whole


def lora_linear_triton(
    x: Tensor, linears: Sequence[Adapted], scale: float, drop: Drop, is_read: bool
) -> tuple[Tensor, ...]:
    """Do frozen linears that read one x, and their adapters, by the kernels, on Linux.

    Arguments and result as `lora_linear`, x fp32 or bf16.
    Raises ValueError where a shape does not fit, or where x has spare columns and a weight has no room behind it.
    """
    dim, rank = linears[0].weight.shape[1], len(linears[0].lora_a)
    spare = x.shape[-1] - dim
    for weight, _, a, b, _ in linears:
        n_out = len(weight)
        if x.ndim != 2 or spare < 0 or weight.shape[1] != dim or a.shape != (rank, dim) or b.shape != (n_out, rank):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, weight, a, b))
            raise ValueError(f"x must be (T, in), weight (out, in), lora_a (R, in), lora_b (out, R): got {shapes}")
        if spare and (spare < rank or weight.stride() != (1, n_out)):
            got = f"{spare} spare columns, weight's strides {weight.stride()}"
            raise ValueError(f"spare columns must hold R = {rank} and weight must be `with_room`: got {got}")
    return _LoraLinear.apply(x, *flattened(linears, scale, drop, is_read))
