"""What a run asks: every request as a pure function of the config, so that a rerun asks the same, in the same order.

Requests are numbered. The kind of a number is drawn by the kinds' shares, its model by the models' shares, and whatever
else a prompt needs by prompts.py; a kind's tasks are taken in turn, so that each becomes as many examples as any other.
"""

import bisect
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from e5core.config import existing
from e5core.synth.client import Request, choose_model, request_key
from e5core.synth.corpus import Corpus
from e5core.synth.languages import load_languages
from e5core.synth.prompts import Kind, Prompt, brainstorm_request, draw_index, draw_unit, generate_request, load_kind
from e5core.synth.settings import ModelConfig, SynthConfig

# What changes a model's replies; its address, price and key may change within a run
MODEL_DRAWS = ("name", "share", "max_output_tokens", "json_schema", "temperature", "top_p")
TRIAL_TASK = "Given a question, retrieve passages that answer it"  # of the prompts that are drawn to see if they can be


@dataclass(frozen=True, slots=True)
class Ask:
    """One request and what it was drawn from."""

    prompt: Prompt
    kind: Kind
    request: Request


class Plan:
    """The requests of a config."""

    def __init__(self, config: SynthConfig) -> None:
        """Read kinds, languages, corpus and personas.

        Raises ConfigError, ValueError or FileNotFoundError on what cannot be read, or where a kind cannot be drawn (a
        passage for a kind without `grounding`, a language pair from one language).
        """
        self._config = config
        self.kinds = {
            kind.name: load_kind(kind.name, Path(kind.folder) if kind.folder else None) for kind in config.kinds
        }
        self.languages = load_languages(weights=config.languages)
        corpus, persona = config.corpus, config.persona
        self.corpus = None if corpus is None else Corpus(existing(Path(corpus.path), "corpus.path"), corpus.words)
        self.personas = [] if persona is None else _read_personas(existing(Path(persona.path), "persona.path"))
        self._models = {model.name: model for model in config.models}
        self._bounds = list(itertools.accumulate(kind.share for kind in config.kinds))
        for kind in self.kinds.values():
            if kind.brainstorm is not None:
                self._brainstorm(kind, 0)
            self._generate(kind, kind.task or TRIAL_TASK, 0)

    def digests(self) -> dict[str, str]:
        """Return a digest of each part of the config that the requests hang on, by its table's name."""
        config = self._config
        weights = {kind.name: kind.share for kind in config.kinds}
        return {
            "synth.seed": str(config.synth.seed),
            "models": _digest([{key: asdict(model)[key] for key in MODEL_DRAWS} for model in config.models]),
            "kinds": _digest([[weights[name], asdict(kind)] for name, kind in self.kinds.items()]),
            "languages": _digest(self.languages.shares),
            "corpus": "" if config.corpus is None else _digest([config.corpus.share, *self._passage_ids()]),
            "persona": "" if config.persona is None else _digest([config.persona.share, *self.personas]),
        }

    def n_brainstorms(self) -> dict[str, int]:
        """Return how many lists of tasks to ask for, by kind: enough for examples_per_task, were all of them usable."""
        wanted = self._config.synth
        counts = {}
        for setting in self._config.kinds:
            step = self.kinds[setting.name].brainstorm
            if step is not None:
                n_examples = wanted.n_records * setting.share / self._bounds[-1]
                counts[setting.name] = math.ceil(n_examples / wanted.examples_per_task / step.n_tasks)
        return counts

    def brainstorms(self, counts: Mapping[str, int]) -> Iterator[Ask]:
        """Yield the requests for tasks.  counts: by kind."""
        for index in range(max(counts.values(), default=0)):
            for name, n_lists in counts.items():
                if index < n_lists:
                    yield self._brainstorm(self.kinds[name], index)

    def generates(
        self, first: int, last: int, n_tasks: Mapping[str, int], task: Callable[[str, int], str]
    ) -> Iterator[Ask]:
        """Yield the requests for examples with numbers from first to last - 1.

        n_tasks: by kind, of those that brainstorm.  task: of a kind's name and a number below its n_tasks.
        """
        n_before: Counter[str] = Counter()
        for index in range(last):
            point = draw_unit(self._config.synth.seed, "kind", index) * self._bounds[-1]
            kind = self.kinds[self._config.kinds[bisect.bisect_right(self._bounds, point)].name]
            place = n_before[kind.name]
            n_before[kind.name] += 1
            if index >= first:
                yield self._generate(kind, kind.task or task(kind.name, place % n_tasks[kind.name]), index)

    def _brainstorm(self, kind: Kind, index: int) -> Ask:
        seed = self._config.synth.seed
        return self._ask(brainstorm_request(kind, index, seed=seed, **self._added(kind, "brainstorm", index)), kind)

    def _generate(self, kind: Kind, task: str, index: int) -> Ask:
        seed, added = self._config.synth.seed, self._added(kind, "generate", index)
        return self._ask(generate_request(kind, task, index, seed=seed, languages=self.languages, **added), kind)

    def _added(self, kind: Kind, step: str, index: int) -> dict[str, str]:
        """Draw persona and passage of a request."""
        config, drawn = self._config, (self._config.synth.seed, kind.name, step, index)
        added: dict[str, str] = {}
        if config.persona is not None and draw_unit(*drawn, "with persona") < config.persona.share:
            added["persona"] = self.personas[draw_index(len(self.personas), *drawn, "persona")]
        if self.corpus is not None and draw_unit(*drawn, "with passage") < config.corpus.share:
            added["passage"] = self.corpus[draw_index(len(self.corpus), *drawn, "passage")].text
        return added

    def _ask(self, prompt: Prompt, kind: Kind) -> Ask:
        place = f"{kind.name}/{prompt.step}/{prompt.index}"
        model = choose_model(self._config.models, self._config.synth.seed, place)
        key = request_key(_said(prompt, model), model.name, prompt.index)
        return Ask(prompt, kind, Request(key, model.name, prompt.messages, prompt.schema))

    def _passage_ids(self) -> Iterator[str]:
        return (self.corpus[i].id for i in range(len(self.corpus)))


def _said(prompt: Prompt, model: ModelConfig) -> dict[str, object]:
    """What a model is sent, in JSON's types."""
    sampling = {"max_tokens": model.max_output_tokens, "temperature": model.temperature, "top_p": model.top_p}
    return {"messages": list(prompt.messages), "schema": prompt.schema if model.json_schema else None, **sampling}


def _read_personas(path: Path) -> list[str]:
    personas = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not personas:
        raise ValueError(f"persona.path: {path} holds no line; write a persona a line, such as: a nurse in a village")
    return personas


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode("ascii"), digest_size=8).hexdigest()
