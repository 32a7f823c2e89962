"""What a run asks is a pure function of its config."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from test_synth_generate import FIVE, settings

from e5core.synth.plan import Ask, Plan
from e5core.synth.preview import estimate
from e5core.synth.settings import CorpusConfig, PersonaConfig, SynthConfig

URL = "http://127.0.0.1:1/v1"
TASKS = {kind: 7 for kind in FIVE}


def examples(config: SynthConfig, first: int, last: int) -> list[Ask]:
    return list(Plan(config).generates(first, last, TASKS, lambda kind, number: f"Task {number} of {kind}"))


@pytest.fixture
def config(tmp_path: Path) -> SynthConfig:
    return settings(tmp_path, URL, 1000)


def test_requests_do_not_hang_on_where_a_round_begins(config: SynthConfig) -> None:
    whole = examples(config, 0, 300)
    assert whole == examples(config, 0, 100) + examples(config, 100, 300)
    keys = [ask.request.key for ask in whole]
    assert len(set(keys)) == 300
    other = examples(replace(config, synth=replace(config.synth, seed=1)), 0, 300)
    assert len(set(keys) & {ask.request.key for ask in other}) < 30, "prompts of few draws may well be the same"


def test_a_price_or_an_address_changes_no_request_and_a_temperature_all(config: SynthConfig) -> None:
    [model] = config.models
    keys = [ask.request.key for ask in examples(config, 0, 50)]
    cheap = replace(
        config, models=(replace(model, price_in=1.0, base_url="http://b/v1"),), budget=replace(config.budget, money=1.0)
    )
    assert [ask.request.key for ask in examples(cheap, 0, 50)] == keys
    cold = replace(config, models=(replace(model, temperature=0.0),))
    assert not set(keys) & {ask.request.key for ask in examples(cold, 0, 50)}
    assert Plan(cheap).digests() == Plan(config).digests() != Plan(cold).digests()


def test_models_are_drawn_by_their_shares(config: SynthConfig) -> None:
    [model] = config.models
    two = replace(config, models=(replace(model, share=3.0), replace(model, name="n")))
    counts = Counter(ask.request.model for ask in examples(two, 0, 2000))
    assert 0.72 < counts["m"] / 2000 < 0.78


def test_as_many_lists_of_tasks_are_asked_for_as_examples_need(config: SynthConfig) -> None:
    # 1,000 / 5 kinds / 2 examples of a task / 20 tasks of a list
    assert Plan(config).n_brainstorms() == dict.fromkeys(("short_long", "long_short", "short_short", "long_long"), 5)
    asked = Counter(ask.kind.name for ask in Plan(config).brainstorms(Plan(config).n_brainstorms()))
    assert asked == Plan(config).n_brainstorms()


def test_personas_and_passages_come_by_their_shares_and_are_noted(config: SynthConfig, tmp_path: Path) -> None:
    (tmp_path / "personas.txt").write_text("a nurse in a village\n\na pilot\n")
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "a.txt").write_text("Copper turns green by the sea.")
    added = replace(
        config,
        persona=PersonaConfig(path=str(tmp_path / "personas.txt"), share=0.5),
        corpus=CorpusConfig(path=str(tmp_path / "documents"), share=0.25),
    )
    asks = [*examples(added, 0, 1000), *Plan(added).brainstorms({"short_long": 100})]
    personas = Counter(ask.prompt.params.get("persona", "") for ask in asks)
    assert 0.2 < personas["a nurse in a village"] / 1100 < 0.3 and 0.2 < personas["a pilot"] / 1100 < 0.3
    for ask in asks:
        said = [message["content"] for message in ask.prompt.messages]
        assert ("Copper turns green by the sea." in said[-1]) == ("passage" in ask.prompt.params)
        assert any("You are a" in text for text in said[:-1]) == ("persona" in ask.prompt.params)
    assert 0.2 < sum("passage" in ask.prompt.params for ask in asks) / 1100 < 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('[corpus]\npath = "nowhere"\n', "corpus.path: no such file or folder: nowhere"),
        ('[persona]\npath = "nowhere"\n', "persona.path: no such file or folder: nowhere"),
        ('[[kinds]]\nname = "bitext"\n', "a pair of languages needs two to draw from, got English only"),
        ('[[kinds]]\nname = "st"\n', "unknown kind 'st'.*did you mean sts"),
    ],
)
def test_what_cannot_be_drawn_fails_before_anything_is_sent(change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(settings(tmp_path, URL, 10, more=change))


def test_the_estimate_adds_up_what_the_ledger_would_reserve(config: SynthConfig) -> None:
    priced = replace(config.models[0], price_in=2.0, price_out=8.0)
    found = estimate(replace(config, models=(priced,), budget=replace(config.budget, money=1.0)), Plan(config))
    assert found.requests == 1020 and found.most_output_tokens == 1020 * 400
    assert found.most_money == pytest.approx((2.0 * found.input_tokens + 8.0 * 1020 * 400) / 1e6, rel=1e-3)
    assert found.typical_money == pytest.approx((2.0 * found.input_tokens + 8.0 * 1020 * 300) / 1e6, rel=1e-3)
