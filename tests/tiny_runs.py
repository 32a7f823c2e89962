"""Runs of the tiny embedder: their config, a batch of theirs, and how two of them compare."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from models import moments
from safetensors.torch import load_file

from e5core import checkpoint
from e5core.batches import BatchConfig, GlobalBatch, build_batch
from e5core.distributed import ALONE, World
from e5core.records import read_records
from e5core.tokenizer import Tokenizer
from e5core.train import Config, train

ROOT = Path(__file__).parent.parent
SYNTHETIC = ROOT / "data" / "synthetic"
CONFIG = """
[train]
run = "{run}"
steps = 6
save_every = 2
[backbone]
path = "{model}"
dtype = "float32"
[lora]
rank = 4
dropout = 0.1
[[data.sources]]
path = "{data}"
[batch]
size = 8
max_tokens = 48
micro_batch_tokens = 400
instruct_documents = ["sts"]
[optim]
lr = 1e-3
warmup_steps = 2
"""


def batch_of(embedder: Path, n: int = 24, world: World = ALONE) -> GlobalBatch:
    records, _ = read_records([SYNTHETIC / "en_short_long_a.jsonl"])
    config = BatchConfig(size=n, max_tokens=60, negatives=1)
    return build_batch(records[:n], Tokenizer.load(embedder), config, seed=1, step=4, world=world)


def weights_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = checkpoint.step_folder(run, step)
    return load_file(folder / "adapter_model.safetensors") | moments(folder)


def equal_bitwise(one: Path, other: Path, step: int) -> bool:
    a, b = weights_of(one, step), weights_of(other, step)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "data_seconds", "tokens_per_s")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def train_until(config: Config, last: int, meanwhile: Callable[[int], None] = lambda step: None) -> None:
    """Train in this process, call `meanwhile` after each step, and interrupt after the last, as Ctrl-C does."""
    import e5core.metrics

    class Interrupting(e5core.metrics.Progress):
        def step(self, metrics: dict) -> None:
            super().step(metrics)
            meanwhile(metrics["step"])
            if metrics["step"] == last:
                raise KeyboardInterrupt

    import e5core.train

    original, e5core.train.Progress = e5core.train.Progress, Interrupting
    try:
        train(config)
    finally:
        e5core.train.Progress = original
