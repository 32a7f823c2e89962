"""The contrastive loss of a step: every query against every candidate that it may see (arXiv 2401.00368, eq. 2)."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from e5core.batches import GlobalBatch
from e5kernels.infonce import InfoNCE, infonce


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The [loss] table."""

    temperature: Annotated[float, Field(gt=0)] = 0.02  # paper, appendix A
    margin: Annotated[float, Field(ge=0)] | None = None  # hides negatives this much above the positive


def infonce_loss(embeddings: Tensor, batch: GlobalBatch, config: LossConfig) -> InfoNCE:
    """Compute the loss of a whole batch.  embeddings: (Q + P, D), rows as in the batch, fp32 or fp64, unit length."""
    queries, candidates = embeddings[: batch.n_queries], embeddings[batch.n_queries :]
    relations = batch.relations.to(embeddings.device)
    return infonce(queries, candidates, relations, temperature=config.temperature, margin=config.margin)
