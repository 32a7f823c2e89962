"""The words of the chat API: where a request goes, what it says and the most it can cost, and what an answer means.

Nothing here sends anything. Addresses: OpenAI's and every server that speaks like it (base_url + "/chat/completions",
Authorization: Bearer), and Azure OpenAI's (deployment path, api-version, api-key header).

What an answer means: text, or an error by a reason code, whether asking again can help, and the tokens that it is known
to have cost. Reason codes of this room and the client:

    worth asking again   rate_limited (429), timeout, connection (refused, reset or closed before the answer's end),
                         http_NNN of TRY_LATER and 5xx; of 200: not_json, error_body, no_choice
    final                quota, content_filter, truncated, no_text, too_large, any other http_NNN
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from e5core.synth.settings import ModelConfig

HIDDEN_TOKENS = 256  # allowed for what a server's chat template adds (system prompts of today's models: under 100)
NEVER_RUN = (400, 401, 402, 403, 404, 405, 413, 415, 422, 429)  # refused at the door, so nothing was billed
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # json.dumps would make one for every request
TRY_LATER = (408, 409, 425)  # and 5xx


class Answer(NamedTuple):
    """What came of one attempt."""

    text: str | None = None
    error: str | None = None  # reason code
    detail: str = ""  # the server's own words about the error
    usage: tuple[int, int] | None = None  # tokens read and written; None: not known
    again: bool = False  # may the next attempt succeed?
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """Where a model's requests go."""

    url: str
    headers: Mapping[str, str] = field(repr=False)  # with the key
    model_in_body: bool


def route(model: ModelConfig, key: str) -> Route:
    """Return the address and headers of a model; key: "" where the server wants none."""
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if model.azure is None:
        if key:
            headers["Authorization"] = f"Bearer {key}"
        return Route(f"{model.base_url.rstrip('/')}/chat/completions", headers, True)
    if key:
        headers["api-key"] = key
    folder = f"{model.azure.endpoint.rstrip('/')}/openai/deployments/{model.azure.deployment}"
    return Route(f"{folder}/chat/completions?api-version={model.azure.api_version}", headers, False)


def body(
    model: ModelConfig,
    messages: tuple[dict[str, str], ...],
    schema: dict[str, Any] | None,
    max_output_tokens: int,
    *,
    with_model: bool,
) -> bytes:
    """Return the request's JSON.  Raises ValueError where the text is no Unicode (a lone surrogate)."""
    fields: dict[str, Any] = {"model": model.name} if with_model else {}
    fields["messages"] = messages
    fields[model.output_limit_key] = max_output_tokens
    fields["temperature"], fields["top_p"] = model.temperature, model.top_p
    if schema is not None and model.json_schema:
        form = {"name": "record", "strict": True, "schema": schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": form}
    return ENCODER.encode(fields).encode("utf-8")


def most_input_tokens(n_bytes: int) -> int:
    """Bound the tokens that a server can read in a body of n_bytes: no tokenizer makes more than one of a byte."""
    return n_bytes + HIDDEN_TOKENS


def read_answer(status: int, headers: Mapping[str, str], data: bytes) -> Answer:
    """Say what an HTTP answer means.  Never raises, whatever the bytes are."""
    if status == 200:
        return _read_success(data)
    error = _error_of(_loads(data))
    code, detail = str(error.get("code") or ""), _words(error.get("message"), data)
    if _is_filter(error):
        # Azure bills the prompt that its filter refuses, and does not say how much.
        return Answer(error="content_filter", detail=detail)
    usage = (0, 0) if status in NEVER_RUN else None
    if status == 429:
        reason = "quota" if code == "insufficient_quota" else "rate_limited"
        return Answer(None, reason, detail, usage, reason == "rate_limited", retry_after_s(headers))
    again = status in TRY_LATER or status >= 500
    return Answer(None, f"http_{status}", detail, usage, again, retry_after_s(headers) if again else None)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the pause in seconds that a server asks for, as a number or a date; None where it asks for none."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        try:
            seconds = float(value) * scale
        except ValueError:
            continue
        if seconds >= 0:  # NaN is not
            return seconds
    try:
        until = parsedate_to_datetime(headers.get("retry-after", ""))
    except (ValueError, OverflowError):
        return None
    return max(0.0, (until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _read_success(data: bytes) -> Answer:
    fields = _loads(data)
    if not isinstance(fields, dict):
        return Answer(error="not_json", detail=_words(None, data), again=True)
    usage = _usage_of(fields)
    if fields.get("error"):
        error = _error_of(fields)
        if _is_filter(error):
            return Answer(error="content_filter", detail=_words(error.get("message"), data), usage=usage)
        return Answer(error="error_body", detail=_words(error.get("message"), data), usage=usage, again=True)
    choices = fields.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return Answer(error="no_choice", detail=_words(None, data), usage=usage, again=True)
    message, finish = choice.get("message"), choice.get("finish_reason")
    text = message.get("content") if isinstance(message, dict) else None
    text = text if isinstance(text, str) and text else None
    if finish == "content_filter":
        return Answer(text, "content_filter", usage=usage)
    if text is None:
        return Answer(error="no_text", detail=_words(None, data), usage=usage)
    return Answer(text, "truncated" if finish == "length" else None, usage=usage)


def _loads(data: bytes) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):  # RecursionError: thousands of brackets
        return None


def _error_of(fields: object) -> dict[str, Any]:
    error = fields.get("error") if isinstance(fields, dict) else None
    return error if isinstance(error, dict) else {"message": error}


def _is_filter(error: Mapping[str, Any]) -> bool:
    return "content_filter" in (error.get("code"), error.get("type"), error.get("param"))


def _usage_of(fields: Mapping[str, Any]) -> tuple[int, int] | None:
    usage = fields.get("usage")
    if not isinstance(usage, dict):
        return None
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    if any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 2**53 for n in counts):
        return None
    return counts


def _words(message: object, data: bytes) -> str:
    """The server's message, or its whole body, on one line; to be cut once keys are struck out."""
    text = message if isinstance(message, str) else data.decode("utf-8", "replace")
    return " ".join(text.split())
