"""Time the client of e5core.synth beside openai's AsyncOpenAI: python -m bench.synth.

Both ask the same chat completions of the same server, which answers a fixed reply and runs in a process of its own:
first without latency, where what counts is requests per second of the client's CPU time (a core's worth), then with
500 ms of it at concurrency 256, where concurrency / latency = 512 requests a second is the limit. Ours writes its
ledger, keeps the budget and reads the usage; theirs builds its response objects. Sides take turns, each turn in a
process of its own; of a side, the median turn counts. Without the `openai` package ours is timed alone.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import torch

from bench.roofline import device_name, record

SIDES = {"e5core.synth": ["bench.synth_turn", "ask"], "AsyncOpenAI": ["bench.synth_peer"]}
SERVERS = ((0.0, 64), (0.5, 256))  # latency in seconds, concurrency
ROUND_TRIPS = 20  # of every slot, on the server with latency


def main() -> None:
    """Run every side's turns on both servers and record a row each, and the ratio."""
    arguments = _parser().parse_args()
    out = arguments.out or Path(f"bench/results/{device_name(torch.device('cpu'))}.jsonl")
    sides = [side for side in SIDES if side != "AsyncOpenAI" or importlib.util.find_spec("openai")]
    for latency_s, concurrency in SERVERS:
        n_requests = ROUND_TRIPS * concurrency if latency_s else arguments.requests
        medians = _contest(sides, latency_s, concurrency, n_requests, arguments.rounds)
        for side, median in medians.items():
            row: dict[str, object] = {"bench": "synth", "client": side, "latency_ms": round(1e3 * latency_s)}
            row |= {"concurrency": concurrency, "requests": n_requests, "rounds": arguments.rounds}
            row |= {key: round(value, 1) for key, value in median.items()}
            if latency_s:
                row["percent_of_limit"] = round(100 * median["requests_per_s"] * latency_s / concurrency, 1)
            if side != "AsyncOpenAI" and "AsyncOpenAI" in medians:
                theirs = medians["AsyncOpenAI"]["requests_per_s_per_core"]
                row["x_over_openai_per_core"] = round(median["requests_per_s_per_core"] / theirs, 2)
            record(row, torch.device("cpu"), out)


def _contest(
    sides: list[str], latency_s: float, concurrency: int, n_requests: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Let the sides take turns on one server.  Returns the medians of each."""
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    command = [sys.executable, "-m", "bench.synth_turn", "serve", str(latency_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
            for _ in range(rounds):
                for side in sides:
                    turn = [sys.executable, "-m", *SIDES[side], url, str(n_requests), str(concurrency)]
                    run = subprocess.run(turn, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
                    turns[side].append(json.loads(run.stdout))
        finally:
            server.kill()
    return {
        side: {key: sorted(row[key] for row in rows)[len(rows) // 2] for key in rows[0]} for side, rows in turns.items()
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=5000, help="of the server without latency")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    return parser


if __name__ == "__main__":
    main()
