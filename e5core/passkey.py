"""Personalised passkey retrieval: at which length does a model still find one fact in a text? (arXiv 2401.00368, 5.2)

A document is the same few sentences over and over, to a number of tokens, and somewhere among them what no other says:

    The grass is green. The sky is blue. ... Ada Okafor's pass key is 4711. Remember it. 4711 is the pass key for Ada
    Okafor. ... There and back again. The grass is green.

Queries ask for the pass key of a person; the score is how often the person's document is the nearest. The paper has 100
documents and 50 queries at each length. Its texts are not ours, for they are made anew from a seed, by the tokens of
the model in hand; nor does it print its instruction.
"""

import random
from bisect import bisect_right
from dataclasses import dataclass
from itertools import cycle, islice, product

import numpy as np

from e5core.scores import TextEncoder, nearest_rows
from e5core.template import Template, evaluation_task
from e5core.tokenizer import Tokenizer

INSTRUCTION = "Given a question, retrieve passages that answer the question"
FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
N_DOCUMENTS, N_QUERIES = 100, 50
_LARGEST_KEY = 50_000
_FIRST = (
    "Ada", "Amir", "Bruno", "Carmen", "Chen", "Dalia", "Edwin", "Fatima", "Gustav", "Hana", "Igor", "Jamila", "Kofi",
    "Lena", "Mateo", "Nadia", "Oscar", "Priya", "Quentin", "Rosa", "Stefan", "Tomas", "Uma", "Viktor", "Yusuf",
)  # fmt: skip
_LAST = (
    "Andersen", "Bauer", "Castillo", "Dubois", "Eriksen", "Fischer", "Garcia", "Hughes", "Ivanov", "Jensen", "Kovacs",
    "Lopez", "Mwangi", "Nakamura", "Okafor", "Petrov", "Quinn", "Rossi", "Schmidt", "Tanaka", "Urbina", "Varga",
    "Walsh", "Yilmaz", "Zhou",
)  # fmt: skip
MOST_DOCUMENTS = len(_FIRST) * len(_LAST)


@dataclass(frozen=True, slots=True)
class Passkeys:
    """Documents of one length, and questions about some of them."""

    documents: list[str]
    queries: list[str]
    answers: list[int]  # by query, the row of its document


def draw_passkeys(
    tokenizer: Tokenizer, n_tokens: int, n_documents: int = N_DOCUMENTS, n_queries: int = N_QUERIES, seed: int = 0
) -> Passkeys:
    """Make documents of at most n_tokens, BOS and EOS among them, and as near to it as a sentence allows.

    The same arguments give the same texts.  n_queries: of as many people, or of all where there are fewer.
    Raises ValueError for a length that does not hold a pass key, and for more people than there are names.
    """
    if not 1 <= n_documents <= MOST_DOCUMENTS:
        raise ValueError(f"passkey documents must be 1..{MOST_DOCUMENTS}, of as many people: got {n_documents}")
    generator = random.Random(f"passkey {seed} {n_tokens}")  # of a str it does not depend on the process
    people = [f"{first} {last}" for first, last in generator.sample(list(product(_FIRST, _LAST)), n_documents)]
    keys = generator.sample(range(1, _LARGEST_KEY + 1), n_documents)
    most = bisect_right(range(n_tokens), False, key=lambda n: tokenizer.encode(_text(n), n_tokens)[1]) - 1
    documents = []
    for name, key in zip(people, keys, strict=True):
        fact = f"{name}'s pass key is {key}. Remember it. {key} is the pass key for {name}."
        documents.append(_document(tokenizer, n_tokens, most, fact, generator.random()))
    answers = generator.sample(range(n_documents), min(n_queries, n_documents))
    return Passkeys(documents, [f"what is the passkey for {people[row]}?" for row in answers], answers)


def score_passkeys(encoder: TextEncoder, passkeys: Passkeys, template: Template = "instruct") -> float:
    """Return the share of queries whose nearest document is their own; of equal ones the first counts.

    template: of queries, the encoder's.
    """
    documents = encoder.encode(passkeys.documents)
    task = evaluation_task("retrieval", INSTRUCTION, template)
    queries = encoder.encode(passkeys.queries, task=task or None)
    found = [int(rows[0]) for rows in nearest_rows(queries, documents, 1)]
    return float(np.mean([row == answer for row, answer in zip(found, passkeys.answers, strict=True)]))


def _document(tokenizer: Tokenizer, n_tokens: int, most: int, fact: str, at: float) -> str:
    """Put a fact into as many sentences, of at most `most`, as n_tokens allow, behind the share `at` of them."""
    n_sentences = (
        bisect_right(range(most + 1), False, key=lambda n: tokenizer.encode(_text(n, fact, at), n_tokens)[1]) - 1
    )
    if n_sentences < 0:
        raise ValueError(f"a passkey document of {n_tokens} tokens has no room for {fact!r}; ask for more tokens")
    return _text(n_sentences, fact, at)


def _text(n_sentences: int, fact: str = "", at: float = 0.0) -> str:
    sentences = list(islice(cycle(FILLER), n_sentences))
    place = int(at * (n_sentences + 1))
    return " ".join([*sentences[:place], *([fact] if fact else []), *sentences[place:]])
