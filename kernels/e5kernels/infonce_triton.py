"""Triton face of `infonce`: its kernels, and the ops that launch them and tell autograd of each other.

What is computed, in which precision and at what cost in bytes stands in infonce.py. The ops take plain tensors, the
relations as `Relations.tensors` lists them, and check nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# fp32 sums in registers; spilled, bytes a thread on sm_90: forward 0 in fp32 and 8 in bf16, d_queries 12 and 332,
# d_candidates 0 and 276 (sm_80: 0 and 8, 8 and 324, 8 and 252)
TILE = {"BLOCK": 64, "BLOCK_D": 32, "num_warps": 16}
BANNED = 3  # place of banned among the relations' tensors


@triton.jit
def _score_tile(
    queries_ptr, candidates_ptr, rows, columns, n_queries, n_candidates, dim, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(BLOCK, BLOCK) fp32 similarities of int64 rows and columns; 0 outside."""
    scores = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        row_mask = (rows < n_queries)[:, None] & (d < dim)[None, :]
        column_mask = ((columns >= 0) & (columns < n_candidates))[None, :] & (d < dim)[:, None]
        query = tl.load(queries_ptr + rows[:, None] * dim + d[None, :], mask=row_mask, other=0.0)
        candidate = tl.load(candidates_ptr + columns[None, :] * dim + d[:, None], mask=column_mask, other=0.0)
        scores = tl.dot(query.to(tl.float32), candidate.to(tl.float32), scores, input_precision="ieee")
    return scores


@triton.jit
def _target_scores(
    queries_ptr, candidates_ptr, rows, target, n_queries, n_candidates, dim, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(BLOCK,) fp32 scores of the rows' targets, NaN for a target out of range."""
    # the diagonal of a tile like any other, so that equal vectors tie to the last bit
    scores = _score_tile(queries_ptr, candidates_ptr, rows, target, n_queries, n_candidates, dim, BLOCK, BLOCK_D)
    index = tl.arange(0, BLOCK)
    diagonal = tl.sum(tl.where(index[:, None] == index[None, :], scores, 0.0), 1)
    return tl.where((target >= 0) & (target < n_candidates), diagonal, float("nan"))


@triton.jit
def _logits_tile(
    queries_ptr, candidates_ptr, rows, columns, target, target_scores, query_ids_ptr, owner_ptr, banned_ptr,
    hashes_ptr, query_open_ptr, candidate_open_ptr, n_queries, n_candidates, dim, n_banned, temperature, margin,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(BLOCK, BLOCK) fp32 z of the visible negatives; -inf at all else, the targets too."""
    scores = _score_tile(queries_ptr, candidates_ptr, rows, columns, n_queries, n_candidates, dim, BLOCK, BLOCK_D)
    row_mask = rows < n_queries
    column_mask = columns < n_candidates
    query_ids = tl.load(query_ids_ptr + rows, mask=row_mask, other=0)
    owner = tl.load(owner_ptr + columns, mask=column_mask, other=0)
    query_open = tl.load(query_open_ptr + rows, mask=row_mask, other=0) != 0
    candidate_open = tl.load(candidate_open_ptr + columns, mask=column_mask, other=0) != 0
    negative = (owner[None, :] == query_ids[:, None]) | (query_open[:, None] & candidate_open[None, :])
    negative &= row_mask[:, None] & column_mask[None, :] & (columns[None, :] != target[:, None])
    hashes = tl.load(hashes_ptr + columns, mask=column_mask, other=0)
    for i in range(n_banned):
        banned = tl.load(banned_ptr + rows * n_banned + i, mask=row_mask, other=0)
        negative &= hashes[None, :] != banned[:, None]
    negative &= ~(scores > target_scores[:, None] + margin)  # so written, a score of NaN stays and reaches the loss
    return tl.where(negative, (scores - target_scores[:, None]) / temperature, float("-inf"))


@triton.jit
def _infonce_forward_kernel(
    queries_ptr, candidates_ptr, target_ptr, query_ids_ptr, owner_ptr, banned_ptr, hashes_ptr, query_open_ptr,
    candidate_open_ptr, target_scores_ptr, peak_ptr, total_ptr, beaten_ptr, negatives_ptr,
    n_queries, n_candidates, dim, n_banned, temperature, margin, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Online log-sum-exp of z over the negatives: peak >= 0 (the target's z is 0) and total = sum of exp(z - peak)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row_mask = rows < n_queries
    target = tl.load(target_ptr + rows, mask=row_mask, other=-1)
    target_scores = _target_scores(
        queries_ptr, candidates_ptr, rows, target, n_queries, n_candidates, dim, BLOCK, BLOCK_D
    )
    peak = tl.zeros((BLOCK,), tl.float32)
    total = target_scores - target_scores  # 0, or NaN for a target that is not finite
    beaten = tl.zeros((BLOCK,), tl.int32)
    negatives = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, n_candidates, BLOCK):
        columns = (first + tl.arange(0, BLOCK)).to(tl.int64)
        logits = _logits_tile(
            queries_ptr, candidates_ptr, rows, columns, target, target_scores, query_ids_ptr, owner_ptr, banned_ptr,
            hashes_ptr, query_open_ptr, candidate_open_ptr, n_queries, n_candidates, dim, n_banned, temperature, margin,
            BLOCK, BLOCK_D,
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        total = total * tl.exp(peak - new_peak) + tl.sum(tl.exp(logits - new_peak[:, None]), 1)
        peak = new_peak
        negatives += tl.sum((logits != float("-inf")).to(tl.int32), 1)
        beaten += tl.sum((logits > 0).to(tl.int32), 1)
    tl.store(target_scores_ptr + rows, target_scores, mask=row_mask)
    tl.store(peak_ptr + rows, peak, mask=row_mask)
    tl.store(total_ptr + rows, total, mask=row_mask)
    tl.store(beaten_ptr + rows, beaten, mask=row_mask)
    tl.store(negatives_ptr + rows, negatives, mask=row_mask)


@triton.jit
def _gradient_tile(
    queries_ptr, candidates_ptr, rows, columns, target_ptr, query_ids_ptr, owner_ptr, banned_ptr, hashes_ptr,
    query_open_ptr, candidate_open_ptr, target_scores_ptr, row_loss_ptr, scale_ptr, pull_ptr,
    n_queries, n_candidates, dim, n_banned, temperature, margin, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(BLOCK, BLOCK) fp32 gradient at the similarities; 0 outside."""
    row_mask = rows < n_queries
    target = tl.load(target_ptr + rows, mask=row_mask, other=-1)
    target_scores = tl.load(target_scores_ptr + rows, mask=row_mask, other=0.0)
    row_loss = tl.load(row_loss_ptr + rows, mask=row_mask, other=0.0)
    scale = tl.load(scale_ptr + rows, mask=row_mask, other=0.0)
    pull = tl.load(pull_ptr + rows, mask=row_mask, other=0.0)
    logits = _logits_tile(
        queries_ptr, candidates_ptr, rows, columns, target, target_scores, query_ids_ptr, owner_ptr, banned_ptr,
        hashes_ptr, query_open_ptr, candidate_open_ptr, n_queries, n_candidates, dim, n_banned, temperature, margin,
        BLOCK, BLOCK_D,
    )  # fmt: skip
    gradient = tl.exp(logits - row_loss[:, None]) * scale[:, None]
    return tl.where(columns[None, :] == target[:, None], pull[:, None], gradient)


@triton.jit
def _infonce_d_queries_kernel(
    queries_ptr, candidates_ptr, target_ptr, query_ids_ptr, owner_ptr, banned_ptr, hashes_ptr, query_open_ptr,
    candidate_open_ptr, target_scores_ptr, row_loss_ptr, scale_ptr, pull_ptr, d_queries_ptr,
    n_queries, n_candidates, dim, n_banned, temperature, margin, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add g P to the fp32 rows of d_queries, which start at 0 and belong to this program alone."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for first in range(0, n_candidates, BLOCK):
        columns = (first + tl.arange(0, BLOCK)).to(tl.int64)
        gradient = _gradient_tile(
            queries_ptr, candidates_ptr, rows, columns, target_ptr, query_ids_ptr, owner_ptr, banned_ptr, hashes_ptr,
            query_open_ptr, candidate_open_ptr, target_scores_ptr, row_loss_ptr, scale_ptr, pull_ptr,
            n_queries, n_candidates, dim, n_banned, temperature, margin, BLOCK, BLOCK_D,
        )  # fmt: skip
        for start in range(0, dim, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            column_mask = (columns < n_candidates)[:, None] & (d < dim)[None, :]
            candidate = tl.load(candidates_ptr + columns[:, None] * dim + d[None, :], mask=column_mask, other=0.0)
            place = d_queries_ptr + rows[:, None] * dim + d[None, :]
            row_mask = (rows < n_queries)[:, None] & (d < dim)[None, :]
            so_far = tl.load(place, mask=row_mask, other=0.0)
            tl.store(place, tl.dot(gradient, candidate.to(tl.float32), so_far, input_precision="ieee"), mask=row_mask)
        tl.debug_barrier()  # the next sweep reads these rows back, perhaps in another thread of the program


@triton.jit
def _infonce_d_candidates_kernel(
    queries_ptr, candidates_ptr, target_ptr, query_ids_ptr, owner_ptr, banned_ptr, hashes_ptr, query_open_ptr,
    candidate_open_ptr, target_scores_ptr, row_loss_ptr, scale_ptr, pull_ptr, d_candidates_ptr,
    n_queries, n_candidates, dim, n_banned, temperature, margin, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add g^T Q to the fp32 rows of d_candidates, which start at 0 and belong to this program alone."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for first in range(0, n_queries, BLOCK):
        rows = (first + tl.arange(0, BLOCK)).to(tl.int64)
        gradient = _gradient_tile(
            queries_ptr, candidates_ptr, rows, columns, target_ptr, query_ids_ptr, owner_ptr, banned_ptr, hashes_ptr,
            query_open_ptr, candidate_open_ptr, target_scores_ptr, row_loss_ptr, scale_ptr, pull_ptr,
            n_queries, n_candidates, dim, n_banned, temperature, margin, BLOCK, BLOCK_D,
        )  # fmt: skip
        for start in range(0, dim, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            row_mask = (rows < n_queries)[:, None] & (d < dim)[None, :]
            query = tl.load(queries_ptr + rows[:, None] * dim + d[None, :], mask=row_mask, other=0.0)
            place = d_candidates_ptr + columns[:, None] * dim + d[None, :]
            column_mask = (columns < n_candidates)[:, None] & (d < dim)[None, :]
            so_far = tl.load(place, mask=column_mask, other=0.0)
            update = tl.dot(tl.trans(gradient), query.to(tl.float32), so_far, input_precision="ieee")
            tl.store(place, update, mask=column_mask)
        tl.debug_barrier()  # the next sweep reads these rows back, perhaps in another thread of the program


@torch.library.custom_op("e5kernels::infonce_forward", mutates_args=())
def infonce_forward(
    queries: Tensor, candidates: Tensor, relations: list[Tensor], temperature: float, margin: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the forward kernel; relations are the tensors of `Relations` in their order, a margin of inf is none.

    Returns, of every row, its loss and its target's score, (Q,) fp32, and how many of its negatives score above the
    target and how many it has, (Q,) int32.
    """
    n_queries, dim = queries.shape
    peak, target_scores, beaten, negatives = _forward_outputs(queries)
    total = torch.empty_like(peak)
    _infonce_forward_kernel[(triton.cdiv(n_queries, TILE["BLOCK"]),)](
        queries.contiguous(), candidates.contiguous(), *(x.contiguous() for x in relations),
        target_scores, peak, total, beaten, negatives,
        n_queries, len(candidates), dim, relations[BANNED].shape[1], temperature, margin, **TILE,
    )  # fmt: skip
    # log(exp(-peak) + total), without losing a total of 1e-9 beside the target's 1
    row_loss = peak + torch.log1p(total + torch.expm1(-peak))
    return row_loss, target_scores, beaten, negatives


def _forward_outputs(queries: Tensor, *_: list[Tensor] | Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four uninitialised (Q,) tensors: two fp32, two int32."""
    return tuple(queries.new_empty(queries.shape[0], dtype=x) for x in (torch.float32,) * 2 + (torch.int32,) * 2)


infonce_forward.register_fake(_forward_outputs)


@torch.library.custom_op("e5kernels::infonce_backward", mutates_args=())
def infonce_backward(
    queries: Tensor,
    candidates: Tensor,
    relations: list[Tensor],
    target_scores: Tensor,
    row_loss: Tensor,
    d_row_loss: Tensor,
    temperature: float,
    margin: float,
) -> tuple[Tensor, Tensor]:
    """Run both backward kernels.  Returns the gradients of queries (Q, D) and candidates (P, D) in their dtype."""
    (n_queries, dim), n_candidates = queries.shape, len(candidates)
    scale = d_row_loss / temperature
    pull = torch.expm1(-row_loss) * scale  # softmax - 1 at the target
    d_queries, d_candidates = (queries.new_zeros(x.shape, dtype=torch.float32) for x in (queries, candidates))
    tensors = [x.contiguous() for x in (queries, candidates, *relations, target_scores, row_loss, scale, pull)]
    values = (n_queries, n_candidates, dim, relations[BANNED].shape[1], temperature, margin)
    _infonce_d_queries_kernel[(triton.cdiv(n_queries, TILE["BLOCK"]),)](*tensors, d_queries, *values, **TILE)
    _infonce_d_candidates_kernel[(triton.cdiv(n_candidates, TILE["BLOCK"]),)](*tensors, d_candidates, *values, **TILE)
    return d_queries.to(queries.dtype), d_candidates.to(candidates.dtype)


@infonce_backward.register_fake
def _(queries: Tensor, candidates: Tensor, *_: list[Tensor] | Tensor | float) -> tuple[Tensor, Tensor]:
    return queries.new_empty(queries.shape), candidates.new_empty(candidates.shape)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    queries, candidates, relations, temperature, margin = inputs
    row_loss, target_scores, beaten, negatives = output
    ctx.save_for_backward(queries, candidates, target_scores, row_loss, *relations)
    ctx.temperature, ctx.margin = temperature, margin
    ctx.mark_non_differentiable(target_scores, beaten, negatives)


def _backward(ctx: torch.autograd.function.FunctionCtx, d_row_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    queries, candidates, target_scores, row_loss, *relations = ctx.saved_tensors
    d_queries, d_candidates = infonce_backward(
        queries, candidates, relations, target_scores, row_loss, d_row_loss, ctx.temperature, ctx.margin
    )
    return d_queries, d_candidates, [None] * len(relations), None, None


infonce_forward.register_autograd(_backward, setup_context=_setup_context)
