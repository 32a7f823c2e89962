"""A chat API that fails as real ones do, in a process of its own; python tests/faulty_server.py prints its port.

Whether and how it fails is a pure function of (seed, key, attempt), which the client sends as X-Client-Request-Id:
"key/attempt", so two runs meet the same faults in any order. What it writes is a function of the key: JSON that fills
the schema of the request, or of two strings where it has none. A path with /moved/ redirects to the one without.

It bills like a harsh provider: whatever was worked on, also where the answer never arrives; only a 429 is free.
GET /bill: {"total": {...}, "attempts": {"key/attempt": [[answered, input, output], ...]}, "arrivals": [seconds, ...],
"most_at_once": n, "connections": n, "authorisations": [...], "paths": {path: n}}.
"""

import argparse
import asyncio
import hashlib
import json
import random
import time
from collections import Counter
from typing import Any

from aiohttp import web

FAULTS = (
    "429",
    "429_retry_after",
    "500",
    "502",
    "dropped",
    "timeout",
    "trickle",
    "cut_body",
    "cut_json",
    "wrong_keys",
    "prose",
    "empty_choices",
    "content_filter",
    "error_body",
)
FREE = ("401", "429", "429_retry_after")  # 401 is no fault that comes and goes: by --kinds only
FINAL = ("cut_json", "wrong_keys", "prose", "content_filter")  # an answer, with its usage; others are to be tried again
WORDS = "river stone quiet market lantern copper winter signal garden theory bridge music harvest silver engine".split()
DEFAULT_SCHEMA = {"type": "object", "properties": {"query": {"type": "string"}, "answer": {"type": "string"}}}


def fault_of(seed: int, share: float, key: str, attempt: int, kinds: tuple[str, ...] = FAULTS) -> str | None:
    """Return the fault that meets an attempt, or None."""
    digest = hashlib.blake2b(f"{seed}/{key}/{attempt}".encode(), digest_size=16).digest()
    if int.from_bytes(digest[:8], "big") / 2**64 >= share:
        return None
    return kinds[int.from_bytes(digest[8:], "big") % len(kinds)]


def fill(schema: dict[str, Any], draw: random.Random, n_words: int) -> Any:
    """Write a value that a JSON schema of objects, lists and strings allows."""
    if schema["type"] == "object":
        return {name: fill(inner, draw, n_words) for name, inner in schema["properties"].items()}
    if schema["type"] == "array":
        return [fill(schema["items"], draw, n_words) for _ in range(3)]
    return " ".join(draw.choices(WORDS, k=n_words))


class Server:
    """The handlers and what they billed."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.kinds = tuple(arguments.kinds)
        self.attempts: dict[str, list[tuple[bool, int, int]]] = {}
        self.arrivals: list[float] = []
        self.at_once = self.most_at_once = 0
        self.authorisations: set[str] = set()
        self.paths: Counter[str] = Counter()
        self.peers: set[object] = set()

    async def bill(self, request: web.Request) -> web.Response:
        """Say what was billed."""
        rows = [row for rows in self.attempts.values() for row in rows]
        total = {"requests": len(rows), "input": sum(r[1] for r in rows), "output": sum(r[2] for r in rows)}
        fields = {"total": total, "attempts": self.attempts, "arrivals": self.arrivals, "paths": self.paths}
        fields |= {"most_at_once": self.most_at_once, "connections": len(self.peers)}
        fields |= {"authorisations": sorted(self.authorisations)}
        return web.json_response(fields)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Answer one chat completion, or fail."""
        self.arrivals.append(time.monotonic())
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            self.authorisations.add(request.headers.get("Authorization") or request.headers.get("api-key") or "")
            self.paths[request.path_qs] += 1
            self.peers.add(request.transport.get_extra_info("peername"))
            if "/moved/" in request.path:
                raise web.HTTPTemporaryRedirect(request.path.replace("/moved", ""))
            return await self._answer(request)
        finally:
            self.at_once -= 1

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        name = request.headers.get("X-Client-Request-Id", "none/0")
        key, _, attempt = name.rpartition("/")
        fault = fault_of(self.arguments.seed, self.arguments.faults, key, int(attempt), self.kinds)
        body = await request.json()
        form = (body.get("response_format") or {}).get("json_schema", {}).get("schema", DEFAULT_SCHEMA)
        text = json.dumps(fill(form, random.Random(key), self.arguments.words), ensure_ascii=False)
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or 1 << 30
        n_in = sum(len(m["content"].split()) for m in body["messages"]) + 10
        n_out = min(len(text.split()), limit)
        row = (True, 0, 0) if fault in FREE else (fault is None or fault in FINAL, n_in, n_out)
        self.attempts.setdefault(name, []).append(row)
        if self.arguments.latency:
            await asyncio.sleep(self.arguments.latency)
        if fault in (*FREE, "500", "502", "dropped", "timeout", "error_body"):
            return await self._refuse(request, fault)
        return await self._write(request, fault, text, {"prompt_tokens": n_in, "completion_tokens": n_out})

    async def _refuse(self, request: web.Request, fault: str) -> web.StreamResponse:
        said = {"error": {"message": f"{fault}; you sent {request.headers.get('Authorization')}", "type": "server"}}
        if fault == "dropped":
            request.transport.abort()
        if fault == "timeout":
            await asyncio.sleep(self.arguments.hang)
        if fault in FREE:
            headers = {"Retry-After": str(self.arguments.retry_after)} if fault == "429_retry_after" else {}
            return web.json_response(said, status=int(fault[:3]), headers=headers)
        if fault == "502":
            return web.Response(text="<html><h1>502 Bad Gateway</h1></html>", status=502, content_type="text/html")
        return web.json_response(said, status=200 if fault == "error_body" else 500)

    async def _write(
        self, request: web.Request, fault: str | None, text: str, usage: dict[str, int]
    ) -> web.StreamResponse:
        if fault == "cut_json":
            text = text[: len(text) // 2]
        elif fault == "wrong_keys":
            text = json.dumps({f"x_{name}": value for name, value in json.loads(text).items()})
        elif fault == "prose":
            text = f"Sure! Here is what you asked for:\n```json\n{text}\n```\nAnything else?"
        finish = {"content_filter": "content_filter", "cut_json": "length"}.get(fault or "", "stop")
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        choices = [] if fault == "empty_choices" else [choice]
        answer = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}
        data = json.dumps(answer | ({"usage": usage} if fault != "empty_choices" else {})).encode()
        if fault == "cut_body":
            data = data[: len(data) // 2]
        if fault != "trickle":
            return web.Response(body=data, content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        for i in range(len(data)):
            await response.write(data[i : i + 1])
            await asyncio.sleep(self.arguments.hang / 20)
        return response


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--faults", type=float, default=0.0, help="share of the attempts that fail")
    parser.add_argument("--kinds", nargs="+", choices=("401", *FAULTS), default=FAULTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before every answer")
    parser.add_argument("--hang", type=float, default=5.0, help="seconds that a time-out takes")
    parser.add_argument("--retry-after", type=float, default=0.05, help="seconds")
    parser.add_argument("--words", type=int, default=12, help="of every string")
    server = Server(parser.parse_args())
    app = web.Application()
    app.router.add_get("/bill", server.bill)
    app.router.add_post("/{path:.*}", server.chat)
    asyncio.run(_serve(app))


async def _serve(app: web.Application) -> None:
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    main()
