"""How much text a run's steps hold: counted on a sample of the records, or assumed where none are counted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, pstdev

from e5core.batches import BatchConfig, build_batch
from e5core.mixture import Mixture
from e5core.records import Record
from e5core.tokenizer import Tokenizer

SAMPLE = 512  # examples that are tokenised to know the lengths of all


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """A run as a machine sees it."""

    n_steps: int | None  # None: unknown, since epochs count records
    batch_size: int
    candidates: float  # of an example
    tokens: float  # of an example, all its texts
    spread: float  # standard deviation of that
    longest: int  # of a text
    seen: float  # keys that a token attends to, itself included, in a layer without window
    source: str  # of these figures


def counted(mixture: Mixture, tokenizer: Tokenizer, batch: BatchConfig, n_steps: int) -> Workload:
    """Count tokens by tokenising a sample: the run's first examples, as its batches have them."""
    records = _first_records(mixture, batch)
    n = len(records)
    sample = build_batch(records, tokenizer, batch, seed=0, step=0)
    lengths = list(map(len, sample.sequences))
    examples = lengths[:n]
    for owner, length in zip(sample.relations.owner.tolist(), lengths[n:], strict=True):
        examples[owner] += length
    return _workload(n_steps, batch, examples, lengths, f"{n} examples of the training records, tokenised")


def _first_records(mixture: Mixture, batch: BatchConfig) -> list[Record]:
    n = min(SAMPLE, mixture.epoch_size)
    size = batch.size if batch.composition == "homogeneous" else n
    records = mixture.batch(0, size)
    for step in range(1, n // size):
        if mixture.is_begun(step, size):  # a plan must not look into a folder that may grow until the step is due
            records += mixture.batch(step, size)
    return records


def assumed(batch: BatchConfig, n_steps: int | None) -> Workload:
    """Take log-normal lengths (DESIGN section 5, workload W64: 401 tokens a triple) where none are counted."""
    n, normal = 64, NormalDist()
    points = [normal.inv_cdf((i + 0.5) / n) for i in range(n)]
    queries = [min(256, batch.max_tokens, max(16, int(math.exp(3.8 + 0.5 * z)))) for z in points]
    documents = [min(512, batch.max_tokens, max(16, int(math.exp(4.9 + 0.8 * z)))) for z in points]
    steps = [17 * (k + 1) for k in range(1 + batch.negatives)]  # which document stands beside which query
    texts = [[query, *(documents[(i * step) % n] for step in steps)] for i, query in enumerate(queries)]
    lengths = [length for own in texts for length in own]
    return _workload(n_steps, batch, list(map(sum, texts)), lengths, "log-normal, assumed: none was counted")


def _workload(
    n_steps: int | None, batch: BatchConfig, examples: Sequence[int], lengths: Sequence[int], source: str
) -> Workload:
    return Workload(
        n_steps=n_steps,
        batch_size=batch.size,
        candidates=len(lengths) / len(examples) - 1,
        tokens=fmean(examples),
        spread=pstdev(examples),
        longest=max(lengths),
        seen=sum(n * (n + 1) / 2 for n in lengths) / sum(lengths),
        source=source,
    )
