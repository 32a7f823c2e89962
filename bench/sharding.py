"""Time a sharded step beside an unsharded one: torchrun --nproc-per-node 2 -m bench.sharding [--batch 16].

The first batch of a training, in turns by each strategy; "gathers alone" goes through the same gathers with nothing to
compute. hidden_percent is the part of their time that the sharded step does not show: 100 (1 - (full - none) / alone);
on a CPU, whose cores also carry gloo's copies, it can be small or negative. The bytes moved are held against the
formula: for m micro-batches of a model of n blocks, m n + (2 m - 1)(n - 1) gathers of a block and one of the root,
(W - 1) / W of each.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bench.roofline import device_name, record
from e5core.batches import GlobalBatch, build_batch, pack
from e5core.config import load_config
from e5core.distributed import World, finish, largest, log, share, start
from e5core.encoder import EmbeddingModel, build_model
from e5core.mixture import load_mixture
from e5core.run import Config
from e5core.step import backward_step
from e5core.tokenizer import Tokenizer
from e5core.weights import resolve_model


def main() -> int:
    """Measure and record.  Returns the exit status, 1 where the bytes are not those of the formula."""
    arguments = _parser().parse_args()
    world, config = start(), load_config(Config, arguments.config)
    config = replace(config, batch=replace(config.batch, size=arguments.batch))
    path = resolve_model(config.backbone.path)
    mixture, _ = load_mixture(config.data, 0, world=world)
    records = mixture.batch(0, arguments.batch)
    batch = build_batch(records, Tokenizer.load(path, config.tokenizer), config.batch, 0, 0, world)
    m = largest(len(pack(batch.sequences, arguments.micro_batch_tokens, world.device)), world)

    def step(model: EmbeddingModel) -> Callable[[], object]:
        return lambda: _step(model, batch, config, arguments.micro_batch_tokens, world)

    models = {name: _model(path, config, name, world) for name in ("none", "full")}
    shards = models["full"].shards
    step(models["full"])()
    moved, expected = shards.traffic.gathered_bytes, _expected_bytes(models["none"], m, world.world_size)
    seconds: dict[str, list[float]] = {"none": [], "full": [], "gathers alone": []}
    for _ in range(arguments.runs):
        for name, model in models.items():
            seconds[name].append(_timed(step(model), world))
        seconds["gathers alone"].append(_timed(lambda: _gather_alone(models["full"], m), world))
    none_s, full_s, alone_s = (sorted(times)[arguments.runs // 2] for times in seconds.values())
    if world.is_main:
        row = {"bench": "sharding", "ranks": world.world_size, "model": path.name, "batch": arguments.batch}
        row |= {"micro_batches": m, "none_s": round(none_s, 3), "full_s": round(full_s, 3)}
        row |= {"gathers_alone_s": round(alone_s, 3), "hidden_percent": round(100 * (1 - (full_s - none_s) / alone_s))}
        row |= {"gathered_bytes": moved, "formula_bytes": expected, "most_units": shards.traffic.most_gathered}
        record(row, world.device, arguments.out or Path(f"bench/results/{device_name(world.device)}.jsonl"))
    finish()
    return int(moved != expected)


def _model(path: Path, config: Config, strategy: str, world: World) -> EmbeddingModel:
    log(f"loading for strategy {strategy}")
    return build_model(
        path, torch.float32, world.device, causal=True, lora=config.lora, seed=0, strategy=strategy, world=world
    )


def _step(model: EmbeddingModel, batch: GlobalBatch, config: Config, budget: int, world: World) -> None:
    backward_step(model, batch, config.loss, budget, (0, 0), world)
    for parameter in model.trained().values():
        parameter.grad = None


def _gather_alone(model: EmbeddingModel, m: int) -> None:
    """Gather as a step of m micro-batches does: m - 1 forward passes, then m forward and backward."""
    for i in range(2 * m - 1):
        model.shards.idle(backward=i >= m - 1)
    model.shards.release()


def _expected_bytes(model: EmbeddingModel, m: int, world_size: int) -> int:
    layers = model.backbone.layers
    block = sum(p.nbytes for p in layers[0].parameters())
    root = sum(p.nbytes for p in model.parameters()) - len(layers) * block
    n_gathers = m * len(layers) + (2 * m - 1) * (len(layers) - 1)
    return (n_gathers * block + root) // world_size * (world_size - 1)


def _timed(run: Callable[[], object], world: World) -> float:
    """Time a call from when all ranks begin until the last ends."""
    share(0, world)
    began = time.perf_counter()
    run()
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return max(share(time.perf_counter() - began, world))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/smollm2.toml"), help="whose first batch is taken")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
