"""What every rank of tests/test_pooling.py does; it imports little, since every process imports it anew."""

from pathlib import Path

import numpy as np
import torch
from rank_laws import CPU, LORA, LOSS, made_records

from e5core.batches import BatchConfig, build_batch
from e5core.distributed import World
from e5core.encoder import EmbeddingModel, Pooling, build_model
from e5core.lora import adapters
from e5core.recompute import Policy
from e5core.sharding import Strategy
from e5core.step import backward_step
from e5core.tokenizer import Tokenizer

WHOLE = 10_000  # tokens: one micro-batch
CASES = (("mean", "none", "none"), ("mean", "full", "block"), ("weighted_mean", "full", "none"))


def pooled_model(
    world: World, embedder: str, pooling: Pooling, strategy: Strategy = "none", recompute: Policy = "none"
) -> EmbeddingModel:
    """Build a model in float64 with random B (B = 0 makes dA = 0 and hides mistakes) whose adapters drop a tenth."""
    held = {"recompute": recompute, "strategy": strategy, "world": world}
    model = build_model(Path(embedder), torch.float64, CPU, causal=True, lora=LORA, seed=0, pooling=pooling, **held)
    generator = torch.Generator().manual_seed(1)
    for name, linear in adapters(model.backbone):
        values = torch.randn(linear.lora_b.shape, generator=generator, dtype=torch.float64) / 10
        if model.put is None:
            linear.lora_b.data.copy_(values)
        else:
            model.put(f"{name}.lora_b", values)
    return model


def step(
    world: World, embedder: str, pooling: Pooling, strategy: Strategy, recompute: Policy, budget: int
) -> tuple[float, np.ndarray]:
    """Do a step's passes.  Returns the loss and the gradient, flat."""
    model, config = (
        pooled_model(world, embedder, pooling, strategy, recompute),
        BatchConfig(max_tokens=400, negatives=2),
    )
    batch = build_batch(made_records(7), Tokenizer.load(Path(embedder)), config, seed=1, step=4, world=world)
    loss = backward_step(model, batch, LOSS, budget, (7, 4), world).loss.item()
    parts = {name: parameter.grad for name, parameter in model.trained().items()}
    named = parts if model.shards is None else dict(model.shards.whole(parts))
    return loss, torch.cat([named[name].flatten() for name in sorted(named)]).numpy()


def steps(world: World, embedder: str) -> list[tuple[float, np.ndarray]]:
    """Do every case with many micro-batches."""
    return [step(world, embedder, *case, 110) for case in CASES]
