"""What the model is asked: kinds of records as data, and requests drawn from them.

A kind is one TOML file (kinds/*.toml are ours: the four asymmetric and two symmetric ones of arXiv 2401.00368, appendix
C; a folder of the user's own may hold more). Asymmetric kinds take two steps: brainstorm a list of tasks, then generate
one example for one task; symmetric kinds have a fixed task and generate only.

Every draw is a pure function of (seed, kind, step, index, name of the draw): a rerun asks the same questions, in any
order and on any Python, and a placeholder added to a file leaves the draws of the others as they were.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from e5core.config import load_config
from e5core.records import RESPONSE_KEYS, nearest
from e5core.synth.corpus import passage_id
from e5core.synth.languages import Languages

PLACEHOLDER = re.compile(r"\{(\w+)\}")
TASKS_KEY = "tasks"  # of the object that a brainstorm reply is
PAIR = "->"  # between the two languages of a bitext record
NO_PLACEHOLDERS = {"task", "language", "src_lang", "tgt_lang", "target", "wording", "persona", "passage"}
Text = Annotated[str, Field(min_length=1)]
Value = str | int | float
Bounds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, max_length=2)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """How many words were asked of some texts: one [[words]] table."""

    of: Annotated[tuple[Text, ...], Field(min_length=1)]  # keys of the response
    by: str = ""  # the placeholder whose drawn value selects the bounds; "": those of "*"
    bounds: dict[str, Bounds]  # by value: (at least,) or (at least, at most)


@dataclass(frozen=True, kw_only=True, slots=True)
class Brainstorm:
    """The step that asks for tasks."""

    n_tasks: Annotated[int, Field(ge=1)] = 20  # asked of one reply
    n_examples: Annotated[int, Field(ge=0)] = 0  # of `examples`, drawn for each request
    examples: tuple[Text, ...] = ()
    wordings: Annotated[tuple[Text, ...], Field(min_length=1)]
    grounding: str = ""  # added where a passage of the user's corpus is given


@dataclass(frozen=True, kw_only=True, slots=True)
class Generate:
    """The step that asks for one example."""

    wordings: Annotated[tuple[Text, ...], Field(min_length=1)]
    grounding: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One file of prompts."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    kind: Literal["short_long", "long_short", "short_short", "long_long", "sts", "bitext"]  # of its records
    task: str = ""  # fixed instruction of the records; "": brainstormed
    placeholders: dict[str, Annotated[tuple[Value, ...], Field(min_length=1)]] = field(default_factory=dict)
    words: tuple[Words, ...] = ()
    brainstorm: Brainstorm | None = None
    generate: Generate

    def __post_init__(self) -> None:
        if (self.brainstorm is None) != bool(self.task):
            raise ValueError("a kind needs either a task or a [brainstorm] table, which is where tasks come from")
        _check_words(self)
        if self.brainstorm is not None:
            allowed = {"n_tasks"} | ({"examples"} if self.brainstorm.n_examples else set())
            _check_wordings("brainstorm", self.brainstorm.wordings, needed=allowed, keys=(TASKS_KEY,))
            _check_grounding("brainstorm", self.brainstorm.grounding)
            if self.brainstorm.n_examples > len(self.brainstorm.examples):
                raise ValueError(f"brainstorm.n_examples is more than the {len(self.brainstorm.examples)} examples")
        if taken := NO_PLACEHOLDERS.intersection(self.placeholders):
            raise ValueError(f"placeholders.{min(taken)}: this name is filled in by us; take another")
        own = set(self.placeholders) | (set() if self.task else {"task"})
        own |= {"src_lang", "tgt_lang"} if self.kind == "bitext" else {"language"}
        _check_wordings("generate", self.generate.wordings, needed=own, keys=self.response_keys)
        _check_grounding("generate", self.generate.grounding)

    @property
    def response_keys(self) -> tuple[str, ...]:
        """Keys of the object that a generate reply is."""
        return RESPONSE_KEYS[self.kind]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One request, before it is given a model."""

    kind: str  # name of the Kind
    step: Literal["brainstorm", "generate"]
    index: int  # of the draw, from 0
    messages: tuple[dict[str, str], ...]  # as a chat API takes them
    schema: dict[str, object]  # JSON schema of the reply
    task: str = ""  # of the record to come; generate only
    language: str = ""  # "German"; of bitext "German->English"; generate only
    params: dict[str, Value] = field(default_factory=dict)  # what was drawn, as the record will keep it


def load_kind(name: str, folder: Path | None = None) -> Kind:
    """Read the kind called name from folder/NAME.toml, or from this package's kinds where folder is None or has none.

    Raises ValueError where neither has it, ConfigError on a file that cannot be used.
    """
    own = Path(__file__).with_name("kinds")
    folders = [own] if folder is None else [folder, own]
    for place in folders:
        path = place / f"{name}.toml"
        if path.is_file():
            kind = load_config(Kind, path)
            if kind.name != name:
                raise ValueError(f"{path}: name must be the file's own, {name!r}, got {kind.name!r}")
            return kind
    known = sorted({path.stem for place in folders for path in place.glob("*.toml")})
    raise ValueError(f"unknown kind {name!r}; {nearest(name, known)}")


def draw_unit(seed: int, *names: str | int) -> float:
    """Return a number in [0, 1), the same for the same seed and names wherever and whenever it is asked for."""
    text = json.dumps([seed, *names], ensure_ascii=True)
    digest = hashlib.blake2b(text.encode("ascii"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53  # 53 bits: a float holds no more without rounding up to 1


def draw_index(n: int, seed: int, *names: str | int) -> int:
    """Return a number from 0 to n - 1; n is at least 1."""
    return int(draw_unit(seed, *names) * n)


def brainstorm_request(kind: Kind, index: int, *, seed: int, persona: str = "", passage: str = "") -> Prompt:
    """Draw the index-th request for tasks of a kind.

    persona: who the model is to be, as "a nurse in a village"; passage: text of the user's own corpus; "": neither.
    Raises ValueError if the kind's task is fixed.
    """
    step = kind.brainstorm
    if step is None:
        raise ValueError(f"kind {kind.name} has a fixed task and nothing to brainstorm; go on to generate")
    drawn = (seed, kind.name, "brainstorm", index)
    wording = draw_index(len(step.wordings), *drawn, "wording")
    examples = sorted(step.examples, key=lambda example: draw_unit(*drawn, "example", example))[: step.n_examples]
    listed = "For example:\n" + "\n".join(f"- {example}" for example in examples)
    text = _filled(step.wordings[wording], {"n_tasks": step.n_tasks, "examples": listed})
    params: dict[str, Value] = {"wording": f"{kind.name}/{wording}"}
    return Prompt(
        kind=kind.name,
        step="brainstorm",
        index=index,
        messages=_messages(text, step.grounding, kind.name, params, persona, passage),
        schema=_schema({TASKS_KEY: {"type": "array", "items": {"type": "string"}}}),
        params=params,
    )


def generate_request(
    kind: Kind, task: str, index: int, *, seed: int, languages: Languages, persona: str = "", passage: str = ""
) -> Prompt:
    """Draw the index-th request for an example of a kind.

    task: one sentence of the pool, or the kind's own; persona, passage: as of brainstorm_request.
    Returns a Prompt whose params hold every drawn value.
    Raises ValueError on a blank task, or on another than the kind's own.
    """
    if not task.strip() or (kind.task and task != kind.task):
        raise ValueError(f"kind {kind.name} cannot take the task {task!r}; {kind.task or 'a sentence'} is wanted")
    drawn = (seed, kind.name, "generate", index)
    params = {name: values[draw_index(len(values), *drawn, name)] for name, values in kind.placeholders.items()}
    language = languages.draw(draw_unit(*drawn, "language"))
    filling: dict[str, Value] = {**params, "task": task, "language": language}
    if kind.kind == "bitext":
        target = languages.draw_other(draw_unit(*drawn, "target"), language)
        filling |= {"src_lang": language, "tgt_lang": target}
        language = f"{language}{PAIR}{target}"
    wording = draw_index(len(kind.generate.wordings), *drawn, "wording")
    text = _filled(kind.generate.wordings[wording], filling)
    params["wording"] = f"{kind.name}/{wording}"
    return Prompt(
        kind=kind.name,
        step="generate",
        index=index,
        messages=_messages(text, kind.generate.grounding, kind.name, params, persona, passage),
        schema=_schema({key: {"type": "string"} for key in kind.response_keys}),
        task=task,
        language=language,
        params=params,
    )


def _messages(
    text: str, grounding: str, kind: str, params: dict[str, Value], persona: str, passage: str
) -> tuple[dict[str, str], ...]:
    """The chat of a request; what was added to it is noted in params."""
    messages: list[dict[str, str]] = []
    if persona:
        params["persona"] = persona
        messages.append({"role": "system", "content": f"You are {persona}. Let what you know and need show."})
    if passage:
        if not grounding:
            raise ValueError(f"kind {kind} has no grounding text for a passage: add `grounding` with {{passage}} to it")
        params["passage"] = passage_id(passage)
        text = f"{text}\n\n{_filled(grounding, {'passage': passage}).strip()}"
    messages.append({"role": "user", "content": text})
    return tuple(messages)


def _filled(wording: str, filling: dict[str, Value]) -> str:
    """Put values in the place of {name}; in one pass, so that braces within a value stay what they are."""
    return PLACEHOLDER.sub(lambda match: str(filling.get(match[1], match[0])), wording).strip()


def _schema(properties: dict[str, object]) -> dict[str, object]:
    # No lengths or counts: servers' strict modes differ in which of those keywords they take.
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _check_words(kind: Kind) -> None:
    for i, words in enumerate(kind.words):
        for key in words.of:
            if key not in kind.response_keys:
                raise ValueError(f"words[{i}].of: unknown key {key!r}; {nearest(key, kind.response_keys)}")
        if words.by and words.by not in kind.placeholders:
            raise ValueError(f"words[{i}].by: unknown placeholder {words.by!r}; {nearest(words.by, kind.placeholders)}")
        values = {str(value) for value in kind.placeholders[words.by]} if words.by else {"*"}
        if strange := sorted(set(words.bounds) - values):
            raise ValueError(f"words[{i}].bounds: {strange[0]!r} is never drawn; {nearest(strange[0], values)}")
        if any(len(bounds) == 2 and bounds[0] > bounds[1] for bounds in words.bounds.values()):
            raise ValueError(f"words[{i}].bounds: at least must not be above at most")


def _check_wordings(step: str, wordings: tuple[str, ...], *, needed: set[str], keys: tuple[str, ...]) -> None:
    for i, wording in enumerate(wordings):
        found = set(PLACEHOLDER.findall(wording))
        if found != needed:
            wrong = f"lacks {sorted(needed - found)}" if needed - found else f"has unknown {sorted(found - needed)}"
            raise ValueError(f"{step}.wordings[{i}] {wrong}; its placeholders must be {sorted(needed)}")
        if unnamed := [key for key in keys if f'"{key}"' not in wording]:
            raise ValueError(f'{step}.wordings[{i}] never names the key "{unnamed[0]}" of the reply, in quotes')


def _check_grounding(step: str, grounding: str) -> None:
    if grounding and set(PLACEHOLDER.findall(grounding)) != {"passage"}:
        raise ValueError(f"{step}.grounding must hold {{passage}} and no other placeholder")
