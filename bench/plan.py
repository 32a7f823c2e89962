"""Hold a plan's memory against a step's: python -m bench.plan [KEY=VALUE ...] [--config CONFIG] [--dry].

A model of the config's sizes with random weights does one step, of two micro-batches of --tokens on each rank, under
each recompute policy; predicted is the ledger of e5core.memory, measured what torch's allocator held at most: by CUDA's
own count, or on the CPU all allocations of a profile added up. No weights are read: config.json or a .gguf file's head
is enough. Under torchrun each rank does its part, and rank 0 tells its own.
--dry counts what a GPU would be asked for, without one (dry_run.py); --world-size then makes it one rank of so many.
"""

import argparse
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch

from bench.dry_run import dry_run
from bench.models import SIZES, filled_model, write_config
from bench.op import allocations
from bench.roofline import device_name, record
from e5core.batches import GlobalBatch
from e5core.cards import MIB
from e5core.config import load_config
from e5core.distributed import World, finish, start
from e5core.encoder import choose_dtype
from e5core.memory import Load, Ranks, Setting, ledger, sizes_of
from e5core.optim import OptimConfig
from e5core.recompute import Policy
from e5core.run import Config
from e5core.step import backward_step, make_optimizer
from e5core.weights import read_config, resolve_model
from e5kernels.infonce import Relations

LIMIT = 0.1  # what a plan may be off
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def random_batch(n_tokens: int, length: int, vocab_size: int, world: World) -> GlobalBatch:
    """Make pairs of random texts of a length, n_tokens in all on each rank."""
    n = n_tokens // length // 2
    ids = torch.randint(0, vocab_size, (2 * n, length), generator=torch.Generator().manual_seed(0)).tolist()
    every = torch.arange(n * world.world_size)
    own, is_open = every[n * world.rank :][:n], torch.ones(len(every), dtype=torch.bool)
    relations = Relations(own, own, every, -1 - own[:, None], every, is_open[:n], is_open)
    rows = [*own.tolist(), *(len(every) + own).tolist()]
    candidates, names = every.unflatten(0, (-1, n)).tolist(), [str(i) for i in every.tolist()]
    return GlobalBatch(ids, rows, relations, candidates, [None] * n, names, 0)


def measure(config: Config, setting: Setting, length: int, world: World, device: torch.device) -> dict[str, Any]:
    """Do a step of two full micro-batches.  Returns its row.

    length: of a text, which divides the micro-batch's tokens.  device: that is planned for; the world's, or a dry one.
    """
    path, source = resolve_model(config.backbone.path), config.backbone
    sizes = sizes_of(read_config(path), config.adapters, source.pooling, source.skipped)
    dtype, _ = choose_dtype(source.dtype, device)
    budget = setting.micro_batch_tokens
    batch = random_batch(2 * budget, length, sizes.config.vocab_size, world)
    n_own = batch.n_queries // world.world_size
    load = Load(budget, budget, batch.n_tokens, len(batch.sequences), n_own, batch.n_queries)
    lines = ledger(sizes, setting, Ranks(world.world_size, world.local_size), load, dtype, device)
    held = {"full": config.train.full, "strategy": setting.strategy, "world": world}
    made: list[Any] = []  # model and optimizer

    def begin() -> None:
        model = filled_model(path, source, config.adapters, dtype, world.device, setting.recompute, **held)
        made.extend((model, make_optimizer(model, OptimConfig())))

    def step() -> None:
        backward_step(made[0], batch, config.loss, budget, (0, 0), world)

    measured = allocations(begin, world.device)[0] + allocations(step, world.device)[1]
    predicted = sum(lines.values())
    row = {"dtype": str(dtype).removeprefix("torch."), "frozen_dtype": source.frozen_dtype}
    row |= {"full": config.train.full, "strategy": setting.strategy, "ranks": world.world_size}
    row |= {"recompute": setting.recompute, "micro_batch_tokens": budget, "candidates": batch.n_queries}
    row |= {"predicted_mib": round(predicted / MIB, 1), "measured_mib": round(measured / MIB, 1)}
    is_near = abs(predicted / measured - 1) <= LIMIT
    return row | {"ratio": round(predicted / measured, 4), "limit": "pass" if is_near else "fail"}


def main(argv: list[str] | None = None) -> int:
    """Measure every policy at every micro-batch size, a row each.  Returns the exit status, 1 where one is off."""
    arguments = _arguments(argv)
    config = load_config(Config, arguments.config, arguments.overrides)
    if arguments.dry:
        world, device, name = World(rank=0, world_size=arguments.world_size, device=CPU), CUDA, "dry_run"
    else:
        world = start()
        device, name = world.device, device_name(world.device)
    out, failed = arguments.out or Path(f"bench/results/{name}.jsonl"), 0
    with dry_run() if arguments.dry else nullcontext(), TemporaryDirectory() as folder:
        if arguments.random:
            write_config(Path(folder), SIZES[arguments.random], torch.bfloat16)
            config = replace(config, backbone=replace(config.backbone, path=folder))
        for policy, n_tokens in product(arguments.recompute, arguments.tokens):
            row = measure(config, Setting(arguments.strategy, n_tokens, policy), arguments.length, world, device)
            failed += row["limit"] == "fail"
            model = f"random {arguments.random}" if arguments.random else Path(config.backbone.path).name
            if world.is_main:
                record({"bench": "plan", "dry": arguments.dry, "model": model} | row, world.device, out)
    finish()
    return int(failed > 0)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the config, as e5core.plan takes them")
    parser.add_argument("--config", type=Path, default=Path("configs/smollm2.toml"), help="whose backbone and adapters")
    parser.add_argument("--random", choices=SIZES, help="sizes of bench/models.py in place of those of backbone.path")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="of a micro-batch")
    parser.add_argument("--length", type=int, default=128, help="of a text in tokens, which says how many there are")
    parser.add_argument("--recompute", nargs="+", choices=get_args(Policy), default=get_args(Policy))
    parser.add_argument("--strategy", choices=("none", "hybrid", "full"), default="none")
    parser.add_argument("--dry", action="store_true", help="count what a GPU would be asked for, without one")
    parser.add_argument("--world-size", type=int, default=1, help="of a dry run, which is rank 0's")
    parser.add_argument("--out", type=Path, help="JSON-lines file to append to (default: bench/results/DEVICE.jsonl)")
    arguments = parser.parse_intermixed_args(argv)  # overrides may stand anywhere but behind a list
    if any(n % arguments.length for n in arguments.tokens):
        parser.error(f"--tokens must be multiples of --length {arguments.length}: got {arguments.tokens}")
    if arguments.dry and arguments.strategy == "hybrid":
        parser.error("--dry has no other rank to ask how nodes are made up, as --strategy hybrid does")
    if not arguments.dry and arguments.world_size > 1:
        parser.error("--world-size is a dry run's; start real ranks by torchrun")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
