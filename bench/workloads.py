"""The workload of the GPU benches (DESIGN section 5, W64): triples of log-normal lengths, random ids, no padding."""

import torch
from torch import Tensor

from e5core.batches import GlobalBatch, pack
from e5kernels.infonce import Relations


def triple_lengths(n: int) -> list[list[int]]:
    """Draw the tokens of n queries, of their positives and of their negatives; for 64 triples 25,669 in all."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.empty(n).log_normal_(mean, spread, generator=generator).clamp(16, longest).long().tolist()
        for mean, spread, longest in ((3.8, 0.5, 256), (4.9, 0.8, 512), (4.9, 0.8, 512))
    ]


def triples(n: int, vocab_size: int, longest: int = 512) -> GlobalBatch:
    """Make a batch of n queries, each with a positive and a hard negative of its own, of random ids.

    longest: cuts every text, so that a tiny model can take them.
    """
    queries, positives, negatives = triple_lengths(n)
    candidates = [length for pair in zip(positives, negatives, strict=True) for length in pair]
    generator = torch.Generator().manual_seed(1)
    sequences = [
        torch.randint(3, vocab_size, (min(length, longest),), generator=generator).tolist()
        for length in (*queries, *candidates)
    ]
    rows, places = torch.arange(n), torch.arange(2 * n)
    relations = Relations(
        target=2 * rows,
        query_ids=rows,
        owner=places // 2,
        banned=-1 - rows[:, None],  # its own text; no candidate is the same
        candidate_hashes=places,
        query_open=torch.ones(n, dtype=torch.bool),
        candidate_open=torch.ones(2 * n, dtype=torch.bool),
    )
    names = [f"triple-{i}" for i in range(n)]
    return GlobalBatch(sequences, list(range(3 * n)), relations, [list(range(2 * n))], [None] * (2 * n), names, 0)


def packed_lengths(n_tokens: int) -> list[int]:
    """Return the lengths of W64's fullest micro-batch of n_tokens, the last of them cut or lengthened to fill it."""
    batch = triples(64, 1000)
    fullest = pack(batch.sequences, n_tokens, torch.device("cpu"))[0]
    lengths = fullest.cu_seqlens.diff().tolist()
    room = n_tokens - sum(lengths)
    if room < 0:  # the longest text alone is longer
        return [n_tokens]
    return [*lengths, room] if room else lengths


def bounds_of(lengths: list[int], device: torch.device) -> Tensor:
    """Return cu_seqlens (N+1,) int32."""
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
