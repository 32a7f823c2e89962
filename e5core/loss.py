"""The contrastive loss of a step: every query against every candidate that it may see (arXiv 2401.00368, eq. 2).

A rank holds its own queries against the candidates of all ranks, 1/W of the work, and no other rank's queries.
"""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from e5core.batches import GlobalBatch
from e5core.distributed import ALONE, World, gather_rows, sum_over_ranks
from e5kernels.infonce import infonce


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The [loss] table."""

    temperature: Annotated[float, Field(gt=0)] = 0.02  # paper, appendix A
    margin: Annotated[float, Field(ge=0)] | None = None  # hides negatives this much above the positive


class BatchLoss(NamedTuple):
    """What `infonce_loss` returns: scalars of the whole batch, the same on all ranks; only loss carries a gradient."""

    loss: Tensor  # mean over all queries
    accuracy: Tensor  # share of queries whose positive has the highest visible score
    negatives: Tensor  # effective negatives per query, mean


def infonce_loss(embeddings: Tensor, batch: GlobalBatch, config: LossConfig, world: World = ALONE) -> BatchLoss:
    """Compute the loss of a whole batch.

    embeddings: (n, D) of this rank's rows, in their order, fp32 or fp64, unit length. Its gradient is that of the
    whole loss: what all ranks' queries ask of this rank's candidates is in it.
    """
    n_own = len(batch.relations.query_ids)
    candidates = gather_rows(embeddings[n_own:], batch.candidates, world)  # (P, D)
    relations = batch.relations.to(embeddings.device)
    own = infonce(embeddings[:n_own], candidates, relations, temperature=config.temperature, margin=config.margin)
    means = torch.stack([own.loss, own.accuracy.to(own.loss.dtype), own.negatives.to(own.loss.dtype).mean()])
    return BatchLoss(*sum_over_ranks(means * (n_own / batch.n_queries), world))
