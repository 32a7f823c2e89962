"""The chat API's words: what is sent, and what every answer means, without a server."""

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from e5core.synth.settings import AzureConfig, ModelConfig
from e5core.synth.wire import Answer, body, most_input_tokens, read_answer, retry_after_s, route

MODEL = ModelConfig(name="m", base_url="http://localhost:8000/v1/", json_schema=True, temperature=0.7, top_p=0.9)
AZURE = AzureConfig(endpoint="https://x.openai.azure.com/", deployment="d", api_version="2024-10-21")
MESSAGES = ({"role": "user", "content": "schreib, über 書く"},)
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
USAGE = {"prompt_tokens": 7, "completion_tokens": 3}


def success(choice: object = None, usage: object = USAGE, **more: object) -> bytes:
    choice = {"message": {"content": "text"}, "finish_reason": "stop"} if choice is None else choice
    return json.dumps({"choices": [choice], "usage": usage, **more}).encode()


def test_openai_gets_bearer_azure_gets_api_key_and_a_local_server_gets_none() -> None:
    ours = route(MODEL, "k" * 20)
    assert ours.url == "http://localhost:8000/v1/chat/completions" and ours.model_in_body
    assert ours.headers["Authorization"] == "Bearer " + "k" * 20 and "api-key" not in ours.headers
    azure = route(ModelConfig(name="m", azure=AZURE), "k" * 20)
    assert azure.url == "https://x.openai.azure.com/openai/deployments/d/chat/completions?api-version=2024-10-21"
    assert azure.headers["api-key"] == "k" * 20 and "Authorization" not in azure.headers and not azure.model_in_body
    assert not {"Authorization", "api-key"} & set(route(MODEL, "").headers)
    assert "kkk" not in repr(ours) + repr(azure)


def test_the_body_holds_what_the_config_says_and_the_schema_only_where_the_server_has_it() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "record", "strict": True, "schema": SCHEMA}}
    wanted = {"model": "m", "messages": list(MESSAGES), "max_tokens": 9, "temperature": 0.7, "top_p": 0.9}
    assert json.loads(body(MODEL, MESSAGES, SCHEMA, 9, with_model=True)) == wanted | {"response_format": form}
    assert json.loads(body(MODEL, MESSAGES, None, 9, with_model=True)) == wanted
    plain = ModelConfig(name="m", output_limit_key="max_completion_tokens")
    fields = json.loads(body(plain, MESSAGES, SCHEMA, 9, with_model=False))
    assert fields.keys() == {"messages", "max_completion_tokens", "temperature", "top_p"}
    with pytest.raises(ValueError, match="surrogates not allowed"):
        body(MODEL, ({"role": "user", "content": "\ud800"},), None, 9, with_model=True)


def test_no_prompt_can_have_more_tokens_than_its_bound() -> None:
    for text in ("a" * 100, "書" * 100, "\u0007" * 100, "🦊" * 100, '"\\' * 100):
        n_bytes = len(body(MODEL, ({"role": "user", "content": text},), None, 9, with_model=True))
        assert most_input_tokens(n_bytes) >= len(text.encode()) + 256  # a token of every byte, and a chat template


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (success(), Answer("text", None, usage=(7, 3))),
        (success(usage=None), Answer("text", None)),
        (success(usage={"prompt_tokens": 7}), Answer("text", None)),
        (success(usage={"prompt_tokens": True, "completion_tokens": 3}), Answer("text", None)),
        (success(usage={"prompt_tokens": -7, "completion_tokens": 3}), Answer("text", None)),
        (success({"message": {"content": "te"}, "finish_reason": "length"}), Answer("te", "truncated", usage=(7, 3))),
        (success({"message": {"content": "te"}, "finish_reason": None}), Answer("te", None, usage=(7, 3))),
        (
            success({"message": {"content": None}, "finish_reason": "content_filter"}),
            Answer(None, "content_filter", usage=(7, 3)),
        ),
    ],
)
def test_a_success_gives_its_text_and_its_usage_where_that_is_sound(data: bytes, wanted: Answer) -> None:
    assert read_answer(200, {}, data) == wanted


@pytest.mark.parametrize(
    ("status", "data", "error", "usage", "again"),
    [
        (200, success()[:40], "not_json", None, True),
        (200, b"", "not_json", None, True),
        (200, b"[]", "not_json", None, True),
        (200, b"[" * 100_000, "not_json", None, True),
        (200, b"\xff\xfe\x00", "not_json", None, True),
        (200, b'{"error": {"message": "overloaded"}}', "error_body", None, True),
        (200, b'{"error": "overloaded"}', "error_body", None, True),
        (200, b'{"error": {"code": "content_filter"}}', "content_filter", None, False),
        (200, b'{"choices": []}', "no_choice", None, True),
        (
            200,
            b'{"choices": {"a": 1}, "usage": {"prompt_tokens": 7, "completion_tokens": 0}}',
            "no_choice",
            (7, 0),
            True,
        ),
        (200, success({"message": {"content": ""}, "finish_reason": "stop"}), "no_text", (7, 3), False),
        (200, success({"message": {"refusal": "no"}}), "no_text", (7, 3), False),
        (200, success({"message": "text"}), "no_text", (7, 3), False),
        (429, b"", "rate_limited", (0, 0), True),
        (429, b'{"error": {"code": "insufficient_quota"}}', "quota", (0, 0), False),
        (400, b'{"error": {"message": "bad schema"}}', "http_400", (0, 0), False),
        (400, b'{"error": {"code": "content_filter"}}', "content_filter", None, False),
        (401, b"no", "http_401", (0, 0), False),
        (404, b"<html>", "http_404", (0, 0), False),
        (307, b"", "http_307", None, False),
        (408, b"", "http_408", None, True),
        (500, b"{", "http_500", None, True),
        (502, b"<html>", "http_502", None, True),
        (529, b"", "http_529", None, True),
    ],
)
def test_every_other_answer_has_a_reason_a_charge_and_a_next_step(
    status: int, data: bytes, error: str, usage: tuple[int, int] | None, again: bool
) -> None:
    answer = read_answer(status, {}, data)
    assert (answer.text, answer.error, answer.usage, answer.again) == (None, error, usage, again)


def test_the_servers_words_are_kept_on_one_line() -> None:
    said = json.dumps({"error": {"message": "max_tokens is not\nsupported"}}).encode()
    assert read_answer(400, {}, said).detail == "max_tokens is not supported"
    assert read_answer(502, {}, b"<h1>\n502 Bad\xff Gateway</h1>").detail == "<h1> 502 Bad\ufffd Gateway</h1>"


def test_retry_after_is_read_as_seconds_milliseconds_or_date() -> None:
    assert retry_after_s({"retry-after": "3"}) == 3.0
    assert retry_after_s({"retry-after": " 0.5 "}) == 0.5
    assert retry_after_s({"retry-after": "9", "retry-after-ms": "250"}) == 0.25
    for value in ({}, {"retry-after": ""}, {"retry-after": "soon"}, {"retry-after": "-1"}, {"retry-after": "nan"}):
        assert retry_after_s(value) is None
    now = datetime.now(UTC)
    assert retry_after_s({"retry-after": format_datetime(now + timedelta(seconds=60), usegmt=True)}) > 50
    assert retry_after_s({"retry-after": format_datetime(now - timedelta(seconds=60), usegmt=True)}) == 0.0
    assert read_answer(429, {"retry-after": "3"}, b"").retry_after_s == 3.0
    assert read_answer(503, {"retry-after": "3"}, b"").retry_after_s == 3.0
