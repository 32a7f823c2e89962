"""What every rank of tests/test_preempted_evaluation.py does."""

import os
import signal
from pathlib import Path

from e5core.config import load_config
from e5core.distributed import World
from e5core.encode import Encoder
from e5core.encoder import EmbeddingModel
from e5core.preemption import Preempted
from e5core.train import Config, train


def interrupted(world: World, config_file: str, run: str, strategy: str) -> list[int]:
    """Train until the last rank gets SIGTERM at a micro-batch of step 4's evaluation, then go on to the end.

    Returns how many micro-batches that evaluation did, and where none is interrupted.
    """
    arguments = [f"train.run='{run}'", f'sharding.strategy="{strategy}"']
    n_evaluations, counts, is_golden = 0, [], [False]
    encode, forward = Encoder.encode, EmbeddingModel.forward

    def counted(encoder: Encoder, texts: list[str], *more: object, **named: object) -> object:
        nonlocal n_evaluations
        encoder.batch_tokens = 64
        is_golden[0] = len(texts) == 1  # they come one by one
        if not is_golden[0]:
            n_evaluations += 1
            counts.append(0)
        return encode(encoder, texts, *more, **named)

    def asking(model: EmbeddingModel, batch: object, dropout: object = None, normalize: bool = True) -> object:
        if dropout is None and counts and not is_golden[0]:
            counts[-1] += 1
            if n_evaluations == 3 and counts[-1] == 2 and world.rank == world.world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return forward(model, batch, dropout, normalize)

    Encoder.encode, EmbeddingModel.forward = counted, asking
    try:
        train(load_config(Config, Path(config_file), arguments))
    except Preempted:
        pass
    finally:
        Encoder.encode, EmbeddingModel.forward = encode, forward
    if world.is_main:
        assert (Path(run) / "PREEMPTED").is_file() and (Path(run) / "step_4").is_dir()
    train(load_config(Config, Path(config_file), [*arguments, "train.resume=true"]))
    return counts


def uninterrupted(world: World, config_file: str, arguments: list[str]) -> None:
    train(load_config(Config, Path(config_file), arguments))
