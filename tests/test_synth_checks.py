"""Laws of synth's checks, replies and duplicates: a reply becomes a record or a counted reason, never an error."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from e5core.records import RESPONSE_KEYS
from e5core.synth.checks import check_fields, check_record, check_tasks, count_words, script_of
from e5core.synth.languages import load_languages
from e5core.synth.prompts import Prompt, generate_request, load_kind
from e5core.synth.replies import REASONS, Rejection, read_reply

DATA = Path(__file__).parents[1] / "data"
FILES = [file for name in ("synthetic", "multilingual") for file in sorted((DATA / name).glob("*.jsonl"))]
LANGUAGES = load_languages()
KINDS = {name: load_kind(name) for name in RESPONSE_KEYS}
STS = {"S1": "A dog runs over a field.", "S2": "Over the field runs a dog.", "S3": "A dog sleeps in a field."}
RUSSIAN = "Собака бежит по полю и лает на прохожих"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompt_of(fields: dict) -> Prompt:
    """The request that such a record answers."""
    kind = KINDS[fields["kind"]]
    drawn = generate_request(kind, fields["task"], 0, seed=0, languages=LANGUAGES)
    return Prompt(
        kind=kind.name,
        step="generate",
        index=0,
        messages=drawn.messages,
        schema=drawn.schema,
        task=fields["task"],
        language=fields["language"],
        params=fields["params"],
    )


def sts(text: str, language: str = "English", **params: object) -> dict | Rejection:
    fields = {"kind": "sts", "task": KINDS["sts"].task, "language": language, "params": params}
    return check_record(text, prompt_of(fields), KINDS["sts"], LANGUAGES)


def reason(outcome: object) -> str:
    assert isinstance(outcome, Rejection), outcome
    assert outcome.reason in REASONS
    return outcome.reason


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_shipped_record_passes_unchanged_as_a_record_and_as_a_reply(path: Path) -> None:
    assert len(FILES) == 10
    for fields in lines(path):
        kind = KINDS[fields["kind"]]
        assert check_fields(fields, kind, LANGUAGES) == fields
        reply = f"Here you are:\n```json\n{json.dumps(fields['response'], indent=1)}\n```\nAnything else?"
        assert check_record(reply, prompt_of(fields), kind, LANGUAGES) == fields


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda r, k: r | {k[0]: " \n"}, "empty_text"),
        (lambda r, k: r | {k[1]: 7}, "wrong_type"),
        (lambda r, k: r | {k[1]: None}, "wrong_type"),
        (lambda r, k: r | {k[1]: [r[k[1]]]}, "wrong_type"),
        (lambda r, k: r | {"note": "x"}, "wrong_keys"),
        (lambda r, k: {key: r[key] for key in k[1:]}, "wrong_keys"),
        (lambda r, k: r | {k[1]: r[k[0]].upper() + " "}, "same_text"),
        (lambda r, k: r | {k[-1]: r[k[-2]]}, "same_text"),
        (lambda r, k: r | {k[0]: r[k[0]] + "\x00"}, "bad_unicode"),
        (lambda r, k: r | {k[0]: r[k[0]] + "\ud800"}, "bad_unicode"),
        (lambda r, k: dict.fromkeys(k, RUSSIAN) | {k[0]: RUSSIAN * 2, k[1]: RUSSIAN * 3}, "wrong_language"),
        (lambda r, k: r | {k[0]: (RUSSIAN + " ") * 40}, None),  # other rules may see it first, but none lets it through
    ],
)
def test_a_spoilt_record_of_any_kind_is_rejected_by_its_reason(change: Callable, expected: str | None) -> None:
    seen = set()
    for path in FILES:
        for fields in lines(path)[:10]:
            keys, kind = RESPONSE_KEYS[fields["kind"]], KINDS[fields["kind"]]
            spoilt = {**fields, "params": {}, "response": change(dict(fields["response"]), keys)}
            found = reason(check_fields(spoilt, kind, LANGUAGES))
            if expected == "wrong_language" and found == "too_short":  # a long-long's 300 words are always asked for
                continue
            assert expected in (None, found)
            seen.add(fields["kind"])
    assert len(seen) >= 4


@pytest.mark.parametrize(
    "kind, key, params, words, expected",
    [
        ("short_long", "positive_document", {"num_words": 200}, 79, "too_short"),
        ("short_long", "positive_document", {"num_words": 200}, 80, None),
        ("short_long", "hard_negative_document", {"num_words": 500}, 199, "too_short"),
        ("short_long", "hard_negative_document", {"num_words": 50}, 2000, None),
        ("short_long", "user_query", {"query_length": "less than 5 words"}, 7, "too_long"),
        ("short_long", "user_query", {"query_length": "less than 5 words"}, 6, None),
        ("short_long", "user_query", {"query_length": "5 to 15 words"}, 1, "too_short"),
        ("short_long", "user_query", {"query_length": "5 to 15 words"}, 24, "too_long"),
        ("short_long", "user_query", {"query_length": "at least 10 words"}, 3, "too_short"),
        ("long_short", "input_text", {"num_words": "less than 10"}, 15, "too_long"),
        ("long_short", "input_text", {"num_words": "at least 200"}, 79, "too_short"),
        ("long_short", "input_text", {"num_words": "at least 200"}, 300, None),
        ("long_short", "label", {}, 31, "too_long"),
        ("short_short", "input", {}, 61, "too_long"),
        ("long_long", "input", {}, 119, "too_short"),
        ("sts", "S2", {"unit": "phrase"}, 24, "too_long"),
        ("sts", "S2", {"unit": "passage"}, 9, "too_short"),
        ("sts", "S2", {}, 9, None),
    ],
)
def test_lengths_are_held_against_what_was_asked(
    kind: str, key: str, params: dict, words: int, expected: str | None
) -> None:
    usual = {"short_long": 600, "long_long": 300, "sts": 12}.get(kind, 8)  # within all bounds
    texts = {k: " ".join([f"{k}word"] * (8 if k == "user_query" else usual)) for k in RESPONSE_KEYS[kind]}
    texts[key] = " ".join(["plain"] * words)
    fields = {"kind": kind, "task": "T", "language": "English", "params": params, "response": texts}
    outcome = check_fields(fields, KINDS[kind], LANGUAGES)
    if expected is None:
        assert outcome == fields
    else:
        assert reason(outcome) == expected and str(outcome).find(key) > 0


def test_words_are_counted_by_letters_where_there_are_no_spaces() -> None:
    def count(name: str, text: str) -> float:
        return count_words(text, LANGUAGES.known[name])

    assert count("English", "one two  three\nfour") == 4
    assert count("Chinese", "今天天气很好,我们去公园。") == pytest.approx(11 / 1.5)
    assert count("Japanese", "東京タワーに行きます") == 5
    assert count("Thai", "วันนี้อากาศดีมากเราจะไปสวนสาธารณะกัน") == 8  # nine words
    assert count_words("zwei Wörter", None) == 2


@pytest.mark.parametrize(
    "text, label, found",
    [
        ("I love it, truly positive stuff!", "Positive", True),
        ("The verdict is POSITIVE.", "positive", True),
        ("Nowhere near known", "now", False),
        ("we say no to this", "no", True),
        ("a late\n delivery arrived", "late delivery", True),
        ("C++ is hard", "C++", True),
        ("这个产品很好用", "很好", True),
        ("テストに合格した", "合格", True),
        ("Der Stau war lang", "Verkehrsstau", False),
    ],
)
def test_labels_are_found_in_the_text_as_whole_words(text: str, label: str, found: bool) -> None:
    for response in (
        {"input_text": text, "label": label, "misleading_label": "zzz"},
        {"input_text": text, "label": "zzz", "misleading_label": label},
    ):
        fields = {"kind": "long_short", "task": "T", "language": "?", "params": {}, "response": response}
        outcome = check_fields(fields, KINDS["long_short"], LANGUAGES)
        assert (outcome == fields) is not found
        assert not found or reason(outcome) == "label_in_text"


JAPANESE = {"S1": "犬が野原を走っている。", "S2": "野原で犬が走る。", "S3": "犬が家で寝ている。"}
CHINESE = {"S1": "一只狗在田野里奔跑。", "S2": "田野里有狗在跑。", "S3": "狗在家里睡觉并且做梦。"}
GERMAN = {"S1": "Ein Hund läuft über das Feld.", "S2": "Über das Feld läuft ein Hund.", "S3": "Ein Hund schläft."}
CYRILLIC = {"S1": RUSSIAN, "S2": "По полю бежит собака", "S3": "Собака спит в доме"}


@pytest.mark.parametrize(
    "language, response, passes",
    [
        ("Japanese", JAPANESE, True),
        ("Chinese", JAPANESE, False),
        ("Japanese", CHINESE, False),
        ("Chinese", CHINESE, True),
        ("Traditional Chinese", CHINESE, True),
        ("German", GERMAN, True),
        ("Russian", CYRILLIC, True),
        ("Ukrainian", CYRILLIC, True),  # one script: only the script is checked
        ("Hindi Romanized", GERMAN, True),
        ("Hindi", GERMAN, False),
        ("German", CYRILLIC, False),
        ("Russian", CYRILLIC | {"S3": "The dog is sleeping in a warm house"}, False),
        ("Russian", CYRILLIC | {"S3": "Собака спит в iPhone Pro Max"}, True),
        ("Russian", {"S1": "12:30", "S2": "14:45", "S3": "?!"}, False),
        ("A language of the user's", CYRILLIC, True),
    ],
)
def test_the_script_is_the_languages(language: str, response: dict, passes: bool) -> None:
    outcome = sts(json.dumps(response), language)
    assert isinstance(outcome, dict) if passes else reason(outcome) == "wrong_language"
    fields = {"kind": "sts", "task": "T", "language": language, "params": {}, "response": response}
    assert isinstance(check_fields(fields, KINDS["sts"], LANGUAGES, scripts=False), dict)


def test_of_a_translation_each_side_has_its_own_language() -> None:
    pair = {"S1": RUSSIAN, "S2": GERMAN["S1"], "S3": GERMAN["S3"]}
    for language, passes in (("Russian->German", True), ("German->Russian", False), ("Russian->Greek", False)):
        fields = {"kind": "bitext", "task": "T", "language": language, "params": {}, "response": pair}
        outcome = check_fields(fields, KINDS["bitext"], LANGUAGES)
        assert isinstance(outcome, dict) is passes and (passes or reason(outcome) == "wrong_language")


def test_scripts_of_odd_letters() -> None:
    assert [script_of(c) for c in "aяあアー中々ﾊＡ한ก"] == [
        "LATIN", "CYRILLIC", "HIRAGANA", "KATAKANA", "KATAKANA", "CJK", "CJK", "KATAKANA", "LATIN", "HANGUL", "THAI",
    ]  # fmt: skip


OBJECT = json.dumps(STS)


@pytest.mark.parametrize(
    "text",
    [
        OBJECT,
        f"```json\n{OBJECT}\n```",
        f"```\n{OBJECT}",
        f"Sure! As [1] says {{so}}, here it is: {OBJECT} I hope {{that}} it helps.",
        OBJECT[:-1] + ",}",
        OBJECT[:-1] + " , \n }",
        json.dumps(STS, indent=2),
        f"<think>Perhaps {{'S1': 1}} or {OBJECT[:30]}?</think>\n{OBJECT}",
        f"{OBJECT}\n{OBJECT}",
        "\ufeff" + OBJECT,
    ],
)
def test_what_stands_around_the_json_is_passed_over(text: str) -> None:
    assert read_reply(text) == STS


@pytest.mark.parametrize(
    "text, expected",
    [
        ('{"a": "x,}", "b": [1,],}', {"a": "x,}", "b": [1]}),
        ('{"a": "one\ntwo\tthree"}', {"a": "one\ntwo\tthree"}),
        ('{"a": "\\"{[", "b": {"c": "]"}}', {"a": '"{[', "b": {"c": "]"}}),
        ('{"a": "back\\\\"}', {"a": "back\\"}),
        ('["a", "b",]', ["a", "b"]),
        ('[["a"], {"b": 1}]', [["a"], {"b": 1}]),
        ('{"a": NaN, "b": Infinity}', {"a": None, "b": None}),
        ('{"a": "\\u00e4\\ud83d\\ude00"}', {"a": "ä😀"}),
        ("{'a': it's}, then {\"a\": 1}", {"a": 1}),
    ],
)
def test_the_reader_gives_the_json_as_it_was_meant(text: str, expected: object) -> None:
    assert read_reply(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "no_json"),
        ("I cannot help with that.", "no_json"),
        ("See [1] and {x}.", "no_json"),
        ("12", "no_json"),
        (OBJECT[:-1], "cut_json"),
        (OBJECT[:40], "cut_json"),
        ("<think>I never end " + OBJECT, "cut_json"),
        ("{'S1': 'a', 'S2': 'b', 'S3': 'c'}", "bad_json"),
        ('{"S1" "a"}', "bad_json"),
        ('{"S1": "a"]', "bad_json"),
        ('{"a": "x", "a": "y"}', "wrong_keys"),
        ('{"a": {"b": 1, "b": 2}}', "wrong_keys"),
        ('{"a": ' + "9" * 5000 + "}", "bad_json"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "bad_json"),
        ('{"a":__import__("os")}', "bad_json"),
    ],
)
def test_what_cannot_be_read_has_a_reason(text: str, expected: str) -> None:
    assert reason(read_reply(text)) == expected


def test_a_reply_cut_anywhere_is_rejected() -> None:
    for text in (OBJECT, json.dumps({"S1": "see [1], {x}", "S2": 'a "b', "S3": ["c", {"d": "e"}]})):
        for n in range(len(text)):
            assert reason(read_reply(text[:n])) == ("no_json" if n < 2 else "cut_json"), text[:n]


def test_no_reply_makes_the_checks_fail_or_crawl() -> None:
    rng = random.Random(0)
    alphabet = [*'"\\{}[],: \na1é\ud800', "S1", "S2", "S3", "NaN", "<think>"]
    started = time.monotonic()
    for _ in range(3000):
        text = "".join(rng.choices(alphabet, k=rng.randrange(60)))
        sts(text)
        check_tasks(text)
    for text in ('{"' * 50_000, "{" * 200_000, '["' * 50_000, "[" + " " * 200_000, "<think>" * 30_000):
        assert isinstance(read_reply(text), Rejection)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "text, expected",
    [
        ('{"tasks": ["Find a recipe.", "Find a law."]}', ["Find a recipe.", "Find a law."]),
        ('["Find a recipe.", "Find a law."]', ["Find a recipe.", "Find a law."]),
        (
            '{"tasks": ["Find a recipe.", " FIND  a recipe. ", "Find a\\n law.", 7, "", "x"]}',
            ["Find a recipe.", "Find a law."],
        ),
        ('{"tasks": ["Find\\u0301 it now."]}', ["Find́ it now."]),
    ],
)
def test_tasks_are_distinct_sentences(text: str, expected: list[str]) -> None:
    assert check_tasks(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ('{"task": ["Find a recipe."]}', "wrong_keys"),
        ('{"tasks": "Find a recipe."}', "wrong_type"),
        ('{"tasks": []}', "no_tasks"),
        ('{"tasks": ["x", 1, "' + "long " * 200 + '"]}', "no_tasks"),
        ("Find a recipe.", "no_json"),
        ('{"tasks": ["Find a recipe.", "Fi', "cut_json"),
    ],
)
def test_unusable_tasks_have_a_reason(text: str, expected: str) -> None:
    assert reason(check_tasks(text)) == expected


def test_a_list_in_place_of_a_record_is_rejected_and_texts_are_stripped_and_composed() -> None:
    assert reason(sts(f"[{OBJECT}]")) == "wrong_type"
    outcome = sts(json.dumps(dict(reversed((STS | {"S1": "  Cafe\u0301 au lait. \n"}).items()))))
    assert isinstance(outcome, dict) and list(outcome["response"]) == ["S1", "S2", "S3"]
    assert outcome["response"]["S1"] == "Café au lait."
