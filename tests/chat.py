"""Start tests/faulty_server.py, ask it many things at once, and hold its bill against the ledger."""

import asyncio
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faulty_server import FINAL, fault_of

from e5core.synth.client import Client, Reply, Request, request_key
from e5core.synth.ledger import Ledger
from e5core.synth.settings import LimitsConfig, ModelConfig

SECRET = "sk-4fJ9kQ2mZ7xW1vB8nC3s"  # no key of anybody's
MESSAGES = ({"role": "user", "content": "write an example of two words"},)
# Long enough for a loaded machine to answer in, and the server's time-outs take three times as long.
LIMITS = {"timeout_s": 2.0, "max_attempts": 10, "backoff_s": 0.01, "longest_pause_s": 0.1}
HANG = ["--hang", "6.0"]


@contextmanager
def chat_server(*arguments: str) -> Iterator[str]:
    """Run the server.  Yields its address."""
    command = [sys.executable, str(Path(__file__).with_name("faulty_server.py")), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()


def model(url: str, **fields: Any) -> ModelConfig:
    return ModelConfig(**{"name": "m", "base_url": url, "api_key_env": "", "max_output_tokens": 100, **fields})


def requests(n: int, name: str = "m", first: int = 0) -> list[Request]:
    return [Request(request_key({"messages": MESSAGES}, name, i), name, MESSAGES) for i in range(first, first + n)]


def ask_all(
    models: Sequence[ModelConfig], limits: LimitsConfig, ledger: Ledger, asked: Sequence[Request], seed: int = 0
) -> list[Reply | BaseException]:
    """Ask everything at once.  Returns what came of each, in order."""

    async def run() -> list[Reply | BaseException]:
        async with Client(models, limits, ledger, seed) as client:
            return await asyncio.gather(*map(client.ask, asked), return_exceptions=True)

    return asyncio.run(run())


def bill(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url.replace("/v1", "/bill")) as response:
        return json.load(response)


def first_answer(seed: int, share: float, key: str) -> tuple[int, str | None]:
    """The attempt that an undisturbed client ends at, and the fault of its answer: what the server will do."""
    attempt = 1
    while (fault := fault_of(seed, share, key, attempt)) is not None and fault not in FINAL:
        attempt += 1
    return attempt, fault


def assert_ledger_covers(path: Path, billed: dict[str, Any]) -> None:
    """Hold every attempt: the server's charge <= the ledger's, with equality where it answered and was heard."""
    reserved: dict[str, list[tuple[int, int]]] = {}
    settled: set[str] = set()
    for line in path.read_bytes().splitlines():
        entry = json.loads(line)
        charge = (entry["input"], entry["output"])
        if "reserve" in entry:
            reserved.setdefault(f"{entry['reserve']}/{entry['attempt']}", []).append(charge)
        else:
            name = f"{entry['settle']}/{entry['attempt']}"
            settled.add(name)
            reserved[name][-1] = charge
    for name, rows in billed["attempts"].items():
        charges = reserved[name]
        assert len(charges) >= len(rows), f"{name} was sent {len(rows)} times and reserved {len(charges)} times"
        for side in (0, 1):
            assert sum(row[1 + side] for row in rows) <= sum(charge[side] for charge in charges), name
        if name in settled and len(charges) == 1:
            assert rows[0][0] and tuple(rows[0][1:]) == charges[0], name
