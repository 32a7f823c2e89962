"""Triton face of `varlen_attention`: its kernels and the autograd function that launches them.

What is computed stands in attention.py. Forward keeps the log-sum-exp of every query and head (Tq, H) in fp32, in base
2, beside its output; backward computes the probabilities again from it:

    p = 2^(scale log2(e) q.k - lse)    delta = sum(dO * O)    dS = p * (dO.v - delta)
    dV = p^T dO    dK = scale dS^T Q    dQ = scale dS K

Sums are fp32; p and dS are rounded to the caller's dtype before they are multiplied, as flash attention does (arXiv
2205.14135, 2307.08691). fp32 is multiplied as IEEE fp32, no TF32. One program owns a block of one sequence's queries
and one head (forward, dQ), or a block of its keys and one key head, whose query heads it visits in turn (dK and dV): no
atomics, the same bits on every run, and for a text alone as in a pack. q, k and v are read where they lie, with any
token and head stride; head_dim is padded to a power of two in registers only. The output and its gradient are rows of
all heads, behind which spare columns may lie, neither written nor read here.

A program finds its sequence in a table of int32, written by a kernel of its own: what a batch's lengths are is never
asked by the host. Sequence n owns the slots from cu[n] // BLOCK + n up to cu[n + 1] // BLOCK + n, which are never fewer
than its blocks, ceil(length / BLOCK) <= cu[n + 1] // BLOCK - cu[n] // BLOCK + 1, and need no sum over the others; so
T // BLOCK + N programs a head suffice for any lengths, and those of slots without a block return at once.

Speed is unmeasured. The blocks are the largest that spill nothing when compiled ahead of time for 32 query heads of 128
channels: 64 queries by 64 keys in bf16 (32 by 64 for dK and dV, which hold two sums), 32 by 16 in fp32, where a thread
forms its products itself and a second stage of loads would spill hundreds of bytes. Shared memory of a bf16 program,
forward, dK and dV, dQ: 80, 52 and 96 KiB on sm_90, 56, 52 and 72 on sm_80; only dK and dV in fp32 on sm_80 spill, 16
bytes a thread. A text of some 100 tokens, the usual one, is two blocks of 64: larger ones would mostly be padding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

EVERYTHING = 1 << 30  # the window of those that have none
CHUNK = 128  # slots that a program of the table writes at a time
DELTA_ROWS = 32  # of a program of the delta kernel: 8 loads of 16 bytes a thread at 128 channels in bf16
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # read as triton.jit reads it


@triton.jit
def _block_table_kernel(cu_seqlens_ptr, table_ptr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Write a sequence's number into all of its slots."""
    sequence = tl.program_id(0)
    first = tl.load(cu_seqlens_ptr + sequence) // BLOCK + sequence
    end = tl.load(cu_seqlens_ptr + sequence + 1) // BLOCK + sequence + 1
    for start in range(first, end, CHUNK):
        slots = start + tl.arange(0, CHUNK)
        tl.store(table_ptr + slots, tl.zeros((CHUNK,), tl.int32) + sequence, mask=slots < end)


@triton.jit
def _place(slot, table_ptr, cu_own_ptr, cu_other_ptr, BLOCK: tl.constexpr):
    """First row of a slot's block within its sequence, then where that starts and its length, on either side."""
    sequence = tl.load(table_ptr + slot)
    own, other = tl.load(cu_own_ptr + sequence), tl.load(cu_other_ptr + sequence)
    first = (slot - own // BLOCK - sequence) * BLOCK
    own_length = tl.load(cu_own_ptr + sequence + 1) - own
    return first, own, own_length, other, tl.load(cu_other_ptr + sequence + 1) - other


@triton.jit
def _places(start, rows, length, token_stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where a sequence's rows lie from a head's first element, (rows, BLOCK_D) int64, and what of it exists."""
    channels = tl.arange(0, BLOCK_D)[None, :]
    places = (start + rows).to(tl.int64)[:, None] * token_stride + channels
    return places, (rows < length)[:, None] & (channels < HEAD_DIM)


@triton.jit
def _load(pointer, start, rows, length, token_stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D) of one head; 0 outside."""
    places, mask = _places(start, rows, length, token_stride, HEAD_DIM, BLOCK_D)
    return tl.load(pointer + places, mask=mask, other=0.0)


@triton.jit
def _dot(a, b, sums):
    """a b + sums, fp32, a being rounded to b's dtype."""
    if INTERPRETED:  # there is no product of bf16 there, and its casts cut off: both stay fp32
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    return tl.dot(a.to(b.dtype), b, sums, input_precision="ieee")


@triton.jit
def _logits(q, k, positions, keys, n_keys, scale, window, CAUSAL: tl.constexpr):
    """(queries, keys) fp32 scaled scores in base 2; -inf where a query does not see a key."""
    distance = positions[:, None] - keys[None, :]
    seen = (keys < n_keys)[None, :] & (distance < window)
    seen &= distance >= 0 if CAUSAL else distance > -window
    scores = _dot(q, tl.trans(k), tl.zeros(seen.shape, tl.float32)) * (scale * 1.4426950408889634)  # log2(e)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _keys_of(first, last, n_keys, window, CAUSAL: tl.constexpr):
    """The keys that positions first..last see, as a range."""
    end = last + 1 if CAUSAL else last + window
    return tl.maximum(first - window + 1, 0), tl.minimum(end, n_keys)


@triton.jit
def _attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, table_ptr, cu_q_ptr, cu_k_ptr, q_token_stride, q_head_stride,
    k_token_stride, k_head_stride, v_token_stride, v_head_stride, n_heads, scale, window, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, SPARE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write out and lse of a block of queries in one head, by the online log-sum-exp (arXiv 2205.14135)."""
    head = tl.program_id(0) % n_heads
    first, q_start, n_queries, k_start, n_keys = _place(
        tl.program_id(0) // n_heads, table_ptr, cu_q_ptr, cu_k_ptr, BLOCK_Q
    )
    if first >= n_queries:
        return
    rows = first + tl.arange(0, BLOCK_Q)
    before = n_keys - n_queries  # the queries are the last tokens
    q = _load(q_ptr + head * q_head_stride, q_start, rows, n_queries, q_token_stride, HEAD_DIM, BLOCK_D)
    k_ptr += head // GROUP * k_head_stride
    v_ptr += head // GROUP * v_head_stride
    peak = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    out = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    last = tl.minimum(first + BLOCK_Q, n_queries) - 1
    low, high = _keys_of(before + first, before + last, n_keys, window, CAUSAL)
    for start in range(low, high, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        k = _load(k_ptr, k_start, keys, n_keys, k_token_stride, HEAD_DIM, BLOCK_D)
        v = _load(v_ptr, k_start, keys, n_keys, v_token_stride, HEAD_DIM, BLOCK_D)
        logits = _logits(q, k, before + rows, keys, n_keys, scale, window, CAUSAL)
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a query that has seen no key yet
        p = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(p, 1)
        out = _dot(p, v, out * shrink[:, None])
        peak = new_peak
    has_none = total == 0.0
    out = out / tl.where(has_none, 1.0, total)[:, None]
    lse = tl.where(has_none, float("inf"), peak + tl.log2(total))  # of inf, every p of the backward pass is 0
    places, mask = _places(q_start, rows, n_queries, n_heads * HEAD_DIM + SPARE, HEAD_DIM, BLOCK_D)
    tl.store(out_ptr + head * HEAD_DIM + places, out, mask=mask)
    tl.store(lse_ptr + (q_start + rows).to(tl.int64) * n_heads + head, lse, mask=rows < n_queries)


@triton.jit
def _attention_delta_kernel(
    d_out_ptr, out_ptr, delta_ptr, n_rows, n_heads, SPARE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write delta of rows of (Tq * H, head_dim)."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channels = tl.arange(0, BLOCK_D)[None, :]
    mask = (rows < n_rows)[:, None] & (channels < HEAD_DIM)
    stride = n_heads * HEAD_DIM + SPARE
    places = ((rows // n_heads).to(tl.int64) * stride + rows % n_heads * HEAD_DIM)[:, None] + channels
    d_out = tl.load(d_out_ptr + places, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(delta_ptr + rows, tl.sum(d_out * out, 1), mask=rows < n_rows)


@triton.jit
def _d_scores(q, k, v, d_out, lse, delta, positions, keys, n_keys, scale, window, CAUSAL: tl.constexpr):
    """p and dS of a block of queries and one of keys, both (queries, keys) fp32."""
    p = tl.exp2(_logits(q, k, positions, keys, n_keys, scale, window, CAUSAL) - lse[:, None])
    return p, p * (_dot(d_out, tl.trans(v), tl.zeros(p.shape, tl.float32)) - delta[:, None])


@triton.jit
def _attention_d_kv_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, table_ptr, cu_q_ptr, cu_k_ptr, q_token_stride,
    q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride, n_heads, scale, window,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, SPARE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of a block of keys in one key head, from all the query heads that share it."""
    n_kv_heads = n_heads // GROUP
    kv_head = tl.program_id(0) % n_kv_heads
    first, k_start, n_keys, q_start, n_queries = _place(
        tl.program_id(0) // n_kv_heads, table_ptr, cu_k_ptr, cu_q_ptr, BLOCK_K
    )
    if first >= n_keys:
        return
    keys = first + tl.arange(0, BLOCK_K)
    before = n_keys - n_queries
    k = _load(k_ptr + kv_head * k_head_stride, k_start, keys, n_keys, k_token_stride, HEAD_DIM, BLOCK_D)
    v = _load(v_ptr + kv_head * v_head_stride, k_start, keys, n_keys, v_token_stride, HEAD_DIM, BLOCK_D)
    stride = n_heads * HEAD_DIM + SPARE
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    low = tl.maximum((first if CAUSAL else first - window + 1) - before, 0)  # the queries that see these keys
    high = tl.minimum(first + BLOCK_K - 1 + window - before, n_queries)
    for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        for start in range(low, high, BLOCK_Q):
            rows = start + tl.arange(0, BLOCK_Q)
            q = _load(q_ptr + head * q_head_stride, q_start, rows, n_queries, q_token_stride, HEAD_DIM, BLOCK_D)
            d_out = _load(d_out_ptr + head * HEAD_DIM, q_start, rows, n_queries, stride, HEAD_DIM, BLOCK_D)
            at = (q_start + rows).to(tl.int64) * n_heads + head
            lse = tl.load(lse_ptr + at, mask=rows < n_queries, other=float("inf"))
            delta = tl.load(delta_ptr + at, mask=rows < n_queries, other=0.0)
            p, ds = _d_scores(q, k, v, d_out, lse, delta, before + rows, keys, n_keys, scale, window, CAUSAL)
            dv = _dot(tl.trans(p), d_out, dv)
            dk = _dot(tl.trans(ds), q, dk)
    places, mask = _places(k_start, keys, n_keys, n_kv_heads * HEAD_DIM, HEAD_DIM, BLOCK_D)
    tl.store(dk_ptr + kv_head * HEAD_DIM + places, dk * scale, mask=mask)
    tl.store(dv_ptr + kv_head * HEAD_DIM + places, dv, mask=mask)


@triton.jit
def _attention_d_q_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dq_ptr, table_ptr, cu_q_ptr, cu_k_ptr, q_token_stride,
    q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride, n_heads, scale, window,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, SPARE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write dq of a block of queries in one head."""
    head = tl.program_id(0) % n_heads
    first, q_start, n_queries, k_start, n_keys = _place(
        tl.program_id(0) // n_heads, table_ptr, cu_q_ptr, cu_k_ptr, BLOCK_Q
    )
    if first >= n_queries:
        return
    rows = first + tl.arange(0, BLOCK_Q)
    before = n_keys - n_queries
    q = _load(q_ptr + head * q_head_stride, q_start, rows, n_queries, q_token_stride, HEAD_DIM, BLOCK_D)
    stride = n_heads * HEAD_DIM + SPARE
    d_out = _load(d_out_ptr + head * HEAD_DIM, q_start, rows, n_queries, stride, HEAD_DIM, BLOCK_D)
    at = (q_start + rows).to(tl.int64) * n_heads + head
    lse = tl.load(lse_ptr + at, mask=rows < n_queries, other=float("inf"))
    delta = tl.load(delta_ptr + at, mask=rows < n_queries, other=0.0)
    k_ptr += head // GROUP * k_head_stride
    v_ptr += head // GROUP * v_head_stride
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    last = tl.minimum(first + BLOCK_Q, n_queries) - 1
    low, high = _keys_of(before + first, before + last, n_keys, window, CAUSAL)
    for start in range(low, high, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        k = _load(k_ptr, k_start, keys, n_keys, k_token_stride, HEAD_DIM, BLOCK_D)
        v = _load(v_ptr, k_start, keys, n_keys, v_token_stride, HEAD_DIM, BLOCK_D)
        _, ds = _d_scores(q, k, v, d_out, lse, delta, before + rows, keys, n_keys, scale, window, CAUSAL)
        dq = _dot(ds, k, dq)
    places, mask = _places(q_start, rows, n_queries, n_heads * HEAD_DIM, HEAD_DIM, BLOCK_D)
    tl.store(dq_ptr + head * HEAD_DIM + places, dq * scale, mask=mask)


def tile_of(kernel: str, head_dim: int, itemsize: int) -> dict[str, int]:
    """Choose blocks, warps and stages of "forward", "d_q" or "d_kv" for this width and bytes an element."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    if itemsize == 4:
        own, other, n_warps = 32 if block_d <= 128 else 16, 16, 8
    elif block_d <= 128:
        own, other = 64, 32 if kernel == "d_kv" else 64
        n_warps = 4 if block_d <= 64 or kernel == "forward" else 8
    else:
        own, other, n_warps = 32 if kernel == "d_kv" else 64, 32, 8
    block_q, block_k = (other, own) if kernel == "d_kv" else (own, other)
    tile = {"BLOCK_D": block_d, "BLOCK_Q": block_q, "BLOCK_K": block_k}
    return tile | {"num_warps": n_warps, "num_stages": 1 if itemsize == 4 else 2}


def block_table(cu_seqlens: Tensor, n_tokens: int, block: int) -> Tensor:
    """Number the sequence of every slot, see above.  cu_seqlens: (N+1,) int32, to n_tokens.  Returns (slots,) int32."""
    n = cu_seqlens.shape[0] - 1
    table = cu_seqlens.new_empty(n_tokens // block + n)
    _block_table_kernel[(n,)](cu_seqlens, table, BLOCK=block, CHUNK=CHUNK)
    return table


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, scale, window, causal, spare):  # noqa: ANN001, ANN205
        out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2] + spare)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        ctx.scale, ctx.window, ctx.causal = scale, window, causal
        ctx.save_for_backward(q, k, v, cu_q, cu_k, out, lse)
        if q.numel():
            tile = tile_of("forward", q.shape[2], q.element_size())
            table = block_table(cu_q, q.shape[0], tile["BLOCK_Q"])
            _attention_forward_kernel[(table.numel() * q.shape[1],)](
                q, k, v, out, lse, table, cu_q, cu_k, *_strides(q, k, v), q.shape[1], scale, window,
                GROUP=q.shape[1] // k.shape[1], CAUSAL=causal, SPARE=spare, HEAD_DIM=q.shape[2], **tile,
            )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):  # noqa: ANN001, ANN205
        q, k, v, cu_q, cu_k, out, lse = ctx.saved_tensors
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        if not q.numel():
            return dq, dk.zero_(), dv.zero_(), None, None, None, None, None, None
        (n_queries, n_heads, head_dim), d_out, delta = q.shape, d_out.contiguous(), torch.empty_like(lse)
        settings = (*_strides(q, k, v), n_heads, ctx.scale, ctx.window)
        shape = {"SPARE": out.shape[1] - n_heads * head_dim, "HEAD_DIM": head_dim}
        fixed = shape | {"GROUP": n_heads // k.shape[1], "CAUSAL": ctx.causal}
        for_q, for_kv = (tile_of(kernel, head_dim, q.element_size()) for kernel in ("d_q", "d_kv"))
        _attention_delta_kernel[(triton.cdiv(delta.numel(), DELTA_ROWS),)](
            d_out, out, delta, delta.numel(), n_heads, **shape, BLOCK_D=for_q["BLOCK_D"], BLOCK=DELTA_ROWS
        )
        table = block_table(cu_k, len(k), for_kv["BLOCK_K"])
        _attention_d_kv_kernel[(table.numel() * k.shape[1],)](
            d_out, q, k, v, lse, delta, dk, dv, table, cu_q, cu_k, *settings, **fixed, **for_kv
        )
        table = block_table(cu_q, n_queries, for_q["BLOCK_Q"])
        _attention_d_q_kernel[(table.numel() * n_heads,)](
            d_out, q, k, v, lse, delta, dq, table, cu_q, cu_k, *settings, **fixed, **for_q
        )
        return dq, dk, dv, None, None, None, None, None, None


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def varlen_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    causal: bool = True,
    cu_seqlens_k: Tensor | None = None,
    spare: int = 0,
) -> Tensor:
    """Attend within every packed sequence by the kernels, on Linux; nothing is checked here.

    Arguments and result as `varlen_attention`, fp32 or bf16; the result is contiguous, its spare columns not written.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    bounds = cu_seqlens.contiguous()
    bounds_k = bounds if cu_seqlens_k is None else cu_seqlens_k.contiguous()
    window = EVERYTHING if window is None else min(window, EVERYTHING)
    out = _Attention.apply(q, k, v, bounds, bounds_k, scale, window, causal, spare)
    return out if spare else out.view(q.shape)
