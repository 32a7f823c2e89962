"""A chat API that answers with records an LLM wrote; python tests/replay_server.py FILE.jsonl ... prints its port.

It needs `response_format`: the schema says what is asked. A list of tasks is answered with the tasks of the kind whose
wording it is; an example, with the next record of the task that the prompt names, or of the passage that it holds.
GET /count says how many requests came.
"""

import asyncio
import json
import sys
from collections import defaultdict
from itertools import count
from pathlib import Path
from typing import Any

from aiohttp import web

from e5core.synth.prompts import PLACEHOLDER, TASKS_KEY, load_kind

KINDS = ("short_long", "long_short", "short_short", "long_long")


class Replay:
    """The records and how far each task has been told."""

    def __init__(self, paths: list[Path]) -> None:
        rows = [json.loads(line) for path in paths for line in path.read_text("utf-8").splitlines()]
        self.by_task: dict[tuple[str, ...], dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
        self.tasks: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            self.by_task[tuple(row["response"])][row["task"]].append(row["response"])
            if row["task"] not in self.tasks[row["kind"]]:
                self.tasks[row["kind"]].append(row["task"])
        self.told = defaultdict(count)
        self.n_requests = 0
        self.wordings = {
            kind: [PLACEHOLDER.split(wording.strip())[2::2] for wording in load_kind(kind).brainstorm.wordings]
            for kind in KINDS
        }

    async def chat(self, request: web.Request) -> web.Response:
        """Answer one completion."""
        self.n_requests += 1
        body = await request.json()
        prompt = body["messages"][-1]["content"]
        keys = tuple(body["response_format"]["json_schema"]["schema"]["properties"])
        text = json.dumps(self._tasks(prompt) if keys == (TASKS_KEY,) else self._record(prompt, keys))
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())}
        return web.json_response({"choices": [choice], "usage": usage})

    async def count(self, request: web.Request) -> web.Response:
        """Say how many requests came."""
        return web.json_response(self.n_requests)

    def _tasks(self, prompt: str) -> dict[str, Any]:
        kind = next(k for k, wordings in self.wordings.items() if any(all(p in prompt for p in w) for w in wordings))
        place = 20 * next(self.told[kind])
        return {TASKS_KEY: (self.tasks[kind] * 2)[place % len(self.tasks[kind]) :][:20]}

    def _record(self, prompt: str, keys: tuple[str, ...]) -> dict[str, str]:
        by_task = self.by_task[keys]
        grounded = [row for rows in by_task.values() for row in rows if row[keys[1]] in prompt]
        rows = grounded or next((rows for task, rows in by_task.items() if task in prompt), None)
        if rows is None:  # a kind whose one task the prompt need not name
            rows = next(iter(by_task.values()))
        return rows[next(self.told[rows[0][keys[0]]]) % len(rows)]


async def main() -> None:
    """Serve until killed."""
    replay = Replay([Path(name) for name in sys.argv[1:]])
    app = web.Application()
    app.router.add_get("/count", replay.count)
    app.router.add_post("/v1/chat/completions", replay.chat)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    sys.stdout.write(f"{runner.addresses[0][1]}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
