"""Train an embedder: `torchrun --nproc-per-node 1 -m e5core.train CONFIG.toml [section.key=value ...]`.

One step, exact for any micro-batch size (GradCache, arXiv 2101.06983, with the fullest piece kept):

    pass 1   embed every micro-batch without a graph, the fullest one with its graph
    loss     InfoNCE over the whole batch, and its gradient at the embeddings
    pass 2   the kept graph takes its gradient; every other micro-batch is embedded again with a graph and takes its own

Dropout is a function of (seed, step, row, position), so both passes draw the same. A batch that fits one micro-batch is
thereby one plain pass. The run's folder holds all that there is to say about it (checkpoint.py, DESIGN 3.10).
"""

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

import e5core.attention
import e5kernels.infonce
import e5kernels.last_token
from e5core import checkpoint
from e5core.batches import BatchConfig, GlobalBatch, build_batch, pack
from e5core.config import existing, load_config, write_config
from e5core.distributed import log, start
from e5core.encode import TEMPLATE, Encoder
from e5core.encoder import BackboneSource, EmbeddingModel, build_model, choose_dtype
from e5core.evaluate import evaluate, show_table
from e5core.lora import LoraConfig, adapters
from e5core.loss import InfoNCE, LossConfig, infonce_loss
from e5core.metrics import MetricsFile, Progress
from e5core.mixture import DataConfig, Mixture, load_mixture
from e5core.optim import AdamW, OptimConfig, learning_rate
from e5core.testsets import EvalSet, read_sets
from e5core.tokenizer import Tokenizer, TokenizerConfig
from e5core.weights import fingerprint, resolve_model


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The [train] table."""

    run: Annotated[str, Field(min_length=1)]  # folder of the run, e.g. "runs/quickstart"
    steps: Annotated[int, Field(ge=1)] | None = None  # this or epochs
    epochs: Annotated[float, Field(gt=0)] | None = None  # rounded up to whole steps
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
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
        if self.every and not self.sets:
            raise ValueError("every asks for evaluations, but sets is empty; add [[eval.sets]]")
        if self.metric is not None and (not self.every or self.metric.partition("/")[0] not in self.names):
            raise ValueError(
                f"metric must be SET/MEASURE of an evaluated set: got {self.metric!r}, sets are {self.names}"
            )

    @property
    def names(self) -> list[str]:
        """Names of the sets scored during training."""
        return [item.name for item in self.sets]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A whole run: every room's table."""

    train: RunConfig
    backbone: BackboneSource
    tokenizer: TokenizerConfig = TokenizerConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()


def train(config: Config) -> dict[str, dict[str, float]]:
    """Run a training from config to evaluation.  Returns what RUN/evaluation.json holds.

    Raises ValueError, OSError or FloatingPointError, each of which says what to do.
    """
    device = start().device
    run = Path(config.train.run)
    model_path = _check_files(config)
    resume_step = _prepare_folder(run, config)
    config = _resolve_dtype(config, run, device)
    mixture, skipped = load_mixture(config.data, config.train.seed)
    for message in skipped:
        log(f"skipped {message}")
    tokenizer = Tokenizer.load(model_path, config.tokenizer)
    write_config(config, run / "config.toml")
    _show_start(config, mixture, tokenizer, device)
    dtype, _ = choose_dtype(config.backbone.dtype, device)
    model = build_model(
        model_path, dtype, device, causal=config.backbone.causal, lora=config.lora, seed=config.train.seed
    )
    encoder = Encoder(model, tokenizer, device, config.eval.max_tokens)
    scores = _report(run, "before", encoder, config.eval.report)
    _loop(config, run, encoder, mixture, model_path, resume_step)
    best = checkpoint.read_best(run)
    if best is not None:
        checkpoint.read_adapter(checkpoint.step_folder(run, best["step"]), model.backbone)
        log(f"best checkpoint: step {best['step']} with {best['metric']} = {best['value']:.2f}")
    scores |= _report(run, "after", encoder, config.eval.report)
    if config.eval.report:
        show_table(scores)
    log(f"the run is in {run}")
    return scores


def total_steps(config: Config, mixture: Mixture) -> int:
    """Return the number of optimisation steps of the run."""
    if config.train.steps is not None:
        return config.train.steps
    return math.ceil(config.train.epochs * mixture.epoch_size / config.batch.size)


def backward_step(
    model: EmbeddingModel,
    batch: GlobalBatch,
    loss: LossConfig,
    budget: int,
    dropout: tuple[int, int] | None,
) -> InfoNCE:
    """Compute the loss of a batch and leave its gradient in the adapters (added to what is there).

    budget: tokens of a micro-batch.  dropout: (seed, step).  Raises FloatingPointError naming records for a loss
    that is not finite.
    """
    device = model.backbone.norm.weight.device
    *pieces, fullest = sorted(pack(batch.sequences, budget, device), key=lambda piece: len(piece.tokens))
    with torch.no_grad():
        parts = [model(piece, dropout) for piece in pieces]
    kept = model(fullest, dropout)
    order = torch.cat([piece.rows for piece in (*pieces, fullest)]).argsort()
    embeddings = torch.cat([*parts, kept.detach()])[order].requires_grad_()  # (Q + P, D)
    result = infonce_loss(embeddings, batch, loss)
    if not torch.isfinite(result.loss):
        rows = torch.isfinite(embeddings).all(dim=1).logical_not().nonzero().flatten().tolist()
        raise FloatingPointError(f"the loss is not finite ({result.loss.item()}): {_blame(batch, rows)}")
    (gradient,) = torch.autograd.grad(result.loss, embeddings)
    kept.backward(gradient[fullest.rows])
    del kept
    for piece in pieces:
        model(piece, dropout).backward(gradient[piece.rows])
    return result


def _blame(batch: GlobalBatch, rows: list[int]) -> str:
    owner = batch.relations.owner.tolist()
    ids = {batch.record_ids[row if row < batch.n_queries else owner[row - batch.n_queries]] for row in rows}
    if not ids:
        return f"all embeddings are finite; records {', '.join(batch.record_ids[:5])}, ..."
    return f"embeddings of records {', '.join(sorted(ids)[:5])} are not; lower optim.lr or look at these texts"


def _loop(
    config: Config, run: Path, encoder: Encoder, mixture: Mixture, model_path: Path, resume_step: int | None
) -> None:
    """Train from the resumed step (or the first) to the last, with logs, evaluations and checkpoints."""
    model, n_steps = encoder.model, total_steps(config, mixture)
    optimizer = AdamW(_trainable(model), config.optim)
    digest = _data_digest(mixture)
    if resume_step is not None:
        checkpoint.restore(checkpoint.step_folder(run, resume_step), model, optimizer, digest)
        log(f"resumed after step {resume_step}")
    card = _card(config, model_path, encoder)
    metrics = MetricsFile(run / "metrics.jsonl", resume_step)
    try:
        with Progress(n_steps, config.train.log_every) as progress:
            for step in range(resume_step or 0, n_steps):
                logged = _train_step(config, encoder, mixture, optimizer, step, n_steps)
                done, best = step + 1, False
                if config.eval.every and (done % config.eval.every == 0 or done == n_steps):
                    logged["eval"] = evaluate(encoder, config.eval.sets)
                    best = _is_best(run, config.eval.metric, logged["eval"])
                metrics.write(logged)
                progress.step(logged)
                if best or done == n_steps or (config.train.save_every and done % config.train.save_every == 0):
                    golden = encoder.golden_vectors()
                    checkpoint.save(run, done, encoder.model, config.lora, card, golden, optimizer, digest)
                    if best:
                        value = logged["eval"][config.eval.metric]
                        checkpoint.write_json(
                            run / "best.json", {"step": done, "metric": config.eval.metric, "value": value}
                        )
                    checkpoint.prune(run, config.train.keep)
    finally:
        metrics.close()


def _train_step(
    config: Config, encoder: Encoder, mixture: Mixture, optimizer: AdamW, step: int, n_steps: int
) -> dict[str, Any]:
    """Do step `step` (from 0).  Returns the line for metrics.jsonl."""
    started = time.perf_counter()
    seed, first = config.train.seed, step == 0
    batch = build_batch(mixture.batch(step, config.batch.size), encoder.tokenizer, config.batch, seed, step)
    result = backward_step(encoder.model, batch, config.loss, config.batch.micro_batch_tokens, (seed, step))
    try:
        grad_norm = optimizer.clip_gradients()
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step + 1}: {error}; records {', '.join(batch.record_ids[:5])}, ...") from error
    lr = learning_rate(config.optim, step, n_steps)
    optimizer.update(lr)
    if first:
        _check_moved(encoder.model)
    seconds = time.perf_counter() - started
    return {
        "step": step + 1,
        "loss": result.loss.item(),
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens_per_s": round(batch.n_tokens / seconds, 1),
        "in_batch_accuracy": result.accuracy.item(),
        "negatives_per_query": result.negatives.float().mean().item(),
        "tokens": batch.n_tokens,
        "truncated": batch.n_truncated,
        "epoch": (step + 1) * config.batch.size / mixture.epoch_size,
        "seconds": round(seconds, 3),
    }


def _check_moved(model: EmbeddingModel) -> None:
    """Stop a run whose adapters do not learn (peft #1402: B stayed zero while the loss fell)."""
    still = [name for name, linear in adapters(model.backbone) if not linear.lora_b.any()]
    if still:
        raise RuntimeError(
            f"after the first step lora_b of {len(still)} linears is still zero, first of them {still[0]}"
        )


def _trainable(model: EmbeddingModel) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _is_best(run: Path, metric: str | None, scores: dict[str, float]) -> bool:
    if metric is None:
        return False
    if metric not in scores:
        raise ValueError(f"eval.metric {metric!r} was not measured; measured are {', '.join(scores)}")
    best = checkpoint.read_best(run)
    return best is None or scores[metric] > best["value"]


def _report(run: Path, moment: str, encoder: Encoder, sets: Sequence[EvalSet]) -> dict[str, dict[str, float]]:
    """Score the report sets at this moment of the run and write them to RUN/evaluation.json.  Returns its content."""
    file = run / "evaluation.json"
    scores = json.loads(file.read_text()) if file.is_file() else {}
    if sets and (moment == "after" or moment not in scores):
        log(f"evaluating {moment} training: {', '.join(item.name for item in sets)}")
        scores[moment] = evaluate(encoder, sets)
        checkpoint.write_json(file, scores)
    return scores


def _check_files(config: Config) -> Path:
    """Look for every file that the run needs before anything is read.  Returns the model's path."""
    for i, source in enumerate(config.data.sources):
        existing(Path(source.path), f"data.sources[{i}].path")
    for table in ("sets", "report"):
        for i, item in enumerate(config.eval.sets if table == "sets" else config.eval.report):
            existing(Path(item.path), f"eval.{table}[{i}].path")
    for sets in (config.eval.sets, config.eval.report):
        if sets:
            read_sets(sets)
    try:
        return resolve_model(config.backbone.path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"backbone.path: {error}") from error


def _prepare_folder(run: Path, config: Config) -> int | None:
    """Make the run's folder.  Returns the step to go on from, None for a run from the start."""
    if run.exists() and not config.train.resume:
        if not config.train.overwrite:
            raise FileExistsError(f"{run} exists; go on with train.resume=true, or delete it with train.overwrite=true")
        if not (run / "config.toml").is_file():
            raise FileExistsError(f"{run} is no run folder, so train.overwrite does not delete it; move it away")
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    steps = checkpoint.steps_of(run)
    if config.train.resume and not steps:
        log(f"{run} holds no checkpoint: the run starts from the beginning")
    if not steps:
        return None
    _check_same(load_config(Config, run / "config.toml"), config, run)
    return steps[-1]


def _check_same(stored: Config, config: Config, run: Path) -> None:
    """Refuse to go on with another config than the run began with (where that would change its numbers)."""

    def comparable(value: Config) -> dict:
        free = {"run": "", "resume": False, "overwrite": False, "save_every": 0, "keep": 1, "log_every": 1}
        tables = asdict(replace(value, train=replace(value.train, **free), eval=EvalConfig()))
        return {
            f"{t}.{k}": v for t, table in tables.items() for k, v in table.items() if (t, k) != ("backbone", "dtype")
        }

    old, new = comparable(stored), comparable(config)
    changed = [f"{key} was {old[key]!r}, is {new[key]!r}" for key in old if old[key] != new[key]]
    if changed or config.backbone.dtype not in ("auto", stored.backbone.dtype):
        raise ValueError(
            f"{run} was begun with another config: {'; '.join(changed) or 'backbone.dtype'}; put it back, or start a "
            "new run with another train.run"
        )


def _resolve_dtype(config: Config, run: Path, device: torch.device) -> Config:
    """Settle dtype = "auto": as the run began, else by a measurement."""
    stored = run / "config.toml"
    if config.backbone.dtype == "auto" and config.train.resume and stored.is_file():
        return replace(config, backbone=replace(config.backbone, dtype=load_config(Config, stored).backbone.dtype))
    dtype, why = choose_dtype(config.backbone.dtype, device)
    name = str(dtype).removeprefix("torch.")
    log(f"dtype {name} ({why})")
    return replace(config, backbone=replace(config.backbone, dtype=name))


def _show_start(config: Config, mixture: Mixture, tokenizer: Tokenizer, device: torch.device) -> None:
    """Say what will run, and keep the exact ids of one example per side in RUN/tokens.txt."""
    faces = {
        m.__name__.split(".")[-1]: m.face(device) for m in (e5kernels.infonce, e5kernels.last_token, e5core.attention)
    }
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    log(f"device {named}; torch {torch.__version__}; " + "; ".join(f"{op}: {face}" for op, face in faces.items()))
    log(tokenizer.describe())
    n_steps, size = total_steps(config, mixture), config.batch.size
    log(f"{len(mixture.records):,} records, {mixture.epoch_size:,} an epoch; {n_steps} steps of {size} examples")
    batch = build_batch(mixture.batch(0, 1), tokenizer, config.batch, config.train.seed, 0)
    sides = zip(("query", "positive", "negative"), batch.sequences, strict=False)
    lines = [f"{side}, {len(ids)} tokens: {ids}\n{tokenizer.decode(ids)}\n" for side, ids in sides]
    Path(config.train.run, "tokens.txt").write_text("\n".join(lines), encoding="utf-8")


def _card(config: Config, model_path: Path, encoder: Encoder) -> checkpoint.Card:
    return checkpoint.Card(
        base_path=config.backbone.path,
        base_sha256=fingerprint(model_path),
        causal=config.backbone.causal,
        dtype=config.backbone.dtype,
        max_tokens=config.eval.max_tokens,
        lora=asdict(config.lora),
        tokenizer=asdict(config.tokenizer),
        tokenizer_contract=dict(encoder.tokenizer.contract()),
        template=TEMPLATE,
    )


def _data_digest(mixture: Mixture) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for record in mixture.records:
        digest.update(repr(record).encode())
    return digest.hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.  Returns the exit status: 0, or 2 with one line on stderr for what a user can mend."""
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node 1 -m e5core.train",
        description=__doc__.split("\n\n")[0],
        epilog="Every table and key stands with its meaning in configs/quickstart.toml; an unknown key is refused with "
        "the nearest known one. Resume an interrupted run with train.resume=true.",
    )
    parser.add_argument("config", type=Path, help="TOML file, e.g. configs/quickstart.toml")
    parser.add_argument("overrides", nargs="*", help="section.key=value, e.g. optim.lr=1e-4 train.run=runs/x")
    arguments = parser.parse_args(argv)
    try:
        train(load_config(Config, arguments.config, arguments.overrides))
    except (ValueError, OSError, FloatingPointError) as error:
        log(f"e5core.train: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
