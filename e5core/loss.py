"""The contrastive loss of a step: every query against every candidate that it may see (arXiv 2401.00368, eq. 2)."""

from dataclasses import dataclass, fields
from typing import Annotated

from pydantic import Field
from torch import Tensor

from e5core.batches import GlobalBatch
from e5kernels.infonce import InfoNCE, Relations, infonce


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The [loss] table."""

    temperature: Annotated[float, Field(gt=0)] = 0.02  # paper, appendix A
    margin: Annotated[float, Field(ge=0)] | None = (
        None  # a candidate more similar than the positive by this is no negative
    )


def infonce_loss(embeddings: Tensor, batch: GlobalBatch, config: LossConfig) -> InfoNCE:
    """Compute the loss of a whole batch.  embeddings: (Q + P, D), rows as in the batch, fp32 or fp64, unit length."""
    queries, candidates = embeddings[: batch.n_queries], embeddings[batch.n_queries :]
    relations = Relations(*(getattr(batch.relations, f.name).to(embeddings.device) for f in fields(Relations)))
    return infonce(queries, candidates, relations, temperature=config.temperature, margin=config.margin)
