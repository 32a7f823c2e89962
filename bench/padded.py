"""What transformers does with texts of many lengths: padded forwards, and the last token's state out of each."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from e5core.batches import GlobalBatch

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def grouped(batch: GlobalBatch, forward: str) -> list[list[int]]:
    """Deal the batch's rows to forwards.

    forward: "together", "apart" (queries, candidates), "sorted-N", N rows at a time by length, or "in-order-N".
    """
    rows = range(len(batch.sequences))
    if forward == "together":
        return [list(rows)]
    if forward == "apart":
        return [list(rows[: batch.n_queries]), list(rows[batch.n_queries :])]
    order, _, size = forward.rpartition("-")
    laid = sorted(rows, key=lambda row: len(batch.sequences[row])) if order == "sorted" else list(rows)
    return [laid[first : first + int(size)] for first in range(0, len(laid), int(size))]


def n_positions(sequences: Sequence[Sequence[int]], groups: Sequence[Sequence[int]]) -> int:
    """Count the positions that are computed, padding included."""
    return sum(len(rows) * max(len(sequences[row]) for row in rows) for rows in groups)


def embed(
    model: torch.nn.Module, sequences: Sequence[Sequence[int]], groups: Sequence[Sequence[int]], device: torch.device
) -> Tensor:
    """Forward each group, right-padded to its longest.  Returns (N, D) fp32 unit rows in the order of `sequences`."""
    parts = []
    for rows in groups:
        lengths = torch.tensor([len(sequences[row]) for row in rows], device=device)
        tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
        for i, row in enumerate(rows):
            tokens[i, : len(sequences[row])] = torch.tensor(sequences[row])
        hidden = model(input_ids=tokens.to(device)).last_hidden_state  # (rows, longest, D)
        parts.append(hidden[torch.arange(len(rows), device=device), lengths - 1])
    order = torch.tensor([row for rows in groups for row in rows], device=device).argsort()
    return F.normalize(torch.cat(parts)[order].float(), dim=-1)
