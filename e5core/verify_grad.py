"""Is the gradient that a run trains on that of the whole batch?  torchrun ... -m e5core.verify_grad CONFIG.toml

The first step of the user's own config is done twice: split, as training does it, over ranks, shards and micro-batches
with its recompute policy; and whole, by every rank for itself, in one pass that keeps everything. Adapters start with
random B, since B = 0 would leave A without a gradient and hide faults in it. With the split gradient g and the whole w:

    scale   <g, w> / <w, w>      1: clipping, weight decay and learning rate mean what they say
    cosine  <g, w> / |g| |w|     1: the direction is right

Trainers have been seen at a scale of 1/W or W on W ranks, which Adam hides, and at a cosine of 0.93.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from e5core.batches import GlobalBatch, build_batch
from e5core.config import load_config
from e5core.distributed import World, alone, finish, log, log_error, share, start
from e5core.encoder import EmbeddingModel, build_model, settle_dtype
from e5core.lora import adapters
from e5core.mixture import load_mixture
from e5core.recompute import apply_recompute
from e5core.run import Config, check_files, check_ranks
from e5core.step import backward_step
from e5core.tokenizer import Tokenizer

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the scale; its square: the cosine


@dataclass(frozen=True, slots=True)
class Comparison:
    """The split step beside the whole one, from the rank where it came out worst."""

    loss: float
    whole_loss: float
    scale: float
    cosine: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether scale and cosine are 1 up to the rounding of the dtype."""
        return abs(self.scale - 1) <= self.tolerance and 1 - self.cosine <= max(self.tolerance**2, 1e-6)


def verify_gradient(config: Config, world: World) -> Comparison:
    """Compare the gradients of the first step, split and whole.

    The whole one needs the memory of all the batch's tokens at once: lower batch.size where that is too much.
    Raises ValueError, OSError or FloatingPointError, each of which says what to do.
    """
    check_ranks(config, world)
    path = check_files(config)
    homogeneous = config.batch.size if config.batch.composition == "homogeneous" else None
    chosen = {"homogeneous": homogeneous, "scored": config.loss.distillation is not None}
    mixture, _ = load_mixture(config.data, config.train.seed, world=world, **chosen)
    tokenizer = Tokenizer.load(path, config.tokenizer)
    dtype, _ = settle_dtype(config.backbone.dtype, world)
    seed, settings = config.train.seed, config.batch
    model = build_model(
        path,
        dtype,
        world.device,
        causal=config.backbone.causal,
        pooling=config.backbone.pooling,
        fp8_skip=config.backbone.skipped,
        lora=config.adapters,
        full=config.train.full,
        seed=seed,
        recompute=settings.recompute,
        strategy=config.sharding.strategy,
        world=world,
    )
    _randomise_b(model, seed)
    records = mixture.batch(0, settings.size)
    split = build_batch(records, tokenizer, settings, seed, 0, world)
    loss, gradient = _gradient(model, split, config, settings.micro_batch_tokens, world)
    apply_recompute(model.backbone, "none", model.token_keys)
    myself = alone()
    whole = build_batch(records, tokenizer, settings, seed, 0, myself)
    log(f"{whole.n_queries} queries, {whole.n_tokens:,} tokens; ranks: {world.world_size}; {dtype}")
    whole_loss, wanted = _gradient(model, whole, config, whole.n_tokens, myself)
    if model.shards is not None:
        wanted /= model.shards.world.world_size * model.shards.replicas.world_size  # each rank added the same to it
    product, square = gradient @ wanted, wanted @ wanted
    found = share(((product / square).item(), (product / (gradient.norm() * square.sqrt())).item()), world)
    scale, cosine = max(found, key=lambda pair: abs(pair[0] - 1) + 1 - pair[1])
    rounding = dtype if model.fp8_skip is None else torch.bfloat16  # a step of e4m3 is more than any of the dtype's
    return Comparison(loss, whole_loss, scale, cosine, TOLERANCES[rounding])


def _gradient(
    model: EmbeddingModel, batch: GlobalBatch, config: Config, budget: int, world: World
) -> tuple[float, Tensor]:
    """Do a step's forward and backward passes.  Returns the loss and the gradient, flat, in float64."""
    loss = backward_step(model, batch, config.loss, budget, (config.train.seed, 0), world).loss.item()
    gradients = {name: parameter.grad for name, parameter in model.trained().items()}
    if model.shards is not None:
        gradients = dict(model.shards.whole(gradients))
    flat = torch.cat([gradient.flatten().double() for gradient in gradients.values()])
    for parameter in model.trained().values():
        parameter.grad = None
    return loss, flat


@torch.no_grad()
def _randomise_b(model: EmbeddingModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, linear in adapters(model.backbone):
        bound = 1 / linear.lora_b.shape[0] ** 0.5
        values = torch.empty(linear.lora_b.shape).uniform_(-bound, bound, generator=generator)
        if model.put is None:
            linear.lora_b.copy_(values)
        else:
            model.put(f"{name}.lora_b", values)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.  Returns the exit status: 0, 1 where the gradients differ, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node N -m e5core.verify_grad", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("config", type=Path, help="a training's TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values in TOML, e.g. batch.size=64")
    arguments = parser.parse_args(argv)
    try:
        world = start()
        found = verify_gradient(load_config(Config, arguments.config, arguments.overrides), world)
    except (ValueError, OSError, FloatingPointError) as error:
        log_error(f"e5core.verify_grad: {error}")
        return 2
    if world.is_main:
        verdict = "passed" if found.passed else "FAILED: this run would not train on the gradient of its batch"
        sys.stdout.write(
            f"loss   {found.loss:.6f}, whole {found.whole_loss:.6f}\n"
            f"scale  {found.scale:.6f}  (allowed: 1 +- {found.tolerance:g})\ncosine {found.cosine:.9f}\n{verdict}\n"
        )
    finish()
    return 0 if found.passed else 1


if __name__ == "__main__":
    sys.exit(main())
