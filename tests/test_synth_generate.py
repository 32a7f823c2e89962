"""The generator of records, through real HTTP: what is asked, what is kept, what a run does when things go wrong."""

import asyncio
import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from chat import HANG, LIMITS, SECRET, assert_ledger_covers, bill, chat_server

from e5core.config import load_config, read_json
from e5core.records import Record, read_records
from e5core.synth.__main__ import main
from e5core.synth.generate import Outcome, Run, records
from e5core.synth.ledger import BudgetSpent
from e5core.synth.settings import SynthConfig

ROOT = Path(__file__).resolve().parent.parent
WRITTEN = sorted((ROOT / "data" / "synthetic").glob("en_*.jsonl"))
CONFIG = """
[synth]
out = "{out}"
n_records = {n}

[[models]]
name = "m"
base_url = "{url}"
api_key_env = ""
json_schema = true
max_output_tokens = 400

[languages]
English = 1.0
"""
FIVE = ("short_long", "long_short", "short_short", "long_long", "sts")


def write_toml(folder: Path, url: str, n: int, kinds: tuple[str, ...] = FIVE, more: str = "") -> Path:
    text = CONFIG.format(out=folder / "out", n=n, url=url) + "".join(f'[[kinds]]\nname = "{k}"\n' for k in kinds)
    path = folder / "synth.toml"
    path.write_text(text + more)
    return path


def settings(folder: Path, url: str, n: int, kinds: tuple[str, ...] = FIVE, more: str = "") -> SynthConfig:
    return load_config(SynthConfig, write_toml(folder, url, n, kinds, more))


@contextmanager
def replay_server() -> Iterator[str]:
    command = [sys.executable, str(ROOT / "tests/replay_server.py"), *map(str, WRITTEN)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()


def n_requests(url: str) -> int:
    with urllib.request.urlopen(url.replace("/v1", "/count")) as response:
        return json.load(response)


def outcomes(config: SynthConfig) -> list[Outcome]:
    async def run() -> list[Outcome]:
        with Run(config) as opened:
            return [outcome async for outcome in opened.outcomes()]

    return asyncio.run(run())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def answered(out: Path) -> list[str]:
    return [
        row["id"]
        for stream in ("records", "tasks", "rejects")
        for p in (out / stream).glob("*.jsonl")
        for row in lines(p)
    ]


def test_a_run_writes_its_records_and_a_second_asks_nothing_and_writes_the_same(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with replay_server() as url:
        path = write_toml(tmp_path, url, 60)
        assert main([str(path)]) == 0
        asked, first = n_requests(url), (out / "records.jsonl").read_bytes()
        assert main([str(path)]) == 0
        assert n_requests(url) == asked
    assert (out / "records.jsonl").read_bytes() == first
    found, _ = read_records([out / "records.jsonl"])
    assert len(found) >= 60 and {record.kind for record in found} == set(FIVE)
    assert [record.id for record in found] == sorted(record.id for record in found)
    report = read_json(out / "report.json")
    assert report["written"] == report["accepted"] == len(found) == sum(report["records"]["by_kind"].values())
    n_rejected = sum(sum(reasons.values()) for reasons in report["rejected"].values())
    lists = sum(read_json(out / "plan.json")["brainstorms"].values())
    assert asked == lists + len(found) + n_rejected == report["spent"]["m"]["requests"]
    tasks = {task for shard in (out / "tasks").glob("*.jsonl") for row in lines(shard) for task in row["tasks"]}
    assert all(record.task in tasks or record.kind == "sts" for record in found)


def test_the_generator_yields_records_as_they_come_and_goes_on_in_a_second_run(tmp_path: Path) -> None:
    async def take(config: SynthConfig, n: int | None) -> list[Record]:
        taken: list[Record] = []
        stream = records(config)
        async for record in stream:
            taken.append(record)
            if len(taken) == n:
                break
        await stream.aclose()
        return taken

    with replay_server() as url:
        config = settings(tmp_path, url, 60, more="[limits]\nconcurrency = 4\n")
        first = asyncio.run(take(config, 10))
        asked = n_requests(url)
        second = asyncio.run(take(config, None))
        n_lists = sum(read_json(tmp_path / "out" / "plan.json")["brainstorms"].values())
    assert len(first) == 10 and asked < n_lists + 60, "who takes no more records must not pay for more"
    kept = [row["id"] for shard in (tmp_path / "out" / "records").glob("*.jsonl") for row in lines(shard)]
    assert len(kept) == len(set(kept)) and {r.id for r in first} | {r.id for r in second} <= set(kept)


def test_tasks_are_taken_in_turn_and_kinds_by_their_shares(tmp_path: Path) -> None:
    with replay_server() as url:
        more = '[[kinds]]\nname = "sts"\nshare = 3.0\n'
        config = settings(tmp_path, url, 80, ("short_short",), more)
        found = [outcome.ask.prompt for outcome in outcomes(config)]
    generated = [prompt for prompt in found if prompt.step == "generate"]
    kinds = Counter(prompt.kind for prompt in generated)
    assert 0.6 < kinds["sts"] / kinds.total() < 0.9
    tasks = Counter(prompt.task for prompt in generated if prompt.kind == "short_short")
    assert max(tasks.values()) - min(tasks.values()) <= 1


def run_with_faults(folder: Path, n: int, n_kills: int) -> tuple[bytes, Counter[str]]:
    """Make a run against a server with a fifth of faults, killed so often.  Returns records.jsonl and all keys."""
    folder.mkdir()
    more = "".join(f"{key} = {value}\n" for key, value in LIMITS.items())
    draw, out = random.Random(n_kills), folder / "out"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with chat_server("--faults", "0.2", *HANG) as url:
        path = write_toml(folder, url, n, ("short_short", "sts"), f"[limits]\nconcurrency = 32\n{more}")
        command = [sys.executable, "-m", "e5core.synth", str(path)]
        for kill_at in [*sorted(draw.sample(range(1, n // 2), n_kills)), None]:
            with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
                while kill_at is not None and process.poll() is None:
                    shards = [*out.glob("records/*.jsonl"), *out.glob("tasks/*.jsonl")]
                    if sum(shard.read_bytes().count(b"\n") for shard in shards) >= kill_at:
                        time.sleep(draw.random() * 0.1)
                        process.kill()
                        break
                    time.sleep(0.005)
            assert process.returncode == (0 if kill_at is None else -9)
            assert_ledger_covers(out / "ledger.jsonl", bill(url))
    keys = answered(out)
    assert len(keys) == len(set(keys)), "a request was answered twice"
    return (out / "records.jsonl").read_bytes(), Counter(keys)


def assert_kills_change_nothing(folder: Path, n: int, n_kills: int) -> None:
    undisturbed = run_with_faults(folder / "undisturbed", n, 0)
    assert run_with_faults(folder / "killed", n, n_kills) == undisturbed
    assert undisturbed[0].count(b"\n") >= n


def test_killed_twice_among_faults_the_records_are_an_undisturbed_runs(tmp_path: Path) -> None:
    assert_kills_change_nothing(tmp_path, 300, 2)


@pytest.mark.slow
def test_killed_ten_times_in_ten_thousand_requests_the_records_are_an_undisturbed_runs(tmp_path: Path) -> None:
    assert_kills_change_nothing(tmp_path, 9600, 10)
    assert sum(1 for _ in answered(tmp_path / "killed" / "out")) >= 10_000


def test_other_settings_are_refused_and_more_records_are_not(tmp_path: Path) -> None:
    with replay_server() as url:
        config = settings(tmp_path, url, 20, ("sts",))
        outcomes(config)
        before = set(answered(tmp_path / "out"))
        warmer = replace(config, models=(replace(config.models[0], temperature=0.5),))
        for other, named in (
            (warmer, "models"),
            (replace(config, synth=replace(config.synth, seed=1)), "synth.seed"),
            (replace(config, languages={"English": 1.0, "German": 1.0}), "languages"),
            (settings(tmp_path, url, 20, ("sts", "short_short")), "kinds"),
        ):
            with pytest.raises(RuntimeError, match=f"begun with other settings of {named}: put them back"):
                Run(other)
        more = replace(config, synth=replace(config.synth, n_records=40))
        outcomes(more)
    after = answered(tmp_path / "out")
    assert before < set(after) and len(after) == len(set(after))


def test_a_refused_key_stops_the_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("TEST_KEY", SECRET)
    with chat_server("--faults", "1", "--kinds", "401") as url:
        path = write_toml(tmp_path, url, 1000, ("sts",), "[limits]\nconcurrency = 8\n")
        path.write_text(path.read_text().replace('api_key_env = ""', 'api_key_env = "TEST_KEY"'))
        assert main([str(path)]) == 2
        assert bill(url)["total"]["requests"] <= 16
    told = capsys.readouterr().err
    assert "model m: http_401" in told and SECRET not in told
    assert not answered(tmp_path / "out")


def test_a_start_that_sent_nothing_binds_nobody_to_its_settings(tmp_path: Path, capsys) -> None:
    with replay_server() as url:
        path = write_toml(tmp_path, url, 20, ("sts",))
        text = path.read_text()
        path.write_text(text.replace('api_key_env = ""', 'api_key_env = "NOT_SET"'))
        assert main([str(path)]) == 2 and "NOT_SET holds no key" in capsys.readouterr().err
        path.write_text(text)
        assert main([str(path), "synth.seed=1"]) == 0
        assert main([str(path), "synth.seed=2"]) == 2


def test_a_server_that_is_gone_stops_the_run_and_what_it_lost_is_asked_again(tmp_path: Path) -> None:
    with replay_server() as url:
        pass
    limits = "[limits]\nconcurrency = 4\nmax_attempts = 2\nbackoff_s = 0.01\n"
    with pytest.raises(RuntimeError, match="20 requests in a row got no answer .connection: 20; the last: .*run again"):
        outcomes(settings(tmp_path, url, 200, ("sts",), limits))
    assert not answered(tmp_path / "out")
    with replay_server() as url:
        assert (
            sum(outcome.record is not None for outcome in outcomes(settings(tmp_path, url, 30, ("sts",), limits))) >= 30
        )


def test_a_spent_budget_ends_the_run_with_its_outputs_and_a_larger_one_goes_on(tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    with replay_server() as url:
        path = write_toml(tmp_path, url, 60, ("sts",))
        assert main([str(path), "budget.requests=25"]) == 2
        assert "the budget is spent: budget.requests = 25" in capsys.readouterr().err
        assert n_requests(url) == 25
        early = {record.id for record in read_records([out / "records.jsonl"])[0]}
        assert 0 < len(early) <= 25 and read_json(out / "report.json")["spent"]["m"]["requests"] == 25
        assert main([str(path), "budget.requests=200"]) == 0
        assert early <= {record.id for record in read_records([out / "records.jsonl"])[0]}
        with pytest.raises(BudgetSpent):
            outcomes(settings(tmp_path, url, 90, ("sts",), "[budget]\nrequests = 30\n"))


def test_replies_that_are_never_accepted_stop_the_run(tmp_path: Path) -> None:
    with chat_server("--faults", "1", "--kinds", "wrong_keys") as url:
        config = settings(tmp_path, url, 1000, ("sts",))
        with pytest.raises(RuntimeError, match="only 0 of the last 1000 requests brought a record; see .*rejects"):
            outcomes(config)
        (tmp_path / "b").mkdir()
        with pytest.raises(RuntimeError, match="no task for kind short_long: none of 1 lists was usable"):
            outcomes(settings(tmp_path / "b", url, 40, ("short_long",)))


def test_records_of_evaluation_sets_are_left_out_or_never_accepted_and_counted(tmp_path: Path) -> None:
    out, test_set = tmp_path / "out", tmp_path / "test_set"
    with replay_server() as url:
        path = write_toml(tmp_path, url, 40, ("sts",))
        assert main([str(path)]) == 0
        found, _ = read_records([out / "records.jsonl"])
        test_set.mkdir()
        texts = (found[0].query.upper(), found[3].negatives[0])
        rows = ({"sentence1": text, "sentence2": "x", "score": 1} for text in texts)
        (test_set / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main([str(path), "--against", str(test_set)]) == 0
        kept, _ = read_records([out / "records.jsonl"])
        assert {record.id for record in found} - {record.id for record in kept} == {found[0].id, found[3].id}
        assert read_json(out / "report.json")["left_out"] == {"contaminated": 2}
    with replay_server() as url:
        assert (
            main([str(write_toml(tmp_path, url, 100, ("sts",))), f"synth.out={out}2", "--against", str(test_set)]) == 0
        )
    report = read_json(tmp_path / "out2" / "report.json")
    assert report["rejected"]["m"]["contaminated"] == 2 and report["left_out"] == {}
    rows = [json.loads(line)["response"] for line in (tmp_path / "out2" / "records.jsonl").read_text().splitlines()]
    assert not {text.casefold() for text in texts} & {text.casefold() for row in rows for text in row.values()}


def test_a_preview_shows_prompts_and_cost_and_touches_nothing(tmp_path: Path, capsys) -> None:
    path = write_toml(tmp_path, "http://127.0.0.1:1/v1", 5000, (*FIVE, "bitext"), "[budget]\nmoney = 1.0\n")
    priced = 'api_key_env = "NOT_SET"\nprice_in = 1.0\nprice_out = 4.0'
    path.write_text(path.read_text().replace('api_key_env = ""', priced))
    assert main([str(path), "languages={English=1.0,German=1.0}", "--preview", "10"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("[user]\n") == 10 and "short_long, brainstorm 0: m" in shown and "generate 5: m, " in shown
    # 5,000 examples, and per asymmetric kind 5,000 / 6 / 2 / 20 lists of tasks; 400 tokens at 4.0 a million each
    assert "5,084 requests" in shown and f"writing at most {5084 * 400:,}" in shown
    assert not (tmp_path / "out").exists()
