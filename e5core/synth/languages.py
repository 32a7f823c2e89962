"""The languages that texts are asked in: how often each is drawn, and the script that its letters should have.

languages.toml holds them as data: the list of XLM-R (arXiv 1911.02116) with the weights of arXiv 2401.00368, figure 2,
and further names with weight 0, which are never drawn but whose script the checks know.
"""

import bisect
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from e5core.config import load_config
from e5core.records import nearest

Name = Annotated[str, Field(min_length=1)]
Weight = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Language:
    """One entry of the file."""

    name: Name
    weight: Weight | None = None  # None: an equal part of the file's `rest`
    scripts: tuple[str, ...] = ()  # first words of Unicode's letter names, such as LATIN; none: not checked
    needs: tuple[str, ...] = ()  # of these, at least one letter must be there
    letters_per_word: Annotated[float, Field(gt=0)] | None = None  # where words have no spaces between them


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageList:
    """The whole file."""

    rest: Weight = 1.0  # shared equally by the languages without a weight
    languages: Annotated[tuple[Language, ...], Field(min_length=1)]

    def __post_init__(self) -> None:
        names = [language.name for language in self.languages]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"languages: every name may stand once, got {twice[0]!r} {names.count(twice[0])} times")


class Languages:
    """What can be drawn, and what is known of every language."""

    def __init__(self, known: Mapping[str, Language], weights: Mapping[str, float]) -> None:
        """known: by name.  weights: by name, of those that can be drawn, all above 0; they need not add up to 1."""
        if not weights:
            raise ValueError("no language has a weight above 0: give at least one")
        self.known = dict(known)
        self.names = tuple(weights)
        self._bounds = tuple(itertools.accumulate(weights.values()))

    @property
    def shares(self) -> dict[str, float]:
        """Probability of every language that can be drawn, by name."""
        steps = zip(self.names, self._bounds, (0.0, *self._bounds[:-1]), strict=True)
        return {name: (high - low) / self._bounds[-1] for name, high, low in steps}

    def draw(self, unit: float) -> str:
        """Return the language at a point of [0, 1)."""
        return self.names[bisect.bisect_right(self._bounds, unit * self._bounds[-1])]

    def draw_other(self, unit: float, taken: str) -> str:
        """Return the language at a point of [0, 1) among all but one.

        Raises ValueError where there is no other.
        """
        others = {name: share for name, share in self.shares.items() if name != taken}
        if not others:
            raise ValueError(f"a pair of languages needs two to draw from, got {taken} only; add one to [languages]")
        return Languages({}, others).draw(unit)


def load_languages(path: Path | None = None, weights: Mapping[str, float] | None = None) -> Languages:
    """Read a list of languages.

    path: a file like languages.toml; None: the one of this package.
    weights: by name, instead of the file's; None or empty: the file's.
    Returns Languages.  Raises ConfigError on a bad file, ValueError on a weight for a name that the file does not hold
    (its nearest is named) or that is not above 0.
    """
    listed = load_config(LanguageList, Path(__file__).with_name("languages.toml") if path is None else path)
    known = {language.name: language for language in listed.languages}
    if weights:
        for name, weight in weights.items():
            if name not in known:
                raise ValueError(f"languages: unknown language {name!r}; {nearest(name, known)}")
            if not 0 < weight < math.inf:
                raise ValueError(f"languages.{name} must be above 0, got {weight}; leave it out to never draw it")
        return Languages(known, weights)
    n_rest = sum(language.weight is None for language in listed.languages)
    drawn = {
        language.name: listed.rest / n_rest if language.weight is None else language.weight
        for language in listed.languages
    }
    return Languages(known, {name: weight for name, weight in drawn.items() if weight > 0})
