"""A run before its first step: its whole config, the files that it needs, and its folder.

Everything that can be refused is refused here, before weights are read and before anything on disk changes: a missing
file, a folder in use, a resumed run with another config.
"""

import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from e5core import checkpoint
from e5core.adapter import read_lora
from e5core.batches import BatchConfig
from e5core.cards import card_of
from e5core.checkpoint import Card
from e5core.config import existing, load_config, write_config
from e5core.distributed import World, check_same, log, share
from e5core.encoder import BackboneSource, settle_dtype
from e5core.estimate import Plan, make_plan
from e5core.fp8 import check_fp8
from e5core.lora import LoraConfig
from e5core.loss import LossConfig
from e5core.memory import Ranks, sizes_of
from e5core.mixture import DataConfig, Mixture
from e5core.optim import OptimConfig
from e5core.row_store import store_folder
from e5core.sharding import ShardingConfig
from e5core.sources import is_growing
from e5core.testsets import EvalSet, read_sets
from e5core.tokenizer import Tokenizer, TokenizerConfig
from e5core.trained import check_base, find_card, trained_folder, weight_files
from e5core.weights import read_config, resolve_model
from e5core.workload import counted

PREEMPTED = "PREEMPTED"  # in the run's folder: SIGTERM stopped the run, which waits to go on
# dtype is checked apart; recompute and workers move no bit, the strategy the last ones, as another number of ranks does
FREE_AT_RESUME = {("backbone", "dtype"), ("batch", "recompute"), ("sharding", "strategy"), ("data", "workers")}
AUTO = "auto"  # settled when a run begins, and then kept


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The [train] table."""

    run: Annotated[str, Field(min_length=1)]  # folder of the run, e.g. "runs/quickstart"
    steps: Annotated[int, Field(ge=1)] | None = None  # this or epochs
    epochs: Annotated[float, Field(gt=0)] | None = None  # rounded up to whole steps
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    full: bool = False  # train all weights, kept in fp32 beside the model's dtype, and no adapters: [lora] is left out
    deterministic: bool = False  # a GPU's results are the same bits every time; on a CPU they are anyway
    resume: bool = False  # go on from the newest checkpoint (from the start where there is none)
    overwrite: bool = False  # delete an earlier run in the folder
    save_every: Annotated[int, Field(ge=0)] = 0  # steps; 0: only at the end
    keep: Annotated[int, Field(ge=1)] = 2  # newest checkpoints, beside the best
    log_every: Annotated[int, Field(ge=1)] = 10  # steps between plain log lines; metrics.jsonl has every step

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give either steps or epochs: got steps = {self.steps}, epochs = {self.epochs}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """The [eval] table."""

    every: Annotated[int, Field(ge=0)] = 0  # steps between evaluations of `sets`; 0: none during training
    sets: tuple[EvalSet, ...] = ()  # scored during training, to choose the best checkpoint
    metric: str | None = None  # e.g. "stsb-cc-en-dev/spearman": the best checkpoint by it is kept and used
    report: tuple[EvalSet, ...] = ()  # scored before and after training, into RUN/evaluation.json
    max_tokens: Annotated[int, Field(ge=3)] = 512  # of every text that the trained model encodes (paper, appendix A)

    def __post_init__(self) -> None:
        if bool(self.every) != bool(self.sets):
            raise ValueError(f"every and sets go together: got every = {self.every} and {len(self.sets)} sets")
        measures = [measure for item in self.sets for measure in item.measures]
        if self.metric is not None and self.metric not in measures:
            raise ValueError(f"metric must be one of {measures} (of eval.sets): got {self.metric!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A whole run: every room's table."""

    train: RunConfig
    backbone: BackboneSource
    tokenizer: TokenizerConfig = TokenizerConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    sharding: ShardingConfig = ShardingConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()

    def __post_init__(self) -> None:
        if self.train.full and self.lora != LoraConfig():
            raise ValueError("train.full = true trains all weights and no adapters; leave [lora] out, or full")
        if self.train.full and self.backbone.skipped is not None:
            raise ValueError(
                'train.full = true leaves no frozen linear for backbone.frozen_dtype = "fp8"; set it to "same", or '
                "train.full to false"
            )

    @property
    def adapters(self) -> LoraConfig | None:
        """What is put on the model to be trained; None where all of its own weights are."""
        return None if self.train.full else self.lora


def check_ranks(config: Config, world: World) -> None:
    """Refuse ranks that were given different configs, and more ranks than queries.  Raises ValueError on every rank."""
    check_same({f"{t}.{k}": v for t, table in asdict(config).items() for k, v in table.items()}, world)
    if config.batch.size < world.world_size:
        raise ValueError(
            f"batch.size = {config.batch.size} is less than the number of ranks, {world.world_size}, and every rank "
            "needs a query; raise batch.size or start fewer ranks"
        )


def check_files(config: Config) -> Path:
    """Look for every file that the run needs before anything is read.  Returns the model's path."""
    for i, source in enumerate(config.data.sources):
        if config.data.store and store_folder(Path(config.data.store), source).is_dir():
            continue  # the source itself may be elsewhere
        existing(Path(source.path), f"data.sources[{i}].path")
        if is_growing(source) and config.train.steps is None:
            raise ValueError(
                f"data.sources[{i}].path = {source.path!r} is a folder, which may grow, so nobody knows how many steps "
                "train.epochs will be: give train.steps instead"
            )
    for table in ("sets", "report"):
        for i, item in enumerate(config.eval.sets if table == "sets" else config.eval.report):
            existing(Path(item.path), f"eval.{table}[{i}].path")
    for sets in (config.eval.sets, config.eval.report):
        if sets:
            read_sets(sets)
    try:
        path = resolve_model(config.backbone.path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"backbone.path: {error}") from error
    shape = read_config(path)
    _check_loss(config, shape.dim)
    longest = shape.max_positions
    for key, value in (("batch.max_tokens", config.batch.max_tokens), ("eval.max_tokens", config.eval.max_tokens)):
        if value > longest:
            raise ValueError(f"{key} = {value}: the model was made for at most {longest} tokens")
    if config.lora.init is not None:
        card = _check_init(config.lora, config.lora.init, path)
        for key, here in (("causal", config.backbone.causal), ("pooling", config.backbone.pooling)):
            there = asdict(card)[key]
            if there != here:  # adapters are started from others' on purpose, too
                log(f"lora.init was trained with backbone.{key} = {there!r}, this run has {here!r}")
    return path


def _check_loss(config: Config, dim: int) -> None:
    """Refuse what the loss cannot do with embeddings of `dim` numbers or with so few candidates."""
    trained = config.loss.prefixes(dim)[0][0]
    if trained < dim:
        log(f"loss.matryoshka trains {trained} of {dim} numbers: afterwards use --dimensions {trained} or less")
    if config.loss.distillation is not None and config.batch.negatives == 0:
        raise ValueError(
            "loss.distillation compares a query's own candidates, and batch.negatives = 0 leaves it a single one, of "
            "which nothing can be learnt; give 1 or more"
        )


def _check_init(lora: LoraConfig, init: str, base: Path) -> Card:
    """Refuse an adapter to start from that is of other sizes than [lora] says, or of another base model.

    Returns its card.
    """
    folder = trained_folder(existing(Path(init), "lora.init"))
    if folder is None:
        raise ValueError(f"lora.init = {init!r} is no run and no adapter folder: it holds no adapter_config.json")
    if weight_files(folder):
        raise ValueError(
            f"lora.init = {init!r}: all its weights were trained, so it holds no adapter; export it as a merged model "
            "(python -m e5core.export) and give that as backbone.path"
        )
    stored, _ = read_lora(folder)
    of_adapter = {"rank": stored.rank, "alpha": stored.alpha, "targets": sorted(stored.targets)}
    of_config = {"rank": lora.rank, "alpha": lora.alpha, "targets": sorted(lora.targets)}
    wrong = [f"lora.{key} is {of_config[key]!r}, {value!r} there" for key, value in of_adapter.items()
             if of_config[key] != value]  # fmt: skip
    if wrong:
        raise ValueError(f"lora.init = {init!r} does not fit: {'; '.join(wrong)}; set them as the adapter has them")
    checkpoint.check_files(folder)
    card = find_card(folder, str(base))
    check_base(folder, card)
    return card


def check_folder(run: Path, config: Config, world: World) -> None:
    """Refuse a folder that the run may not use, or whose newest checkpoint is damaged; nothing is changed yet."""
    if config.train.resume:
        checkpoint.check_newest(run, world)
        if checkpoint.steps_of(run):
            _check_same(load_config(Config, run / "config.toml"), config, run)
        return
    if not run.exists():
        return
    if not config.train.overwrite:
        raise FileExistsError(f"{run} exists; go on with train.resume=true, or delete it with train.overwrite=true")
    if any(run.iterdir()) and not all((run / name).is_file() for name in ("config.toml", "tokens.txt")):
        raise FileExistsError(f"{run} is no run folder, so train.overwrite does not delete it; move it away")


def make_folder(run: Path, config: Config) -> int | None:
    """Make the run's folder, new or to go on in.  Returns the step to go on from, None for a run from the start."""
    steps = checkpoint.steps_of(run)
    if config.train.resume and steps:
        (run / PREEMPTED).unlink(missing_ok=True)
        checkpoint.clean(run)
        return steps[-1]
    if config.train.resume:
        log(f"{run} holds no checkpoint: the run starts from the beginning")
    if run.exists():
        shutil.rmtree(run)
    run.mkdir(parents=True)
    write_config(config, run / "config.toml")
    return None


def _check_same(stored: Config, config: Config, run: Path) -> None:
    """Refuse to go on with another config than the run began with (where that would change its numbers)."""

    def comparable(value: Config) -> dict:
        free = {"run": "", "resume": False, "overwrite": False, "save_every": 0, "keep": 1, "log_every": 1}
        tables = asdict(replace(value, train=replace(value.train, **free), eval=EvalConfig()))
        return {f"{t}.{k}": v for t, table in tables.items() for k, v in table.items() if (t, k) not in FREE_AT_RESUME}

    old, new = comparable(stored), comparable(config)
    changed = [f"{key} was {old[key]!r}, is {new[key]!r}" for key in old if new[key] not in (old[key], AUTO)]
    if changed or config.backbone.dtype not in ("auto", stored.backbone.dtype):
        raise ValueError(
            f"{run} was begun with another config: {'; '.join(changed) or 'backbone.dtype'}; put it back, or start a "
            "new run with another train.run"
        )


def resolve_dtype(config: Config, run: Path, world: World) -> Config:
    """Settle dtype = "auto": as the run began, else by rank 0's measurement."""
    stored = None
    if world.is_main and config.backbone.dtype == "auto" and config.train.resume and checkpoint.steps_of(run):
        stored = load_config(Config, run / "config.toml").backbone.dtype
    name = share(stored, world)[0]
    if name is None:
        dtype, why = settle_dtype(config.backbone.dtype, world)
        name = str(dtype).removeprefix("torch.")
        log(f"dtype {name} ({why})")
    return replace(config, backbone=replace(config.backbone, dtype=name))


def settle_batch(
    config: Config, run: Path, mixture: Mixture, model_path: Path, dtype: torch.dtype, world: World
) -> tuple[Config, Plan]:
    """Settle what [batch] and [sharding] leave to "auto", as the plan for rank 0's device says.

    Of a resumed run [batch] stays as it began; the strategy is chosen anew for the ranks that there are.
    Returns the config, its [batch] without "auto" and the same on all ranks, and the plan, whose strategy is settled.
    """
    if config.backbone.skipped is not None:
        check_fp8(world.device, dtype)
    shape = read_config(model_path, causal=config.backbone.causal)
    sizes = sizes_of(shape, config.adapters, config.backbone.pooling, config.backbone.skipped)
    tokenizer = Tokenizer.load(model_path, config.tokenizer)
    work = counted(mixture, tokenizer, config.batch, total_steps(config, mixture))
    card, ranks = card_of(world.device), Ranks(world.world_size, world.local_size)
    batch, strategy = config.batch, config.sharding.strategy
    if AUTO in (batch.micro_batch_tokens, batch.recompute, strategy):
        planned = make_plan(sizes, work, batch, strategy, ranks, card, dtype)
        (strategy, tokens, policy), why = planned.chosen.setting, planned.why
        if world.is_main and config.train.resume and checkpoint.steps_of(run):
            stored = load_config(Config, run / "config.toml").batch
            (tokens, policy), why = (stored.micro_batch_tokens, stored.recompute), "as the run began"
        strategy, tokens, policy = share((strategy, tokens, policy), world)[0]
        if AUTO in (batch.micro_batch_tokens, batch.recompute):
            log(f"micro_batch_tokens {tokens}, recompute {policy} ({why})")
        if batch.micro_batch_tokens == AUTO:
            batch = replace(batch, micro_batch_tokens=tokens)
        if batch.recompute == AUTO:
            batch = replace(batch, recompute=policy)
    return replace(config, batch=batch), make_plan(sizes, work, batch, strategy, ranks, card, dtype)


def total_steps(config: Config, mixture: Mixture) -> int:
    """Return the number of optimisation steps of the run."""
    if config.train.steps is not None:
        return config.train.steps
    return math.ceil(config.train.epochs * mixture.epoch_size / config.batch.size)
