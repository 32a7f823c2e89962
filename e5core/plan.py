"""Memory, traffic and time of a run before it begins: `python -m e5core.plan CONFIG.toml [section.key=value ...]`.

No weights are loaded: config.json (or a .gguf file's head) says the sizes. Where tokenizer and training records are
there, tokens are counted on a sample; else lengths are assumed, and said to be. With --assume-lengths they always are,
and no record is read. `batch.micro_batch_tokens = "auto"` and `batch.recompute = "auto"` are chosen for the card, as
training does on its own.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from e5core.cards import CARDS, card_of
from e5core.config import load_config
from e5core.distributed import alone, log_error
from e5core.encoder import choose_dtype
from e5core.estimate import STRATEGIES, Plan, describe, make_plan
from e5core.memory import Ranks, sizes_of
from e5core.mixture import load_mixture
from e5core.run import Config, total_steps
from e5core.tokenizer import Tokenizer
from e5core.weights import read_config, resolve_model
from e5core.workload import Workload, assumed, counted


def plan(
    config: Config,
    *,
    gpu: str | None = None,
    ranks: Ranks,
    strategy: str = "auto",
    n_steps: int | None = None,
    assume_lengths: bool = False,
) -> Plan:
    """Plan a run.

    gpu: a key of cards.CARDS, "cpu" (this one, measured), or None for this machine's device.  n_steps: in place of the
    config's.  assume_lengths: no record is read, so an epoch's number of steps stays unknown.
    Raises ValueError or OSError for a config, model or record that cannot be read.
    """
    path = resolve_model(config.backbone.path)
    if gpu in CARDS:
        card = CARDS[gpu]
    else:
        card = card_of(torch.device("cpu") if gpu == "cpu" else alone().device)
    # a GPU that is not here takes what "auto" means on it
    dtype, _ = choose_dtype(config.backbone.dtype, torch.device(card.kind))
    source = config.backbone
    if source.skipped is not None and not card.fp8_gain:
        raise ValueError(f'backbone.frozen_dtype = "fp8": {card.name} has no products in fp8; set it to "same"')
    sizes = sizes_of(read_config(path, causal=source.causal), config.adapters, source.pooling, source.skipped)
    work = _workload(config, path, n_steps, assume_lengths)
    return make_plan(sizes, work, config.batch, strategy, ranks, card, dtype)


def _workload(config: Config, path: Path, n_steps: int | None, assume_lengths: bool) -> Workload:
    if assume_lengths:
        return assumed(config.batch, n_steps or config.train.steps)
    mixture, _ = load_mixture(config.data, config.train.seed)
    n_steps = n_steps or total_steps(config, mixture)
    if not _has_tokenizer(path):
        return assumed(config.batch, n_steps)
    return counted(mixture, Tokenizer.load(path, config.tokenizer), config.batch, n_steps)


def _has_tokenizer(path: Path) -> bool:
    return path.is_file() or any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.  Returns the exit status: 0; 1 where nothing fits; 2 with a line on stderr for an error."""
    parser = argparse.ArgumentParser(
        prog="python -m e5core.plan",
        description=__doc__.split("\n\n")[0],
        epilog="Every figure is predicted from data sheets and counted bytes; e5core/cards.py holds the assumptions.",
    )
    parser.add_argument("config", type=Path, help="TOML file, e.g. configs/e5_mistral_7b.toml")
    parser.add_argument("overrides", nargs="*", help="section.key=value, e.g. batch.micro_batch_tokens=auto")
    parser.add_argument("--gpu", choices=[*CARDS, "cpu"], help="default: this machine's device")
    parser.add_argument("--world-size", type=int, default=1, help="ranks, one a GPU")
    parser.add_argument("--per-node", type=int, default=8, help="ranks of a node (default: 8)")
    parser.add_argument("--strategy", choices=["auto", *STRATEGIES], default="auto", help="how the model is sharded")
    parser.add_argument("--steps", type=int, help="of the run, in place of what config and records give")
    parser.add_argument("--assume-lengths", action="store_true", help="of texts; no record is read")
    arguments = parser.parse_intermixed_args(argv)  # overrides and options in any order
    for name in ("world_size", "per_node"):
        if vars(arguments)[name] < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1: got {vars(arguments)[name]}")
    try:
        config = load_config(Config, arguments.config, arguments.overrides)
        found = plan(
            config, gpu=arguments.gpu, ranks=Ranks(arguments.world_size, arguments.per_node),
            strategy=arguments.strategy, n_steps=arguments.steps, assume_lengths=arguments.assume_lengths,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        log_error(f"e5core.plan: {error}")
        return 2
    sys.stdout.write(describe(found))
    return 0 if found.does_fit else 1


if __name__ == "__main__":
    sys.exit(main())
