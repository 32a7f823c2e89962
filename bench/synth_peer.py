"""The other side of bench/synth.py: openai's AsyncOpenAI, python -m bench.synth_peer URL REQUESTS CONCURRENCY.

As its documentation shows it: one client, its own connection pool, no retries. Prints one JSON object.
"""

import asyncio
import json
import sys

from openai import AsyncOpenAI

from bench.synth_turn import PROMPT, rates


async def ask_all(url: str, n_requests: int, concurrency: int) -> dict[str, float]:
    """Ask as bench.synth_turn does.  Returns its rates."""
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

        async def ask(i: int) -> str | None:
            reply = await client.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": f"{PROMPT}{i}"}],
                max_tokens=2048,
                temperature=1.0,
                top_p=1.0,
            )
            return reply.choices[0].message.content

        return await rates(ask, n_requests, concurrency)


if __name__ == "__main__":
    result = asyncio.run(ask_all(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
    sys.stdout.write(json.dumps(result) + "\n")
