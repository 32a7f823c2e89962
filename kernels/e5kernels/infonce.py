"""InfoNCE over rectangular similarities: in-batch and hard negatives, masked (arXiv 2401.00368 eq. 1-2).

    s_ij   = q_i . p_j                         similarities; t = target[i]; tau is the temperature
    V_i    = {t} and the visible negatives     see Relations
    z_ij   = (s_ij - s_it) / tau               from the target, so that a row without negatives gives exactly 0
    loss_i = log sum_{j in V_i} exp z_ij       loss = mean_i loss_i;  lse_i = loss_i + s_it / tau
    g_ij   = (exp(z_ij - loss_i) - [j = t]) dloss_i / tau over V_i, else 0;   dQ = g P,   dP = g^T Q

queries (Q, D) and candidates (P, D): fp32 or bf16, for the reference also float64; unit rows are the caller's business.
Similarities are IEEE fp32, no TF32; sums run in max(fp32, input dtype). There are two ways without the whole matrix:

Tiles: a program owns its rows (forward, dQ) or its columns (dP) and sweeps the other side, adding to fp32 rows that
only it touches, without atomics. All kernels form a score by the same tile, in the same order of sums, so that ties and
the margin mask come out the same in each. FLOPs: forward 2 Q P D, backward 8 Q P D (the scores twice, dQ, dP). Bytes
asked of the caches, for elements of e bytes and 64 x 64 tiles: forward Q P D e / 32, backward Q P D (3 e / 32 + 1 / 4).

Rows: full rows of the matrix, a block of BLOCK_BYTES at a time, are visited once, and the gradients are made there. So
FLOPs are 6 Q P D, all in torch's products; each block reads and writes the fp32 sums of dP, 8 P D bytes.

What either saves over a dense matrix is memory, from some 16k rows on; below, that is nothing beside the model's step.
"""

import sys
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

if sys.platform == "linux":  # Triton is published for no other
    from e5kernels.infonce_triton import infonce_forward


BLOCK_BYTES = 2**26  # of similarities of the row-block way; its masks and temporaries add BLOCK_EXTRA times as much
BLOCK_EXTRA = 2
FEWEST_ROWS = 64  # of a block, see rows_suit


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

    def rows(self, rows: slice) -> "Relations":
        """Return the relations of some of the query rows, to all candidates."""
        return replace(
            self, target=self.target[rows], query_ids=self.query_ids[rows], banned=self.banned[rows],
            query_open=self.query_open[rows],
        )  # fmt: skip

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


def face(device: torch.device) -> str:
    """Name the face that `infonce` uses on a device: "triton" on CUDA under Linux, else "reference"."""
    return "triton" if device.type == "cuda" and sys.platform == "linux" else "reference"


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
        function = infonce_rows if rows_suit(len(candidates)) else infonce_triton
        return function(queries, candidates, relations, temperature=temperature, margin=margin)
    return infonce_reference(queries, candidates, relations, temperature=temperature, margin=margin)


def infonce_triton(
    queries: Tensor, candidates: Tensor, relations: Relations, *, temperature: float, margin: float | None = None
) -> InfoNCE:
    """Compute the loss by the Triton kernels, on Linux. See `infonce`; nothing is checked here."""
    margin = float("inf") if margin is None else margin
    row_loss, target_scores, beaten, negatives = infonce_forward(
        queries, candidates, relations.tensors(), temperature, margin
    )
    lse = row_loss.detach() + target_scores / temperature
    return InfoNCE(row_loss.mean(), lse, (beaten == 0).float().mean(), negatives)


def rows_suit(n_candidates: int) -> bool:
    """Say whether full rows in blocks are the way for so many candidates, and not tiles."""
    # By counting, not by a clock: tiles make 5 products at the FMA units' rate, rows 3 at a library's, in bf16 on the
    # matrix units. Against that a block of b rows moves 8 P D bytes of dP's sums for 6 b P D FLOPs. On an H100 (3.3
    # TB/s, 60 TFLOP/s of FMA) the two meet at some 40 rows in fp32 and 15 in bf16; 64 leave a margin.
    return _block_rows(n_candidates, 4, BLOCK_BYTES) >= FEWEST_ROWS


def _block_rows(n_candidates: int, itemsize: int, block_bytes: int) -> int:
    return max(1, block_bytes // (itemsize * n_candidates))


def infonce_rows(
    queries: Tensor,
    candidates: Tensor,
    relations: Relations,
    *,
    temperature: float,
    margin: float | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> InfoNCE:
    """Compute the loss by full rows, block_bytes of similarities at a time. See `infonce`; nothing is checked here.

    Where a gradient is asked for, it is made in the forward pass. bf16 rounds it at the similarities, too.
    """
    loss, *rest = _InfoNCERows.apply(
        queries, candidates, relations, temperature, margin, block_bytes, torch.is_grad_enabled()
    )
    return InfoNCE(loss, *rest)


class _InfoNCERows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, candidates, relations, temperature, margin, block_bytes, wants):  # noqa: ANN001, ANN205
        dtype = torch.promote_types(queries.dtype, torch.float32)
        wants = wants and any(ctx.needs_input_grad[:2])
        d_queries = torch.empty_like(queries) if wants else None
        d_candidates = torch.zeros_like(candidates, dtype=dtype) if wants else None
        blocks = []
        n_rows = _block_rows(len(candidates), dtype.itemsize, block_bytes)
        for first in range(0, len(queries), n_rows):
            rows = slice(first, first + n_rows)
            g, target_scores, *result = _visit_rows(
                queries[rows], candidates, relations.rows(rows), temperature, margin
            )
            blocks.append((result[0], result[0] + target_scores / temperature, *result[1:]))
            if wants:
                g = g.mul_(1 / (temperature * len(queries))).to(queries.dtype)
                d_queries[rows] = _product(g, candidates)
                _add_product(d_candidates, g.T, queries[rows])
            del g  # or two blocks would lie in memory
        row_loss, lse, beaten, negatives = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        if wants:
            ctx.save_for_backward(d_queries, d_candidates.to(candidates.dtype))
        ctx.mark_non_differentiable(lse, accuracy := (~beaten).float().mean(), negatives)
        return row_loss.mean(), lse, accuracy, negatives

    @staticmethod
    def backward(ctx, d_loss, *_):  # noqa: ANN001, ANN205
        return *(d_loss.to(d.dtype) * d for d in ctx.saved_tensors), None, None, None, None, None


def _visit_rows(
    queries: Tensor, candidates: Tensor, relations: Relations, temperature: float, margin: float | None
) -> tuple[Tensor, ...]:
    """Visit a block of full rows: g (R, P) for dloss_i = tau, and by row target score, loss, is beaten, negatives."""
    target = relations.target[:, None]
    scores = _product(queries, candidates.T)  # (R, P); from here on each step is in place
    target_scores = scores.gather(1, target)
    negative = _negatives(scores, target_scores, relations, margin)
    beaten = (negative & (scores > target_scores)).any(1)
    counts = negative.sum(1, dtype=torch.int32)
    z = scores.sub_(target_scores).div_(temperature).masked_fill_(negative.logical_not_(), float("-inf"))
    peak = z.amax(1, keepdim=True).clamp_(min=0)  # the target's z is 0
    weights = z.sub_(peak).exp_()
    total = weights.sum(1, keepdim=True) + (target_scores - target_scores)  # NaN for a target that is not finite
    row_loss = peak + torch.log1p(total + torch.expm1(-peak))  # keeps a total of 1e-9 beside the target's 1
    g = weights.mul_(torch.exp(peak - row_loss)).scatter_(1, target, torch.expm1(-row_loss))
    return g, target_scores[:, 0], row_loss[:, 0], beaten, counts


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply, with sums and result in max(fp32, a's dtype)."""
    if a.dtype == torch.bfloat16 and a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    dtype = torch.promote_types(a.dtype, torch.float32)
    return a.to(dtype) @ b.to(dtype)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a product to `out`, which is of max(fp32, a's dtype)."""
    if a.dtype == torch.bfloat16 and a.device.type == "cuda":
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


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
