"""Ask chat APIs: many requests at once, at an allowed pace, again where it helps, never beyond the budget.

    async with Client(config.models, config.limits, ledger, seed) as client:
        reply = await client.ask(Request(request_key(...), "gpt-4o", messages))

`ask` waits for a free slot and for the model's pace, writes the most that the attempt can cost to the ledger, sends it,
settles, and pauses before the next attempt without a slot. So nothing waits for the slowest of a group. Pauses are
random up to a doubling limit (full jitter); where the server names a Retry-After, that and a little more.

The key of an API is read from the environment variable that the config names, when the client is entered. It goes into
the requests' headers and nowhere else; where a server repeats it, it is struck out of what comes back.
"""

import asyncio
import bisect
import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp

from e5core.synth.ledger import BudgetSpent, Charge, Ledger, price
from e5core.synth.prompts import draw_unit
from e5core.synth.settings import LimitsConfig, ModelConfig
from e5core.synth.wire import Answer, Route, body, most_input_tokens, read_answer, route

LARGEST_ANSWER_BYTES = 1 << 24
SECRET_LENGTH = 16  # shorter keys are place-holders of local servers ("none"), which may well occur in a text
RAMP_S = 0.5  # from the first slot's first request to the last one's
BURST_S = 1.0  # what a pace may catch up after a lull
DETAIL_LENGTH = 300
PATIENCE = 5  # times limits.longest_pause_s: a server that asks for a longer pause is given up


@dataclass(frozen=True, slots=True)
class Request:
    """One reply to ask for."""

    key: str  # of request_key
    model: str
    messages: tuple[dict[str, str], ...]
    schema: dict[str, Any] | None = None  # sent where the model's json_schema is on
    max_output_tokens: int = 0  # 0: the model's


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of a request."""

    key: str
    model: str
    text: str | None  # may stand beside the errors "truncated" and "content_filter"
    error: str | None  # reason code, see e5core.synth.wire; None: text is a whole reply
    input_tokens: int  # of the last attempt, as the server counts; 0 where it does not say
    output_tokens: int
    attempts: int
    detail: str = ""  # the server's words about the error
    again: bool = False  # a later run may get an answer


def request_key(request: Mapping[str, Any], model: str, draw: int) -> str:
    """Name a request: the same request, model and draw index (the same prompt may be drawn often) give the same key.

    request: what is asked, in JSON's types.  Returns 40 hexadecimal digits.
    """
    text = json.dumps([request, model, draw], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode("ascii"), digest_size=20).hexdigest()


def choose_model(models: Sequence[ModelConfig], seed: int, place: str) -> ModelConfig:
    """Draw a model by the shares, as a pure function of (seed, place); place: e.g. "short_long/17"."""
    bounds = list(itertools.accumulate(model.share for model in models))
    return models[bisect.bisect_right(bounds, draw_unit(seed, place) * bounds[-1])]


def pause_s(limits: LimitsConfig, seed: int, key: str, attempt: int, asked_s: float | None) -> float | None:
    """Return how long to pause after an attempt (from 1), as a pure function; None where the server asks for too much.

    asked_s: the server's Retry-After.
    """
    jitter = draw_unit(seed, key, attempt)
    if asked_s is None:
        return jitter * min(limits.longest_pause_s, limits.backoff_s * 2 ** (attempt - 1))
    return None if asked_s > PATIENCE * limits.longest_pause_s else asked_s + jitter * limits.backoff_s


class Pace:
    """A token bucket: amounts that flow at a steady rate, and at most BURST_S of it at once after a lull."""

    def __init__(self, per_minute: float | None) -> None:
        self._per_s = None if per_minute is None else per_minute / 60
        self._next = 0.0  # when the bucket has paid for everything that was taken

    def take(self, amount: float, now: float) -> float:
        """Take an amount in turn.  Returns the seconds to wait before it may be used."""
        if self._per_s is None:
            return 0.0
        start = max(self._next, now - BURST_S)
        self._next = start + amount / self._per_s
        return max(0.0, start - now)


@dataclass(slots=True)
class _Line:
    """A model and what its requests need at hand."""

    config: ModelConfig
    route: Route
    requests: Pace
    tokens: Pace


class Client:
    """Asks the models of a config; enter it before asking."""

    def __init__(self, models: Sequence[ModelConfig], limits: LimitsConfig, ledger: Ledger, seed: int) -> None:
        self.faults: Counter[str] = Counter()  # reason codes of all attempts
        self._models = tuple(models)
        self._limits = limits
        self._ledger = ledger
        self._seed = seed
        self._lines: dict[str, _Line] = {}
        self._secrets: tuple[str, ...] = ()
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._settled = asyncio.Event()
        self._n_started = 0
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        """Read the keys and open the connections' pool.  Raises RuntimeError naming a variable that is not set."""
        keys = {model.name: _read_key(model) for model in self._models}
        self._secrets = tuple({key for key in keys.values() if len(key) >= SECRET_LENGTH})
        for model in self._models:
            paces = Pace(self._limits.requests_per_minute), Pace(self._limits.tokens_per_minute)
            self._lines[model.name] = _Line(model, route(model, keys[model.name]), *paces)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # the slots bound it
            timeout=aiohttp.ClientTimeout(total=self._limits.timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def ask(self, request: Request) -> Reply:
        """Ask until there is a reply, an error that asking again cannot cure, or no attempt left.

        Safe to cancel: what was on the way stays charged at its maximum.
        Returns the reply; whatever the server does is in it.  Raises BudgetSpent where the next attempt could exceed
        the budget, ValueError for text that is no Unicode, KeyError for a model that the config does not name.
        """
        line = self._lines[request.model]
        most_out = request.max_output_tokens or line.config.max_output_tokens
        data = body(line.config, request.messages, request.schema, most_out, with_model=line.route.model_in_body)
        most = price(line.config, most_input_tokens(len(data)), most_out)
        attempt = 1
        while True:
            async with self._slots:
                if self._n_started < self._limits.concurrency:
                    await self._start_slowly()
                await self._keep_pace(line, len(data) // 4 + most_out)
                await self._reserve(request.key, attempt, request.model, most)
                answer = await self._attempt(line, request.key, attempt, data)
            if answer.error is None:
                break
            self.faults[answer.error] += 1
            if not answer.again or attempt == self._limits.max_attempts:
                break
            wait_s = pause_s(self._limits, self._seed, request.key, attempt, answer.retry_after_s)
            if wait_s is None:
                break
            await asyncio.sleep(wait_s)
            attempt += 1
        return self._reply(request, answer, attempt)

    def _reply(self, request: Request, answer: Answer, attempt: int) -> Reply:
        text, detail = answer.text, answer.detail
        for secret in self._secrets:
            text, detail = text and text.replace(secret, "[key]"), detail.replace(secret, "[key]")
        n_in, n_out = answer.usage or (0, 0)
        detail = detail[:DETAIL_LENGTH]  # after the striking out: half a key is a leak, too
        return Reply(request.key, request.model, text, answer.error, n_in, n_out, attempt, detail, answer.again)

    async def _start_slowly(self) -> None:
        """Let each slot start a little later than the one before.

        Requests that leave together come back together, wait for each other on this core, and leave together again:
        at 256 slots and 500 ms, 95% of the possible rate instead of 99% (bench/synth.py, 2 busy cores).
        """
        self._n_started += 1
        await asyncio.sleep(RAMP_S * (self._n_started - 1) / self._limits.concurrency)

    async def _keep_pace(self, line: _Line, n_tokens: int) -> None:
        now = time.monotonic()
        wait_s = max(line.requests.take(1, now), line.tokens.take(n_tokens, now))
        if wait_s > 0:
            await asyncio.sleep(wait_s)

    async def _reserve(self, key: str, attempt: int, model: str, most: Charge) -> None:
        """Reserve, after what is on the way has been settled where only then the budget suffices."""
        while True:
            try:
                return self._ledger.reserve(key, attempt, model, most)
            except BudgetSpent:
                if not self._ledger.n_open:
                    raise
            self._settled.clear()
            await self._settled.wait()

    async def _attempt(self, line: _Line, key: str, attempt: int, data: bytes) -> Answer:
        """Send, and settle with what is known: on a cancellation, that is nothing."""
        charge = None
        try:
            answer = await self._send(line, f"{key}/{attempt}", data)
            if answer.usage is not None:
                charge = price(line.config, *answer.usage)
        finally:
            self._ledger.settle(key, attempt, charge)
            self._settled.set()
        return answer

    async def _send(self, line: _Line, name: str, data: bytes) -> Answer:
        headers = {
            **line.route.headers,
            "X-Client-Request-Id": name,
        }  # by which a provider's log can be held against the ledger
        try:
            # A redirect would carry the key to another address.
            async with self._session.post(
                line.route.url, data=data, headers=headers, allow_redirects=False
            ) as response:
                received = bytearray()
                async for chunk in response.content.iter_any():
                    received += chunk
                    if len(received) > LARGEST_ANSWER_BYTES:
                        response.close()
                        return Answer(error="too_large", detail=f"more than {LARGEST_ANSWER_BYTES} bytes")
                return read_answer(response.status, response.headers, bytes(received))
        except TimeoutError:
            return Answer(error="timeout", detail=f"over {self._limits.timeout_s} s", again=True)
        except aiohttp.ClientConnectorError as error:  # nothing was sent
            return Answer(error="connection", detail=str(error), usage=(0, 0), again=True)
        except (aiohttp.ClientError, OSError) as error:
            return Answer(error="connection", detail=f"{type(error).__name__}: {error}", again=True)


def _read_key(model: ModelConfig) -> str:
    if not model.api_key_env:
        return ""
    key = os.environ.get(model.api_key_env, "").strip()
    if not key:
        raise RuntimeError(
            f"model {model.name}: the environment variable {model.api_key_env} holds no key; set it, "
            'or write api_key_env = "" for a server that wants none'
        )
    if not (key.isascii() and key.isprintable()):
        raise RuntimeError(f"model {model.name}: the key in {model.api_key_env} has characters that no header can hold")
    return key
