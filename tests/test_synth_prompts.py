"""Laws of synth's prompts and languages: kinds are data, every value is drawn, a draw depends on its index only."""

import itertools
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from e5core.config import ConfigError
from e5core.records import RESPONSE_KEYS, read_records
from e5core.synth.languages import load_languages
from e5core.synth.prompts import Kind, brainstorm_request, draw_index, draw_unit, generate_request, load_kind

ROOT = Path(__file__).parents[1]
KINDS = sorted(RESPONSE_KEYS)
TWO_STEPS = ("short_long", "long_short", "short_short", "long_long")
CLARITY = ["clear", "understandable with some effort", "ambiguous"]
SCHOOL = ["elementary school", "high school", "college"]
PAPER = {  # arXiv 2401.00368, tables 8 to 13
    "short_long": {
        "query_type": ["extremely long-tail", "long-tail", "common"],
        "query_length": ["less than 5 words", "5 to 15 words", "at least 10 words"],
        "clarity": CLARITY,
        "num_words": [50, 100, 200, 300, 400, 500],
        "difficulty": ["high school", "college", "PhD"],
    },
    "long_short": {
        "num_words": ["less than 10", "at least 10", "at least 50", "at least 100", "at least 200"],
        "difficulty": ["high school", "college", "PhD"],
        "clarity": CLARITY,
    },
    "short_short": {},
    "long_long": {},
    "sts": {
        "unit": ["sentence", "phrase", "passage"],
        "high_score": [4, 4.5, 5],
        "low_score": [2.5, 3, 3.5],
        "difficulty": SCHOOL,
    },
    "bitext": {
        "unit": ["sentence", "phrase", "passage"],
        "high_score": [4, 4.5, 5],
        "low_score": [1.5, 2, 2.5],
        "difficulty": SCHOOL,
    },
}
LANGUAGES = load_languages()
TASK = "Given a {odd} question, find \\ its {language} answer."


def asked(kind: Kind, index: int, seed: int = 0, **more: str):
    return generate_request(kind, kind.task or TASK, index, seed=seed, languages=LANGUAGES, **more)


@pytest.mark.parametrize("name", KINDS)
def test_the_placeholders_are_the_papers_and_every_value_and_wording_is_drawn(name: str) -> None:
    kind = load_kind(name)
    assert {key: list(values) for key, values in kind.placeholders.items()} == PAPER[name]
    assert kind.kind == name and (kind.brainstorm is not None) == (name in TWO_STEPS)
    assert len(kind.generate.wordings) >= 2 and (kind.brainstorm is None or len(kind.brainstorm.wordings) >= 2)
    drawn = [asked(kind, i).params for i in range(600)]
    for key, values in PAPER[name].items():
        counts = Counter(params[key] for params in drawn)
        assert set(counts) == set(values)
        expected = 600 / len(values)
        assert all(abs(n - expected) < 5 * expected**0.5 for n in counts.values()), (key, counts)
    wordings = {params["wording"] for params in drawn}
    assert wordings == {f"{name}/{i}" for i in range(len(kind.generate.wordings))}


def test_draws_of_different_placeholders_and_kinds_are_independent() -> None:
    kinds = [load_kind(name) for name in ("sts", "bitext")]
    drawn = [[asked(kind, i).params for i in range(900)] for kind in kinds]
    pairs = [Counter((p["unit"], p["high_score"]) for p in drawn[0])]
    pairs.append(Counter((a["unit"], b["unit"]) for a, b in zip(*drawn, strict=True)))
    for counts in pairs:
        assert len(counts) == 9 and all(50 < n < 150 for n in counts.values()), counts


@pytest.mark.parametrize("name", KINDS)
def test_a_prompt_says_all_that_was_drawn_and_nothing_is_left_to_fill_in(name: str) -> None:
    kind = load_kind(name)
    for index in range(60):
        prompt = asked(kind, index)
        [message] = prompt.messages
        text = message["content"]
        assert message["role"] == "user"
        assert all(str(value) in text for key, value in prompt.params.items() if key != "wording")
        assert all(language in text for language in prompt.language.split("->"))
        if not kind.task:
            assert TASK in text and prompt.task == TASK  # braces and backslashes of a task stay as they are
        rest = text.replace(TASK, "")
        assert "{" not in rest.replace('{"tasks"', "") and "\\" not in rest
        assert prompt.schema["required"] == list(RESPONSE_KEYS[name]) and all(
            f'"{k}"' in text for k in kind.response_keys
        )
        assert prompt.schema["additionalProperties"] is False


@pytest.mark.parametrize("name", TWO_STEPS)
def test_brainstorming_mixes_wordings_and_examples(name: str) -> None:
    kind = load_kind(name)
    assert kind.brainstorm is not None
    prompts = [brainstorm_request(kind, i, seed=5) for i in range(200)]
    texts = {prompt.messages[0]["content"] for prompt in prompts}
    assert {p.params["wording"] for p in prompts} == {f"{name}/{i}" for i in range(len(kind.brainstorm.wordings))}
    for text in texts:
        found = [example for example in kind.brainstorm.examples if example in text]
        assert len(found) == {"short_long": 2, "long_short": 0, "short_short": 3, "long_long": 2}[name]
        assert "20" in text and '"tasks"' in text
    for example in kind.brainstorm.examples:
        assert any(example in text for text in texts)
    assert set(prompts[0].schema["properties"]) == {"tasks"}


def test_symmetric_kinds_have_a_fixed_task_and_no_brainstorming() -> None:
    for name, task in (("sts", "Retrieve semantically similar text."), ("bitext", "Retrieve parallel sentences.")):
        kind = load_kind(name)
        assert kind.task == task and asked(kind, 0).task == task
        with pytest.raises(ValueError, match="nothing to brainstorm"):
            brainstorm_request(kind, 0, seed=0)
        with pytest.raises(ValueError, match="cannot take the task"):
            generate_request(kind, "Another task.", 0, seed=0, languages=LANGUAGES)


@pytest.mark.parametrize("name", KINDS)
def test_a_draw_depends_on_seed_kind_and_index_only(name: str) -> None:
    kind = load_kind(name)
    forward = [asked(kind, i, seed=7) for i in range(50)]
    order = list(range(50))
    random.Random(1).shuffle(order)
    assert {i: asked(load_kind(name), i, seed=7) for i in order} == dict(enumerate(forward))
    assert sum(asked(kind, i, seed=8) == forward[i] for i in range(50)) < 25
    assert len({json.dumps(p.messages) for p in forward}) > 20  # long-long draws a language and a wording only


def test_draws_are_the_same_in_another_process_whatever_its_hash_seed() -> None:
    program = (
        "from e5core.synth.prompts import *; from e5core.synth.languages import load_languages\n"
        "p = generate_request(load_kind('short_long'), 'Find.', 12, seed=3, languages=load_languages())\n"
        "print(p.params, p.language, draw_unit(1, 'a', 2))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    prompt = generate_request(load_kind("short_long"), "Find.", 12, seed=3, languages=LANGUAGES)
    assert runs == [f"{prompt.params} {prompt.language} {draw_unit(1, 'a', 2)}\n"] * 2
    assert draw_unit(1, "a", 2) == 0.38879289872798606  # golden: another function would ask other questions on a rerun


def test_a_new_placeholder_leaves_the_other_draws_as_they_were(tmp_path: Path) -> None:
    text = (ROOT / "e5core/synth/kinds/sts.toml").read_text(encoding="utf-8")
    text = text.replace("[placeholders]", '[placeholders]\nmood = ["merry", "sad"]').replace("{unit}", "{mood} {unit}")
    (tmp_path / "sts.toml").write_text(text, encoding="utf-8")
    changed, kept = load_kind("sts", tmp_path), load_kind("sts")
    for i in range(30):
        new, old = asked(changed, i), asked(kept, i)
        assert new.params.pop("mood") in ("merry", "sad")
        assert (new.params, new.language) == (old.params, old.language)


def test_index_draws_reach_both_ends_and_never_leave_them() -> None:
    drawn = Counter(draw_index(3, 0, i) for i in range(3000))
    assert set(drawn) == {0, 1, 2} and min(drawn.values()) > 900
    assert all(draw_index(1, 0, i) == 0 for i in range(20))
    assert draw_unit(0, "a", "b") != draw_unit(0, "ab") != draw_unit(0, "a,b")


def test_persona_and_passage_are_added_only_where_given_and_noted() -> None:
    for name in KINDS:
        kind = load_kind(name)
        plain, dressed = asked(kind, 4), asked(kind, 4, persona="a nurse", passage='Text with {task} and "quotes".')
        assert {"persona", "passage"}.isdisjoint(plain.params) and len(plain.messages) == 1
        system, user = dressed.messages
        assert system["role"] == "system" and "a nurse" in system["content"]
        assert user["content"].startswith(plain.messages[0]["content"])
        assert user["content"].endswith('Text with {task} and "quotes".')
        assert {k: v for k, v in dressed.params.items() if k not in ("persona", "passage")} == plain.params
        assert dressed.params["persona"] == "a nurse" and len(str(dressed.params["passage"])) == 16
        assert dressed.params["passage"] != asked(kind, 4, passage="Another.").params["passage"]
        if kind.brainstorm:
            text = brainstorm_request(kind, 0, seed=0, passage="PASSAGE").messages[-1]["content"]
            assert "PASSAGE" in text and "PASSAGE" not in brainstorm_request(kind, 0, seed=0).messages[-1]["content"]


def test_language_shares_are_the_papers() -> None:
    shares = LANGUAGES.shares
    assert len(shares) == 99 and sum(shares.values()) == pytest.approx(1)  # XLM-R lists Burmese in two encodings
    assert shares["English"] == pytest.approx(0.431)
    often = [name for name, share in shares.items() if share == pytest.approx(0.029)]
    assert len(often) == 13 and {"Polish", "Japanese", "Arabic"} <= set(often)
    rest = [share for name, share in shares.items() if name not in ("English", *often)]
    assert max(rest) == pytest.approx(min(rest)) and sum(rest) == pytest.approx(0.192)
    drawn = Counter(LANGUAGES.draw(draw_unit(0, "language", i)) for i in range(20_000))
    assert abs(drawn["English"] / 20_000 - 0.431) < 0.02 and len(drawn) == 99
    assert "Cantonese" in LANGUAGES.known and "Cantonese" not in shares


def test_every_language_of_the_list_says_what_script_it_has() -> None:
    assert all(language.scripts for language in LANGUAGES.known.values())
    assert {name for name, language in LANGUAGES.known.items() if language.letters_per_word} == {
        "Burmese", "Cantonese", "Chinese", "Japanese", "Khmer", "Lao", "Thai", "Traditional Chinese",
    }  # fmt: skip


def test_own_weights_replace_the_list_and_both_ends_of_a_draw_are_safe() -> None:
    own = load_languages(weights={"German": 3, "Cantonese": 1})
    assert own.shares == {"German": 0.75, "Cantonese": 0.25} and "English" in own.known
    assert (own.draw(0.0), own.draw(0.7499), own.draw(0.75), own.draw(1 - 2**-53)) == (
        "German", "German", "Cantonese", "Cantonese",
    )  # fmt: skip
    assert load_languages(weights={}).shares == LANGUAGES.shares
    with pytest.raises(ValueError, match="unknown language 'Germn'.*German"):
        load_languages(weights={"Germn": 1})
    with pytest.raises(ValueError, match="must be above 0, got 0"):
        load_languages(weights={"German": 0})


def test_a_pair_is_never_of_one_language() -> None:
    kind = load_kind("bitext")
    pairs = [asked(kind, i).language.split("->") for i in range(400)]
    assert all(len(pair) == 2 and pair[0] != pair[1] for pair in pairs)
    assert sum("English" in pair for pair in pairs) > 200
    alone = load_languages(weights={"German": 1})
    with pytest.raises(ValueError, match="needs two to draw from, got German"):
        generate_request(kind, kind.task, 0, seed=0, languages=alone)


def test_a_users_kind_is_found_before_ours_and_named_like_its_file(tmp_path: Path) -> None:
    text = (ROOT / "e5core/synth/kinds/short_long.toml").read_text(encoding="utf-8")
    (tmp_path / "law.toml").write_text(text.replace('name = "short_long"', 'name = "law"'), encoding="utf-8")
    kind = load_kind("law", tmp_path)
    assert (kind.name, kind.kind) == ("law", "short_long") and asked(kind, 0).params["wording"].startswith("law/")
    assert load_kind("sts", tmp_path).name == "sts"
    (tmp_path / "tax.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="name must be the file's own, 'tax', got 'short_long'"):
        load_kind("tax", tmp_path)
    with pytest.raises(ValueError, match="unknown kind 'lw'.*did you mean law"):
        load_kind("lw", tmp_path)


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("{query_type}", "{query_typ}", r"generate.wordings\[0\] lacks \['query_type'\]"),
        ("{n_tasks} different jobs", "{n_tasks} {mood} jobs", r"has unknown \['mood'\]"),
        ('- "positive_document"', "- positive_document", 'never names the key "positive_document"'),
        ("{passage}", "a passage", r"grounding must hold \{passage\}"),
        (
            'by = "query_length"',
            'by = "query_lenght"',
            r"words\[0\].by: unknown placeholder.*did you mean query_length",
        ),
        ('of = ["user_query"]', 'of = ["query"]', r"words\[0\].of: unknown key 'query'"),
        ('"500" = [500]', '"600" = [600]', r"words\[1\].bounds: '600' is never drawn"),
        ("[5, 15]", "[15, 5]", "at least must not be above at most"),
        ("n_examples = 2", "n_examples = 9", "more than the 6 examples"),
        ('kind = "short_long"', 'kind = "short_lang"', "kind: input should be"),
        ('kind = "short_long"', 'kind = "short_long"\ntask = "Find."', "either a task or a \\[brainstorm\\] table"),
        ("[placeholders]", "[placeholders]\nwording = [1]", "placeholders.wording: this name is filled in"),
        ("[placeholders]", "[placeholder]", "placeholder: unknown key.*nearest: placeholders"),
    ],
)
def test_a_fault_in_a_kinds_file_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    text = (ROOT / "e5core/synth/kinds/short_long.toml").read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "short_long.toml").write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        load_kind("short_long", tmp_path)


def test_the_shipped_records_were_drawn_from_the_same_values() -> None:
    kinds = {name: load_kind(name) for name in KINDS}
    for path in sorted((ROOT / "data/synthetic").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            values = kinds[record["kind"]].placeholders
            assert all(value in values[name] for name, value in record["params"].items()), path.name
            assert set(record["params"]) == set(values)


def test_a_prompts_params_make_a_line_that_records_reads(tmp_path: Path) -> None:
    lines = []
    for name, i in itertools.product(KINDS, range(3)):
        prompt = asked(load_kind(name), i, persona="a nurse", passage="text")
        response = {key: f"{key} {i}" for key in RESPONSE_KEYS[name]}
        fields = {"kind": name, "task": prompt.task, "language": prompt.language, "params": prompt.params}
        lines.append(json.dumps({**fields, "response": response}))
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert len(read_records([tmp_path / "a.jsonl"])[0]) == 18
