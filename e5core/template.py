"""How a query is shown to the model: with its instruction, with a prefix of its kind, or bare.  Documents are bare.

    instruct   Instruct: {task}\\nQuery: {query}   the paper's (arXiv 2401.00368, eq. 1)
    prefix     {task}: {query}                    its ablation "task-type prefix" (table 5): the task is one word by the
                                                  kind of data, "classify" or "query"; none where both sides are alike
    bare       {query}                            its ablation "no instruction"

A run keeps its template's shape in its card, so all that is done with it later shows queries as training did. The paper
says which prefix trains which kind; which one scores which kind of test set is ours.
"""

import unicodedata
from typing import Literal

from e5core.records import Record

Template = Literal["instruct", "prefix", "bare"]
SHAPES: dict[Template, str] = {
    "instruct": "Instruct: {task}\nQuery: {query}",
    "prefix": "{task}: {query}",
    "bare": "{query}",
}
PREFIXES = ("query", "classify")
# Kinds of test sets, as testsets.py and MTEB call them; of others both sides are alike
_SEARCHED = ("retrieval", "reranking", "instructionretrieval", "instructionreranking")
_CLASSIFIED = ("classification", "multilabelclassification", "zeroshotclassification", "regression", "clustering")


def query_text(task: str, query: str, template: Template = "instruct") -> str:
    """Format a query with its task; without one it stays bare.  Text becomes NFC."""
    before, _, behind = SHAPES[template].removesuffix("{query}").partition("{task}")
    return unicodedata.normalize("NFC", f"{before}{task}{behind}{query}" if task and behind else query)


def document_text(text: str) -> str:
    """Format a document: as it is, in NFC."""
    return unicodedata.normalize("NFC", text)


def training_task(record: Record, template: Template) -> str:
    """Return what stands before a record's query: its own instruction, its kind's prefix, or nothing."""
    if template == "instruct":
        return record.task
    if template == "bare" or record.symmetric:
        return ""
    return "classify" if record.kind == "long_short" else "query"


def evaluation_task(kind: str, task: str, template: Template) -> str:
    """Return what stands before the queries of a test set: its instruction `task`, its kind's prefix, or nothing.

    kind: testsets.py's or MTEB's.  A task that is a prefix, or none, is taken as it is.
    """
    if template == "instruct":
        return task
    if template == "bare" or task in ("", *PREFIXES):
        return "" if template == "bare" else task
    named = kind.lower()
    return "query" if named in _SEARCHED else "classify" if named in _CLASSIFIED else ""


def check_task(task: str | None, template: Template) -> None:
    """Raise ValueError for a task that a model of this template was not trained with."""
    if task and template == "bare":
        raise ValueError(f'the model was trained without instructions (batch.template = "bare"): got the task {task!r}')
    if task and template == "prefix" and task not in PREFIXES:
        raise ValueError(
            f'the model was trained with prefixes (batch.template = "prefix"): the task must be none, '
            f"{' or '.join(PREFIXES)}, got {task!r}"
        )


def template_of(shape: str) -> Template:
    """Return the template of a shape that a card holds.  Raises ValueError for none of ours."""
    for template, known in SHAPES.items():
        if shape == known:
            return template
    known = ", ".join(map(repr, SHAPES.values()))
    raise ValueError(f"trained with the template {shape!r}, this version has {known}")
