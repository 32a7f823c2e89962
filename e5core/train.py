"""Train an embedder: `torchrun --nproc-per-node N -m e5core.train CONFIG.toml [section.key=value ...]`.

Batches come from the mixture, step.py makes their gradients, optim.py moves the adapters. Each rank writes its part of
a checkpoint while the next step runs, rank 0 all else; the run's folder holds all that there is to say about it
(checkpoint.py, DESIGN 3.10).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from e5core import checkpoint
from e5core.adapter import read_adapter
from e5core.batches import build_batch
from e5core.config import load_config, write_whole
from e5core.distributed import World, check_same, finish, log, log_error, same_bits, share, start, sum_over_ranks
from e5core.encoder import EmbeddingModel, build_model, choose_dtype
from e5core.estimate import Plan, describe
from e5core.memory import as_table, is_out_of_memory, measured_peak
from e5core.metrics import MetricsFile, Progress
from e5core.mixture import Mixture, load_mixture
from e5core.optim import AdamW, learning_rate
from e5core.preemption import NEVER, Preempted, Preemption
from e5core.prefetch import Batches, Recipe
from e5core.run import (
    PREEMPTED,
    Config,
    check_files,
    check_folder,
    check_ranks,
    make_folder,
    resolve_dtype,
    settle_batch,
    total_steps,
)
from e5core.saving import Saving
from e5core.scores import evaluate, show_table
from e5core.step import backward_step, make_optimizer
from e5core.template import SHAPES
from e5core.testsets import EvalSet
from e5core.text_encoder import Encoder, ShownEncoder, describe_device
from e5core.tokenizer import Tokenizer
from e5core.trained import trained_folder
from e5core.weights import fingerprint


def train(config: Config) -> dict[str, dict[str, float]]:
    """Run a training from config to evaluation.  Returns what RUN/evaluation.json holds.

    Raises ValueError, OSError, FloatingPointError or MemoryError, each of which says what to do; Preempted after
    SIGTERM.
    """
    world = start()
    device = world.device
    log(f"{describe_device(device)}; ranks: {world.world_size}")
    check_ranks(config, world)
    run = Path(config.train.run)
    model_path = check_files(config)
    check_folder(run, config, world)
    epochs = checkpoint.begun_epochs(run) if config.train.resume else []
    homogeneous = config.batch.size if config.batch.composition == "homogeneous" else None
    scored = config.loss.distillation is not None
    mixture, skipped = load_mixture(config.data, config.train.seed, epochs, world, homogeneous, scored)
    for message in skipped:
        log(f"skipped {message}")
    check_same({"hash of the training records": mixture.digest}, world)
    config = resolve_dtype(config, run, world)
    dtype, _ = choose_dtype(config.backbone.dtype, device)
    config, planned = settle_batch(config, run, mixture, model_path, dtype, world)
    with same_bits(config.train.deterministic, device), _explain_memory(planned):
        return _run(config, run, mixture, model_path, planned, world)


def _run(
    config: Config, run: Path, mixture: Mixture, model_path: Path, planned: Plan, world: World
) -> dict[str, dict[str, float]]:
    """Do what `train` does, from the weights on."""
    device, dtype = world.device, planned.dtype
    held = {"recompute": config.batch.recompute, "strategy": planned.chosen.setting.strategy, "world": world}
    source = config.backbone
    form = {"causal": source.causal, "pooling": source.pooling, "fp8_skip": source.skipped}
    trained = {"lora": config.adapters, "full": config.train.full}
    model = build_model(model_path, dtype, device, seed=config.train.seed, **trained, **form, **held)
    if config.lora.init is not None:
        read_adapter(trained_folder(Path(config.lora.init)), model.backbone, model.put)
    tokenizer, template = Tokenizer.load(model_path, config.tokenizer), config.batch.template
    encoder = Encoder(model, tokenizer, device, config.eval.max_tokens, world, template=template)
    resume_step = share(make_folder(run, config) if world.is_main else None, world)[0]
    if world.is_main:
        _show_start(config, mixture, encoder.tokenizer)
        write_whole(run / "plan.txt", describe(planned))
    scores = _report(run, "before", encoder, config.eval.report)
    _loop(config, run, encoder, mixture, model_path, planned, resume_step)
    best = share(checkpoint.read_best(run) if world.is_main else None, world)[0]
    if best is not None:
        folder = checkpoint.step_folder(run, best["step"])
        checkpoint.check_files(folder)
        checkpoint.read_trained(folder, model)
        log(f"best checkpoint: step {best['step']} with {best['metric']} = {best['value']:.2f}")
    scores |= _report(run, "after", encoder, config.eval.report)
    if config.eval.report and world.is_main:
        show_table(scores)
    log(f"the run is in {run}")
    return scores


def _loop(
    config: Config,
    run: Path,
    encoder: Encoder,
    mixture: Mixture,
    model_path: Path,
    planned: Plan,
    resume_step: int | None,
) -> None:
    """Train from the resumed step (or the first) to the last, with logs, evaluations and checkpoints."""
    model, world, n_steps = encoder.model, encoder.world, total_steps(config, mixture)
    optimizer = make_optimizer(model, config.optim)
    preemption = Preemption(world)
    card, best, done = _card(config, model_path, encoder), None, resume_step or 0
    logged: dict[str, Any] | None = None  # of a step that is done but for its evaluation
    if resume_step is not None:
        folder = checkpoint.step_folder(run, resume_step)
        best, logged = checkpoint.restore(folder, model, optimizer, mixture.digest, card)
        log(f"resumed after step {resume_step}")
    recipe = Recipe(model_path, config.tokenizer, config.batch, config.train.seed, world)
    with (
        preemption.listening(),
        Saving(run, config.train.keep, world, done) as saving,
        Batches(mixture, encoder.tokenizer, recipe, range(done, n_steps), config.data.workers) as batches,
        _journal(config, run, n_steps, done - 1 if logged else resume_step, world) as tell,
    ):

        def save() -> None:
            golden = encoder.golden_vectors()
            state = {"step": done, **mixture.state(), "best": best, "unevaluated": logged}
            saving.begin(done, model, config.adapters, card, golden, optimizer, state)

        encoder.preemption = preemption
        try:
            while done < n_steps or logged is not None:
                saving.check()
                if logged is None:
                    logged = _train_step(config, encoder, batches, optimizer, done, n_steps, preemption)
                    if done == (resume_step or 0) and world.is_main:
                        _show_peak(run, planned, encoder.device)
                    done += 1
                if config.eval.every and (done % config.eval.every == 0 or done == n_steps):
                    logged["eval"] = share(evaluate(encoder, _told(encoder, config.eval.sets)), world)[0]
                    best = _better(best, done, config.eval.metric, logged["eval"])
                tell(logged)
                logged = None
                is_best, due = best is not None and best["step"] == done, config.train.save_every
                if is_best or done == n_steps or (due and done % due == 0):
                    save()
            with preemption.phase():
                saving.finish()
            encoder.preemption = NEVER
        except Preempted:
            encoder.preemption = NEVER
            save()
            saving.finish()
            _leave(run, done, world)
            raise


def _better(
    best: dict[str, Any] | None, step: int, metric: str | None, scores: Mapping[str, float]
) -> dict[str, Any] | None:
    """Return the better one of the best checkpoint so far and this step's, by the metric that chooses."""
    if metric is None or (best is not None and scores[metric] <= best["value"]):
        return best
    return {"step": step, "metric": metric, "value": scores[metric]}


def _leave(run: Path, step: int, world: World) -> None:
    """Mark a run that SIGTERM stopped."""
    if world.is_main:
        checkpoint.write_json(run / PREEMPTED, {"step": step})
        log(f"SIGTERM: stopped after step {step}{', which is saved' if step else ''}; go on with train.resume=true")


@contextmanager
def _journal(
    config: Config, run: Path, n_steps: int, resume_step: int | None, world: World
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield what takes a step's line, for metrics.jsonl and for people; on other ranks than 0 it is dropped."""
    if not world.is_main:
        yield lambda logged: None
        return
    metrics = MetricsFile(run / "metrics.jsonl", resume_step)
    try:
        with Progress(n_steps, config.train.log_every) as progress:

            def tell(logged: Mapping[str, Any]) -> None:
                metrics.write(logged)
                progress.step(logged)

            yield tell
    finally:
        metrics.close()


def _train_step(
    config: Config,
    encoder: Encoder,
    batches: Batches,
    optimizer: AdamW,
    step: int,
    n_steps: int,
    preemption: Preemption,
) -> dict[str, Any]:
    """Do step `step` (from 0).  Returns the line for metrics.jsonl.  Raises Preempted before anything has moved."""
    started = time.perf_counter()
    seed, world = config.train.seed, encoder.world
    before = _lora_b(encoder.model) if step == 0 else {}
    batch, packed = batches.take(step)
    data_seconds = time.perf_counter() - started
    counts = sum_over_ranks(torch.tensor([batch.n_tokens, batch.n_truncated], device=world.device), world)
    try:
        budget = config.batch.micro_batch_tokens
        result = backward_step(encoder.model, batch, config.loss, budget, (seed, step), world, preemption, packed)
        grad_norm = optimizer.clip_gradients()
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step + 1}: {error}; records {', '.join(batch.record_ids[:5])}, ...") from error
    lr = learning_rate(config.optim, step, n_steps)
    optimizer.update(lr)
    if step == 0:
        _check_moved(before, _lora_b(encoder.model), world)
    seconds = time.perf_counter() - started
    n_tokens, n_truncated = counts.tolist()
    return {
        "step": step + 1,
        "loss": result.loss.item(),
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens_per_s": round(n_tokens / seconds, 1),
        "in_batch_accuracy": result.accuracy.item(),
        "negatives_per_query": result.negatives.item(),
        "tokens": n_tokens,
        "truncated": n_truncated,
        "epoch": batches.mixture.n_epochs((step + 1) * config.batch.size),
        "seconds": round(seconds, 3),
        "data_seconds": round(data_seconds, 3),
    }


def _lora_b(model: EmbeddingModel) -> dict[str, torch.Tensor]:
    """Copy every B, or what this rank holds of it."""
    return {name: part.detach().clone() for name, part in model.trained().items() if name.endswith("lora_b")}


def _check_moved(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], world: World) -> None:
    """Stop a run whose adapters do not learn (peft #1402: B stayed zero while the loss fell)."""
    still = {name for name, part in before.items() if torch.equal(part, after[name])}
    still.intersection_update(*share(sorted(still), world))
    if still:
        raise FloatingPointError(
            f"the first step moved no lora_b of {len(still)} linears, first of them {min(still)}: no gradient reached "
            "it; does every batch hold a negative for some query?"
        )


@contextmanager
def _explain_memory(planned: Plan) -> Iterator[None]:
    """Where memory runs out, raise MemoryError that says what was to take it and what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        setting = planned.chosen.setting
        ways = f"lower batch.micro_batch_tokens (now {setting.micro_batch_tokens}; no text is ever split, so it cannot "
        ways += "go below batch.max_tokens)"
        if setting.recompute != "block":
            ways += f", or set batch.recompute to mlp or block (now {setting.recompute})"
        cause = str(error).partition("\n")[0] or "no more"
        raise MemoryError(
            f"out of memory: {cause}; the plan, in MiB of this rank:\n"
            f"{as_table(planned.chosen.lines)}\n{ways}, or batch.size, where the loss takes it; begin it anew with "
            "train.overwrite=true"
        ) from error


def _show_peak(run: Path, planned: Plan, device: torch.device) -> None:
    """Put the plan's memory beside what the first step took, in the log and in RUN/plan.txt."""
    predicted, (measured, what) = planned.chosen.peak_mib, measured_peak(device)
    if device.type == "cpu":
        predicted += planned.card.framework_mib
    told = f"memory: {predicted:,.0f} MiB predicted, {measured:,.0f} MiB measured after a step ({what})"
    log(f"MiB of rank 0 by plan:\n{as_table(planned.chosen.lines)}\n{told}")
    write_whole(run / "plan.txt", f"{describe(planned)}{told}\n")


def _report(run: Path, moment: str, encoder: Encoder, sets: Sequence[EvalSet]) -> dict[str, dict[str, float]]:
    """Score the report sets at this moment of the run and write them to RUN/evaluation.json.  Returns its content."""
    file, world = run / "evaluation.json", encoder.world
    scores = share(json.loads(file.read_text()) if world.is_main and file.is_file() else {}, world)[0]
    if sets and (moment == "after" or moment not in scores):
        log(f"evaluating {moment} training: {', '.join(item.name for item in sets)}")
        scores[moment] = share(evaluate(ShownEncoder(encoder), _told(encoder, sets)), world)[0]
        if world.is_main:
            checkpoint.write_json(file, scores)
    return scores


def _told(encoder: Encoder, sets: Sequence[EvalSet]) -> list[EvalSet]:
    return [item.under(encoder.template) for item in sets]


def _show_start(config: Config, mixture: Mixture, tokenizer: Tokenizer) -> None:
    """Say what will run, and keep the exact ids of one example per side in RUN/tokens.txt."""
    log(tokenizer.describe())
    n_steps, size = total_steps(config, mixture), config.batch.size
    log(f"{mixture.n_records:,} records, {mixture.epoch_size:,} an epoch; {n_steps} steps of {size} examples")
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
        base_sha256=share(fingerprint(model_path) if encoder.world.is_main else None, encoder.world)[0],
        causal=config.backbone.causal,
        pooling=config.backbone.pooling,
        dtype=config.backbone.dtype,
        max_tokens=config.eval.max_tokens,
        lora=None if config.train.full else {k: v for k, v in asdict(config.lora).items() if k != "init"},
        tokenizer=asdict(config.tokenizer),
        tokenizer_contract=dict(encoder.tokenizer.contract()),
        template=SHAPES[config.batch.template],
        frozen_dtype=config.backbone.frozen_dtype,
        fp8_skip=list(config.backbone.skipped or ()),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.  Returns the exit status: 0, or 2 with one line on stderr for what a user can mend."""
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node N -m e5core.train",
        description=__doc__.split("\n\n")[0],
        epilog="Every table and key stands with its meaning in configs/quickstart.toml; an unknown key is refused with "
        "the nearest known one. Resume an interrupted run with train.resume=true.",
    )
    parser.add_argument("config", type=Path, help="TOML file, e.g. configs/quickstart.toml")
    parser.add_argument("overrides", nargs="*", help="section.key=value, e.g. optim.lr=1e-4 train.run=runs/x")
    arguments = parser.parse_args(argv)
    try:
        train(load_config(Config, arguments.config, arguments.overrides))
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        log_error(f"e5core.train: {error}")
        return 2
    except Preempted:
        pass  # a wish that was met
    finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
