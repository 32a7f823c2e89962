"""What every rank of tests/test_loss.py does; it imports little, since every process imports it anew."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rank_laws import fresh_model, made_records

from e5core.batches import BatchConfig, build_batch
from e5core.distributed import World
from e5core.loss import LossConfig
from e5core.records import Record
from e5core.step import backward_step
from e5core.tokenizer import Tokenizer

PREFIXES = {"matryoshka": (32, 8, 3), "matryoshka_weights": (1.0, 2.0, 0.5)}
LOSSES = (
    LossConfig(temperature=0.5, **PREFIXES),
    LossConfig(temperature=0.5, distillation=0.7, teacher_temperature=2.0),
    LossConfig(temperature=0.5, distillation=0.7, **PREFIXES),
)


def records() -> list[Record]:
    """Records of unlike sizes, one closed to the others, two that share texts, with 0 to 3 negatives, all scored."""
    made = made_records(7)
    made[3] = replace(made[3], positives=made[1].positives)
    made[4] = replace(made[4], negatives=(made[1].query, made[5].positives[0]))
    for i, record in enumerate(made):
        n = len(record.positives) + len(record.negatives)
        made[i] = replace(record, scores=tuple(np.sin(range(i, i + n)).tolist()))
    return made


def gradient_of_step(world: World, embedder: str, loss: LossConfig, budget: int) -> tuple[float, np.ndarray]:
    """Do a step's passes in float64.  Returns the loss and the gradient, flat."""
    config = BatchConfig(max_tokens=400, negatives=3)
    batch = build_batch(records(), Tokenizer.load(Path(embedder)), config, seed=1, step=4, world=world)
    model = fresh_model(embedder, torch.float64)
    result = backward_step(model, batch, loss, budget, (7, 4), world)
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    return result.loss.item(), flat.numpy()


def steps(world: World, embedder: str) -> list[tuple[float, np.ndarray]]:
    """Do a step with every loss in many micro-batches."""
    return [gradient_of_step(world, embedder, loss, 100) for loss in LOSSES]
