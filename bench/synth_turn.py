"""One turn of bench/synth.py, or its server: a process that imports nothing heavy, so that its garbage is its own.

python -m bench.synth_turn serve LATENCY_S              prints its port, answers until it is killed
python -m bench.synth_turn ask URL REQUESTS CONCURRENCY   e5core.synth's client; prints one JSON object of rates
"""

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from e5core.synth.client import Client, Request, request_key
from e5core.synth.ledger import Ledger
from e5core.synth.settings import BudgetConfig, LimitsConfig, ModelConfig

PROMPT = "Write one example for this retrieval task, as a JSON object with the keys that are named below. " * 16
REPLY = json.dumps({"user_query": "how do copper roofs weather", "positive_document": "A roof of copper turns. " * 60})
USAGE = {"prompt_tokens": 320, "completion_tokens": 400, "total_tokens": 720}
Ask = Callable[[int], Awaitable[str | None]]


class FixedReply(asyncio.Protocol):
    """A server that reads whole requests and answers each with the same bytes, after a latency."""

    def __init__(self, answer: bytes, latency_s: float) -> None:
        self.answer, self.latency_s = answer, latency_s
        self.received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the connection."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer when the body is whole; a connection carries one request at a time."""
        self.received += data
        head, end, rest = self.received.partition(b"\r\n\r\n")
        if not end:
            return
        length = next(int(line[15:]) for line in head.split(b"\r\n") if line[:15].lower() == b"content-length:")
        if len(rest) < length:
            return
        self.received = b""
        if self.latency_s:
            asyncio.get_running_loop().call_later(self.latency_s, self.transport.write, self.answer)
        else:
            self.transport.write(self.answer)


def main() -> None:
    """Serve, or ask and print the rates."""
    if sys.argv[1] == "serve":
        asyncio.run(_serve(float(sys.argv[2])))
    else:
        url, n_requests, concurrency = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
        sys.stdout.write(json.dumps(asyncio.run(_ask(url, n_requests, concurrency))) + "\n")


async def rates(ask: Ask, n_requests: int, concurrency: int) -> dict[str, float]:
    """Time n_requests in the middle of a run that is kept full: start and end are not counted.

    Returns requests per second of wall and of CPU time.
    """
    n_before = max(2 * concurrency, n_requests // 10)
    waiting, clock, n_done = iter(range(n_before + n_requests + concurrency)), [], 0

    async def work() -> None:
        nonlocal n_done
        for i in waiting:
            text = await ask(i)
            if text != REPLY:
                raise RuntimeError(f"request {i}: expected the server's reply, got {text!r}")
            n_done += 1
            if n_done in (n_before, n_before + n_requests):
                clock.append((time.perf_counter(), time.process_time()))

    await asyncio.gather(*(work() for _ in range(concurrency)))
    wall, cpu = (end - start for start, end in zip(*clock, strict=True))
    return {"requests_per_s": n_requests / wall, "requests_per_s_per_core": n_requests / cpu}


async def _ask(url: str, n_requests: int, concurrency: int) -> dict[str, float]:
    os.environ["BENCH_KEY"] = "sk-0123456789abcdef0123456789abcdef"
    model = ModelConfig(name="m", base_url=url, api_key_env="BENCH_KEY", price_in=0.15, price_out=0.6)
    with tempfile.TemporaryDirectory() as folder:
        with Ledger(Path(folder) / "ledger.jsonl", BudgetConfig(money=1e6)) as ledger:
            async with Client((model,), LimitsConfig(concurrency=concurrency), ledger, seed=0) as client:

                async def ask(i: int) -> str | None:
                    messages = ({"role": "user", "content": f"{PROMPT}{i}"},)
                    return (await client.ask(Request(request_key({"messages": messages}, "m", i), "m", messages))).text

                return await rates(ask, n_requests, concurrency)


async def _serve(latency_s: float) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": REPLY}, "finish_reason": "stop"}
    fields = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": USAGE}
    data = json.dumps(fields).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    server = await asyncio.get_running_loop().create_server(
        lambda: FixedReply(head + data, latency_s), "127.0.0.1", 0, backlog=1024
    )
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    main()
