"""Train an embedder: `torchrun --nproc-per-node 1 -m e5core.train CONFIG.toml [section.key=value ...]`.

One step, exact for any micro-batch size (GradCache, arXiv 2101.06983, with the fullest piece kept):

    pass 1   embed every micro-batch without a graph, the fullest one with its graph
    loss     InfoNCE over the whole batch, and its gradient at the embeddings
    pass 2   the kept graph takes its gradient; every other micro-batch is embedded again with a graph and takes its own

Dropout is a function of (seed, step, row, position), so both passes draw the same. A batch that fits one micro-batch is
thereby one plain pass. The run's folder holds all that there is to say about it (checkpoint.py, DESIGN 3.10).
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from e5core import checkpoint
from e5core.adapter import read_adapter
from e5core.batches import GlobalBatch, build_batch, pack
from e5core.config import load_config
from e5core.distributed import log, start
from e5core.encode import TEMPLATE, Encoder, ShownEncoder, describe_device
from e5core.encoder import EmbeddingModel, build_model, choose_dtype
from e5core.evaluate import evaluate, show_table
from e5core.lora import adapters
from e5core.loss import InfoNCE, LossConfig, infonce_loss
from e5core.metrics import MetricsFile, Progress
from e5core.mixture import Mixture, load_mixture
from e5core.optim import AdamW, learning_rate
from e5core.run import Config, check_files, check_folder, make_folder, resolve_dtype
from e5core.testsets import EvalSet
from e5core.tokenizer import Tokenizer
from e5core.weights import fingerprint


def train(config: Config) -> dict[str, dict[str, float]]:
    """Run a training from config to evaluation.  Returns what RUN/evaluation.json holds.

    Raises ValueError, OSError or FloatingPointError, each of which says what to do.
    """
    device = start().device
    log(describe_device(device))
    run = Path(config.train.run)
    model_path = check_files(config)
    check_folder(run, config)
    epochs = checkpoint.begun_epochs(run) if config.train.resume else []
    mixture, skipped = load_mixture(config.data, config.train.seed, epochs)
    for message in skipped:
        log(f"skipped {message}")
    config = resolve_dtype(config, run, device)
    dtype, _ = choose_dtype(config.backbone.dtype, device)
    lora, causal, seed = config.lora, config.backbone.causal, config.train.seed
    recompute = config.batch.recompute
    model = build_model(model_path, dtype, device, causal=causal, lora=lora, seed=seed, recompute=recompute)
    encoder = Encoder(model, Tokenizer.load(model_path, config.tokenizer), device, config.eval.max_tokens)
    resume_step = make_folder(run, config)
    _show_start(config, mixture, encoder.tokenizer)
    scores = _report(run, "before", encoder, config.eval.report)
    _loop(config, run, encoder, mixture, model_path, resume_step)
    best = checkpoint.read_best(run)
    if best is not None:
        read_adapter(checkpoint.step_folder(run, best["step"]), model.backbone)
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
    card, best = _card(config, model_path, encoder), None
    if resume_step is not None:
        best = checkpoint.restore(checkpoint.step_folder(run, resume_step), model, optimizer, mixture.digest, card)
        log(f"resumed after step {resume_step}")
    metrics = MetricsFile(run / "metrics.jsonl", resume_step)
    try:
        with Progress(n_steps, config.train.log_every) as progress:
            for step in range(resume_step or 0, n_steps):
                logged = _train_step(config, encoder, mixture, optimizer, step, n_steps)
                done, metric = step + 1, config.eval.metric
                if config.eval.every and (done % config.eval.every == 0 or done == n_steps):
                    logged["eval"] = evaluate(encoder, config.eval.sets)
                    if metric and (best is None or logged["eval"][metric] > best["value"]):
                        best = {"step": done, "metric": metric, "value": logged["eval"][metric]}
                metrics.write(logged)
                progress.step(logged)
                is_best, due = best is not None and best["step"] == done, config.train.save_every
                if is_best or done == n_steps or (due and done % due == 0):
                    golden = encoder.golden_vectors()
                    checkpoint.save(run, done, model, config.lora, card, golden, optimizer, mixture.state(), best)
                    if best is not None:
                        checkpoint.write_json(run / "best.json", best)
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
    try:
        result = backward_step(encoder.model, batch, config.loss, config.batch.micro_batch_tokens, (seed, step))
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
        "epoch": mixture.n_epochs((step + 1) * config.batch.size),
        "seconds": round(seconds, 3),
    }


def _check_moved(model: EmbeddingModel) -> None:
    """Stop a run whose adapters do not learn (peft #1402: B stayed zero while the loss fell)."""
    still = [name for name, linear in adapters(model.backbone) if not linear.lora_b.any()]
    if still:
        raise FloatingPointError(
            f"after the first step lora_b of {len(still)} linears is still zero, first of them {still[0]}: no gradient "
            "reached it; does every batch hold a negative for some query?"
        )


def _trainable(model: EmbeddingModel) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _report(run: Path, moment: str, encoder: Encoder, sets: Sequence[EvalSet]) -> dict[str, dict[str, float]]:
    """Score the report sets at this moment of the run and write them to RUN/evaluation.json.  Returns its content."""
    file = run / "evaluation.json"
    scores = json.loads(file.read_text()) if file.is_file() else {}
    if sets and (moment == "after" or moment not in scores):
        log(f"evaluating {moment} training: {', '.join(item.name for item in sets)}")
        scores[moment] = evaluate(ShownEncoder(encoder), sets)
        checkpoint.write_json(file, scores)
    return scores


def _show_start(config: Config, mixture: Mixture, tokenizer: Tokenizer) -> None:
    """Say what will run, and keep the exact ids of one example per side in RUN/tokens.txt."""
    log(tokenizer.describe())
    n_steps, size = total_steps(config, mixture), config.batch.size
    log(f"{len(mixture.records):,} records, {mixture.epoch_size:,} an epoch; {n_steps} steps of {size} examples")
    warmup = config.optim.warmup(n_steps)
    if warmup >= n_steps:
        log(f"warning: the warm-up of {warmup} steps never ends in {n_steps}; set optim.warmup_share")
    batch = build_batch(mixture.batch(0, 1), tokenizer, config.batch, config.train.seed, 0)
    sides = zip(("query", "positive", "negative"), batch.sequences, strict=False)
    lines = [f"{side}, {len(ids)} tokens: {ids}\n{tokenizer.decode(ids)}\n" for side, ids in sides]
    Path(config.train.run, "tokens.txt").write_text("\n".join(lines), encoding="utf-8")


def _card(config: Config, model_path: Path, encoder: Encoder) -> checkpoint.Card:
    return checkpoint.Card(
        base_path=config.backbone.path if config.backbone.path.startswith("package:") else str(model_path.resolve()),
        base_sha256=fingerprint(model_path),
        causal=config.backbone.causal,
        dtype=config.backbone.dtype,
        max_tokens=config.eval.max_tokens,
        lora=asdict(config.lora),
        tokenizer=asdict(config.tokenizer),
        tokenizer_contract=dict(encoder.tokenizer.contract()),
        template=TEMPLATE,
    )


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
