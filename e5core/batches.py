"""From records to packed token batches: template, tokenise, relate, pack.

A GlobalBatch is one optimisation step: the token ids of all its texts (rows: the queries, then the candidates; each
query's candidates are its positive and its hard negatives) and the relations between them. A MicroBatch is a packed
piece of it: whole sequences one after another, no padding, boundaries by cu_seqlens.

The template is the paper's (arXiv 2401.00368, eq. 1): `Instruct: {task}\\nQuery: {query}` on the query's side,
documents bare, except for the kinds that the config names (symmetric tasks). The tokenizer ends every text with EOS,
whose hidden state is the embedding.
"""

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from e5core.records import Record
from e5core.tokenizer import Tokenizer
from e5kernels.infonce import Relations


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """The [batch] table."""

    size: Annotated[int, Field(ge=1)] = 2048  # examples (queries) in one optimisation step (paper, appendix A)
    max_tokens: Annotated[int, Field(ge=3)] = 512  # of every text, BOS and EOS included (paper, appendix A)
    negatives: Annotated[int, Field(ge=0, le=15)] = 1  # hard negatives per query, at most (paper: 1)
    micro_batch_tokens: Annotated[int, Field(ge=1)] = 8192  # tokens whose activations are in memory at once
    instruct_documents: tuple[Literal["sts", "bitext", "plain"], ...] = ()  # symmetric kinds with it on documents too


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Packed sequences.  tokens: (T,) int64.  cu_seqlens: (N+1,) int32.  rows: (N,) int64, their rows in the batch."""

    tokens: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    rows: Tensor


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The texts of one step and what they are to one another.

    sequences: token ids by row; rows 0..Q-1 are the queries, row Q + j is candidate j.  relations: CPU tensors.
    """

    sequences: list[list[int]]
    relations: Relations
    record_ids: list[str]
    n_truncated: int

    @property
    def n_queries(self) -> int:
        """Q, the number of queries."""
        return len(self.record_ids)

    @property
    def n_tokens(self) -> int:
        """Number of real tokens."""
        return sum(map(len, self.sequences))


def query_text(task: str, query: str) -> str:
    """Format a query with its instruction; without a task it stays bare.  Text becomes NFC."""
    return unicodedata.normalize("NFC", f"Instruct: {task}\nQuery: {query}" if task else query)


def document_text(text: str) -> str:
    """Format a document: as it is, in NFC."""
    return unicodedata.normalize("NFC", text)


def text_hash(text: str) -> int:
    """Hash a raw text (without instruction) to 64 bits, signed, so that equal texts are found across a batch."""
    return int.from_bytes(hashlib.blake2b(document_text(text).encode(), digest_size=8).digest(), "little", signed=True)


def build_batch(
    records: Sequence[Record], tokenizer: Tokenizer, config: BatchConfig, seed: int, step: int
) -> GlobalBatch:
    """Turn the records of one step into a GlobalBatch.

    A record with several positives gives one of them, drawn by (seed, step, place in the batch); the others are no
    negatives for it. Of more hard negatives than the config asks for, the first are taken.
    """
    texts: list[str] = [query_text(record.task, record.query) for record in records]
    target, owner, hashes = [], [], []
    for i, record in enumerate(records):
        target.append(len(owner))
        for text in (chosen_positive(record, seed, step, i), *record.negatives[: config.negatives]):
            instructed = record.symmetric and record.kind in config.instruct_documents
            texts.append(query_text(record.task, text) if instructed else document_text(text))
            owner.append(i)
            hashes.append(text_hash(text))
    sequences, n_truncated = tokenizer.encode_batch(texts, config.max_tokens)
    in_batch = torch.tensor([record.in_batch for record in records])
    relations = Relations(
        target=torch.tensor(target),
        query_ids=torch.arange(len(records)),
        owner=torch.tensor(owner),
        banned=_banned(records),
        candidate_hashes=torch.tensor(hashes),
        query_open=in_batch,
        candidate_open=in_batch[torch.tensor(owner)],
    )
    return GlobalBatch(sequences, relations, [record.id for record in records], n_truncated)


def chosen_positive(record: Record, seed: int, step: int, place: int) -> str:
    """Return the positive that this step trains on."""
    if len(record.positives) == 1:
        return record.positives[0]
    generator = np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, place]))
    return record.positives[generator.integers(len(record.positives))]


def _banned(records: Sequence[Record]) -> Tensor:
    """Hash what is no negative for each query: its own text and all its positives.  Returns (Q, M) int64, padded."""
    lists = [[text_hash(text) for text in (record.query, *record.positives)] for record in records]
    width = max(map(len, lists))
    return torch.tensor([hashes + hashes[:1] * (width - len(hashes)) for hashes in lists])


def pack(sequences: Sequence[Sequence[int]], budget: int, device: torch.device) -> list[MicroBatch]:
    """Deal sequences into micro-batches of at most `budget` tokens (first fit, longest first).

    A sequence longer than the budget is a micro-batch of its own. Every row occurs exactly once.
    """
    bins: list[list] = []  # [tokens used, rows]
    for row in sorted(range(len(sequences)), key=lambda r: (-len(sequences[r]), r)):
        length = len(sequences[row])
        fit = next((i for i, (used, _) in enumerate(bins) if used + length <= budget), None)
        if fit is None:
            bins.append([length, [row]])
        else:
            bins[fit][0] += length
            bins[fit][1].append(row)
    return [_packed(sequences, sorted(rows), device) for _, rows in bins]


def _packed(sequences: Sequence[Sequence[int]], rows: list[int], device: torch.device) -> MicroBatch:
    lengths = [len(sequences[row]) for row in rows]
    return MicroBatch(
        tokens=torch.tensor([token for row in rows for token in sequences[row]], device=device),
        cu_seqlens=torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
        rows=torch.tensor(rows, device=device),
    )
