"""Test sets: which there are, the instruction that goes with each, and the readers that check their files.

    retrieval       a BEIR folder: corpus.jsonl (_id, title, text), queries.jsonl (_id, text), qrels/test.tsv
    sts             a .jsonl file of sentence1, sentence2, score
    bitext          a .jsonl file of sentence1 (foreign), sentence2 (English), line by line translations of each other
    classification  a folder of train.jsonl and test.jsonl with text and label
    clustering      a folder of test.jsonl with text and label
    pair-classification  a folder of test.jsonl with sentence1, sentence2, label: 1 (alike) or 0
    reranking       a folder of test.jsonl with query, positive (a list of texts), negative (a list of texts)

The instructions are those of arXiv 2401.00368, table 15. Text leaves here in NFC form, as training text does.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from e5core.records import (
    BrokenRecord,
    checked_number,
    checked_text,
    decode_line,
    parse_object,
    read_lines,
    required,
)
from e5core.template import Template, evaluation_task

TASKS = {  # instruction by the set's name: the first pattern that fits
    "xquad-*": "Given a question, retrieve Wikipedia passages that answer the question",
    "nq*": "Given a question, retrieve Wikipedia passages that answer the question",
    "scifact*": "Given a scientific claim, retrieve documents that support or refute the claim",
    "banking77*": "Given a online banking query, find the corresponding intents",
    "hwu64-scenarios*": "Given a user utterance as query, find the user scenarios",
    "snli*": "Given a premise, retrieve a hypothesis that is entailed by the premise",
}
DEFAULT_TASKS = {  # by kind, for other names; what a classification or clustering is about cannot be guessed
    "retrieval": "Given a web search query, retrieve relevant passages that answer the query",
    "sts": "Retrieve semantically similar text.",
    "bitext": "Retrieve parallel sentences.",
    "pair-classification": "Retrieve semantically similar text.",
    "reranking": "Given a web search query, retrieve relevant passages that answer the query",
}
METRICS = {  # what scores.py measures, by kind
    "retrieval": ("ndcg@10", "recall@100"),
    "sts": ("spearman",),
    "bitext": ("accuracy", "f1"),
    "classification": ("accuracy",),
    "clustering": ("v_measure",),
    "pair-classification": ("ap",),
    "reranking": ("map", "mrr"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSet:
    """One test set: a table of [[eval.sets]], or a name on the command line."""

    kind: Literal["retrieval", "sts", "bitext", "classification", "clustering", "pair-classification", "reranking"]
    path: str  # a folder or a .jsonl file, as in the module's list
    task: str | None = None  # instruction; None = by TASKS, then DEFAULT_TASKS; "" = no instruction
    max_queries: Annotated[int, Field(ge=1)] | None = None  # retrieval: so many queries and all documents; None = all

    def __post_init__(self) -> None:
        if self.max_queries is not None and self.kind != "retrieval":
            raise ValueError(
                f"max_queries is for retrieval only: got {self.max_queries} for the {self.kind} {self.path}"
            )
        if self.task is None and not self.instruction:
            known = ", ".join(TASKS)
            raise ValueError(f"the {self.kind} {self.name} needs a task: known are those of {known}; give its task")

    @property
    def name(self) -> str:
        """The folder's name, with the split unless it is the test split; or the file's stem (deu-eng)."""
        path = Path(os.path.abspath(self.path))
        if self.kind not in ("sts", "bitext"):
            return path.name
        if path.stem == "test":
            return path.parent.name
        return f"{path.parent.name}-{path.stem}" if path.stem in ("dev", "valid", "train") else path.stem

    @property
    def tested(self) -> Path:
        """The file or folder of the texts that the scores are of; a classification's train.jsonl is none of them."""
        path = Path(self.path)
        return path if self.kind in ("retrieval", "sts", "bitext") else path / "test.jsonl"

    @property
    def instruction(self) -> str:
        """The task, or the one that goes with the name or the kind; "" = none."""
        if self.task is not None:
            return self.task
        named = (task for pattern, task in TASKS.items() if fnmatchcase(self.name, pattern))
        return next(named, DEFAULT_TASKS.get(self.kind, ""))

    def under(self, template: Template) -> "EvalSet":
        """Return the set as a model of this template is told of it."""
        return replace(self, task=evaluation_task(self.kind, self.instruction, template))

    @property
    def measures(self) -> tuple[str, ...]:
        """The full names of the set's scores, as evaluate returns them: ("stsb-cc-en-dev/spearman",)."""
        return tuple(f"{self.name}/{metric}" for metric in METRICS[self.kind])


@dataclass(frozen=True, slots=True)
class Retrieval:
    """A BEIR set."""

    queries: dict[str, str]  # id: text, those with a judgement only
    documents: dict[str, str]  # id: title and text
    judgements: dict[str, dict[str, int]]  # query id: {document id: relevance}


@dataclass(frozen=True, slots=True)
class Pairs:
    """Sentence pairs, of sts, bitext or pair classification."""

    first: list[str]
    second: list[str]
    scores: list[float]  # sts: the human scores; bitext: empty; pair classification: 1 (alike) or 0


@dataclass(frozen=True, slots=True)
class Classification:
    """Labelled texts."""

    train_texts: list[str]
    train_labels: list[str]
    test_texts: list[str]
    test_labels: list[str]


@dataclass(frozen=True, slots=True)
class Clustering:
    """Texts with the label of the group that each belongs to."""

    texts: list[str]
    labels: list[str]


@dataclass(frozen=True, slots=True)
class Reranking:
    """Queries, each with candidates of its own."""

    queries: list[str]
    positives: list[list[str]]
    negatives: list[list[str]]


Texts = Retrieval | Pairs | Classification | Clustering | Reranking


def read_sets(sets: Sequence[EvalSet]) -> list[tuple[EvalSet, Texts]]:
    """Read and check test sets, so that a bad one fails before a model is loaded.

    Raises ValueError on no set, two sets of one name, a broken line (FILE:LINE); FileNotFoundError on a missing file.
    """
    if not sets:
        raise ValueError("no test set given: name at least one")
    paths: dict[str, str] = {}
    for eval_set in sets:
        name = eval_set.name
        if name in paths:
            raise ValueError(f"two test sets are named {name}: {paths[name]} and {eval_set.path}; take one of them out")
        paths[name] = eval_set.path
    readers = {
        "retrieval": read_retrieval,
        "sts": read_sts,
        "bitext": read_bitext,
        "classification": read_classification,
        "clustering": read_clustering,
        "pair-classification": read_pair_classification,
        "reranking": read_reranking,
    }
    return [(eval_set, readers[eval_set.kind](Path(eval_set.path))) for eval_set in sets]


def read_retrieval(folder: Path) -> Retrieval:
    """Read a BEIR folder; queries without any judgement are left out, a document may be empty."""
    documents = dict(_identified(folder / "corpus.jsonl", titled=True))
    queries = dict(_identified(folder / "queries.jsonl", titled=False))
    judgements: dict[str, dict[str, int]] = {}
    path = folder / "qrels" / "test.tsv"
    for line, raw in read_lines(path):
        place = f"{path}:{line}"
        columns = decode_line(raw, place).rstrip("\r\n").split("\t")
        if line == 1 and columns[0] == "query-id":
            continue
        if len(columns) != 3:
            raise BrokenRecord(
                f"{place}: a judgement is query-id, corpus-id, score between tabs, got {len(columns)} columns"
            )
        query, document, score = columns
        for kind, identity, known in (("query", query, queries), ("document", document, documents)):
            if identity not in known:
                raise BrokenRecord(f"{place}: a judgement names the unknown {kind} {identity!r}")
        if not score.removeprefix("-").isdecimal():
            raise BrokenRecord(f"{place}: score must be a whole number, got {score!r}")
        if judgements.setdefault(query, {}).setdefault(document, int(score)) != int(score):
            raise BrokenRecord(f"{place}: query {query!r} and document {document!r} were judged otherwise before")
    if not judgements:
        raise ValueError(f"{path} holds no judgement: a line is query-id, corpus-id, score between tabs")
    return Retrieval({name: text for name, text in queries.items() if name in judgements}, documents, judgements)


def read_sts(path: Path) -> Pairs:
    """Read sentence pairs with scores: at least two pairs, and not all scores the same."""
    pairs = _pairs(path, "score")
    if len(set(pairs.scores)) < 2:
        raise ValueError(
            f"{path}: every score is {pairs.scores[0]:g}, so there is no order to compare; give two or more"
        )
    return pairs


def read_bitext(path: Path) -> Pairs:
    """Read translated pairs: at least two."""
    return _pairs(path)


def read_classification(folder: Path) -> Classification:
    """Read train and test texts: at least two labels, and every label of test occurs in train."""
    train = [(text, label) for _, text, label in _labelled(folder / "train.jsonl")]
    labels = {label for _, label in train}
    if len(labels) < 2:
        raise ValueError(
            f"{folder / 'train.jsonl'}: a classification needs two labels or more, got {', '.join(labels)}"
        )
    test: list[tuple[str, str]] = []
    for place, text, label in _labelled(folder / "test.jsonl"):
        if label not in labels:
            raise BrokenRecord(f"{place}: train.jsonl has no text of the label {label!r}")
        test.append((text, label))
    return Classification([x for x, _ in train], [y for _, y in train], [x for x, _ in test], [y for _, y in test])


def read_clustering(folder: Path) -> Clustering:
    """Read labelled texts: at least two labels."""
    path = folder / "test.jsonl"
    rows = [(text, label) for _, text, label in _labelled(path)]
    labels = [label for _, label in rows]
    if len(set(labels)) < 2:
        raise ValueError(f"{path}: a clustering needs two labels or more, got {labels[0]}")
    return Clustering([text for text, _ in rows], labels)


def read_pair_classification(folder: Path) -> Pairs:
    """Read labelled pairs: at least one that is alike and one that is not."""
    path = folder / "test.jsonl"
    pairs = _pairs(path, "label")
    if len(set(pairs.scores)) < 2:
        raise ValueError(f"{path}: every label is {pairs.scores[0]:g}; give pairs of 1 (alike) and of 0")
    return pairs


def read_reranking(folder: Path) -> Reranking:
    """Read queries with candidates: at least one positive and one negative each, and no text that is both."""
    read = Reranking([], [], [])
    for place, fields in _objects(folder / "test.jsonl"):
        read.queries.append(checked_text(required(fields, "query", place), place, "query"))
        for side, texts in (("positive", read.positives), ("negative", read.negatives)):
            given = required(fields, side, place)
            if not isinstance(given, list) or not given:
                raise BrokenRecord(f"{place}: {side} must be a list of one text or more, got {given!r:.60}")
            texts.append([checked_text(text, place, side) for text in given])
        for text in set(read.positives[-1]).intersection(read.negatives[-1]):
            raise BrokenRecord(f"{place}: a text is both positive and negative: {text[:60]!r}")
    return read


def _objects(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield ("FILE:LINE", object) for every line; a file without any is an error."""
    place = ""
    for line, raw in read_lines(path):
        place = f"{path}:{line}"
        yield place, parse_object(raw, place)
    if not place:
        raise ValueError(f"{path} is empty: it must hold JSON lines")


def _identified(path: Path, *, titled: bool) -> Iterator[tuple[str, str]]:
    """Yield (id, text); if titled, title and text joined by a space, each of which may be empty."""
    seen: set[str] = set()
    for place, fields in _objects(path):
        identity = required(fields, "_id", place)
        if not isinstance(identity, str) or not identity:
            raise BrokenRecord(f"{place}: _id must be a string that is not empty, got {identity!r}")
        if identity in seen:
            raise BrokenRecord(f"{place}: the _id {identity!r} occurred before")
        seen.add(identity)
        text = checked_text(required(fields, "text", place), place, "text", blank=titled)
        if titled:
            title = checked_text(fields.get("title", ""), place, "title", blank=True)
            text = f"{title} {text}".strip()
        yield identity, text


def _pairs(path: Path, column: Literal["score", "label", ""] = "") -> Pairs:
    """Read pairs, with the numbers of a column if it is named."""
    pairs = Pairs([], [], [])
    for place, fields in _objects(path):
        pairs.first.append(checked_text(required(fields, "sentence1", place), place, "sentence1"))
        pairs.second.append(checked_text(required(fields, "sentence2", place), place, "sentence2"))
        if column:
            number = checked_number(required(fields, column, place), place, column)
            if column == "label" and number not in (0, 1):
                raise BrokenRecord(f"{place}: label must be 1 (alike) or 0, got {number:g}")
            pairs.scores.append(number)
    if len(pairs.first) < 2:
        raise ValueError(f"{path} holds 1 pair: at least 2 are needed")
    return pairs


def _labelled(path: Path) -> Iterator[tuple[str, str, str]]:
    for place, fields in _objects(path):
        label = required(fields, "label", place)
        if isinstance(label, int) and not isinstance(label, bool):
            label = str(label)
        yield place, checked_text(required(fields, "text", place), place, "text"), checked_text(label, place, "label")
