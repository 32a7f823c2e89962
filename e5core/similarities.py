"""How well a model tells positives from negatives on a small sample of texts, for people to look at (report.py).

A sample is queries, candidates, and what each candidate is to each query. It is bounded by characters, not by time, so
that it is the same on every machine.
"""

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from e5core.records import Record
from e5core.template import Template, document_text, query_text, training_task
from e5core.testsets import EvalSet, Retrieval

OTHER, POSITIVE, HARD_NEGATIVE, LEFT_OUT = range(4)
MOST_EXAMPLES = 64
MOST_QUERIES, MOST_DOCUMENTS = 32, 128
MOST_CHARACTERS = 30_000  # of one sample: about 7,500 tokens, 20 s of SmolLM2-135M on 2 AVX2 cores
Embed = Callable[[list[str]], np.ndarray]  # texts as the model sees them -> (n, D) float32, unit rows


@dataclass(frozen=True, slots=True)
class Sample:
    """Texts as the model sees them, and as people read them, in the same order."""

    queries: list[str]
    shown_queries: list[str]
    candidates: list[str]
    relation: np.ndarray  # (Q, P) int8: OTHER, POSITIVE, HARD_NEGATIVE or LEFT_OUT; a POSITIVE in every row


class Retrieved(NamedTuple):
    """What came of one query."""

    query: int
    expected: int  # the best of its positives
    first: int  # the best of all other candidates
    place: int  # of the expected one among all that count, from 1
    n_candidates: int
    expected_cosine: float
    first_cosine: float


def training_sample(
    records: Sequence[Record], instructed: Collection[str], max_chars: int, template: Template = "instruct"
) -> Sample:
    """Take the first records with their first positive and hard negative, as many as the bounds allow, at least two.

    instructed: the kinds whose documents carry the instruction too (batch.instruct_documents).
    max_chars: of a text that the model reads; what is longer costs as much.
    A text that is the query's own or a positive of it is no negative, as in training; neither is anything for and from
    a record without in-batch negatives.
    """
    kept, n_chars = [], 0
    for record in records[:MOST_EXAMPLES]:
        texts = (record.query, record.positives[0], *record.negatives[:1])
        n_chars += sum(min(len(text), max_chars) for text in texts)
        if n_chars > MOST_CHARACTERS and len(kept) >= 2:
            break
        kept.append(record)
    owners = [(i, text) for i, r in enumerate(kept) for text in (r.positives[0], *r.negatives[:1])]
    relation = np.full((len(kept), len(owners)), OTHER, dtype=np.int8)
    for q, record in enumerate(kept):
        own = {document_text(text) for text in (record.query, *record.positives)}
        for c, (i, text) in enumerate(owners):
            if i == q:
                relation[q, c] = POSITIVE if text == record.positives[0] else HARD_NEGATIVE
            elif document_text(text) in own or not (record.in_batch and kept[i].in_batch):
                relation[q, c] = LEFT_OUT
    candidates = []
    for i, text in owners:
        with_task = kept[i].symmetric and kept[i].kind in instructed
        task = training_task(kept[i], template)
        candidates.append(query_text(task, text, template) if with_task else document_text(text))
    queries = [query_text(training_task(record, template), record.query, template) for record in kept]
    return Sample(queries, [record.query for record in kept], candidates, relation)


def retrieval_sample(eval_set: EvalSet, texts: Retrieval, max_chars: int, template: Template = "instruct") -> Sample:
    """Take some queries of a retrieval set, all documents that answer them, and as many others as the bounds allow.

    max_chars: as in training_sample.  Raises ValueError where no query has a document that answers it.
    """

    def cost(text: str) -> int:
        return min(len(text), max_chars)

    answers = {name: [d for d, score in found.items() if score > 0] for name, found in texts.judgements.items()}
    names = sorted(name for name in texts.queries if answers[name])
    if not names:
        raise ValueError(f"{eval_set.name}: no query has a judgement above 0")
    random.Random(0).shuffle(names)
    chosen: list[str] = []
    documents: dict[str, None] = {}
    n_chars = 0
    for name in names[:MOST_QUERIES]:
        needed = [d for d in answers[name] if d not in documents]
        n_chars += cost(texts.queries[name]) + sum(cost(texts.documents[d]) for d in needed)
        if chosen and (n_chars > MOST_CHARACTERS or len(documents) + len(needed) > MOST_DOCUMENTS):
            break
        chosen.append(name)
        documents |= dict.fromkeys(needed)
    others = sorted(set(texts.documents) - set(documents))
    random.Random(0).shuffle(others)
    for d in others:
        n_chars += cost(texts.documents[d])
        if len(documents) >= MOST_DOCUMENTS or n_chars > MOST_CHARACTERS:
            break
        documents[d] = None
    relation = np.array(
        [[POSITIVE if d in answers[q] else LEFT_OUT if d == q else OTHER for d in documents] for q in chosen], np.int8
    )
    shown = [texts.queries[name] for name in chosen]
    task = eval_set.under(template).instruction
    queries = [query_text(task, text, template) for text in shown]
    return Sample(queries, shown, [document_text(texts.documents[d]) for d in documents], relation)


def cosines(sample: Sample, embed: Embed) -> np.ndarray:
    """Embed a sample, each distinct text once.  Returns the similarity of every query and candidate, (Q, P) float32."""
    rows = {text: row for row, text in enumerate(dict.fromkeys([*sample.queries, *sample.candidates]))}
    vectors = embed(list(rows))
    queries = vectors[[rows[text] for text in sample.queries]]
    return queries @ vectors[[rows[text] for text in sample.candidates]].T


def separation(positives: np.ndarray, others: np.ndarray) -> float:
    """Return how often a positive pair is more similar than another pair, ties by half (the area under the ROC curve).

    positives, others: similarities, at least one each.
    """
    ranked = np.sort(others)
    below = np.searchsorted(ranked, positives, "left")
    return float(np.mean(below + np.searchsorted(ranked, positives, "right")) / (2 * len(others)))


def retrieved(sample: Sample, similar: np.ndarray) -> list[Retrieved]:
    """Return what came of each query that has another candidate, the worst first.

    The worst is the one whose best other candidate is the most above its best positive.
    """
    found: list[Retrieved] = []
    for q, (row, relation) in enumerate(zip(similar, sample.relation, strict=True)):
        positive = np.flatnonzero(relation == POSITIVE)
        rest = np.flatnonzero((relation == OTHER) | (relation == HARD_NEGATIVE))
        if not len(rest):
            continue
        expected, first = int(positive[row[positive].argmax()]), int(rest[row[rest].argmax()])
        place = 1 + int((row[rest] > row[expected]).sum())
        counted = len(rest) + len(positive)
        found.append(Retrieved(q, expected, first, place, counted, float(row[expected]), float(row[first])))
    return sorted(found, key=lambda each: each.expected_cosine - each.first_cosine)
