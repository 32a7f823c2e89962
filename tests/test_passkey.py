"""Laws of passkey.py: what its texts are, what is scored, and the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
from models import save_embedder
from scoring import TableEncoder, WordEncoder

from e5core.evaluate import main
from e5core.passkey import FILLER, INSTRUCTION, Passkeys, draw_passkeys, score_passkeys
from e5core.tokenizer import Tokenizer

LONGEST = max(map(len, FILLER)) + 1  # tokens of a sentence, of which each letter is one


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a token for every byte."""
    return save_embedder(tmp_path_factory.mktemp("passkey") / "model")


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.load(model)


@pytest.mark.parametrize("n_tokens", [110, 256, 2000])
def test_a_text_is_filler_of_that_length_with_one_fact_somewhere(tokenizer: Tokenizer, n_tokens: int) -> None:
    passkeys = draw_passkeys(tokenizer, n_tokens, 60, 40)
    ids, n_truncated = tokenizer.encode_batch(passkeys.documents, n_tokens)
    lengths = np.array([len(row) for row in ids])
    assert n_truncated == 0 and np.all(lengths > n_tokens - LONGEST)
    people, keys, places = [], [], []
    for text in passkeys.documents:
        front, between, rest = text.partition("'s pass key is ")
        name = " ".join(front.split()[-2:])
        key = rest.partition(".")[0]
        fact = f"{name}'s pass key is {key}. Remember it. {key} is the pass key for {name}."
        sentences = text.replace(fact, "").split(".")[:-1]
        assert text.count(fact) == 1
        assert [f"{s.strip()}." for s in sentences] == [FILLER[i % len(FILLER)] for i in range(len(sentences))]
        people.append(name)
        keys.append(key)
        places.append(text.index(fact) / max(1, len(text) - len(fact)))
    assert len(set(people)) == len(set(keys)) == 60
    assert n_tokens < 256 or (np.histogram(places, bins=3, range=(0, 1))[0] > 8).all()
    assert len(set(passkeys.answers)) == len(passkeys.queries) == 40
    asked = [f"what is the passkey for {people[row]}?" for row in passkeys.answers]
    assert passkeys.queries == asked


def test_the_same_seed_draws_the_same_texts_and_a_length_has_its_own_people(tokenizer: Tokenizer) -> None:
    first = draw_passkeys(tokenizer, 200, 10, 5)
    assert first == draw_passkeys(tokenizer, 200, 10, 5) and first != draw_passkeys(tokenizer, 200, 10, 5, seed=1)
    assert first.queries != draw_passkeys(tokenizer, 201, 10, 5).queries
    assert len(draw_passkeys(tokenizer, 200, 3, 5).queries) == 3


def test_what_cannot_be_drawn_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="a passkey document of 40 tokens has no room for .*; ask for more tokens"):
        draw_passkeys(tokenizer, 40)
    with pytest.raises(ValueError, match="passkey documents must be 1..625, of as many people: got 626"):
        draw_passkeys(tokenizer, 200, 626)


def test_accuracy_counts_the_queries_whose_own_document_is_nearest() -> None:
    east, north, between = (1.0, 0.0), (0.0, 1.0), (0.8, 0.6)
    encoder = TableEncoder({"a": east, "b": north, "c": between, "who a": east, "who b": between, "who c": between})
    passkeys = Passkeys(["a", "b", "c"], ["who a", "who b", "who c"], [0, 1, 2])
    assert score_passkeys(encoder, passkeys) == 2 / 3
    collapsed = TableEncoder(dict.fromkeys(["a", "b", "c", "who a", "who b", "who c"], east))
    assert score_passkeys(collapsed, passkeys) == 1 / 3  # the first of equal ones
    words = WordEncoder()
    score_passkeys(words, passkeys)
    assert [task for _, task, _ in words.calls] == [None, INSTRUCTION]


def test_the_command_line_scores_each_length_whole(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    few = ["--passkey-documents", "4", "--max-queries", "3", "--dtype", "float32"]
    assert main([str(model), "--passkey", "128", "200", *few, "--out", str(out)]) == 0
    scores = json.loads(out.read_text())
    assert set(scores) == {"passkey-128/accuracy", "passkey-200/accuracy"}
    assert all(min(abs(100 * n / 3 - score) for n in range(4)) < 1e-9 for score in scores.values())
    assert "0 texts were cut to 512 tokens" in capfd.readouterr().err
    assert main([str(model), "--passkey", "200", "--max-tokens", "150", *few]) == 0
    assert "4 texts were cut to 150 tokens" in capfd.readouterr().err
    assert main([str(model), "--passkey", "1000", *few]) == 2
    assert "max_tokens is 1000, the model was made for at most 512" in capfd.readouterr().err
    assert main([str(model), "--passkey", "1000", "--rope-scaling", "ntk:2", *few]) == 0
    assert main([str(model), "--passkey", "1000", "--passkey-documents", "900"]) == 2
