"""From records to packed token batches: template, tokenise, relate, pack.

A GlobalBatch is one optimisation step: its texts (rows: the queries, then the candidates; each query's candidates are
its positive and its hard negatives), of which each rank has the token ids of its share, whole examples, and the
relations between them. A MicroBatch is a packed piece of it: whole sequences one after another, no padding, boundaries
by cu_seqlens. Texts that are only encoded may share their prefix, an instruction mostly: it is packed once, and every
token of it is computed once.

Queries have their template (template.py), documents are bare, except for the kinds that the config names (symmetric
tasks). The tokenizer ends every text with EOS, whose hidden state is the embedding.
"""

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from e5core.distributed import ALONE, World
from e5core.recompute import Policy
from e5core.records import Record
from e5core.template import Template, document_text, query_text, training_task
from e5core.tokenizer import Tokenizer
from e5kernels.infonce import Relations

CHARACTERS = 4  # of a token, about: what a rank is dealt is told before anything is tokenised
LEAST_SAVED = 1 / 16  # of a micro-batch's tokens; k and v of a shared prefix are copied to every text, layer by layer


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """The [batch] table."""

    size: Annotated[int, Field(ge=1)] = 2048  # examples (queries) in one optimisation step (paper, appendix A)
    max_tokens: Annotated[int, Field(ge=3)] = 512  # of every text, BOS and EOS included (paper, appendix A)
    composition: Literal["mixed", "homogeneous"] = "mixed"  # homogeneous: every batch is of one source (2402.09906)
    negatives: Annotated[int, Field(ge=0, le=15)] = 1  # hard negatives per query, at most (paper: 1)
    choice: Literal["top", "random"] = "top"  # of more hard negatives: the first ones, or drawn anew at every step
    # tokens whose activations are in memory at once; "auto": what suits the device's free memory (estimate.py)
    micro_batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = 8192
    recompute: Literal[Policy, "auto"] = "none"  # activations that a step computes twice instead of keeping them
    template: Template = "instruct"  # of queries; "prefix" and "bare" are the paper's ablations (template.py)
    instruct_documents: tuple[Literal["sts", "bitext", "plain"], ...] = ()  # symmetric kinds with it on documents too


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Packed sequences.  tokens: (T,) int64.  cu_seqlens: (N+1,) int32.  rows: (N,) int64, their rows in the batch.

    n_shared: where not 0, the first sequence is no row's: it is the prefix, of so many tokens, of all the others, which
    are packed without it (cu_seqlens is then (N+2,)).
    """

    tokens: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    rows: Tensor
    n_shared: int = 0

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the same sequences on a device."""
        tensors = {"tokens": self.tokens, "cu_seqlens": self.cu_seqlens, "rows": self.rows}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The texts of one step, as one rank has them, and what they are to one another.

    In the whole batch rows 0..Q-1 are the queries and row Q + j is candidate j; a rank has a query with its candidates.
    sequences: token ids of this rank's rows.  rows: their numbers, rising.  relations: CPU tensors, of this rank's
    queries to all candidates.  candidates: the numbers of each rank's candidates, rising.  scores: a teacher's, of this
    rank's own candidates; None where it gave none.
    """

    sequences: list[list[int]]
    rows: list[int]
    relations: Relations
    candidates: list[list[int]]
    scores: list[float | None]
    record_ids: list[str]
    n_truncated: int

    @property
    def n_queries(self) -> int:
        """Q, the number of queries of all ranks."""
        return len(self.record_ids)

    @property
    def n_tokens(self) -> int:
        """Number of this rank's real tokens."""
        return sum(map(len, self.sequences))


def text_hash(text: str) -> int:
    """Hash a raw text (without instruction) to 64 bits, signed, so that equal texts are found across a batch."""
    return int.from_bytes(hashlib.blake2b(document_text(text).encode(), digest_size=8).digest(), "little", signed=True)


def build_batch(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    config: BatchConfig,
    seed: int,
    step: int,
    world: World = ALONE,
) -> GlobalBatch:
    """Turn the records of one step into a GlobalBatch, of which this rank tokenises its own share.

    Every rank needs a record. One with several positives gives one of them, drawn by (seed, step, place in the batch);
    the others are no negatives for it. Of more hard negatives than the config asks for, it takes those of its `choice`.
    """
    tasks = [training_task(record, config.template) for record in records]
    texts = [query_text(task, record.query, config.template) for task, record in zip(tasks, records, strict=True)]
    target, owner, hashes, scores = [], [], [], []
    for i, record in enumerate(records):
        target.append(len(owner))
        positive, negatives = chosen_positive(record, seed, step, i), chosen_negatives(record, config, seed, step, i)
        scores += record.scores_of(positive, negatives)
        for text in (record.positives[positive], *(record.negatives[place] for place in negatives)):
            instructed = record.symmetric and record.kind in config.instruct_documents
            texts.append(query_text(tasks[i], text, config.template) if instructed else document_text(text))
            owner.append(i)
            hashes.append(text_hash(text))
    queries, candidates = _deal_examples(texts, owner, CHARACTERS * config.max_tokens, world.world_size)
    own, in_batch = torch.tensor(queries[world.rank]), torch.tensor([record.in_batch for record in records])
    relations = Relations(
        target=torch.tensor(target)[own],
        query_ids=own,
        owner=torch.tensor(owner),
        banned=_banned(records)[own],
        candidate_hashes=torch.tensor(hashes),
        query_open=in_batch[own],
        candidate_open=in_batch[torch.tensor(owner)],
    )
    rows = [*queries[world.rank], *(len(records) + j for j in candidates[world.rank])]
    sequences, n_truncated = tokenizer.encode_batch([texts[row] for row in rows], config.max_tokens)
    own_scores, ids = [scores[j] for j in candidates[world.rank]], [record.id for record in records]
    return GlobalBatch(sequences, rows, relations, candidates, own_scores, ids, n_truncated)


def deal(sizes: Sequence[int], world_size: int) -> list[list[int]]:
    """Deal items to ranks, the largest first, each to the rank that has least; none goes empty where that is possible.

    sizes: what each item costs, in characters, so that nobody need tokenise what is another's.
    Returns the items of each rank, rising.
    """
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    least = [(0, rank) for rank in range(world_size)]  # a heap; of equal ranks the lowest comes first
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, rank = least[0]
        heapq.heapreplace(least, (load + sizes[item] + 1, rank))  # 1: an empty text is work too
        ranks[rank].append(item)
    return [sorted(items) for items in ranks]


def _deal_examples(
    texts: Sequence[str], owner: Sequence[int], limit: int, world_size: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Deal the queries with their candidates.  Returns for each rank its queries, and its candidates, rising."""
    n_queries = len(texts) - len(owner)
    sizes = [0] * n_queries
    for i, text in zip([*range(n_queries), *owner], texts, strict=True):
        sizes[i] += min(len(text), limit)
    queries = deal(sizes, world_size)
    rank_of = {i: rank for rank, own in enumerate(queries) for i in own}
    candidates: list[list[int]] = [[] for _ in queries]
    for j, i in enumerate(owner):
        candidates[rank_of[i]].append(j)
    return queries, candidates


def chosen_positive(record: Record, seed: int, step: int, place: int) -> int:
    """Return the place, among the record's, of the positive that this step trains on."""
    if len(record.positives) == 1:
        return 0
    generator = np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, place]))
    return int(generator.integers(len(record.positives)))


def chosen_negatives(record: Record, config: BatchConfig, seed: int, step: int, place: int) -> list[int]:
    """Return the places, among the record's, of the hard negatives that this step trains on, rising."""
    n = len(record.negatives)
    if config.choice == "top" or n <= config.negatives:
        return list(range(min(n, config.negatives)))
    generator = np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 1, place]))
    return sorted(generator.permutation(n)[: config.negatives].tolist())


def _banned(records: Sequence[Record]) -> Tensor:
    """Hash what is no negative for each query: its own text and all its positives.  Returns (Q, M) int64, padded."""
    lists = [[text_hash(text) for text in (record.query, *record.positives)] for record in records]
    width = max(map(len, lists))
    return torch.tensor([hashes + hashes[:1] * (width - len(hashes)) for hashes in lists])


def pack(
    sequences: Sequence[list[int]],
    budget: int,
    device: torch.device,
    share_prefix: bool = False,
    numbers: Sequence[int] | None = None,
) -> list[MicroBatch]:
    """Deal sequences into micro-batches of at most `budget` tokens (first fit, longest first).

    A sequence longer than the budget is a micro-batch of its own. Every row occurs exactly once.
    numbers: the rows of the sequences in the batch, rising; None: these are all.
    share_prefix: pack what all sequences of a micro-batch begin with once, where that saves enough. The budget counts
    it in each of them, since each has keys of its own to attend to.
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
    numbers = range(len(sequences)) if numbers is None else numbers
    return [
        _packed([sequences[i] for i in sorted(rows)], [numbers[i] for i in sorted(rows)], device, share_prefix)
        for _, rows in bins
    ]


def _packed(sequences: list[list[int]], rows: list[int], device: torch.device, share_prefix: bool) -> MicroBatch:
    n_shared = _prefix_length(sequences) if share_prefix else 0
    prefix = [sequences[0][:n_shared]] if n_shared else []
    pieces = prefix + [ids[n_shared:] for ids in sequences]
    lengths = list(map(len, pieces))
    return MicroBatch(
        tokens=torch.tensor([token for piece in pieces for token in piece], device=device),
        cu_seqlens=torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
        rows=torch.tensor(rows, device=device),
        n_shared=n_shared,
    )


def _prefix_length(sequences: list[list[int]]) -> int:
    """Count the ids that all sequences begin with, one left to each; 0 where sharing them saves too little."""
    lengths = list(map(len, sequences))
    n_shared = min(len(commonprefix(sequences)), min(lengths) - 1)
    n_saved = n_shared * (len(sequences) - 1)
    return n_shared if n_saved >= LEAST_SAVED * sum(lengths) else 0
