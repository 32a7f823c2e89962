"""What becomes of a reply: a record, tasks, or a rejection with a reason that is counted.

What was read (replies.py) is held against what was asked: exact keys, strings, length, script of the language, no label
in the text, no two texts alike. The same checks take a whole record, whoever wrote it.
"""

import functools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from e5core.contamination import normalised
from e5core.records import RESPONSE_KEYS, BrokenRecord, checked_text
from e5core.synth.languages import Language, Languages
from e5core.synth.prompts import PAIR, TASKS_KEY, Kind, Prompt
from e5core.synth.replies import Rejection, read_reply

# Models keep to lengths loosely. Of 1,860 records that were written with care (data/synthetic holds the English ones),
# the shortest has 0.417 of the words that its kind asks for (Korean, 125 of 300), the longest 1.5 times (Japanese).
SHORTEST, LONGEST = 0.4, 1.5
OWN_SCRIPT = 0.5  # least part of a record's letters; the least of those records is 0.81 (Russian, names of products)
OWN_SCRIPT_OF_ONE = 0.25  # of one text's letters, where it has ENOUGH_LETTERS; there 0.72 (Japanese, such names)
ENOUGH_LETTERS = 20
TASK_CHARACTERS = (8, 400)  # of one brainstormed sentence
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def check_record(
    text: str, prompt: Prompt, kind: Kind, languages: Languages, *, scripts: bool = True
) -> dict[str, object] | Rejection:
    """Make a record of the reply to a generate request.

    scripts: whether the letters must be of the language's script.
    Returns the line that records.read_records takes, without id and source, or why there is none.
    """
    response = read_reply(text)
    if isinstance(response, Rejection):
        return response
    if not isinstance(response, dict):
        return Rejection("wrong_type", "a list where an object was asked for")
    fields = {"kind": kind.kind, "task": prompt.task, "language": prompt.language, "params": prompt.params}
    return check_fields({**fields, "response": response}, kind, languages, scripts=scripts)


def check_fields(
    fields: dict[str, object], kind: Kind, languages: Languages, *, scripts: bool = True
) -> dict[str, object] | Rejection:
    """Check a whole record: its response against its own params and language, whoever wrote it.

    fields: kind, task, language, params and response, as in a line of data/synthetic.
    Returns the record with its texts in NFC and stripped, the response's keys in their order, or a Rejection.
    """
    texts = _texts(fields["response"], kind.response_keys)
    if isinstance(texts, Rejection):
        return texts
    spoken = spoken_in(str(fields["language"]), kind.response_keys)
    tested = (
        _same(texts),
        _labels(texts) if kind.kind == "long_short" else None,
        _lengths(texts, fields["params"], kind, {key: languages.known.get(spoken[key]) for key in texts}),
        _scripts(texts, spoken, languages) if scripts else None,
    )
    fault = next((rejection for rejection in tested if rejection is not None), None)
    return {**fields, "response": texts} if fault is None else fault


def check_tasks(text: str) -> list[str] | Rejection:
    """Make a list of tasks of the reply to a brainstorm request: distinct, in the reply's order.

    A bare list is taken too. Entries that are no string, blank, or far from a sentence in length are left out.
    """
    reply = read_reply(text)
    if isinstance(reply, Rejection):
        return reply
    if isinstance(reply, dict):
        if set(reply) != {TASKS_KEY}:
            return Rejection("wrong_keys", _listed(reply))
        reply = reply[TASKS_KEY]
    if not isinstance(reply, list):
        return Rejection("wrong_type", "tasks is no list")
    tasks: dict[str, str] = {}
    for entry in reply:
        sentence = _clean(entry, "task")
        if isinstance(sentence, str):
            sentence = " ".join(sentence.split())
            if TASK_CHARACTERS[0] <= len(sentence) <= TASK_CHARACTERS[1]:
                tasks.setdefault(normalised(sentence), sentence)
    return list(tasks.values()) or Rejection("no_tasks", f"{len(reply)} entries")


def spoken_in(language: str, keys: Sequence[str]) -> dict[str, str]:
    """Return the language of each text: of "German->English", German for the first, English for the others."""
    first, pair, others = language.partition(PAIR)
    return {key: others if pair and i else first for i, key in enumerate(keys)}


def count_words(text: str, language: Language | None) -> float:
    """Return the number of words of a text, estimated from its letters where the script has no spaces."""
    if language is None or language.letters_per_word is None:
        return len(text.split())
    letters = sum(unicodedata.category(character)[0] in "LMN" for character in text)
    return letters / language.letters_per_word


def _texts(response: object, keys: Sequence[str]) -> dict[str, str] | Rejection:
    if not isinstance(response, dict) or set(response) != set(keys):
        return Rejection("wrong_keys", _listed(response) if isinstance(response, dict) else "no object")
    texts: dict[str, str] = {}
    for key in keys:
        text = _clean(response[key], key)
        if isinstance(text, Rejection):
            return text
        texts[key] = text
    return texts


def _clean(value: object, key: str) -> str | Rejection:
    if not isinstance(value, str):
        return Rejection("wrong_type", key)
    if not value.strip():
        return Rejection("empty_text", key)
    try:
        text = checked_text(value, "reply", key).strip()
    except BrokenRecord as error:
        return Rejection("bad_unicode", str(error))
    return Rejection("bad_unicode", key) if CONTROL.search(text) else text


def _same(texts: dict[str, str]) -> Rejection | None:
    seen: dict[str, str] = {}
    for key, text in texts.items():
        form = normalised(text)
        if form in seen:
            return Rejection("same_text", f"{seen[form]} = {key}")
        seen[form] = key
    return None


def _labels(texts: dict[str, str]) -> Rejection | None:
    text, *labels = (" ".join(unicodedata.normalize("NFKC", value).casefold().split()) for value in texts.values())
    for key, label in zip(RESPONSE_KEYS["long_short"][1:], labels, strict=True):
        # Whole words only, so that "no" is not found in "now"; scripts without spaces have no such border.
        before, after = (r"(?<!\w)" if _spaced(label[0]) else ""), (r"(?!\w)" if _spaced(label[-1]) else "")
        if re.search(before + re.escape(label) + after, text):
            return Rejection("label_in_text", key)
    return None


def _spaced(character: str) -> bool:
    return script_of(character) not in ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


def _lengths(
    texts: dict[str, str], params: object, kind: Kind, languages: dict[str, Language | None]
) -> Rejection | None:
    for words in kind.words:
        value = "*" if not words.by else str(params.get(words.by)) if isinstance(params, dict) else ""
        bounds = words.bounds.get(value, ())
        for key in words.of if bounds else ():
            n_words = count_words(texts[key], languages[key])
            if n_words < SHORTEST * bounds[0]:
                return Rejection("too_short", f"{key}: {n_words:.0f} of {bounds[0]} words")
            if len(bounds) == 2 and n_words > math.ceil(LONGEST * bounds[1]):
                return Rejection("too_long", f"{key}: {n_words:.0f} of at most {bounds[1]} words")
    return None


def _scripts(texts: dict[str, str], spoken: dict[str, str], languages: Languages) -> Rejection | None:
    """Compare the letters of all texts in a language, and of each long enough one, with the language's scripts."""
    for name in dict.fromkeys(spoken.values()):
        language = languages.known.get(name)
        if language is None or not language.scripts:
            continue
        together: Counter[str] = Counter()
        for key in (key for key in texts if spoken[key] == name):
            letters = Counter(script_of(character) for character in texts[key] if character.isalpha())
            together += letters
            if letters.total() >= ENOUGH_LETTERS and _share(letters, language.scripts) < OWN_SCRIPT_OF_ONE:
                return Rejection("wrong_language", f"{key}: {_share(letters, language.scripts):.2f} {name}")
        if (share := _share(together, language.scripts)) < OWN_SCRIPT:
            return Rejection("wrong_language", f"{share:.2f} {name}")
        if language.needs and together.total() >= ENOUGH_LETTERS and not any(together[s] for s in language.needs):
            return Rejection("wrong_language", f"{name} without {' or '.join(language.needs)}")
    return None


def _share(letters: Counter[str], scripts: Sequence[str]) -> float:
    return sum(letters[script] for script in scripts) / max(letters.total(), 1)


@functools.lru_cache(maxsize=8192)
def script_of(character: str) -> str:
    """Return the first word of a letter's Unicode name, which is its script: LATIN, CYRILLIC, CJK, HIRAGANA."""
    words = re.split("[ -]", unicodedata.name(character, "NONE"))
    if words[0] in ("FULLWIDTH", "HALFWIDTH") and len(words) > 1:
        return words[1]
    return "CJK" if words[0] == "IDEOGRAPHIC" else words[0]


def _listed(response: dict[str, object]) -> str:
    return (", ".join(sorted(response)) or "none")[:200]
