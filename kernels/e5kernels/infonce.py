"""InfoNCE over rectangular similarities: in-batch and hard negatives, masked (arXiv 2401.00368 eq. 1-2).

    s_ij   = q_i . p_j                         similarities; t = target[i]; tau is the temperature
    V_i    = {t} and the visible negatives     see Relations
    z_ij   = (s_ij - s_it) / tau               from the target, so that a row without negatives gives exactly 0
    loss_i = log sum_{j in V_i} exp z_ij       loss = mean_i loss_i;  lse_i = loss_i + s_it / tau
    g_ij   = (exp(z_ij - loss_i) - [j = t]) dloss_i / tau over V_i, else 0;   dQ = g P,   dP = g^T Q

queries (Q, D) and candidates (P, D): fp32 or bf16, for the reference also float64; unit rows are the caller's business.
Similarities are IEEE fp32, no TF32; sums run in max(fp32, input dtype). No Q x P matrix lies in memory and there are no
atomics: a program owns its rows (forward, dQ) or its columns (dP) and sweeps the other side, adding to fp32 rows that
only it touches. All kernels form a score by the same tile, in the same order of sums, so that ties and the margin mask
come out the same in each.

FLOPs: forward 2 Q P D, backward 8 Q P D (the scores twice, dQ, dP). Bytes asked of the caches, for elements of e bytes
and 64 x 64 tiles: forward Q P D e / 32, backward Q P D (3 e / 32 + 1 / 4). What this saves over a dense matrix is
memory, from some 16k rows on; below, either is nothing beside the model's own step.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = {"BLOCK": 64, "BLOCK_D": 32, "num_warps": 16}  # fp32 sums in registers, all but 24 bytes a thread on sm_90
BANNED = 3  # place of banned among the relations' tensors


class InfoNCE(NamedTuple):
    """What `infonce` returns; only loss carries a gradient."""

    loss: Tensor  # scalar: mean over rows of lse - s[target] / temperature
    lse: Tensor  # (Q,) log-sum-exp of a row's visible scores / temperature
    accuracy: Tensor  # scalar fp32: share of rows whose target has the highest visible score; a tie counts as right
    negatives: Tensor  # (Q,) int32 visible candidates other than the target: the effective negatives


@dataclass(frozen=True, slots=True)
class Relations:
    """What each candidate is to each query row; all tensors on one device.

    Candidate j counts for row i as its target, or where all of these hold: the row's own query brought it or both sides
    are open; its text is not banned for the row; with a margin, s_ij <= s_it + margin.
    """

    target: Tensor  # (Q,) int64 index of the row's positive among the candidates
    query_ids: Tensor  # (Q,) int64 number of the query in the global batch; the rows may be one rank's part of it
    owner: Tensor  # (P,) int64 number of the query that brought the candidate
    banned: Tensor  # (Q, M) int64 hashes of texts that are no negatives for the row, padded by repeating the first
    candidate_hashes: Tensor  # (P,) int64 hashes of the candidates' texts
    query_open: Tensor  # (Q,) bool: the row uses in-batch negatives
    candidate_open: Tensor  # (P,) bool: the candidate is offered to other rows

    def to(self, device: torch.device) -> "Relations":
        """Return the same relations on a device."""
        return Relations(*(tensor.to(device) for tensor in self.tensors()))

    def tensors(self) -> list[Tensor]:
        """Return the tensors in the order in which the ops take them."""
        return [
            self.target, self.query_ids, self.owner, self.banned, self.candidate_hashes, self.query_open,
            self.candidate_open,
        ]  # fmt: skip


def infonce_reference(
    queries: Tensor, candidates: Tensor, relations: Relations, *, temperature: float, margin: float | None = None
) -> InfoNCE:
    """Compute `infonce` by the dense matrix: the definition, differentiated by autograd, in float64 too."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    scores = queries.to(dtype) @ candidates.to(dtype).T  # (Q, P)
    target_scores = scores.gather(1, relations.target[:, None])  # (Q, 1)
    negative = _negatives(scores.detach(), target_scores.detach(), relations, margin)  # (Q, P)
    visible = negative.scatter(1, relations.target[:, None], True)
    logits = ((scores - target_scores) / temperature).masked_fill(~visible, float("-inf"))
    row_loss = logits.logsumexp(1)  # (Q,)
    lse = row_loss.detach() + target_scores.detach()[:, 0] / temperature
    right = ~(negative & (scores > target_scores)).any(1)
    return InfoNCE(row_loss.mean(), lse, right.float().mean(), negative.sum(1, dtype=torch.int32))


def _negatives(scores: Tensor, target_scores: Tensor, relations: Relations, margin: float | None) -> Tensor:
    """(Q, P) bool: the visible candidates other than the target."""
    own = relations.owner[None, :] == relations.query_ids[:, None]
    negative = own | (relations.query_open[:, None] & relations.candidate_open[None, :])
    for banned in relations.banned.unbind(1):  # a column at a time: M is small, and (Q, P, M) would not fit
        negative &= relations.candidate_hashes[None, :] != banned[:, None]
    if margin is not None:
        negative &= ~(scores > target_scores + margin)  # so written, a score of NaN stays and reaches the loss
    return negative.scatter_(1, relations.target[:, None], False)


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


def face(device: torch.device) -> str:
    """Name the face that `infonce` uses on a device: "triton" on CUDA, else "reference"."""
    return "triton" if device.type == "cuda" else "reference"


def infonce(
    queries: Tensor, candidates: Tensor, relations: Relations, *, temperature: float, margin: float | None = None
) -> InfoNCE:
    """Compute the InfoNCE loss of query rows against all candidates.

    queries: (Q, D) fp32, bf16 or, on the CPU, float64.  candidates: (P, D), the same dtype.  temperature: divides the
    similarities.  margin: hides negatives that score more than this above the target; None hides none.
    Returns InfoNCE, its loss differentiable in queries and candidates; fp32, or float64 for float64.
    Raises ValueError on wrong shapes, dtypes, devices or values. A target out of range is refused on the CPU; on CUDA,
    where reading it would stall the stream, it makes the loss NaN.
    """
    _check(queries, candidates, relations, temperature, margin)
    if face(queries.device) == "triton":
        return infonce_triton(queries, candidates, relations, temperature=temperature, margin=margin)
    return infonce_reference(queries, candidates, relations, temperature=temperature, margin=margin)


def infonce_triton(
    queries: Tensor, candidates: Tensor, relations: Relations, *, temperature: float, margin: float | None = None
) -> InfoNCE:
    """Compute the loss by the Triton kernels. See `infonce`; nothing is checked here."""
    margin = float("inf") if margin is None else margin
    row_loss, target_scores, beaten, negatives = infonce_forward(
        queries, candidates, relations.tensors(), temperature, margin
    )
    lse = row_loss.detach() + target_scores / temperature
    return InfoNCE(row_loss.mean(), lse, (beaten == 0).float().mean(), negatives)


def _check(queries: Tensor, candidates: Tensor, relations: Relations, temperature: float, margin: float | None) -> None:
    if queries.ndim != 2 or candidates.ndim != 2 or queries.shape[1] != candidates.shape[1] or queries.shape[1] == 0:
        got = (*queries.shape,), (*candidates.shape,)
        raise ValueError(f"queries and candidates must be (Q, D) and (P, D) with D >= 1: got {got}")
    if len(queries) == 0 or len(candidates) == 0:
        raise ValueError(f"infonce needs a query and a candidate: got Q = {len(queries)}, P = {len(candidates)}")
    allowed = (torch.float32, torch.bfloat16) + ((torch.float64,) if queries.device.type == "cpu" else ())
    if queries.dtype != candidates.dtype or queries.dtype not in allowed:
        got = f"{queries.dtype} and {candidates.dtype} on {queries.device}"
        raise ValueError(f"queries and candidates must share one of {', '.join(map(str, allowed))}: got {got}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0: got {temperature}")
    if margin is not None and not margin >= 0:
        raise ValueError(f"margin must be 0 or above, or None for no mask: got {margin}")
    _check_relations(queries, candidates, relations)


def _check_relations(queries: Tensor, candidates: Tensor, relations: Relations) -> None:
    r, n_queries, n_candidates = relations, len(queries), len(candidates)
    n_banned = r.banned.shape[1] if r.banned.ndim == 2 else 0
    for name, tensor, shape, dtype in (
        ("target", r.target, (n_queries,), torch.int64),
        ("query_ids", r.query_ids, (n_queries,), torch.int64),
        ("owner", r.owner, (n_candidates,), torch.int64),
        ("banned", r.banned, (n_queries, n_banned), torch.int64),
        ("candidate_hashes", r.candidate_hashes, (n_candidates,), torch.int64),
        ("query_open", r.query_open, (n_queries,), torch.bool),
        ("candidate_open", r.candidate_open, (n_candidates,), torch.bool),
    ):
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"relations.{name} must be {shape} {dtype}: got {tuple(tensor.shape)} {tensor.dtype}")
        if tensor.device != queries.device:
            raise ValueError(f"relations.{name} must be on the queries' device {queries.device}: got {tensor.device}")
    if candidates.device != queries.device:
        raise ValueError(f"candidates must be on the queries' device {queries.device}: got {candidates.device}")
    if queries.device.type == "cpu":
        low, high = r.target.aminmax()
        if low < 0 or high >= n_candidates:
            raise ValueError(f"relations.target must be in 0..{n_candidates - 1}: got {low.item()}..{high.item()}")
