"""What every rank of tests/test_full.py does."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rank_laws import CPU, LOSS, cut_to, made_records
from torch import Tensor

from e5core.batches import BatchConfig, build_batch
from e5core.config import load_config
from e5core.distributed import ALONE, World, share
from e5core.encoder import EmbeddingModel, build_model
from e5core.optim import OptimConfig
from e5core.recompute import Policy
from e5core.sharding import Strategy
from e5core.step import backward_step, make_optimizer
from e5core.tokenizer import Tokenizer
from e5core.train import Config, train

N_STEPS = 3
OPTIM = OptimConfig(lr=1e-3, clip=0.05)  # which clips
CASES: tuple[tuple[Strategy, Policy], ...] = (("full", "none"), ("full", "block"), ("hybrid", "mlp"), ("none", "none"))


def flat(named: dict[str, Tensor]) -> np.ndarray:
    return torch.cat([named[name].detach().flatten() for name in sorted(named)]).numpy().copy()


def trained(world: World, embedder: str, strategy: Strategy, policy: Policy, budget: int) -> dict[str, Any]:
    """Train all weights for some steps, in float64, by a step's own code."""
    path, held = Path(embedder), {"recompute": policy, "strategy": strategy, "world": world}
    model = build_model(path, torch.float64, CPU, causal=True, lora=None, full=True, seed=0, **held)
    optimizer, tokenizer = make_optimizer(model, OPTIM), Tokenizer.load(path)
    settings, losses, norms = BatchConfig(size=7, max_tokens=400, negatives=2), [], []
    for step in range(N_STEPS):
        batch = build_batch(made_records(7), tokenizer, settings, seed=1, step=step, world=world)
        losses.append(backward_step(model, batch, LOSS, budget, (7, step), world).loss.item())
        norms.append(optimizer.clip_gradients())
        optimizer.update(OPTIM.lr)
    return {
        "losses": losses,
        "norms": norms,
        "weights": flat(dict(model.shards.whole(model.trained()))),
        "left": sum(p.untyped_storage().size() for p in model.parameters()),
        "most": model.shards.traffic.most_gathered,
    }


def by_torch(embedder: str) -> dict[str, Any]:
    """Do the same in one process and one pass, by autograd over plain parameters and torch's AdamW."""
    path = Path(embedder)
    model: EmbeddingModel = build_model(path, torch.float64, CPU, causal=True, lora=None, seed=0)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=OPTIM.lr, weight_decay=OPTIM.weight_decay)
    settings, losses, norms = BatchConfig(size=7, max_tokens=400, negatives=2), [], []
    for step in range(N_STEPS):
        batch = build_batch(made_records(7), Tokenizer.load(path), settings, seed=1, step=step, world=ALONE)
        losses.append(backward_step(model, batch, LOSS, 100_000, None).loss.item())
        gradients = [p.grad for p in model.parameters()]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        assert norms[-1] > OPTIM.clip
        for gradient in gradients:
            gradient.mul_(OPTIM.clip / norms[-1])
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "norms": norms, "weights": flat(dict(model.named_parameters()))}


def steps(world: World, embedder: str) -> dict[Any, dict[str, Any]]:
    return {(case, budget): trained(world, embedder, *case, budget) for case in CASES for budget in (110, 100_000)}


def trainings(world: World, config_file: str, run: str) -> None:
    """Train whole, and go on from the second step of that."""
    file, folder = Path(config_file), Path(run)
    train(load_config(Config, file, [f"train.run='{run}'", 'sharding.strategy="full"']))
    if world.is_main:
        cut_to(folder, folder.with_name(f"{folder.name}-resumed"), 2)
    share(None, world)
    resumed(world, config_file, f"{folder}-resumed", "full")


def resumed(world: World, config_file: str, run: str, strategy: Strategy) -> None:
    """Go on with a run."""
    arguments = [f"train.run='{run}'", "train.resume=true", f'sharding.strategy="{strategy}"']
    train(load_config(Config, Path(config_file), arguments))
