"""The config of a synthetic-data run: what to write, which models write it, how fast, and for how much at most.

    config = load_config(SynthConfig, Path("configs/synth.toml"))

An API key is never in a config: `api_key_env` names the environment variable that holds it. Prices and the money of
the budget are in one currency of the reader's choice. Sampling defaults are the paper's (arXiv 2401.00368 section 4.1).
"""

import re
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field

Positive = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(min_length=1)]
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig:
    """The [synth] table."""

    out: Name  # folder of the run: store, ledger, report, records.jsonl
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    n_records: Annotated[int, Field(ge=1)]  # accepted records to stop at; may be raised in a later run
    examples_per_task: Positive = 2.0  # of brainstormed tasks (paper: 319k examples of asymmetric kinds, 150k tasks)


@dataclass(frozen=True, kw_only=True, slots=True)
class AzureConfig:
    """A [models.azure] table, of the last [[models]]: the parts of an Azure OpenAI address."""

    endpoint: Name  # "https://NAME.openai.azure.com"
    deployment: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    api_version: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]  # "2024-10-21"

    def __post_init__(self) -> None:
        _check_address(self.endpoint, "endpoint")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """One [[models]] table: a model behind a chat-completions address."""

    name: Name  # as the API calls it; of an Azure deployment, the name that records and ledger show
    base_url: Name = "https://api.openai.com/v1"  # "/chat/completions" is appended
    azure: AzureConfig | None = None  # takes the place of base_url
    api_key_env: str = "OPENAI_API_KEY"  # environment variable that holds the key; "" for a server that wants none
    share: Positive = 1.0  # of the requests, relative to the other models' (paper: 75% and 25%)
    price_in: Annotated[float, Field(ge=0)] = 0.0  # money per million tokens read
    price_out: Annotated[float, Field(ge=0)] = 0.0  # money per million tokens written
    max_output_tokens: Annotated[int, Field(ge=1)] = 2048  # of one reply; a longer one is cut and rejected
    output_limit_key: Annotated[str, Field(pattern="^(max_tokens|max_completion_tokens)$")] = "max_tokens"
    json_schema: bool = False  # send `response_format`: the server then writes nothing but the schema's JSON
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0

    def __post_init__(self) -> None:
        _check_address(self.base_url, "base_url")
        if self.api_key_env and not VARIABLE.fullmatch(self.api_key_env):
            # The value is not shown: whoever takes the key for the variable's name would find it in a log.
            raise ValueError(
                "api_key_env must be the name of an environment variable (letters, digits, _), never the key itself"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitsConfig:
    """The [limits] table."""

    concurrency: Annotated[int, Field(ge=1, le=10_000)] = 64  # requests on the way at once, all models together
    requests_per_minute: Positive | None = None  # of each model; None: no limit
    tokens_per_minute: Positive | None = None  # of each model, as providers count: prompt / 4 bytes + longest reply
    timeout_s: Positive = 120.0  # of one attempt, from connecting to the last byte
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 8  # of one request; what is refused or broken is tried again
    backoff_s: Positive = 0.5  # longest first pause before a new attempt; doubles with each (full jitter)
    longest_pause_s: Positive = 60.0  # where doubling ends; a server that asks for more than 5 of it is given up


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetConfig:
    """The [budget] table: never exceeded, restarts included, by what a request may cost at most; None: no bound."""

    requests: Annotated[int, Field(ge=0)] | None = None  # attempts sent
    tokens: Annotated[int, Field(ge=0)] | None = None  # read and written
    money: Annotated[float, Field(ge=0)] | None = None  # needed where a model has a price


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundTripConfig:
    """The [checks.round_trip] table: keep a record if an embedding model finds its positive by its query."""

    model: Name  # run folder, Hugging Face folder or .gguf file, as `python -m e5core.encode` takes it
    top: Annotated[int, Field(ge=1)] = 1  # places among all positives at which the record's own must be


@dataclass(frozen=True, kw_only=True, slots=True)
class ChecksConfig:
    """The [checks] table."""

    near_duplicates: bool = False  # also drop records that nearly repeat another one's text
    scripts: bool = True  # drop texts in another script than their language's
    round_trip: RoundTripConfig | None = None  # None: no such filter, as in the paper


@dataclass(frozen=True, kw_only=True, slots=True)
class KindConfig:
    """One [[kinds]] table: a kind of record, described by a file of prompts."""

    name: Name  # of a file NAME.toml
    folder: str | None = None  # that holds the file; None, or where it does not: e5core/synth/kinds
    share: Positive = 1.0  # of the records, relative to the other kinds'


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """The [corpus] table: the user's own documents, of which a passage goes into the prompts."""

    path: Name  # folder of .txt, .md and .jsonl files ({"title", "text"}, as in a BEIR corpus)
    words: Annotated[int, Field(ge=10)] = 200  # of a passage at most
    share: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the requests that get a passage
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of the passages: their records make OUT/held_out, a test set


@dataclass(frozen=True, kw_only=True, slots=True)
class PersonaConfig:
    """The [persona] table: who the model is to be."""

    path: Name  # text file, a persona a line: "a nurse in a mountain village"
    share: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the requests that get one


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthConfig:
    """A whole run."""

    synth: StoreConfig
    models: Annotated[tuple[ModelConfig, ...], Field(min_length=1)]
    limits: LimitsConfig = LimitsConfig()
    budget: BudgetConfig = BudgetConfig()
    checks: ChecksConfig = ChecksConfig()
    kinds: Annotated[tuple[KindConfig, ...], Field(min_length=1)]
    languages: dict[str, Positive] = field(default_factory=dict)  # name to weight; empty: XLM-R's list, paper's weights
    corpus: CorpusConfig | None = None
    persona: PersonaConfig | None = None
    training: dict[str, Any] = field(default_factory=dict)  # a config of e5core.train, finished into OUT/train.toml

    def __post_init__(self) -> None:
        for table, names in (("models", [m.name for m in self.models]), ("kinds", [k.name for k in self.kinds])):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{table}: every name may stand once: got {twice[0]!r} {names.count(twice[0])} times")
        priced = [model.name for model in self.models if model.price_in or model.price_out]
        if priced and self.budget.money is None:
            raise ValueError(f"budget.money is needed, since {priced[0]} has a price; set it to what you would lose")
        if self.budget.money is not None and not priced:
            raise ValueError("budget.money would never bind: no model has a price; set models.price_in and price_out")


def _check_address(address: str, key: str) -> None:
    """Refuse what cannot be posted to, and addresses that carry a secret, without showing them."""
    parts = urlsplit(address)
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"{key} must hold no user name or password; name the key's variable in api_key_env")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        shown = parts._replace(query="", fragment="").geturl()  # a query may hold a key, too
        raise ValueError(f"{key} must be http(s)://HOST[:PORT][/PATH] without ? and #, got {shown!r}")
