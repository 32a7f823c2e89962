"""The contrastive loss of a step: every query against every candidate that it may see (arXiv 2401.00368, eq. 2).

A rank holds its own queries against the candidates of all ranks, 1/W of the work, and no other rank's queries.

With `matryoshka` the loss is the weighted mean of that of several prefixes of the embeddings, each cut off and made
unit length again (arXiv 2205.13147), so that a shorter embedding is the first numbers of the whole one. The margin
looks at each prefix's own similarities.

With `distillation` a query's own candidates, its positive and hard negatives, are also to be as likely as a teacher's
scores say: KL(softmax(scores / teacher_temperature) || softmax(similarities / temperature)), mean over the queries, is
added by that weight (arXiv 1503.02531; over candidates as in 2010.11386), for each prefix its own.
"""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from e5core.batches import GlobalBatch
from e5core.distributed import ALONE, World, gather_rows, sum_over_ranks
from e5core.encoder import unit_prefix
from e5kernels.infonce import InfoNCE, Relations, infonce


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The [loss] table."""

    temperature: Annotated[float, Field(gt=0)] = 0.02  # paper, appendix A
    margin: Annotated[float, Field(ge=0)] | None = None  # hides negatives this much above the positive
    matryoshka: tuple[Annotated[int, Field(ge=1)], ...] = ()  # dimensions trained, as listed; (): all at once
    matryoshka_weights: tuple[Annotated[float, Field(gt=0)], ...] = ()  # one for each of them; (): all alike
    distillation: Annotated[float, Field(gt=0)] | None = None  # weight of the divergence from a teacher's scores
    teacher_temperature: Annotated[float, Field(gt=0)] = 1.0  # divides the scores: 1 for logits, less for cosines

    def __post_init__(self) -> None:
        if len(set(self.matryoshka)) < len(self.matryoshka):
            raise ValueError(f"matryoshka must name each number of dimensions once: got {list(self.matryoshka)}")
        if self.matryoshka_weights and len(self.matryoshka_weights) != len(self.matryoshka):
            raise ValueError(
                f"matryoshka_weights must be one for each of matryoshka: got {len(self.matryoshka_weights)} for "
                f"{len(self.matryoshka)}"
            )
        if self.distillation is None and self.teacher_temperature != 1.0:
            raise ValueError("teacher_temperature is for distillation, which has no weight; give both or none")

    def prefixes(self, dim: int) -> list[tuple[int, float]]:
        """Return (dimensions, share of the loss) of every prefix, the longest first; the shares add up to 1.

        dim: of the whole embeddings.  Raises ValueError for a prefix that is longer.
        """
        if not self.matryoshka:
            return [(dim, 1.0)]
        if max(self.matryoshka) > dim:
            raise ValueError(
                f"loss.matryoshka names {max(self.matryoshka)} dimensions, and the model's embeddings have {dim}; "
                "leave out what is more"
            )
        weights = self.matryoshka_weights or (1.0,) * len(self.matryoshka)
        pairs = zip(self.matryoshka, weights, strict=True)
        return sorted(((n, weight / sum(weights)) for n, weight in pairs), reverse=True)


class BatchLoss(NamedTuple):
    """What `infonce_loss` returns: scalars of the whole batch, the same on all ranks; only loss carries a gradient."""

    loss: Tensor  # mean over all queries
    accuracy: Tensor  # share of queries whose positive has the highest visible score, by the longest prefix
    negatives: Tensor  # effective negatives per query, mean, by the longest prefix


def infonce_loss(embeddings: Tensor, batch: GlobalBatch, config: LossConfig, world: World = ALONE) -> BatchLoss:
    """Compute the loss of a whole batch.

    embeddings: (n, D) of this rank's rows, in their order, fp32 or fp64, unit length. Its gradient is that of the
    whole loss: what all ranks' queries ask of this rank's candidates is in it.
    Raises ValueError where config.matryoshka names more than D dimensions, or a score is missing for distillation.
    """
    n_own = len(batch.relations.query_ids)
    candidates = gather_rows(embeddings[n_own:], batch.candidates, world)  # (P, D)
    relations = batch.relations.to(embeddings.device)
    prefixes = config.prefixes(embeddings.shape[1])
    teacher = _teacher(batch, config, world).to(embeddings) if config.distillation else None
    outs = [_of_prefix(embeddings, candidates, relations, teacher, config, n) for n, _ in prefixes]
    loss = sum(share * out.loss for (_, share), out in zip(prefixes, outs, strict=True))
    means = torch.stack([loss, outs[0].accuracy.to(loss.dtype), outs[0].negatives.to(loss.dtype).mean()])
    return BatchLoss(*sum_over_ranks(means * (n_own / batch.n_queries), world))


def _of_prefix(
    embeddings: Tensor, candidates: Tensor, relations: Relations, teacher: Tensor | None, config: LossConfig, n: int
) -> InfoNCE:
    """Compute the loss by the embeddings' first n numbers."""

    def compute(embeddings: Tensor, candidates: Tensor) -> InfoNCE:
        own, n_own = unit_prefix(embeddings, n), len(relations.query_ids)
        rows = own[:n_own], unit_prefix(candidates, n)
        out = infonce(*rows, relations, temperature=config.temperature, margin=config.margin)
        if teacher is None:
            return out
        divergence = _divergence(own[:n_own], own[n_own:], teacher, config.temperature)
        return out._replace(loss=out.loss + config.distillation * divergence)

    if len(config.matryoshka) < 2:
        return compute(embeddings, candidates)
    # the backward pass computes it again, so that only one prefix has its similarities in memory
    return checkpoint(compute, embeddings, candidates, use_reentrant=False, preserve_rng_state=False)


def _teacher(batch: GlobalBatch, config: LossConfig, world: World) -> Tensor:
    """Lay the scores of this rank's candidates out by query.  Returns log-likelihoods (Q, C), -inf where none is."""
    owners = batch.relations.owner[batch.candidates[world.rank]]
    bare = {batch.record_ids[i] for i, score in zip(owners.tolist(), batch.scores, strict=True) if score is None}
    if bare:
        named = ", ".join(sorted(bare)[:5])
        raise ValueError(f"loss.distillation needs a teacher's score of every candidate: records {named} lack some")
    counts = torch.searchsorted(batch.relations.query_ids, owners).bincount()  # (Q,)
    there = torch.arange(int(counts.max())) < counts[:, None]  # (Q, C)
    scores = torch.full(there.shape, -torch.inf, dtype=torch.float64)
    scores[there] = torch.tensor(batch.scores, dtype=torch.float64)
    likely = (scores / config.teacher_temperature).log_softmax(1)
    return torch.where(there, likely.clamp(min=-1e30), -torch.inf)  # finite in fp32 too: -inf is for what is not there


def _divergence(queries: Tensor, candidates: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Compute KL(teacher || student), mean over the queries.

    queries: (Q, n).  candidates: (p, n), the queries' own, one query's after another's.  teacher: (Q, C).
    """
    there = teacher.isfinite()
    query_of = there.nonzero()[:, 0]  # (p,)
    similarities = (queries[query_of] * candidates).sum(1) / temperature
    student = torch.full_like(teacher, -torch.inf).masked_scatter(there, similarities).log_softmax(1)
    differences = teacher.masked_fill(~there, 0.0) - student.masked_fill(~there, 0.0)
    return (teacher.exp() * differences).sum(1).mean()
