"""A client to be killed: ask what is not stored yet, append each reply as one line; python FILE FOLDER URL N LIMITS."""

import asyncio
import json
import os
import sys
from pathlib import Path

from chat import model, requests

from e5core.synth.client import Client, Request
from e5core.synth.ledger import Ledger
from e5core.synth.settings import BudgetConfig, LimitsConfig


async def main(folder: Path, url: str, n: int, limits: LimitsConfig) -> None:
    """Ask for the rest of n replies."""
    path = folder / "replies.jsonl"
    stored = {json.loads(line)["key"] for line in path.read_bytes().splitlines()} if path.exists() else set()
    store = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with Ledger(folder / "ledger.jsonl", BudgetConfig()) as ledger:
        async with Client((model(url),), limits, ledger, seed=0) as client:

            async def ask(request: Request) -> None:
                reply = await client.ask(request)
                row = {"key": reply.key, "text": reply.text, "error": reply.error, "attempts": reply.attempts}
                os.write(store, (json.dumps(row) + "\n").encode())

            await asyncio.gather(*(ask(request) for request in requests(n) if request.key not in stored))


if __name__ == "__main__":
    fields = json.loads(sys.argv[4])
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), LimitsConfig(**fields)))
