"""Units that are NaN while they are freed: what every rank of tests/test_freed_units.py does."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from full_laws import OPTIM, flat
from rank_laws import LORA, LOSS, made_records

from e5core import sharding
from e5core.batches import BatchConfig, build_batch
from e5core.distributed import World
from e5core.encoder import build_model
from e5core.sharding import Strategy
from e5core.step import backward_step, make_optimizer
from e5core.tokenizer import Tokenizer


@contextmanager
def poisoned() -> Iterator[list[int]]:
    """Fill a unit with NaN where it would be freed, and keep its memory: whatever reads it too late or early shows."""
    free, n_filled = sharding._Flat.free, [0]

    def fill(flat: Any) -> None:
        if flat.whole.untyped_storage().size():
            flat.whole.fill_(float("nan"))
            n_filled[0] += 1

    sharding._Flat.free = fill
    try:
        yield n_filled
    finally:
        sharding._Flat.free = free


def steps(world: World, embedder: str, strategy: Strategy, full: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Do two steps in several micro-batches.  Returns losses, norms and what was trained."""
    path, held = Path(embedder), {"recompute": "block", "strategy": strategy, "world": world}
    lora = None if full else LORA
    model = build_model(path, dtype, world.device, causal=True, lora=lora, full=full, seed=0, **held)
    optimizer, tokenizer, found = make_optimizer(model, OPTIM), Tokenizer.load(path), {"losses": [], "norms": []}
    for step in range(2):
        config = BatchConfig(size=7, max_tokens=400, negatives=2)
        batch = build_batch(made_records(7), tokenizer, config, seed=1, step=step, world=world)
        found["losses"].append(backward_step(model, batch, LOSS, 110, (7, step), world).loss.item())
        found["norms"].append(optimizer.clip_gradients())
        optimizer.update(OPTIM.lr)
    trained = model.trained() if model.shards is None else dict(model.shards.whole(model.trained()))
    return found | {"trained": flat({name: tensor.cpu() for name, tensor in trained.items()})}


def poisoned_steps(world: World, embedder: str, full: bool, dtype: torch.dtype) -> dict[str, Any]:
    with poisoned() as n_filled:
        found = steps(world, embedder, "full", full, dtype)
    return found | {"n_filled": n_filled[0]}
