"""The client against a chat API that fails (tests/faulty_server.py, a process of its own): what it owes its callers."""

import asyncio
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from chat import (
    HANG,
    LIMITS,
    MESSAGES,
    SECRET,
    ask_all,
    assert_ledger_covers,
    bill,
    chat_server,
    first_answer,
    model,
    requests,
)
from faulty_server import FAULTS, FINAL, fault_of

from e5core.synth import client as client_room
from e5core.synth.client import BURST_S, Client, Pace, Reply, Request, choose_model, pause_s, request_key
from e5core.synth.ledger import BudgetSpent, Ledger, price
from e5core.synth.settings import AzureConfig, BudgetConfig, LimitsConfig
from e5core.synth.wire import body, most_input_tokens

ROOT = Path(__file__).resolve().parent.parent
ERRORS = {  # what a caller is told of each fault, after the last attempt
    "429": "rate_limited",
    "429_retry_after": "rate_limited",
    "500": "http_500",
    "502": "http_502",
    "dropped": "connection",
    "timeout": "timeout",
    "trickle": "timeout",
    "cut_body": "not_json",
    "cut_json": "truncated",
    "wrong_keys": None,
    "prose": None,
    "empty_choices": "no_choice",
    "content_filter": "content_filter",
    "error_body": "error_body",
}
LEAK = """
import asyncio, logging, sys
from pathlib import Path
from chat import LIMITS, MESSAGES, model, requests
from e5core.synth.client import Client
from e5core.synth.ledger import Ledger
from e5core.synth.settings import BudgetConfig, LimitsConfig
logging.basicConfig(level=1)
async def main():
    with Ledger(Path(sys.argv[1]), BudgetConfig()) as ledger:
        limits = LimitsConfig(**LIMITS | {"max_attempts": 2, "timeout_s": 0.5})
        async with Client((model(sys.argv[2], api_key_env="TEST_KEY"),), limits, ledger, 0) as client:
            sys.stdout.write(f"{client!r} {client._lines!r}")
            for reply in await asyncio.gather(*map(client.ask, requests(60))):
                sys.stdout.write(f"{reply!r}\\n")
asyncio.run(main())
"""


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    with Ledger(tmp_path / "ledger.jsonl", BudgetConfig()) as ledger:
        yield ledger


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_ends_as_a_reply_with_its_reason_and_a_true_charge(fault: str, ledger: Ledger) -> None:
    limits = LimitsConfig(**LIMITS | {"max_attempts": 2, "timeout_s": 0.5})
    with chat_server("--faults", "1", "--kinds", fault) as url:
        replies = ask_all((model(url),), limits, ledger, requests(4))
        billed = bill(url)
    for reply in replies:
        assert isinstance(reply, Reply) and reply.error == ERRORS[fault]
        assert (reply.attempts, reply.again) == ((1, False) if fault in FINAL else (2, True))
        assert (reply.text is not None) == (fault in FINAL)
    assert_ledger_covers(ledger.path, billed)
    assert ledger.n_open == 0 and ledger.spent.requests == billed["total"]["requests"]
    if fault in FINAL or fault.startswith("429"):
        assert ledger.spent[1:3] == (billed["total"]["input"], billed["total"]["output"])


def run_with_faults(path: Path, n: int) -> None:
    limits = LimitsConfig(**LIMITS, concurrency=64)
    with chat_server("--faults", "0.2", *HANG) as url, Ledger(path, BudgetConfig()) as ledger:
        asked = requests(n)
        replies = ask_all((model(url, price_in=2.5, price_out=10.0),), limits, ledger, asked)
        billed = bill(url)
        spent = ledger.spent
    for request, reply in zip(asked, replies, strict=True):
        attempts, fault = first_answer(0, 0.2, request.key)
        assert (reply.key, reply.attempts, reply.error) == (request.key, attempts, ERRORS[fault] if fault else None)
        assert reply.text and (json.loads(reply.text) if fault is None else True)
    assert_ledger_covers(path, billed)
    assert spent.requests == billed["total"]["requests"] == sum(reply.attempts for reply in replies)
    with Ledger(path, BudgetConfig()) as ledger:
        assert ledger.spent == spent
    assert billed["most_at_once"] <= 64


def test_with_a_fifth_of_faults_every_request_ends_as_the_server_wants_it_and_the_ledger_covers_it(
    tmp_path: Path,
) -> None:
    run_with_faults(tmp_path / "ledger.jsonl", 1200)


@pytest.mark.slow
def test_ten_thousand_requests_with_a_fifth_of_faults(tmp_path: Path) -> None:
    run_with_faults(tmp_path / "ledger.jsonl", 10_000)


def run_with_kills(folder: Path, n: int, n_kills: int, seed: int) -> None:
    draw = random.Random(seed)
    command = [sys.executable, str(ROOT / "tests/synth_client_process.py"), str(folder)]
    limits = json.dumps(LIMITS | {"concurrency": 32})
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    store = folder / "replies.jsonl"
    store.touch()
    with chat_server("--faults", "0.2", *HANG) as url:
        for kill_at in [*sorted(draw.sample(range(1, n - 40), n_kills)), None]:
            with subprocess.Popen([*command, url, str(n), limits], env=environment) as process:
                while kill_at is not None and process.poll() is None:
                    if store.read_bytes().count(b"\n") >= kill_at:
                        time.sleep(draw.random() * 0.05)
                        process.kill()
                        break
                    time.sleep(0.002)
            assert process.returncode == (0 if kill_at is None else -9)
            with Ledger(folder / "ledger.jsonl", BudgetConfig()) as ledger:
                assert_ledger_covers(ledger.path, bill(url))
                assert ledger.spent.requests >= bill(url)["total"]["requests"]
    rows = [json.loads(line) for line in store.read_text().splitlines()]
    assert len(rows) == len({row["key"] for row in rows}) == n
    with chat_server("--faults", "0.2", *HANG) as url, Ledger(folder / "undisturbed", BudgetConfig()) as ledger:
        replies = ask_all((model(url),), LimitsConfig(**LIMITS, concurrency=32), ledger, requests(n))
    undisturbed = {(reply.key, reply.text, reply.error, reply.attempts) for reply in replies}
    assert {(row["key"], row["text"], row["error"], row["attempts"]) for row in rows} == undisturbed


def test_killed_twice_the_ledger_covers_the_bill_and_the_replies_are_an_undisturbed_runs(tmp_path: Path) -> None:
    run_with_kills(tmp_path, n=400, n_kills=2, seed=0)


@pytest.mark.slow
def test_killed_ten_times_the_ledger_covers_the_bill_and_the_replies_are_an_undisturbed_runs(tmp_path: Path) -> None:
    run_with_kills(tmp_path, n=4000, n_kills=10, seed=1)


def test_requests_at_once_reach_the_limit_and_never_pass_it_on_as_few_connections(ledger: Ledger) -> None:
    with chat_server("--latency", "0.05") as url:
        ask_all((model(url),), LimitsConfig(concurrency=7), ledger, requests(100))
        billed = bill(url)
    assert billed["most_at_once"] == 7 and billed["connections"] == 7 and billed["total"]["requests"] == 100


@pytest.mark.parametrize(
    ("slots", "fault"),
    [(2, ["timeout", *HANG]), (1, ["429_retry_after", "--retry-after", "3"])],
    ids=["sent", "paused"],
)
def test_a_request_that_is_slow_or_pauses_holds_up_no_other(slots: int, fault: list[str], ledger: Ledger) -> None:
    share, seed, limits = 0.05, 0, LimitsConfig(**LIMITS | {"concurrency": slots, "longest_pause_s": 1.0})
    slow = next(r for r in requests(1000) if fault_of(seed, share, r.key, 1) and not fault_of(seed, share, r.key, 2))
    quick = [r for r in requests(1000, first=1000) if not fault_of(seed, share, r.key, 1)][:40]
    ended: list[str] = []

    async def run() -> None:
        async with Client((model(url),), limits, ledger, 0) as client:

            async def ask(request: Request) -> None:
                assert (await client.ask(request)).error is None
                ended.append(request.key)

            await asyncio.gather(*map(ask, [slow, *quick]))

    with chat_server("--faults", str(share), "--kinds", *fault) as url:
        asyncio.run(run())
        arrivals = sorted(bill(url)["arrivals"])
    assert ended[-1] == slow.key and len(ended) == 41 and arrivals[1] - arrivals[0] < 2.0


def test_a_pace_gives_every_window_its_share_and_loses_none() -> None:
    draw, now, pace, given = random.Random(0), 0.0, Pace(600.0), []
    for i in range(3000):
        now += draw.expovariate(12.0)  # more than the pace allows
        now = given[-1][0] + 50.0 if i == 1500 else now  # but for one lull
        amount = draw.choice((1, 1, 3))
        given.append((now + pace.take(amount, now), amount))
    assert given == sorted(given)
    sums = list(itertools.accumulate((amount for _, amount in given), initial=0))
    for i, j in itertools.combinations(range(0, 3000, 7), 2):
        window = given[j][0] - given[i][0]
        assert sums[j] - sums[i] <= 10 * (window + BURST_S) + 3 + 1e-6
    assert sums[-1] >= 0.99 * 10 * (given[-1][0] - 50.0)
    assert Pace(None).take(1e9, 0.0) == 0.0


@pytest.mark.parametrize("unit", ["requests_per_minute", "tokens_per_minute"])
def test_the_server_sees_no_more_than_the_allowed_pace(unit: str, ledger: Ledger) -> None:
    per_s, n = 20, 60
    with chat_server() as url:
        size = len(body(model(url), MESSAGES, None, 100, with_model=True)) // 4 + 100
        limits = LimitsConfig(**{unit: 60.0 * per_s * (size if unit == "tokens_per_minute" else 1)})
        ask_all((model(url),), limits, ledger, requests(n))
        arrivals = sorted(bill(url)["arrivals"])
    late = 0.5  # what a loaded machine may hold back and then send at once
    for i, j in itertools.combinations(range(n), 2):
        assert j - i <= per_s * (arrivals[j] - arrivals[i] + BURST_S + late) + 1
    assert arrivals[-1] - arrivals[0] >= (n - 1) / per_s - BURST_S - late


@pytest.mark.parametrize("seconds", [0.4, 1000.0])
def test_retry_after_is_honoured_and_a_server_that_asks_for_too_much_is_given_up(
    seconds: float, ledger: Ledger
) -> None:
    limits = LimitsConfig(**LIMITS | {"max_attempts": 3})
    with chat_server("--faults", "1", "--kinds", "429_retry_after", "--retry-after", str(seconds)) as url:
        (reply,) = ask_all((model(url),), limits, ledger, requests(1))
        arrivals = bill(url)["arrivals"]
    assert reply.error == "rate_limited" and len(arrivals) == reply.attempts == (3 if seconds < 1 else 1)
    assert all(later - earlier >= seconds for earlier, later in itertools.pairwise(arrivals))


def test_pauses_are_full_jitter_below_a_doubling_limit_and_the_same_for_the_same_seed() -> None:
    limits = LimitsConfig(backoff_s=0.5, longest_pause_s=60.0)
    for attempt, most in ((1, 0.5), (2, 1.0), (5, 8.0), (9, 60.0), (90, 60.0)):
        pauses = [pause_s(limits, 0, str(i), attempt, None) for i in range(2000)]
        assert 0 <= min(pauses) < 0.01 * most and 0.99 * most < max(pauses) <= most
        assert sum(pauses) / 2000 == pytest.approx(most / 2, rel=0.05)
        assert pauses == [pause_s(limits, 0, str(i), attempt, None) for i in range(2000)]
    assert len({pause_s(limits, seed, key, n, None) for seed in (0, 1) for key in "ab" for n in (8, 9)}) == 8
    asked = [pause_s(limits, 0, str(i), 7, 20.0) for i in range(100)]
    assert min(asked) >= 20.0 and max(asked) <= 20.5 and len(set(asked)) == 100
    assert pause_s(limits, 0, "a", 1, 301.0) is None


def test_the_budget_ends_the_asking_and_holds_for_the_servers_bill_too(tmp_path: Path) -> None:
    with chat_server("--latency", "0.01") as url:
        models = (model(url, price_in=1.0, price_out=2.0),)
        most = price(models[0], most_input_tokens(len(body(models[0], MESSAGES, None, 100, with_model=True))), 100)
        for budget in (BudgetConfig(requests=23), BudgetConfig(tokens=2000), BudgetConfig(money=0.0025)):
            with Ledger(tmp_path / str(budget), budget) as ledger:
                before = bill(url)["total"]
                replies = ask_all(models, LimitsConfig(concurrency=8), ledger, requests(300))
                spent, billed = ledger.spent, bill(url)["total"]
                answered = [reply for reply in replies if isinstance(reply, Reply)]
                assert all(isinstance(reply, Reply | BudgetSpent) for reply in replies)
                assert len(answered) == spent.requests == billed["requests"] - before["requests"] < 300
                assert spent.input_tokens == billed["input"] - before["input"]
                assert spent.output_tokens == billed["output"] - before["output"]
                # and nothing is left that would have paid for another
                left = (budget.requests or 1 << 60) - spent.requests < 1
                left |= (budget.tokens or 1 << 60) - sum(spent[1:3]) < sum(most[:2])
                left |= (budget.money or 1 << 60) * 1e12 - spent.money < most.money
                assert left, (budget, spent, most)


def test_a_cancelled_request_stays_charged_at_its_most_and_frees_its_slot(ledger: Ledger) -> None:
    first, second = requests(2)

    async def run() -> Reply:
        async with Client((model(url),), LimitsConfig(concurrency=1), ledger, 0) as client:
            task = asyncio.create_task(client.ask(first))
            while not ledger.n_open:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert ledger.n_open == 0 and ledger.spent.output_tokens == 100
            return await client.ask(second)

    with chat_server("--latency", "0.2") as url:
        reply = asyncio.run(run())
    assert reply.error is None and ledger.spent.output_tokens == 100 + reply.output_tokens


def test_where_nobody_listens_the_reply_says_so_and_nothing_is_charged(ledger: Ledger) -> None:
    with chat_server() as url:
        pass
    (reply,) = ask_all((model(url),), LimitsConfig(**LIMITS | {"max_attempts": 3}), ledger, requests(1))
    assert (reply.error, reply.attempts, reply.text) == ("connection", 3, None) and "connect" in reply.detail
    assert ledger.spent == (3, 0, 0, 0)


def test_an_answer_without_end_is_left_alone(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_room, "LARGEST_ANSWER_BYTES", 20_000)
    with chat_server("--words", "5000") as url:
        (reply,) = ask_all((model(url),), LimitsConfig(), ledger, requests(1))
    assert (reply.error, reply.text, reply.attempts) == ("too_large", None, 1)
    assert ledger.spent.output_tokens == 100


def test_a_redirect_is_not_followed_since_it_would_carry_the_key_away(ledger: Ledger) -> None:
    with chat_server() as url:
        (reply,) = ask_all((model(f"{url}/moved"),), LimitsConfig(), ledger, requests(1))
        assert list(bill(url)["paths"]) == ["/v1/moved/chat/completions"]
    assert (reply.error, reply.attempts) == ("http_307", 1) and ledger.spent.output_tokens == 100


def test_the_key_is_sent_and_neither_written_nor_shown(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "dev", "-c", LEAK, str(tmp_path / "ledger.jsonl")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TEST_KEY": f"{SECRET}\n"}
    with chat_server("--faults", "0.9", "--retry-after", "0.01") as url:
        run = subprocess.run([*command, url], env=environment, capture_output=True, cwd=tmp_path, timeout=100)
        assert bill(url)["authorisations"] == [f"Bearer {SECRET}"]
    written = b"".join([run.stdout, run.stderr, *(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())])
    assert run.returncode == 0, run.stderr
    assert b"you sent Bearer [key]" in written and b"DEBUG:asyncio" in written
    assert not any(SECRET[i : i + 10].encode() in written for i in range(len(SECRET) - 9))


def test_azure_is_asked_by_deployment_version_and_api_key_header(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_KEY", SECRET)
    with chat_server() as url:
        azure = AzureConfig(endpoint=url.replace("/v1", "/"), deployment="gpt-4o-eu", api_version="2024-10-21")
        (reply,) = ask_all((model(url, azure=azure, api_key_env="TEST_KEY"),), LimitsConfig(), ledger, requests(1))
        billed = bill(url)
    assert reply.error is None and billed["authorisations"] == [SECRET]
    assert list(billed["paths"]) == ["/openai/deployments/gpt-4o-eu/chat/completions?api-version=2024-10-21"]


@pytest.mark.parametrize(
    ("value", "said"), [(None, "TEST_KEY holds no key"), ("sk-\u00e9\u00e9", "no header can hold")]
)
def test_a_missing_or_impossible_key_is_named_by_its_variable(
    value: str | None, said: str, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TEST_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TEST_KEY", value)
    with pytest.raises(RuntimeError, match=said):
        ask_all((model("http://127.0.0.1:9/v1", api_key_env="TEST_KEY"),), LimitsConfig(), ledger, ())


def test_models_are_drawn_by_their_shares_and_each_is_asked_at_its_own_address(ledger: Ledger) -> None:
    with chat_server() as url:
        models = (model(f"{url}/a", name="large", share=3), model(f"{url}/b", name="small", share=1))
        drawn = [choose_model(models, 7, f"short_long/{i}").name for i in range(8000)]
        assert Counter(drawn)["large"] / 8000 == pytest.approx(0.75, abs=0.015)
        assert drawn == [choose_model(models, 7, f"short_long/{i}").name for i in range(8000)]
        assert drawn != [choose_model(models, 8, f"short_long/{i}").name for i in range(8000)]
        asked = [requests(1, name, i)[0] for i, name in enumerate(drawn[:40])]
        ask_all(models, LimitsConfig(), ledger, asked)
        paths = bill(url)["paths"]
    wanted = Counter(drawn[:40])
    assert paths == {"/v1/a/chat/completions": wanted["large"], "/v1/b/chat/completions": wanted["small"]}
    assert {name: spent.requests for name, spent in ledger.spent_by_model().items()} == wanted


def test_a_request_key_depends_on_request_model_and_draw_and_not_on_the_order_of_keys() -> None:
    key = request_key({"messages": MESSAGES, "schema": None}, "m", 0)
    assert key == request_key({"schema": None, "messages": list(MESSAGES)}, "m", 0) and len(key) == 40
    others = [({"messages": (), "schema": None}, "m", 0), ({"messages": MESSAGES, "schema": None}, "n", 0)]
    others.append(({"messages": MESSAGES, "schema": None}, "m", 1))
    assert len({key, *(request_key(*other) for other in others)}) == 4
