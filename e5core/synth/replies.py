"""Read the JSON of a reply, whatever stands around it: by json.loads, and never by running anything.

Forgiven are code fences, prose before and after, a reasoning model's thoughts, commas before a closing bracket and raw
line breaks within strings. A key that stands twice is not, since nobody can say which was meant.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass

REASONS = {
    "no_json": "the reply holds no JSON object",
    "cut_json": "the reply ends within its JSON",
    "bad_json": "the reply's JSON has a fault that is not repaired",
    "wrong_keys": "keys are missing, unknown or twice",
    "wrong_type": "a value is not of the type that was asked for",
    "empty_text": "a text is blank",
    "bad_unicode": "a text holds half a surrogate pair or a control character",
    "too_short": "a text is much shorter than asked",
    "too_long": "a text is much longer than asked",
    "label_in_text": "the text to classify holds one of its labels",
    "same_text": "two texts of the record are the same",
    "wrong_language": "letters are of another script than the language's",
    "no_tasks": "no usable task in the list",
    "duplicate": "another record of the store has the same texts",
    "near_duplicate": "another record of the store has nearly the same texts",
    "contaminated": "a text occurs in an evaluation set",
}
MAX_STARTS = 8  # places that are tried before a reply counts as prose
THOUGHTS, THOUGHTS_END = "<think>", "</think>"
START = re.compile(r"""\{(?=\s*["'])|\[(?=\s*["'\[{])""")  # so that [1] and {so} in prose are passed over
OPENING, CLOSING = "{[", {"{": "}", "[": "]"}


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a reply is not used."""

    reason: str  # a key of REASONS
    detail: str = ""


class _TwiceError(ValueError):
    """A key stands twice in an object."""


def read_reply(text: str) -> dict[str, object] | list[object] | Rejection:
    """Return the first JSON object or list of a reply, or a Rejection: no_json, cut_json, bad_json or wrong_keys."""
    if text.lstrip().startswith(THOUGHTS):
        _, closed, text = text.partition(THOUGHTS_END)
        if not closed:
            return Rejection("cut_json", "the reply ends within its thoughts")
    fault, place = Rejection("no_json"), 0
    for _ in range(MAX_STARTS):
        start = START.search(text, place)
        if start is None:
            break
        block, place = _block(text, start.start())
        if place > len(text):
            return Rejection("cut_json", f"after {len(text) - start.start()} characters")
        try:
            return json.loads(block, object_pairs_hook=_object, parse_constant=_no_number, strict=False)
        except _TwiceError as error:
            return Rejection("wrong_keys", str(error))
        except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
            fault = Rejection("bad_json", str(error)[:200])
    return fault


def _block(text: str, start: int) -> tuple[str, int]:
    """Return the JSON from start to its closing bracket, less commas before closing brackets, and the place after it.

    The place is beyond the text where that ends first; where brackets cross, the block ends with the wrong one.
    """
    kept: list[str] = []
    waiting: list[str] = []
    in_string = escaped = False
    comma = -1  # where in `kept` a comma stands with nothing but white space after it
    for place in range(start, len(text)):
        character = text[place]
        kept.append(character)
        if in_string:
            in_string = escaped or character != '"'
            escaped = character == "\\" and not escaped
            continue
        if character in "}]":
            if comma >= 0:
                kept[comma] = ""
            if character != waiting.pop() or not waiting:
                return "".join(kept), place + 1
        elif character in OPENING:
            waiting.append(CLOSING[character])
        in_string = character == '"'
        if not character.isspace():
            comma = len(kept) - 1 if character == "," else -1
    return "".join(kept), len(text) + 1


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _TwiceError(f"{twice[:40]!r} twice")
    return found


def _no_number(name: str) -> None:
    """Take NaN and Infinity, which are no JSON, for null."""
